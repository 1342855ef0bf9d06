"""The contracts of the guard: an error of ours is contained, counted and logged, never raised."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

from periscope_otel import current_operation, guard, monitored, operation
from periscope_otel.telemetry.current import current, telemetry_on
from periscope_otel.testing import CapturedTelemetry, capture_telemetry

ERRORS = "periscope.internal_errors"
DURATION = "threat.ingest.operation.duration"


@pytest.fixture
def contained():
    """Contain internal errors, as outside of the project's own tests."""
    guard.set_strict(False)
    yield
    guard.reset()


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that stands until it is told otherwise."""
    made = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_strict_mode_raises():
    """In strict mode an internal error is raised as it is, and not counted."""
    error = ValueError("ours")
    with pytest.raises(ValueError, match="ours") as raised:
        guard.report("a place", error)
    assert raised.value is error
    with pytest.raises(KeyError), guard.contained("a place"):
        raise KeyError
    assert guard.counts() == {}


def test_contained_error_goes_no_further(contained, caplog):
    """Outside of strict mode an internal error is counted, and logged by place and type.

    Its message is left out: it may quote what the plugin was about to redact.
    """
    with guard.contained("a place"):
        raise ValueError("https://bob:hunter2Qx9@host/")
    assert guard.counts() == {"a place": 1}
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("periscope_otel", logging.WARNING)
    assert "a place" in caplog.text
    assert "ValueError" in caplog.text
    assert "test_guard.py" in caplog.text
    assert "hunter2Qx9" not in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_asks_the_process_to_stop_passes(contained, error):
    """Ctrl-C, SystemExit and GeneratorExit are never contained."""
    with pytest.raises(error), guard.contained("a place"):
        raise error
    assert guard.counts() == {}


def test_block_that_raises_nothing_is_left_alone(contained, caplog):
    """A contained block without an error counts and logs nothing."""
    with guard.contained("a place"):
        pass
    assert guard.counts() == {}
    assert caplog.records == []


def test_each_place_is_logged_once_a_minute_and_counted_each_time(contained, clock, caplog):
    """A place that fails all the time is logged once in sixty seconds; every failure counts."""
    for _ in range(100):
        guard.report("a place", ValueError())
        clock.now += 0.59
    assert len(caplog.records) == 1
    clock.now = 1000.0 + guard.LOG_INTERVAL
    guard.report("a place", ValueError())
    guard.report("a place", ValueError())
    assert len(caplog.records) == 2
    assert guard.LOG_INTERVAL == 60.0
    assert guard.counts() == {"a place": 102}


def test_places_are_logged_apart(contained, clock, caplog):
    """What one place has logged keeps no other place from being heard."""
    guard.report("a place", ValueError())
    guard.report("another", ValueError())
    assert len(caplog.records) == 2
    assert guard.counts() == {"a place": 1, "another": 1}


def test_warnings_are_once_a_minute_and_no_errors(clock, caplog):
    """A warning of use is logged once a minute for each place, also in strict mode, not counted."""
    for _ in range(3):
        guard.warn("use", "%s is %d", "this", 3)
    assert [record.getMessage() for record in caplog.records] == ["this is 3"]
    clock.now += 60
    guard.warn("use", "again")
    assert len(caplog.records) == 2
    assert guard.counts() == {}


def test_reset_forgets(contained, clock, caplog):
    """After a reset, as in a forked child, counts are zero and the next error is logged."""
    guard.report("a place", ValueError())
    guard.reset()
    assert guard.counts() == {}
    guard.report("a place", ValueError())
    assert guard.counts() == {"a place": 1}
    assert len(caplog.records) == 2


def test_counts_of_threads_are_exact(contained):
    """Errors of several threads at once are all counted."""

    def work() -> None:
        for _ in range(500):
            guard.report("a place", ValueError())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert guard.counts() == {"a place": 4000}


def test_counts_are_a_copy(contained):
    """What `counts` returns can be changed without effect."""
    guard.report("a place", ValueError())
    guard.counts()["a place"] = 99
    assert guard.counts() == {"a place": 1}


def test_counts_are_a_metric(contained, captured_telemetry):
    """Internal errors are visible as `periscope.internal_errors`, by component."""
    assert captured_telemetry.metric(ERRORS) == 0
    for _ in range(3):
        guard.report("a place", ValueError())
    guard.report("another", ValueError())
    assert captured_telemetry.metric(ERRORS) == 4
    assert captured_telemetry.metric(ERRORS, component="a place") == 3


def test_raising_log_handler_does_not_reach_user_code(contained):
    """A log filter of the application's that raises does not break the call."""

    def raising_filter(_record: logging.LogRecord) -> bool:
        raise RuntimeError("theirs")

    guard.logger.addFilter(raising_filter)
    try:
        guard.report("a place", ValueError())
        guard.warn("use", "message")
    finally:
        guard.logger.removeFilter(raising_filter)
    assert guard.counts() == {"a place": 1}


