"""Breakers' verdicts shared between processes through a Redis.

What one process has found about a dependency, the others need not find out again: they take over
its verdict, and of all of them only so many probe. Calls never wait for that, but for the one that
asks whether it may probe. One thread does everything with the Redis; with the Redis away, each
process decides alone.

    records     what is in the Redis, and the scripts that change it
    talk        what is under way between one breaker and the others
    exchange    how a process and the records come to agree
    listening   messages about changes
    inbox       what the thread is given to do
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from periscope_otel import guard
from periscope_otel.redaction import redact
from periscope_otel.redis_link import errors
from periscope_otel.resilience.sharing.exchange import Asking, Exchange, Moved, Settled
from periscope_otel.resilience.sharing.inbox import Inbox
from periscope_otel.resilience.sharing.listening import Listening
from periscope_otel.resilience.sharing.records import DamagedRecordError, Records

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from periscope_otel.redis_link import RedisLink
    from periscope_otel.resilience.circuit import Circuit
    from periscope_otel.resilience.transition import Asked, Transition

POLL: Final = 1.0
"""Seconds between two looks at the records, for what no message has told."""
SLOW: Final = 0.1
"""Seconds without an answer after which calls do not wait for the Redis any more."""
BACK_OFF: Final = (0.1, 5.0)
"""Seconds between attempts to reach a Redis that is away: at first, and at last."""
_MOST_WAITING: Final = 10_000
"""What is put while no thread runs; beyond that it is forgotten."""

_MOST_AT_ONCE: Final = 1000
"""What is done of the inbox before messages and polls have their turn."""

_all: Final[WeakSet[SharedVerdicts]] = WeakSet()
_of_parents: Final[list[object]] = []
"""What children of forks leave alone."""


class SharedVerdicts:
    """Tells other processes what this one finds about dependencies, and the other way round.

    Args:
        link: The way to the Redis; closed by `close`.
        breakers: Those of this process. The ones among them that have this as their `sharing`
            take part, but for one that guards this very Redis.

    Example:
        >>> verdicts = SharedVerdicts(RedisLink("redis://localhost"), breakers)
        >>> breakers.share(verdicts)
    """

    def __init__(self, link: RedisLink, breakers: Iterable[Circuit]) -> None:
        self._link = link
        self._own_names = _names_of(link)
        self._exchange = Exchange(Records(link), breakers, self._takes_part)
        self._listening = Listening(link)
        self._ending = False
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self._inbox: Inbox[Moved | Settled | Asking] = Inbox()
        self._start_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._away = False
        self._busy_since: float | None = None
        self._back_off = BACK_OFF[0]

    # For breakers, in their callers' way.

    def moved(self, breaker: Circuit, transition: Transition) -> None:
        """Take note of a change that this process has found; see `Sharing`."""
        if self._ending or self._guards_this(breaker) or self._is_full():
            return
        talk = self._exchange.talk(breaker)
        adopted = 0 if talk is None else talk.adopted
        self._inbox.put(Moved(breaker, transition, adopted, time.monotonic()))

    def settled(self, breaker: Circuit, lease: str, outcome: str) -> None:
        """Take note of how a probe under a shared lease has ended; see `Sharing`."""
        if not self._ending and not self._is_full():
            self._inbox.put(Settled(breaker.name, lease, outcome, breaker.policy.successes))

    def ask(self, breaker: Circuit) -> Asked | None:
        """Ask the other processes for a lease to probe; see `Sharing`."""
        if self._thread is None:
            self.start()
        if not self.answers or self._guards_this(breaker):
            return None
        asked, question = self._exchange.begin(breaker).ask()
        if question is not None:
            self._inbox.put(Asking(question.talk, question))
        return asked

    @property
    def answers(self) -> bool:
        """Whether the Redis may be expected to answer soon."""
        busy_since = self._busy_since
        if self._ending or self._away or self._thread is None:
            return False
        return busy_since is None or time.monotonic() - busy_since < SLOW

    def _takes_part(self, breaker: Circuit) -> bool:
        return breaker.sharing is self and not self._guards_this(breaker)

    def _guards_this(self, breaker: Circuit) -> bool:
        """Whether a breaker guards this Redis, going by its name: the host, or host and port.

        What it has found cannot be told by the very thing that it has found it about.
        """
        return breaker.name.lower() in self._own_names

    def _is_full(self) -> bool:
        return self._thread is None and len(self._inbox) >= _MOST_WAITING

    # Beginning and ending.

    def start(self) -> None:
        """Start to talk to the Redis; does nothing where that is so, or has ended."""
        # What `getaddrinfo` imports when it is first called. A fork while the thread does that
        # would leave its child with a module that is for ever about to be imported.
        "".encode("idna")
        self._start(after_fork=False)

    def _start(self, *, after_fork: bool) -> None:
        with self._start_lock:
            if self._thread is not None or self._ending:
                return
            thread = threading.Thread(
                target=self._run, args=(self._inbox, after_fork), name="periscope-verdicts",
                daemon=True,
            )  # fmt: skip
            with suppress(RuntimeError):  # the interpreter ends: no thread can be started
                thread.start()
                self._thread = thread

    def close(self, timeout: float = 2.0) -> bool:
        """Tell what is not told yet, give back leases, and end.

        Args:
            timeout: Seconds to wait for that at most.

        Returns:
            Whether all was told.
        """
        with self._start_lock:
            thread, ended = self._thread, self._ending
            self._ending = True
        if thread is None:
            self._inbox.close()
            self._link.close()
            return True
        if not ended:
            self._inbox.wake()
        thread.join(timeout)
        if thread.is_alive():
            return False
        self._inbox.close()
        return not self._away

    def after_fork(self) -> None:
        """Go on in the child of a fork, with a thread and connections of its own."""
        ran = self._thread is not None
        _of_parents.extend((self._link, self._listening.abandon()))
        self._link = self._link.renewed()
        self._listening = Listening(self._link)
        self._exchange.after_fork(Records(self._link))
        self._inbox.close()
        self._reset()
        if ran:
            self._start(after_fork=True)

    # The thread.

    def _run(self, inbox: Inbox[Moved | Settled | Asking], after_fork: bool) -> None:
        if after_fork:
            inbox.wait(0.05)  # until all else of the fork is put right
        while not self._ending:
            try:
                self._converse()
            except errors() as error:
                self._lose(error)
                self._wait_away()
            except Exception as error:  # noqa: BLE001  (a bug of ours must not end the sharing)
                self._lose(error)
                guard.report("breaker sharing", error)
                self._wait_away()
        self._take_leave()

    def _converse(self) -> None:
        """Exchange verdicts for as long as the Redis answers."""
        with self._calling():
            self._exchange.tell_untold()
            self._poll()
        self._away, self._back_off = False, BACK_OFF[0]
        next_poll = time.monotonic() + POLL
        while not self._ending:
            wait = min(next_poll, self._exchange.next_due) - time.monotonic()
            self._inbox.wait(0.0 if len(self._inbox) else wait, self._listening.socket)
            self._serve()
            self._hear()
            now = time.monotonic()
            with self._calling():
                self._exchange.give_back(now)
                if now >= next_poll:
                    self._poll()
                    next_poll = time.monotonic() + POLL

    def _serve(self) -> None:
        """Do what is in the inbox; what cannot be done now is remembered."""
        for _ in range(_MOST_AT_ONCE):
            item = None if self._ending else self._inbox.take()
            if item is None:
                return
            with self._calling(), _without_damage():
                if isinstance(item, Asking):
                    self._exchange.ask(item)
                elif isinstance(item, Moved):
                    self._exchange.tell(item)
                else:
                    self._exchange.settle(item)

    def _hear(self) -> None:
        """Look at the breakers of which something is told."""
        names = {event.name for event in self._listening.events()}
        talks = self._exchange.named(names) if names else []
        for talk in talks:
            talk.news(moved=False)
        with self._calling():
            self._exchange.look_at(talks)

    def _poll(self) -> None:
        self._listening.begin()
        self._exchange.forget_gone()
        self._exchange.look_at([self._exchange.begin(one) for one in self._exchange.next_turn()])

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Let callers see since when an answer of the Redis is waited for."""
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def _lose(self, error: Exception) -> None:
        if not self._away:
            guard.warn(
                "breaker sharing",
                "breakers cannot ask %s for other processes' verdicts (%s: %s): each process "
                "decides alone until it answers",
                self._link.shown,
                type(error).__name__,
                redact(str(error), 200),
            )
        self._away = True
        self._listening.end()

    def _wait_away(self) -> None:
        """Remember what comes, for as long as the next attempt is not due."""
        until = time.monotonic() + self._back_off
        self._back_off = min(2 * self._back_off, BACK_OFF[1])
        while not self._ending and (left := until - time.monotonic()) > 0:
            self._remember()
            self._inbox.wait(left)
        self._remember()

    def _remember(self) -> None:
        while (item := self._inbox.take()) is not None:
            if isinstance(item, Asking):
                item.talk.answer(item.question, None)
            elif isinstance(item, Moved):
                self._exchange.remember(item)
            else:
                self._exchange.remember_settled(item)

    def _take_leave(self) -> None:
        """Tell what is left, if the Redis answers."""
        self._remember()
        if not self._away:
            try:
                self._exchange.tell_untold()
                self._exchange.give_back_all()
            except errors():
                self._away = True
        self._listening.end()
        self._link.close()


@contextmanager
def _without_damage() -> Iterator[None]:
    try:
        yield
    except DamagedRecordError:
        guard.warn("breaker records", "a record of a breaker cannot be read, and is ignored")


def _names_of(link: RedisLink) -> frozenset[str]:
    """Return the names that a breaker of this Redis would have."""
    options = link.client.connection_pool.connection_kwargs
    path = options.get("path")
    if path is not None:
        return frozenset({str(path).lower()})
    host, port = str(options.get("host", "localhost")).lower(), options.get("port", 6379)
    return frozenset({host, f"{host}:{port}", f"[{host}]:{port}"})


def _after_fork_in_child() -> None:
    for verdicts in list(_all):
        with guard.contained("breaker sharing"):
            verdicts.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
