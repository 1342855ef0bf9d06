"""`periscope dlq` as a process of its own, on real stores."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from patience import be_patient
from processes import PROGRAMS, clean_environment

from periscope_otel.dead_letter import Filter, open_store
from periscope_otel.dead_letter.bodies import FOLDER, BodyFiles
from periscope_otel.dead_letter.codecs import encode_arguments

pytest.register_assert_rewrite("store_conformance")

from store_conformance import (  # noqa: E402  (its assertions are rewritten first)
    EVERY,
    a_letter,
    everything,
    ids_of,
    some,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from periscope_otel.dead_letter import Letter, Store

MODULE = "operations"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine that stops for seconds change nothing."""
    be_patient(monkeypatch)


@pytest.fixture(params=["sqlite", "redis"])
def store(request, redis, tmp_path) -> Iterator[Store]:
    """Return an empty store, whose `url` a command may be given."""
    if request.param == "redis":
        with redis.client as client:
            client.flushall()
        with open_store(redis.url) as opened:
            yield opened
    else:
        with open_store(f"sqlite:///{tmp_path}/letters.db") as opened:
            yield opened


@pytest.fixture
def dlq(tmp_path):
    """Return what runs `periscope dlq` in a folder of its own, without a terminal."""
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copy(PROGRAMS / f"{MODULE}.py", folder)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*COMMAND, *arguments],
            cwd=folder,
            env=clean_environment() | {"COLUMNS": "80"} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done

    return run


COMMAND = [sys.executable, "-c", "from periscope_otel.cli import app; app()", "dlq"]


def fetch(url: str) -> None:
    """Stand for the operation that has failed."""


def of_call(url: str, operation: str = "pkg.fetch", **fields) -> Letter:
    encoded = encode_arguments(fetch, (url,), {})
    return a_letter(encoded.payload, codec=encoded.codec, operation=operation, **fields)


# --- replays --------------------------------------------------------------------------------------


def test_a_replay_of_all_is_status_0(dlq, store):
    """Letters whose operation succeeds are gone, and a line says how many."""
    store.put([of_call(f"http://a.example/{n}") for n in range(3)])
    done = dlq("replay", "--store", store.url, "--app", MODULE)
    assert done.returncode == 0, done.stderr
    assert "3 succeeded; 0 failed" in done.stdout
    assert store.stats().total == 0


def test_a_replay_that_fails_is_status_1(dlq, store):
    """Each failing letter is told with its error, which does nothing to a terminal."""
    good, bad = of_call("http://good.example"), of_call("http://evil.example")
    store.put([good, bad])
    done = dlq("replay", "--store", store.url, "--app", f"{MODULE}:app.wsgi")
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if bad.id in line]
    assert "failed: ValueError: no" in line
    assert "\x1b" not in done.stdout
    assert good.id not in done.stdout
    assert "1 succeeded; 1 failed" in done.stdout


def test_json_of_a_replay_is_alone_on_standard_output(dlq, store):
    """What the user's own module prints does not mix with the result."""
    bad = of_call("http://evil.example")
    store.put([of_call("http://good.example"), bad, *some(2, operation="unknown")])
    done = dlq("replay", "--store", store.url, "--app", MODULE, "--json")
    result = json.loads(done.stdout)
    assert (result["succeeded"], result["failed"]) == (1, 1)
    assert result["left"] == {"no operation unknown is registered": 2}
    assert result["letters"][0]["id"] == bad.id
    assert "imported" in done.stderr
    assert "fetching http://good.example" in done.stderr


def test_a_replay_takes_letters_by_id(dlq, store):
    """Only the letters that are named are replayed; a parked one says that it is."""
    wanted, other, parked = (of_call(f"http://{n}.example", state=state)
                             for n, state in enumerate(("dead", "dead", "parked")))  # fmt: skip
    store.put([wanted, other, parked])
    done = dlq("replay", wanted.id, parked.id, "--store", store.url, "--app", MODULE)
    assert done.returncode == 1
    assert f"{parked.id} is parked" in done.stderr
    assert sorted(ids_of(everything(store))) == sorted([other.id, parked.id])


