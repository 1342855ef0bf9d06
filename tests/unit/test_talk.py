"""The contracts of a question that is under way, without a Redis."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from periscope_otel.resilience.breaker import Breaker
from periscope_otel.resilience.sharing import talk as module
from periscope_otel.resilience.sharing.inbox import Inbox
from periscope_otel.resilience.sharing.talk import Talk
from periscope_otel.resilience.transition import Grant

LASTS = 60.0


class Clock:
    """Seconds that pass when they are told to: a busy machine takes longer than answers may."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


@pytest.fixture
def breaker() -> Breaker:
    return Breaker("talk.example")


@pytest.fixture
def talk(breaker) -> Talk:
    return Talk(breaker)


def test_one_question_is_under_way_at_a_time(talk):
    """The second caller is told at once that others probe."""
    asked, question = talk.ask()
    assert asked is question is not None
    other, none = talk.ask()
    assert none is None
    assert other.wait(0.0) == Grant(None)


def test_a_question_that_nobody_answers_keeps_nobody_back(talk, clock):
    """After a while others decide alone."""
    talk.ask()
    clock.now += module.UNANSWERED
    assert talk.ask() == (None, None)


def test_a_granted_lease_is_the_askers(talk):
    """Whoever waits has it, once."""
    asked, question = talk.ask()
    threading.Timer(0.02, talk.answer, (question, Grant("a"), LASTS)).start()
    assert asked.wait(60.0) == Grant("a")
    assert asked.wait(0.0) == Grant(None)


def test_no_answer_in_time_is_none(talk):
    """The caller decides by itself then."""
    asked, _ = talk.ask()
    assert asked.wait(0.01) is None


def test_no_answer_at_all_is_none_at_once(talk):
    """Where the question could not be put nobody waits on."""
    asked, question = talk.ask()
    talk.answer(question, None)
    began = time.monotonic()
    assert asked.wait(60.0) is None
    assert time.monotonic() - began < 30.0


def test_a_late_lease_is_the_next_callers(talk):
    """It stays in hand, and is used once."""
    asked, question = talk.ask()
    assert asked.wait(0.0) is None
    talk.answer(question, Grant("late"), LASTS)
    following, none = talk.ask()
    assert none is None
    assert following.wait(0.0) == Grant("late")
    assert talk.ask()[1] is not None


def test_a_denial_holds_for_a_moment_unless_there_is_news(talk, clock):
    """Nobody asks again at once; something told of the breaker ends it."""
    _, question = talk.ask()
    talk.answer(question, Grant(None, 1.0))
    assert talk.ask()[1] is None
    talk.news(moved=False)
    _, question = talk.ask()
    assert question is not None
    talk.answer(question, Grant(None, 1.0))
    assert talk.ask()[1] is None
    clock.now += module.DENIED
    assert talk.ask()[1] is not None


def test_a_new_generation_ends_a_lease_in_hand(talk):
    """It is gone in the Redis as well."""
    _, question = talk.ask()
    talk.answer(question, Grant("old"), LASTS)
    talk.news(moved=True)
    assert talk.ask()[1] is not None


def test_a_lease_in_hand_goes_back_after_a_while(talk, clock):
    """Never later than half of its time."""
    _, question = talk.ask()
    talk.answer(question, Grant("a"), 0.5)
    now = clock.now
    assert talk.unused(now, waits=True) is None
    assert talk.goes_back_at <= now + 0.25
    assert talk.unused(now + 0.3, waits=True) == "a"
    assert talk.goes_back_at is None


@pytest.mark.parametrize("waits", [True, False])
def test_rare_callers_that_do_not_wait_decide_alone(talk, clock, waits):
    """After a lease that came in vain, and until something new is told."""
    _, question = talk.ask()
    talk.answer(question, Grant("a"), LASTS)
    talk.unused(clock.now + 10, waits=waits)
    asked, question = talk.ask()
    assert (asked is None) == (not waits)
    talk.news(moved=True)
    if not waits:
        assert talk.ask()[1] is not None


