"""What is left in the file of a queue when a Redis is configured, or no longer is.

The same file is an outbox with a Redis and the store without one, in tables of their own. Letters
of the other kind would wait for ever, so they are moved: a chunk at a time, each in a transaction
in which it arrives and leaves, so a process that dies has moved a letter or has not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from periscope_otel import guard
from periscope_otel.dead_letter.errors import DamagedLetterError, RefusedError
from periscope_otel.dead_letter.letter import Letter
from periscope_otel.dead_letter.outbox import BLOB as OUTBOX_BLOB
from periscope_otel.dead_letter.outbox import Outbox
from periscope_otel.dead_letter.sqlite_store import BLOB as STORE_BLOB
from periscope_otel.dead_letter.sqlite_store import ROW, letter_of
from periscope_otel.dead_letter.store import checked_queue, resting_state

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from sqlite3 import Connection

    from periscope_otel.dead_letter.sqlite_store import SQLiteStore

_CHUNK: Final = 64
"""Letters of one transaction."""
_MOST_BYTES: Final = 4 << 20
"""Bytes of them, unless a single one is larger."""


class _Left(NamedTuple):
    """Where letters are left, and how they are read from there."""

    table: str
    rows: str
    """The table, with a condition if not all of it is meant."""
    since: str
    blob: str
    letter: str
    """The columns that `read` takes."""
    read: Callable[[Sequence[Any]], Letter]


_IN_STORE: Final = _Left("letters", "letters", "failed_at", STORE_BLOB, ROW, letter_of)
_IN_OUTBOX: Final = _Left(
    *("outbox", "outbox WHERE taken_at IS NULL", "put_at", OUTBOX_BLOB, OUTBOX_BLOB),
    read=lambda row: Letter.decode(row[0] or b""),
)


def move_what_is_left(file: SQLiteStore | Outbox) -> bool:
    """Move a chunk of letters that the file still has from before a Redis was switched on or off.

    A letter keeps its state: one that is parked stays so, one that somebody has is dead again.
    Where there is nothing to do it costs one look.

    Args:
        file: What the file is now.

    Returns:
        Whether there may be more.

    Raises:
        StoreError: If the file cannot be written to now.

    Example:
        >>> while move_what_is_left(queue_file):
        ...     pass
    """
    left = _IN_STORE if isinstance(file, Outbox) else _IN_OUTBOX
    there = file.database.read(
        "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (left.table,)
    )
    if not there or not file.database.read(f"SELECT 1 FROM {left.rows} LIMIT 1"):  # noqa: S608
        return False
    with file.database.writing() as writing:
        rows = _chunk(writing, left)
        letters: list[Letter] = []
        for seq, _, *row in rows:
            try:
                letter = left.read(row)
                checked_queue(letter.queue)
            except (DamagedLetterError, RefusedError) as error:
                _set_aside(writing, left, seq, error)
            else:
                letters.append(letter.changed(state=resting_state(letter.state)))
        file.put_within(writing, letters)
        writing.executemany(
            f"DELETE FROM {left.table} WHERE seq = ?",  # noqa: S608
            [(row[0],) for row in rows],
        )
    return bool(rows)


def _chunk(writing: Connection, left: _Left) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = []
    size = 0
    query = f"SELECT seq, size, {left.letter} FROM {left.rows} ORDER BY seq LIMIT {_CHUNK}"  # noqa: S608
    for row in writing.execute(query):
        size += row[1]
        if rows and size > _MOST_BYTES:
            break
        rows.append(row)
    return rows


def _set_aside(writing: Connection, left: _Left, seq: int, why: Exception) -> None:
    """Keep what cannot be moved for somebody to look at, as the outbox does."""
    guard.warn("damaged letter", "a dead letter that is left in the file cannot be moved: %s", why)
    writing.execute(
        f"INSERT INTO damaged SELECT id, {left.since}, {left.blob}, ? "  # noqa: S608
        f"FROM {left.table} WHERE seq = ?",
        (str(why), seq),
    )
