"""Removing old letters: only when somebody asks for it, counted by reason, archived before.

Nothing here runs by itself. A letter that waits for a replay (`queued`) or is being replayed
(`claimed`) is never removed.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from periscope_otel.dead_letter.errors import DeadLetterError
from periscope_otel.dead_letter.interchange import (
    append_lines,
    carried,
    file_of,
    pages,
    to_line,
)
from periscope_otel.dead_letter.letter import STATES, Letter
from periscope_otel.dead_letter.store import Filter, Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from collections.abc import Set as AbstractSet
    from typing import Literal

    from periscope_otel.dead_letter.bodies import BodyFiles
    from periscope_otel.dead_letter.letter import State
    from periscope_otel.dead_letter.store import Store

    Reason = Literal["by_age", "by_number", "by_size"]

DAY: Final = 86400.0

_BATCH_BYTES: Final = 16 << 20
"""Bytes of the archive that are written at a time, unless a single letter is larger."""

KEPT_FOR: Final = 30 * DAY
"""Seconds since its latest failure after which a letter is old."""

SWEPT: Final[tuple[State, ...]] = ("dead", "parked")
"""The states of letters that a sweep may remove."""


@dataclass
class Swept:
    """What a sweep has removed; in a dry run, what it would remove."""

    by_age: int = 0
    """Letters that failed last too long ago."""
    by_number: int = 0
    """The oldest of too many letters."""
    by_size: int = 0
    """The oldest of letters that took too many bytes; about as many in a dry run."""
    archived: int = 0
    """Letters that were written to the archive."""
    kept: int = 0
    """Letters that should go but stay: the archive would not have had their payload, which is in a
    file of another machine or is too large."""
    payload_files: int = 0
    """Payload files that no letter names any more; a dry run does not count them."""
    dry_run: bool = True

    @property
    def letters(self) -> int:
        """All letters that were removed."""
        return self.by_age + self.by_number + self.by_size


def sweep(
    store: Store,
    *,
    older_than: float | None = KEPT_FOR,
    most_letters: int | None = None,
    most_bytes: int | None = None,
    archive: str | Path | None = None,
    dry_run: bool = False,
    queue: str = "default",
    bodies: BodyFiles | None = None,
    payload_queues: Sequence[str] | None = None,
    clock: Callable[[], float] = time.time,
) -> Swept:
    """Remove dead and parked letters of a queue that are old, or more than there should be.

    First go those that are too old, then the first that came, until there are no more than
    `most_letters` and they take no more than `most_bytes`. It may be interrupted at any point: a
    letter is removed only once it is in the archive, if there is to be one.

    Args:
        store: Where the letters are.
        older_than: Seconds since the latest failure; None to go by number and size alone.
        most_letters: Letters that stay, counting those that are queued and claimed.
        most_bytes: Bytes of letters that stay, without payloads that are in files.
        archive: A file to which the letters are appended as JSON Lines before they are removed; see
            `import_letters`. It is made readable by its user alone.
        dry_run: Only count.
        queue: Whose letters.
        bodies: The payload files of this machine; those that no letter names any more are removed
            an hour after they were written.
        payload_queues: All queues whose letters may name such files. Has to be given for a Redis,
            which does not know its queues, or no file is removed; a SQLite store knows them.
        clock: Unix time in seconds.

    Raises:
        StoreError: If the store cannot be used.
        DeadLetterError: If the archive cannot be written; nothing is removed then.
        ValueError: If a limit is negative.

    Example:
        >>> sweep(store, older_than=30 * DAY, archive="swept.jsonl").letters
        12
    """
    for what, value in (
        ("older_than", older_than), ("most_letters", most_letters), ("most_bytes", most_bytes)
    ):  # fmt: skip
        if value is not None and not value >= 0:
            raise ValueError(f"{what}={value}: it has to be 0 or more")
    before = None if older_than is None else clock() - older_than
    run = _Sweep(store, queue, before, archive, bodies, dry_run=dry_run)
    run.by_age()
    run.by_limits(most_letters, most_bytes)
    if bodies is not None and not dry_run:
        run.swept.payload_files = remove_unused_files(store, bodies, payload_queues, clock)
    return run.swept


class _Sweep:
    """One sweep of a queue."""

    def __init__(
        self,
        store: Store,
        queue: str,
        before: float | None,
        archive: str | Path | None,
        bodies: BodyFiles | None,
        *,
        dry_run: bool,
    ) -> None:
        self.swept = Swept(dry_run=dry_run)
        self._store = store
        self._any = Filter(queue=queue, states=SWEPT)
        self._before = before
        self._archive = None if archive is None else Path(archive)
        self._bodies = bodies
        self._dry_run = dry_run
        self._kept: set[str] = set()

    def by_age(self) -> None:
        """Remove what is too old."""
        if self._before is None:
            return
        where = Filter(queue=self._any.queue, states=SWEPT, until=self._before)
        for page in pages(self._store, where):
            self.swept.by_age += self._remove(page.letters, until=self._before)

    def by_limits(self, most_letters: int | None, most_bytes: int | None) -> None:
        """Remove the first that came, as long as there are more than there should be."""
        stats = self._store.stats(self._any.queue)
        letters, size = stats.total, stats.size
        if self._dry_run and self._before is not None:
            letters, size = self._without_old(stats)
        removed = self._removed(letters, size, most_letters, most_bytes)
        if removed and most_bytes is not None and not self._dry_run:
            # How large a letter is in its store is estimated, and may have been too much.
            self.by_limits(None, most_bytes)

    def _removed(
        self, letters: int, size: int, most_letters: int | None, most_bytes: int | None
    ) -> int:
        removed = 0
        for reason, page in self._too_many(letters, size, most_letters, most_bytes):
            gone = self._remove(page)
            setattr(self.swept, reason, getattr(self.swept, reason) + gone)
            removed += gone
        return removed

    def _without_old(self, stats: Stats) -> tuple[int, int]:
        """Return how many letters and bytes there would be without those that are too old."""
        where = Filter(queue=self._any.queue, states=SWEPT, until=self._before)
        old = [
            _size_of(letter)
            for page in pages(self._store, where)
            for letter in page.letters
            if not self._stays(letter)
        ]
        return stats.total - len(old), stats.size - sum(old)

    def _too_many(
        self, letters: int, size: int, most_letters: int | None, most_bytes: int | None
    ) -> Iterator[tuple[Reason, list[Letter]]]:
        """Give what has to go, as lists of letters that go for the same reason."""

        def reason() -> Reason | None:
            if most_letters is not None and letters > most_letters:
                return "by_number"
            return "by_size" if most_bytes is not None and size > most_bytes else None

        if reason() is None:
            return
        for page in pages(self._store, self._any):
            going: dict[Reason, list[Letter]] = {}
            for letter in page.letters:
                why = reason()
                if why is None or self._is_old(letter):
                    continue
                if self._stays(letter):
                    self._keep(letter)
                    continue
                going.setdefault(why, []).append(letter)
                letters, size = letters - 1, size - _size_of(letter)
            yield from going.items()
            if reason() is None:
                return

    def _is_old(self, letter: Letter) -> bool:
        return self._before is not None and letter.last_failed_at < self._before

    def _stays(self, letter: Letter) -> bool:
        """Whether a letter's payload would be lost to the archive, though it is somewhere."""
        if self._archive is None or letter.body_file is None:
            return False
        if self._bodies is None:
            return True
        if carried(letter, self._bodies).body_file is None:
            return False
        from periscope_otel.dead_letter.draft import host_name

        is_lost = letter.host == host_name() and file_of(letter, self._bodies) is None
        return not is_lost

    def _keep(self, letter: Letter) -> None:
        self._kept.add(letter.id)
        self.swept.kept = len(self._kept)

    def _write_down(self, going: list[Letter], archive: Path) -> None:
        """Have letters on the disk before they are removed."""
        try:
            for lines in _batches(to_line(carried(letter, self._bodies)) for letter in going):
                append_lines(archive, lines)
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise DeadLetterError(
                f"cannot write the archive {archive}: {why}; what is not in it stays"
            ) from None
        self.swept.archived += len(going)

    def _remove(self, page: list[Letter], until: float | None = None) -> int:
        """Archive and remove letters; returns how many, or in a dry run how many there are."""
        going = []
        for letter in page:
            if self._stays(letter):
                self._keep(letter)
            else:
                going.append(letter)
        if self._dry_run or not going:
            return len(going)
        if self._archive is not None:
            self._write_down(going, self._archive)
        # One that has failed again since it was listed is no longer old, and stays.
        ids = tuple(letter.id for letter in going)
        where = Filter(queue=self._any.queue, states=SWEPT, ids=ids, until=until)
        return self._store.purge(where, dry_run=False)


