"""The contracts of `@monitored` on async generators: forwarding, context, time, endings."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import logging
import subprocess
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from test_monitored_generators import (
    ACTIONS,
    CONSUMER,
    DURATION,
    STUBBORN,
    THROWN,
    Clock,
    lock_taker,
    own_seconds,
    programs,
    where,
)

import periscope_otel as periscope
from periscope_otel.telemetry.worker import worker
from periscope_otel.testing import capture_telemetry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

__all__ = ["lock_taker"]  # the fixture

ACTIVE = "threat.ingest.operation.active"


@types.coroutine
def one_wait() -> Iterator[None]:
    """Wait for the event loop once; here the test itself plays the event loop."""
    yield


async def turns(number: int = 10) -> None:
    """Let the event loop go round."""
    for _ in range(number):
        await asyncio.sleep(0)


@periscope.monitored("acount")
async def acount(number: int = 3) -> AsyncIterator[int]:
    for one in range(number):
        yield one


def noise(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what OpenTelemetry, asyncio and the plugin have complained about."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and "two functions" not in record.getMessage()
    ]


# --- forwarding: the same as the undecorated twin ------------------------------------------------


async def scripted(  # noqa: C901
    script: list[str], log: list[Any], waits: bool
) -> AsyncIterator[int]:
    """Yield once for each action; the action is what happens at that yield."""
    log.append("begun")
    for number, action in enumerate(script):
        try:
            await one_wait()
            log.append((yield number))
        except GeneratorExit:
            log.append("exit")
            if waits:
                await one_wait()
            if action == "exit raises":
                raise OSError(number) from None
            if action == "return":
                return
            if action != "ignore all":
                raise
        except BaseException as error:
            log.append(repr(error))
            if action == "replace":
                raise LookupError(number) from error
            if action == "return":
                return
            if action not in {"swallow", "ignore all"}:
                raise
        if action == "raise":
            raise LookupError(number)
        if action == "raise stop":
            raise StopAsyncIteration(number)


def drive(awaitable: Any, cancel: bool = False) -> Any:
    """Run an awaitable to its end as an event loop would; cancel it at its first wait if told."""
    steps = awaitable.__await__()
    try:
        steps.send(None)
        if cancel:
            steps.throw(asyncio.CancelledError())
        while True:
            steps.send(None)
    except StopIteration as stop:
        return stop.value


def run_command(generator: Any, command: str, value: Any) -> tuple[Any, ...]:
    """Do one thing to an async generator; return all that can be told of how it went."""
    try:
        if command == "close":
            return ("closed", drive(generator.aclose()))
        if command == "throw":
            return ("yielded", drive(generator.athrow(value(command))))
        return ("yielded", drive(generator.asend(value), cancel=value == "cancel"))
    except BaseException as error:
        return (repr(error), type(error.__cause__), error.__suppress_context__)


def run_program(generator: Any, program: list[tuple[str, Any]]) -> list[Any]:
    """Run a program and then close until the generator is at its end."""
    before = where()
    results: list[Any] = []
    for command, value in [*program, *[("close", None)] * 12]:
        results.append(run_command(generator, command, value))
        results.append((generator.ag_frame is None, generator.ag_running))
    assert where() == before
    return results


def assert_like_its_twin(
    script: list[str], program: list[tuple[str, Any]], stubborn: bool = False
) -> None:
    """Run decorated and undecorated, with and without telemetry; compare everything."""
    before = where()
    decorated = periscope.monitored("ascripted")(scripted)
    waits = not stubborn  # what is refused its close is finalised where nothing can wait
    expected_log: list[Any] = []
    expected = run_program(scripted(script, expected_log, waits), program)
    log: list[Any] = []
    assert run_program(decorated(script, log, waits), program) == expected
    assert log == expected_log
    with capture_telemetry() as captured:
        log = []
        assert run_program(decorated(script, log, waits), program) == expected
        assert log == expected_log
        if stubborn:
            gc.collect()
        assert len(captured.operations("ascripted")) == ("begun" in log)
        assert captured.metric(ACTIVE) == 0
    assert where() == before


def aprograms(thrown: list[type[BaseException]]) -> st.SearchStrategy[list[tuple[str, Any]]]:
    """Return the programs for generators, as such for async generators, some steps cancelled."""
    names = {"send": "asend", "throw": "throw", "close": "close"}
    return st.tuples(programs(thrown), st.sets(st.integers(0, 8), max_size=2)).map(
        lambda both: [
            (names[command], "cancel" if at in both[1] and value == 1 else value)
            for at, (command, value) in enumerate(both[0])
        ]
    )


@settings(deadline=None)
@given(st.lists(st.sampled_from(ACTIONS), max_size=5), aprograms(THROWN))
@example(["return"], [("asend", None), ("close", None), ("asend", None)])
@example(["swallow"] * 2, [("asend", None), ("asend", "cancel"), ("asend", None)])
@example(["raise stop"], [("asend", None), ("asend", None)])
@example([], [("asend", 1), ("asend", None)])
def test_any_program_goes_as_with_the_twin(script, program):
    """Any sequence of asend, athrow, aclose and cancellation goes as it does undecorated."""
    assert_like_its_twin(script, program)


@settings(deadline=None)
@given(st.lists(st.sampled_from(ACTIONS), max_size=5), aprograms([GeneratorExit, ValueError]))
@example(["return"], [("asend", None), ("throw", GeneratorExit)])
def test_a_thrown_generator_exit_goes_as_with_the_twin(script, program):
    """GeneratorExit that is thrown in, rather than by aclose, reaches the body like any other."""
    assert_like_its_twin(script, program)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as undecorated
@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(STUBBORN), max_size=5), aprograms([*THROWN, GeneratorExit]))
@example(["ignore all"] * 2, [("asend", None), ("close", None), ("asend", 1)])
@example(["ignore all"] * 2, [("asend", None), ("throw", GeneratorExit), ("asend", 1)])
def test_a_body_that_ignores_its_exit_goes_as_with_the_twin(script, program):
    """A body that yields when it is closed is refused as it is undecorated."""
    assert_like_its_twin(script, program, stubborn=True)


async def test_a_thrown_exception_is_the_very_same(captured_telemetry):
    """What the consumer throws arrives in the body as the same object, and leaves as it."""
    seen: list[BaseException] = []

    @periscope.monitored("asession")
    async def session():
        try:
            yield
        except ValueError as error:
            seen.append(error)
            raise

    generator, error = session(), ValueError("bad")
    await anext(generator)
    with pytest.raises(ValueError, match="bad") as raised:
        await generator.athrow(error)
    assert seen == [error]
    assert raised.value is error
    assert captured_telemetry.operation("asession").error_type == "ValueError"


async def test_two_steps_at_once_are_refused(captured_telemetry):
    """A second step while one waits is the same RuntimeError as undecorated, and harms nothing."""
    gate = asyncio.Event()

    @periscope.monitored("gated")
    async def gated():
        await gate.wait()
        yield 1

    generator = gated()
    first = asyncio.ensure_future(anext(generator))
    await turns(1)
    with pytest.raises(RuntimeError, match="already running"):
        await anext(generator)
    gate.set()
    assert await first == 1
    assert [one async for one in generator] == []
    assert captured_telemetry.operation("gated").outcome == "ok"


@pytest.mark.parametrize("error", [None, KeyError("id")], ids=["ok", "error"])
async def test_as_a_context_manager(error, captured_telemetry):
    """`contextlib.asynccontextmanager` over a decorated one works and sees its exceptions."""

    @contextlib.asynccontextmanager
    @periscope.monitored("asession")
    async def session():
        yield "connection"

    with contextlib.suppress(KeyError):
        async with session() as connection:
            assert connection == "connection"
            if error:
                raise error
    assert captured_telemetry.operation("asession").outcome == ("error" if error else "ok")


# --- context -------------------------------------------------------------------------------------


async def test_attached_only_while_the_body_runs(captured_telemetry):
    """In the body, also after it waited, the operation is current; in the consumer's loop not."""
    before = where()

    @periscope.monitored("aparse", feed="misp")
    async def parse():
        for number in range(3):
            await asyncio.sleep(0)
            assert periscope.current_operation().name == "aparse"
            with periscope.operation("body"):
                await asyncio.sleep(0)
            yield number

    async for _ in parse():
        assert where() == before
        assert not trace.get_current_span().get_span_context().is_valid
        async with periscope.operation("consume"):
            await asyncio.sleep(0)
    assert where() == before
    parsed = captured_telemetry.operation("aparse")
    assert all(one.is_child_of(parsed) for one in captured_telemetry.operations("body"))
    consumed = captured_telemetry.operations("consume")
    assert [(one.span.parent, one.feed) for one in consumed] == [(None, None)] * 3


