"""How a process and the records in the Redis come to agree on breakers' verdicts.

A verdict is written if it is made of the newest record; whoever is too late takes over what is
there. What is not heard of by a message is found by the poll. With the Redis away, what happens
here is remembered, and told when it is back; what was removed from it is written again.

All of this is called by one thread. What a Redis that is away raises comes out of every method that
asks it, and then what was to be told is remembered.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from itertools import chain, islice
from typing import TYPE_CHECKING, Final, NamedTuple

from periscope_otel import guard
from periscope_otel.redis_link import errors
from periscope_otel.resilience.sharing.records import (
    DamagedRecordError,
    Record,
    Records,
    Verdict,
    new_epoch,
)
from periscope_otel.resilience.sharing.talk import Talk
from periscope_otel.resilience.transition import BUSY, Grant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from periscope_otel.resilience.circuit import Circuit
    from periscope_otel.resilience.sharing.talk import Question
    from periscope_otel.resilience.transition import Transition

MOST_POLLED: Final = 500
"""Breakers that one poll looks at."""
_MOST_UNTOLD: Final = 1000
"""Verdicts, and as many ends of probes, that are remembered while the Redis is away."""
_FRESH: Final = 5.0
"""Seconds for which what was done by hand counts whatever there is."""


class Moved(NamedTuple):
    """A change that this process has found."""

    breaker: Circuit
    transition: Transition
    adopted: int
    """How often others' verdicts had been taken over before."""
    at: float
    """When, on the monotonic clock."""


class Settled(NamedTuple):
    """How a probe has ended."""

    name: str
    lease: str
    outcome: str
    needed: int


class Asking(NamedTuple):
    """A question to put."""

    talk: Talk
    question: Question


