"""What the commands about dead letters share: which store, which letters, and how they end."""

from __future__ import annotations

import errno
import io
import json
import logging
import re
import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote, unquote

import typer
from typer.core import TyperGroup

from periscope_otel.cli.letter_options import mistake
from periscope_otel.cli.plain import line
from periscope_otel.dead_letter.bodies import FOLDER, BodyFiles
from periscope_otel.dead_letter.errors import DamagedLetterError, DeadLetterError, StoreError
from periscope_otel.dead_letter.in_use import in_use
from periscope_otel.dead_letter.letter import STATES
from periscope_otel.dead_letter.queue import FILE
from periscope_otel.dead_letter.sqlite_store import SQLiteStore
from periscope_otel.dead_letter.store import Filter, open_store
from periscope_otel.redaction import redact
from periscope_otel.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from periscope_otel.dead_letter.letter import State
    from periscope_otel.dead_letter.store import Store

NOT_DONE: Final = 1
WRONG_USAGE: Final = 2
NO_STORE: Final = 3

EXIT_CODES: Final = (
    "Exit codes: 0 done; 1 something was not done (a replay failed, a letter was not found); "
    "2 a mistake in the command line or the settings; 3 the store cannot be reached."
)

SHORTEST_ID: Final = 8
"""Characters of an id that have to be given."""

_MOST_SEARCHED: Final = 20_000
"""Letters that are looked at for one whose id begins in a certain way."""
_ID: Final = re.compile(r"[0-9A-Za-z._-]{8,100}")
_LENGTH: Final = 36
"""Of a whole id."""
_SQLITE: Final = b"SQLite format 3\0"
"""What a SQLite file begins with (sqlite.org/fileformat.html, section 1.3.1)."""
_EARLIER: Final = 86400.0
"""Seconds by which clocks may differ where an id's own time narrows the search for it."""
_UsageError: Final[Any] = typer.BadParameter.__base__


# --- how a command ends --------------------------------------------------------------------------


class Commands(TyperGroup):
    """Commands whose mistakes are one line each, without secrets, and with the right exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal may not have all characters
                stream.reconfigure(errors="backslashreplace")
        try:
            with _clean_log():
                return super().invoke(ctx)
        except _UsageError as error:
            error.message = redact(str(error.message))
            raise
        except SettingsError as error:
            status = _told(error, WRONG_USAGE)
        except StoreError as error:
            status = _told(error, NO_STORE)
        except DeadLetterError as error:
            status = _told(error, NOT_DONE)
        except BrokenPipeError:
            raise  # the reader has seen enough
        except OSError as error:  # a disk that is full, a file that goes away
            status = _told(error, NOT_DONE)
        raise typer.Exit(status)


def _told(error: Exception, status: int) -> int:
    say(f"periscope: {error}")
    return status


class _CleanFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return line(super().format(record), 1000)


@contextmanager
def _clean_log() -> Iterator[None]:
    """Have the plugin's own warnings say nothing that a terminal acts on."""
    logger = logging.getLogger("periscope_otel")
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_CleanFormatter("periscope: %(message)s"))
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def say(text: object) -> None:
    """Tell a person something, on standard error."""
    typer.echo(line(text, 1000), err=True)


def write(text: str) -> None:
    """Write one line of a result to standard output."""
    typer.echo(text)


def write_json(value: object) -> None:
    """Write a result for programs: one line of ASCII."""
    write(json.dumps(value, allow_nan=False, default=str))


# --- which store ---------------------------------------------------------------------------------


class Place(NamedTuple):
    """A store that is open, and where the payloads are that are too large for it."""

    store: Store
    bodies: BodyFiles
    exists: bool = True
    """False for one that stands for a file that is not there: it has no letters."""


@contextmanager
def opened(url: str | None, *, make: bool = False) -> Iterator[Place]:
    """Open the store that is meant for a block.

    Args:
        url: As given on the command line; by default what the settings say.
        make: Whether a file that is not there is made; else the store is an empty one elsewhere.

    Raises:
        StoreError: If it cannot be opened.
        SettingsError: If the settings say where it is, and are wrong.
    """
    options = in_use.options
    bodies = BodyFiles(options.folder / FOLDER, options.largest_inline)
    remote = url or options.redis_url
    place: AbstractContextManager[Store]
    if url is not None and not _is_redis(url):
        path = _path_of(url)
        bodies = BodyFiles(path.parent / FOLDER, options.largest_inline)
        place = _file(path, make=make)
    elif remote is not None:
        option = "PERISCOPE_REDIS_URL" if url is None else "--store"
        place = nullcontext(_remote(remote, option))
    else:
        place = _file(options.folder / FILE, make=make, largest=options.largest_file)
    with place as store:
        exists = not isinstance(store, _NotThere)
        try:
            yield Place(store, bodies, exists)
        finally:
            store.close()


def _is_redis(url: str) -> bool:
    return url.lower().startswith(("redis://", "rediss://", "unix://"))