async def test_child_of_where_it_is_first_iterated(captured_telemetry):
    """The generator's operation belongs to the one that iterates it, and inherits its feed."""
    made = acount(1)
    async with periscope.operation("outer", feed="otx"):
        assert [one async for one in made] == [0]
    counted = captured_telemetry.operation("acount")
    assert counted.is_child_of(captured_telemetry.operation("outer"))
    assert counted.feed == "otx"


async def test_what_the_body_made_current_is_so_after_a_yield(captured_telemetry):
    """An operation that the body holds open across a yield is the current one after it too."""

    @periscope.monitored("aparse")
    async def parse():
        async with periscope.operation("page"):
            yield 1
            assert periscope.current_operation().name == "page"
            with periscope.operation("row"):
                yield 2
        assert periscope.current_operation().name == "aparse"

    before = where()
    async for _ in parse():
        assert where() == before
    page = captured_telemetry.operation("page")
    assert page.is_child_of(captured_telemetry.operation("aparse"))
    assert captured_telemetry.operation("row").is_child_of(page)


async def test_steps_in_different_tasks(captured_telemetry, caplog):
    """Each step may run in another task: nothing leaks there, nothing is logged."""
    generator = acount(3)
    before = where()
    results = [await asyncio.create_task(anext(generator, None)) for _ in range(4)]
    assert results == [0, 1, 2, None]
    assert where() == before
    assert captured_telemetry.operation("acount").outcome == "ok"
    assert noise(caplog) == []