class Exchange:
    """Brings this process's breakers and the records together.

    Args:
        records: Those in the Redis.
        breakers: Those of this process.
        takes_part: Whether a breaker is shared.
    """

    def __init__(
        self, records: Records, breakers: Iterable[Circuit], takes_part: Callable[[Circuit], bool]
    ) -> None:
        self._breakers = breakers
        self._takes_part = takes_part
        self._talks: dict[int, Talk] = {}
        self.after_fork(records)

    def after_fork(self, records: Records) -> None:
        """Leave to the parent what it has to tell.

        Args:
            records: Those in the Redis, by a way of this process's own.
        """
        self._records = records
        self._lock = threading.Lock()
        self._turn = 0
        self._untold: dict[int, Moved] = {}
        self._unsettled: deque[Settled] = deque(maxlen=_MOST_UNTOLD)
        for talk in list(self._talks.values()):
            talk.after_fork()

    # Which breaker has which talk.

    def talk(self, breaker: Circuit) -> Talk | None:
        """Return a breaker's talk, if it has begun."""
        talk = self._talks.get(id(breaker))
        return None if talk is None or talk.breaker() is not breaker else talk

    def begin(self, breaker: Circuit) -> Talk:
        """Return a breaker's talk, begun now if it has not; by any thread."""
        talk = self.talk(breaker)
        if talk is not None:
            return talk
        with self._lock:
            talk = self.talk(breaker)
            if talk is None:
                talk = self._talks[id(breaker)] = Talk(breaker)
        return talk

    def forget_gone(self) -> None:
        """Forget breakers that are no more, once the leases that they asked for are back."""
        with self._lock:
            for key, talk in list(self._talks.items()):
                if talk.breaker() is None and talk.goes_back_at is None:
                    del self._talks[key]

    def living(self) -> Iterator[Circuit]:
        """Give the breakers that take part, each once."""
        seen: set[int] = set()
        known = [talk.breaker() for talk in list(self._talks.values())]
        for breaker in chain(list(self._breakers), known):
            if breaker is not None and id(breaker) not in seen and self._takes_part(breaker):
                seen.add(id(breaker))
                yield breaker

    def named(self, names: set[str]) -> list[Talk]:
        """Return the talks of breakers of these names."""
        return [self.begin(one) for one in self.living() if one.name in names]

    def next_turn(self) -> list[Circuit]:
        """Return the breakers whose turn it is to be polled."""
        all_of_them = list(self.living())
        start = self._turn if self._turn < len(all_of_them) else 0
        chosen = list(islice(all_of_them, start, start + MOST_POLLED))
        self._turn = start + len(chosen)
        return chosen

    # Telling.

    def tell(self, moved: Moved) -> None:
        """Write a change that this process has found."""
        if moved.transition.to_state == "half_open":
            return  # the Redis decides on that when it is asked for a lease
        self._untold.pop(id(moved.breaker), None)
        self._tell_or_remember(moved, fresh=True)

    def remember(self, moved: Moved) -> None:
        """Keep a change for when the Redis is back: the newest of each breaker."""
        if moved.transition.to_state == "half_open":
            return
        self._untold.pop(id(moved.breaker), None)
        if len(self._untold) < _MOST_UNTOLD:
            self._untold[id(moved.breaker)] = moved
        else:
            guard.warn(
                "untold verdicts",
                "the Redis is away, and more than %d breakers have changed: of further ones other "
                "processes are not told",
                _MOST_UNTOLD,
            )

    def settle(self, settled: Settled) -> None:
        """Give a lease back."""
        self._unsettled.append(settled)
        self.tell_unsettled()

    def remember_settled(self, settled: Settled) -> None:
        """Keep the end of a probe for when the Redis is back."""
        self._unsettled.append(settled)

    def tell_untold(self) -> None:
        """Tell what was remembered."""
        for key, moved in list(self._untold.items()):
            del self._untold[key]
            self._tell_or_remember(moved, fresh=False)
        self.tell_unsettled()

    def tell_unsettled(self) -> None:
        """Give back the leases that are to go back."""
        while self._unsettled:
            one = self._unsettled.popleft()
            try:
                closed = self._records.settle(one.name, one.lease, one.outcome, one.needed)
            except errors():
                self._unsettled.appendleft(one)
                raise
            for talk in self.named({one.name}) if closed is not None else ():
                self._reconcile(talk, closed)

    def _tell_or_remember(self, moved: Moved, *, fresh: bool) -> None:
        try:
            self._tell(moved, fresh=fresh)
        except errors():
            self.remember(moved)
            raise

    def _tell(self, moved: Moved, *, fresh: bool) -> None:
        talk = self.begin(moved.breaker)
        transition = moved.transition
        by_hand = fresh and transition.reason == "manual" and time.monotonic() - moved.at < _FRESH
        if moved.adopted != talk.adopted and not by_hand:
            # Others were first. Once more what they say, since this may lie between the two.
            (record,) = self._records.read([talk.name])
            if isinstance(record, Record):
                self._adopt(talk, moved.breaker, record)
            return
        if moved.adopted != talk.adopted:
            moved.breaker.adopt(transition.to_state, reason="manual")
        left = max(0.0, (transition.open_for or 0.0) - (time.monotonic() - moved.at))
        verdict = Verdict(transition.to_state, transition.reason, left, transition.openings)
        self._write(talk, moved.breaker, verdict, anyway=by_hand)

    def _restate(self, talk: Talk, breaker: Circuit) -> None:
        """Write the state that a breaker is in, where the Redis has lost it or never knew it."""
        self._write(talk, breaker, _verdict_of(breaker))

    def _write(
        self, talk: Talk, breaker: Circuit, verdict: Verdict, *, anyway: bool = False
    ) -> None:
        won, record = self._records.change(talk.name, verdict, talk.known, anyway=anyway)
        if won:
            talk.known = record
            talk.news(moved=True)
        else:
            self._adopt(talk, breaker, record)

    # Asking.

    def ask(self, asking: Asking) -> None:
        """Put a question, and answer it, whatever comes of it."""
        talk, question = asking
        breaker = talk.breaker()
        grant: Grant | None = None
        lasts = 0.0
        try:
            if breaker is not None:
                lasts = breaker.policy.lease
                grant = self._grant(talk, breaker)
        finally:
            talk.answer(question, grant, lasts)

    def _grant(self, talk: Talk, breaker: Circuit) -> Grant | None:
        policy = breaker.policy
        lease, epoch = secrets.token_hex(8), new_epoch()
        try:
            answer = self._records.ask(
                talk.name, lease, _verdict_of(breaker), epoch,
                lasts=policy.lease, most=policy.probes,
            )  # fmt: skip
        except BaseException:
            # It may have been granted all the same.
            self._unsettled.append(Settled(talk.name, lease, "ignored", policy.successes))
            raise
        if answer.verdict != "granted":
            self._reconcile(talk, answer.record)
            return None if answer.verdict == "none" else Grant(None, min(answer.retry_after, BUSY))
        if answer.record.epoch != epoch and not _is_next(answer.record, talk.known):
            self._adopt(talk, breaker, answer.record)
        else:
            talk.known = answer.record
            talk.news(moved=True)
        return Grant(lease)

    def give_back(self, now: float) -> None:
        """Give back leases that have been in hand for too long."""
        for talk in list(self._talks.values()):
            due = talk.goes_back_at
            if due is None or now < due:
                continue
            breaker = talk.breaker()
            waits = breaker is None or breaker.policy.probe_wait > 0
            lease = talk.unused(now, waits=waits)
            if lease is not None:
                self.settle(Settled(talk.name, lease, "ignored", 1))

    def give_back_all(self) -> None:
        """Give back every lease that nobody uses: this process ends."""
        self.give_back(float("inf"))

    @property
    def next_due(self) -> float:
        """When a lease in hand goes back, on the monotonic clock; far away if there is none."""
        dues = [talk.goes_back_at for talk in list(self._talks.values())]
        return min((due for due in dues if due is not None), default=float("inf"))

    # Hearing.

    def look_at(self, talks: Iterable[Talk]) -> None:
        """Read the records of these breakers, and take over what is new."""
        looked_at = list(talks)
        if not looked_at:
            return
        found = self._records.read([talk.name for talk in looked_at])
        for talk, record in zip(looked_at, found, strict=True):
            self._reconcile(talk, record)

    def _reconcile(self, talk: Talk, found: Record | DamagedRecordError | None) -> None:
        breaker = talk.breaker()
        if breaker is None:
            return
        if isinstance(found, DamagedRecordError):
            self._say_damaged(talk)
        elif found is None:
            self._on_missing(talk, breaker)
        elif found.follows(talk.known):
            self._on_news(talk, breaker, found)
        elif talk.known is not None and found.generation < talk.known.generation:
            self._restate(talk, breaker)  # of a replica that lagged behind when it took over

    def _on_missing(self, talk: Talk, breaker: Circuit) -> None:
        # A record that is not there says nothing: neither that the breaker is closed.
        if breaker.state == "closed":
            talk.known = None
        else:
            self._restate(talk, breaker)

    def _on_news(self, talk: Talk, breaker: Circuit, found: Record) -> None:
        if talk.known is None and found.state == "closed" and breaker.state != "closed":
            # It began closed as well, so what it has found since is the newer.
            talk.known = found
            self._restate(talk, breaker)
        else:
            self._adopt(talk, breaker, found)

    def _adopt(self, talk: Talk, breaker: Circuit, record: Record) -> None:
        half_open = record.state == "half_open"
        breaker.adopt(
            record.state,
            reason="probing" if half_open else record.reason,
            open_for=record.open_for,
            openings=_openings_left(record, breaker),
            overriding=True,  # what was set by hand is in the record, unless it was lifted since
        )
        # In this order: a change that lies between the two is overridden once more, not lost.
        talk.adopted += 1
        talk.known = record
        talk.news(moved=True)

    def _say_damaged(self, talk: Talk) -> None:
        if not talk.told:
            talk.told = True
            guard.warn(
                f"record of {talk.name}",
                "what other processes have found about breaker %s cannot be read, and is ignored "
                "until it is written anew",
                talk.name,
            )


def _verdict_of(breaker: Circuit) -> Verdict:
    """Return the state that a breaker is in."""
    view = breaker.view()
    left = view.retry_after or 0.0 if view.state == "open" else 0.0
    return Verdict(view.state, view.reason or "", left, view.openings)


def _openings_left(record: Record, breaker: Circuit) -> int:
    """Return how often it has opened in a row, less what was forgotten while it was closed."""
    if record.state != "closed":
        return record.openings
    return max(0, record.openings - int(record.age / breaker.policy.decay))


def _is_next(record: Record, known: Record | None) -> bool:
    """Whether a half-open record is the one known, or only the step from open to it."""
    if known is None or known.epoch != record.epoch:
        return False
    step = record.generation - known.generation
    return step == 0 or (step == 1 and known.state == "open")