def _path_of(url: str) -> Path:
    path = unquote(url.removeprefix("sqlite:///"))
    if not url.startswith("sqlite:///") or not path or "\0" in path:
        raise mistake(
            "a store is sqlite:///file.db, sqlite:////absolute/file.db, redis://…, rediss://… or "
            "unix://…",
            "--store",
        )
    return Path(path).absolute()


def _remote(url: str, option: str) -> Store:
    try:
        return open_store(url)
    except StoreError as error:  # nothing is connected to yet: it is the URL that is wrong
        raise mistake(str(error), option) from None


class _NotThere(SQLiteStore):
    """Stands for a store whose file is not there, and must not be made by looking at it."""


@contextmanager
def _file(path: Path, *, make: bool, **options: Any) -> Iterator[Store]:
    try:
        beginning = _beginning_of(path)
    except (FileNotFoundError, NotADirectoryError):
        if not make:
            with TemporaryDirectory(prefix="periscope-") as folder:
                empty = _NotThere(Path(folder) / FILE)
                empty.url = f"sqlite:///{quote(str(path))}"
                yield empty
            return
    except OSError as error:
        raise StoreError(f"cannot use {path}: {error.strerror}") from None
    else:
        # Opening it would make it private, which a mistyped path should not do to another file.
        if beginning not in (b"", _SQLITE):
            raise StoreError(f"cannot use {path}: it is no SQLite database")
    yield SQLiteStore(path, **options)


def _beginning_of(path: Path) -> bytes:
    if not path.is_file():
        path.stat()
        raise OSError(errno.EISDIR, "it is no file")
    with path.open("rb") as file:
        return file.read(len(_SQLITE))


# --- which letters -------------------------------------------------------------------------------


class Named(NamedTuple):
    """The letters that a command line names by their ids."""

    ids: tuple[str, ...] | None
    """None if it names none."""
    missing: int
    """How many there are not, or not in a state that fits."""


def named(
    store: Store, given: Sequence[str] | None, queue: str, states: tuple[State, ...] = STATES
) -> Named:
    """Find the letters that are named, and tell of those that are not there.

    Args:
        store: Where they are.
        given: Ids, or their beginnings.
        queue: Their queue.
        states: Those in which the command can do something with them.
    """
    if not given:
        return Named(None, 0)
    ids: dict[str, None] = {}
    for one in given:
        letter_id = whole_id(store, one, queue)
        if letter_id is None:
            continue
        state = _state_of(store, letter_id, queue)
        if state is None or state in states:
            ids[letter_id] = None
        else:
            say(f"{letter_id} is {state}")
    return Named(tuple(ids), len(set(given)) - len(ids))


def _state_of(store: Store, letter_id: str, queue: str) -> State | None:
    """Return a letter's state; None for one that is damaged, which may be in any."""
    try:
        letter = store.get(letter_id, queue)
    except DamagedLetterError:
        return None
    return None if letter is None else letter.state


def whole_id(store: Store, given: str, queue: str) -> str | None:
    """Return the id that begins so; None, which is told, if none does or several do."""
    if _ID.fullmatch(given) is None:
        raise mistake(f"{given!r} is no id: {SHORTEST_ID} characters of it at least", "ID")
    try:
        if store.get(given, queue) is not None:
            return given
    except DamagedLetterError:
        return given
    found = _beginning_with(store, given.lower(), queue) if len(given) < _LENGTH else []
    if len(found) == 1:
        return found[0]
    if found:
        say(f"several letters begin with {given}: {', '.join(found)} …")
    else:
        say(f"no letter {given} in the queue {queue}")
    return None


def _beginning_with(store: Store, prefix: str, queue: str) -> list[str]:
    """Return up to two ids that begin so."""
    database = getattr(store, "database", None)
    if database is not None:
        rows = database.read(
            "SELECT id FROM letters WHERE queue = ? AND id >= ? AND id < ? ORDER BY id LIMIT 2",
            (queue, prefix, prefix + "~"),
        )
        return [letter_id for (letter_id,) in rows]
    return _searched(store, prefix, queue)


def _searched(store: Store, prefix: str, queue: str) -> list[str]:
    """Look for ids that begin so among those that are no older than such an id."""
    from periscope_otel.dead_letter.interchange import pages

    where = Filter(queue=queue, states=STATES, since=_made_at(prefix))
    found: list[str] = []
    looked_at = 0
    for page in pages(store, where, limit=_MOST_SEARCHED, newest_first=True):
        looked_at += len(page.letters)
        found += [letter.id for letter in page.letters if letter.id.startswith(prefix)]
        if len(found) > 1:
            break
    if not found and looked_at == _MOST_SEARCHED:
        say(f"only {looked_at} letters were looked at: give the whole id")
    return found[:2]


def _made_at(prefix: str) -> float | None:
    """Return the earliest time at which a letter whose id begins so can have failed.

    The first 48 bits of a UUID of version 7 are milliseconds (RFC 9562, section 5.7).
    """
    digits = prefix.replace("-", "")[:12]
    try:
        return int(digits.ljust(12, "0"), 16) / 1000 - _EARLIER
    except ValueError:
        return None
