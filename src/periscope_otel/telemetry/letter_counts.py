"""What became of dead letters in this process, and how many there are: numbers, for instruments.

Counters are added to where something happens. How many letters a store has is a snapshot that a
background thread takes now and then, so that a collect costs the same whatever the depth.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

FRESH: Final = 20.0
"""Seconds after which a snapshot is too old to be told of."""


class Depth(NamedTuple):
    """How many letters a queue has at one moment."""

    letters: Mapping[str, int]
    """By state."""
    oldest: float | None
    """Unix time at which the dead letter failed that has been so for longest."""


class OutboxDepth(NamedTuple):
    """How many letters wait on this machine for the store."""

    letters: int
    oldest: float | None
    """Unix time at which the oldest of them was put."""
    by_queue: Mapping[str, int]
    """How many of each queue."""


class LetterCounts:
    """Numbers about dead letters.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.clear()

    def clear(self) -> None:
        """Start from nothing: the child of a fork must not repeat what its parent counted."""
        self._lock = threading.RLock()
        self._puts: dict[tuple[str, str], int] = {}
        self._replays: dict[tuple[str, str], int] = {}
        self._lost: dict[tuple[str, str], int] = {}
        self._depths: dict[str, Depth] = {}
        self._outbox: OutboxDepth | None = None
        self._depths_at = self._outbox_at = 0.0

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Begin at nothing for a block, such as a test; what was there before is there after."""
        before = dict(vars(self))
        self.clear()
        try:
            yield
        finally:
            vars(self).update(before)

    def put(self, queue: str, outcome: str, count: int = 1) -> None:
        """Count letters of a queue that were kept, by where: `disk` or `memory`."""
        self._add(self._puts, queue, outcome, count)

    def replayed(self, queue: str, outcome: str, count: int = 1) -> None:
        """Count replays by how they ended."""
        self._add(self._replays, queue, outcome, count)

    def lost(self, queue: str, reason: str, count: int = 1) -> None:
        """Count letters that could not be kept, by a word for the reason."""
        self._add(self._lost, queue, reason, count)

    def _add(self, counts: dict[tuple[str, str], int], queue: str, about: str, count: int) -> None:
        with self._lock:
            counts[queue, about] = counts.get((queue, about), 0) + count

    def take(self, depths: Mapping[str, Depth]) -> None:
        """Take a snapshot of the store, by queue."""
        with self._lock:
            self._depths, self._depths_at = dict(depths), self._clock()

    def take_outbox(self, outbox: OutboxDepth | None) -> None:
        """Take a snapshot of the outbox, if there is one: it is here while the store is away."""
        with self._lock:
            self._outbox, self._outbox_at = outbox, self._clock()

    def puts(self) -> dict[tuple[str, str], int]:
        """Return the letters that were kept, by queue and where."""
        with self._lock:
            return dict(self._puts)

    def replays(self) -> dict[tuple[str, str], int]:
        """Return the replays by queue and outcome."""
        with self._lock:
            return dict(self._replays)

    def losses(self) -> dict[tuple[str, str], int]:
        """Return the letters that were lost, by queue and reason."""
        with self._lock:
            return dict(self._lost)

    def depths(self) -> dict[str, Depth]:
        """Return the latest snapshot by queue; nothing once it is too old."""
        with self._lock:
            return dict(self._depths) if self._is_fresh(self._depths_at) else {}

    def outbox(self) -> OutboxDepth | None:
        """Return the latest snapshot of the outbox; None if there is none or it is too old."""
        with self._lock:
            return self._outbox if self._is_fresh(self._outbox_at) else None

    def _is_fresh(self, taken_at: float) -> bool:
        return self._clock() - taken_at <= FRESH


letter_counts: Final = LetterCounts()
"""Those of this process."""
