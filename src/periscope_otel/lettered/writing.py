"""Letters on their way from an operation to the queue that is in use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from periscope_otel import guard
from periscope_otel.dead_letter.in_use import in_use

if TYPE_CHECKING:
    from collections.abc import Sequence

    from periscope_otel.dead_letter.letter import Letter


def put_contained(letters: Sequence[Letter], *, journalled: bool = False) -> None:
    """Write letters; an error of ours on the way is contained."""
    with guard.contained("dead letter"):
        put(letters, journalled=journalled)


def put(letters: Sequence[Letter], *, journalled: bool = False) -> None:
    """Write letters; those that an error of ours keeps from it are lost, said and counted.

    Args:
        letters: Perhaps none.
        journalled: Whether they leave the journal with it.
    """
    if not letters:
        return
    try:
        in_use.box().put(letters, journalled=journalled)
    except Exception:
        from periscope_otel.dead_letter.loss import lose

        for letter in letters:
            lose(letter, "internal", "an error of the plugin's own", in_use.usable.on_lost)
        raise
