"""The dead-letter queue of a process: one local write for a letter, and its way on from there.

With a Redis the letter goes into an outbox file, from which a forwarder moves it on; without one
the file is the store. Where the file cannot be written to (disk full, or held by others for too
long) the letter is kept in memory, within bounds, and goes on from there as soon as anything takes
it. What cannot even be kept so is lost: it is counted, logged and handed to `on_lost`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from periscope_otel import guard
from periscope_otel.dead_letter.bodies import FOLDER as PAYLOADS
from periscope_otel.dead_letter.bodies import INLINE, BodyFiles
from periscope_otel.dead_letter.errors import RefusedError, StoreError
from periscope_otel.dead_letter.forwarder import Forwarder
from periscope_otel.dead_letter.journal import Journal, is_busy
from periscope_otel.dead_letter.letter import encodable
from periscope_otel.dead_letter.loss import lose
from periscope_otel.dead_letter.memory import LettersInMemory
from periscope_otel.dead_letter.outbox import MOST_LETTERS, Outbox
from periscope_otel.dead_letter.redis_store import RedisStore
from periscope_otel.dead_letter.sqlite_store import SQLiteStore
from periscope_otel.dead_letter.switching import move_what_is_left
from periscope_otel.dead_letter.threads import in_a_thread
from periscope_otel.telemetry.letter_counts import Depth, OutboxDepth, letter_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from periscope_otel.dead_letter.letter import Letter, State
    from periscope_otel.dead_letter.loss import OnLost
    from periscope_otel.dead_letter.store import Store

logger = logging.getLogger("periscope_otel")

_Opened = TypeVar("_Opened")

Where = Literal["disk", "memory", "lost"]
"""Where a letter is once it was put; memory does not survive the process."""

FILE: Final = "dead-letters.db"

BUSY: Final = 0.25
"""Seconds that a letter waits for others who write to the file."""

PATIENCE: Final = 10.0
"""Seconds that opening the file waits for them."""

BEAT: Final = 0.2
"""Seconds between two rounds of the background thread."""

LOOK: Final = 5.0
"""Seconds between two looks at how many letters there are, and at what dead processes left."""


LARGEST_FILE: Final = 1 << 30
"""Bytes that the file may grow to, unless another size is asked for."""


_IN_STORE: Final[tuple[State, ...]] = ("dead", "queued", "claimed", "parked")

_ENDED: Final = "the queue was closed before it could be written"


class DeadLetterQueue:
    """Takes letters, for any number of threads, processes and forks that share a folder.

    Args:
        folder: Where its file is; made if it is not there, for this user alone.
        redis_url: Where letters go to; by default the file itself is their store.
        largest_file: Bytes that the file may grow to.
        largest_inline: Bytes of a payload, compressed, above which it is a file of its own.
        on_lost: Called with each letter that could not be kept, and why.
        clock: Monotonic seconds.
        queues: Names of queues whose letters are counted from the start.

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
        largest_inline: int = INLINE,
        on_lost: OnLost | None = None,
        clock: Callable[[], float] = time.monotonic,
        queues: set[str] | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()  # the working directory may change
        path = self.folder / FILE
        self._redis: RedisStore | None = None
        self.store: Store
        """Where the letters end up."""
        if redis_url is None:
            self._file: SQLiteStore | Outbox
            self._file = self.store = _patiently(
                lambda: SQLiteStore(
                    path, synchronous="FULL", busy=BUSY, checkpoints=False, largest=largest_file
                )
            )
            self._forwarder, self._outbox = None, None
        else:
            self._file = self._outbox = _patiently(
                lambda: Outbox(path, busy=BUSY, checkpoints=False, largest=largest_file)
            )
            self.store = self._redis = RedisStore(redis_url)
            self._forwarder = Forwarder(self._outbox, self.store, clock)
        self.bodies = BodyFiles(self.folder / PAYLOADS, largest_inline)
        self._journal = _patiently(lambda: Journal(self._file))
        self._on_lost = on_lost
        self._clock = clock
        self._queues = {"default"} if queues is None else queues
        self._next_beat = 0.0
        self._next_look = 0.0
        self._wake = threading.Event()
        self._rested = threading.Event()
        self._begin()
        _OPEN.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(
        self, letters: Sequence[Letter], *, journalled: bool = False, counted: bool = False
    ) -> Where:
        """Keep letters: one local write, never a wait for the network.

        Args:
            letters: Of any queues.
            journalled: Whether they are in the journal, which they leave in the same transaction.
            counted: Whether they were kept, and counted, somewhere else before.

        Returns:
            Where they are now; those that did not fit into memory are lost, also where others did.
        """
        if not letters:
            return "disk"
        self._queues.update(letter.queue for letter in letters)
        try:
            self.start()
            letters = [self.bodies.moved_out(letter) for letter in letters]
            self._write(letters, journalled=journalled)
        except StoreError as error:
            return self._keep_in_memory(letters, error, counted=counted)
        except UnicodeEncodeError:  # half a character in a text
            whole = [encodable(letter) for letter in letters]
            return self.put(whole, journalled=journalled, counted=counted)
        except Exception as error:  # noqa: BLE001  (whatever it is, the letters are still at hand)
            where = self._keep_in_memory(letters, error, counted=counted)
            guard.report("dead letter queue", error)
            return where
        except BaseException as error:  # Ctrl-C; what was written by then is not written twice
            self._keep_in_memory(letters, error, counted=counted)
            raise
        if not counted:
            _count(letters, "disk")
        return "disk"  # and on from there at the next beat: one batch costs less than each letter

    async def put_from_coroutine(
        self, letters: Sequence[Letter], *, journalled: bool = False
    ) -> Where:
        """Keep letters without holding the event loop up; a cancellation does not interrupt it."""
        where: list[Where] = []
        await in_a_thread(lambda: where.append(self.put(letters, journalled=journalled)))
        return where[0]

    def journal(self, letter: Letter) -> bool:
        """Write a payload down before it is worked on, so that a death in the middle of it shows.

        Returns:
            Whether it is written down; where it cannot be, the work goes on without.
        """
        self.start()
        try:
            self._journal.enter(self.bodies.moved_out(letter))
        except UnicodeEncodeError:
            return self.journal(encodable(letter))
        except (StoreError, OSError) as error:
            guard.warn("journal", "a payload could not be written to the journal: %s", error)
            letter_counts.put(letter.queue, "not_journalled")
            return False
        return True

    def forget(self, ids: Sequence[str]) -> None:
        """Take payloads out of the journal that were worked on with success."""
        try:
            self._journal.remove(ids)
        except StoreError:
            with self._lock:
                self._done_with.extend(ids)  # at a better moment
            self._wake.set()

    @property
    def in_memory(self) -> int:
        """Letters that are only in memory."""
        return len(self._memory)

    def round(self) -> bool:
        """Do what the background thread does once: write out what is in memory, and forward.

        Returns:
            Whether there may be more to do at once.
        """
        now = self._clock()
        if now >= self._next_beat:
            self._next_beat = now + BEAT
            with guard.contained("dead letter checkpoint"), suppress(StoreError):
                self._file.database.checkpoint()
        more = self._write_out_memory() or self._move_what_is_left()
        if now >= self._next_look:
            self._next_look = now + LOOK
            self._look_around()
        if self._forwarder is not None:
            more = self._forwarder.round() or more
        return more

    def start_flush(self) -> None:
        """Ask the background thread to move on what it can, without waiting."""
        self._flushes += 1
        self._rested.clear()
        self._wake.set()

    def wait_flushed(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for that; returns whether nothing is only in memory."""
        if self._thread is not None and self._thread.is_alive():
            self._rested.wait(timeout)
        return not self.in_memory

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
        with guard.contained("dead letter journal"), suppress(StoreError):
            self._forget_again()
        for letter in self._memory.close():  # what the thread has in hand does not come back
            self._lose(letter, "closed", _ENDED)
        self._journal.close()
        if self._forwarder is not None:
            self._forwarder.release()
            self.store.close()
        self._file.close()

    def after_fork(self) -> None:
        """Begin anew in the child of a fork; what is in memory is the parent's to write out."""
        self._journal.after_fork()
        self._begin()

    def _begin(self) -> None:
        self.lost = 0
        self._lock = threading.RLock()  # a signal handler's letter may come while it is held
        self._memory = LettersInMemory()
        self._flushes = 0
        self._has_switched = self._has_advised = False
        self._done_with: list[str] = []
        self._next_beat = self._next_look = 0.0
        self._wake = threading.Event()
        self._rested = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the background thread, where it does not run yet."""
        if self._thread is None and not self._stopping:
            with self._lock, suppress(RuntimeError):  # at the end of the interpreter none starts
                if self._thread is None:
                    thread = threading.Thread(
                        target=self._run, name="periscope-dead-letters", daemon=True
                    )
                    thread.start()
                    self._thread = thread

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last, flushes, more = self._stopping, self._flushes, False
            with guard.contained("dead letter queue"):
                more = self.round()
            if not more and flushes == self._flushes:  # else it may have begun too early for it
                self._rested.set()
            if not more and not is_last:
                self._wake.wait(BEAT)
                self._wake.clear()

    def _write(self, letters: Sequence[Letter], *, journalled: bool) -> None:
        if not journalled:
            self._file.put(letters)
            return
        with self._file.database.writing() as writing:
            self._file.put_within(writing, letters)
            self._journal.remove_within(writing, [letter.id for letter in letters])

    def _look_around(self) -> None:
        """Make letters of what dead processes left, and count how many there are."""
        with guard.contained("dead letter journal"), suppress(StoreError):
            self._forget_again()
            for queue in self._journal.adopt():
                self._queues.add(queue)
                letter_counts.put(queue, "disk")
        with guard.contained("dead letter figures"), suppress(StoreError):
            letter_counts.take_outbox(self._outbox_depth())
        if self._forwarder is None or self._forwarder.is_well:  # else it is left alone
            with guard.contained("dead letter figures"), suppress(StoreError):
                letter_counts.take(self._depths())
                self._advise()

    def _move_what_is_left(self) -> bool:
        """Take over what is in the file from before a Redis was switched on or off."""
        if self._has_switched:
            return False
        with guard.contained("dead letter switch"), suppress(StoreError):
            more = move_what_is_left(self._file)
            self._has_switched = not more
            return more
        return False

    def _advise(self) -> None:
        """Say once what about the store may lose letters."""
        if self._redis is not None and not self._has_advised:
            self._has_advised = True
            for advice in self._redis.advice():
                logger.warning("dead letters in %s: %s", self.store.url, advice)

    def _forget_again(self) -> None:
        """Take out of the journal what could not be taken out when it was done with."""
        with self._lock:
            done_with, self._done_with = self._done_with, []
        if not done_with:
            return
        try:
            self._journal.remove(done_with)
        except BaseException:
            with self._lock:
                self._done_with += done_with
            raise

    def _depths(self) -> dict[str, Depth]:
        depths = {}
        for queue in tuple(self._queues):
            stats = self.store.stats(queue)
            letters: dict[str, int] = {one: stats.by_state.get(one, 0) for one in _IN_STORE}
            depths[queue] = Depth(letters, stats.oldest)
        return depths

    def _outbox_depth(self) -> OutboxDepth | None:
        if self._outbox is None:
            return None
        return OutboxDepth(*self._outbox.waiting(), self._outbox.waiting_by_queue())

    def _keep_in_memory(
        self, letters: Sequence[Letter], why: BaseException, *, counted: bool
    ) -> Where:
        told = str(why) if isinstance(why, StoreError) else type(why).__name__
        guard.warn("dead letter file", "dead letters are kept in memory for now: %s", told)
        where: Where = "memory"
        for letter in map(encodable, letters):  # one that is not would hold up all others
            if self._memory.add(letter):
                letter_counts.put(letter.queue, "memory", 0 if counted else 1)
                continue
            where = "lost"
            if self._memory.closed:
                self._lose(letter, "closed", f"{_ENDED}: {told}")
            else:
                self._lose(letter, "full", f"neither disk nor memory has room for it: {told}")
        self._wake.set()
        return where

    def _write_out_memory(self) -> bool:
        """Write what is in memory to the file, or straight to the store if that is elsewhere."""
        letters = self._memory.take(MOST_LETTERS)
        if not letters:
            return False
        left = list(letters)
        try:
            self._write_somewhere(left)
        except StoreError:
            return False
        finally:  # whatever interrupted it
            written = letters[: len(letters) - len(left)]
            self._memory.done_with(written)
            self._put_back(left)
        return True

    def _write_somewhere(self, left: list[Letter]) -> None:
        """Write letters, and take those out of the list that are written, first those in front."""
        try:
            self._write(left, journalled=True)
            left.clear()
        except StoreError as error:
            if self._forwarder is None and not isinstance(error, RefusedError):
                raise
            self._write_elsewhere(left)

    def _write_elsewhere(self, left: list[Letter]) -> None:
        """Write straight to the store; a letter that it refuses must not hold up the others."""
        while left:
            try:
                self.store.put(left[:1])
            except RefusedError as error:
                self._lose(left[0], "refused", f"the store refuses it: {error}")
            else:
                self.forget([left[0].id])
            del left[0]

    def _put_back(self, letters: Sequence[Letter]) -> None:
        if not self._memory.put_back(letters):
            for letter in letters:
                self._lose(letter, "closed", _ENDED)

    def _lose(self, letter: Letter, reason: str, why: str) -> None:
        with self._lock:
            self.lost += 1
        lose(letter, reason, why, self._on_lost)


def _patiently(opened: Callable[[], _Opened]) -> _Opened:
    """Open what others may be writing to just now: that is no reason to refuse the folder."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return opened()
        except StoreError as error:
            if not is_busy(error) or time.monotonic() > deadline:
                raise


def _count(letters: Sequence[Letter], where: Where) -> None:
    for letter in letters:
        letter_counts.put(letter.queue, where)


_OPEN: Final[weakref.WeakSet[DeadLetterQueue]] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for queue in list(_OPEN):
        queue.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
