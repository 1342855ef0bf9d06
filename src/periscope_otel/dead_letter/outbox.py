"""The outbox: letters on their way to a store that is elsewhere, in a file of this machine.

Putting a letter is one local write, whatever the network does. Letters stay for a while after the
store has taken them, and are looked for there once more before they go: what a store forgets within
that time (a restart without persistence, a failover) is put again. A letter that the store refuses
waits by itself, for longer each time, and holds no other up.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from periscope_otel import guard
from periscope_otel.dead_letter.database import LONG, Database
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

MOST_REFUSED: Final = 8
"""Letters of one batch that the store has refused before."""

MOST_BYTES: Final = 1 << 20
"""Bytes of one batch, unless a single letter is larger."""

FIRST_RETRY: Final = 300.0
LONGEST_RETRY: Final = 3600.0
"""Seconds after which a refused letter is tried again; doubled each time."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS outbox (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    queue TEXT NOT NULL,
    put_at REAL NOT NULL,
    taken_at REAL,                  -- when the store took it
    refusals INTEGER NOT NULL DEFAULT 0,
    retry_at REAL,                  -- when a letter that the store refused is tried again
    size INTEGER NOT NULL,
    letter BLOB,                    -- unless it is long
    UNIQUE (id, queue)
) STRICT;
CREATE INDEX IF NOT EXISTS outbox_waiting ON outbox (seq, retry_at) WHERE taken_at IS NULL;
CREATE INDEX IF NOT EXISTS outbox_refused ON outbox (retry_at) WHERE retry_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS outbox_taken ON outbox (taken_at) WHERE taken_at IS NOT NULL;
-- Long ones, since a change of a row writes all of it anew.
CREATE TABLE IF NOT EXISTS outbox_blobs (seq INTEGER PRIMARY KEY, letter BLOB NOT NULL) STRICT;
-- How many wait, counted as they come and go.
CREATE TABLE IF NOT EXISTS outbox_count (
    one INTEGER PRIMARY KEY CHECK (one = 1), waiting INTEGER NOT NULL
) STRICT;
INSERT OR IGNORE INTO outbox_count VALUES (1, 0);
CREATE TRIGGER IF NOT EXISTS outbox_added AFTER INSERT ON outbox BEGIN
    UPDATE outbox_count SET waiting = waiting + 1;
END;
CREATE TRIGGER IF NOT EXISTS outbox_moved AFTER UPDATE OF taken_at ON outbox
WHEN (old.taken_at IS NULL) <> (new.taken_at IS NULL) BEGIN
    UPDATE outbox_count SET waiting = waiting + iif(new.taken_at IS NULL, 1, -1);
END;
CREATE TRIGGER IF NOT EXISTS outbox_removed AFTER DELETE ON outbox BEGIN
    UPDATE outbox_count SET waiting = waiting - (old.taken_at IS NULL);
    DELETE FROM outbox_blobs WHERE seq = old.seq;
