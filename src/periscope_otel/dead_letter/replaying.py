"""What operations know of a replay that they run in."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from periscope_otel.dead_letter.draft import Cause


class Replaying:
    """A letter that is being replayed, and how the operation that it is for ended.

    Args:
        letter_id: The letter's.
        operation: The name of the operation that the letter is for.
        feed: Its feed, which may have been that of an operation around it.
        key: Its idempotency key.
        identity: What it shares with letters of the same payload.
    """

    def __init__(
        self, letter_id: str, operation: str, feed: str | None, key: str, identity: str
    ) -> None:
        self.letter_id = letter_id
        self.operation = operation
        self.feed = feed
        self.key = key
        self.identity = identity
        self.begun = False
        """Whether its operation has begun: a further one of that name is one of its own."""
        self.cause: Cause | None = None
        """Why it failed again; None as long as it has not."""
        self.outcome: str | None = None
        """How its operation ended, once it has."""

    def takes(self, operation: str) -> bool:
        """Whether an operation that begins now is the one that is replayed; once at most."""
        if self.begun or operation != self.operation:
            return False
        self.begun = True
        return True


REPLAYING: Final[ContextVar[Replaying | None]] = ContextVar("periscope-replaying", default=None)
"""The replay that the code runs in."""
