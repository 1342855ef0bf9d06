"""What of an operation becomes a dead letter: what `monitored` and `operation` are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ITEMS: Final = "items"
"""What `dead_letter=` is given for letters of failed items alone."""


class Call(NamedTuple):
    """The call that an operation stands for."""

    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class LetterPolicy(NamedTuple):
    """What of an operation becomes a dead letter, as `monitored` was told."""

    queue: str = "default"
    items: bool = False
    """Letters of failed items alone, also where the operation itself fails."""
    payload: Callable[[dict[str, Any]], object] | None = None
    key: Callable[[dict[str, Any]], object] | None = None
    journal: bool = False
    rejected: bool = False


def policy_of(
    dead_letter: bool | str,
    payload: Callable[[dict[str, Any]], object] | None = None,
    key: Callable[[dict[str, Any]], object] | None = None,
    *,
    journal: bool = False,
    rejected: bool = False,
) -> LetterPolicy | None:
    """Return what `monitored` was told about dead letters; None for none.

    Raises:
        TypeError: If `dead_letter` is neither True nor a text, or another argument needs it.
        ValueError: If it is no name of a queue.
    """
    if dead_letter is False:
        if payload is not None or key is not None or journal or rejected:
            raise TypeError(
                "payload=, idempotency_key=, journal= and dead_letter_rejected= say what becomes "
                "of dead letters: give dead_letter=True too"
            )
        return None
    if dead_letter is not True and not isinstance(dead_letter, str):
        raise TypeError(f"dead_letter= takes True or a text, not {type(dead_letter).__name__}")
    for what, value in (("payload", payload), ("idempotency_key", key)):
        if value is not None and not callable(value):
            raise TypeError(f"{what}= takes a callable, not {type(value).__name__}")
    # Now, and not by those who keep no letters; a failure is no time to import anything.
    from periscope_otel.dead_letter.in_use import in_use
    from periscope_otel.dead_letter.names import queue_name

    queue = "default" if dead_letter is True or dead_letter == ITEMS else queue_name(dead_letter)
    in_use.want(queue)
    return LetterPolicy(queue, dead_letter == ITEMS, payload, key, journal, rejected)
