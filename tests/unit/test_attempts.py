"""The contracts of `retry=`: attempts of monitored calls, and what becomes of their accounts."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest
from retry_world import World

import periscope_otel as periscope
from periscope_otel import guard
from periscope_otel.failure import classify
from periscope_otel.resilience import pausing

RETRIES = "threat.ingest.operation.retries"


@pytest.fixture(autouse=True)
def world(monkeypatch) -> World:
    """Let no test wait for real; every wait is the longest that the jitter allows."""
    world = World()
    world.now = 1000.0
    world.install(monkeypatch)
    return world


@pytest.fixture
def breaker(world) -> periscope.Breaker:
    return periscope.Breaker(
        "feed.example", consecutive_failures=2, open_time=10.0, jitter=0.0, clock=world.clock
    )


class Flaky:
    """Fails as often as it is told, then works."""

    def __init__(self, failures: int, error: type[Exception] = ConnectionError) -> None:
        self.left = failures
        self.error = error
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error("no")
        return "done"


def _function(flaky, **options: Any):
    @periscope.monitored("fetch", feed="urlhaus", **options)
    def fetch() -> object:
        return flaky()

    return fetch


def _coroutine(flaky, **options: Any):
    @periscope.monitored("fetch", feed="urlhaus", **options)
    async def fetch() -> object:
        await asyncio.sleep(0)
        return flaky()

    return lambda: asyncio.run(fetch())


def _generator(flaky, **options: Any):
    @periscope.monitored("fetch", feed="urlhaus", **options)
    def fetch():
        yield flaky()

    return lambda: "".join(fetch())


def _async_generator(flaky, **options: Any):
    @periscope.monitored("fetch", feed="urlhaus", **options)
    async def fetch():
        yield flaky()

    async def consume() -> object:
        return "".join([item async for item in fetch()])

    return lambda: asyncio.run(consume())


SHAPES = [_function, _coroutine, _generator, _async_generator]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_call_that_fails_is_made_again(shape, captured_telemetry):
    """Attempts follow each other within one operation, which ends as the last one does."""
    flaky = Flaky(2)
    assert shape(flaky, retry=periscope.Retry(attempts=3))() == "done"
    operation = captured_telemetry.operation("fetch")
    assert (flaky.calls, operation.outcome, operation.error_type) == (3, "ok", None)
    retries = [event for event in operation.span.events if event.name == "retry"]
    assert [event.attributes["retry.attempt"] for event in retries] == [1, 2]
    assert captured_telemetry.metric(RETRIES, feed_name="urlhaus") == 2
    assert captured_telemetry.metric("threat.ingest.operation.duration") == 1
    assert not operation.exceptions


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_attempts_exception_is_raised_as_it_is(shape, captured_telemetry):
    """When the attempts are used up, the caller sees the function's own exception."""
    flaky = Flaky(9)
    with pytest.raises(ConnectionError, match="no"):
        shape(flaky, retry=periscope.Retry(attempts=3))()
    operation = captured_telemetry.operation("fetch")
    assert (flaky.calls, operation.outcome) == (3, "error")
    assert len(operation.exceptions) == 1


@pytest.mark.parametrize("shape", [_function, _generator])
def test_no_cycle_keeps_an_exception_alive(shape, breaker, captured_telemetry):
    """An exception, and the sockets in its frames, is freed when its last holder lets go of it."""

    class HeldError(ConnectionError):
        pass

    gc.disable()
    try:
        with pytest.raises(HeldError) as caught:
            shape(Flaky(9, HeldError), retry=periscope.Retry(attempts=3, deadline=1.0),
                  breaker=breaker)()  # fmt: skip
        left = weakref.ref(caught.value)
        del caught
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("shape", SHAPES)
def test_what_would_fail_alike_is_not_tried_again(shape, captured_telemetry):
    """A validation error is raised at the first attempt."""
    flaky = Flaky(1, ValueError)
    with pytest.raises(ValueError, match="no"):
        shape(flaky, retry=periscope.Retry(attempts=3))()
    assert flaky.calls == 1
    assert captured_telemetry.metric(RETRIES) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_each_attempt_has_a_permit(shape, breaker, captured_telemetry):
    """Each attempt counts on the breaker, and none of their permits is left out."""
    shape(Flaky(1), retry=periscope.Retry(attempts=3), breaker=breaker)()
    view = breaker.view()
    assert view.outcomes == {"success": 1, "failure": 1, "ignored": 0}
    assert view.in_flight == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_it_waits_for_the_breaker_and_takes_the_probe(shape, breaker, world, captured_telemetry):
    """Where attempts open the breaker, the next one waits until it may probe."""
    began = world.now
    assert shape(Flaky(2), retry=periscope.Retry(attempts=3), breaker=breaker)() == "done"
    assert world.now - began >= 10.0
    assert breaker.state == "half_open"
    assert breaker.view().outcomes == {"success": 1, "failure": 2, "ignored": 0}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_wait_for_the_breaker_that_does_not_fit_gives_up_at_once(
    shape, breaker, world, captured_telemetry
):
    """Where the open time is beyond the deadline, the original exception is raised at once."""
    began, flaky = world.now, Flaky(9)
    with pytest.raises(ConnectionError):
        shape(flaky, retry=periscope.Retry(attempts=9, deadline=5.0), breaker=breaker)()
    assert flaky.calls == 2
    assert world.now - began < 5.0
    assert captured_telemetry.operation("fetch").outcome == "error"


