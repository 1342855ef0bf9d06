"""The outbox: letters on their way to a store that is elsewhere, in a file of this machine.

Putting a letter is one local write, whatever the network does. Letters stay for a while after the
store has taken them, and are looked for there once more before they go: what a store forgets within
that time (a restart without persistence, a failover) is put again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from periscope_otel import guard
from periscope_otel.dead_letter.database import Database
from periscope_otel.dead_letter.errors import DamagedLetterError
from periscope_otel.dead_letter.letter import Letter
from periscope_otel.dead_letter.store import REMEMBERED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path
    from sqlite3 import Connection

GRACE: Final = 60.0
"""Seconds for which a letter stays after the store has taken it."""

LATEST_CHECK: Final = 0.75 * REMEMBERED
"""Seconds until a letter is looked for at the latest: well before a store forgets the ids of those
that it has done with."""

MOST_LETTERS: Final = 64
"""Letters of one batch."""

MOST_BYTES: Final = 1 << 20
"""Bytes of one batch, unless a single letter is larger."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS outbox (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    put_at REAL NOT NULL,
    taken_at REAL,                  -- when the store took it
    letter BLOB NOT NULL
) STRICT;
-- What can no longer be read, for somebody to look at; it must not hold the others up.
CREATE TABLE IF NOT EXISTS damaged (id TEXT, put_at REAL, letter BLOB, why TEXT) STRICT;
CREATE INDEX IF NOT EXISTS outbox_waiting ON outbox (seq) WHERE taken_at IS NULL;
CREATE INDEX IF NOT EXISTS outbox_taken ON outbox (taken_at) WHERE taken_at IS NOT NULL;
"""


class Waiting(NamedTuple):
    """What an outbox holds that the store has not taken."""

    letters: int
    oldest: float | None
    """When the oldest of it was put; Unix time."""


class Outbox:
    """Letters that have not yet arrived for good.

    Args:
        path: The file; several processes may share it.
        clock: Unix time in seconds.
        options: Of the `Database`.

    Raises:
        StoreError: If the file cannot be used.
    """

    def __init__(
        self, path: str | Path, *, clock: Callable[[], float] = time.time, **options: Any
    ) -> None:
        self._clock = clock
        self.database = Database(path, _SCHEMA, **{"synchronous": "NORMAL", **options})

    def put(self, letters: Iterable[Letter]) -> None:
        """Keep letters until the store has them; all or none of them, each once.

        Raises:
            StoreError: If they cannot be written now.
        """
        rows = [(letter.id, letter.encode()) for letter in letters]  # not while the lock is held
        with self.database.writing() as writing:
            self._put(writing, rows)

    def put_within(self, writing: Connection, letters: Iterable[Letter]) -> None:
        """Keep letters as a part of somebody's transaction.

        Args:
            writing: What `database.writing()` gives.
            letters: Each is kept once.
        """
        self._put(writing, [(letter.id, letter.encode()) for letter in letters])

    def _put(self, writing: Connection, rows: Sequence[tuple[str, bytes]]) -> None:
        now = self._clock()
        writing.executemany(
            "INSERT OR IGNORE INTO outbox (id, put_at, letter) VALUES (?, ?, ?)",
            [(letter_id, now, blob) for letter_id, blob in rows],
        )

    def next(self) -> list[Letter]:
        """Return the next batch for the store, oldest first; it stays until it is `taken`."""
        rows = self.database.read(
            "SELECT id, letter FROM outbox WHERE taken_at IS NULL ORDER BY seq LIMIT ?",
            (MOST_LETTERS,),
        )
        return self._decoded(rows)

    def taken(self, letters: Sequence[Letter]) -> None:
        """Note that the store has taken letters; they stay for the grace time."""
        now = self._clock()
        with self.database.writing() as writing:
            writing.executemany(
                "UPDATE outbox SET taken_at = ? WHERE id = ?", [(now, one.id) for one in letters]
            )

    def due(self) -> list[Letter]:
        """Return a batch of letters whose grace time has just ended, to be looked for once more.

        Where nobody looked in time, they are gone: the store may have done with them and have
        forgotten that, and they must not come back.
        """
        now = self._clock()
        rows = self.database.read(
            "SELECT id, letter, taken_at FROM outbox WHERE taken_at <= ? ORDER BY taken_at LIMIT ?",
            (now - GRACE, MOST_LETTERS),
        )
        late = [row[0] for row in rows if row[2] < now - LATEST_CHECK]
        if late:
            guard.warn("late check", "%d dead letters were not looked for in time", len(late))
            self._remove(late)
        return self._decoded([row[:2] for row in rows if row[2] >= now - LATEST_CHECK])

    def _decoded(self, rows: Sequence[tuple[str, bytes]]) -> list[Letter]:
        """Return the letters of a batch of rows; those that are damaged are set aside."""
        letters: list[Letter] = []
        size = 0
        for letter_id, blob in rows:
            size += len(blob)
            if letters and size > MOST_BYTES:
                break
            try:
                letters.append(Letter.decode(blob))
            except DamagedLetterError as error:
                self._set_aside(letter_id, error)
        return letters

    def _set_aside(self, letter_id: str, why: DamagedLetterError) -> None:
        guard.warn("damaged letter", "the dead letter %s is damaged: %s", letter_id, why)
        with self.database.writing() as writing:
            writing.execute(
                "INSERT INTO damaged SELECT id, put_at, letter, ? FROM outbox WHERE id = ?",
                (str(why), letter_id),
            )
            writing.execute("DELETE FROM outbox WHERE id = ?", (letter_id,))

    def let_go(self, letters: Sequence[Letter]) -> None:
        """Remove letters that the store still had after the grace time."""
        self._remove([letter.id for letter in letters])

    def _remove(self, ids: Sequence[str]) -> None:
        with self.database.writing() as writing:
            writing.executemany("DELETE FROM outbox WHERE id = ?", [(one,) for one in ids])

    def waiting(self) -> Waiting:
        """Return how many letters the store has not taken, and since when."""
        ((letters, oldest),) = self.database.read(
            "SELECT count(*), min(put_at) FROM outbox WHERE taken_at IS NULL"
        )
        return Waiting(letters, oldest)

    def close(self) -> None:
        """Close the file."""
        self.database.close()