def _batches(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Give lines in lists that do not take too much memory."""
    batch: list[bytes] = []
    for line in lines:
        batch.append(line)
        if sum(map(len, batch)) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _size_of(letter: Letter) -> int:
    """Return the bytes that a letter takes in a store, as it was put; about."""
    return len(letter.changed(state="pending", revision=0).encode())


# --- payload files -------------------------------------------------------------------------------


class _Named(msgspec.Struct):
    """What of a letter names a file."""

    body_file: str | None = None


_NAMED: Final = msgspec.msgpack.Decoder(_Named)


def remove_unused_files(
    store: Store,
    bodies: BodyFiles,
    queues: Sequence[str] | None = None,
    clock: Callable[[], float] = time.time,
) -> int:
    """Remove the payload files of this machine that no letter names; returns how many.

    Args:
        store: Where the letters are.
        bodies: The files.
        queues: All queues whose letters may name them; None for all of a SQLite store.
        clock: Unix time in seconds.

    Raises:
        StoreError: If the store cannot be used.
    """
    if not bodies.files():
        return 0
    names = _names_in(store, bodies, queues)
    return 0 if names is None else bodies.remove_unused(names, clock)


def _names_in(
    store: Store, bodies: BodyFiles, queues: Sequence[str] | None
) -> AbstractSet[str] | None:
    """Return all names of files in letters; None where that cannot be known."""
    from periscope_otel.dead_letter.queue import FILE

    database = getattr(store, "database", None)
    # The file of this machine comes first: what is on its way from there to a Redis is then seen
    # in one of them at least.
    names = _names_in_file(bodies.folder.parent / FILE if database is None else database.path)
    if names is None or database is not None:
        return names
    if queues is None:
        return None
    for queue in queues:
        for page in pages(store, Filter(queue=queue, states=STATES)):
            letters = page.letters
            names |= {letter.body_file for letter in letters if letter.body_file is not None}
    return names


def _names_in_file(path: Path) -> set[str] | None:
    """Return the names in all tables of letters: of the store, the outbox and the journal."""
    if not path.exists():
        return set()
    names: set[str] = set()
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as file:
            tables = file.execute(
                "SELECT m.name FROM sqlite_master m JOIN pragma_table_info(m.name) c "
                "WHERE m.type = 'table' AND c.name = 'letter'"
            ).fetchall()
            for (table,) in tables:
                query = f'SELECT letter FROM "{table}" WHERE letter IS NOT NULL'  # noqa: S608
                for (blob,) in file.execute(query):
                    name = _NAMED.decode(blob).body_file
                    if name is not None:
                        names.add(name)
    except (sqlite3.Error, msgspec.MsgspecError, TypeError, UnicodeDecodeError):
        return None  # what a damaged letter names is not known
    return names
