"""The dead-letter queue of a process: one local write for a letter, and its way on from there.

With a Redis the letter goes into an outbox file, from which a forwarder moves it on; without one
the file is the store. Where the file cannot be written to (disk full, or held by others for too
long) the letter is kept in memory, within bounds, and goes on from there as soon as anything takes
it. What cannot even be kept so is lost: it is counted, logged and handed to `on_lost`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from periscope_otel import guard
from periscope_otel.dead_letter.errors import StoreError
from periscope_otel.dead_letter.forwarder import Forwarder
from periscope_otel.dead_letter.outbox import MOST_LETTERS, Outbox
from periscope_otel.dead_letter.sqlite_store import SQLiteStore
from periscope_otel.dead_letter.store import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from periscope_otel.dead_letter.letter import Letter
    from periscope_otel.dead_letter.store import Store

logger = logging.getLogger("periscope_otel")

Where = Literal["disk", "memory", "lost"]
"""Where a letter is once it was put; memory does not survive the process."""

FILE: Final = "dead-letters.db"

BUSY: Final = 0.25
"""Seconds that a letter waits for others who write to the file."""

BEAT: Final = 0.2
"""Seconds between two rounds of the background thread."""

MOST_IN_MEMORY: Final = 1000
MOST_BYTES_IN_MEMORY: Final = 64 << 20

LARGEST_FILE: Final = 1 << 30
"""Bytes that the file may grow to, unless another size is asked for."""


_ENDED: Final = "the queue was closed before it could be written"


class DeadLetterQueue:
    """Takes letters, for any number of threads, processes and forks that share a folder.

    Args:
        folder: Where its file is; made if it is not there, for this user alone.
        redis_url: Where letters go to; by default the file itself is their store.
        largest_file: Bytes that the file may grow to.
        on_lost: Called with each letter that could not be kept, and why.
        clock: Monotonic seconds.

    Raises:
        StoreError: If the folder cannot be used, or the URL cannot.

    Example:
        >>> with DeadLetterQueue("/var/lib/feeds") as queue:
        ...     queue.put([letter])
        'disk'
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        redis_url: str | None = None,
        largest_file: int = LARGEST_FILE,
        on_lost: Callable[[Letter, str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        path = Path(folder) / FILE
        self.store: Store
        """Where the letters end up."""
        if redis_url is None:
            self._file: SQLiteStore | Outbox = SQLiteStore(
                path, synchronous="FULL", busy=BUSY, checkpoints=False, largest=largest_file
            )
            self.store, self._forwarder = self._file, None
        else:
            self._file = outbox = Outbox(path, busy=BUSY, checkpoints=False, largest=largest_file)
            self.store = open_store(redis_url)
            self._forwarder = Forwarder(outbox, self.store, clock)
        self._on_lost = on_lost
        self._begin()
        _OPEN.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, letters: Sequence[Letter]) -> Where:
        """Keep letters: one local write, never a wait for the network.

        Returns:
            Where they are now; those that did not fit into memory are lost, also where others did.
        """
        if not letters:
            return "disk"
        self._start()
        try:
            self._file.put(letters)
        except StoreError as error:
            return self._keep_in_memory(letters, error)
        except UnicodeEncodeError as error:  # half a character in a text: it cannot be written
            for letter in letters:
                self._lose(letter, f"it cannot be encoded: {error.reason}")
            return "lost"
        self._wake.set()
        return "disk"

    async def put_from_coroutine(self, letters: Sequence[Letter]) -> Where:
        """Keep letters without holding the event loop up; a cancellation does not interrupt it."""
        return await asyncio.shield(asyncio.to_thread(self.put, letters))

    @property
    def in_memory(self) -> int:
        """Letters that are only in memory."""
        with self._lock:
            return len(self._memory)

    def round(self) -> bool:
        """Do what the background thread does once: write out what is in memory, and forward.

        Returns:
            Whether there may be more to do at once.
        """
        with guard.contained("dead letter checkpoint"), suppress(StoreError):
            self._file.database.checkpoint()
        more = self._write_out_memory()
        if self._forwarder is not None:
            more = self._forwarder.round() or more
        return more

    def close(self, timeout: float = 5.0) -> None:
        """End the background thread, after a last round; letters in the file stay there.

        Args:
            timeout: Seconds to wait for the thread.
        """
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)
        deadline = time.monotonic() + timeout
        with guard.contained("dead letter queue"):
            while self._write_out_memory() and time.monotonic() < deadline:
                pass
        with self._lock:
            self._closed = True  # what the thread still has in hand does not come back
        for letter in self._taken_from_memory(None):
            self._lose(letter, _ENDED)
        if self._forwarder is not None:
            self._forwarder.release()
            self.store.close()
        self._file.close()

    def after_fork(self) -> None:
        """Begin anew in the child of a fork; what is in memory is the parent's to write out."""
        self._begin()

    def _begin(self) -> None:
        self.lost = 0
        self._lock = threading.Lock()
        self._memory: deque[tuple[Letter, int]] = deque()
        self._memory_size = 0
        self._in_hand = 0
        self._wake = threading.Event()
        self._stopping = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def _start(self) -> None:
        if self._thread is None and not self._stopping:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._run, name="periscope-dead-letters", daemon=True
                    )
                    self._thread.start()

    def _run(self) -> None:
        while not self._stopping:
            more = False
            with guard.contained("dead letter queue"):
                more = self.round()
            if not more:
                self._wake.wait(BEAT)
                self._wake.clear()

    def _keep_in_memory(self, letters: Sequence[Letter], why: StoreError) -> Where:
        guard.warn("dead letter file", "dead letters are kept in memory for now: %s", why)
        where: Where = "memory"
        for letter in letters:
            size = len(letter.body)
            with self._lock:
                fits = (
                    len(self._memory) + self._in_hand < MOST_IN_MEMORY
                    and self._memory_size + size <= MOST_BYTES_IN_MEMORY
                )
                if fits:
                    self._memory.append((letter, size))
                    self._memory_size += size
            if not fits:
                where = "lost"
                self._lose(letter, f"it could be written neither to disk nor to memory: {why}")
        self._wake.set()
        return where

    def _taken_from_memory(self, most: int | None) -> list[Letter]:
        letters: list[Letter] = []
        with self._lock:
            while self._memory and (most is None or len(letters) < most):
                letter, size = self._memory.popleft()
                self._memory_size -= size
                letters.append(letter)
        return letters

    def _write_out_memory(self) -> bool:
        """Write what is in memory to the file, or straight to the store if that is elsewhere."""
        letters = self._taken_from_memory(MOST_LETTERS)
        if not letters:
            return False
        self._in_hand = len(letters)  # they still count against the bound
        try:
            try:
                self._file.put(letters)
            except StoreError:
                if self._forwarder is None:
                    raise
                self.store.put(letters)
        except StoreError:
            self._put_back(letters)
            return False
        except BaseException:
            self._put_back(letters)
            raise
        finally:
            self._in_hand = 0
        return True

    def _put_back(self, letters: Sequence[Letter]) -> None:
        with self._lock:
            closed = self._closed
            if not closed:
                self._memory.extendleft((one, len(one.body)) for one in reversed(letters))
                self._memory_size += sum(len(one.body) for one in letters)
        if closed:
            for letter in letters:
                self._lose(letter, _ENDED)

    def _lose(self, letter: Letter, why: str) -> None:
        with self._lock:
            self.lost += 1
        logger.error(
            "periscope-otel LOST the dead letter %s of operation %s (feed %s, %s): %s",
            letter.id,
            letter.operation,
            letter.feed,
            letter.error_type,
            why,
        )
        if self._on_lost is not None:
            try:
                self._on_lost(letter, why)
            except Exception as error:  # noqa: BLE001  (the user's hook must not lose the others)
                guard.warn("on_lost", "on_lost raised %s", type(error).__name__)


_OPEN: Final[weakref.WeakSet[DeadLetterQueue]] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for queue in list(_OPEN):
        queue.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