def test_a_first_attempt_does_not_wait_for_the_breaker(breaker, world, captured_telemetry):
    """An open breaker rejects the first attempt at once, with `CircuitOpenError`."""
    for _ in range(2):
        with pytest.raises(ConnectionError):
            _function(Flaky(1), breaker=breaker)()
    with pytest.raises(periscope.CircuitOpenError):
        _function(Flaky(0), breaker=breaker, retry=periscope.Retry())()
    assert world.waits == []


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rejection_inside_of_a_later_attempt_is_not_what_the_caller_gets(
    shape, breaker, world, captured_telemetry
):
    """Where a breaker inside of the call rejects the next attempt, the first error stays."""

    def body() -> None:
        _function(Flaky(9), breaker=breaker)()

    with pytest.raises(ConnectionError):
        shape(body, retry=periscope.Retry(attempts=9, deadline=5.0))()
    assert breaker.view().in_flight == 0


def test_a_forced_open_breaker_is_not_waited_for(breaker, world, captured_telemetry):
    """A breaker that an operator has opened ends the attempts with the original exception."""

    def fail() -> None:
        breaker.force_open()
        raise ConnectionError

    with pytest.raises(ConnectionError):
        _function(fail, breaker=breaker, retry=periscope.Retry())()
    assert world.waits == []


@pytest.mark.parametrize("is_async", [False, True])
def test_a_generator_is_not_tried_again_after_an_item(is_async, captured_telemetry):
    """What has given an item fails as it fails: the consumer must not see items twice."""
    calls = []

    @periscope.monitored("pages", retry=periscope.Retry(attempts=3))
    def pages():
        calls.append(1)
        yield 1
        raise ConnectionError

    @periscope.monitored("pages", retry=periscope.Retry(attempts=3))
    async def async_pages():
        calls.append(1)
        yield 1
        raise ConnectionError

    async def consume() -> None:
        async for _ in async_pages():
            pass

    with pytest.raises(ConnectionError):
        asyncio.run(consume()) if is_async else list(pages())
    assert len(calls) == 1


def test_a_generators_waits_are_not_its_consumers_time(world, captured_telemetry):
    """Waiting for a further attempt counts as the generator's own time."""
    flaky = Flaky(1)
    _generator(flaky, retry=periscope.Retry(attempts=2, base=4.0))()
    consumed = captured_telemetry.operation("fetch").attributes["threat.ingest.consumer.duration"]
    assert world.waits
    assert consumed < 1.0


def test_items_of_a_failed_attempt_are_skipped_as_retried(captured_telemetry):
    """Each item stays accounted for: what an attempt has left is received again by the next."""
    attempts = iter([40, 100])

    @periscope.monitored("store", retry=periscope.Retry(attempts=2))
    def store() -> None:
        op = periscope.current_operation()
        op.received(100)
        stored = next(attempts)
        op.ingested(stored)
        if stored < 100:
            raise ConnectionError

    store()
    operation = captured_telemetry.operation("store")
    assert operation.outcome == "ok"
    items = operation.items
    assert (items.received, items.ingested, items.skipped) == (200, 140, 60)
    assert (items.unaccounted, items.excess) == (0, 0)
    assert captured_telemetry.items() == items
    settled = "threat.ingest.items.settled"
    assert captured_telemetry.metric(settled, skip_reason="retried") == 60


def test_received_is_inferred_for_each_attempt(captured_telemetry):
    """Where nothing was said to be received, each attempt has received what it settled."""
    attempts = iter([None, 3])

    @periscope.monitored("store", retry=periscope.Retry(attempts=2))
    def store() -> None:
        op = periscope.current_operation()
        op.ingested(2)
        received = next(attempts)
        if received is None:
            raise ConnectionError
        op.received(received)
        op.skipped(reason="known")

    store()
    items = captured_telemetry.operation("store").items
    assert (items.received, items.ingested, items.skipped) == (5, 4, 1)
    assert (items.unaccounted, items.excess) == (0, 0)
    assert captured_telemetry.items() == items


