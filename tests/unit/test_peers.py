"""What decorators of this kind have been seen to get wrong, each as a contract of ours."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.context import get_current
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode

import periscope_otel as periscope
from periscope_otel import guard
from periscope_otel.telemetry.current import current, telemetry_on
from periscope_otel.testing import CapturedOperation, capture_telemetry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from opentelemetry import trace

DURATION = "threat.ingest.operation.duration"
ACTIVE = "threat.ingest.operation.active"


@periscope.monitored("peers.rows")
def rows(fail: bool = False) -> Iterator[int]:
    yield 1
    yield 2
    if fail:
        raise ValueError("bad row")


@periscope.monitored("peers.arows")
async def arows(fail: bool = False) -> AsyncIterator[Any]:
    yield (yield 1)
    if fail:
        raise ValueError("bad row")


def everything_said(operation: CapturedOperation) -> str:
    """Return all that a span carries as one text."""
    span = operation.span
    events = [(event.name, dict(event.attributes or {})) for event in span.events]
    return repr((span.name, dict(span.attributes or {}), span.status.description, events))


# --- generators ----------------------------------------------------------------------------------


def test_spans_of_the_consumers_loop_are_not_children(captured_telemetry):
    """Spans that the consumer begins between two items do not become children of the generator."""
    for _ in rows():
        with periscope.operation("consume"):
            pass
    assert [one.span.parent for one in captured_telemetry.operations("consume")] == [None, None]


def test_a_generator_that_raises_is_an_error(captured_telemetry):
    """A generator is recorded to its end, so one that raises half-way does not count as ok."""
    with pytest.raises(ValueError, match="bad row"):
        list(rows(fail=True))
    assert captured_telemetry.operation("peers.rows").outcome == "error"
    assert captured_telemetry.metric(DURATION, outcome="ok") == 0


def test_a_generator_never_iterated_is_nobodys_parent(captured_telemetry):
    """A generator that is made but never iterated does not become the parent of later spans."""
    made = rows()
    with periscope.operation("later"):
        pass
    del made
    assert captured_telemetry.operation("later").span.parent is None
    assert len(captured_telemetry.spans) == 1


def test_the_span_of_a_generator_lives_while_it_is_iterated(captured_telemetry):
    """The span of a generator ends with its iteration, not before the first item."""
    iterator = rows()
    assert next(iterator) == 1
    assert captured_telemetry.spans == []
    assert captured_telemetry.metric(ACTIVE) == 1
    assert list(iterator) == [2]
    assert len(captured_telemetry.spans) == 1


def test_closing_a_generator_early_is_no_error(captured_telemetry):
    """Closing a generator early is normal: its span has no error status and no exception."""
    iterator = rows()
    next(iterator)
    iterator.close()
    operation = captured_telemetry.operation("peers.rows")
    assert operation.outcome == "ok"
    assert operation.span.status.status_code is StatusCode.UNSET
    assert operation.span.events == ()


# --- async generators ----------------------------------------------------------------------------


async def test_asend_reaches_the_body(captured_telemetry):
    """What is sent into an async generator arrives in its body instead of being lost."""
    iterator = arows()
    assert await anext(iterator) == 1
    assert await iterator.asend("sent") == "sent"
    assert [one async for one in iterator] == []
    assert captured_telemetry.operation("peers.arows").outcome == "ok"


def test_a_dropped_async_generator_detaches_without_a_log(captured_telemetry, caplog):
    """Dropping an async generator half-way logs no failure to detach a context."""

    async def main() -> None:
        async for _ in arows():
            break
        await anext(arows())
        for _ in range(5):
            await asyncio.sleep(0)

    with caplog.at_level(logging.DEBUG, "opentelemetry"):
        asyncio.run(main())
        gc.collect()
    assert "detach" not in caplog.text
    assert [one.outcome for one in captured_telemetry.operations("peers.arows")] == ["ok", "ok"]


async def test_an_async_generator_that_raises_is_an_error(captured_telemetry):
    """An async generator is recorded to its end, so one that raises half-way is not ok."""
    iterator = arows(fail=True)
    with pytest.raises(ValueError, match="bad row"):
        [one async for one in iterator]
    assert captured_telemetry.operation("peers.arows").outcome == "error"


async def test_the_span_of_an_async_generator_lives_while_it_is_iterated(captured_telemetry):
    """The span of an async generator ends with its iteration, not before the first item."""
    iterator = arows()
    await anext(iterator)
    assert captured_telemetry.spans == []
    assert [one async for one in iterator] == [None]
    assert len(captured_telemetry.spans) == 1


# --- classes and their methods -------------------------------------------------------------------


def test_a_class_is_not_made_a_function():
    """A class is refused instead of being replaced by a function that breaks `isinstance`."""

    class Source:
        pass

    with pytest.raises(TypeError, match="classes"):
        periscope.monitored(Source)


def test_a_static_method_is_called_through_an_instance(captured_telemetry):
    """Over `@staticmethod` a call through an instance passes no `self`."""

    class Source:
        @periscope.monitored("peers.static")
        @staticmethod
        def fetch(url):
            return url

    assert Source().fetch("u") == Source.fetch("u") == "u"
    assert len(captured_telemetry.operations("peers.static")) == 2


def test_a_class_method_can_be_decorated(captured_telemetry):
    """Over `@classmethod` neither decoration nor call is a TypeError."""

    class Source:
        @periscope.monitored("peers.class")
        @classmethod
        def open(cls, url):
            return cls, url

    assert Source().open("u") == Source.open("u") == (Source, "u")
    assert len(captured_telemetry.operations("peers.class")) == 2


# --- exceptions and cancellation -----------------------------------------------------------------


def test_a_failed_span_has_an_error_type(captured_telemetry):
    """A span that ends in an exception carries `error.type`, as the semantic conventions ask."""
    with pytest.raises(KeyError):
        periscope.monitored("peers.fails")({}.__getitem__)("id")
    assert captured_telemetry.operation("peers.fails").attributes["error.type"] == "KeyError"


async def test_a_cancelled_call_is_counted_and_the_gauge_goes_down(captured_telemetry):
    """A cancelled call is counted, as cancelled, and no longer active."""
    task = asyncio.create_task(periscope.monitored("peers.sleep")(asyncio.sleep)(3600))
    await asyncio.sleep(0)
    assert captured_telemetry.metric(ACTIVE) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert captured_telemetry.metric(DURATION, outcome="cancelled") == 1
    assert captured_telemetry.metric(ACTIVE) == 0


async def test_cancellation_is_told_from_success_and_from_failure(captured_telemetry):
    """A cancelled span is neither an error nor indistinguishable from one that went well."""
    task = asyncio.create_task(periscope.monitored("peers.sleep")(asyncio.sleep)(3600))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    operation = captured_telemetry.operation("peers.sleep")
    assert operation.outcome == "cancelled"
    assert operation.span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit], ids=lambda cls: cls.__name__)
def test_an_interrupted_call_ends_its_span(error, captured_telemetry):
    """KeyboardInterrupt and SystemExit end the span and leave no context behind."""

    def interrupted() -> None:
        raise error

    before = get_current()
    with pytest.raises(error):
        periscope.monitored("peers.interrupted")(interrupted)()
    assert get_current() == before
    operation = captured_telemetry.operation("peers.interrupted")
    assert operation.span.status.status_code is StatusCode.UNSET
    assert operation.span.events == ()


def test_a_nested_exception_is_not_recorded_at_every_level(captured_telemetry):
    """One exception through three spans is one event, not three."""
    with pytest.raises(ValueError, match="bad"), periscope.operation("a"):  # noqa: SIM117
        with periscope.operation("b"), periscope.operation("c"):
            raise ValueError("bad")
    events = [len(one.span.events) for one in captured_telemetry.operations()]
    assert events == [1, 0, 0]


# --- metrics, sampling, threads ------------------------------------------------------------------


def test_the_decorator_alone_counts_and_times(captured_telemetry):
    """Rate, errors and duration come from the decorator, with nothing else to set up."""
    fetch = periscope.monitored("peers.fetch")({"a": 1}.__getitem__)
    fetch("a")
    with pytest.raises(KeyError):
        fetch("b")
    assert captured_telemetry.metric(DURATION, operation_name="peers.fetch") == 2
    assert captured_telemetry.metric(DURATION, outcome="error", error_type="KeyError") == 1


def test_metrics_do_not_depend_on_sampling():
    """Where no trace is sampled every call is still counted, with its outcome."""
    with capture_telemetry(sampler=ALWAYS_OFF) as captured:
        list(rows())
        with contextlib.suppress(ValueError):
            list(rows(fail=True))
        assert captured.spans == []
        assert captured.metric(DURATION, outcome="ok") == 1
        assert captured.metric(DURATION, outcome="error") == 1


def test_a_bare_thread_gets_the_operation_with_the_context(captured_telemetry):
    """The operation goes wherever the context is taken, into a bare thread as into a pool."""
    seen: list[str] = []

    def work() -> None:
        seen.append(periscope.current_operation().name)
        with periscope.operation("in_thread"):
            pass

    with periscope.operation("outer"):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
        thread.start()
        thread.join()
    outer, inner = map(captured_telemetry.operation, ("outer", "in_thread"))
    assert seen == ["outer"]
    assert inner.is_child_of(outer)


def test_many_label_sets_keep_the_operations_name(captured_telemetry):
    """Beyond the limit of label sets the feed becomes `other`, and the operation is still known."""
    for number in range(1700):
        with periscope.operation("peers.many", feed=f"feed-{number}"):
            pass
    labels = captured_telemetry.label_sets(DURATION)
    assert len(labels) < 1700
    assert {one["threat.ingest.operation.name"] for one in labels} == {"peers.many"}
    assert not any("otel.metric.overflow" in one for one in labels)
    assert captured_telemetry.metric(DURATION) == 1700
    assert captured_telemetry.metric(DURATION, feed_name="other") > 0


# --- payloads and secrets ------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_neither_arguments_nor_results_are_captured(fails, captured_telemetry):
    """No argument, local variable or returned value gets into a span, whether it fails or not."""

    def convert(bundle: dict[str, str]) -> list[str]:
        converted = [value.upper() for value in bundle.values()]
        if fails:
            raise ValueError("not STIX")
        return converted

    with contextlib.suppress(ValueError):
        periscope.monitored("peers.convert")(convert)({"id": "payload-content"})
    said = everything_said(captured_telemetry.operation("peers.convert"))
    assert "payload-content" not in said.lower()


@pytest.mark.parametrize(
    "indicator",
    ["auth-paypal-login.example", "secretstealer.exe", "evil.example/session/steal"],
)
def test_indicators_stay_readable(indicator, captured_telemetry):
    """Indicators with words like `auth`, `secret` or `session` in them are not scrubbed."""
    with contextlib.suppress(ValueError), periscope.operation("peers.store") as operation:
        operation.set_attribute("indicator", indicator)
        raise ValueError(f"cannot store {indicator}")
    stored = captured_telemetry.operation("peers.store")
    assert stored.attributes["indicator"] == indicator
    assert indicator in str(stored.span.status.description)
    assert indicator in stored.exceptions[0].attributes["exception.message"]


def test_a_secret_in_an_exception_is_redacted_everywhere(captured_telemetry):
    """A key in the URL of an exception message is in neither status, event nor stack text."""
    url = "https://feeds.example/v1?api_key=SUPERSECRET123&since=7"
    with contextlib.suppress(ValueError), periscope.operation("peers.fetch"):
        raise ValueError(f"no answer from {url}")
    operation = captured_telemetry.operation("peers.fetch")
    assert "SUPERSECRET123" not in everything_said(operation)
    assert "feeds.example" in str(operation.span.status.description)


# --- other people's code -------------------------------------------------------------------------


class Raising(SpanProcessor):
    """A span processor with a bug."""

    def __init__(self, when: str) -> None:
        self.when = when
        self.calls = 0

    def on_start(self, span: trace.Span, parent_context: Any = None) -> None:
        self._maybe("start")

    def on_end(self, span: ReadableSpan) -> None:
        self._maybe("end")

    def _maybe(self, when: str) -> None:
        if when == self.when:
            self.calls += 1
            raise RuntimeError("a processor's bug")


@pytest.mark.parametrize("when", ["start", "end"])
def test_a_span_processor_that_raises_does_not_break_the_call(when, monkeypatch):
    """An exception of a span processor does not get into the user's call or its result."""
    guard.set_strict(False)  # the fixture of conftest.py sets it again
    processor = Raising(when)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    meter_provider = MeterProvider(shutdown_on_exit=False)
    monkeypatch.setattr(current, "telemetry", telemetry_on(provider, meter_provider))
    before = get_current()
    assert periscope.monitored("peers.fetch")({"a": 1}.__getitem__)("a") == 1
    assert list(rows()) == [1, 2]
    assert processor.calls == 2
    assert get_current() == before
    assert sum(guard.counts().values()) == 2
    meter_provider.shutdown()
