"""The journal: payloads that are being worked on, so that the death of a process loses none.

A payload is written before the first attempt and removed when the call has succeeded. A process is
known to be alive by a lock that the kernel holds for it on a file of its own, so it is believed
dead neither too early (a long call) nor too late (a new process with its number). What a dead
process leaves becomes letters, whoever sees it first.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from periscope_otel import guard
from periscope_otel.dead_letter.draft import abandoned
from periscope_otel.dead_letter.errors import DamagedLetterError, StoreError
from periscope_otel.dead_letter.letter import Letter
from periscope_otel.dead_letter.locks import ProcessLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path
    from sqlite3 import Connection

    from periscope_otel.dead_letter.outbox import Outbox
    from periscope_otel.dead_letter.sqlite_store import SQLiteStore

FOLDER: Final = "alive"
"""Beside the file: a locked file for each process that has entries."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS journal (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,            -- whose lock file it is that says whether it is worked on
    letter BLOB NOT NULL
) STRICT
"""
_OF_OWNER: Final = "CREATE INDEX IF NOT EXISTS journal_by_owner ON journal (owner)"

_UNREADABLE: Final = "unreadable"
"""The owner of entries that nobody can read: they stay for somebody to look at."""

LONGEST_WAIT: Final = 2.0
"""Seconds that a payload waits for others who write to the file: a letter may go on in memory, but
a payload that is not written down is lost with its process."""

_AT_ONCE: Final = 64
"""Entries that one transaction makes letters of."""

_our_owners: Final[set[str]] = set()
"""Those of this process: its own locks tell it nothing."""


class Journal:
    """Payloads in work, in the file that their letters would go into.

    Args:
        file: Where letters go.
        clock: Unix time in seconds.
    """

    def __init__(self, file: SQLiteStore | Outbox, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._clock = clock
        self._folder = file.database.path.parent / FOLDER
        self._held: ProcessLock | None = None
        self._starting = threading.RLock()
        with file.database.writing() as writing:
            writing.execute(_SCHEMA)
            writing.execute(_OF_OWNER)

    def enter(self, letter: Letter) -> None:
        """Write a payload down, before it is worked on.

        Raises:
            StoreError: If it cannot be written now.
            OSError: If the lock file cannot be made.
        """
        owner = self._owner()
        row = (letter.id, owner, letter.encode())
        waited_until = time.monotonic() + LONGEST_WAIT
        while True:
            try:
                with self._file.database.writing(durable=False) as writing:
                    writing.execute("INSERT OR REPLACE INTO journal VALUES (?, ?, ?)", row)
            except StoreError as error:
                if not is_busy(error) or time.monotonic() > waited_until:
                    raise
            else:
                return

    def remove(self, ids: Sequence[str]) -> None:
        """Forget payloads that are done with.

        Raises:
            StoreError: If that cannot be written now.
        """
        with self._file.database.writing(durable=False) as writing:
            self.remove_within(writing, ids)

    def remove_within(self, writing: Connection, ids: Iterable[str]) -> None:
        """Forget payloads as part of a transaction, such as the one that stores their letters."""
        writing.executemany("DELETE FROM journal WHERE id = ?", [(one,) for one in ids])

    def adopt(self) -> list[str]:
        """Make letters of what dead processes were working on; returns the queue of each.

        Raises:
            StoreError: If they cannot be written now.
        """
        adopted: list[str] = []
        owners = self._owners() - _our_owners
        if owners:
            self._folder.mkdir(mode=0o700, exist_ok=True)  # whoever removed it: entries stay ours
        for owner in owners:
            lock = ProcessLock(self._path_of(owner))
            if lock.acquire():
                try:
                    adopted += self._adopt_from(owner)
                    lock.path.unlink(missing_ok=True)  # while nobody else can have it
                finally:
                    lock.release()
        return adopted

    def _owners(self) -> set[str]:
        """Return all processes that have entries, and those that have ended without any."""
        rows = self._file.database.read("SELECT DISTINCT owner FROM journal")
        with_entries = {owner for (owner,) in rows} - {_UNREADABLE}
        return with_entries | {path.stem for path in self._folder.glob("*.lock")}

    def _adopt_from(self, owner: str) -> list[str]:
        adopted: list[str] = []
        while True:
            with self._file.database.writing() as writing:
                rows = writing.execute(
                    "SELECT id, letter FROM journal WHERE owner = ? LIMIT ?", (owner, _AT_ONCE)
                ).fetchall()
                letters = self._readable(writing, rows)
                self._file.put_within(writing, letters)
                self.remove_within(writing, [letter.id for letter in letters])
            adopted += [letter.queue for letter in letters]
            if len(rows) < _AT_ONCE:
                return adopted

    def _readable(self, writing: Connection, rows: Sequence[tuple[str, bytes]]) -> list[Letter]:
        letters: list[Letter] = []
        for letter_id, blob in rows:
            try:
                letters.append(abandoned(Letter.decode(blob), self._clock()))
            except DamagedLetterError as error:
                guard.warn("damaged journal", "a payload in work cannot be read: %s", error)
                writing.execute(
                    "UPDATE journal SET owner = ? WHERE id = ?", (_UNREADABLE, letter_id)
                )
        return letters

    def close(self) -> None:
        """Let others make letters of what this process has not finished."""
        held, self._held = self._held, None
        if held is not None and held.held:
            owner = held.path.stem
            with suppress(StoreError):
                if not self._file.database.read(
                    "SELECT 1 FROM journal WHERE owner = ? LIMIT 1", (owner,)
                ):
                    held.path.unlink(missing_ok=True)
            held.release()
            _our_owners.discard(owner)

    def after_fork(self) -> None:
        """Begin anew in the child: what the parent has entered stays the parent's."""
        self._held = None
        self._starting = threading.RLock()

    def _owner(self) -> str:
        """Return the name of this process, whose lock it holds from now on."""
        with self._starting:
            while self._held is None:
                self._folder.mkdir(mode=0o700, exist_ok=True)
                owner = uuid.uuid4().hex
                _our_owners.add(owner)
                lock = ProcessLock(self._path_of(owner))
                # Another process may take a file that is not locked yet for that of a dead one.
                if lock.acquire() and lock.in_place():
                    self._held = lock
                else:
                    lock.release()
                    _our_owners.discard(owner)
            return self._held.path.stem

    def _path_of(self, owner: str) -> Path:
        return self._folder / f"{owner}.lock"


def is_busy(error: StoreError) -> bool:
    """Whether a file could not be written to because others were writing to it."""
    return (getattr(error.__cause__, "sqlite_errorname", "") or "").startswith("SQLITE_BUSY")


def _after_fork_in_child() -> None:
    _our_owners.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