# --- never iterated, dropped, closed -------------------------------------------------------------


@pytest.mark.parametrize("end", ["drop", "close", "throw"])
async def test_never_iterated_leaves_nothing(end, captured_telemetry):
    """An async generator that is never iterated leaves no span, no count and no context."""
    before = where()
    generator = acount()
    if end == "close":
        await generator.aclose()
    elif end == "throw":
        with pytest.raises(KeyError):
            await generator.athrow(KeyError())
    del generator
    await turns()
    assert where() == before
    assert captured_telemetry.spans == []
    assert captured_telemetry.metric(DURATION) == 0
    assert captured_telemetry.metric(ACTIVE) == 0


alive: list[Any] = []


async def drop_last_reference(make: Callable[[], Any]) -> None:
    await anext(make())


async def drop_in_a_cycle(make: Callable[[], Any]) -> None:
    generator = make()
    await anext(generator)
    cycle = [generator]
    cycle.append(cycle)
    del generator, cycle
    gc.collect()


async def break_in_async_for(make: Callable[[], Any]) -> None:
    async for _ in make():
        break


async def close_early(make: Callable[[], Any]) -> None:
    async with contextlib.aclosing(make()) as generator:
        await anext(generator)
    await generator.aclose()


async def drop_in_another_task(make: Callable[[], Any]) -> None:
    box = [make()]
    await asyncio.create_task(anext(box[0]))

    async def drop() -> None:
        box.clear()

    await asyncio.create_task(drop())


