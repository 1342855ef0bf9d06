"""The contracts of `breaker=`: permits of monitored calls, whatever their shape and their end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time

import pytest
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import periscope_otel as periscope
from periscope_otel.resilience.breaker import breakers
from periscope_otel.resilience.policy import STATES
from periscope_otel.telemetry.worker import worker
from periscope_otel.testing import capture_telemetry


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock) -> periscope.Breaker:
    """A breaker that two failures in a row open, for ten seconds."""
    return periscope.Breaker(
        "feed.example", consecutive_failures=2, open_time=10.0, jitter=0.0, clock=clock
    )


def broken() -> None:
    raise ConnectionError("refused")


def _function(breaker, body):
    @periscope.monitored("fetch", breaker=breaker)
    def fetch() -> object:
        return body()

    return fetch


def _method(breaker, body):
    class Feed:
        @periscope.monitored("fetch", breaker=breaker)
        def fetch(self) -> object:
            return body()

    return Feed().fetch


def _coroutine(breaker, body):
    @periscope.monitored("fetch", breaker=breaker)
    async def fetch() -> object:
        await asyncio.sleep(0)
        return body()

    return lambda: asyncio.run(fetch())


def _generator(breaker, body):
    @periscope.monitored("fetch", breaker=breaker)
    def fetch():
        yield 1
        body()

    return lambda: list(fetch())


def _async_generator(breaker, body):
    @periscope.monitored("fetch", breaker=breaker)
    async def fetch():
        yield 1
        body()

    async def consume() -> list[int]:
        return [item async for item in fetch()]

    return lambda: asyncio.run(consume())


def _block(breaker, body):
    def fetch() -> object:
        with periscope.operation("fetch", breaker=breaker):
            return body()

    return fetch


def _async_block(breaker, body):
    async def fetch() -> object:
        async with periscope.operation("fetch", breaker=breaker):
            return body()

    return lambda: asyncio.run(fetch())


SHAPES = [_function, _method, _coroutine, _generator, _async_generator, _block, _async_block]


def failing(call, times=1) -> None:
    for _ in range(times):
        with pytest.raises(ConnectionError):
            call()


@pytest.mark.parametrize("shape", SHAPES)
def test_failures_open_it_and_open_rejects(shape, breaker, captured_telemetry):
    """After failures enough a call is not made: it raises, and is an operation `rejected`."""
    made = []
    call = shape(breaker, lambda: (made.append(1), broken()))
    failing(call, 2)
    with pytest.raises(periscope.CircuitOpenError) as refused:
        call()
    assert len(made) == 2
    assert (refused.value.name, refused.value.state) == ("feed.example", "open")
    assert refused.value.retry_after == pytest.approx(10.0)
    outcomes = [one.outcome for one in captured_telemetry.operations("fetch")]
    assert outcomes == ["error", "error", "rejected"]
    last = captured_telemetry.operations("fetch")[-1]
    assert (last.error_type, last.span.status.is_ok) == ("CircuitOpenError", False)
    assert last.attributes["circuit_breaker.name"] == "feed.example"
    assert captured_telemetry.metric("threat.ingest.operation.duration", outcome="rejected") == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_it_recovers(shape, breaker, clock, captured_telemetry):
    """When the open time is over one call probes, and two that succeed close it."""
    healthy = []
    call = shape(breaker, lambda: healthy or broken())
    failing(call, 2)
    clock.now += 10.0
    healthy.append(1)
    call()
    assert breaker.state == "half_open"
    call()
    assert breaker.state == "closed"
    assert breaker.view().in_flight == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_without_an_sdk_it_is_the_same(shape, breaker):
    """Where there is no SDK a breaker opens and rejects all the same, and no permit is left out."""
    call = shape(breaker, broken)
    failing(call, 2)
    with pytest.raises(periscope.CircuitOpenError):
        call()
    view = breaker.view()
    assert (view.in_flight, view.outcomes["failure"], view.rejections) == (0, 2, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_at_no_sampling_it_is_the_same(shape, breaker):
    """Spans that are not sampled leak no permit and hide no failure."""
    with capture_telemetry(sampler=ALWAYS_OFF):
        call = shape(breaker, broken)
        failing(call, 2)
        with pytest.raises(periscope.CircuitOpenError):
            call()
        assert breaker.view().in_flight == 0


def test_a_name_finds_the_breaker(captured_telemetry):
    """Operations that give the same name share a breaker, and the registry knows it."""
    call, other = _function("by.name", broken), _block("by.name", broken)
    failing(call, 3)
    failing(other, 2)
    with pytest.raises(periscope.CircuitOpenError):
        call()
    assert breakers.get("by.name").state == "open"


def test_a_callable_chooses_by_the_arguments(captured_telemetry):
    """`breaker=` may work the name, or the breaker, out of the bound arguments; None is none."""
    given = periscope.Breaker("given")

    @periscope.monitored("fetch", breaker=lambda args: args["host"])
    def fetch(host: object) -> None: ...

    for host in ("a.example", given, None):
        fetch(host)
    assert breakers.get("a.example").view().outcomes["success"] == 1
    assert given.view().outcomes["success"] == 1
    found = [one.attributes.get("circuit_breaker.name") for one in captured_telemetry.operations()]
    assert found == ["a.example", "given", None]


def test_a_callable_that_raises_leaves_the_call_alone(captured_telemetry, caplog):
    """The user's callable must not break the user's call: it goes on without a breaker."""

    @periscope.monitored("fetch", breaker=lambda args: args["no such"])
    def fetch() -> int:
        return 7

    assert fetch() == 7
    assert "breaker=" in caplog.text


@pytest.mark.parametrize("breaker", [7, b"x", object()])
def test_another_type_is_refused(breaker):
    """What is neither a name nor a breaker nor a callable is a mistake at decoration."""
    with pytest.raises(TypeError, match="breaker= takes"):
        periscope.monitored("fetch", breaker=breaker)(lambda: None)


def test_cancellation_says_nothing_about_the_dependency(breaker, captured_telemetry):
    """A task that is cancelled gives its permit back, and counts neither way."""

    @periscope.monitored("fetch", breaker=breaker)
    async def fetch() -> None:
        await asyncio.sleep(60)

    async def cancelled() -> None:
        for _ in range(5):
            task = asyncio.create_task(fetch())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancelled())
    view = breaker.view()
    assert (view.state, view.in_flight, view.calls) == ("closed", 0, 0)


def test_a_cancelled_probe_closes_nothing(breaker, clock, captured_telemetry):
    """A probe that is cancelled makes room for another one; it is no success."""
    failing(_function(breaker, broken), 2)
    clock.now += 10.0

    @periscope.monitored("fetch", breaker=breaker)
    async def fetch() -> None:
        await asyncio.sleep(60)

    async def cancelled() -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(fetch(), 0.001)

    asyncio.run(cancelled())
    assert breaker.state == "half_open"
    assert breaker.view().probes == 0


def test_an_outer_timeout_does_not_hide_a_hang(clock, captured_telemetry):
    """Calls that `wait_for` cancels after the slow threshold count as slow, and open it."""
    breaker = periscope.Breaker("hanging", slow_threshold=5.0, minimum_calls=3, clock=clock)

    @periscope.monitored("fetch", breaker=breaker)
    async def fetch() -> None:
        clock.now += 5.0
        await asyncio.sleep(60)

    async def hang() -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(fetch(), 0.001)

    asyncio.run(hang())
    assert (breaker.state, breaker.view().reason) == ("open", "slow_rate")


@pytest.mark.parametrize("is_async", [False, True])
def test_slow_means_the_own_time_of_a_generator(is_async, clock, captured_telemetry):
    """What the consumer takes between items does not make a generator slow."""
    breaker = periscope.Breaker("paged", slow_threshold=5.0, minimum_calls=1, clock=clock)
    own = [1.0]

    @periscope.monitored("pages", breaker=breaker)
    def pages():
        for number in range(3):
            clock.now += own[0]
            yield number

    @periscope.monitored("pages", breaker=breaker)
    async def async_pages():
        for number in range(3):
            clock.now += own[0]
            yield number

    async def consume_async() -> None:
        async for _ in async_pages():
            clock.now += 100.0

    def consume() -> None:
        if is_async:
            asyncio.run(consume_async())
            return
        for _ in pages():
            clock.now += 100.0

    consume()
    assert breaker.state == "closed"
    own[0] = 2.0
    consume()
    assert breaker.state == "open"


def test_a_result_that_means_failure_counts(captured_telemetry):
    """A returned response with status 503 is a failure to the breaker, as a raised one is."""

    class Response:
        status_code = 503
        headers: dict[str, str] = {}  # noqa: RUF012

    @periscope.monitored("fetch", breaker="responding", result=lambda r: r.status_code >= 400)
    def fetch() -> Response:
        return Response()

    for _ in range(5):
        fetch()
    assert breakers.get("responding").state == "open"


def test_refused_credentials_open_at_once_and_say_so(captured_telemetry, caplog):
    """One 401 opens the breaker: a revoked key is not to be hammered with."""

    class RefusedError(Exception):
        status_code = 401
        headers: dict[str, str] = {}  # noqa: RUF012

    def refused() -> None:
        raise RefusedError

    with pytest.raises(RefusedError):
        _function("keyed", refused)()
    assert breakers.get("keyed").view().reason == "auth"
    _ = captured_telemetry.spans
    assert "breaker keyed is open: the credentials are refused (401)" in caplog.text


def test_retry_after_holds_it_without_a_failure(clock, captured_telemetry):
    """A 429 with Retry-After opens it for just that long, and the next opening is not longer."""
    breaker = periscope.Breaker("limited", clock=clock)

    class LimitedError(Exception):
        status_code = 429
        headers = {"Retry-After": "7"}  # noqa: RUF012

    def limited() -> None:
        raise LimitedError

    with pytest.raises(LimitedError):
        _function(breaker, limited)()
    view = breaker.view()
    assert (view.state, view.reason, view.retry_after) == ("open", "rate_limit", 7.0)
    assert view.outcomes["failure"] == 0


def test_nested_operations_have_breakers_of_their_own(breaker, captured_telemetry):
    """An inner failure counts on the inner breaker, and on the outer one if it gets that far."""
    outer = periscope.Breaker("outer")

    @periscope.monitored("outer", breaker=outer)
    def call_it() -> None:
        with pytest.raises(ConnectionError):
            _function(breaker, broken)()

    call_it()
    assert breaker.view().outcomes == {"success": 0, "failure": 1, "ignored": 0}
    assert outer.view().outcomes == {"success": 1, "failure": 0, "ignored": 0}


def test_an_inner_rejection_is_no_failure_of_the_outer_dependency(breaker, captured_telemetry):
    """What an inner breaker rejects is ignored by the breakers around it."""
    breaker.force_open()
    outer = periscope.Breaker("outer")
    with pytest.raises(periscope.CircuitOpenError):
        _function(outer, _function(breaker, broken))()
    assert outer.view().outcomes == {"success": 0, "failure": 0, "ignored": 1}


def test_a_generator_that_is_dropped_gives_its_permit_back(breaker, captured_telemetry):
    """A generator that is garbage half-way settles its permit, as it settles its operation."""

    @periscope.monitored("pages", breaker=breaker)
    def pages():
        yield 1
        yield 2

    items = pages()
    next(items)
    assert breaker.view().in_flight == 1
    del items
    gc.collect()
    _ = captured_telemetry.spans
    assert breaker.view().in_flight == 0


def test_rejected_calls_have_ten_spans_a_second(breaker, captured_telemetry):
    """Further rejections of a second are counted and raise, without a span."""
    breaker.force_open()
    call = _function(breaker, broken)
    for _ in range(25):
        with pytest.raises(periscope.CircuitOpenError):
            call()
    assert len(captured_telemetry.operations("fetch")) == 10
    assert captured_telemetry.metric("threat.ingest.operation.duration", outcome="rejected") == 25
    assert captured_telemetry.metric("circuit_breaker.rejections") == 25


def test_a_rejection_inherits_the_feed(breaker, captured_telemetry):
    """Also a rejection without a span is counted under the feed of the enclosing operation."""
    breaker.force_open()
    call = _function(breaker, broken)
    with periscope.operation("pull", feed="urlhaus"):
        for _ in range(12):
            with pytest.raises(periscope.CircuitOpenError):
                call()
    counted = captured_telemetry.metric("threat.ingest.operation.duration", feed_name="urlhaus",
                                        outcome="rejected")  # fmt: skip
    assert counted == 12


def test_permits_are_right_in_many_threads(captured_telemetry):
    """Calls of many threads take and settle a permit each."""
    breaker = periscope.Breaker("threads", consecutive_failures=None, failure_rate=1.0)
    call = _function(breaker, lambda: time.sleep(0.0001))
    threads = [threading.Thread(target=lambda: [call() for _ in range(50)]) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    view = breaker.view()
    assert (view.in_flight, view.outcomes["success"]) == (0, 800)


def test_a_breaker_that_fails_itself_lets_the_call_pass(breaker, monkeypatch, captured_telemetry):
    """An error of the plugin's own in the breaker is contained: the call goes on without it."""
    from periscope_otel import guard

    guard.set_strict(False)
    monkeypatch.setattr(periscope.Breaker, "allow", lambda self: 1 / 0)
    assert _function(breaker, lambda: 7)() == 7