END;
-- What can no longer be read, for somebody to look at; it must not hold the others up.
CREATE TABLE IF NOT EXISTS damaged (id TEXT, put_at REAL, letter BLOB, why TEXT) STRICT;
"""

BLOB: Final = (
    "ifnull(letter, (SELECT letter FROM outbox_blobs AS blobs WHERE blobs.seq = outbox.seq))"
)
_KEPT: Final = "seq, id, queue, size"


class Waiting(NamedTuple):
    """What an outbox holds that the store has not taken."""

    letters: int
    oldest: float | None
    """When the oldest of it was put; Unix time."""


class Kept(NamedTuple):
    """A letter in the outbox, without what is in it."""

    seq: int
    id: str
    queue: str
    size: int


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
        rows = [(letter, letter.encode()) for letter in letters]  # not while the lock is held
        with self.database.writing() as writing:
            self._put(writing, rows)

    def put_within(self, writing: Connection, letters: Iterable[Letter]) -> None:
        """Keep letters as a part of somebody's transaction.

        Args:
            writing: What `database.writing()` gives.
            letters: Each is kept once.
        """
        self._put(writing, [(letter, letter.encode()) for letter in letters])

    def _put(self, writing: Connection, rows: Iterable[tuple[Letter, bytes]]) -> None:
        now = self._clock()
        for letter, blob in rows:
            row = writing.execute(
                "INSERT OR IGNORE INTO outbox (id, queue, put_at, size, letter) "
                "VALUES (?, ?, ?, ?, ?)",
                (letter.id, letter.queue, now, len(blob), blob if len(blob) < LONG else None),
            )
            if row.rowcount and len(blob) >= LONG:
                writing.execute("INSERT INTO outbox_blobs VALUES (?, ?)", (row.lastrowid, blob))

    def next(self) -> list[Letter]:
        """Return the next batch for the store, oldest first; it stays until it is `taken`."""
        rows = self.database.read(
            f"SELECT {_KEPT} FROM outbox WHERE retry_at <= ? ORDER BY retry_at LIMIT ?",  # noqa: S608
            (self._clock(), MOST_REFUSED),
        )
        rows += self.database.read(
            f"SELECT {_KEPT} FROM outbox WHERE taken_at IS NULL AND retry_at IS NULL "  # noqa: S608
            "ORDER BY seq LIMIT ?",
            (MOST_LETTERS - len(rows),),
        )
        return self.read([Kept(*row) for row in rows])

    def taken(self, letters: Iterable[Letter]) -> None:
        """Note that the store has taken letters; they stay for the grace time."""
        now = self._clock()
        with self.database.writing() as writing:
            writing.executemany(
                "UPDATE outbox SET taken_at = ?, retry_at = NULL, refusals = 0 "
                "WHERE id = ? AND queue = ?",
                [(now, one.id, one.queue) for one in letters],
            )

    def refused(self, letter: Letter) -> float:
        """Note that the store does not take a letter; returns the seconds until it is tried again.

        They are doubled with each time, from five minutes to an hour.
        """
        now = self._clock()
        with self.database.writing() as writing:
            row = writing.execute(
                "UPDATE outbox SET taken_at = NULL, refusals = refusals + 1, "
                "retry_at = ? + min(?, ? * (1 << min(refusals, 10))) "
                "WHERE id = ? AND queue = ? RETURNING retry_at",
                (now, LONGEST_RETRY, FIRST_RETRY, letter.id, letter.queue),
            ).fetchone()
        return row[0] - now if row else 0.0

    def due(self) -> list[Kept]:
        """Return a batch of letters whose grace time has just ended, to be looked for once more.

        Where nobody looked in time, they are gone: the store may have done with them and have
        forgotten that, and they must not come back.
        """
        now = self._clock()
        rows = self.database.read(
            f"SELECT {_KEPT}, taken_at FROM outbox WHERE taken_at <= ? ORDER BY taken_at LIMIT ?",  # noqa: S608
            (now - GRACE, MOST_LETTERS),
        )
        late = [Kept(*row[:-1]) for row in rows if row[-1] < now - LATEST_CHECK]
        if late:
            guard.warn("late check", "%d dead letters were not looked for in time", len(late))
            self.let_go(late)
        return [Kept(*row[:-1]) for row in rows if row[-1] >= now - LATEST_CHECK]

    def read(self, kept: Sequence[Kept]) -> list[Letter]:
        """Return the first of some letters, as many as fit into a batch, and at least one.

        Those that are damaged are set aside.
        """
        kept = _that_fit(kept)
        blobs = dict(
            self.database.read(
                f"SELECT seq, {BLOB} FROM outbox WHERE seq IN (SELECT value FROM json_each(?))",  # noqa: S608
                (msgspec.json.encode([one.seq for one in kept]).decode(),),
            )
        )
        letters: list[Letter] = []
        for one in kept:
            try:
                letters.append(Letter.decode(blobs.get(one.seq) or b""))
            except DamagedLetterError as error:
                self._set_aside(one, error)
        return letters

    def _set_aside(self, kept: Kept, why: DamagedLetterError) -> None:
        guard.warn("damaged letter", "the dead letter %s is damaged: %s", kept.id, why)
        with self.database.writing() as writing:
            writing.execute(
                f"INSERT INTO damaged SELECT id, put_at, {BLOB}, ? FROM outbox WHERE seq = ?",  # noqa: S608
                (str(why), kept.seq),
            )
            writing.execute("DELETE FROM outbox WHERE seq = ?", (kept.seq,))

    def let_go(self, kept: Iterable[Kept]) -> None:
        """Remove letters that the store still had after the grace time."""
        with self.database.writing() as writing:
            writing.executemany("DELETE FROM outbox WHERE seq = ?", [(one.seq,) for one in kept])

    def waiting(self) -> Waiting:
        """Return how many letters the store has not taken, and since when.

        It costs the same however many there are.
        """
        ((letters, oldest),) = self.database.read(
            "SELECT waiting, "
            "(SELECT put_at FROM outbox WHERE taken_at IS NULL ORDER BY seq LIMIT 1)"
            " FROM outbox_count"
        )
        return Waiting(letters, oldest)

    def close(self) -> None:
        """Close the file."""
        self.database.close()


def _that_fit(kept: Sequence[Kept]) -> list[Kept]:
    fitting: list[Kept] = []
    size = 0
    for one in kept:
        size += one.size
        if fitting and size > MOST_BYTES:
            break
        fitting.append(one)
    return fitting
