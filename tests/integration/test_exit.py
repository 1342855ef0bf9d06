"""However a process ends, what it emitted is exported in bounded time and its status is its own."""

from __future__ import annotations

import functools
import re
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from otlp import OUTCOME, Received, Receiver, black_hole, receiver, refusing
from processes import Ended, Program, otlp, otlp_by_default, run, running

if TYPE_CHECKING:
    from collections.abc import Iterator

PROTOCOLS = ("grpc", "http/protobuf")
WORK = 40
LEEWAY = 30.0
"""Seconds that a loaded machine may need beyond a bound."""
WITHOUT_BOUND = "300"
"""Seconds for which an exporter would try by itself: far more than any bound and its leeway."""

TRACEBACK = ["Traceback (most recent call last):"]

ENDS = {
    "normal": 0,
    "exit": 3,
    "exception": 1,
    "SIGINT": -signal.SIGINT,
    "SIGTERM": -signal.SIGTERM,
    "daemons": 0,
}


def begin_end(program: Program, how: str) -> float:
    """Let the program `ending`, told to end in some way, do so; returns when that began."""
    program.line()
    began = float(program.line())
    return program.send(signal.Signals[how]) if how.startswith("SIG") else began


def argument(how: str) -> str:
    """Return what `ending` and `left_open` are told."""
    return "signal" if how.startswith("SIG") else how


@functools.cache
def ending(protocol: str, how: str) -> tuple[Ended, Received, str]:
    """Run a program to one of its ends; returns that, what arrived, and where."""
    with receiver() as collector:
        endpoint = collector.endpoint(protocol)
        with running("ending", argument(how), env=otlp(endpoint, protocol)) as program:
            begin_end(program, how)
            ended = program.ended()
        return ended, collector.received(), endpoint


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("how", ENDS)
def test_every_end_exports_everything(protocol: str, how: str) -> None:
    """Every span and count emitted before the end arrives, whatever ends the process."""
    ended, received, _ = ending(protocol, how)
    beats = int(ended.lines[0])
    assert received.names()["work"] == WORK
    assert received.names()["beat"] >= beats
    assert received.sums()["work"] == WORK
    assert received.sums()["beat"] >= beats
    assert received.sums("threat.ingest.items.received")["work"] == 2 * WORK
    assert received.sums("threat.ingest.items.settled")["work"] == 2 * WORK
    assert received.duplicates() == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("how", "status"), ENDS.items())
def test_no_end_changes_the_exit_status(protocol: str, how: str, status: int) -> None:
    """The exit status is exactly what it would be without us."""
    assert ending(protocol, how)[0].status == status


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("how", ENDS)
def test_the_end_says_in_one_line_what_was_exported(protocol: str, how: str) -> None:
    """The end adds one line to standard error, and its figures are what the Collector got."""
    ended, received, endpoint = ending(protocol, how)
    (line,) = ended.reports
    others = [one for one in ended.stderr.splitlines() if one != line]
    assert others[:1] == (TRACEBACK if how in ("exception", "SIGINT") else [])
    if how != "daemons":  # there, threads go on emitting behind the line
        assert line == (
            f"periscope-otel: exported {len(received.spans)} spans to {endpoint}, "
            f"{len(received.points)} metric points to {endpoint}; nothing was left"
        )


@pytest.mark.parametrize("how", ["normal", "exit", "SIGINT", "SIGTERM"])
def test_operations_that_are_open_at_the_end_settle_as_cancelled_once(
    collector: Receiver, how: str
) -> None:
    """An operation still open when the process ends is one cancelled span and one count."""
    with running("left_open", argument(how), env=otlp(collector.http)) as program:
        program.line()
        if how.startswith("SIG"):
            program.send(signal.Signals[how])
        ended = program.ended()
    received = collector.received()
    expected = dict.fromkeys(("block", "nested", "generator", "coroutine", "thread"), 1)
    assert ended.status == ENDS[how]
    assert received.names() == expected
    assert {span.attributes[OUTCOME] for span in received.spans} == {"cancelled"}
    assert received.sums() == expected
    assert received.sums(by=OUTCOME) == {"cancelled": len(expected)}


@pytest.fixture
def broken() -> Iterator[dict[str, dict[str, str]]]:
    """Return collectors that do not work, by name and protocol."""
    with ExitStack() as stack:
        hole = stack.enter_context(black_hole())
        refused = stack.enter_context(refusing())
        overloaded = stack.enter_context(receiver(unavailable=True))
        yield {
            f"{what} {protocol}": otlp_by_default(
                endpoint, protocol, OTEL_EXPORTER_OTLP_TIMEOUT=WITHOUT_BOUND
            )
            for protocol in PROTOCOLS
            for what, endpoint in (
                ("black hole", hole),
                ("refusing port", refused),
                ("unavailable", overloaded.endpoint(protocol)),
            )
        }