def test_metrics_tell_state_calls_and_transitions(breaker, captured_telemetry):
    """State is one series a state, of which one is 1; calls and transitions are counted."""
    failing(_function(breaker, broken), 2)
    _ = captured_telemetry.spans
    metric = captured_telemetry.metric
    states = {
        state: metric("circuit_breaker.state", breaker_name="feed.example", breaker_state=state)
        for state in STATES
    }
    assert states == dict.fromkeys(STATES, 0) | {"open": 1}
    assert metric("circuit_breaker.calls", outcome="failure", breaker_name="feed.example") == 2
    assert metric("circuit_breaker.transitions", to_state="open") == 1


def test_a_transition_is_a_span_linked_to_its_cause_and_a_log_line(
    breaker, captured_telemetry, caplog
):
    """Each change of state is a short span in a trace of its own, linked to the call's."""
    failing(_function(breaker, broken), 2)
    spans = [one for one in captured_telemetry.spans if one.name == "circuit_breaker.transition"]
    assert len(spans) == 1
    attributes = dict(spans[0].attributes or {})
    assert attributes["circuit_breaker.from_state"] == "closed"
    assert attributes["circuit_breaker.to_state"] == "open"
    assert attributes["circuit_breaker.reason"] == "consecutive_failures"
    cause = captured_telemetry.operations("fetch")[-1].span.context
    assert [link.context.span_id for link in spans[0].links] == [cause.span_id]
    assert spans[0].parent is None
    lines = [one.getMessage() for one in caplog.records if "feed.example" in one.getMessage()]
    assert lines == [
        "breaker feed.example is open: calls failed one after the other (ConnectionError); for 10 s"
    ]


