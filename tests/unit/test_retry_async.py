"""The contracts of retries of coroutines, async generators and `async for` loops."""

from __future__ import annotations

import asyncio
import gc
import inspect
import time
import weakref

import pytest
from retry_world import Answer, Says, Script, StatusError, World, waits_long

from periscope_otel.resilience import pausing, retry
from periscope_otel.resilience.breaker import Breaker
from periscope_otel.resilience.errors import CircuitOpenError
from periscope_otel.resilience.retry import Retry


@pytest.fixture
def world(monkeypatch):
    """Return a world in which waiting takes no time."""
    world = World()
    world.install(monkeypatch)
    return world


@pytest.fixture(autouse=True)
def retries_go_on():
    yield
    retry.set_active(True)
    retry.resumed()


def coroutine_of(script):
    async def coroutine(*args):
        await asyncio.sleep(0)
        return script(*args)

    return coroutine


# --- coroutine functions -------------------------------------------------------------------------


async def test_a_coroutine_function_is_retried(world):
    """As a function is, and it stays one."""
    script = Script(ConnectionError(), StatusError(503), "done")
    fetch = Retry()(coroutine_of(script))
    assert inspect.iscoroutinefunction(fetch)
    assert await fetch() == "done"
    assert world.waits == [0.5, 1.0]


async def test_a_coroutines_last_exception_is_raised_as_it_is(world):
    """Nothing is chained to it."""
    errors = [ConnectionError(str(n)) for n in range(3)]
    with pytest.raises(ConnectionError) as raised:
        await Retry()(coroutine_of(Script(*errors)))()
    assert raised.value is errors[2]
    assert raised.value.__context__ is None


async def test_what_a_coroutine_returns_can_mean_failure(world):
    """The last value is returned."""
    policy = Retry(result=lambda answer: answer.status_code == 503)
    assert (await policy(coroutine_of(Script(Answer(503), Answer(200))))()).status_code == 200
    script = Script(Answer(503))
    assert (await policy(coroutine_of(script))()).status_code == 503
    assert script.calls == 3


async def test_async_callable_objects_are_retried(world):
    """Methods and objects whose `__call__` is a coroutine function."""
    script = Script(ConnectionError(), "done", ConnectionError(), "done")

    class Client:
        async def __call__(self):
            return script()

        @Retry()
        async def method(self):
            return script()

    assert await Retry()(Client())() == "done"
    assert await Client().method() == "done"


async def test_a_cancellation_is_not_retried(world):
    """Nor one that a function raises by itself."""
    script = Script(asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        await Retry(on=lambda _: True)(coroutine_of(script))()
    assert script.calls == 1


async def test_a_timeout_inside_an_attempt_is_retried(world):
    """It is the attempt's, not the caller's."""
    calls = []

    @Retry()
    async def fetch():
        calls.append(1)
        async with asyncio.timeout(0.01 if len(calls) == 1 else 60):
            await asyncio.sleep(0 if len(calls) > 1 else 3600)
        return "done"

    assert await fetch() == "done"
    assert len(calls) == 2


async def test_cancelling_a_wait_leaves_nothing_behind():
    """No task, no timer, no further attempt, and nothing that the call has used."""

    class Payload:
        pass

    waiting = asyncio.Event()
    error, long = waits_long()
    script = Script(error)

    async def fetch(payload):
        return script(payload)

    call = Retry(on_retry=lambda _: waiting.set(), **long)(fetch)
    payload = Payload()
    gone = weakref.ref(payload)
    task = asyncio.create_task(call(payload))
    del payload
    await asyncio.wait_for(waiting.wait(), 30)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})  # an `await task` would keep the cancellation's frames
    assert task.cancelled()
    del task
    error.__traceback__ = None  # the test holds the exception
    gc.collect()
    assert gone() is None
    assert script.calls == 1
    assert asyncio.all_tasks() == {asyncio.current_task()}
    timers = [one for one in asyncio.get_running_loop()._scheduled if not one.cancelled()]
    assert timers == []


async def test_an_outer_timeout_ends_a_wait():
    """In time."""
    started = time.monotonic()
    error, long = waits_long()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await Retry(**long)(coroutine_of(Script(error)))()
    assert time.monotonic() - started < 30


async def test_a_waiting_coroutine_does_not_hold_the_loop_up():
    """Others run on."""
    done = asyncio.Event()
    waiting = asyncio.Event()
    error, long = waits_long()
    call = Retry(on_retry=lambda _: waiting.set(), **long)(coroutine_of(Script(error)))
    task = asyncio.create_task(call())
    await asyncio.wait_for(waiting.wait(), 30)
    asyncio.get_running_loop().call_later(0.01, done.set)
    await asyncio.wait_for(done.wait(), 30)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_shutdown_ends_a_coroutines_wait():
    """With the last error, soon."""
    waiting = asyncio.Event()
    error, long = waits_long()
    policy = Retry(on_retry=lambda _: waiting.set(), **long)
    task = asyncio.create_task(policy(coroutine_of(Script(error)))())
    await asyncio.wait_for(waiting.wait(), 30)
    retry.shutting_down()
    with pytest.raises(Says) as raised:
        await asyncio.wait_for(task, 30)
    assert raised.value is error


# --- breakers ------------------------------------------------------------------------------------


