"""The metric instruments of dead letters: they only read what `letter_counts` holds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from opentelemetry.metrics import Observation

from periscope_otel.telemetry import names
from periscope_otel.telemetry.callbacks import contained
from periscope_otel.telemetry.letter_counts import letter_counts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from opentelemetry.metrics import Meter


def create_letter_instruments(meter: Meter) -> None:
    """Make the instruments on a meter; once for each."""
    for create, metric, observe in (
        (meter.create_observable_gauge, names.DEAD_LETTERS, _letters),
        (meter.create_observable_counter, names.DEAD_LETTER_PUTS, _puts),
        (meter.create_observable_counter, names.DEAD_LETTER_REPLAYS, _replays),
        (meter.create_observable_counter, names.DEAD_LETTERS_LOST, _lost),
        (meter.create_observable_gauge, names.DEAD_LETTER_AGE, _oldest),
        (meter.create_observable_gauge, names.OUTBOX_LETTERS, _outbox_letters),
        (meter.create_observable_gauge, names.OUTBOX_AGE, _outbox_age),
    ):
        create(metric.name, [contained(observe)], metric.unit, metric.description)


def _letters() -> Iterator[Observation]:
    for queue, depth in letter_counts.depths().items():
        for state, letters in depth.letters.items():
            yield _in_state(letters, queue, state)
    if (outbox := letter_counts.outbox()) is not None:
        for queue, letters in outbox.by_queue.items():
            yield _in_state(letters, queue, "pending")


def _in_state(letters: int, queue: str, state: str) -> Observation:
    return Observation(letters, {names.DEAD_LETTER_QUEUE: queue, names.DEAD_LETTER_STATE: state})


def _puts() -> Iterator[Observation]:
    return _counted(letter_counts.puts(), names.DEAD_LETTER_OUTCOME)


def _replays() -> Iterator[Observation]:
    return _counted(letter_counts.replays(), names.DEAD_LETTER_OUTCOME)


def _lost() -> Iterator[Observation]:
    return _counted(letter_counts.losses(), names.DEAD_LETTER_REASON)


def _counted(counts: Mapping[tuple[str, str], int], about: str) -> Iterator[Observation]:
    for (queue, value), count in counts.items():
        yield Observation(count, {names.DEAD_LETTER_QUEUE: queue, about: value})


def _oldest() -> Iterator[Observation]:
    for queue, depth in letter_counts.depths().items():
        yield Observation(_age(depth.oldest), {names.DEAD_LETTER_QUEUE: queue})


def _outbox_letters() -> Iterator[Observation]:
    if (outbox := letter_counts.outbox()) is not None:
        yield Observation(outbox.letters)


def _outbox_age() -> Iterator[Observation]:
    if (outbox := letter_counts.outbox()) is not None:
        yield Observation(_age(outbox.oldest))


def _age(since: float | None) -> float:
    """Return seconds since then; 0 where nothing waits."""
    return 0.0 if since is None else max(0.0, time.time() - since)
