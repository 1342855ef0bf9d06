"""The forwarder: moves letters from the outbox to the store, for all processes that share a file.

One process at a time does it, the one that holds a file lock; if it dies, another takes over where
it stopped. Every step may be repeated without harm, since a store knows a letter by its id.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from periscope_otel import guard
from periscope_otel.dead_letter.errors import DeadLetterError, StoreError
from periscope_otel.dead_letter.locks import ProcessLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from periscope_otel.dead_letter.letter import Letter
    from periscope_otel.dead_letter.outbox import Outbox
    from periscope_otel.dead_letter.store import Put, Store

SHORTEST_WAIT: Final = 0.5
LONGEST_WAIT: Final = 30.0
"""Seconds to leave a store alone that failed; doubled each time, with full jitter."""


class Forwarder:
    """Moves letters, a batch at a time, when it is this process's turn.

    Args:
        outbox: Where from.
        store: Where to.
        clock: Monotonic seconds.
    """

    def __init__(
        self, outbox: Outbox, store: Store, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._outbox = outbox
        self._store = store
        self._clock = clock
        self._lock = ProcessLock(outbox.database.path.with_suffix(".forwarder"))
        self._failures = 0
        self._not_before = 0.0

    def release(self) -> None:
        """Let another process forward."""
        self._lock.release()

    def round(self) -> bool:
        """Do what is to be done now, if it is this process's turn.

        Returns:
            Whether there may be more to do at once.
        """
        if self._clock() < self._not_before or not self._lock.acquire():
            return False
        try:
            moved = self._forward()
            checked = self._check_again()
        except StoreError as error:
            self._leave_it_alone(error)
            return False
        self._failures = 0
        return moved or checked

    def _forward(self) -> bool:
        letters = self._outbox.next()
        if letters:
            self._put(letters)
            self._outbox.taken(letters)
        return bool(letters)

    def _check_again(self) -> bool:
        """Put once more what the store has forgotten, and let go of what it still has."""
        due = self._outbox.due()
        letters = self._outbox.read(due) if due else []
        if letters:
            answers = self._put(letters)  # a store that has one, or has done with it, says so
            self._outbox.let_go([one for one in due if answers.get(one.id) == "known"])
            # What it had forgotten is as if it had been taken only now.
            self._outbox.taken([one for one in letters if answers[one.id] != "known"])
        return bool(letters)

    def _put(self, letters: list[Letter]) -> dict[str, Put]:
        by_queue: defaultdict[str, list[Letter]] = defaultdict(list)
        for letter in letters:
            by_queue[letter.queue].append(letter)
        answers: dict[str, Put] = {}
        for own in by_queue.values():
            found = self._store.put(own)
            answers |= {letter.id: one for letter, one in zip(own, found, strict=True)}
        return answers

    def _leave_it_alone(self, error: DeadLetterError) -> None:
        self._failures += 1
        longest = min(LONGEST_WAIT, SHORTEST_WAIT * 2 ** min(self._failures, 10))
        self._not_before = self._clock() + random.uniform(SHORTEST_WAIT, longest)  # noqa: S311
        guard.warn("dead letter store", "dead letters wait in the outbox: %s", error)
