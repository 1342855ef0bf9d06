"""The metric instruments of circuit breakers: they only read what the breakers have counted."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, Protocol

from opentelemetry.metrics import Observation

from periscope_otel.telemetry import names
from periscope_otel.telemetry.callbacks import contained

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from opentelemetry.metrics import Meter

MOST_NAMED: Final = 240
"""Breakers with series of their own, of which each has six of its state; further ones are added up
as `other`, so that no instrument reaches the limit of label sets."""


class BreakerFigures(Protocol):
    """What knows the breakers of this process."""

    def states(self) -> Iterable[tuple[str, str]]:
        """Return the name and the state of each breaker."""
        ...

    def totals(self) -> Mapping[str, Mapping[str, int]]:
        """Return the calls that have ended by name and outcome, `rejected` among these."""
        ...

    def transitions(self) -> Mapping[tuple[str, str, str], int]:
        """Return the changes by name, old and new state."""
        ...


class _Source:
    """Where the figures come from; set where the breakers are."""

    figures: BreakerFigures | None = None


source: Final = _Source()
"""That of this process."""


def create_breaker_instruments(meter: Meter) -> None:
    """Make the instruments on a meter; once for each."""
    observed = _Observed()
    for create, metric, observe in (
        (meter.create_observable_gauge, names.BREAKER_STATES, observed.states),
        (meter.create_observable_counter, names.BREAKER_TRANSITIONS, observed.transitions),
        (meter.create_observable_counter, names.BREAKER_CALLS, observed.calls),
        (meter.create_observable_counter, names.BREAKER_REJECTIONS, observed.rejections),
    ):
        create(metric.name, [contained(observe)], metric.unit, metric.description)


class _Observed:
    """The figures under a bounded number of names: those seen first keep theirs."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def _name(self, name: str) -> str:
        if name in self._named:
            return name
        if len(self._named) >= MOST_NAMED:
            return names.OTHER
        self._named.add(name)
        return name

    def states(self) -> Iterator[Observation]:
        if source.figures is None:
            return
        found: dict[str, Counter[str]] = {}
        for name, state in source.figures.states():
            found.setdefault(self._name(name), Counter())[state] += 1
        for name, states in found.items():
            for state in STATES:
                yield Observation(
                    states[state], {names.BREAKER_NAME: name, names.BREAKER_STATE: state}
                )

    def transitions(self) -> Iterator[Observation]:
        if source.figures is None:
            return
        found: Counter[tuple[str, str, str]] = Counter()
        for (name, before, after), count in source.figures.transitions().items():
            found[self._name(name), before, after] += count
        for (name, before, after), count in found.items():
            attributes = {names.BREAKER_FROM: before, names.BREAKER_TO: after}
            yield Observation(count, {names.BREAKER_NAME: name, **attributes})

    def calls(self) -> Iterator[Observation]:
        for (name, outcome), count in self._totals().items():
            if outcome != REJECTED:
                attributes = {names.BREAKER_NAME: name, names.BREAKER_CALL_OUTCOME: outcome}
                yield Observation(count, attributes)

    def rejections(self) -> Iterator[Observation]:
        for (name, outcome), count in self._totals().items():
            if outcome == REJECTED:
                yield Observation(count, {names.BREAKER_NAME: name})

    def _totals(self) -> Counter[tuple[str, str]]:
        found: Counter[tuple[str, str]] = Counter()
        for name, outcomes in () if source.figures is None else source.figures.totals().items():
            for outcome, count in outcomes.items():
                found[self._name(name), outcome] += count
        return found


STATES: Final = ("closed", "open", "half_open", "forced_open", "disabled", "observe")
"""Every state that a breaker can be in."""

REJECTED: Final = "rejected"
"""What calls that were not made are counted as."""
