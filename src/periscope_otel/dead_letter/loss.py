"""What becomes of a letter that cannot be kept: it is counted, logged and handed to the user."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from periscope_otel import guard
from periscope_otel.telemetry.letter_counts import letter_counts

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from periscope_otel.dead_letter.letter import Letter

    OnLost: TypeAlias = Callable[[Letter, str], object]

logger = logging.getLogger("periscope_otel")


def lose(letter: Letter, reason: str, why: str, on_lost: OnLost | None = None) -> None:
    """Say, count and hand over that a letter could not be kept.

    Args:
        letter: Which.
        reason: A word for the metric.
        why: For people.
        on_lost: The user's hook.
    """
    letter_counts.lost(letter.queue, reason)
    with suppress(Exception):  # a handler of the application's: the others are to be told of too
        logger.error(
            "periscope-otel LOST the dead letter %s of operation %s (feed %s, %s): %s",
            letter.id,
            letter.operation,
            letter.feed,
            letter.error_type,
            why,
        )
    if on_lost is not None:
        try:
            on_lost(letter, why)
        except Exception as error:  # noqa: BLE001  (the user's hook must not lose the others)
            guard.warn("on_lost", "on_lost raised %s", type(error).__name__)
