"""Letters in memory, within bounds, until something takes them that survives the process."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from periscope_otel.dead_letter.letter import Letter

MOST: Final = 1000
"""Letters that are kept."""
MOST_BYTES: Final = 64 << 20
"""Bytes of their payloads."""


class LettersInMemory:
    """A bounded queue of letters; those that are taken count until they are done with."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler's letter may come while it is held
        self._letters: deque[Letter] = deque()
        self._count = 0
        self._size = 0
        self._closed = False

    def __len__(self) -> int:
        with self._lock:
            return self._count

    def add(self, letter: Letter) -> bool:
        """Keep a letter; returns whether there was room, and it is not closed."""
        size = len(letter.body)
        with self._lock:
            fits = self._count < MOST and self._size + size <= MOST_BYTES
            if self._closed or not fits:
                return False
            self._letters.append(letter)
            self._count += 1
            self._size += size
        return True

    def take(self, most: int) -> list[Letter]:
        """Return the oldest letters, to be put back or said to be done with."""
        with self._lock:
            return [self._letters.popleft() for _ in range(min(most, len(self._letters)))]

    def put_back(self, letters: Sequence[Letter]) -> bool:
        """Keep letters that were taken after all; returns whether it is not closed."""
        with self._lock:
            if not self._closed:
                self._letters.extendleft(reversed(letters))
                return True
            self.done_with(letters)
        return False

    def done_with(self, letters: Sequence[Letter]) -> None:
        """Give up the room of letters that were taken."""
        with self._lock:
            self._count -= len(letters)
            self._size -= sum(len(letter.body) for letter in letters)

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""
        return self._closed

    def close(self) -> list[Letter]:
        """Take no more, and return what is left."""
        with self._lock:
            self._closed = True
            left = list(self._letters)
            self._letters.clear()
            self.done_with(left)
        return left
