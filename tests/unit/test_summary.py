"""The summary of a run: what it counts, and that what it prints is safe and readable."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

import periscope_otel as periscope
from periscope_otel.monitor.summary import Latency, RunSummary
from periscope_otel.report import ExportReport, SignalReport
from periscope_otel.telemetry.current import Telemetry, current
from periscope_otel.testing import capture_telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Clock:
    """Monotonic seconds that only tests advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeServer:
    host = "127.0.0.1"
    port = 9464


class FakeRuntime:
    """What a summary looks at, without exporters."""

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry
        self.server: FakeServer | None = None
        self.tracer_provider: object | None = None
        self.meter_provider: object | None = None
        self.closed = False
        self.signals: tuple[SignalReport, ...] = ()

    def report(self) -> ExportReport:
        return ExportReport(self.signals, in_time=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def runtime(clock: Clock) -> Iterator[FakeRuntime]:
    with capture_telemetry(clock=clock):
        assert current.telemetry is not None
        yield FakeRuntime(current.telemetry)


def printed(summary: RunSummary, width: int = 80, encoding: str = "utf-8") -> str:
    """Return what a file of this width and encoding gets."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    summary.print(Console(file=file, width=width))
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def words(text: str) -> list[list[str]]:
    """Return the words of each line: tables without rules and alignment."""
    return [line.split() for line in text.splitlines() if "──" not in line]


def settle(name: str, seconds: float = 0.0, *, clock: Clock, feed: str | None = None) -> None:
    with periscope.operation(name, feed=feed):
        clock.now += seconds


# Latency.


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95, 1.0])
def test_a_quantile_is_within_its_promised_error(share):
    """Of a thousand durations over six decades each quantile is right within 2.5 %."""
    latency = Latency()
    durations = sorted(10 ** (number / 160 - 4) for number in range(1000))
    for seconds in durations:
        latency.add(seconds)
    true = durations[max(1, math.ceil(share * 1000)) - 1]
    assert latency.quantile(share) == pytest.approx(true, rel=0.025)


def test_a_single_duration_is_every_quantile():
    """A quantile never lies outside of what was measured."""
    latency = Latency()
    latency.add(0.123)
    assert latency.quantile(0.5) == latency.quantile(0.95) == latency.longest == 0.123


def test_no_duration_has_quantiles_of_nothing():
    """Without a call the latency is zero and not an error."""
    assert Latency().quantile(0.5) == 0.0


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 1e-12, 1e12])
def test_impossible_durations_are_counted(seconds):
    """A clock that goes back or stands still does not break the summary."""
    latency = Latency()
    latency.add(seconds)
    assert latency.quantile(1.0) == max(seconds, 0.0)


# What it counts.


def test_operations_are_told_apart_by_name_and_feed(runtime, clock):
    """Each name and feed has its calls, outcomes, error types and latencies, in order of begin."""
    with RunSummary(runtime) as summary:
        with periscope.operation("pull", feed="a"):
            settle("fetch", 1.0, clock=clock)
            settle("fetch", 3.0, clock=clock)
        settle("fetch", 2.0, clock=clock, feed="b")
        with pytest.raises(TimeoutError), periscope.operation("fetch", feed="b"):
            raise TimeoutError
    rows = summary.operations()
    assert [(row.operation, row.feed, row.calls) for row in rows] == [
        ("pull", "a", 1),
        ("fetch", "a", 2),
        ("fetch", "b", 2),
    ]
    assert rows[1].latency.longest == 3.0
    assert rows[2].outcomes == {"ok": 1, "timeout": 1}
    assert rows[2].errors == {"TimeoutError": 1}
    assert summary.seconds == 6.0


def test_only_the_block_is_counted(runtime, clock):
    """Operations and items from before and after the block are not of this run."""

    def ingest(count: int) -> None:
        with periscope.operation("store") as op:
            op.received(count)
            op.converted(count)
            op.ingested(count)

    ingest(1)
    with RunSummary(runtime) as summary:
        ingest(10)
    clock.now += 5
    ingest(100)
    (operations,), (items,) = summary.operations(), summary.items()
    assert (operations.calls, summary.seconds) == (1, 0.0)
    assert items[2:8] == (10, 10, 10, 0, 0, 0)


def test_it_can_be_read_while_it_runs(runtime, clock):
    """Inside the block the figures are those of this moment."""
    with RunSummary(runtime) as summary:
        settle("store", 1.0, clock=clock)
        with periscope.operation("open") as op:
            op.received(2)
            assert [row.operation for row in summary.operations()] == ["store"]
            assert [row.difference for row in summary.items()] == [2]
            assert (summary.running, summary.seconds) == (1, 1.0)


def test_items_are_accounted_with_reasons(runtime):
    """Skipped items are told by reason, those without one as such."""
    with RunSummary(runtime) as summary, periscope.operation("store", feed="a") as op:
        op.received(10)
        op.ingested(3)
        op.skipped(2, reason="known")
        op.skipped()
        op.failed(count=3)
    (row,) = summary.items()
    assert row[2:8] == (10, 0, 3, 3, 3, 1)
    assert row.reasons == {"known": 2, "no reason given": 1}
    assert row.difference == 0


def test_error_types_are_bounded(runtime):
    """Beyond twenty error types of one operation, further ones are counted as other."""
    with RunSummary(runtime) as summary:
        for number in range(30):
            error = type(f"Error{number}", (Exception,), {})
            with pytest.raises(error), periscope.operation("fetch"):
                raise error
    (row,) = summary.operations()
    assert len(row.errors) == 21
    assert row.errors["other"] == 10


def test_what_settles_in_finalisers_is_counted(runtime):
    """A generator that was dropped half-way is in the summary of the block that dropped it."""

    @periscope.monitored("stream")
    def stream():
        yield 1

    with RunSummary(runtime) as summary:
        next(stream())
    assert [row.calls for row in summary.operations()] == [1]


# What it prints.


def test_the_printed_summary_of_a_run(runtime, clock):
    """Operations, items, the equation, reasons, failures and the way of the telemetry, in order."""
    with RunSummary(runtime) as summary:
        with periscope.operation("pull", feed="a") as op:
            op.received(1200)
            op.ingested(1198)
            op.skipped(2, reason="known")
            settle("store", 0.5, clock=clock)
        with pytest.raises(KeyError), periscope.operation("pull", feed="b"):
            raise KeyError
    assert words(printed(summary)) == words(
        """\
        Run summary · 3 operations in 500 ms

        Operations feed calls outcomes p50 p95 max
        pull a 1 1 ok 500 ms 500 ms 500 ms
        store a 1 1 ok 500 ms 500 ms 500 ms
        pull b 1 1 error 0 µs 0 µs 0 µs

        Items feed received converted ingested skipped failed unaccounted
        pull a 1,200 0 1,198 2 0 0

        ✓ 1,200 received = 1,198 ingested + 2 skipped + 0 failed + 0 unaccounted

        Skipped feed why
        pull a 2 known

        Failures feed why
        pull b 1 KeyError

        Telemetry went nowhere: no exporter is configured"""
    )


def test_several_accounts_have_a_total(runtime):
    """With more than one account the last row is the sum, and the equation is of it."""
    with RunSummary(runtime) as summary:
        for name, count in (("a", 3), ("b", 4)):
            with periscope.operation(name) as op:
                op.received(count)
                op.ingested(count - 1)
    lines = words(printed(summary))
    assert ["total", "7", "0", "5", "0", "0", "2"] in lines
    assert words("✓ 7 received = 5 ingested + 0 skipped + 0 failed + 2 unaccounted")[0] in lines


def test_many_rows_are_cut_and_the_totals_are_not(runtime):
    """A table ends after fifty rows and says how many more there are."""
    with RunSummary(runtime) as summary:
        for number in range(60):
            with periscope.operation("store", feed=f"feed {number}") as op:
                op.ingested()
    lines = words(printed(summary))
    assert lines.count(["and", "10", "more"]) == 2
    assert ["total", "60", "0", "60", "0", "0", "0"] in lines


def test_an_excess_does_not_add_up(runtime):
    """More settled than received is said, and not smoothed over."""
    with RunSummary(runtime) as summary, periscope.operation("store") as op:
        op.received(1)
        op.ingested(3)
    assert "✗ 1 received = 3 ingested" in printed(summary)
    assert "2 more settled than received" in " ".join(printed(summary).split())


def test_open_operations_are_said(runtime):
    """Items of an operation that has not settled are missing for now, and said to be."""
    block = periscope.operation("store")
    with RunSummary(runtime) as summary:
        block.__enter__().received(5)
    text = " ".join(printed(summary).split())
    block.__exit__(None, None, None)
    assert "and 5 not settled yet" in text
    assert "1 not settled" in text.partition("Items")[0]


def test_a_run_without_operations_is_a_headline(runtime):
    """Nothing to tell is told in two lines."""
    with RunSummary(runtime) as summary:
        pass
    assert words(printed(summary)) == words(
        "Run summary · 0 operations in 0 µs\n\nTelemetry went nowhere: no exporter is configured"
    )


def test_every_outcome_has_its_place(runtime):
    """Several outcomes of one operation are told below one another, the good ones first."""
    with RunSummary(runtime) as summary:
        for outcome in ("rejected", "cancelled", "timeout", "error", "partial", "ok"):
            series = runtime.telemetry.instruments.labels.series("fetch", "a")
            runtime.telemetry.instruments.record((1.0, series, outcome, None, None))
    text = printed(summary)
    told = [text.index(f"1 {one}") for one in ("ok", "partial", "error", "timeout", "cancelled")]
    assert told == sorted(told)
    assert "1 rejected" in text


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize(
    "name", ["[bold]x[/bold]", "\x1b[31mred\x1b[0m", "a\nb", "威胁" * 40, ":x:"]
)
def test_hostile_names_are_harmless(runtime, name, width):
    """Markup, escapes and long names neither colour nor break what is printed."""
    with RunSummary(runtime) as summary, periscope.operation(name, feed=name) as op:
        op.received(1)
        op.skipped(reason=name)
    text = printed(summary, width)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width
    if name.isascii() and name.isprintable() and width >= 80:
        assert text.count(name) >= 6


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_poor_encoding_gets_what_it_can_take(runtime, encoding):
    """Signs and names outside of the output's encoding are written in ASCII."""
    with RunSummary(runtime) as summary, periscope.operation("fetch", feed="威胁") as op:
        op.received(1)
    text = printed(summary, encoding=encoding)
    assert "\\u5a01\\u80c1" in text
    assert "OK 1 received" in text


def test_a_terminal_gets_colours(runtime):
    """On a terminal good outcomes are green."""
    with RunSummary(runtime) as summary, periscope.operation("fetch"):
        pass
    file = io.StringIO()
    summary.print(Console(file=file, force_terminal=True, color_system="standard", width=80))
    assert "\x1b[32m1 ok\x1b[0m" in file.getvalue()


def test_standard_output_is_the_default(runtime, capsys):
    """Without a console the summary goes to standard output."""
    with RunSummary(runtime) as summary:
        pass
    summary.print()
    assert capsys.readouterr().out.startswith("Run summary")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0000004, "0 µs"), (0.0005, "500 µs"), (0.001, "1 ms"), (0.0999, "99.9 ms"),
        (0.25, "250 ms"), (1.0, "1 s"), (12.34, "12.3 s"), (99.99, "1 min 40 s"),
        (3599, "59 min 59 s"), (7384, "2 h 03 min"),
    ],
)  # fmt: skip
def test_durations_are_short(runtime, clock, seconds, shown):
    """A duration has three digits at most and the unit that suits it."""
    with RunSummary(runtime) as summary:
        clock.now += seconds
    assert printed(summary).splitlines()[0].endswith(f" in {shown}")