@pytest.mark.parametrize("inner", SHAPES)
@pytest.mark.parametrize("outer", [_function, _block])
def test_a_breaker_that_guards_twice_counts_once(outer, inner, breaker, clock, captured_telemetry):
    """A guard inside of a guard of the same breaker takes no permit: else no probe would get by."""
    healthy = []
    call = outer(breaker, inner(breaker, lambda: healthy or broken()))
    failing(call, 1)
    assert breaker.view().outcomes["failure"] == 1
    failing(call, 1)
    clock.now += 10.0
    healthy.append(1)
    call()
    call()
    assert breaker.state == "closed"


def test_a_coroutine_that_is_closed_gives_its_permit_back(breaker):
    """Also without an SDK, and as a probe: nothing else would."""

    @periscope.monitored("fetch", breaker=breaker)
    async def fetch() -> None:
        await asyncio.sleep(0)

    for _ in range(3):
        coroutine = fetch()
        coroutine.send(None)
        coroutine.close()
    worker.finish_posted(30)
    assert breaker.view().in_flight == 0


def test_what_the_consumer_throws_into_a_generator_blames_no_breaker(breaker, captured_telemetry):
    """A context manager made of a guarded generator does not take its body's errors for its own."""

    @contextlib.contextmanager
    @periscope.monitored("session", breaker=breaker)
    def session():
        yield 1

    for _ in range(3):
        with pytest.raises(ConnectionError), session():
            raise ConnectionError("to another host")
    assert breaker.view().outcomes == {"success": 0, "failure": 0, "ignored": 3}


