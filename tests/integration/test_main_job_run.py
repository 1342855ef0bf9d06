"""The main job as a program: how it looks, where its telemetry goes, how it ends."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING

import processes
import pytest
from main_job import EXAMPLES, account, command, environment, run

if TYPE_CHECKING:
    from otlp import Receiver


UNHURRIED = {"PERISCOPE_SHUTDOWN_TIMEOUT": "15"}
"""For a Collector in this process, which a busy machine stops for seconds."""

# How it looks, and where telemetry goes.


@pytest.mark.parametrize("columns", [80, 120])
def test_the_summary_fits_its_columns(columns):
    """Nothing is cut, wrapped or coloured at 80 and 120 columns without a terminal."""
    result = run(COLUMNS=str(columns))
    assert max(map(len, result.stdout.splitlines())) <= columns
    assert account(result.stdout)
    assert "…" not in result.stdout
    assert "\x1b" not in result.stdout
    assert re.search(r"Operations +feed +calls +outcomes +p50 +p95 +max\n", result.stdout)
    assert re.search(r"convert +ics-attack +10 +10 ok +[\d.]+ ms", result.stdout)
    assert "Telemetry went nowhere: no exporter is configured\n" in result.stdout


def test_an_ascii_output_gets_ascii():
    """Where the output has no other characters, the summary does without them."""
    result = run(PYTHONIOENCODING="ascii:strict")
    assert (result.returncode, result.stderr) == (0, "")
    assert "OK 1,826 received = 1,784 ingested" in result.stdout


def test_a_hostile_feed_name_does_no_harm():
    """Markup is shown as it is, and what a terminal would act on is not shown."""
    result = run("--feed", "[red]x[/]\x1b]0;owned\x07\n:smile:")
    assert result.returncode == 0
    assert "[red]x[/] :smile:" in result.stdout
    assert "\x1b" not in result.stdout


def on_terminal(*arguments: str) -> str:
    """Return what the job writes to a terminal of 80 columns."""
    leader, follower = pty.openpty()
    shown = bytearray()
    with subprocess.Popen(
        command(*arguments),
        env=environment(TERM="xterm-256color"),
        stdin=follower,
        stdout=follower,
        stderr=follower,
    ):
        os.close(follower)
        try:
            while data := os.read(leader, 65536):
                shown += data
        except OSError:  # Linux says so when the last writer has closed its end
            pass
    os.close(leader)
    return shown.decode()


def test_a_terminal_gets_a_progress_bar_and_colours():
    """While it runs a bar counts the objects; at the end the cursor is back."""
    shown = on_terminal()
    bar, _, summary = shown.partition("Run summary")
    assert re.search(r"ingest \(ics-attack\).*1826/1826", bar)
    assert "\x1b[32m" in summary
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0
    assert account(re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", summary).replace("\r\n", "\n"))[0] == 1826


def test_a_collector_gets_every_operation(collector: Receiver):
    """With --otlp the spans make one trace, and the summary counts what was exported."""
    result = run("--otlp", collector.http, **UNHURRIED)
    received = collector.received()
    assert received.names() == {"ingest": 1, "fetch": 1, "parse": 1, "convert": 10, "store": 10}
    assert len({span.trace_id for span in received.spans}) == 1
    assert {span.attributes["threat.feed.name"] for span in received.spans} == {"ics-attack"}
    settled = received.sums("threat.ingest.items.settled", by="threat.ingest.item.outcome")
    assert settled == {"ingested": 1784, "skipped": 42}
    assert re.search(rf"spans +{collector.http} +23 +0 +0 +0\n", result.stdout)
    assert result.stderr.startswith(f"periscope-otel: exported 23 spans to {collector.http}, ")


def test_a_failed_pull_is_counted_for_its_feed(collector: Receiver, tmp_path):
    """What could not be read leaves a span of its feed that says so."""
    run(tmp_path / "my-feed-2.1.json", "--otlp", collector.http, **UNHURRIED)
    (fetch,) = (span for span in collector.received().spans if span.name == "fetch")
    assert fetch.attributes["threat.feed.name"] == "my-feed"
    assert fetch.attributes["error.type"] == "FileNotFoundError"


def test_prometheus_can_scrape_until_ctrl_c():
    """--serve prints its URL, answers there with the run's figures, and ends with code 0."""
    script = EXAMPLES / "ingest_attack.py"
    with processes.running(script, "--serve", "127.0.0.1:0", env=environment()) as job:
        shown = ""
        while "Serving until Ctrl-C" not in shown:
            shown += job.line() + "\n"
        url = re.search(r"http://127\.0\.0\.1:\d+/metrics", shown)
        assert url, shown
        with urllib.request.urlopen(url[0]) as answer:
            page = answer.read().decode()
        assert re.search(r'items_settled_total\{.*outcome="ingested".*\} 1784', page)
        job.send(signal.SIGINT)
        assert job.ended()[0] == 0


