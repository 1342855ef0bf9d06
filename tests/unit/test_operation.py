"""The contracts of `operation(...)`, `Operation` and `current_operation()`."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import pytest
from opentelemetry import trace
from opentelemetry.context import (
    _SUPPRESS_INSTRUMENTATION_KEY,
    Context,
    attach,
    detach,
    get_current,
    set_value,
)
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import Link, SpanKind, StatusCode

from periscope_otel import current_operation, operation
from periscope_otel.telemetry import names
from periscope_otel.testing import capture_telemetry

DURATION = "threat.ingest.operation.duration"


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in an interpreter of its own, where no telemetry is set up."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "", **environment},
    )


# --- one block -----------------------------------------------------------------------------------


def test_block_is_one_span_and_one_count(captured_telemetry):
    """A block that ends well is one span named like it and one count with outcome ok."""
    with operation("store", feed="urlhaus") as op:
        assert op.name == "store"
        assert op.feed == "urlhaus"
        assert op.outcome is None
    assert op.outcome == "ok"
    store = captured_telemetry.operation("store")
    assert store.span.name == "store"
    assert store.span.kind is SpanKind.INTERNAL
    assert store.span.status.status_code is StatusCode.UNSET
    assert dict(store.attributes) == {
        "threat.ingest.operation.name": "store",
        "threat.feed.name": "urlhaus",
        "threat.ingest.outcome": "ok",
    }
    assert captured_telemetry.label_sets(DURATION) == [
        {
            "threat.ingest.operation.name": "store",
            "threat.feed.name": "urlhaus",
            "threat.ingest.outcome": "ok",
        }
    ]
    assert captured_telemetry.metric(DURATION) == 1


async def test_async_block_is_one_span(captured_telemetry):
    """`async with` does what `with` does."""
    async with operation("store", feed="urlhaus") as op:
        await asyncio.sleep(0)
        assert current_operation() is op
    assert captured_telemetry.operation("store").outcome == "ok"
    assert captured_telemetry.metric(DURATION, outcome="ok") == 1


def test_exception_passes_unchanged_and_is_recorded(captured_telemetry):
    """An exception leaves the block as it is, and makes the outcome, error.type and status."""
    error = KeyError("no such indicator")
    with pytest.raises(KeyError) as raised, operation("store"):
        raise error
    assert raised.value is error
    store = captured_telemetry.operation("store")
    assert (store.outcome, store.error_type) == ("error", "KeyError")
    assert store.span.status.status_code is StatusCode.ERROR
    (event,) = store.exceptions
    assert event.attributes["exception.type"] == "KeyError"
    assert "no such indicator" in event.attributes["exception.message"]
    assert "test_operation.py" in event.attributes["exception.stacktrace"]
    assert captured_telemetry.metric(DURATION, outcome="error", error_type="KeyError") == 1


async def test_async_exception_is_recorded(captured_telemetry):
    """An exception leaves `async with` recorded too."""
    with pytest.raises(TimeoutError):
        async with operation("fetch"):
            raise TimeoutError
    assert captured_telemetry.operation("fetch").outcome == "timeout"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (asyncio.CancelledError(), "cancelled"),
        (KeyboardInterrupt(), "cancelled"),
        (GeneratorExit(), "cancelled"),
        (SystemExit(0), "ok"),
        (SystemExit(), "ok"),
    ],
)
def test_what_is_no_error_is_not_recorded_as_one(captured_telemetry, error, outcome):
    """Cancellation, Ctrl-C, GeneratorExit and SystemExit(0) set neither status nor error.type."""
    with pytest.raises(type(error)), operation("store"):
        raise error
    store = captured_telemetry.operation("store")
    assert (store.outcome, store.error_type) == (outcome, None)
    assert store.span.status.status_code is not StatusCode.ERROR
    assert store.exceptions == []
    assert captured_telemetry.metric(DURATION, outcome=outcome) == 1


def test_system_exit_with_a_status_is_an_error(captured_telemetry):
    """SystemExit with a failing status counts as an error."""
    with pytest.raises(SystemExit), operation("store"):
        raise SystemExit(3)
    assert captured_telemetry.operation("store").outcome == "error"


def test_duration_is_the_injected_clocks():
    """The duration is measured on the injected monotonic clock."""
    clock = Clock()
    with capture_telemetry(clock=clock) as captured:
        with operation("store"):
            clock.now += 7.0
        (metric,) = [one for one in captured._metrics() if one.name == DURATION]
        assert metric.data.data_points[0].sum == 7.0


def test_attributes_links_and_kind_are_the_spans(captured_telemetry):
    """`attributes=`, `links=` and `kind=` go to the span; a span context is a link as well."""
    with operation("fetch") as first:
        pass
    context = first.span.get_span_context()
    with operation(
        "store",
        kind=SpanKind.CONSUMER,
        breaker="urlhaus.abuse.ch",
        attributes={"batch": 3, "threat.ingest.outcome": "mine"},
        links=[context, Link(context, {"why": "replay"})],
    ):
        pass
    store = captured_telemetry.operation("store")
    assert store.span.kind is SpanKind.CONSUMER
    assert store.attributes["batch"] == 3
    assert store.attributes["circuit_breaker.name"] == "urlhaus.abuse.ch"
    assert store.outcome == "ok"  # the plugin's own names win over the user's
    assert [link.context.span_id for link in store.span.links] == [context.span_id] * 2
    assert dict(store.span.links[1].attributes) == {"why": "replay"}
    assert store.span.parent is None


def test_set_attribute_reaches_the_span_only(captured_telemetry):
    """`op.set_attribute` sets a span attribute and no metric label."""
    with operation("store") as op:
        op.set_attribute("indicator", "auth-paypal-login.example")
        op.set_attribute("numbers", [1, 2])
    store = captured_telemetry.operation("store")
    assert store.attributes["indicator"] == "auth-paypal-login.example"
    assert store.attributes["numbers"] == (1, 2)
    assert captured_telemetry.label_sets(DURATION) == [
        {"threat.ingest.operation.name": "store", "threat.ingest.outcome": "ok"}
    ]


# --- nesting -------------------------------------------------------------------------------------


def test_nested_operations_are_child_spans_and_inherit_the_feed(captured_telemetry):
    """A nested operation is a child span, and has the feed of the enclosing one unless it says."""
    with operation("fetch", feed="urlhaus"):
        with operation("parse"), operation("convert"):
            pass
        with operation("store", feed="misp"):
            pass
    fetch, parse, convert, store = (
        captured_telemetry.operation(name) for name in ("fetch", "parse", "convert", "store")
    )
    assert parse.is_child_of(fetch)
    assert convert.is_child_of(parse)
    assert store.is_child_of(fetch)
    assert [one.feed for one in (fetch, parse, convert, store)] == ["urlhaus"] * 3 + ["misp"]
    assert captured_telemetry.metric(DURATION, feed_name="urlhaus") == 3
    assert captured_telemetry.metric(DURATION, feed_name="misp") == 1


def test_operation_is_a_child_of_any_span(captured_telemetry):
    """An operation is a child of whatever span is current, and parent of spans begun in it."""
    tracer = trace.NonRecordingSpan(
        trace.SpanContext(7, 9, is_remote=False, trace_flags=trace.TraceFlags(1))
    )
    with trace.use_span(tracer), operation("store") as op:
        assert trace.get_current_span() is op.span
    store = captured_telemetry.operation("store")
    assert store.span.context.trace_id == 7
    assert store.span.parent.span_id == 9


def test_exception_is_recorded_once_by_the_innermost(captured_telemetry):
    """An exception that leaves three operations is one event, in the innermost; all have failed."""
    with (
        pytest.raises(ValueError, match="bad row"),
        operation("fetch"),
        operation("parse"),
        operation("convert"),
    ):
        raise ValueError("bad row")
    for name, events in (("fetch", 0), ("parse", 0), ("convert", 1)):
        one = captured_telemetry.operation(name)
        assert (one.outcome, one.error_type) == ("error", "ValueError")
        assert one.span.status.status_code is StatusCode.ERROR
        assert len(one.exceptions) == events


def test_same_exception_is_recorded_again_in_another_trace(captured_telemetry):
    """One exception object raised in two traces is recorded in both."""
    error = ValueError("shared")
    for _ in range(2):
        with pytest.raises(ValueError, match="shared"), operation("store"):
            raise error
    assert [len(one.exceptions) for one in captured_telemetry.operations("store")] == [1, 1]


def test_context_argument_is_the_parent(captured_telemetry):
    """`context=` gives the parent span and feed, whatever is current; what was current returns."""
    with operation("fetch", feed="urlhaus") as fetch:
        carried = get_current()
    with operation("other", feed="misp") as other:
        with operation("store", context=carried) as store:
            assert current_operation() is store
            assert store.feed == "urlhaus"
        assert current_operation() is other
    assert captured_telemetry.operation("store").is_child_of(captured_telemetry.operation("fetch"))
    assert fetch.outcome == "ok"


def test_empty_context_begins_a_trace(captured_telemetry):
    """`context=Context()` begins a new trace that inherits nothing."""
    with operation("fetch", feed="urlhaus"), operation("store", context=Context()):
        pass
    store = captured_telemetry.operation("store")
    assert store.span.parent is None
    assert store.feed is None


# --- current_operation ---------------------------------------------------------------------------


def test_current_operation_is_the_innermost(captured_telemetry):
    """`current_operation()` is the innermost operation, and the enclosing one again after it."""
    with operation("fetch") as fetch:
        assert current_operation() is fetch
        with operation("parse") as parse:
            assert current_operation() is parse
        assert current_operation() is fetch
    assert current_operation() is not fetch


def test_outside_of_any_operation_the_current_one_is_inert(captured_telemetry):
    """Outside of any operation every call on `current_operation()` works and tells nobody."""
    op = current_operation()
    op.received(3)
    op.converted()
    op.ingested(1)
    op.skipped(2, reason="no_content")
    op.failed({"secret": 1}, ValueError("x"), count=3)
    op.fail("nothing")
    op.fail(ValueError("x"))
    op.set_attribute("a", 1)
    assert list(op.track([1, 2])) == [1, 2]
    assert not op.span.is_recording()
    assert captured_telemetry.spans == []
    assert captured_telemetry.metric(names.RECEIVED.name) == 0
    assert captured_telemetry.metric(names.SETTLED.name) == 0
    assert captured_telemetry.metric(DURATION) == 0


def test_what_was_current_returns_after_an_exception(captured_telemetry):
    """The context is what it was before the block, also when it raises."""
    before = get_current()
    with pytest.raises(ZeroDivisionError), operation("store"):
        _ = 1 / 0
    assert get_current() == before
    assert trace.get_current_span() is trace.INVALID_SPAN


# --- op.fail -------------------------------------------------------------------------------------


def test_fail_with_an_exception(captured_telemetry):
    """A failure handed over as an exception counts as if it had been raised."""
    with operation("store") as op:
        op.fail(ConnectionResetError("peer"))
    store = captured_telemetry.operation("store")
    assert (op.outcome, store.error_type) == ("error", "ConnectionResetError")
    assert store.span.status.status_code is StatusCode.ERROR
    assert len(store.exceptions) == 1
    assert captured_telemetry.metric(DURATION, error_type="ConnectionResetError") == 1


def test_fail_with_a_text(captured_telemetry):
    """A failure told in words is an error whose words are the status description, redacted."""
    with operation("store") as op:
        op.fail("no rows from https://bob:hunter2@taxii.example/")
    store = captured_telemetry.operation("store")
    assert store.outcome == "error"
    assert store.error_type is not None
    assert store.span.status.description.startswith("no rows from https://")
    assert "hunter2" not in store.span.status.description
    assert "taxii.example" in store.span.status.description


def test_fail_with_a_response(captured_telemetry):
    """A response with an HTTP status is an error whose type is the status."""
    with operation("fetch") as op:
        op.fail(SimpleNamespace(status_code=503, headers={}))
    fetch = captured_telemetry.operation("fetch")
    assert (fetch.outcome, fetch.error_type) == ("error", "503")
    assert fetch.span.status.status_code is StatusCode.ERROR


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt()])
def test_fail_with_a_cancellation_is_no_error(captured_telemetry, error):
    """A cancellation that is handed over sets the outcome, and neither status nor event."""
    with operation("fetch") as op:
        op.fail(error)
    fetch = captured_telemetry.operation("fetch")
    assert (fetch.outcome, fetch.error_type) == ("cancelled", None)
    assert fetch.span.status.status_code is not StatusCode.ERROR
    assert fetch.exceptions == []


def test_raised_exception_wins_over_a_failure_told_before(captured_telemetry):
    """Where a block fails in words and then raises, it is the exception that counts."""
    with pytest.raises(TimeoutError), operation("fetch") as op:
        raise op.fail("first") or TimeoutError()
    assert captured_telemetry.operation("fetch").error_type == "TimeoutError"
    assert captured_telemetry.metric(DURATION) == 1


def test_fail_of_any_object_never_raises(captured_telemetry):
    """`op.fail` takes anything at all."""
    for anything in (None, 0, object(), {"status": 1}, ValueError, b"bytes"):
        with operation("store") as op:
            op.fail(anything)
        assert op.outcome == "error"


# --- crossing threads and tasks ------------------------------------------------------------------


def test_operation_crosses_threads_with_the_context(captured_telemetry):
    """In a thread that runs in a copied context the operation is current, and counts there."""

    def work() -> None:
        current_operation().received(1)
        with operation("store") as store:
            store.ingested(1)

    with operation("fetch", feed="urlhaus") as fetch:
        contexts = [contextvars.copy_context() for _ in range(8)]
        threads = [threading.Thread(target=one.run, args=(work,)) for one in contexts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        fetch.ingested(8)
    outer = captured_telemetry.operation("fetch")
    assert outer.items.received == 8
    stores = captured_telemetry.operations("store")
    assert len(stores) == 8
    assert all(one.is_child_of(outer) and one.feed == "urlhaus" for one in stores)


def test_operation_stays_out_of_threads_without_the_context(captured_telemetry):
    """In a plain thread no operation is current."""
    seen = []
    with operation("fetch") as fetch:
        thread = threading.Thread(target=lambda: seen.append(current_operation()))
        thread.start()
        thread.join()
    assert seen[0] is not fetch
    assert seen[0].name == ""


async def test_operation_crosses_tasks(captured_telemetry):
    """Tasks have the operation in which they were created, each with nested ones of its own."""

    async def work(number: int) -> None:
        async with operation(f"store {number % 2}") as op:
            await asyncio.sleep(0)
            assert current_operation() is op
            op.ingested(1)
        current_operation().received(1)

    async with operation("fetch", feed="misp") as fetch:
        await asyncio.gather(*(work(number) for number in range(20)))
        assert current_operation() is fetch
        fetch.ingested(20)
    outer = captured_telemetry.operation("fetch")
    assert outer.outcome == "ok"
    assert outer.items.received == 20
    children = captured_telemetry.operations("store 0") + captured_telemetry.operations("store 1")
    assert len(children) == 20
    assert all(one.is_child_of(outer) and one.feed == "misp" for one in children)


async def test_cancelled_task_settles_as_cancelled(captured_telemetry):
    """An operation in a task that is cancelled settles once, as cancelled."""
    begun = asyncio.Event()

    async def work() -> None:
        async with operation("fetch"):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert captured_telemetry.operation("fetch").outcome == "cancelled"
    assert captured_telemetry.metric(names.ACTIVE.name) == 0


# --- misuse --------------------------------------------------------------------------------------


def test_block_is_entered_once(captured_telemetry):
    """An operation block is refused the second time, inside and after the first, which settles."""
    block = operation("store")
    with block, pytest.raises(RuntimeError, match="once"), block:
        pytest.fail("entered twice")
    with pytest.raises(RuntimeError, match="once"):
        block.__enter__()
    assert captured_telemetry.operation("store").outcome == "ok"
    assert captured_telemetry.metric(DURATION) == 1


def test_block_that_is_never_entered_leaves_nothing(captured_telemetry):
    """A block that is only made, or left without being entered, does nothing."""
    operation("store")
    operation("store").__exit__(None, None, None)
    assert captured_telemetry.spans == []
    assert captured_telemetry.metric(DURATION) == 0


def test_second_exit_does_nothing(captured_telemetry):
    """An operation settles once, whatever is called afterwards."""
    block = operation("store")
    with block as op:
        pass
    block.__exit__(None, None, None)
    block.__exit__(ValueError, ValueError("late"), None)
    op.settle()
    assert op.outcome == "ok"
    assert captured_telemetry.operation("store").outcome == "ok"
    assert captured_telemetry.metric(DURATION) == 1


def test_exit_in_another_context_logs_and_restores_nothing(captured_telemetry, caplog):
    """An operation left in another contextvars context settles; nothing is logged or restored."""
    block = operation("store")
    entered = contextvars.copy_context()
    op = entered.run(block.__enter__)
    with caplog.at_level(logging.DEBUG), operation("other") as other:
        block.__exit__(None, None, None)
        assert current_operation() is other
    assert caplog.records == []
    assert entered.run(current_operation) is op
    assert captured_telemetry.operation("store").outcome == "ok"
    assert captured_telemetry.metric(names.ACTIVE.name) == 0


def test_exception_in_another_context_is_recorded(captured_telemetry, caplog):
    """An operation that raises and is left in another context settles as failed, without a log."""
    block = operation("store")
    contextvars.copy_context().run(block.__enter__)
    with caplog.at_level(logging.DEBUG):
        block.__exit__(ValueError, ValueError("x"), None)
    assert caplog.records == []
    assert captured_telemetry.operation("store").error_type == "ValueError"


def test_exit_out_of_order_leaves_no_error(captured_telemetry, caplog):
    """Two blocks that are left in the order in which they were entered both settle once."""
    first, second = operation("first"), operation("second")
    base = get_current()
    token = attach(base)
    try:
        first.__enter__()
        second.__enter__()
        with caplog.at_level(logging.DEBUG):
            first.__exit__(None, None, None)
            second.__exit__(None, None, None)
    finally:
        detach(token)
    assert caplog.records == []
    assert len(captured_telemetry.operations()) == 2
    assert captured_telemetry.metric(DURATION) == 2


def test_calls_after_the_end_never_raise(captured_telemetry):
    """Whatever is called on a settled operation, its span and outcome stay as they were."""
    with operation("store") as op:
        op.ingested(1)
    op.fail(ValueError("late"))
    op.set_attribute("late", 1)
    op.failed(None, ValueError("late"))
    assert op.outcome == "ok"
    store = captured_telemetry.operation("store")
    assert "late" not in store.attributes
    assert store.span.events == ()


# --- suppression, sampling, no SDK ---------------------------------------------------------------


def suppressing(value: object) -> contextvars.Token[Context]:
    return attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, value))


def test_suppressed_instrumentation_is_honoured(captured_telemetry):
    """Where instrumentation is suppressed, an operation works and emits neither span nor metric."""
    token = suppressing(True)
    try:
        with operation("store", feed="urlhaus") as op:
            assert current_operation() is op
            op.received(3)
            op.ingested(2)
            with operation("inner") as inner:
                assert inner.feed == "urlhaus"
        assert op.outcome == "partial"
        assert op.items.unaccounted == 1
        with pytest.raises(ValueError, match="x"), operation("fails") as op:
            raise ValueError("x")
        assert op.outcome == "error"
    finally:
        detach(token)
    assert captured_telemetry.spans == []
    for metric in (DURATION, names.ACTIVE.name, names.RECEIVED.name, names.SETTLED.name):
        assert captured_telemetry.label_sets(metric) == []


def test_suppression_with_a_false_value_is_none(captured_telemetry):
    """The suppression key set to False means that instrumentation is not suppressed."""
    token = suppressing(False)
    try:
        with operation("store"):
            pass
    finally:
        detach(token)
    assert captured_telemetry.operation("store").outcome == "ok"


def test_unsampled_operations_are_counted():
    """An operation whose span is not sampled is counted, timed and accounted like any other."""
    with capture_telemetry(sampler=ALWAYS_OFF) as captured:
        with operation("store", feed="urlhaus") as op:
            op.received(3)
            op.ingested(2)
            op.failed(None, ValueError("x"))
        with pytest.raises(TimeoutError), operation("store", feed="urlhaus"):
            raise TimeoutError
        assert op.outcome == "partial"
        assert captured.spans == []
        assert captured.metric(DURATION, outcome="partial", feed_name="urlhaus") == 1
        assert captured.metric(DURATION, outcome="timeout", error_type="TimeoutError") == 1
        assert captured.items().received == captured.items().ingested + captured.items().failed == 3


WITHOUT_SDK = """
    import asyncio, sys
    from periscope_otel import current_operation, operation

    with operation("fetch", feed="urlhaus") as outer:
        assert current_operation() is outer
        with operation("store") as op:
            assert op.feed == "urlhaus", op.feed
            op.received(3)
            op.ingested(1)
            op.skipped(reason="old")
            assert list(op.track([1])) == [1]
        assert op.outcome == "partial", op.outcome
        assert op.items.unaccounted == 2, op.items
        assert op.items.received == 4
        assert not op.span.is_recording()
    assert outer.outcome == "ok"
    assert current_operation().name == ""

    for raised, outcome in ((ValueError, "error"), (TimeoutError, "timeout"),
                            (KeyboardInterrupt, "cancelled")):
        try:
            with operation("store") as op:
                raise raised
        except raised:
            pass
        assert op.outcome == outcome, (raised, op.outcome)

    with operation("store") as op:
        op.fail("told")
    assert op.outcome == "error"

    async def main():
        async with operation("fetch", feed="misp") as op:
            async def child():
                async with operation("inner") as inner:
                    return inner.feed
            assert await asyncio.gather(*(child() for _ in range(3))) == ["misp"] * 3
    asyncio.run(main())

    loaded = [name for name in sys.modules if name.startswith("opentelemetry.sdk")]
    assert not loaded, loaded
    import threading
    assert threading.active_count() == 1, threading.enumerate()
"""


def test_without_an_sdk_everything_works_and_no_sdk_is_loaded():
    """Without an SDK operations work, account and nest; no SDK is loaded and no thread started."""
    done = run_python(WITHOUT_SDK)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


SDK_SET_LATER = """
    from periscope_otel import operation
    from opentelemetry import metrics, trace

    with operation("before") as before:
        pass

    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(tracers)
    metrics.set_meter_provider(MeterProvider([reader]))
    with operation("after", feed="urlhaus") as op:
        op.ingested(2)
    assert [span.name for span in exporter.get_finished_spans()] == ["after"]
    points = {
        metric.name: metric.data.data_points
        for resource in reader.get_metrics_data().resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    assert points["threat.ingest.operation.duration"][0].count == 1
    assert points["threat.ingest.items.received"][0].value == 2
"""


def test_global_providers_set_later_are_found():
    """Operations use the global providers from the moment on when the application sets them."""
    done = run_python(SDK_SET_LATER)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