def test_a_dry_run_replays_nothing(dlq, store):
    """A dry run says how many would be replayed, and why others would not."""
    store.put([of_call("http://a.example"), a_letter(operation="unknown")])
    done = dlq("replay", "--store", store.url, "--app", MODULE, "--dry-run")
    assert done.returncode == 0
    assert "1 would be replayed; 1 left: no operation unknown is registered" in done.stdout
    assert store.stats().total == 2


def test_a_letter_that_fails_too_often_is_parked(dlq, store):
    """The fifth failed replay parks a letter, and the summary says so."""
    letter = of_call("http://evil.example", replays=4)
    store.put([letter])
    done = dlq("replay", "--store", store.url, "--app", MODULE)
    assert done.returncode == 1
    assert f"{letter.id}  parked: ValueError" in done.stdout
    assert "1 failed (1 of them too often: parked)" in done.stdout


def test_many_letters_that_are_left_are_counted(dlq, store):
    """Of letters that cannot be tried the first are told, and all are counted by reason."""
    store.put(some(40, operation="unknown"))
    done = dlq("replay", "--store", store.url, "--app", MODULE)
    assert "40 left: no operation unknown is registered" in done.stdout
    assert done.stdout.count("\n") < 30
    assert "named by --app do not define" in done.stderr


