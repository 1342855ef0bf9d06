"""The forwarder: moves letters from the outbox to the store, for all processes that share a file.

One process at a time does it, the one that holds a file lock; if it dies, another takes over where
it stopped. Every step may be repeated without harm, since a store knows a letter by its id. A store
that is unwell is left alone for a while; a single letter that it refuses waits by itself.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from periscope_otel import guard
from periscope_otel.dead_letter.errors import DeadLetterError, RefusedError, StoreError
from periscope_otel.dead_letter.locks import ProcessLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from periscope_otel.dead_letter.letter import Letter
    from periscope_otel.dead_letter.outbox import Kept, Outbox
    from periscope_otel.dead_letter.store import Store

SHORTEST_WAIT: Final = 0.5
LONGEST_WAIT: Final = 30.0
"""Seconds to leave a store alone that failed; doubled each time, with full jitter."""


class _InAQueue(Protocol):
    @property
    def queue(self) -> str: ...


_One = TypeVar("_One", bound=_InAQueue)


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
        for own in _by_queue(letters):
            self._put(own)
        return bool(letters)

    def _check_again(self) -> bool:
        """Put once more what the store has forgotten, and let go of what it still has."""
        due = self._outbox.due()
        for own in _by_queue(due):
            self._check(own)
        return bool(due)

    def _check(self, due: Sequence[Kept]) -> None:
        missing = set(self._store.missing([one.id for one in due], due[0].queue))
        self._outbox.let_go([one for one in due if one.id not in missing])
        if forgotten := [one for one in due if one.id in missing]:
            self._put(self._outbox.read(forgotten))  # what does not fit is due again in a moment

    def _put(self, letters: Sequence[Letter]) -> None:
        """Put letters of one queue, and note what became of them.

        Where the store refuses them, halves of them are put, so that only those wait which it
        refuses by themselves.
        """
        if not letters:
            return
        try:
            self._store.put(letters)
        except RefusedError as error:
            if len(letters) == 1:
                self._set_back(letters[0], error)
                return
            half = len(letters) // 2
            self._put(letters[:half])
            self._put(letters[half:])
        else:
            self._outbox.taken(letters)

    def _set_back(self, letter: Letter, error: RefusedError) -> None:
        minutes = self._outbox.refused(letter) / 60
        guard.warn(
            "refused letter",
            "the dead letter %s of queue %s is refused and waits for %.0f minutes: %s",
            letter.id,
            letter.queue,
            minutes,
            error,
        )

    def _leave_it_alone(self, error: DeadLetterError) -> None:
        self._failures += 1
        longest = min(LONGEST_WAIT, SHORTEST_WAIT * 2 ** min(self._failures, 10))
        self._not_before = self._clock() + random.uniform(SHORTEST_WAIT, longest)  # noqa: S311
        guard.warn("dead letter store", "dead letters wait in the outbox: %s", error)


def _by_queue(those: Iterable[_One]) -> Iterable[list[_One]]:
    """Return letters of several queues as a list for each."""
    queues: defaultdict[str, list[_One]] = defaultdict(list)
    for one in those:
        queues[one.queue].append(one)
    return queues.values()