def test_items_that_failed_before_do_not_make_the_outcome_partial(captured_telemetry):
    """Only what fails in the last attempt is a failure that is left; it alone becomes a letter."""
    attempts = iter([ConnectionError(), None])

    @periscope.monitored("store", dead_letter=True, retry=periscope.Retry(attempts=2))
    def store(rows: list[str]) -> None:
        op = periscope.current_operation()
        error = next(attempts)
        for row in op.track(rows):
            if error is not None and row == "b":
                op.failed(row, ValueError("bad"))
            else:
                op.ingested()
        if error is not None:
            raise error

    store(["a", "b"])
    assert captured_telemetry.operation("store").outcome == "ok"
    assert captured_telemetry.letters == []


def test_a_letter_tells_its_attempts(captured_telemetry):
    """The dead letter of a call is made once, of the last attempt, and says how many there were."""
    flaky = Flaky(9)

    @periscope.monitored("store", dead_letter=True, retry=periscope.Retry(attempts=3))
    def store(row: str) -> None:
        flaky()

    with pytest.raises(ConnectionError):
        store("a")
    assert [one.attempts for one in captured_telemetry.letters] == [3]


def test_the_idempotency_key_is_the_same_for_each_attempt(captured_telemetry):
    """What is stored under the key is stored once, however many attempts it took."""
    keys = []
    flaky = Flaky(2)

    @periscope.monitored("store", dead_letter=True, retry=periscope.Retry(attempts=3))
    def store(row: str) -> None:
        keys.append(periscope.current_operation().idempotency_key)
        flaky()

    store("a")
    assert len(keys) == 3
    assert len(set(keys)) == 1


def test_a_failure_that_was_returned_is_tried_again(captured_telemetry):
    """A response that means failure is a failed attempt; one that does not ends them."""
    statuses = iter([503, 200])

    class Response:
        headers: dict[str, str] = {}  # noqa: RUF012

        def __init__(self) -> None:
            self.status_code = next(statuses)

    @periscope.monitored(
        "fetch", retry=periscope.Retry(), result=lambda response: response.status_code >= 400
    )
    def fetch() -> Response:
        return Response()

    assert fetch().status_code == 200
    operation = captured_telemetry.operation("fetch")
    assert (operation.outcome, operation.error_type) == ("ok", None)
    assert operation.span.status.is_ok
    assert captured_telemetry.metric(RETRIES, error_type="503") == 1


def test_a_failure_that_stays_is_returned(captured_telemetry):
    """After the last attempt the value is returned, and the operation has failed."""

    @periscope.monitored("fetch", retry=periscope.Retry(attempts=2, result=lambda value: not value))
    def fetch() -> list[str]:
        return []

    assert fetch() == []
    assert captured_telemetry.operation("fetch").outcome == "error"
    assert captured_telemetry.metric(RETRIES) == 1


@pytest.mark.parametrize("is_generator", [False, True])
def test_cancelling_a_wait_ends_as_the_last_attempt(
    is_generator, monkeypatch, breaker, captured_telemetry
):
    """A task that is cancelled in a wait leaves nothing current, and its payload as a letter."""
    monkeypatch.setattr(pausing, "_sleep_async", lambda seconds: asyncio.sleep(60))
    options: dict[str, Any] = {
        "retry": periscope.Retry(), "breaker": breaker, "dead_letter": True
    }  # fmt: skip

    @periscope.monitored("fetch", **options)
    async def fetch(url: str) -> None:
        raise ConnectionError

    @periscope.monitored("fetch", **options)
    async def pages(url: str):
        raise ConnectionError
        yield

    async def consume() -> None:
        async for _ in pages("a"):
            pass

    async def cancel() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(consume() if is_generator else fetch("a"), 0.01)
        assert periscope.current_operation().name == ""

    asyncio.run(cancel())
    operation = captured_telemetry.operation("fetch")
    assert (operation.outcome, operation.error_type) == ("error", "ConnectionError")
    assert [letter.error_type for letter in captured_telemetry.letters] == ["ConnectionError"]
    assert breaker.view().in_flight == 0


@pytest.mark.parametrize("shape", [_function, _generator])
def test_ctrl_c_in_a_wait_ends_as_the_last_attempt(shape, monkeypatch, captured_telemetry):
    """An interruption of the wait passes, and nothing stays current."""

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pausing, "_sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shape(Flaky(9), retry=periscope.Retry())()
    assert periscope.current_operation().name == ""
    assert captured_telemetry.operation("fetch").outcome == "error"


def test_the_end_of_the_process_in_a_wait_ends_as_the_last_attempt(captured_telemetry):
    """An operation that is aborted between two attempts has failed as the first of them."""
    flaky = Flaky(9)

    def abort(_details: object) -> None:
        periscope.current_operation().last_attempt = (classify(ConnectionError()), None)
        periscope.current_operation().abort()

    with pytest.raises(ConnectionError):
        _function(flaky, retry=periscope.Retry(attempts=1, on_retry=abort), dead_letter=True)()
    assert captured_telemetry.operation("fetch").outcome == "error"