# --- what of others may raise inside of us -------------------------------------------------------


class Raising(SpanProcessor):
    """A span processor of the application's own that raises."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_start(self, span, parent_context=None) -> None:
        if self.where == "on_start":
            raise RuntimeError("on_start")

    def on_end(self, span) -> None:
        if self.where == "on_end":
            raise RuntimeError("on_end")

    def _on_ending(self, span) -> None:
        if self.where == "on_ending":
            raise RuntimeError("on_ending")


@pytest.fixture(params=["on_start", "on_end", "on_ending"])
def raising(request, contained):
    """Telemetry with a span processor that raises."""
    reader = InMemoryMetricReader()
    tracers = TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(Raising(request.param))
    meters = MeterProvider([reader], shutdown_on_exit=False)
    before, current.telemetry = current.telemetry, telemetry_on(tracers, meters)
    yield CapturedTelemetry(None, reader)
    current.telemetry = before
    tracers.shutdown()
    meters.shutdown()


def test_raising_span_processor_does_not_reach_user_code(raising):
    """The call returns its value and is counted although a span processor raises."""

    @monitored("fetch", feed="urlhaus")
    def fetch() -> int:
        assert current_operation().name == "fetch"
        with operation("store") as op:
            op.received(2)
            op.ingested(1)
        assert op.outcome == "partial"
        return 7

    assert fetch() == 7
    assert raising.metric(DURATION, operation_name="fetch", outcome="ok") == 1
    assert raising.metric(DURATION, operation_name="store", outcome="partial") == 1
    assert raising.metric("threat.ingest.operation.active") == 0
    assert raising.items().received == 2
    assert raising.metric(ERRORS) == 2


async def test_raising_span_processor_does_not_reach_coroutines(raising):
    """Coroutines and async generators are as safe."""

    @monitored("rows")
    async def rows():
        yield 1
        yield 2

    @monitored("fetch")
    async def fetch() -> list[int]:
        return [row async for row in rows()]

    assert await fetch() == [1, 2]
    assert raising.metric(DURATION, outcome="ok") == 2


def test_raising_span_processor_does_not_hide_the_users_exception(raising):
    """The user's exception leaves the call as it is, and is counted."""
    error = LookupError("theirs")

    @monitored("fetch")
    def fetch() -> None:
        raise error

    with pytest.raises(LookupError) as raised:
        fetch()
    assert raised.value is error
    assert raising.metric(DURATION, outcome="error", error_type="LookupError") == 1


class RaisingSampler:
    """A sampler of the application's own that raises."""

    def should_sample(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("sampler")

    def get_description(self) -> str:
        return "raising"


def test_raising_sampler_does_not_reach_user_code(contained):
    """A call is made and counted although the sampler raises."""
    with capture_telemetry(sampler=RaisingSampler()) as captured:
        with operation("store", feed="misp") as op:
            op.ingested(1)
        assert op.outcome == "ok"
        assert captured.metric(DURATION, feed_name="misp") == 1
        assert captured.metric(ERRORS) == 1


def test_raising_listener_does_not_reach_user_code(contained, captured_telemetry):
    """A listener that raises is contained; later listeners still hear."""
    heard = []
    instruments = current.telemetry.instruments

    def raising_listener(_settled: object) -> None:
        raise RuntimeError("listener")

    ends = [instruments.listen(raising_listener), instruments.listen(heard.append)]
    with operation("store"):
        pass
    assert captured_telemetry.metric(DURATION) == 1
    assert len(heard) == 1
    assert captured_telemetry.metric(ERRORS) == 1
    for end in ends:
        end()


@pytest.mark.parametrize("what", ["feed", "breaker", "name"])
def test_raising_callable_of_the_user_is_left_out(contained, captured_telemetry, caplog, what):
    """A `feed=`, `breaker=` or `name=` callable that raises is warned about; the call goes on."""

    def raising_callable(args: dict[str, object]) -> str:
        raise RuntimeError("theirs")

    @monitored(**{what: raising_callable})
    def fetch(url: str) -> str:
        return url

    assert fetch("x") == "x"
    assert captured_telemetry.metric(DURATION, outcome="ok") == 1
    assert len(caplog.records) == 1
    assert guard.counts() == {}
