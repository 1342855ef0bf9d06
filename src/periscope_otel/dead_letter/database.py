"""A SQLite file that threads, processes and forks share, and that survives the death of each.

One connection writes, behind a lock; whoever reads borrows a connection of its own, so that a long
list holds no writer up. A fork waits a moment for what is under way, since SQLite keeps track of
locks in the memory of a process, and a child would inherit locks that nobody ever gives back. The
child opens new connections and leaves the parent's alone (sqlite.org/howtocorrupt.html, 2.6). While
another process writes, this one waits outside of SQLite, where a fork does no harm.
"""

from __future__ import annotations

import os
import random
import sqlite3
import stat
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from periscope_otel.dead_letter.errors import StoreError, StoreFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Begun = TypeVar("Begun")

_PRIVATE: Final = 0o600
_NETWORKED: Final = frozenset(
    [
        *("nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afpfs", "ncpfs", "9p", "afs"),
        *("glusterfs", "ceph", "lustre", "beegfs", "gpfs", "pvfs2", "orangefs", "vboxsf"),
        *("fuse.sshfs", "fuse.s3fs", "fuse.glusterfs", "fuse.rclone", "fuse.gcsfuse"),
        *("fuse.goofys", "fuse.blobfuse", "fuse.blobfuse2", "fuse.cephfs", "fuse.ceph-fuse"),
        *("fuse.juicefs", "fuse.mount-s3", "fuse.moosefs", "fuse.davfs", "davfs"),
    ]
)
"""File systems on which SQLite's locks do not hold (sqlite.org/wal.html, "All processes using a
database must be on the same host computer")."""

_OUR_TABLES: Final = frozenset({"letters", "outbox", "journal"})

LARGEST_LOG: Final = 64 << 20
"""Bytes that the write-ahead log may take before writers wait for it to be moved."""

LONGEST_LOG: Final = 1000
"""Pages of the write-ahead log from which it is begun anew, where commits wait for the disk: one
that writes over what was there before waits half as long as one that has the file grow."""

SCHEMA_VERSION: Final = 1
"""Of all tables in a file; one of a greater number was written by a newer version."""

LONG: Final = 3000
"""Bytes of a blob from which it has a row of its own: with others it would not fit into a page."""

_MOST_IDLE: Final = 8
"""Connections for reading that are kept for the next reader."""

_LONGEST_PAUSE: Final = 0.02
"""Seconds between two looks whether another process has ended its transaction."""

_FOREVER: Final[list[object]] = []
"""Connections of a parent process, which a child must neither use nor close."""


