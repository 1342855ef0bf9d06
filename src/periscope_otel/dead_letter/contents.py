"""What a file of dead letters holds, looked at without changing it."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from periscope_otel.dead_letter.database import SCHEMA_VERSION, between_forks, explained
from periscope_otel.dead_letter.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

_QUERIES = {
    "letters": "SELECT ifnull(sum(letters), 0) FROM letter_counts WHERE kind = 'state'",
    "outbox": "SELECT ifnull(sum(waiting), 0) FROM outbox_count",
    "journal": "SELECT count(*) FROM journal",
}


class NewerFileError(StoreError):
    """The file was written by a newer version."""


class Contents(NamedTuple):
    """How many letters a file holds."""

    letters: int
    """Those that stay in this file."""
    outbox: int
    """Those on their way to a Redis."""
    journal: int
    """Payloads of calls that have not ended, or whose process was killed."""


def contents(path: Path, busy: float = 1.0) -> Contents:
    """Return what a file holds.

    Args:
        path: An existing file.
        busy: Seconds to wait for a process that writes.

    Raises:
        StoreError: If it cannot be read; the message says why.

    Example:
        >>> contents(Path("dead-letters.db")).letters
        12
    """
    with explained(path):
        return between_forks(lambda: _look(path), busy)


def _look(path: Path) -> Contents:
    with closing(sqlite3.connect(_url_of(path), uri=True, timeout=0)) as connection:
        connection.execute("PRAGMA query_only = ON")
        ((version,),) = connection.execute("PRAGMA user_version").fetchall()
        if version > SCHEMA_VERSION:
            raise NewerFileError(
                f"{path} was written by a newer version of periscope-otel (schema {version})"
            )
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if tables and not tables & _QUERIES.keys():
            raise StoreError(f"{path} is a database of another program")
        return Contents(**{
            table: _number(connection, query) if table in tables else 0
            for table, query in _QUERIES.items()
        })  # fmt: skip


def _url_of(path: Path) -> str:
    """Return the URL by which looking at a file leaves as little behind as it can.

    Where a killed process has left a write-ahead log and its index, only a connection that may not
    write leaves them where they are. Where they are not there, it would leave empty ones.
    """
    try:
        has_log = min(os.stat(f"{path}{suffix}").st_size for suffix in ("-wal", "-shm")) > 0  # noqa: PTH116
    except OSError:
        has_log = False
    return f"file:{quote(str(path))}?mode={'ro' if has_log else 'rw'}"


def _number(connection: sqlite3.Connection, query: str) -> Any:
    ((number,),) = connection.execute(query).fetchall()
    return number