def end_broken(
    broken: dict[str, dict[str, str]], **env: str
) -> list[tuple[str, str, Ended, float]]:
    """For each collector that does not work end a program by itself and one by SIGTERM, at once.

    Returns:
        The collector, the end, how the program ended and how long that took.
    """
    with ExitStack() as stack:
        programs = {
            (name, how): stack.enter_context(running("ending", argument(how), env=one | env))
            for name, one in broken.items()
            for how in ("exit", "SIGTERM")
        }
        began = {key: begin_end(program, key[1]) for key, program in programs.items()}
        ended = {key: program.ended() for key, program in programs.items()}
    return [(*key, ended[key], ended[key].at - began[key]) for key in programs]


@pytest.mark.parametrize(("bound", "env"), [(5.0, {}), (1.0, {"PERISCOPE_SHUTDOWN_TIMEOUT": "1"})])
def test_a_broken_collector_cannot_hold_up_the_end(
    broken: dict[str, dict[str, str]], bound: float, env: dict[str, str]
) -> None:
    """With no working Collector the end comes within the bound, with its own status."""
    for name, how, ended, took in end_broken(broken, **env):
        assert ended.status == ENDS[how], f"{name}, {how}"
        assert took < bound + LEEWAY, f"{name}, {how}"


def test_spans_that_did_not_get_out_are_counted(broken: dict[str, dict[str, str]]) -> None:
    """With no working Collector the line says how many spans were not exported: all of them."""
    wrong = [
        f"{name}, {how}: {ended.reports}"
        for name, how, ended, _ in end_broken(broken, PERISCOPE_SHUTDOWN_TIMEOUT="1")
        if not re.search(rf"exported 0 spans .*; NOT exported: {WORK} spans", ended.stderr)
    ]
    assert wrong == []


def test_metrics_that_did_not_get_out_are_named(broken: dict[str, dict[str, str]]) -> None:
    """The line of a process whose metrics could not be sent says so."""
    env = {"PERISCOPE_SHUTDOWN_TIMEOUT": "1", "OTEL_TRACES_EXPORTER": "none"}
    for name, how, ended, _ in end_broken(broken, **env):
        (line,) = ended.reports
        assert re.search(r"; NOT exported: .*metric", line), f"{name}, {how}: {line}"


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_applications_sigterm_handler_wins(collector: Receiver, when: str) -> None:
    """A SIGTERM handler installed before or after configure() decides the end; nothing is lost."""
    with running("own_handler", when, "function", env=otlp(collector.http)) as program:
        program.line()
        program.send(signal.SIGTERM)
        ended = program.ended()
    assert ended.lines == ["ready", "own handler"]
    assert ended.status == 7
    assert collector.received().sums() == {"work": 1}
    assert collector.received().names() == {"work": 1}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_that_ignores_sigterm_goes_on_doing_so(collector: Receiver, when: str) -> None:
    """Where the application ignores SIGTERM, before or after configure(), it has no effect."""
    with running("own_handler", when, "ignore", env=otlp(collector.http)) as program:
        program.line()
        program.send(signal.SIGTERM)
        program.tell()
        ended = program.ended()
    assert ended.status == 0
    assert collector.received().sums() == {"work": 1}


def test_shutdown_twice_reports_once(collector: Receiver) -> None:
    """A second shutdown() returns the first one's report and adds no line, nor does the exit."""
    ended = run("rounds", "5", env=otlp(collector.http))
    assert ended.status == 0
    assert ended.lines == ["5 True True"]
    assert len(ended.reports) == 1
    assert len(ended.stderr.splitlines()) == 1
    assert collector.received().names() == {"work": 5}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_configure_works_again_after_shutdown(collector: Receiver, protocol: str) -> None:
    """Each round of configure() and shutdown() exports its own operations, exactly."""
    env = otlp(collector.endpoint(protocol), protocol)
    ended = run("rounds", "5", "7", "11", env=env)
    received = collector.received()
    assert ended.status == 0, ended.stderr
    assert ended.lines == ["5 True True", "7 True True", "11 True True"]
    assert received.names() == {"work": 23}
    assert received.duplicates() == []
    assert received.sums() == {"work": 23}
    assert received.sums("threat.ingest.items.received") == {"work": 46}


@pytest.mark.parametrize(
    ("setting", "works", "lines"),
    [
        ("never", True, 0),
        ("never", False, 0),
        ("loss", True, 0),
        ("loss", False, 1),
        ("always", True, 1),
    ],
)
def test_the_exit_report_can_be_turned_down(
    collector: Receiver, setting: str, works: bool, lines: int
) -> None:
    """`exit_report` says whether the end has its line always, only after a loss, or never."""
    with refusing() as refused:
        env = otlp(collector.http if works else refused, PERISCOPE_EXIT_REPORT=setting)
        if not works:
            env["PERISCOPE_SHUTDOWN_TIMEOUT"] = "1"
        ended = run("ending", "exit", env=env)
    assert ended.status == 3
    assert len(ended.reports) == lines
