"""What is under way between one breaker and the other processes: questions, and a lease in hand.

Callers ask and wait here, for `probe_wait` at most; the thread that talks to the Redis answers. An
answer that nobody waits for any more is not lost: a lease stays in hand for the next call that
asks, for a while.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple
from weakref import ref

from periscope_otel.resilience.transition import Grant

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future
    from collections.abc import Callable

    from periscope_otel.resilience.circuit import Circuit
    from periscope_otel.resilience.sharing.records import Record
    from periscope_otel.resilience.transition import Asked

HELD: Final = 3.0
"""Seconds for which a lease that nobody has waited for stays in hand."""
UNANSWERED: Final = 0.1
"""Seconds after which a question that has no answer keeps nobody else from deciding alone."""
DENIED: Final = 0.1
"""Seconds for which a denial holds, unless something is told of the breaker."""


class Answered:
    """A question whose answer is known."""

    __slots__ = ("_grant",)

    def __init__(self, grant: Grant) -> None:
        self._grant = grant

    def wait(self, timeout: float) -> Grant | None:  # noqa: ARG002  (as `Asked` has it)
        """Return the answer; see `Asked`."""
        return self._grant

    async def wait_async(self, timeout: float) -> Grant | None:  # noqa: ARG002, ASYNC109
        """Return the answer; see `Asked`."""
        return self._grant


class Question:
    """A question that is under way."""

    __slots__ = ("_event", "_wake", "answer", "asked_at", "settled", "talk")

    def __init__(self, talk: Talk, now: float) -> None:
        self.talk = talk
        self.asked_at = now
        self._event = threading.Event()
        self._wake: Callable[[], None] | None = None
        self.settled = False
        self.answer: Grant | None = None

    def wait(self, timeout: float) -> Grant | None:
        """Return the answer, or None if there is none in time; see `Asked`."""
        self._event.wait(timeout)
        return self.talk.take(self)

    async def wait_async(self, timeout: float) -> Grant | None:  # noqa: ASYNC109
        """Return the answer as `wait` does, without holding the event loop up.

        Of the answer only the news comes through the loop. The lease is taken afterwards, so that
        a cancellation leaves it in hand.
        """
        import asyncio

        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # another library's event loop
            return self.talk.take(self)
        waiting = loop.create_future()
        timer = loop.call_later(timeout, _end, waiting)
        self._wake = lambda: _end_from_outside(loop, waiting)
        try:
            if not self.settled:  # looked at after `_wake` was set: one of the two sees the answer
                await waiting
        finally:
            timer.cancel()
        return self.talk.take(self)

    def tell(self) -> None:
        """Wake whoever waits; by the thread that answers."""
        self._event.set()
        if self._wake is not None:
            self._wake()


def _end(waiting: Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def _end_from_outside(loop: AbstractEventLoop, waiting: Future[None]) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(_end, waiting)


class Hand(NamedTuple):
    """A lease that nobody uses yet."""

    lease: str
    until: float
    """When it goes back, on the monotonic clock."""


class Talk:
    """What one breaker and the other processes have to do with each other.

    Args:
        breaker: It; not held.
    """

    __slots__ = (
        "_alone", "_denied_until", "_hand", "_lock", "_question", "adopted", "breaker", "known",
        "name", "told",
    )  # fmt: skip

    def __init__(self, breaker: Circuit) -> None:
        self.breaker: ref[Circuit] = ref(breaker)
        self.name = breaker.name
        self.known: Record | None = None
        """The newest record that this process has seen; of the thread that talks to the Redis."""
        self.adopted = 0
        """How often others' verdicts were taken over: a change of before is overridden."""
        self.told = False
        """Whether it was said that the record is damaged."""
        self.after_fork()

    def after_fork(self) -> None:
        """Forget what is under way: it is the parent's."""
        self._lock = threading.Lock()
        self._question: Question | None = None
        self._hand: Hand | None = None
        self._denied_until = 0.0
        self._alone = False

    def ask(self) -> tuple[Asked | None, Question | None]:
        """Ask for a lease.

        Returns:
            What to wait for, None if this process is to decide alone; and a question that has to
            be put to the Redis, if this is one.
        """
        now = time.monotonic()
        with self._lock:
            if self._alone:
                return None, None
            if self._hand is not None:
                hand, self._hand = self._hand, None
                return Answered(Grant(hand.lease)), None
            if now < self._denied_until:
                return Answered(Grant(None)), None
            if self._question is not None:
                under_way = now - self._question.asked_at < UNANSWERED
                return (Answered(Grant(None)) if under_way else None), None
            self._question = question = Question(self, now)
        return question, question

    def take(self, question: Question) -> Grant | None:
        """Return the answer to a question, if there is one, with its lease if it is still there."""
        with self._lock:
            grant = question.answer
            if grant is None or grant.lease is None:
                return grant
            if self._hand is not None and self._hand.lease == grant.lease:
                self._hand = None
                return grant
        return Grant(None)

    def answer(self, question: Question, grant: Grant | None, lasts: float = 0.0) -> None:
        """Answer a question.

        Args:
            question: It.
            grant: The answer; None if there is none.
            lasts: Seconds of the lease, if that is what it is.
        """
        now = time.monotonic()
        with self._lock:
            if self._question is question:
                self._question = None
            if grant is not None and grant.lease is not None:
                self._hand = Hand(grant.lease, now + min(HELD, lasts / 2))
            elif grant is not None:
                self._denied_until = now + min(DENIED, grant.retry_after)
            question.answer = grant
            question.settled = True
        question.tell()

    def unused(self, now: float, *, waits: bool) -> str | None:
        """Return the lease that has been in hand for too long, or None; it is so no longer.

        Args:
            now: The monotonic time.
            waits: Whether calls wait for an answer. Where they do not, each lease comes after the
                call that asked for it; and where calls are rare, it would always be gone before
                the next one. From then on this process decides alone, until it is told otherwise.
        """
        with self._lock:
            if self._hand is None or now < self._hand.until:
                return None
            hand, self._hand = self._hand, None
            self._alone = not waits
        return hand.lease

    @property
    def goes_back_at(self) -> float | None:
        """When the lease in hand goes back, on the monotonic clock."""
        hand = self._hand
        return None if hand is None else hand.until

    def news(self, *, moved: bool) -> None:
        """Take note that something is told of the breaker.

        Args:
            moved: Whether it is of a new generation: leases of before are gone.
        """
        with self._lock:
            self._denied_until = 0.0
            if moved:
                self._hand = None
                self._alone = False
