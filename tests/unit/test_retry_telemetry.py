"""The contracts of what is told of retries: an event on the span, and a count."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN
from retry_world import Script, StatusError, World

from periscope_otel import monitored, operation
from periscope_otel.failure import classify
from periscope_otel.resilience.retry import Retry
from periscope_otel.resilience.retry_telemetry import tell_of_retry
from periscope_otel.telemetry.current import current
from periscope_otel.telemetry.names import RETRIES
from periscope_otel.testing import capture_telemetry


@pytest.fixture(autouse=True)
def world(monkeypatch):
    """Return a world in which waiting takes no time."""
    world = World()
    world.install(monkeypatch)
    return world


@pytest.fixture
def captured():
    """Return what operations emit."""
    with capture_telemetry() as captured:
        yield captured


def events_of(span):
    return [(event.name, dict(event.attributes)) for event in span.events]


def test_each_retry_is_an_event_of_the_current_span(captured):
    """With the attempt that failed, the wait, the error and the reason."""
    with operation("store", feed="urlhaus"):
        Retry()(Script(ConnectionError(), StatusError(503), "done"))()
    assert events_of(captured.operation("store").span) == [
        (
            "retry",
            {
                "retry.attempt": 1,
                "retry.wait": 0.5,
                "error.type": "ConnectionError",
                "retry.reason": "connect",
            },
        ),
        (
            "retry",
            {
                "retry.attempt": 2,
                "retry.wait": 1.0,
                "error.type": "503",
                "retry.reason": "server",
            },
        ),
    ]


def test_retries_are_counted_under_the_enclosing_operation(captured):
    """By operation, feed and error; the last attempt is none."""

    @monitored("fetch", feed="urlhaus")
    def fetch():
        for attempt in Retry():
            with attempt:
                raise StatusError(503)

    with pytest.raises(StatusError):
        fetch()
    (labels,) = captured.label_sets(RETRIES.name)
    assert labels == {
        "threat.ingest.operation.name": "fetch",
        "threat.feed.name": "urlhaus",
        "error.type": "503",
    }
    assert captured.metric(RETRIES.name) == 2


def test_outside_of_any_operation_they_are_counted_under_the_functions_name(captured):
    """Its last two parts, without a feed; the event goes to whatever span is current."""

    @Retry()
    def fetch():
        return script()

    script = Script(ConnectionError(), "done")
    with current.telemetry.tracer.start_as_current_span("the user's") as span:
        fetch()
    name = f"{test_outside_of_any_operation_they_are_counted_under_the_functions_name.__name__}"
    assert captured.metric(RETRIES.name, operation_name=f"{name}.fetch") == 1
    assert [event.name for event in span.events] == ["retry"]


def test_a_call_without_retries_tells_nothing(captured):
    """Whether it succeeds or fails for good."""
    with operation("store"):
        Retry()(Script("done"))()
        with pytest.raises(KeyError):
            Retry()(Script(KeyError()))()
    assert captured.operation("store").span.events == ()
    assert captured.metric(RETRIES.name) == 0


def test_without_an_sdk_nothing_is_told_and_nothing_fails():
    """The call is retried all the same."""
    assert current.telemetry is None
    with operation("store"):
        assert Retry()(Script(ConnectionError(), "done"))() == "done"
    assert Retry()(Script(ConnectionError(), "done"))() == "done"


def test_a_wrapper_tells_by_span_and_series(captured):
    """What it has of both."""
    with operation("store", feed="urlhaus") as op:
        tell_of_retry(op.span, op.series, 1, 0.1234567, classify(TimeoutError()))
        tell_of_retry(INVALID_SPAN, None, 1, 0.1, classify(TimeoutError()))
    assert captured.metric(RETRIES.name) == 1
    ((name, attributes),) = events_of(captured.operation("store").span)
    assert (name, attributes["retry.wait"]) == ("retry", 0.123)
    assert trace.get_current_span() is INVALID_SPAN


def test_counts_begin_anew_where_the_others_do(captured):
    """In the child of a fork, and with them their label sets."""
    instruments = current.telemetry.instruments
    instruments.count_retry(instruments.labels.series("fetch", None), "503")
    instruments.count_retry(instruments.labels.series("fetch", None), None)
    assert captured.metric(RETRIES.name, operation_name="fetch") == 2
    instruments.clear()
    assert list(instruments._observe_retries()) == []


def test_many_error_types_become_other(captured):
    """The instrument keeps to its limit of label sets."""
    instruments = current.telemetry.instruments
    instruments.labels.limit = 3
    series = instruments.labels.series("fetch", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("periscope_otel.guard.warn", lambda *_: None)
        for number in range(10):
            instruments.count_retry(series, str(500 + number))
    assert captured.metric(RETRIES.name, error_type="other") == 7
    assert captured.metric(RETRIES.name) == 10