def test_the_judge_is_asked_of_failures_that_are_told(captured_telemetry):
    """`op.fail(error)` means to the breaker what raising the error would."""
    breaker = periscope.Breaker("judged", judge=lambda _error: "ignored")

    @periscope.monitored("fetch", breaker=breaker)
    def fetch() -> None:
        periscope.current_operation().fail(ConnectionError("told"))

    fetch()
    assert breaker.view().outcomes == {"success": 0, "failure": 0, "ignored": 1}
    assert captured_telemetry.operation("fetch").outcome == "error"


def test_a_name_with_a_password_is_redacted_everywhere():
    """What a breaker is called goes into logs, labels and other processes."""
    name = "https://user:hunter2Qx9@feed.example/?api_key=abcdef0123456789"
    breaker = periscope.Breaker(name)
    assert "hunter2Qx9" not in breaker.name
    assert "hunter2Qx9" not in str(breaker.refusal())
    assert breakers.get(name) is breaker


def test_an_operation_block_takes_no_callable():
    """There are no arguments to work a breaker out of."""
    with pytest.raises(TypeError, match="no arguments"):
        periscope.operation("store", breaker=lambda args: "x")


@pytest.mark.parametrize("name", ["", " \n"])
def test_an_empty_name_is_told_of(name, caplog):
    """As of a variable that is not set: calls are made without a breaker, and one line says so."""
    call = _function(name, broken)
    for _ in range(10):
        with pytest.raises(ConnectionError):
            call()
    assert "breaker= is empty" in caplog.text
