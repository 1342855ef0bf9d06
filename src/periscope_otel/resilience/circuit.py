"""The state machine of a breaker: permits, and what becomes of it as they are settled.

A permit carries the generation that the breaker was in; every change of state begins a new one, so
what comes back late changes nothing. In the half-open state permits are leases: only so many are
out at a time, and one that is never settled makes room after a while.

There is no timer: what has been open for long enough becomes half open when the next call asks. The
lock is held for a few lines at a time, never while the caller's code runs, or that of listeners. It
is reentrant: a collection may run in those lines, and end a generator that is in `with breaker`.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from itertools import count
from math import ceil, log2
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace

from periscope_otel import guard
from periscope_otel.failure import Failure, classify
from periscope_otel.resilience.policy import BY_HAND, DEFAULT_POLICY, BreakerPolicy, State
from periscope_otel.resilience.transition import BUSY, BreakerView, Transition
from periscope_otel.resilience.window import Window
from periscope_otel.telemetry.attributes import clean_label
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.trace import SpanContext

    from periscope_otel.failure import Verdict
    from periscope_otel.resilience.transition import Asked, Grant, Sharing

OUTCOMES: Final = ("success", "failure", "ignored")
"""How a call can end, for a breaker."""
COUNTED: Final = (*OUTCOMES, "rejected")
"""What is in `Circuit.counts`, in this order."""
REJECTED: Final = len(OUTCOMES)
"""Where in it the calls are that were not made."""

MOST_TOLD: Final = 10
"""Rejected calls a second that have a span; all are counted."""

_INDEX: Final = {outcome: index for index, outcome in enumerate(OUTCOMES)}
_PASSING: Final[frozenset[State]] = frozenset({"closed", "disabled", "observe"})
_MOST_OPENINGS: Final = 60  # counted in a row; by then every open time is the longest

moves: Final = [0]
"""The number of the latest change of any breaker: what began before it can be told by that."""

_move_numbers: Final = count(1)

listeners_of_all: Final[list[Callable[[Transition], None]]] = []
"""Those that are told of the transitions of every breaker."""


class Permit:
    """Leave to make one call; settle it once, whatever becomes of the call.

    Example:
        >>> permit = breaker.allow()
        >>> if permit is not None:
        ...     permit.settle(None if fetch() else failure)
    """

    # What most permits never set is a default of the class: one is made for every call.
    lease: str | None = None
    """The lease of a probe that other processes know of."""
    failure: Failure | None = None
    """How the call ended, for a `settle` that is not told."""
    span_context: SpanContext | None = None
    """The call's span: what a transition is linked to."""
    outcome: str | None = None
    """`success`, `failure` or `ignored` once it is settled; None before."""
    place: tuple[int, int] = (0, 0)
    """Where the `with` block stands that it is for, as `blocks` knows it."""
    _seconds = 0.0

    def __init__(self, breaker: Circuit, generation: int, now: float) -> None:
        self.breaker = breaker
        self.generation = generation
        self._running_since: float | None = now

    def conclude(self, failure: Failure | None, span_context: SpanContext | None = None) -> None:
        """Say how the call ended, for whoever settles the permit."""
        self.failure = failure
        self.span_context = span_context

    def has_run(self, seconds: float) -> None:
        """Take note that the call began before the permit was taken."""
        self._seconds += seconds

    def pause(self) -> None:
        """Stop its time: a generator is at a `yield`, and the consumer has the word."""
        self._seconds = self.seconds(self.breaker.clock())
        self._running_since = None

    def resume(self) -> None:
        """Let its time run again."""
        if self._running_since is None:
            self._running_since = self.breaker.clock()

    def seconds(self, now: float) -> float:
        """Return how long the call has taken by `now`."""
        since = self._running_since
        return self._seconds if since is None else self._seconds + now - since

    def settle(self, failure: Failure | None = None) -> bool:
        """Say how the call ended; only the first time counts.

        Args:
            failure: What went wrong; by default what `conclude` was told, and nothing without it.

        Returns:
            Whether this was the first time.
        """
        return self.breaker._settle(self, failure or self.failure)


