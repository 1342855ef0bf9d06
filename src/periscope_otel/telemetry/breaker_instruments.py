"""The metric instruments of circuit breakers: they only read what the breakers have counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from opentelemetry.metrics import Observation

from periscope_otel.telemetry import names
from periscope_otel.telemetry.callbacks import contained

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from opentelemetry.metrics import Meter


class BreakerFigures(Protocol):
    """What knows the breakers of this process; a bounded number of them by name, as labels."""

    def states(self) -> Mapping[tuple[str, str], int]:
        """Return how many breakers there are by label and state."""
        ...

    def totals(self) -> Mapping[str, Mapping[str, int]]:
        """Return the calls that have ended by label and outcome, `rejected` among these."""
        ...

    def transitions(self) -> Mapping[tuple[str, str, str], int]:
        """Return the changes by label, old and new state."""
        ...


class _Source:
    """Where the figures come from; set where the breakers are."""

    figures: BreakerFigures | None = None


source: Final = _Source()
"""That of this process."""


def create_breaker_instruments(meter: Meter) -> None:
    """Make the instruments on a meter; once for each."""
    for create, metric, observe in (
        (meter.create_observable_gauge, names.BREAKER_STATES, _states),
        (meter.create_observable_counter, names.BREAKER_TRANSITIONS, _transitions),
        (meter.create_observable_counter, names.BREAKER_CALLS, _calls),
        (meter.create_observable_counter, names.BREAKER_REJECTIONS, _rejections),
    ):
        create(metric.name, [contained(observe)], metric.unit, metric.description)


def _states() -> Iterator[Observation]:
    found = {} if source.figures is None else source.figures.states()
    for name in {name for name, _ in found}:
        for state in STATES:
            attributes = {names.BREAKER_NAME: name, names.BREAKER_STATE: state}
            yield Observation(found.get((name, state), 0), attributes)


def _transitions() -> Iterator[Observation]:
    found = {} if source.figures is None else source.figures.transitions()
    for (name, before, after), count in found.items():
        attributes = {names.BREAKER_FROM: before, names.BREAKER_TO: after}
        yield Observation(count, {names.BREAKER_NAME: name, **attributes})


def _calls() -> Iterator[Observation]:
    for name, outcomes in _totals().items():
        for outcome, count in outcomes.items():
            if outcome != REJECTED:
                attributes = {names.BREAKER_NAME: name, names.BREAKER_CALL_OUTCOME: outcome}
                yield Observation(count, attributes)


def _rejections() -> Iterator[Observation]:
    for name, outcomes in _totals().items():
        yield Observation(outcomes[REJECTED], {names.BREAKER_NAME: name})


def _totals() -> Mapping[str, Mapping[str, int]]:
    return {} if source.figures is None else source.figures.totals()


STATES: Final = ("closed", "open", "half_open", "forced_open", "disabled", "observe")
"""Every state that a breaker can be in."""

REJECTED: Final = "rejected"
"""What calls that were not made are counted as."""