class _ForkGate:
    """Lets a fork wait for what is under way in this process's files."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._forking = False

    def enter(self) -> None:
        """Begin something that no fork should come in between."""
        with self._changed:
            if self._forking:
                self._changed.wait_for(lambda: not self._forking, FORK_WAIT)
            self._inside += 1

    def leave(self) -> None:
        """End it."""
        with self._changed:
            self._inside -= 1
            if self._forking:
                self._changed.notify_all()

    def before_fork(self) -> None:
        """Let nothing begin, and wait until all that has begun is over, for a second at most."""
        with self._changed:
            self._forking = True
            self._changed.wait_for(lambda: not self._inside, FORK_WAIT)

    def after_fork_in_parent(self) -> None:
        """Let it go on."""
        with self._changed:
            self._forking = False
            self._changed.notify_all()

    def after_fork_in_child(self) -> None:
        """Begin anew; what was under way after all makes the files unusable here."""
        was_busy = self._inside > 0
        self.__init__()  # type: ignore[misc]
        for database in list(_OPEN):
            database.after_fork(usable=not was_busy)


FORK_WAIT: Final = 1.0
"""Seconds that a fork waits at most for a transaction to end; mostly it is a fraction of one."""

_OPEN: Final[weakref.WeakSet[Database]] = weakref.WeakSet()
_gate: Final = _ForkGate()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_gate.before_fork,
        after_in_parent=_gate.after_fork_in_parent,
        after_in_child=_gate.after_fork_in_child,
    )


def between_forks(look: Callable[[], Begun], busy: float) -> Begun:
    """Return what a function returns that looks at a file of SQLite, while no fork comes between.

    Args:
        look: Opens a connection that does not wait for others, and closes it.
        busy: Seconds for which it is tried again while another process is at the file.
    """
    deadline = time.monotonic() + busy
    while True:
        _gate.enter()
        try:
            return look()
        except sqlite3.Error as error:
            if not _is_busy(error) or time.monotonic() >= deadline:
                raise
        finally:
            _gate.leave()
        time.sleep(_LONGEST_PAUSE)


class Database:
    """A file with a schema.

    Args:
        path: The file; made if it is not there, with its folder, both readable by their user alone.
        schema: Statements that make it what it is, harmless where it is that already, each ended by
            a semicolon; run as one transaction.
        synchronous: `FULL` if what is committed has to survive a power cut, `NORMAL` if the death
            of the process is all that it has to survive.
        busy: Seconds to wait for another process that writes.
        largest: Bytes that the file may grow to; beyond that nothing is added to it.
        checkpoints: Whether commits move what they wrote into the database now and then. Without
            that, whoever opened it has to.

    Raises:
        StoreError: If it cannot be used; the message says why.
    """

    _written_by: sqlite3.Connection | None
    _idle: list[sqlite3.Connection]
    _level: str
    """How safely the writing connection writes now."""
    _is_inside: bool
    """Whether a thread is writing."""
    _lent: set[sqlite3.Connection]
    """Those that somebody reads with now."""

    def __init__(
        self,
        path: str | Path,
        schema: str,
        *,
        synchronous: str = "FULL",
        busy: float = 5.0,
        largest: int | None = None,
        checkpoints: bool = True,
    ) -> None:
        self.path = Path(path).absolute()
        self._schema = schema
        self._synchronous = synchronous
        self._busy = busy
        self._pragmas = (
            f"PRAGMA synchronous={synchronous}",
            f"PRAGMA wal_autocheckpoint={1000 if checkpoints else 0}",
            *(() if largest is None else (f"PRAGMA max_page_count={max(64, largest // 4096)}",)),
        )
        self._reset()
        self._make_private_file()
        _OPEN.add(self)
        with self.writing():
            pass
        with suppress(OSError):
            self._make_private()

    @contextmanager
    def writing(self, durable: bool | None = None) -> Iterator[sqlite3.Connection]:
        """Run a block as one transaction; what raises inside of it undoes it.

        Args:
            durable: Whether it has to survive a power cut (FULL), or only the death of the process
                (NORMAL); by default as the database was opened.

        Raises:
            StoreError: If the file cannot be written to, now or at all; or if this thread is
                writing to it already, as where a signal handler or a finaliser interrupts it.
        """
        level = self._synchronous if durable is None else "FULL" if durable else "NORMAL"
        with self._turn(), explained(self.path):
            connection = self._patiently(lambda: self._begin(level))
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            finally:
                _gate.leave()

    def _begin(self, level: str) -> sqlite3.Connection:
        """Begin a transaction that is written as safely as is asked for."""
        connection = self._writer()
        if self._level != level:  # SQLite takes the pragma outside of transactions alone
            connection.execute(f"PRAGMA synchronous={level}")
            self._level = level
        connection.execute("BEGIN IMMEDIATE")
        return connection

    def read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return the rows of a query."""

        def rows() -> list[Any]:
            with self._borrowed() as connection:
                return connection.execute(query, values).fetchall()

        with explained(self.path):
            found = self._patiently(rows)
            _gate.leave()
            return found

    def checkpoint(self) -> None:
        """Move what was written into the database, as far as nobody reads or writes it now."""
        ((_, frames, _),) = self.read("PRAGMA wal_checkpoint(PASSIVE)")
        # Writers that never rest keep it from being begun anew: now one of them waits for that.
        if self._log_size() > LARGEST_LOG:
            self._begin_log_anew("TRUNCATE")
        elif frames > LONGEST_LOG and self._synchronous == "FULL":
            self._begin_log_anew("RESTART")

    def _begin_log_anew(self, way: str) -> None:
        with self._turn(), explained(self.path):
            for pause in self._pauses():
                _gate.enter()
                try:
                    query = f"PRAGMA wal_checkpoint({way})"
                    ((busy, *_),) = self._writer().execute(query).fetchall()
                finally:
                    _gate.leave()
                if not busy:
                    return
                time.sleep(pause)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Have other threads wait; this one, if it is inside already, is told so and does not hang.

        The lock lets a thread in again, so that an interruption at any moment gets as far as that.
        """
        with self._lock:
            if self._is_inside:
                raise StoreError(f"cannot use {self.path}: this thread is writing to it already")
            self._is_inside = True
            try:
                yield
            finally:
                self._is_inside = False

    def _patiently(self, begin: Callable[[], Begun]) -> Begun:
        """Return what a function returns, tried again while another process is at the file.

        The gate is closed then, until it is left by the caller. Between two tries it is open: a
        fork meets nothing that its child would inherit half done.
        """
        pauses: Iterator[float] | None = None
        while True:
            _gate.enter()
            try:
                return begin()
            except BaseException as error:
                _gate.leave()
                pauses = pauses or self._pauses()
                pause = next(pauses) if isinstance(error, sqlite3.Error) else 0.0
                if not pause or not _is_busy(error):
                    raise
            time.sleep(pause)

    def _pauses(self) -> Iterator[float]:
        """Give the seconds to wait between tries, and 0 for the last one."""
        deadline = time.monotonic() + self._busy
        pause = 0.001
        while time.monotonic() < deadline:
            yield pause * random.uniform(0.5, 1.0)  # noqa: S311
            pause = min(2 * pause, _LONGEST_PAUSE)
        yield 0.0

    def _log_size(self) -> int:
        try:
            return os.stat(f"{self.path}-wal").st_size  # noqa: PTH116
        except OSError:
            return 0

    def close(self) -> None:
        """Close this process's connections; those in use, when they are given back."""
        with self._turn():
            if self._written_by is not None:
                self._written_by.close()
            self._written_by = None
            self._lent = set()
            while self._idle:
                self._idle.pop().close()

    def after_fork(self, *, usable: bool) -> None:
        """Leave the parent's connections alone, in the child of a fork."""
        _FOREVER.extend((self._written_by, *self._idle, *self._lent))
        self._reset()
        self._usable = usable

    def _reset(self) -> None:
        self._usable = True
        self._lock = threading.RLock()
        self._is_inside = False
        self._level = self._synchronous
        self._written_by = None
        self._idle = []
        self._lent = set()

    def _writer(self) -> sqlite3.Connection:
        if self._written_by is None:
            connection = self._connect()
            self._level = self._synchronous
            try:
                version = self._version_of(connection)
                connection.execute("PRAGMA journal_mode=WAL")
                self._make_schema(connection, version)
            except BaseException:
                connection.close()
                raise
            self._written_by = connection
        return self._written_by

    def _version_of(self, connection: sqlite3.Connection) -> int:
        """Return the version of the file's schema; raises a StoreError if it is not one of ours."""
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if tables and not tables & _OUR_TABLES:
            raise StoreError(f"{self.path} is a database of another program: use another file")
        version: int
        ((version,),) = connection.execute("PRAGMA user_version").fetchall()
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} was written by a newer version of periscope-otel (schema {version}, "
                f"here {SCHEMA_VERSION}): update this one, or use another file"
            )
        return version

    def _make_schema(self, connection: sqlite3.Connection, version: int) -> None:
        mark = f"PRAGMA user_version={SCHEMA_VERSION};" if version < SCHEMA_VERSION else ""
        connection.executescript(f"BEGIN IMMEDIATE;{self._schema};{mark}COMMIT")

    @contextmanager
    def _borrowed(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection for reading; there are as many as there are readers at a time."""
        lent = self._lent
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        lent.add(connection)
        try:
            yield connection
        finally:
            lent.discard(connection)
            if lent is self._lent and len(self._idle) < _MOST_IDLE:
                self._idle.append(connection)
            else:  # closed meanwhile, or more than enough
                connection.close()

    def _connect(self) -> sqlite3.Connection:
        if not self._usable:
            raise StoreError(f"cannot use {self.path}: forked in the middle of a transaction")
        # The lock, and lending, see to it that no two threads use one at a time.
        connection = sqlite3.connect(
            self.path, timeout=0, isolation_level=None, check_same_thread=False
        )
        try:
            for pragma in self._pragmas:
                connection.execute(pragma)
        except BaseException:
            connection.close()
            raise
        return connection

    def _create(self) -> None:
        """Make the file, readable by this user alone, unless it is there.

        It is never opened and closed where it exists: that would give up all locks that this
        process has on it (sqlite.org/howtocorrupt.html, 2.2).
        """
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        with suppress(FileExistsError):
            os.close(os.open(self.path, flags, _PRIVATE))

    def _make_private(self) -> None:
        """Take a file that others may read away from them, once it is known to be ours."""
        mode = stat.S_IMODE(self.path.stat().st_mode)
        if mode & 0o077:
            os.chmod(self.path, mode & 0o700)  # noqa: PTH101

    def _make_private_file(self) -> None:
        folder = self.path.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            refuse_networked(folder)
            self._create()
        except OSError as error:
            raise StoreError(f"cannot use {self.path}: {error.strerror}") from None
        except ValueError as error:  # a name with a null character
            raise StoreError(f"cannot use {str(self.path)!r}: {error}") from None


def refuse_networked(folder: Path) -> None:
    """Raise a StoreError if a folder is on a file system of another machine."""
    kind = _file_system_of(folder.resolve())
    if kind.lower() in _NETWORKED:
        raise StoreError(
            f"{folder} is on a network file system ({kind}), where file locks cannot be relied on; "
            "choose a data directory on a local disk"
        )


def _file_system_of(folder: Path) -> str:
    import psutil

    mounted = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    for place in (folder, *folder.parents):
        if str(place) in mounted:
            return mounted[str(place)]
    return ""


def _is_busy(error: BaseException) -> bool:
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) == sqlite3.SQLITE_BUSY


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Have SQLite's errors in a block be a StoreError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", "") or ""
        kind = StoreFullError if code == "SQLITE_FULL" else StoreError
        raise kind(f"cannot use {path}: {error}") from error