def test_no_retry_while_shutting_down(captured_telemetry):
    """Attempts end with what the last one came to when the process shuts down."""
    flaky = Flaky(9)
    pausing.shutting_down()
    try:
        with pytest.raises(ConnectionError):
            _function(flaky, retry=periscope.Retry(attempts=5))()
    finally:
        pausing.resumed()
    assert flaky.calls == 1


def test_retries_can_be_switched_off_for_tests(captured_telemetry):
    """With `set_active(False)` there is exactly one attempt."""
    flaky = Flaky(9)
    periscope.Retry.set_active(False)
    try:
        with pytest.raises(ConnectionError):
            _function(flaky, retry=periscope.Retry(attempts=5))()
    finally:
        periscope.Retry.set_active(True)
    assert flaky.calls == 1


def test_the_journal_keeps_one_entry_for_all_attempts(captured_telemetry):
    """The payload is written down once before the first attempt, and removed after the last."""
    seen = []
    flaky = Flaky(1)

    @periscope.monitored("store", dead_letter=True, journal=True, retry=periscope.Retry())
    def store(row: str) -> None:
        seen.append(len(captured_telemetry.journal))
        flaky()

    store("a")
    assert seen == [1, 1]
    assert captured_telemetry.journal == []
    assert captured_telemetry.letters == []


@pytest.mark.parametrize("shape", SHAPES)
def test_without_an_sdk_it_is_the_same(shape, breaker):
    """Attempts and permits are as they are with an SDK."""
    flaky = Flaky(1)
    assert shape(flaky, retry=periscope.Retry(), breaker=breaker)() == "done"
    assert flaky.calls == 2
    assert breaker.view().in_flight == 0


def test_an_attempt_that_is_rejected_inside_counts_nothing(breaker, world, captured_telemetry):
    """One real failure is one failure of the outer dependency, and one attempt."""
    outer = periscope.Breaker("outer", clock=world.clock)
    inner = _function(Flaky(9), breaker=breaker, retry=periscope.Retry(attempts=1))

    def body() -> None:
        breaker.force_open() if breaker.view().outcomes["failure"] else None
        inner()

    with pytest.raises(ConnectionError):
        _function(body, breaker=outer, retry=periscope.Retry(attempts=5, deadline=3.0),
                  dead_letter=True)()  # fmt: skip
    assert outer.view().outcomes["failure"] == 1
    assert outer.view().in_flight == 0
    assert [letter.attempts for letter in captured_telemetry.letters] == [1]


def test_waiting_is_not_being_rejected(breaker, world, captured_telemetry):
    """A call that waits for a probe of somebody else's is no call that was not made."""
    for _ in range(2):
        breaker.allow().settle(classify(ConnectionError()))
    world.now += 10.0
    probe = breaker.allow()
    assert probe is not None

    def body() -> None:
        raise ConnectionError

    breaker.disable()
    breaker.reset()
    with pytest.raises(ConnectionError):
        _function(body, breaker=breaker, retry=periscope.Retry(attempts=3, deadline=30.0))()
    assert breaker.view().rejections == 0


def test_the_users_predicate_is_asked_once_an_attempt(captured_telemetry):
    """`on=` may be costly, or answer differently each time."""
    asked = []

    def on(error: BaseException) -> bool:
        asked.append(error)
        return True

    with pytest.raises(ConnectionError):
        _function(Flaky(9), breaker="x", retry=periscope.Retry(attempts=3, on=on))()
    assert len(asked) == 3


def test_own_errors_between_attempts_do_not_replace_the_users(
    breaker, monkeypatch, captured_telemetry
):
    """Where the breaker itself fails, the next attempt is made without it."""
    guard.set_strict(False)
    flaky = Flaky(1)
    call = _function(flaky, breaker=breaker, retry=periscope.Retry())
    allow = periscope.Breaker.allow

    def failing_later(self: periscope.Breaker, **options: Any) -> object:
        return 1 / 0 if options else allow(self)

    monkeypatch.setattr(periscope.Breaker, "allow", failing_later)
    assert call() == "done"


def test_items_that_were_spilt_before_do_not_stand_for_the_payload(captured_telemetry):
    """Where the last attempt fails without an item of its own, the payload is the letter."""
    attempts = iter([1500, 0])

    @periscope.monitored("store", dead_letter="items", retry=periscope.Retry(attempts=2))
    def store(rows: str) -> None:
        for number in range(next(attempts)):
            periscope.current_operation().failed({"row": number}, ValueError())
        raise ConnectionError

    with pytest.raises(ConnectionError):
        store("all")
    assert [one for one in captured_telemetry.letters if one.item_index is None]