class Circuit:
    """What a `Breaker` is in itself; see there for its arguments."""

    __slots__ = (
        "__weakref__", "_busy_until", "_closed_since", "_failed_in_a_row", "_first_generation",
        "_generation", "_has_news", "_in_flight", "_is_timed", "_leases", "_listeners", "_lock",
        "_openings", "_reason", "_second", "_slow_in_a_row", "_state", "_successes",
        "_told", "_until", "_window", "clock", "counts", "moved", "name", "policy", "rng",
        "sharing",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        policy: BreakerPolicy = DEFAULT_POLICY,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: Callable[[], float] = random.random,
        **changes: Any,
    ) -> None:
        self.name = clean_label(name) if isinstance(name, str) else ""
        if not self.name:
            raise ValueError("a breaker needs a name")
        self.policy = policy.changed(**changes) if changes else policy
        self._is_timed = self.policy.slow_threshold is not None
        self.clock = clock
        self.rng = rng
        self.sharing: Sharing | None = None
        self._lock = threading.RLock()
        self._has_news = False
        self.counts = [0] * len(COUNTED)
        """Calls by how they ended, as in `COUNTED`."""
        self._listeners: tuple[list[Callable[[Transition], None]], ...] = ()
        self._state: State = "closed"
        self._generation = self._first_generation = 0
        self.moved = 0
        """The number, as in `moves`, of its latest change."""
        self._openings = 0
        self._until: float | None = None
        self._reason: str | None = None
        self._second = self._told = 0
        self._busy_until = 0.0
        self._clear()
        self._made()

    def _made(self) -> None:
        """Take note that it is ready; for subclasses."""

    def _clear(self) -> None:
        self._window = Window(self.policy.window)
        self._failed_in_a_row = self._slow_in_a_row = 0
        self._successes = 0
        self._leases: dict[Permit, float] | None = None
        self._in_flight = 0
        self._closed_since = self.clock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self._state}>"

    # Where it is.

    @property
    def state(self) -> State:
        """Its state; `open` also where the open time is over and no call has asked since."""
        return self._state

    @property
    def retry_after(self) -> float | None:
        """Seconds after which a call may pass; None where calls pass, or nobody can tell."""
        with self._lock:
            now = self.clock()
            if self._state == "half_open":
                wait = 0.0 if self._has_room(now) else BUSY
            elif self._state == "open" and self._until is not None:
                wait = max(0.0, self._until - now)
            else:
                return None
            return max(wait, self._busy_until - now)

    def view(self) -> BreakerView:
        """Return everything about it at one moment."""
        with self._lock:
            self._window.move_to(self.clock())
            return BreakerView(
                self.name, self._state, self._generation, self.retry_after, self._reason,
                self._window.calls, self._window.failures, self._window.slow,
                self._failed_in_a_row, self._openings, self._in_flight, len(self._leases or ()),
                dict(zip(OUTCOMES, self.counts, strict=False)), self.counts[REJECTED],
            )  # fmt: skip

    @property
    def is_idle(self) -> bool:
        """Whether it can be spared: it is closed, and no permit is out."""
        return self._state == "closed" and not self._in_flight

    # Letting calls pass.

    def _look(self, now: float, *, rejecting: bool = True) -> tuple[Permit | None, bool]:
        """Return a permit where every call passes; else whether this one may be a probe."""
        with self._lock:
            state = self._state
            if state in _PASSING:
                self._in_flight += 1
                return Permit(self, self._generation, now), False
            if state == "open":
                may_probe = self._until is None or now >= self._until
            else:
                may_probe = state == "half_open" and self._has_room(now)
            if rejecting and not may_probe:
                self.counts[REJECTED] += 1
            return None, may_probe

    def _has_room(self, now: float) -> bool:
        leases = self._leases
        if leases is None or len(leases) < self.policy.probes:
            return True
        return any(now >= expires for expires in leases.values())

    def _ask(self) -> Asked | None:
        """Ask the other processes, if there are any and they answer."""
        sharing = self.sharing
        if sharing is None:
            return None
        with guard.contained("breaker sharing"):
            return sharing.ask(self)
        return None

    def _probe(
        self, now: float, asked: Asked | None, grant: Grant | None, *, rejecting: bool
    ) -> Permit | None:
        """Return a permit for a probe, where the others let it or do not answer."""
        if grant is None:
            lease, granted = None, asked is None or self.policy.probe_wait > 0
        else:
            lease, granted = grant.lease, grant.lease is not None
        with self._lock:
            if grant is not None and not granted:  # others probe
                self._busy_until = now + grant.retry_after
            passes = granted or self._state in _PASSING  # it was closed meanwhile
            permit = self._lease(now) if passes else None
            if permit is None:
                self.counts[REJECTED] += rejecting
            elif lease is not None:
                permit.lease = lease
        if permit is None and lease is not None:
            self._give_back(lease, "ignored")
        self._announce()
        return permit

    def _lease(self, now: float) -> Permit | None:
        """Return a permit that is a lease where it has to be one; the lock is held."""
        if self._state in _PASSING:
            self._in_flight += 1
            return Permit(self, self._generation, now)
        if self._state == "open" and (self._until is None or now >= self._until):
            self._move("half_open", "probing", now)
        if self._state != "half_open" or not self._has_room(now):
            return None
        leases = self._leases = self._leases or {}
        if len(leases) >= self.policy.probes:
            expired = min(leases, key=leases.__getitem__)
            leases.pop(expired, None)  # what it may still bring changes nothing
            expired.generation = ~expired.generation  # below zero: never the present one
        permit = Permit(self, self._generation, now)
        leases[permit] = now + self.policy.lease
        self._in_flight += 1
        return permit

    def tells_of_rejection(self) -> bool:
        """Whether this rejected call shall have a span; only so many do a second."""
        second = int(self.clock())
        if second != self._second:
            self._second, self._told = second, 0
        self._told += 1
        return self._told <= MOST_TOLD

    def _give_back(self, lease: str, outcome: str) -> None:
        if self.sharing is not None:
            with guard.contained("breaker sharing"):
                self.sharing.settled(self, lease, outcome)

    # Learning how calls end.

    def failure_of(self, error: BaseException) -> Failure:
        """Return what an exception means to this breaker: its `judge` is asked first."""
        failure = classify(error)
        judge = self.policy.judge
        if judge is None:
            return failure
        try:
            verdict = judge(error)
            if isinstance(verdict, str) and verdict in OUTCOMES:
                return replace(failure, verdict=verdict)
        except Exception:  # noqa: BLE001  (the user's predicate must not break the call)
            guard.warn(f"judge of {self.name}", "the judge= of breaker %s raised", self.name)
        return failure

    def _settle(self, permit: Permit, failure: Failure | None) -> bool:
        now = self.clock()
        with self._lock:
            if permit.outcome is not None:
                return False
            window = self._window
            if (
                failure is None
                and self._state == "closed"
                and permit.generation == self._generation
                and not (self._is_timed or self._failed_in_a_row or window.failures)
            ):
                # What nearly every call is, while all is well: the rest would come to the same.
                permit.outcome = "success"
                self._in_flight -= 1
                self.counts[0] += 1
                window.add(now, False, False)
                return True
            verdict: Verdict = "success"
            if failure is not None:  # an exception that answers for itself may say anything
                verdict = failure.verdict if failure.verdict in OUTCOMES else "failure"
            permit.outcome = verdict
            if permit.generation == self._generation:
                self._in_flight -= 1
                self._judge(permit, verdict, failure, now)
            elif self._is_of_the_parent(permit):
                return True
            else:
                self._in_flight -= 1
            self.counts[_INDEX[verdict]] += 1
        if permit.lease is not None:
            self._give_back(permit.lease, permit.outcome)
        if self._has_news:
            self._announce()
        return True

    def _is_of_the_parent(self, permit: Permit) -> bool:
        """Whether the parent of a fork has given it out, and counts it."""
        given_in = max(permit.generation, ~permit.generation)
        return given_in < self._first_generation

    def _judge(self, permit: Permit, verdict: Verdict, failure: Failure | None, now: float) -> None:
        """Take a result of this generation into account; the lock is held."""
        threshold = self.policy.slow_threshold
        slow = threshold is not None and permit.seconds(now) >= threshold
        state = self._state
        if state == "half_open":
            self._judge_probe(permit, verdict, failure, now, slow=slow)
            return
        if state == "disabled":
            return
        if failure is None:
            self._failed_in_a_row = 0
        else:
            if self._opens_at_once(permit, failure, now):
                return
            if verdict == "ignored":
                if not (slow and failure.outcome == "cancelled"):
                    return
            elif verdict == "failure":
                self._failed_in_a_row += 1
            else:
                self._failed_in_a_row = 0
        self._slow_in_a_row = self._slow_in_a_row + 1 if slow else 0
        window = self._window
        window.add(now, verdict == "failure", slow)
        if (window.failures or window.slow) and (reason := self._why_open()):
            self._open(reason, now, permit, failure)

    def _why_open(self) -> str | None:
        policy, window = self.policy, self._window
        in_a_row = policy.consecutive_failures
        if in_a_row is not None and self._failed_in_a_row >= in_a_row:
            return "consecutive_failures"
        slow_in_a_row = policy.consecutive_slow
        if slow_in_a_row is not None and self._slow_in_a_row >= slow_in_a_row:
            return "consecutive_slow"
        if window.calls < policy.minimum_calls:
            return None
        if window.failures / window.calls >= policy.failure_rate:  # exact, unlike the product
            return "failure_rate"
        if policy.slow_threshold is not None and window.slow / window.calls >= policy.slow_rate:
            return "slow_rate"
        return None

    def _opens_at_once(self, permit: Permit, failure: Failure, now: float) -> bool:
        """Open where the dependency has said itself that it wants no more calls."""
        if failure.reason == "auth" and failure.verdict == "failure" and self.policy.open_on_auth:
            self._open("auth", now, permit, failure)
            return True
        limited = failure.reason == "rate_limit" and failure.verdict == "ignored"
        if limited and self._asked_for(failure) > 0:
            self._open("rate_limit", now, permit, failure)
            return True
        return False

    def _asked_for(self, failure: Failure | None) -> float:
        """Return the seconds of a Retry-After, as far as it is one and we follow it."""
        asked = None if failure is None else failure.retry_after
        if isinstance(asked, (int, float)) and asked > 0:  # false for NaN too
            return min(asked, self.policy.longest_hold)
        return 0.0

    def _judge_probe(
        self, permit: Permit, verdict: Verdict, failure: Failure | None, now: float, *, slow: bool
    ) -> None:
        if self._leases is not None:
            self._leases.pop(permit, None)
        if failure is not None and self._opens_at_once(permit, failure, now):
            return
        hung = slow and (verdict != "ignored" or (failure and failure.outcome == "cancelled"))
        if verdict == "failure" or hung:
            permit.outcome = "failure"  # to the other processes too
            self._open("probe_failed", now, permit, failure)
        elif verdict == "success":
            self._successes += 1
            if self._successes >= self.policy.successes:
                self._move("closed", "recovered", now, permit=permit)

    def _open(self, reason: str, now: float, permit: Permit, failure: Failure | None) -> None:
        held = self._asked_for(failure)
        error_type = None if failure is None else failure.error_type
        if self._state == "observe":
            self._say(Transition(
                self.name, "observe", "open", reason, error_type=error_type,
                would_be=True, span_context=permit.span_context or _current_span(),
            ))  # fmt: skip
            self._window.clear()
            self._failed_in_a_row = self._slow_in_a_row = 0
            return
        self._forgive(now)
        open_for = held if reason == "rate_limit" else max(self._next_open_time(), held)
        self._until = now + open_for
        self._move("open", reason, now, permit=permit, open_for=open_for, error_type=error_type)

    def _forgive(self, now: float) -> None:
        """Count fewer openings the longer it was closed."""
        if self._state == "closed":
            healthy = int((now - self._closed_since) / self.policy.decay)
            if healthy > 0:  # what doubling ended at is halved, however often it was reached
                self._openings = max(0, min(self._openings, self._doublings()) - healthy)

    def _doublings(self) -> int:
        """Return after how many openings in a row the open time is the longest."""
        policy = self.policy
        if policy.open_time <= 0:
            return _MOST_OPENINGS
        return min(ceil(log2(policy.longest_open / policy.open_time)), _MOST_OPENINGS)

    def _next_open_time(self) -> float:
        """Return for how long to open: twice as long each time."""
        policy = self.policy
        seconds = min(policy.open_time * 2.0**self._openings, policy.longest_open)
        self._openings = min(self._openings + 1, _MOST_OPENINGS)
        return seconds * (1 + policy.jitter * (2 * self.rng() - 1))

    # Changing state; the lock is held.

    def _move(
        self,
        to: State,
        reason: str,
        now: float,
        *,
        permit: Permit | None = None,
        open_for: float | None = None,
        error_type: str | None = None,
        adopted: bool = False,
    ) -> None:
        before = self._state
        self._state = to
        self._generation += 1
        moves[0] = self.moved = next(_move_numbers)
        self._busy_until = 0.0
        self._leases = None
        self._successes = 0
        self._failed_in_a_row = self._slow_in_a_row = 0
        if to == "closed":
            self._closed_since = now
        if to not in ("open", "half_open"):
            self._until = None
        if to != "half_open":
            self._reason = None if to == "closed" else reason
        self._window.clear()
        if before != to:
            context = None if permit is None else permit.span_context or _current_span()
            self._say(Transition(
                self.name, before, to, reason, open_for, error_type, self._openings,
                adopted=adopted, span_context=context,
            ))  # fmt: skip

    def _say(self, transition: Transition) -> None:
        # Into queues and no further: in this order, whichever thread comes first after the lock.
        if self.sharing is not None and not transition.adopted and not transition.would_be:
            with guard.contained("breaker sharing"):
                self.sharing.moved(self, transition)
        worker.post(lambda: self._tell(transition))
        self._has_news = True

    def _announce(self) -> None:
        """See that somebody tells what has happened; no lock is held."""
        if self._has_news:
            self._has_news = False
            with guard.contained("breaker worker"):
                worker.start()

    def _tell(self, transition: Transition) -> None:
        for listener in (*listeners_of_all, *(entry[0] for entry in self._listeners)):
            with guard.contained("breaker listener"):
                listener(transition)

    # What other processes have found, and forks.

    def adopt(
        self,
        state: State,
        *,
        reason: str,
        open_for: float = 0.0,
        openings: int = 0,
        overriding: bool = False,
    ) -> None:
        """Take over the verdict of another process, unless this one was set by hand.

        Args:
            state: The state to be in.
            reason: Why; `manual` counts also where this one was set by hand.
            open_for: Seconds until a probe may pass, where it is open.
            openings: How many times in a row it has opened.
            overriding: Whether it counts also where this one was set by hand: it comes from a
                record that everybody writes to, and that had what was set.
        """
        with self._lock:
            now, before = self.clock(), self._state
            if before in BY_HAND and reason != "manual" and not overriding:
                return
            self._openings = openings
            if state == "open":
                self._until = now + open_for
            if state != before:
                held = open_for if state == "open" else None
                self._move(state, reason, now, open_for=held, adopted=True)
            elif state == "open":  # once more: the probe in between was not heard of
                self._reason = reason
        self._announce()

    def after_fork(self) -> None:
        """Begin anew in the child of a fork, in the state that the parent's was in."""
        self._lock = threading.RLock()
        self._generation += 1
        self._first_generation = self._generation
        self._clear()


def _current_span() -> SpanContext | None:
    context = trace.get_current_span().get_span_context()
    return context if context.is_valid else None
