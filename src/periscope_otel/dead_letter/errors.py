"""What can go wrong with dead letters, and what the message of each says to do."""

from __future__ import annotations


class DeadLetterError(Exception):
    """Something about dead letters could not be done; the message says what and why."""


class DamagedLetterError(DeadLetterError):
    """What was stored is not what was written."""


class StoreError(DeadLetterError):
    """The store cannot be used, or not now."""


class StoreFullError(StoreError):
    """The store has reached its limit; nothing was stored."""


class RefusedError(StoreError):
    """The store is well, and does not take this letter; others it may take."""


class PayloadElsewhereError(DeadLetterError):
    """The payload is in a file of another host, which the message names."""


class CannotReplayError(DeadLetterError):
    """The payload cannot be handed to its operation; the message says why."""
