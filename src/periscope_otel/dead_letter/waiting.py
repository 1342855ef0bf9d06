"""What takes letters while the folder of the queue cannot be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from periscope_otel.dead_letter.memory import LettersInMemory
from periscope_otel.telemetry.letter_counts import letter_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from periscope_otel.dead_letter.letter import Letter
    from periscope_otel.dead_letter.loss import OnLost
    from periscope_otel.dead_letter.queue import DeadLetterQueue, Where


class WaitingLetters:
    """Keeps letters in memory, within bounds, until the queue can be opened.

    Args:
        on_lost: Called with each letter that there was no room for, and why.
    """

    def __init__(self, on_lost: OnLost | None) -> None:
        self._on_lost = on_lost
        self._memory = LettersInMemory()
        self._queue: DeadLetterQueue | None = None
        """The one that was opened since."""

    def put(self, letters: Sequence[Letter], *, journalled: bool = False) -> Where:
        """Keep letters; see `DeadLetterQueue`."""
        where: Where = "memory"
        for letter in letters:
            if self._memory.add(letter):
                letter_counts.put(letter.queue, "memory")
            elif self._queue is not None:
                self._queue.put([letter], journalled=journalled)
            else:
                where = "lost"
                self._lose(letter)
        return where

    def journal(self, letter: Letter) -> bool:
        """Count that a payload could not be written down."""
        letter_counts.put(letter.queue, "not_journalled")
        return False

    def forget(self, ids: Sequence[str]) -> None:
        """Do nothing: it has no journal."""

    def move_to(self, queue: DeadLetterQueue) -> None:
        """Put all that waits into the queue, which can be opened now."""
        self._queue = queue
        for letter in self._memory.close():
            queue.put([letter], counted=True)

    def lose(self) -> None:
        """Say of all that waits that it is lost."""
        for letter in self._memory.close():
            self._lose(letter)

    def _lose(self, letter: Letter) -> None:
        from periscope_otel.dead_letter.loss import lose

        lose(letter, "folder", "the folder of dead letters cannot be used", self._on_lost)