def test_without_operations_a_replay_says_what_is_missing(dlq, store):
    """Where nothing is registered the message says how to register it."""
    store.put([of_call("http://a.example")])
    done = dlq("replay", "--store", store.url)
    assert done.returncode == 1
    assert "--app" in done.stderr
    assert store.stats().by_state == {"dead": 1}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import no_such_module_at_all\n", "ModuleNotFoundError"),
        ("raise SystemExit(0)\n", "SystemExit"),
        ("raise ValueError('\\x1b[31mred')\n", "ValueError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_status_2(dlq, tmp_path, text, why):
    """What is wrong with the user's module is one message with its line, and no traceback."""
    (tmp_path / "here" / "bad_module.py").write_text(text)
    done = dlq("replay", "--app", "bad_module", COLUMNS="200")
    assert done.returncode == 2
    assert why in done.stderr
    assert "bad_module.py" in done.stderr
    assert "\x1b" not in done.stderr


def test_limits_of_a_replay_hold(dlq, store):
    """`--limit` letters are tried and no more, by several threads, too."""
    store.put([of_call(f"http://a.example/{n}") for n in range(9)])
    done = dlq(
        "replay", "--store", store.url, "--app", MODULE, "--limit", "4", "--concurrency", "3",
        "--rate", "1000",
    )  # fmt: skip
    assert "4 succeeded" in done.stdout
    assert store.stats().total == 5


# --- stores ---------------------------------------------------------------------------------------


def test_all_commands_work_on_each_store(dlq, store, tmp_path):
    """List, show, stats, requeue, park, unpark, export, purge and import do what they say."""
    letters = some(4, fingerprint="f7")
    store.put(letters)
    where = ("--store", store.url)
    assert json.loads(dlq("list", "--json", *where).stdout)["letters"][0]["id"] == letters[-1].id
    assert letters[0].id in dlq("show", letters[0].id, *where).stdout
    assert json.loads(dlq("stats", "--json", *where).stdout)["by_fingerprint"][0]["letters"] == 4
    assert dlq("requeue", letters[0].id, *where).stdout == "1 letter requeued\n"
    assert dlq("park", "--fingerprint", "f7", *where).stdout == "4 letters parked\n"
    assert dlq("unpark", *where).stdout == "4 letters unparked\n"
    out = tmp_path / "out.jsonl"
    assert dlq("export", "--output", str(out), *where).returncode == 0
    assert dlq("purge", "--yes", *where).stdout == "4 letters purged\n"
    assert dlq("import", str(out), *where).stdout.startswith("4 imported, 0 there already")
    assert ids_of(everything(store)) == ids_of(letters)


def test_a_beginning_of_an_id_finds_its_letter(dlq, store):
    """An id may be given by its beginning, in either store."""
    old = a_letter(id="01890000-0000-7000-8000-000000000001", last_failed_at=1.8e9)
    store.put([old, *some(30, last_failed_at=1.9e9)])
    assert old.id in dlq("show", "01890000", "--store", store.url).stdout
    assert dlq("show", "01999999", "--store", store.url).returncode == 1


def test_the_settings_name_a_redis(dlq, redis):
    """Without `--store` it is the Redis of the settings."""
    with redis.client as client:
        client.flushall()
    with open_store(redis.url) as opened:
        opened.put(some(2))
    done = dlq("stats", "--json", PERISCOPE_REDIS_URL=redis.url)
    assert json.loads(done.stdout)["total"] == 2


def test_letters_in_the_outbox_are_told(dlq, redis, tmp_path):
    """`stats` of a Redis says how many letters of this machine have not reached it."""
    from periscope_otel.dead_letter.outbox import Outbox
    from periscope_otel.dead_letter.queue import FILE

    outbox = Outbox(tmp_path / FILE)
    outbox.put(some(3))
    outbox.close()
    settings = {"PERISCOPE_REDIS_URL": redis.url, "PERISCOPE_DATA_DIR": str(tmp_path)}
    assert json.loads(dlq("stats", "--json", **settings).stdout)["waiting_in_outbox"] == 3
    assert "3 more are still in this machine's outbox" in dlq("stats", **settings).stderr


@pytest.mark.parametrize("how", ["refused", "hung", "not a Redis"])
def test_a_store_that_is_away_is_status_3(dlq, redis, tmp_path, how):
    """A Redis that refuses, hangs or is none at all is one line and exit code 3."""
    if how == "refused":
        done = dlq("list", "--store", "redis://:hunter2Qx9@127.0.0.1:1")
    elif how == "hung":
        redis.pause()
        try:
            done = dlq("list", "--store", redis.url)
        finally:
            redis.resume()
    else:
        done = dlq("list", "--store", f"unix://{tmp_path}/nothing.sock")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1
    assert "hunter2Qx9" not in done.stderr


# --- files ----------------------------------------------------------------------------------------


def test_export_goes_through_a_pipe(dlq, store):
    """An export to standard output is JSON Lines, and nothing else is on it."""
    letters = some(3)
    store.put(letters)
    done = dlq("export", "--store", store.url, "--json")
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ids_of(letters)
    ended = subprocess.run(
        [*COMMAND, "import", "-", "--store", store.url, "--queue", "other", "--json"],
        input=done.stdout, env=clean_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert json.loads(ended.stdout)["stored"] == 3
    assert store.stats("other").total == 3


def test_an_export_file_is_not_replaced(dlq, store, tmp_path):
    """A file that is there stays, unless `--force` is given."""
    path = tmp_path / "out.jsonl"
    path.write_text("mine")
    assert dlq("export", "--output", str(path), "--store", store.url).returncode == 2
    assert path.read_text() == "mine"
    done = dlq("export", "--output", str(path), "--store", store.url, "--force", "--json")
    assert json.loads(done.stdout)["exported"] == 0
    assert path.read_text() == ""
    assert dlq("export", "-o", "/dev/null", "--force", "--store", store.url).returncode == 2
    assert not Path("/dev/null").is_file()


def test_an_import_with_damaged_lines_is_status_1(dlq, store, tmp_path):
    """Damaged lines are told with their numbers, and the others are imported."""
    letters = some(2)
    store.put(letters)
    path = tmp_path / "out.jsonl"
    dlq("export", "-o", str(path), "--store", store.url)
    path.write_bytes(b"\x1b[31m\n" + path.read_bytes() + b'{"id":')
    store.purge(EVERY, dry_run=False)
    done = dlq("import", str(path), "--store", store.url)
    assert done.returncode == 1
    assert "line 1: " in done.stderr
    assert "line 4: " in done.stderr
    assert "2 imported" in done.stdout


def test_a_sweep_archives_and_removes(dlq, store, tmp_path):
    """`sweep` says what it would do, and with `--yes` archives and removes it."""
    store.put([*some(3), *some(1, last_failed_at=4e9)])
    how = ("sweep", "--store", store.url, "--archive", str(tmp_path / "a.jsonl"))
    assert dlq(*how).stdout.startswith("3 letters would be removed (3 too old")
    assert json.loads(dlq(*how, "--json").stdout)["by_age"] == 3
    assert store.stats().total == 4
    assert dlq(*how, "--yes").stdout.startswith("3 letters removed (3 too old")
    assert len((tmp_path / "a.jsonl").read_bytes().splitlines()) == 3
    done = dlq("sweep", "--store", store.url, "--archive", "/no/such/folder/a", "--most-letters",
               "0", "--yes")  # fmt: skip
    assert done.returncode == 1
    assert store.stats().total == 1


def test_a_large_payload_of_an_embedded_store_is_shown_and_exported(dlq, tmp_path):
    """Payload files beside a store's file are found by every command."""
    bodies = BodyFiles(tmp_path / FOLDER, inline=1)
    letter = bodies.moved_out(of_call("http://evil.example"))
    url = f"sqlite:///{tmp_path}/letters.db"
    with open_store(url) as store:
        store.put([letter])
    assert "hxxp://evil[.]example" in dlq("show", letter.id, "--store", url).stdout
    line = json.loads(dlq("export", "--store", url).stdout)
    assert line["body"]["base64"]
    assert "body_file" not in line


# --- terminals ------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_traceback(dlq, tmp_path):
    """`| head -1` gets its line, and nothing is written to standard error."""
    url = f"sqlite:///{tmp_path}/letters.db"
    with open_store(url) as store:
        store.put(some(900, error_message="x" * 900))
    for command in (["list", "--limit", "900"], ["list", "--json", "--limit", "900"], ["export"]):
        with subprocess.Popen(
            [*COMMAND, *command, "--store", url],
            env=clean_environment() | {"COLUMNS": "80"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.read(10)
            process.stdout.close()
            errors = process.stderr.read().decode()
            assert process.wait(60) in (0, 1)  # all may have been written before
        assert errors == ""


@pytest.mark.parametrize("command", [["list"], ["stats", "--json"], ["show", "ID"], ["export"]])
def test_no_standard_output_at_all_is_no_traceback(dlq, tmp_path, command):
    """A command whose standard output is closed from the start ends in order."""
    url = f"sqlite:///{tmp_path}/letters.db"
    (letter,) = some(1)
    with open_store(url) as store:
        store.put([letter])
    arguments = [letter.id if one == "ID" else one for one in command]
    ended = subprocess.run(
        ["/bin/sh", "-c", '"$@" >&-', "sh", *COMMAND, *arguments, "--store", url],
        env=clean_environment(), stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode in (0, 1)
    assert "Traceback" not in ended.stderr


def test_a_terminal_of_few_characters_shows_all(dlq, tmp_path):
    """Where the output takes ASCII alone, other characters are written out."""
    url = f"sqlite:///{tmp_path}/letters.db"
    with open_store(url) as store:
        store.put(some(1, feed="Фид"))
    done = dlq("list", "--store", url, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0
    assert "\\u0424" in done.stdout


def on_terminal(*arguments: str, **environment: str) -> str:
    """Return what a command writes to a terminal."""
    parent, child = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, *arguments],
        env=clean_environment() | {"TERM": "xterm-256color", "COLUMNS": "80"} | environment,
        stdin=child, stdout=child, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        os.close(child)
        written = b""
        while select.select([parent], [], [], 60)[0]:
            try:
                part = os.read(parent, 65536)
            except OSError:  # how Linux tells that the other end is closed
                break
            if not part:
                break
            written += part
        process.wait(60)
    os.close(parent)
    return written.decode()


def test_a_terminal_gets_colours_unless_they_are_not_wanted(tmp_path):
    """A list on a terminal has colours of its own alone, and none where NO_COLOR is set."""
    url = f"sqlite:///{tmp_path}/letters.db"
    letters = some(2, error_message="\x1b[2J\x1b]8;;http://evil.example\x07click\x1b]8;;\x07")
    with open_store(url) as store:
        store.put(letters)
    colours = on_terminal("list", "--store", url)
    assert "\x1b[31m" in colours
    for text in (colours, on_terminal("list", "--store", url, NO_COLOR="1")):
        assert "\x1b[2J" not in text
        assert "\x1b]8" not in text
        assert all(letter.id in text for letter in letters)
    assert "\x1b[31m" not in on_terminal("list", "--store", url, NO_COLOR="1")


def test_other_states_may_be_asked_for(dlq, store):
    """A purge of one state leaves the others."""
    store.put([*some(1), *some(2, state="parked")])
    done = dlq("purge", "--state", "parked", "--yes", "--json", "--store", store.url)
    assert json.loads(done.stdout) == {"purged": 2, "not_found": 0, "dry_run": False}
    assert len(everything(store, Filter())) == 1