async def test_a_coroutine_has_the_answer_too(talk):
    """From whichever thread it comes."""
    asked, question = talk.ask()
    threading.Timer(0.02, talk.answer, (question, Grant("a"), LASTS)).start()
    assert await asked.wait_async(60.0) == Grant("a")


async def test_an_answer_before_the_coroutine_waits_is_no_wait(talk):
    """Nothing is lost between the question and the `await`."""
    asked, question = talk.ask()
    talk.answer(question, Grant("a"), LASTS)
    assert await asked.wait_async(60.0) == Grant("a")


async def test_a_coroutine_waits_no_longer_than_it_may(talk):
    """None after that time."""
    asked, _ = talk.ask()
    assert await asyncio.wait_for(asked.wait_async(0.02), 30) is None


async def test_a_cancelled_coroutine_leaves_the_lease_in_hand(talk):
    """Even where the answer came just before the cancellation."""
    asked, question = talk.ask()
    waiting = asyncio.create_task(asked.wait_async(60.0))
    await asyncio.sleep(0)
    talk.answer(question, Grant("a"), LASTS)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await talk.ask()[0].wait_async(0.0) == Grant("a")


def test_a_loop_that_has_ended_is_no_error(talk):
    """The answer to its question is in hand."""
    asked, question = talk.ask()

    async def begin() -> None:
        task = asyncio.create_task(asked.wait_async(60.0))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(begin())
    talk.answer(question, Grant("a"), LASTS)
    assert talk.ask()[0].wait(0.0) == Grant("a")


def test_another_librarys_loop_waits_for_nothing(talk):
    """Where asyncio does not run, only an answer that is there already counts."""
    asked, _ = talk.ask()
    coroutine = asked.wait_async(5.0)
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    assert ended.value.value is None


def test_many_threads_take_one_lease_once(talk):
    """Of all that ask as it lies in hand one has it."""
    _, question = talk.ask()
    talk.answer(question, Grant("a"), LASTS)
    taken: list[Grant | None] = []
    barrier = threading.Barrier(20)

    def take() -> None:
        barrier.wait()
        asked, _ = talk.ask()
        taken.append(asked.wait(0.0))

    threads = [threading.Thread(target=take) for _ in range(20)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert taken.count(Grant("a")) == 1


def test_a_child_of_a_fork_has_nothing_under_way(talk):
    """What was asked and granted is the parent's."""
    _, question = talk.ask()
    talk.answer(question, Grant("a"), LASTS)
    talk.after_fork()
    assert talk.ask()[1] is not None


# --- the inbox -----------------------------------------------------------------------------------


@pytest.fixture
def inbox():
    made: Inbox[int] = Inbox()
    yield made
    made.close()


def test_what_is_put_ends_the_wait(inbox):
    """And comes out in order."""
    threading.Timer(0.02, lambda: [inbox.put(n) for n in range(3)]).start()
    inbox.wait(60.0)
    while len(inbox) < 3:
        time.sleep(0.001)
    assert [inbox.take() for _ in range(4)] == [0, 1, 2, None]


def test_the_other_socket_ends_the_wait_too(inbox):
    """Whichever comes first."""
    one, other = socket.socketpair()
    with one, other:
        other.send(b"x")
        began = time.monotonic()
        inbox.wait(60.0, one)
        assert time.monotonic() - began < 30.0


def test_putting_never_blocks(inbox):
    """Not even where nobody takes anything for long."""
    for n in range(100_000):
        inbox.put(n)
    assert len(inbox) == 100_000


def test_what_is_put_after_the_end_is_no_error():
    """A call that settles as the process ends must not fail by it."""
    inbox: Inbox[int] = Inbox()
    inbox.close()
    inbox.put(1)
    assert inbox.take() == 1
