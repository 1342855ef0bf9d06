"""Each `with breaker` block settles its own permit, wherever and in whatever order blocks end."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Self

import pytest

from periscope_otel.resilience import blocks
from periscope_otel.resilience.breaker import Breaker
from periscope_otel.resilience.guards import GUARDED, guarding

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator

    from periscope_otel.resilience.circuit import Permit


@pytest.fixture
def breaker() -> Breaker:
    return Breaker("feed.example")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Whatever a test does, no block is remembered once it has ended."""
    yield
    gc.collect()
    assert not blocks._by_place


def elsewhere(function: Callable[[], object]) -> None:
    """Call it in a thread, whose context knows of no block."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def outcomes(breaker: Breaker) -> tuple[int, dict[str, int]]:
    view = breaker.view()
    return view.in_flight, {name: number for name, number in view.outcomes.items() if number}


def guarded_rows(breaker: Breaker, permits: list[Permit]) -> Generator[int, None, None]:
    with breaker as permit:
        permits.append(permit)
        yield 1
        yield 2


def test_blocks_may_end_in_any_order(breaker):
    """As those of generators do that are run by turns."""
    second = Breaker("second.example")
    one, two = breaker.__enter__(), second.__enter__()
    breaker.__exit__(None, None, None)
    assert (one.outcome, two.outcome, guarding()) == ("success", None, ("second.example",))
    second.__exit__(ConnectionError, ConnectionError(), None)
    assert (two.outcome, guarding()) == ("failure", ())


def test_a_block_that_ends_in_another_context_settles_its_permit(breaker):
    """A generator may be finished by somebody else, who is in a block of the same breaker."""
    permits: list[Permit] = []

    def rows() -> Iterator[int]:
        with breaker as permit:
            permits.append(permit)
            yield 1
            raise KeyError

    iterator = rows()
    contextvars.copy_context().run(next, iterator)
    with breaker as own:
        with pytest.raises(KeyError):
            next(iterator)
        assert (permits[0].outcome, own.outcome) == ("ignored", None)
    assert own.outcome == "success"


def test_a_generator_that_is_collected_in_another_thread_settles_its_permit(breaker):
    """A collection runs in whichever thread allocates."""
    permits: list[Permit] = []
    own: list[object] = []
    own.append(guarded_rows(breaker, permits))
    next(own[0])
    own.append(own)
    del own
    elsewhere(gc.collect)
    assert permits[0].outcome == "ignored"
    assert outcomes(breaker) == (0, {"ignored": 1})


def test_blocks_of_generators_in_one_context_are_not_mixed_up(breaker):
    """Each ends with its own outcome, also where the one that began first ends first."""
    permits: list[Permit] = []
    # In one context the second would stand in the block of the first, and count once with it.
    first = guarded_rows(breaker, permits)
    second = contextvars.copy_context().run(_begun, guarded_rows(breaker, permits))
    next(first)
    with pytest.raises(ConnectionError):
        first.throw(ConnectionError())
    assert [one.outcome for one in permits] == [None, "failure"]
    assert list(second) == [2]
    assert [one.outcome for one in permits] == ["success", "failure"]


def _begun(rows: Generator[int, None, None]) -> Generator[int, None, None]:
    next(rows)
    return rows


async def test_an_async_generator_that_another_task_closes_settles_its_permit(breaker):
    """As an event loop does with those that nobody has finished."""

    async def rows() -> AsyncIterator[int]:
        async with breaker:
            yield 1

    async def first() -> int:
        return await anext(iterator)

    iterator = rows()
    assert await asyncio.create_task(first()) == 1

    async def close() -> None:
        await iterator.aclose()

    await asyncio.create_task(close(), context=contextvars.Context())
    assert outcomes(breaker) == (0, {"ignored": 1})


def test_an_exit_stack_settles_its_permits(breaker):
    """The last one first, as it leaves blocks."""
    second = Breaker("second.example")
    stack = ExitStack()
    stack.enter_context(breaker)
    stack.enter_context(second)
    with pytest.raises(ConnectionError), stack:
        raise ConnectionError
    assert outcomes(breaker) == outcomes(second) == (0, {"failure": 1})
    assert guarding() == ()


def test_an_exit_stack_that_is_left_elsewhere_settles_its_own(breaker):
    """Not that of the block which its thread is in."""
    stack = ExitStack()
    permit = contextvars.copy_context().run(stack.enter_context, breaker)

    def leave() -> None:
        with breaker:
            stack.close()
            assert permit.outcome == "success"

    elsewhere(leave)
    assert outcomes(breaker) == (0, {"success": 2})


async def test_an_async_exit_stack_settles_its_permits(breaker):
    """With `async with` too."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(breaker)
        assert outcomes(breaker) == (1, {})
    assert outcomes(breaker) == (0, {"success": 1})