async def test_a_breaker_is_waited_for_without_holding_the_loop_up(world):
    """`again_async` takes the probe's permit."""
    world.draw = 0.0
    breaker = Breaker(
        "host", clock=world.clock, rng=lambda: 0.5, consecutive_failures=1, lease=1000.0
    )
    policy = Retry()
    error = ConnectionError()
    (await breaker.acquire_async()).settle(failure := breaker.failure_of(error))
    retrying = policy.begin(policy.start("host"), "host", breaker=breaker)
    wait = retrying.after(failure, error)
    assert wait == pytest.approx(30.0)
    assert await retrying.again_async(wait)
    assert retrying.permit is not None
    assert breaker.state == "half_open"
    other = policy.begin(0.0, "host", breaker=breaker)
    other.after(failure, error)
    world.now = 119.5
    assert not await other.again_async(0.0)
    assert other.why == "breaker"


async def test_a_rejection_inside_does_not_replace_the_error_of_a_coroutine(world):
    """The error before it is what the caller gets."""
    breaker = Breaker("host", clock=world.clock, rng=lambda: 0.5, consecutive_failures=1)
    error = ConnectionError()

    @Retry(deadline=20.0)
    async def fetch():
        async with breaker:
            raise error

    with pytest.raises(ConnectionError) as raised:
        await fetch()
    assert raised.value is error
    with pytest.raises(CircuitOpenError):
        await fetch()


# --- async generators ----------------------------------------------------------------------------


async def test_an_async_generator_is_retried_until_its_first_item(world):
    """And not after it."""
    script = Script(ConnectionError(), "first")

    @Retry()
    async def rows():
        yield script()
        raise ConnectionError

    assert inspect.isasyncgenfunction(rows)
    generator = rows()
    assert await anext(generator) == "first"
    with pytest.raises(ConnectionError):
        await anext(generator)
    assert script.calls == 2


async def test_an_async_generators_conversation_passes_through(world):
    """Sent values, thrown exceptions and a close."""
    heard = []

    @Retry()
    async def talks():
        try:
            heard.append((yield 1))
            try:
                yield 2
            except KeyError as error:
                heard.append(error.args[0])
            yield 3
        finally:
            heard.append("closed")

    generator = talks()
    assert await anext(generator) == 1
    assert await generator.asend("sent") == 2
    assert await generator.athrow(KeyError("thrown")) == 3
    with pytest.raises(StopAsyncIteration):
        await anext(generator)
    assert heard == ["sent", "thrown", "closed"]
    generator = talks()
    await anext(generator)
    await generator.aclose()
    assert heard[3:] == ["closed"]


async def test_an_async_generator_without_items_just_ends(world):
    """That is no failure."""

    @Retry()
    async def empty():
        for row in ():
            yield row

    assert [row async for row in empty()] == []


def test_an_async_generator_left_open_is_closed_by_its_loop():
    """Once: the loop does not know the one inside."""
    heard = []

    @Retry()
    async def rows():
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            heard.append("closed")

    async def main():
        generator = rows()
        await anext(generator)
        heard.append(generator)

    asyncio.run(main())
    assert heard[1:] == ["closed"]


# --- loops ---------------------------------------------------------------------------------------


async def test_an_async_loop_retries_its_block(world):
    """Until one succeeds."""
    script = Script(ConnectionError(), ConnectionError(), "done")
    numbers = []
    async for attempt in Retry():
        with attempt:
            numbers.append(attempt.number)
            value = await coroutine_of(script)()
    assert (value, numbers, world.waits) == ("done", [1, 2, 3], [0.5, 1.0])


async def test_an_async_loop_raises_the_last_exception(world):
    """As it is."""
    errors = [ConnectionError(str(n)) for n in range(3)]
    script = Script(*errors)

    async def fetch():
        async for attempt in Retry():
            with attempt:
                script()

    with pytest.raises(ConnectionError) as raised:
        await fetch()
    assert raised.value is errors[2]
    assert raised.value.__context__ is None


async def test_concurrent_loops_may_share_a_policy(world):
    """Each counts its own attempts, however they interleave."""
    policy = Retry(attempts=5, base=0, budget=False)

    async def work(failures):
        numbers = []
        async for attempt in policy:
            with attempt:
                await asyncio.sleep(0)
                numbers.append(attempt.number)
                if attempt.number <= failures:
                    raise ConnectionError
        return numbers

    found = await asyncio.gather(*(work(n % 5) for n in range(50)))
    assert found == [list(range(1, n % 5 + 2)) for n in range(50)]


async def test_cancelling_an_async_loop_ends_it():
    """While it waits."""
    waiting = asyncio.Event()
    attempts = []
    error, long = waits_long()

    async def work():
        async for attempt in Retry(on_retry=lambda _: waiting.set(), **long):
            with attempt:
                attempts.append(1)
                raise error

    task = asyncio.create_task(work())
    await asyncio.wait_for(waiting.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert attempts == [1]


async def test_a_shutdown_ends_an_async_loop_with_its_last_error(world):
    """Out of the `async for` statement."""
    error = ConnectionError()

    async def work():
        async for attempt in Retry(on_retry=lambda _: retry.shutting_down()):
            with attempt:
                raise error

    with pytest.raises(ConnectionError) as raised:
        await work()
    assert raised.value is error


async def test_an_attempt_of_an_async_loop_that_is_not_entered_is_told_of(world):
    """Otherwise nothing would be retried."""
    with pytest.raises(RuntimeError, match="with attempt"):
        async for _attempt in Retry():
            pass


async def test_a_long_wait_sleeps_in_short_pieces(world, monkeypatch):
    """So that a shutdown is seen soon."""
    monkeypatch.setattr(pausing, "LONGEST_SLEEP", 0.5)
    assert await retry.pause_async(1.25)
    assert world.waits == [0.5, 0.5, 0.25]