def test_an_address_in_use_is_one_line():
    """It ends with exit code 2 and one line on standard error that says which address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run("--serve", address)
    assert result.returncode == 2
    assert re.fullmatch(rf"ingest_attack: cannot serve on {address}: [^\n]+\n", result.stderr)


def test_ctrl_c_ends_with_a_summary(tmp_path):
    """SIGINT while the bundle is read ends with exit code 130, and the summary says so."""
    os.mkfifo(tmp_path / "slow.json")
    interpreter, _, _, *rest = command(tmp_path / "slow.json")  # without warnings for the open file
    job = subprocess.Popen(
        [interpreter, *rest],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    with job, (tmp_path / "slow.json").open("w"):  # opens when the job does: it is reading now
        job.send_signal(signal.SIGINT)
        output, errors = job.communicate(timeout=120)
    assert (job.returncode, errors) == (130, "")
    assert re.search(r"fetch +slow +1 1 cancelled", output)


def test_ctrl_c_between_batches_shows_what_was_done(tmp_path):
    """What was received and not stored when SIGINT came is shown as unaccounted."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import signal, sys\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import ingest_attack\n"
        "whole, batches = ingest_attack.Ingest.store, []\n"
        "def store(self, *given):\n"
        "    batches.append(given)\n"
        "    signal.raise_signal(signal.SIGINT) if len(batches) == 3 else whole(self, *given)\n"
        "ingest_attack.Ingest.store = store\n"
        "sys.exit(ingest_attack.main())\n"
    )
    result = subprocess.run(
        [sys.executable, str(driver)],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    received, ingested, skipped, failed, unaccounted = account(result.stdout)
    assert (result.returncode, result.stderr) == (130, "")
    assert (received, failed) == (600, 0)
    assert unaccounted == 600 - ingested - skipped > 0


# The other examples.


def test_the_feeds_example_tells_its_feeds_apart():
    """The broken feed failed with its status, the silent one is ok and ingested nothing."""
    result = run(example="feeds.py")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"pull +broken +1 1 error", result.stdout)
    assert re.search(r"fetch +broken +1 503\n", result.stdout)
    assert re.search(r"pull +healthy +6 +0 +3 +2 +1 +0\n", result.stdout)
    assert re.search(r"pull +silent +1 +0 +0 +1 +0 +0\n", result.stdout)


def test_the_library_example_undoes_its_patch():
    """Two calls were monitored; the one after the patch was undone was not."""
    result = run(example="patch_library.py")
    assert (result.returncode, result.stderr) == (0, "")
    assert "2 operations" in result.stdout
    assert re.search(r"download +/gone.txt +1 1 error", result.stdout)


def test_the_flaky_feed_example_sends_no_request_while_open():
    """A breaker opens, what it rejects is not sent, a probe finds the recovery, all is replayed."""
    expected = [1, 2, 2, 1, 0, 0, 0, 1, 1, 1]
    for _ in range(4):
        result = run(example="flaky_feed.py")
        assert (result.returncode, result.stderr) == (0, "")
        sent = [int(number) for number in re.findall(r"requests sent: (\d+)", result.stdout)]
        if sent == expected:
            break  # else it was stopped for longer than its breaker is open, which is two seconds
    assert sent == expected
    assert result.stdout.count("not sent, open: try again in") == 3
    assert "breaker blocklist is closed: probes succeeded" in result.stdout
    assert result.stdout.endswith("7 succeeded, 0 failed; pages: 10 of 10\n")
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_testing_example_passes():
    """A user's pytest finds the fixture by itself."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly",
         EXAMPLES / "test_with_periscope.py"],
        capture_output=True, encoding="utf-8", timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