class Client:
    """A context manager that has a breaker's block for its own."""

    def __init__(self, breaker: Breaker) -> None:
        self.breaker = breaker

    def __enter__(self) -> Permit:
        return self.breaker.__enter__()

    def __exit__(self, *raised: object) -> None:
        self.breaker.__exit__(*raised)


def test_a_block_in_a_manager_of_ones_own_settles_its_permit(breaker):
    """It is entered in one method and left in another; also in another thread."""
    with Client(breaker) as permit:
        pass
    assert permit.outcome == "success"
    client = Client(breaker)
    permit = client.__enter__()
    elsewhere(lambda: client.__exit__(None, None, None))
    assert permit.outcome == "success"
    assert outcomes(breaker) == (0, {"success": 2})
    GUARDED.set(())


class AsyncClient:
    """The same for `async with`; its frames are of one size, and take each other's place."""

    def __init__(self, breaker: Breaker) -> None:
        self.breaker = breaker

    async def __aenter__(self) -> Self:
        _a, _b, _c, _d, _e = range(5)
        self.permit = await self.breaker.__aenter__()
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.breaker.__aexit__(*raised)


async def test_tasks_with_managers_of_ones_own_settle_their_own_permits(breaker):
    """Though the frame that entered is gone, and its memory another task's."""
    ended: list[str | None] = []

    async def work(number: int) -> None:
        async with AsyncClient(breaker) as client:
            await asyncio.sleep(0.001 * (number * 7 % 13))
        ended.append(client.permit.outcome)
        assert guarding() == ()

    await asyncio.gather(*(work(number) for number in range(100)))
    assert ended == ["success"] * 100
    assert outcomes(breaker) == (0, {"success": 100})


def test_where_nobody_can_tell_which_block_ends_none_does(breaker):
    """Of two exit stacks that others have entered, neither is taken for the other."""
    stacks = [ExitStack(), ExitStack()]
    permits = [contextvars.copy_context().run(one.enter_context, breaker) for one in stacks]
    elsewhere(stacks[0].close)
    assert [one.outcome for one in permits] == [None, None]
    blocks._by_place.clear()


def test_a_permit_that_is_settled_in_its_block_is_left_alone(breaker):
    """What was said first counts, and blocks around it are not disturbed."""
    second = Breaker("second.example")
    with second as around:
        with breaker as permit:
            permit.settle()
            with pytest.raises(KeyError), second:
                raise KeyError
            assert around.outcome is None
        with pytest.raises(ConnectionError), breaker:
            raise ConnectionError
    assert (permit.outcome, around.outcome) == ("success", "success")
    assert outcomes(breaker) == (0, {"success": 1, "failure": 1})


def test_an_end_without_a_beginning_is_nothing(breaker):
    """It settles nobody's permit."""
    breaker.__exit__(None, None, None)
    assert outcomes(breaker) == (0, {})


def test_blocks_that_end_elsewhere_leave_no_trace_in_their_context(breaker):
    """A thread that makes generators for others does not remember them all."""
    for _ in range(50):
        rows = guarded_rows(breaker, [])
        next(rows)
        elsewhere(rows.close)
    assert len(GUARDED.get()) + len(blocks._entered.get()) <= 2
    assert outcomes(breaker) == (0, {"ignored": 50})
