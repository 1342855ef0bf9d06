"""Letters in a SQLite file: the embedded store, which needs no server.

Each letter is a row: the encoded letter as it was put, and columns for what changes and for what
one looks for. A letter that does not fit into a page with its row is in a table of its own: a
change of a row writes all of it, and a change of state must not write megabytes anew. Counts are
kept by triggers in the same transactions, so they are right at any time and cost the same with ten
letters as with a million.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import msgspec

from periscope_otel.dead_letter.database import LONG, Database
from periscope_otel.dead_letter.errors import DamagedLetterError, StoreError
from periscope_otel.dead_letter.letter import Letter
from periscope_otel.dead_letter.sqlite_schema import SCHEMA
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
    checked_queue,
    finite,
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


_MOST_FACETS: Final = 1000
_CHUNK: Final = 500
"""Letters that one transaction changes, so that others get their turn."""

_FAILURE: Final = (
    "error_type = ?, fingerprint = ?, failed_at = ?, not_before = ?, latest = ?, "
    "attempts = attempts + ?, revision = revision + 1"
)
_BACK: Final = "seq, queue, same, failed_at"
BLOB: Final = (
    "ifnull(letter, (SELECT letter FROM letter_blobs AS blobs WHERE blobs.seq = letters.seq))"
)
ROW: Final = f"{BLOB}, latest, state, revision, attempts, replays, seq"
"""Columns that `letter_of` reads."""


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
        self.database = Database(path, SCHEMA, **options)
        self._clock = clock
        self.url = f"sqlite:///{quote(str(self.database.path))}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, letters: Sequence[Letter], *, revive: bool = False) -> list[Put]:
        """Store letters, all or none; see `Store`."""
        rows = [(letter, letter.encode()) for letter in letters]  # not while the lock is held
        with self.database.writing() as writing:
            return [self._put(writing, letter, blob, revive=revive) for letter, blob in rows]

    def put_within(
        self, writing: Connection, letters: Sequence[Letter], *, revive: bool = False
    ) -> list[Put]:
        """Store letters as a part of somebody's transaction.

        Args:
            writing: What `database.writing()` gives.
            letters: Of any queues.
            revive: Store also those that were removed a moment ago.

        Returns:
            What became of each, once the transaction has ended well.
        """
        return [self._put(writing, letter, letter.encode(), revive=revive) for letter in letters]

    def _put(self, writing: Connection, letter: Letter, blob: bytes, *, revive: bool) -> Put:
        name = (letter.id, checked_queue(letter.queue))
        if revive:
            writing.execute("DELETE FROM removed WHERE id = ? AND queue = ?", name)
        known = writing.execute(
            "SELECT 1 FROM letters WHERE id = ?1 AND queue = ?2 "
            "UNION ALL SELECT 1 FROM removed WHERE id = ?1 AND queue = ?2",
            name,
        ).fetchone()
        if known:
            return "known"
        same = payload_identity(letter)
        twin = writing.execute(
            f"SELECT id, failed_at, {ROW} FROM letters "  # noqa: S608
            "WHERE same = ? AND state <> 'claimed' AND queue = ?",
            (same, letter.queue),
        ).fetchone()
        if twin:
            twin_id, failed_at, *row = twin
            if _damage_of(row) is not None:
                failed_at = -math.inf
                _replace(writing, row[-1], letter.changed(id=twin_id).encode())
            _take_in(writing, row[-1], failed_at, letter)
            self._remember(writing, letter.queue, [letter.id])
            return "merged"
        _insert(writing, letter, blob, same)
        return "stored"

    def get(self, letter_id: str, queue: str = "default") -> Letter | None:
        """Return a letter by its id; see `Store`."""
        query = f"SELECT {ROW} FROM letters WHERE id = ? AND queue = ?"  # noqa: S608
        rows = self.database.read(query, (letter_id, checked_queue(queue)))
        return letter_of(rows[0]) if rows else None

    def missing(self, ids: Sequence[str], queue: str = "default") -> Sequence[str]:
        """Return those ids of which nothing is known; see `Store`."""
        rows = self.database.read(
            "SELECT value FROM json_each(?1) AS asked "
            "WHERE NOT EXISTS (SELECT 1 FROM letters WHERE id = asked.value AND queue = ?2) "
            "AND NOT EXISTS (SELECT 1 FROM removed WHERE id = asked.value AND queue = ?2)",
            (_as_json(ids), checked_queue(queue)),
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
            conditions += f" AND {_seq(where)} {'<' if newest_first else '>'} ?"
            values = (*values, _sequence(cursor))
        order = "DESC" if newest_first else "ASC"
        rows = self.database.read(
            f"SELECT {ROW} FROM letters WHERE {conditions} "  # noqa: S608
            f"ORDER BY {_seq(where)} {order} LIMIT ?",
            (*values, limit),
        )
        return Page(readable(rows, letter_of), str(rows[-1][-1]) if len(rows) == limit else None)

    def stats(self, queue: str = "default") -> Stats:
        """Return how many letters there are; see `Store`."""

        def by(kind: str) -> dict[Any, int]:
            return dict(
                self.database.read(
                    f"SELECT name, letters FROM letter_counts WHERE queue = ? AND kind = '{kind}' "  # noqa: S608
                    f"AND letters > 0 AND name <> '' ORDER BY letters DESC LIMIT {_MOST_FACETS}",
                    (queue,),
                )
            )

        ((oldest, size),) = self.database.read(
            "SELECT (SELECT min(failed_at) FROM letters WHERE queue = ?1 AND state = 'dead'), "
            "(SELECT ifnull(sum(size), 0) FROM letter_counts WHERE queue = ?1 AND kind = 'state')",
            (checked_queue(queue),),
        )
        return Stats(by("state"), by("feed"), by("cause"), oldest, size)

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
            self._end_leases(writing, where.queue, now)
            if where.ids is None:
                conditions, values = f"{conditions} AND not_before <= ?", (*values, now)
            rows = writing.execute(
                "UPDATE letters SET before = state, state = 'claimed', owner = ?, until = ?, "  # noqa: S608
                "revision = revision + 1 WHERE seq IN "
                f"(SELECT seq FROM letters WHERE {conditions} ORDER BY {_seq(where)} LIMIT ?) "
                f"RETURNING {ROW}",
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
        return [Claim(letter, owner, now + lease) for letter in readable(rows, letter_of)]

    def renew(self, claim: Claim, lease: float) -> Claim | None:
        """Hold a claim for longer; see `Store`."""
        until = self._clock() + lease
        with self.database.writing() as writing:
            held = _end(writing, claim, "UPDATE letters SET until = ?", until)
        return claim._replace(until=until) if held else None

    def settle(self, claim: Claim, failed: Letter | None = None) -> bool:
        """End a claim; see `Store`."""
        letter = claim.letter
        with self.database.writing() as writing:
            if failed is not None:
                held = _end(
                    writing,
                    claim,
                    f"UPDATE letters SET {_FAILURE}, replays = replays + 1, leases = 0, "  # noqa: S608
                    "owner = NULL, until = NULL, "
                    f"state = iif(replays + 1 >= {MOST_REPLAYS}, 'parked', 'dead')",
                    *_failure(failed),
                    max(0, failed.attempts - letter.attempts),
                )
                self._come_back(writing, held)
            elif held := _end(writing, claim, "DELETE FROM letters"):
                self._remember(writing, letter.queue, [letter.id])
        return bool(held)

    def release(self, claim: Claim) -> bool:
        """Give a letter back that was not tried; see `Store`."""
        with self.database.writing() as writing:
            held = _end(
                writing,
                claim,
                "UPDATE letters SET state = before, owner = NULL, until = NULL, "
                "revision = revision + 1",
            )
            self._come_back(writing, held)
        return bool(held)

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
                    f"ORDER BY {_seq(where)} LIMIT ?) RETURNING id",
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
                    f"WHERE seq IN (SELECT seq FROM letters WHERE {conditions} "
                    f"AND {_seq(where)} > ? ORDER BY {_seq(where)} LIMIT ?) RETURNING seq",
                    (*values, after, chunk),
                ).fetchall()
            changed += len(rows)
            if len(rows) < chunk:
                break
            after = max(seq for (seq,) in rows)
        return changed

    def _end_leases(self, writing: Connection, queue: str, now: float) -> None:
        """Take letters back whose lease has run out; park those that outlive too many replayers."""
        ended = writing.execute(
            "UPDATE letters SET leases = leases + 1, owner = NULL, until = NULL, "  # noqa: S608
            f"revision = revision + 1, state = iif(leases + 1 >= {MOST_LEASES}, 'parked', before) "
            f"WHERE queue = ? AND state = 'claimed' AND until <= ? RETURNING {_BACK}",
            (queue, now),
        ).fetchall()
        self._come_back(writing, ended)

    def _come_back(self, writing: Connection, ended: Sequence[tuple[int, str, str, float]]) -> None:
        """Have letters whose claims have ended take in those that came meanwhile.

        So one letter is left; where one of them is parked, that one is.
        """
        for seq, queue, same, failed_at in ended:
            twins = writing.execute(
                f"SELECT {ROW} FROM letters WHERE same = ? AND queue = ? AND state <> 'claimed' "  # noqa: S608
                "AND seq <> ? AND EXISTS (SELECT 1 FROM letters WHERE seq = ?3)",
                (same, queue, seq),
            ).fetchall()
            for twin in (row for row in twins if _damage_of(row) is None):
                letter = letter_of(twin)
                older = math.nextafter(failed_at, math.inf)  # only what is newer replaces its error
                _take_in(writing, seq, older, letter)
                writing.execute(
                    "UPDATE letters SET state = 'parked' WHERE seq = ? AND ? = 'parked'",
                    (seq, letter.state),
                )
                writing.execute("DELETE FROM letters WHERE seq = ?", (twin[-1],))
                self._remember(writing, queue, [letter.id])

    def _remember(self, writing: Connection, queue: str, ids: Sequence[str]) -> None:
        now = self._clock()
        writing.execute("DELETE FROM removed WHERE until < ?", (now,))
        writing.executemany(
            "INSERT OR REPLACE INTO removed VALUES (?, ?, ?)",
            [(one, queue, now + REMEMBERED) for one in ids],
        )


def _insert(writing: Connection, letter: Letter, blob: bytes, same: str) -> None:
    row = writing.execute(
        "INSERT INTO letters (id, queue, state, operation, feed, fingerprint, error_type, same,"
        " failed_at, not_before, attempts, replays, size, letter) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (letter.id, letter.queue, resting_state(letter.state), letter.operation, letter.feed or "",
         letter.fingerprint, letter.error_type or "", same, finite(letter.last_failed_at),
         finite(letter.not_before), letter.attempts, letter.replays, len(blob),
         blob if len(blob) < LONG else None),
    )  # fmt: skip
    if len(blob) >= LONG:
        writing.execute("INSERT INTO letter_blobs VALUES (?, ?)", (row.lastrowid, blob))


def _replace(writing: Connection, seq: int, blob: bytes) -> None:
    """Put a good letter in the place of a damaged one."""
    inline = blob if len(blob) < LONG else None
    writing.execute(
        "UPDATE letters SET letter = ?, size = ?, latest = NULL WHERE seq = ?",
        (inline, len(blob), seq),
    )
    writing.execute("DELETE FROM letter_blobs WHERE seq = ?", (seq,))
    if inline is None:
        writing.execute("INSERT INTO letter_blobs VALUES (?, ?)", (seq, blob))


def _take_in(writing: Connection, seq: int, failed_at: float, letter: Letter) -> None:
    """Add another failure of the same payload; its error counts unless it is the older one."""
    if finite(letter.last_failed_at) >= failed_at:
        statement, values = f"UPDATE letters SET {_FAILURE} WHERE seq = ?", _failure(letter)  # noqa: S608
    else:
        statement, values = (
            "UPDATE letters SET attempts = attempts + ?, revision = revision + 1 WHERE seq = ?",
            (),
        )
    writing.execute(statement, (*values, letter.attempts, seq))


def _failure(letter: Letter) -> tuple[Any, ...]:
    """Return the values of a letter's failure, as in `_FAILURE`."""
    return (
        letter.error_type or "",
        letter.fingerprint,
        finite(letter.last_failed_at),
        finite(letter.not_before),
        letter.latest(),
    )


