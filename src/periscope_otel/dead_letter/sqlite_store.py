"""Letters in a SQLite file: the embedded store, which needs no server.

Each letter is a row: the encoded letter as it was put, and columns for what changes and for what
one looks for. A letter that does not fit into a page with its row is in a table of its own: a
change of a row writes all of it, and a change of state must not write megabytes anew. Counts are
kept by triggers in the same transactions, so they are right at any time and cost the same with ten
letters as with a million.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import msgspec

from periscope_otel.dead_letter.database import LONG, Database
from periscope_otel.dead_letter.errors import DamagedLetterError, StoreError
from periscope_otel.dead_letter.letter import Letter
from periscope_otel.dead_letter.store import (
    LONGEST_PAGE,
    MOST_LEASES,
    MOST_REPLAYS,
    PAGE,
    REMEMBERED,
    Claim,
    Filter,
    Page,
    Put,
    Stats,
    among,
    in_state,
    payload_identity,
    readable,
    resting_state,
)
from periscope_otel.redaction import clean_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from sqlite3 import Connection
    from typing import Self


_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS letters (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL,
    queue TEXT NOT NULL,
    state TEXT NOT NULL,
    revision INTEGER NOT NULL DEFAULT 1,
    operation TEXT NOT NULL,
    feed TEXT,
    fingerprint TEXT NOT NULL,
    error_type TEXT,
    same TEXT NOT NULL,             -- equal for the same payload under the same idempotency key
    failed_at REAL NOT NULL,
    attempts INTEGER NOT NULL,
    replays INTEGER NOT NULL DEFAULT 0,
    leases INTEGER NOT NULL DEFAULT 0,      -- that ran out
    owner TEXT,                     -- of a claim, with its end and the state before it
    until REAL,
    before TEXT,
    size INTEGER NOT NULL,
    letter BLOB,                    -- unless it is long
    latest BLOB,                    -- its latest failure, if that is not the one in the letter
    UNIQUE (id, queue)
) STRICT;
CREATE TABLE IF NOT EXISTS letter_blobs (seq INTEGER PRIMARY KEY, letter BLOB NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS letters_by_state ON letters (queue, state, seq);
CREATE INDEX IF NOT EXISTS letters_by_age ON letters (queue, failed_at) WHERE state = 'dead';
CREATE INDEX IF NOT EXISTS letters_by_fingerprint ON letters (queue, fingerprint, seq);
CREATE INDEX IF NOT EXISTS letters_by_feed ON letters (queue, feed, seq);
CREATE INDEX IF NOT EXISTS letters_by_same ON letters (same) WHERE state <> 'claimed';
CREATE INDEX IF NOT EXISTS letters_by_lease ON letters (queue, until) WHERE state = 'claimed';

CREATE TABLE IF NOT EXISTS totals (
    queue TEXT, state TEXT, feed TEXT, fingerprint TEXT, letters INTEGER, size INTEGER,
    PRIMARY KEY (queue, state, feed, fingerprint)
) STRICT, WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS letters_added AFTER INSERT ON letters BEGIN
    INSERT INTO totals
    VALUES (new.queue, new.state, ifnull(new.feed, ''), new.fingerprint, 1, new.size)
    ON CONFLICT DO UPDATE SET letters = letters + 1, size = size + excluded.size;
END;
CREATE TRIGGER IF NOT EXISTS letters_removed AFTER DELETE ON letters BEGIN
    UPDATE totals SET letters = letters - 1, size = size - old.size WHERE queue = old.queue
        AND state = old.state AND feed = ifnull(old.feed, '') AND fingerprint = old.fingerprint;
    DELETE FROM totals WHERE queue = old.queue AND state = old.state
        AND feed = ifnull(old.feed, '') AND fingerprint = old.fingerprint AND letters = 0;
    DELETE FROM letter_blobs WHERE seq = old.seq;
END;
CREATE TRIGGER IF NOT EXISTS letters_changed
AFTER UPDATE OF state, fingerprint, size ON letters BEGIN
    UPDATE totals SET letters = letters - 1, size = size - old.size WHERE queue = old.queue
        AND state = old.state AND feed = ifnull(old.feed, '') AND fingerprint = old.fingerprint;
    DELETE FROM totals WHERE queue = old.queue AND state = old.state
        AND feed = ifnull(old.feed, '') AND fingerprint = old.fingerprint AND letters = 0;
    INSERT INTO totals
    VALUES (new.queue, new.state, ifnull(new.feed, ''), new.fingerprint, 1, new.size)
    ON CONFLICT DO UPDATE SET letters = letters + 1, size = size + excluded.size;
END;

-- Letters that are done, so that one which comes late from somewhere does not come back.
CREATE TABLE IF NOT EXISTS removed (
    id TEXT, queue TEXT, until REAL NOT NULL, PRIMARY KEY (id, queue)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS removed_by_time ON removed (until);
"""

