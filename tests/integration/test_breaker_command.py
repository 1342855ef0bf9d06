"""`periscope breaker` against a real Redis, and what processes make of it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from processes import clean_environment
from sides import Clock, Side, sides, trip, until
from typer.testing import CliRunner

from periscope_otel.cli import app
from periscope_otel.redis_link import RedisLink
from periscope_otel.resilience.sharing.records import Records, Verdict, record_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from periscope_otel.resilience.breaker import Breaker

NAME = "urlhaus.abuse.ch"
WITHIN = 60.0
CLEAN = {name: None for name in os.environ if name.startswith("PERISCOPE_")}


@pytest.fixture
def client(redis):
    with redis.client as made:
        made.flushall()
        yield made


@pytest.fixture
def run(redis, client, monkeypatch):
    """Return what runs `periscope breaker` on the Redis."""
    monkeypatch.setattr("periscope_otel.cli.breaker.TIMEOUT", WITHIN)  # for a machine that is busy

    def invoke(*arguments: str, status: int = 0):
        result = CliRunner().invoke(
            app,
            ["breaker", *arguments, "--redis", redis.url],
            env={**CLEAN, "COLUMNS": "80", "TERM": "dumb"},
        )
        assert result.exit_code == status, result.output
        return result

    return invoke


@pytest.fixture
def side(redis, client) -> Iterator[Side]:
    """Return what stands for a process that shares."""
    with sides(redis, client) as make:
        yield make()


@pytest.fixture
def breaker(side) -> Breaker:
    """Return a breaker of a process that shares."""
    return side.breaker(NAME, open_time=600.0, longest_open=6000.0, clock=Clock(stands=True))


def test_a_breaker_that_opened_is_listed_and_shown(run, breaker):
    """With why, how often and for how long still."""
    trip(breaker)
    until(lambda: NAME in run("list").stdout)
    row = json.loads(run("list", "--json").stdout)["breakers"][0]
    assert (row["name"], row["state"], row["openings"]) == (NAME, "open", 1)
    assert row["reason"] == "consecutive_failures"
    assert 600 - WITHIN < row["open_for"] <= 600
    assert json.loads(run("show", NAME, "--json").stdout)["state"] == "open"
    assert "consecutive_failures" in run("show", NAME).stdout


@pytest.mark.parametrize(
    ("command", "state"),
    [("open", "forced_open"), ("disable", "disabled"), ("observe", "observe")],
)
def test_what_is_set_counts_in_all_processes(run, breaker, command, state):
    """Within a second, and until it is closed again."""
    assert f"{NAME}: {state}" in run(command, NAME).stdout
    until(lambda: breaker.state == state)
    assert f"closed (was {state})" in run("close", NAME).stdout
    until(lambda: breaker.state == "closed")


def test_close_resets(run, client, side, breaker):
    """A breaker that has opened is closed everywhere, and its next open time is the first again."""
    trip(breaker)
    until(lambda: NAME in run("list").stdout)
    run("close", NAME)
    until(lambda: breaker.state == "closed")
    side.finish(client)  # what it finds while it still takes over the record would be overridden
    trip(breaker)
    assert breaker.retry_after == pytest.approx(600.0)


def test_an_empty_list_is_said(run):
    """On standard error; for programs it is an empty list."""
    result = run("list")
    assert (result.stdout, "no breakers" in result.stderr) == ("", True)
    assert json.loads(run("list", "--json").stdout) == {"breakers": []}


@pytest.mark.parametrize("command", ["show", "close"])
def test_a_breaker_that_does_not_exist_ends_with_1(run, client, command):
    """And nothing is written."""
    result = run(command, "nobody.example", status=1)
    assert "nobody.example" in result.stderr
    assert client.dbsize() == 0


def test_a_name_that_nobody_has_used_can_be_set(run):
    """It is said, and counts for those that will use it."""
    result = run("open", "new.example")
    assert "no process has told" in result.stderr
    told = json.loads(run("disable", "new.example", "--json").stdout)
    assert told == {
        "name": "new.example", "state": "disabled", "before": "forced_open", "created": False,
    }  # fmt: skip


def test_names_of_others_act_on_no_terminal(run, client):
    """What anybody may have written into the index."""
    client.zadd(
        "cb:names", {"evil\x1b[2J\r\n": 1e15, b"\xff\xfe": 1e15, "": 1e15, "x" * 9999: 1e15}
    )
    set_one(client, "evil")
    out = run("list").stdout
    assert "\x1b" not in out
    assert "evil" in out


def set_one(client, name: str) -> None:
    port = client.connection_pool.connection_kwargs["port"]
    link = RedisLink(f"redis://127.0.0.1:{port}", WITHIN)
    Records(link).change(name, Verdict("observe", "manual"), None, anyway=True)
    link.close()


def test_a_damaged_record_is_said_and_can_be_closed(run, client):
    """It is no reason to show nothing."""
    run("open", NAME)
    run("open", "other.example")
    client.hset(record_key(NAME), "generation", "many")
    result = run("list")
    assert "is damaged" in result.stderr
    assert "other.example" in result.stdout
    run("close", NAME)
    assert json.loads(run("show", NAME, "--json").stdout)["state"] == "closed"


class Watching:
    """`periscope breaker watch` in a process of its own."""

    def __init__(self, url: str, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from periscope_otel.cli import app; app()", "breaker", "watch",
             "--redis", url, *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment(),
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        assert "watching" in self.process.stderr.readline()

    def line(self) -> str:
        return self._lines.get(timeout=WITHIN)

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(WITHIN)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()

    def _read(self) -> None:
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line.rstrip("\n"))


@pytest.fixture
def watch(redis, client):
    made: list[Watching] = []

    def begin(*options: str) -> Watching:
        made.append(Watching(redis.url, *options))
        return made[-1]

    yield begin
    for one in made:
        one.close()


def test_watch_prints_changes_until_it_is_interrupted(run, watch, uncovered):
    """One line each, as they come; Ctrl-C is the way to end it."""
    watching = watch()
    run("open", NAME)
    run("close", NAME)
    assert watching.line().endswith(f"{NAME}  new -> forced_open (manual)")
    assert watching.line().endswith(f"{NAME}  forced_open -> closed (manual)")
    assert watching.interrupt() == 0


def test_watch_tells_programs_an_object_a_line(run, watch, uncovered):
    """With the fields of a change."""
    watching = watch("--json")
    run("observe", NAME)
    told = json.loads(watching.line())
    assert (told["name"], told["from"], told["to"]) == (NAME, None, "observe")


def test_watch_survives_a_restart(redis, run, watch, uncovered):
    """What changed while it could not listen is told afterwards."""
    watching = watch()
    redis.kill()
    time.sleep(0.5)
    redis.start()
    run("open", NAME)
    assert watching.line().endswith(f"{NAME}  new -> forced_open (manual)")
    run("disable", NAME)
    assert watching.line().endswith(f"{NAME}  forced_open -> disabled (manual)")
    assert watching.interrupt() == 0