async def consumer_cancelled(make: Callable[[], Any]) -> None:
    async def consume() -> None:
        async for _ in make():
            await asyncio.Event().wait()

    task = asyncio.create_task(consume())
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def alive_at_the_end_of_the_loop(make: Callable[[], Any]) -> None:
    alive.append(make())
    await anext(alive[0])


async def dropped_at_the_end_of_the_loop(make: Callable[[], Any]) -> None:
    task = asyncio.create_task(consumer_cancelled(make))
    await turns(2)
    del task


DROPS = [drop_last_reference, drop_in_a_cycle, break_in_async_for, close_early]
DROPS += [drop_in_another_task, consumer_cancelled]
DROPS += [alive_at_the_end_of_the_loop, dropped_at_the_end_of_the_loop]
every_drop = pytest.mark.parametrize("drop", DROPS, ids=lambda drop: drop.__name__)


def run_loop(drop: Callable[..., Any], make: Callable[[], Any]) -> None:
    async def main() -> None:
        await drop(make)
        if not drop.__name__.endswith("the_loop"):
            await turns()

    try:
        asyncio.run(main())
    finally:
        alive.clear()


@every_drop
def test_dropped_half_way_is_ok_once(drop, captured_telemetry, caplog):
    """Dropped, closed or alive at the loop's end it settles once, as ok, its body cleaned up."""
    done: list[str] = []

    @periscope.monitored("adropped")
    async def dropped():
        try:
            for number in range(3):
                yield number
        finally:
            await asyncio.sleep(0)
            done.append("closed")

    before = where()
    run_loop(drop, dropped)
    assert done == ["closed"]
    assert where() == before
    assert captured_telemetry.operation("adropped").outcome == "ok"
    assert captured_telemetry.operation("adropped").exceptions == []
    assert captured_telemetry.metric(DURATION) == 1
    assert captured_telemetry.metric(DURATION, outcome="ok") == 1
    assert captured_telemetry.metric(ACTIVE) == 0
    assert noise(caplog) == []


@every_drop
def test_the_finaliser_takes_no_lock_of_the_sdk(drop, lock_taker):
    """Dropped by a thread that is inside the SDK's lock it waits for nothing, and settles later."""
    gc.collect()
    with lock_taker.held():
        run_loop(drop, acount)
        assert lock_taker.ended == []
    assert worker.finish_posted(30)
    assert lock_taker.deadlocks == 0
    assert lock_taker.ended == ["ok"]


@pytest.mark.parametrize("cycle", [False, True], ids=["reference", "cycle"])
def test_dropped_without_an_event_loop(cycle, lock_taker, caplog):
    """Where no event loop finalises it, the interpreter does, as undecorated, without a lock."""
    gc.collect()
    with lock_taker.held():
        generator = acount()
        assert drive(anext(generator)) == 0
        box: list[Any] = [generator]
        if cycle:
            box.append(box)
        del generator, box
        gc.collect()
    assert worker.finish_posted(30)
    assert (lock_taker.deadlocks, lock_taker.ended) == (0, ["ok"])
    assert noise(caplog) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as undecorated
@pytest.mark.parametrize("captured", [False, True], ids=["no SDK", "SDK"])
def test_a_clean_up_that_waits_where_nothing_can_wait(captured):
    """Thrown away in the middle of its clean-up it leaves no context and is no longer active."""

    @periscope.monitored("awaste")
    async def waste():
        try:
            yield 1
        finally:
            await one_wait()

    def throw_away() -> None:
        before = where()
        with capture_telemetry() if captured else contextlib.nullcontext() as telemetry:
            generator = waste()
            drive(anext(generator))
            del generator
            gc.collect()
            assert where() == before
            if telemetry is not None:
                assert len(telemetry.operations("awaste")) == 1
                assert telemetry.metric(ACTIVE) == 0

    contextvars.copy_context().run(throw_away)