_CHUNK: Final = 500
"""Letters that one transaction changes, so that others get their turn."""

_FAILURE: Final = "error_type = ?, fingerprint = ?, failed_at = ?, latest = ?"
_ROW: Final = (
    "ifnull(letter, (SELECT letter FROM letter_blobs AS blobs WHERE blobs.seq = letters.seq)), "
    "latest, state, revision, attempts, replays, seq"
)


class SQLiteStore:
    """Letters in a file of this machine, for any number of threads and processes.

    Args:
        path: The file.
        clock: Unix time in seconds.
        options: Of the `Database`.

    Raises:
        StoreError: If the file cannot be used.
    """

    def __init__(
        self, path: str | Path, *, clock: Callable[[], float] = time.time, **options: Any
    ) -> None:
        self.database = Database(path, _SCHEMA, **options)
        self._clock = clock
        self.url = f"sqlite:///{quote(str(self.database.path))}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, letters: Sequence[Letter]) -> list[Put]:
        """Store letters, all or none; see `Store`."""
        rows = [(letter, letter.encode()) for letter in letters]  # not while the lock is held
        with self.database.writing() as writing:
            return [self._put(writing, letter, blob) for letter, blob in rows]

    def put_within(self, writing: Connection, letters: Sequence[Letter]) -> list[Put]:
        """Store letters as a part of somebody's transaction.

        Args:
            writing: What `database.writing()` gives.
            letters: Of any queues.

        Returns:
            What became of each, once the transaction has ended well.
        """
        return [self._put(writing, letter, letter.encode()) for letter in letters]

    def _put(self, writing: Connection, letter: Letter, blob: bytes) -> Put:
        known = writing.execute(
            "SELECT 1 FROM letters WHERE id = ?1 AND queue = ?2 "
            "UNION ALL SELECT 1 FROM removed WHERE id = ?1 AND queue = ?2",
            (letter.id, letter.queue),
        ).fetchone()
        if known:
            return "known"
        same = payload_identity(letter)
        failure = (letter.error_type, letter.fingerprint, letter.last_failed_at)
        merged = writing.execute(
            f"UPDATE letters SET {_FAILURE}, attempts = attempts + ?, "  # noqa: S608
            "revision = revision + 1 WHERE seq = (SELECT seq FROM letters WHERE same = ? AND "
            "state <> 'claimed' AND queue = ? LIMIT 1)",
            (*failure, letter.latest(), letter.attempts, same, letter.queue),
        )
        if merged.rowcount:
            self._remember(writing, letter.queue, [letter.id])
            return "merged"
        row = writing.execute(
            "INSERT INTO letters (id, queue, state, operation, feed, fingerprint, error_type, same,"
            " failed_at, attempts, replays, size, letter) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (letter.id, letter.queue, resting_state(letter.state), letter.operation, letter.feed,
             letter.fingerprint, letter.error_type, same,
             letter.last_failed_at,
             letter.attempts, letter.replays, len(blob), blob if len(blob) < LONG else None),
        )  # fmt: skip
        if len(blob) >= LONG:
            writing.execute("INSERT INTO letter_blobs VALUES (?, ?)", (row.lastrowid, blob))
        return "stored"

    def get(self, letter_id: str, queue: str = "default") -> Letter | None:
        """Return a letter by its id; see `Store`."""
        query = f"SELECT {_ROW} FROM letters WHERE id = ? AND queue = ?"  # noqa: S608
        rows = self.database.read(query, (letter_id, queue))
        return _letter(rows[0]) if rows else None

    def missing(self, ids: Sequence[str], queue: str = "default") -> Sequence[str]:
        """Return those ids of which nothing is known; see `Store`."""
        rows = self.database.read(
            "SELECT value FROM json_each(?1) AS asked "
            "WHERE NOT EXISTS (SELECT 1 FROM letters WHERE id = asked.value AND queue = ?2) "
            "AND NOT EXISTS (SELECT 1 FROM removed WHERE id = asked.value AND queue = ?2)",
            (_as_json(ids), queue),
        )
        return [letter_id for (letter_id,) in rows]

    def list(
        self,
        where: Filter,
        *,
        cursor: str | None = None,
        limit: int = PAGE,
        newest_first: bool = False,
    ) -> Page:
        """Return a page of letters; see `Store`."""
        limit = max(1, min(limit, LONGEST_PAGE))
        conditions, values = _conditions(where)
        if cursor is not None:
            conditions += f" AND seq {'<' if newest_first else '>'} ?"
            values = (*values, _sequence(cursor))
        order = "DESC" if newest_first else "ASC"
        rows = self.database.read(
            f"SELECT {_ROW} FROM letters WHERE {conditions} ORDER BY seq {order} LIMIT ?",  # noqa: S608
            (*values, limit),
        )
        return Page(readable(rows, _letter), str(rows[-1][-1]) if len(rows) == limit else None)

    def stats(self, queue: str = "default") -> Stats:
        """Return how many letters there are; see `Store`."""

        def by(column: str, limit: int = 1000) -> dict[Any, int]:
            return dict(
                self.database.read(
                    f"SELECT {column}, sum(letters) AS n FROM totals WHERE queue = ? AND {column} "  # noqa: S608
                    "<> '' GROUP BY 1 ORDER BY n DESC LIMIT ?",
                    (queue, limit),
                )
            )

        oldest = self.database.read(
            "SELECT min(failed_at) FROM letters WHERE queue = ? AND state = 'dead'",
            (queue,),
        )
        (size,) = self.database.read(
            "SELECT ifnull(sum(size), 0) FROM totals WHERE queue = ?", (queue,)
        )
        return Stats(by("state"), by("feed"), by("fingerprint"), oldest[0][0], size[0])

    def requeue(self, where: Filter, limit: int | None = None) -> int:
        """Queue letters for the next replayer; see `Store`."""
        return self._change(in_state(where, "dead"), "state = 'queued'", limit)

    def park(self, where: Filter) -> int:
        """Take letters out of every replay; see `Store`."""
        return self._change(among(where, ("dead", "queued")), "state = 'parked'")

    def unpark(self, where: Filter) -> int:
        """Make parked letters dead again; see `Store`."""
        return self._change(in_state(where, "parked"), "state = 'dead', replays = 0, leases = 0")

    def claim(
        self, owner: str, lease: float, limit: int = 1, where: Filter | None = None
    ) -> Sequence[Claim]:
        """Take letters to replay; see `Store`."""
        where = where or Filter(states=("queued",))
        conditions, values = _conditions(among(where, ("dead", "queued")))
        with self.database.writing() as writing:
            now = self._clock()
            _end_leases(writing, where.queue, now)
            rows = writing.execute(
                "UPDATE letters SET before = state, state = 'claimed', owner = ?, until = ?, "  # noqa: S608
                "revision = revision + 1 WHERE seq IN "
                f"(SELECT seq FROM letters WHERE {conditions} ORDER BY seq LIMIT ?) "
                f"RETURNING {_ROW}",
                (owner, now + lease, *values, max(0, limit)),
            ).fetchall()
            for row in rows:
                if _damage_of(row) is not None:
                    # No replay can end it, so it is taken out of all of them.
                    writing.execute(
                        "UPDATE letters SET state = 'parked', owner = NULL, until = NULL "
                        "WHERE seq = ?",
                        (row[-1],),
                    )
        rows.sort(key=lambda row: row[-1])
        return [Claim(letter, owner, now + lease) for letter in readable(rows, _letter)]

    def renew(self, claim: Claim, lease: float) -> Claim | None:
        """Hold a claim for longer; see `Store`."""
        until = self._clock() + lease
        held = self._settle(claim, "UPDATE letters SET until = ?", until)
        return claim._replace(until=until) if held else None

    def settle(self, claim: Claim, failed: Letter | None = None) -> bool:
        """End a claim; see `Store`."""
        if failed is None:
            return self._settle(claim, "DELETE FROM letters", removes=True)
        failure = (failed.error_type, failed.fingerprint, failed.last_failed_at, failed.latest())
        return self._settle(
            claim,
            f"UPDATE letters SET {_FAILURE}, replays = replays + 1, leases = 0, owner = NULL, "  # noqa: S608
            "until = NULL, revision = revision + 1, attempts = attempts + ?, "
            f"state = iif(replays + 1 >= {MOST_REPLAYS}, 'parked', 'dead')",
            *failure,
            max(0, failed.attempts - claim.letter.attempts),
        )

    def release(self, claim: Claim) -> bool:
        """Give a letter back that was not tried; see `Store`."""
        return self._settle(
            claim,
            "UPDATE letters SET state = before, owner = NULL, until = NULL, "
            "revision = revision + 1",
        )

    def purge(self, where: Filter, *, dry_run: bool = True) -> int:
        """Remove letters for good; see `Store`."""
        conditions, values = _conditions(where)
        if dry_run:
            query = f"SELECT count(*) FROM letters WHERE {conditions}"  # noqa: S608
            return int(self.database.read(query, values)[0][0])
        removed = 0
        while True:
            with self.database.writing() as writing:
                gone = writing.execute(
                    f"DELETE FROM letters WHERE seq IN (SELECT seq FROM letters WHERE {conditions} "  # noqa: S608
                    "ORDER BY seq LIMIT ?) RETURNING id",
                    (*values, _CHUNK),
                ).fetchall()
                self._remember(writing, where.queue, [letter_id for (letter_id,) in gone])
            removed += len(gone)
            if len(gone) < _CHUNK:
                return removed

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def _change(self, where: Filter, change: str, limit: int | None = None) -> int:
        """Change letters, a chunk at a time; returns how many."""
        conditions, values = _conditions(where)
        changed, after = 0, 0
        while limit is None or changed < limit:
            chunk = _CHUNK if limit is None else min(_CHUNK, limit - changed)
            with self.database.writing() as writing:
                rows = writing.execute(
                    f"UPDATE letters SET {change}, revision = revision + 1 "  # noqa: S608
                    f"WHERE seq IN (SELECT seq FROM letters WHERE {conditions} AND seq > ? "
                    "ORDER BY seq LIMIT ?) RETURNING seq",
                    (*values, after, chunk),
                ).fetchall()
            changed += len(rows)
            if len(rows) < chunk:
                break
            after = max(seq for (seq,) in rows)
        return changed

    def _settle(self, claim: Claim, statement: str, *values: Any, removes: bool = False) -> bool:
        letter = claim.letter
        with self.database.writing() as writing:
            held = writing.execute(
                f"{statement} WHERE id = ? AND queue = ? AND state = 'claimed' AND owner = ? "
                "AND revision = ?",
                (*values, letter.id, letter.queue, claim.owner, letter.revision),
            ).rowcount
            if held and removes:
                self._remember(writing, letter.queue, [letter.id])
        return bool(held)

    def _remember(self, writing: Connection, queue: str, ids: Sequence[str]) -> None:
        now = self._clock()
        writing.execute("DELETE FROM removed WHERE until < ?", (now,))
        writing.executemany(
            "INSERT OR REPLACE INTO removed VALUES (?, ?, ?)",
            [(one, queue, now + REMEMBERED) for one in ids],
        )


