"""Callbacks of observable instruments that cannot raise, since that would end a whole collect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from periscope_otel import guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.metrics import CallbackOptions, Observation


def contained(
    observe: Callable[[], Iterable[Observation]],
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    """Make an SDK callback of `observe`; where it fails there are no observations."""

    def callback(_options: CallbackOptions) -> Iterable[Observation]:
        try:
            return list(observe())
        except Exception as error:  # noqa: BLE001
            guard.report(f"observing {observe.__name__}", error)
            return []

    return callback