def _end(writing: Connection, claim: Claim, statement: str, *values: Any) -> list[Any]:
    """Do something with a letter if its claim still holds; returns what `_come_back` wants."""
    letter = claim.letter
    return writing.execute(
        f"{statement} WHERE id = ? AND queue = ? AND state = 'claimed' AND owner = ? "
        f"AND revision = ? RETURNING {_BACK}",
        (*values, letter.id, letter.queue, claim.owner, letter.revision),
    ).fetchall()


def letter_of(row: Sequence[Any]) -> Letter:
    """Return the letter of a row that was selected as `ROW`.

    Raises:
        DamagedLetterError: If it is none.
    """
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
        letter_of(row)
    except DamagedLetterError as error:
        return error
    return None


def _conditions(where: Filter) -> tuple[str, tuple[Any, ...]]:
    """Return a filter as SQL and its values."""
    # A column behind a plus is not looked up in an index: ids are by far the shortest way.
    plus = "" if where.ids is None else "+"
    terms: list[str] = [f"{plus}queue = ?", _is_in(f"{plus}state", where.states)]
    values: list[Any] = [checked_queue(where.queue), *where.states]
    if where.ids is not None:
        terms.append("id IN (SELECT value FROM json_each(?))")  # any number of them
        values.append(_as_json(where.ids))
    for condition, value in (
        ("feed = ?", where.feed),
        ("operation = ?", where.operation),
        ("fingerprint = ?", where.fingerprint),
        ("error_type = ?", where.error_type),
        ("failed_at >= ?", where.since),
        ("failed_at < ?", where.until),
    ):
        if value is not None:
            terms.append(plus + condition)
            values.append(value)
    return " AND ".join(terms), tuple(values)


def _seq(where: Filter) -> str:
    """Return how the order of arrival is written, where it must not be the way to look up."""
    return "seq" if where.ids is None else "+seq"


def _as_json(ids: Sequence[str]) -> str:
    return msgspec.json.encode(ids).decode()


def _is_in(column: str, values: Sequence[object]) -> str:
    return f"{column} IN ({','.join('?' * len(values))})"


def _sequence(cursor: str) -> int:
    try:
        return int(cursor)
    except ValueError:
        raise StoreError(f"{clean_name(cursor, 40)!r} is no cursor of this store") from None