# Where the telemetry went.


def test_destinations_are_told_with_what_was_lost(runtime):
    """Each signal and destination has its counts."""
    runtime.signals = (SignalReport("spans", "http://collector:4318", 1000, 1, 2, 3),)
    with RunSummary(runtime) as summary:
        pass
    lines = words(printed(summary))
    assert ["spans", "http://collector:4318", "1,000", "1", "2", "3"] in lines


def prometheus(runtime: FakeRuntime) -> None:
    runtime.server = FakeServer()
    runtime.meter_provider = object()


def ipv6(runtime: FakeRuntime) -> None:
    prometheus(runtime)
    runtime.server.host = "::1"  # type: ignore[union-attr]


def closed(runtime: FakeRuntime) -> None:
    prometheus(runtime)
    runtime.closed = True


def foreign_spans(runtime: FakeRuntime) -> None:
    runtime.tracer_provider = object()


def foreign_metrics(runtime: FakeRuntime) -> None:
    runtime.meter_provider = object()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (prometheus, "Metrics are served to Prometheus at http://127.0.0.1:9464/metrics"),
        (ipv6, "Metrics are served to Prometheus at http://[::1]:9464/metrics"),
        (closed, "Metrics were served to Prometheus"),
        (foreign_spans, "Spans go to the application's own TracerProvider"),
        (foreign_metrics, "Metrics go to the application's own MeterProvider"),
    ],
)
def test_other_ways_are_told_in_words(
    runtime: FakeRuntime, change: Callable[[FakeRuntime], None], told: str
):
    """Whoever else gets the telemetry is named, and nothing is said to go nowhere."""
    change(runtime)
    with RunSummary(runtime) as summary:
        pass
    text = printed(summary, 120)
    assert told in text
    assert "nowhere" not in text


def test_rich_is_imported_only_to_print():
    """Collecting needs no rich."""
    code = (
        "import sys, periscope_otel as p\n"
        "from periscope_otel.monitor.summary import RunSummary\n"
        "with RunSummary(p.configure()) as s:\n"
        "    with p.operation('a'): pass\n"
        "assert s.operations()[0].calls == 1\n"
        "assert 'rich' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
