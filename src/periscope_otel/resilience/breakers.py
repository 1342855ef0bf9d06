"""The breakers of this process by name, and what their calls add up to."""

from __future__ import annotations

import os
import threading
from collections import Counter
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar
from weakref import WeakValueDictionary, ref

from periscope_otel import guard
from periscope_otel.resilience.circuit import COUNTED, Circuit, listeners_of_all
from periscope_otel.resilience.policy import DEFAULT_POLICY, BreakerPolicy
from periscope_otel.telemetry.attributes import clean_label
from periscope_otel.telemetry.names import OTHER
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from periscope_otel.resilience.transition import Sharing, Transition

MOST_NAMED: Final = 240
"""Breakers with figures of their own in the metrics; further ones are added up as `other`. Each has
six series of its state: no instrument reaches its limit of label sets."""

MOST_MADE: Final = 20_000
"""Breakers that are kept because something named them; beyond that idle ones are made anew."""

MOST_WATCHED: Final = 1000
"""Breakers that are made only because client spans name their dependencies."""

_FOLD_AT: Final = 100  # tallies at first, before those of breakers that are gone are summed up

_Made = TypeVar("_Made", bound=Circuit)


class _Tally(NamedTuple):
    """The counts of one breaker, which outlive it."""

    breaker: ref[Circuit]
    label: str
    """What its figures are added up under: its name, or `other`."""
    counts: list[int]