async def test_cancelled_while_the_body_waits(captured_telemetry, caplog):
    """A task cancelled while the body waits ends the operation as cancelled."""

    @periscope.monitored("apull")
    async def pull():
        yield 1
        await asyncio.Event().wait()

    async def consume() -> None:
        async for _ in pull():
            pass

    task = asyncio.create_task(consume())
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert captured_telemetry.operation("apull").outcome == "cancelled"
    assert captured_telemetry.operation("apull").exceptions == []
    assert captured_telemetry.metric(ACTIVE) == 0
    assert noise(caplog) == []


def test_a_step_dropped_while_the_body_waits(lock_taker):
    """A step that is dropped in the middle of a wait is cancelled, without a lock of the SDK."""

    @periscope.monitored("await")
    async def waiting():
        await one_wait()
        yield 1

    with lock_taker.held():
        generator = waiting()
        step = generator.__anext__().__await__()
        step.send(None)
        step.close()
        del step, generator
        gc.collect()
    assert worker.finish_posted(30)
    assert (lock_taker.deadlocks, lock_taker.ended) == (0, ["cancelled"])


def test_a_coroutine_dropped_while_it_waits(lock_taker):
    """A coroutine that is dropped in the middle of a wait is cancelled, without such a lock."""

    @periscope.monitored("acoroutine")
    async def waiting():
        await one_wait()

    with lock_taker.held():
        coroutine = waiting()
        coroutine.send(None)
        del coroutine
        gc.collect()
    assert worker.finish_posted(30)
    assert (lock_taker.deadlocks, lock_taker.ended) == (0, ["cancelled"])


def test_alive_at_the_end_of_the_interpreter():
    """A suspended async generator that lives until the interpreter ends makes no noise."""
    code = """if True:
        import asyncio
        import periscope_otel as periscope

        @periscope.monitored("acount")
        async def acount():
            yield 1

        generator = acount()

        async def main():
            await anext(generator)

        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- time, errors, memory ------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["exhausted", "closed", "dropped", "raised"])
async def test_duration_is_own_time(end):
    """The duration is the body's own time, waits included; the consumer's is an attribute."""
    clock = Clock()

    @periscope.monitored("aparse")
    async def parse():
        for number in range(3):
            await asyncio.sleep(0)
            clock.advance(1)
            yield number
        clock.advance(0.5)
        if end == "raised":
            raise ValueError("bad")

    with capture_telemetry(clock=clock) as captured:
        generator = parse()
        clock.advance(1000)  # before the first step there is no operation
        for number in range(2 if end in {"closed", "dropped"} else 3):
            assert await anext(generator) == number
            clock.advance(10)
        if end == "closed":
            await generator.aclose()
        elif end == "dropped":
            del generator
            await turns()
        else:
            with contextlib.suppress(ValueError):
                assert [one async for one in generator] == []
        early = end in {"closed", "dropped"}
        assert own_seconds(captured, "aparse") == (2 if early else 3.5)
        assert captured.operation("aparse").attributes[CONSUMER] == (20 if early else 30)


async def test_an_error_in_the_body_is_an_error(captured_telemetry):
    """An exception of the body ends the operation as an error, recorded once."""

    @periscope.monitored("aparse")
    async def parse():
        yield 1
        raise ValueError("bad")

    generator = parse()
    assert await anext(generator) == 1
    with pytest.raises(ValueError, match="bad"):
        await anext(generator)
    assert [one async for one in generator] == []
    operation = captured_telemetry.operation("aparse")
    assert (operation.outcome, operation.error_type) == ("error", "ValueError")
    assert len(operation.exceptions) == 1


@pytest.mark.parametrize(
    "parse", [inspect.unwrap(acount), acount], ids=["undecorated", "decorated"]
)
def test_an_exception_leaves_no_cycle(parse, captured_telemetry):
    """An exception thrown into an async generator is freed with its last reference, without gc."""

    class MarkedError(ValueError):
        pass

    generator = parse()
    drive(anext(generator))
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(MarkedError):
            drive(generator.athrow(MarkedError))  # an instance would hang in the awaitable
        # By its type: `isinstance` asks proxies, of which some that others made are dead.
        assert not any(type(one) is MarkedError for one in gc.get_objects())
    finally:
        gc.enable()