def _end_leases(writing: Connection, queue: str, now: float) -> None:
    """Take letters back whose lease has run out; park those that outlive too many replayers."""
    writing.execute(
        "UPDATE letters SET leases = leases + 1, owner = NULL, until = NULL, "  # noqa: S608
        f"revision = revision + 1, state = iif(leases + 1 >= {MOST_LEASES}, 'parked', before) "
        "WHERE queue = ? AND state = 'claimed' AND until <= ?",
        (queue, now),
    )


def _letter(row: Sequence[Any]) -> Letter:
    blob, latest, state, revision, attempts, replays, seq = row
    found = (blob, latest or b"", state, revision, attempts, replays)
    if tuple(map(type, found)) != (bytes, bytes, str, int, int, int):
        raise DamagedLetterError(f"row {seq} of the letters is damaged")
    letter = Letter.decode(blob)
    if latest is not None:
        letter = letter.with_latest(latest)
    return letter.changed(state=state, revision=revision, attempts=attempts, replays=replays)


def _damage_of(row: Sequence[Any]) -> DamagedLetterError | None:
    try:
        _letter(row)
    except DamagedLetterError as error:
        return error
    return None


def _conditions(where: Filter) -> tuple[str, tuple[Any, ...]]:
    """Return a filter as SQL and its values."""
    terms: list[str] = ["queue = ?", _is_in("state", where.states)]
    values: list[Any] = [where.queue, *where.states]
    if where.ids is not None:
        terms.append("id IN (SELECT value FROM json_each(?))")  # any number of them
        values.append(_as_json(where.ids))
    for column, value in (
        ("feed = ?", where.feed),
        ("operation = ?", where.operation),
        ("fingerprint = ?", where.fingerprint),
        ("error_type = ?", where.error_type),
        ("failed_at >= ?", where.since),
        ("failed_at < ?", where.until),
    ):
        if value is not None:
            terms.append(column)
            values.append(value)
    return " AND ".join(terms), tuple(values)


def _as_json(ids: Sequence[str]) -> str:
    return msgspec.json.encode(ids).decode()


def _is_in(column: str, values: Sequence[object]) -> str:
    return f"{column} IN ({','.join('?' * len(values))})"


def _sequence(cursor: str) -> int:
    try:
        return int(cursor)
    except ValueError:
        raise StoreError(f"{clean_name(cursor, 40)!r} is no cursor of this store") from None