class Breakers(Generic[_Made]):
    """The breakers of a process. Each is found by its name; the newest of a name is.

    Args:
        make: Makes a breaker of a name and a policy.
    """

    def __init__(self, make: Callable[[str, BreakerPolicy], _Made]) -> None:
        self._make = make
        self._defaults: dict[str, BreakerPolicy] = {}
        self._sharing: Sharing | None = None
        self._given: WeakValueDictionary[str, _Made] = WeakValueDictionary()
        self._forget()
        listeners_of_all.append(self._count)

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._made: dict[str, _Made] = {}
        self._watched = 0
        self._most_made = MOST_MADE
        self._tallies: list[_Tally] = []
        self._fold_at = _FOLD_AT
        self._labels: set[str] = set()
        self._past: dict[str, list[int]] = {}
        self._transitions: dict[tuple[str, str, str], int] = {}

    def __iter__(self) -> Iterator[_Made]:
        """Iterate over all that there are now, by name."""
        with self._lock:
            found = {**self._made, **dict(self._given.items())}  # items() holds on to each
        return iter([found[name] for name in sorted(found)])

    def get(self, name: str) -> _Made:
        """Return the breaker of a name, made now if there is none.

        Example:
            >>> breakers.get("urlhaus.abuse.ch").state
            'closed'
        """
        return self._made.get(name) or self.find(name) or self._new(name)

    def find(self, name: str) -> _Made | None:
        """Return the breaker of a name, if there is one."""
        found = self._given.get(name) or self._made.get(name)
        if found is None and (clean := clean_label(name)) != name:  # names are kept clean
            found = self._given.get(clean) or self._made.get(clean)
        return found

    def watched(self, name: str) -> _Made | None:
        """Return the breaker of a dependency that client spans name; None beyond a bound."""
        found = self._made.get(name) or self.find(name)
        if found is not None:
            return found
        if self._watched >= MOST_WATCHED:
            if self._watched == MOST_WATCHED:
                self._watched += 1
                worker.post(_warn_of_many)  # a handler of the log may be slow, and a call waits
            return None
        made = self._new(name)
        self._watched += 1
        return made

    def defaults(self, pattern: str, policy: BreakerPolicy | None = None, **changes: Any) -> None:
        """Say how breakers are made whose name matches; the last pattern that matches counts.

        Args:
            pattern: As for file names: `"*.abuse.ch"`.
            policy: Their settings; the usual ones by default.
            **changes: Single settings of `BreakerPolicy`, put over them.

        Raises:
            ValueError: If a setting is out of its range.
            TypeError: If there is no such setting.

        Example:
            >>> breakers.defaults("*.abuse.ch", slow_threshold=20.0)
        """
        base = DEFAULT_POLICY if policy is None else policy
        if not isinstance(base, BreakerPolicy):
            raise TypeError(
                f"breakers {pattern!r:.40}: expected a BreakerPolicy, not {type(base).__name__}"
            )
        policy = base.changed(**changes) if changes else base
        with self._lock:
            self._defaults.pop(pattern, None)
            self._defaults[pattern] = policy

    def policy_for(self, name: str) -> BreakerPolicy:
        """Return the settings that a breaker of this name is made with."""
        with self._lock:
            matching = [p for pattern, p in self._defaults.items() if fnmatchcase(name, pattern)]
        return matching[-1] if matching else DEFAULT_POLICY

    def _new(self, name: str) -> _Made:
        with self._lock:
            found = self.find(name)
            if found is None:
                found = self._make(name, self.policy_for(name))
                self._given.pop(found.name, None)
                if len(self._made) >= self._most_made:
                    self._drop_idle()
                self._made[found.name] = found
            return found

    def _drop_idle(self) -> None:
        """Make room: of those made by name, drop a tenth that have nothing to remember."""
        idle = (name for name, one in self._made.items() if one.is_idle)
        for name in list(islice(idle, MOST_MADE // 10)):
            del self._made[name]
        # Where none can be spared it is not looked for one at every call.
        self._most_made = max(MOST_MADE, len(self._made) + MOST_MADE // 10)

    def add(self, breaker: _Made) -> None:
        """Have a breaker found by its name."""
        with self._lock:
            before = self.find(breaker.name)
            self._made.pop(breaker.name, None)
            self._given[breaker.name] = breaker
            label = self._label(breaker.name)
            self._tallies.append(_Tally(ref(breaker), label, breaker.counts))
            if len(self._tallies) > self._fold_at:
                self._fold()
            breaker.sharing = self._sharing if breaker.policy.shared else None
        if before is not None and before.policy != breaker.policy:
            guard.warn(
                f"breaker {breaker.name}",
                "there are two breakers %s with different settings: the newer one is used "
                "where the name is given",
                breaker.name,
            )

    def share(self, sharing: Sharing | None) -> None:
        """Have other processes told of all verdicts, or no longer."""
        with self._lock:
            self._sharing = sharing
            for breaker in self._live():
                breaker.sharing = sharing if breaker.policy.shared else None

    # Figures, for metrics.

    def states(self) -> dict[tuple[str, str], int]:
        """Return how many breakers that are found by their name are in each state, by label."""
        with self._lock:
            found = {**self._made, **dict(self._given.items())}
            labels = self._labels
            return Counter(
                (name if name in labels else OTHER, breaker.state)
                for name, breaker in found.items()
            )

    def totals(self) -> dict[str, dict[str, int]]:
        """Return what calls have come to, by label and outcome, `rejected` among these."""
        with self._lock:
            self._fold()
            totals = {label: list(counts) for label, counts in self._past.items()}
            for tally in self._tallies:
                _add(totals, tally.label, tally.counts)
        return {label: dict(zip(COUNTED, counts, strict=True)) for label, counts in totals.items()}

    def transitions(self) -> dict[tuple[str, str, str], int]:
        """Return how often breakers have changed, by label, old and new state."""
        with self._lock:
            return dict(self._transitions)

    def _label(self, name: str) -> str:
        """Return what a breaker's figures are added up under: the names that come first stay."""
        if name in self._labels:
            return name
        if len(self._labels) >= MOST_NAMED:
            return OTHER
        self._labels.add(name)
        return name

    def _count(self, transition: Transition) -> None:
        if transition.would_be:
            return
        with self._lock:
            label = transition.name if transition.name in self._labels else OTHER
            key = label, transition.from_state, transition.to_state
            self._transitions[key] = self._transitions.get(key, 0) + 1

    def _fold(self) -> None:
        """Keep only the sums of breakers that are gone."""
        living = []
        for tally in self._tallies:
            if tally.breaker() is None:
                _add(self._past, tally.label, tally.counts)
            else:
                living.append(tally)
        self._tallies = living
        self._fold_at = 2 * len(living) + _FOLD_AT

    def _live(self) -> list[Circuit]:
        found = (tally.breaker() for tally in self._tallies)
        return [breaker for breaker in found if breaker is not None]

    # Tests, and forks.

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Begin at nothing for a block, such as a test; what was there before is there after.

        Breakers that were made by name are new ones in the block; those that somebody holds stay,
        and so do the defaults, without those that the block adds.
        """
        with self._lock:
            before = dict(vars(self))
            counts = [(tally, list(tally.counts)) for tally in self._tallies]
            self._made, self._watched, self._past, self._transitions = {}, 0, {}, {}
            self._defaults, self._labels = dict(self._defaults), set(self._labels)
            self._tallies = list(self._tallies)
            for tally, _ in counts:
                tally.counts[:] = [0] * len(tally.counts)
        try:
            yield
        finally:
            with self._lock:
                for tally, values in counts:
                    tally.counts[:] = [a + b for a, b in zip(tally.counts, values, strict=True)]
                known = {id(tally.counts) for tally, _ in counts}
                begun = [tally for tally in self._tallies if id(tally.counts) not in known]
                for tally in begun:  # somebody may hold it, and it counts from here on
                    tally.counts[:] = [0] * len(tally.counts)
                for name in ("_made", "_watched", "_past", "_transitions", "_defaults", "_labels"):
                    setattr(self, name, before[name])
                self._tallies = [tally for tally, _ in counts] + begun

    def after_fork(self) -> None:
        """Begin anew in the child of a fork: it must not repeat what its parent counted."""
        self._lock = threading.RLock()
        for breaker in self._live():
            breaker.after_fork()
        for tally in self._tallies:
            tally.counts[:] = [0] * len(tally.counts)
        self._past, self._transitions = {}, {}


def _warn_of_many() -> None:
    guard.warn(
        "watched breakers",
        "client spans name more than %d dependencies: further ones have no breaker. "
        "Map them to fewer names with a matcher",
        MOST_WATCHED,
    )


def _add(totals: dict[str, list[int]], label: str, counts: list[int]) -> None:
    known = totals.get(label)
    if known is None:
        totals[label] = list(counts)
        return
    for index, count in enumerate(counts):
        known[index] += count


def renew_in_children(breakers: Breakers[Any]) -> None:
    """Have the child of every fork begin anew."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=breakers.after_fork)
