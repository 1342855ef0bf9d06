"""Letters as JSON Lines, for another store, another machine or another day.

A line holds all fields of one letter, also those of a newer version that this one does not know.
What JSON has no type for is an object with one entry: `{"base64": …}` for bytes, and
`{"msgpack": …}` for anything else. A payload that is in a file of this machine travels in its line.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import math
import os
import re
import tempfile
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from periscope_otel.dead_letter.draft import host_name
from periscope_otel.dead_letter.errors import DamagedLetterError, RefusedError
from periscope_otel.dead_letter.letter import LONGEST_PAYLOAD, Letter
from periscope_otel.dead_letter.names import queue_name
from periscope_otel.redaction import clean_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from periscope_otel.dead_letter.bodies import BodyFiles
    from periscope_otel.dead_letter.store import Filter, Page, Put, Store

LONGEST_LINE: Final = 96 << 20
"""Bytes of a line that is read; the letter of a longer one is not imported."""

LARGEST_CARRIED: Final = 64 << 20
"""Bytes of a payload, compressed, that travels in its line; a larger one stays in its file."""

MOST_TOLD: Final = 100
"""Damaged lines of which a report says what is wrong with them."""

_BATCH: Final = 64
_BATCH_BYTES: Final = 4 << 20
_PAGE_BYTES: Final = 16 << 20
"""Bytes that a page of letters may take in memory, if all are of average size."""
_LARGEST_PAGE: Final = 100
_CHUNK: Final = 1 << 20
_ID: Final = re.compile(r"[0-9A-Za-z._-]{1,100}")
_FILE_NAME: Final = re.compile(r"[0-9a-f]{64}z?")
"""What `BodyFiles` calls its files; nothing else is opened because a letter says so."""
_BYTES, _OTHER = "base64", "msgpack"
_NO_LETTER: Final = (
    *(ValueError, TypeError, OverflowError, RecursionError, msgspec.MsgspecError),
    AttributeError,  # of JSON that is no object
)


class DamagedLine(NamedTuple):
    """A line that holds no letter."""

    number: int
    """The first is 1."""
    why: str


@dataclass
class ImportReport:
    """What became of the letters of a file."""

    stored: int = 0
    merged: int = 0
    """Taken in by a letter of the same payload that was there."""
    known: int = 0
    """There already, by its id."""
    damaged: int = 0
    """Lines that hold no letter; what is wrong with the first hundred is in `lines`."""
    lines: list[DamagedLine] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Letters that were read."""
        return self.stored + self.merged + self.known

    def refuse(self, number: int, why: str) -> None:
        """Take note of a damaged line."""
        self.damaged += 1
        if len(self.lines) < MOST_TOLD:
            self.lines.append(DamagedLine(number, why))

    def add(self, answers: list[Put]) -> None:
        """Count what a store has answered."""
        self.stored += answers.count("stored")
        self.merged += answers.count("merged")
        self.known += answers.count("known")


# --- one letter ----------------------------------------------------------------------------------


def to_line(letter: Letter) -> bytes:
    """Return a letter as one line of ASCII, with its end.

    Example:
        >>> from_line(to_line(letter)) == letter
        True
    """
    fields = _to_json(msgspec.msgpack.decode(letter.encode()), top=True)
    return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def from_line(line: bytes) -> Letter:
    """Return the letter of a line, checked.

    Raises:
        DamagedLetterError: If there is none in it; the message says what is wrong.
    """
    try:
        plain = {name: _from_json(value) for name, value in json.loads(line).items()}
        letter = Letter.decode(msgspec.msgpack.encode(plain))
        queue_name(letter.queue)
    except (
        AttributeError,
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        msgspec.MsgspecError,
    ) as error:
        # An AttributeError is that of something that is no JSON object.
        raise DamagedLetterError(clean_name(f"it is no letter: {error}")) from None
    if _ID.fullmatch(letter.id) is None:
        raise DamagedLetterError("it has no id of a letter")
    _check_payload(letter)
    return letter


def _to_json(value: Any, *, top: bool = False) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, list):
        return [_to_json(one) for one in value]
    if isinstance(value, dict) and (top or _is_plain(value)):
        return {name: _to_json(one) for name, one in value.items()}
    return {_OTHER: base64.b64encode(msgspec.msgpack.encode(value)).decode()}


def _is_plain(value: dict[Any, Any]) -> bool:
    """Whether a map can be an object that is not taken for one of ours."""
    if len(value) == 1 and next(iter(value)) in (_BYTES, _OTHER):
        return False
    return all(isinstance(name, str) for name in value)


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(one) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((name, text),) = value.items()
        if name in (_BYTES, _OTHER) and isinstance(text, str):
            content = base64.b64decode(text, validate=True)
            return content if name == _BYTES else msgspec.msgpack.decode(content)
    return {name: _from_json(one) for name, one in value.items()}


def _check_payload(letter: Letter) -> None:
    """Raise a DamagedLetterError if a payload is not what its letter says; in bounded memory."""
    if letter.body_file is not None or not letter.sha256:
        return
    digest, size = hashlib.sha256(), 0
    try:
        for part in _parts_of(letter):
            digest.update(part)
            size += len(part)
            if size > letter.size:
                break
    except zlib.error as error:
        raise DamagedLetterError(f"its payload cannot be unpacked: {error}") from None
    if size != letter.size or digest.digest() != letter.sha256:
        raise DamagedLetterError("its payload is damaged")


def _parts_of(letter: Letter) -> Iterator[bytes]:
    if not letter.compression:
        yield letter.body
        return
    if letter.size > LONGEST_PAYLOAD:
        raise DamagedLetterError(f"a payload of {letter.size} bytes is too long")
    inflater, waiting = zlib.decompressobj(), letter.body
    while not inflater.eof:
        part = inflater.decompress(waiting, _CHUNK)
        waiting = inflater.unconsumed_tail
        yield part
        if not part and not waiting:
            raise zlib.error("it ends too early")


# --- many ----------------------------------------------------------------------------------------


def pages(
    store: Store,
    where: Filter,
    *,
    cursor: str | None = None,
    limit: int | None = None,
    newest_first: bool = False,
) -> Iterator[Page]:
    """Give the letters that a filter means in pages that are small where letters are large.

    Args:
        store: Where they are.
        where: Which.
        cursor: Where to go on.
        limit: How many at most; all by default.
        newest_first: The other way round.
    """
    stats = store.stats(where.queue)
    average = stats.size // max(1, stats.total)
    size = max(1, min(_LARGEST_PAGE, _PAGE_BYTES // max(1, average)))
    given = 0
    while limit is None or given < limit:
        wanted = size if limit is None else min(size, limit - given)
        page = store.list(where, cursor=cursor, limit=wanted, newest_first=newest_first)
        given += len(page.letters)
        yield page
        cursor = page.cursor
        if cursor is None:
            return


def carried(letter: Letter, bodies: BodyFiles | None) -> Letter:
    """Return a letter with its payload in it, where that is in a file of this machine.

    One that is elsewhere, or larger than `LARGEST_CARRIED`, stays where it is.
    """
    path = None if bodies is None else file_of(letter, bodies)
    if path is None:
        return letter
    try:
        with path.open("rb") as file:
            body = file.read(LARGEST_CARRIED + 1)
    except OSError:
        return letter
    return letter if len(body) > LARGEST_CARRIED else letter.changed(body=body, body_file=None)


def file_of(letter: Letter, bodies: BodyFiles) -> Path | None:
    """Return the file that holds a letter's payload, if it is one of this machine."""
    if letter.body_file is None or _FILE_NAME.fullmatch(letter.body_file) is None:
        return None
    path = bodies.folder / letter.body_file
    return path if path.is_file() else None


def export_letters(
    store: Store,
    where: Filter,
    file: IO[bytes],
    *,
    bodies: BodyFiles | None = None,
    limit: int | None = None,
    on_left_behind: Callable[[Letter], object] | None = None,
) -> int:
    """Write letters as JSON Lines, in the order in which they came.

    Args:
        store: Where they are; it is not changed.
        where: Which.
        file: Open for writing bytes.
        bodies: The files of large payloads on this machine, which travel along.
        limit: How many at most; all by default.
        on_left_behind: Called with each letter whose payload stays in a file.

    Returns:
        How many were written.

    Raises:
        StoreError: If the store cannot be used.

    Example:
        >>> with open("letters.jsonl", "wb") as file:
        ...     export_letters(store, Filter(feed="urlhaus"), file)
        12
    """
    written = 0
    for page in pages(store, where, limit=limit):
        for letter in page.letters:
            whole = carried(letter, bodies)
            file.write(to_line(whole))
            written += 1
            if whole.body_file is not None and on_left_behind is not None:
                on_left_behind(letter)
    return written


def export_to(path: str | Path, export: Callable[[IO[bytes]], int], *, force: bool = False) -> int:
    """Write an export to a file that is there only once it is complete.

    Args:
        path: The file; readable by its user alone.
        export: Called with the file to write to.
        force: Whether a file of that name is replaced.

    Returns:
        What `export` returned.

    Raises:
        FileExistsError: If there is one already.
        OSError: If it cannot be written.

    Example:
        >>> export_to("all.jsonl", lambda file: export_letters(store, Filter(), file))
        12
    """
    path = Path(path)
    _refuse_what_is_there(path, force=force)
    # Readable by this user alone, as `mkstemp` makes it.
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            written = export(file)
            file.flush()
            os.fsync(descriptor)
        _put_in_place(Path(draft), path, force=force)
    finally:
        Path(draft).unlink(missing_ok=True)
    return written


def _refuse_what_is_there(path: Path, *, force: bool) -> None:
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "it is there and is no file", str(path))
    if not force and (path.exists() or path.is_symlink()):
        raise FileExistsError(errno.EEXIST, "it is there already", str(path))


def _put_in_place(draft: Path, path: Path, *, force: bool) -> None:
    if not force:
        try:
            path.hardlink_to(draft)  # unlike a rename, this replaces nothing
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            _refuse_what_is_there(path, force=False)
        else:
            sync_folder(path.parent)
            return
    draft.replace(path)
    sync_folder(path.parent)


def import_letters(
    store: Store,
    file: IO[bytes],
    *,
    bodies: BodyFiles | None = None,
    queue: str | None = None,
    longest_line: int = LONGEST_LINE,
) -> ImportReport:
    """Put the letters of JSON Lines into a store; those that are there already stay as they are.

    What was removed from there comes back. State and failed replays are kept; what somebody had
    claimed is dead. A line that holds no letter is reported and does not stop the others. An import
    that was interrupted can be run again.

    Args:
        store: Where they go.
        file: Open for reading bytes.
        bodies: Where payloads go that are too large for the store; by default they stay in their
            letters.
        queue: The queue that all of them go to; by default each to its own.
        longest_line: Bytes of a line that is read.

    Raises:
        StoreError: If the store cannot be used.

    Example:
        >>> with open("letters.jsonl", "rb") as file:
        ...     import_letters(store, file).stored
        12
    """
    report = ImportReport()
    waiting: list[tuple[int, Letter]] = []
    size = 0
    for number, line in _lines_of(file, longest_line):
        if line is None:
            report.refuse(number, f"it is longer than {longest_line} bytes")
            continue
        try:
            letter = _settled_in(from_line(line), bodies, queue)
        except DamagedLetterError as error:
            report.refuse(number, str(error))
            continue
        waiting.append((number, letter))
        size += len(line)
        if len(waiting) == _BATCH or size >= _BATCH_BYTES:
            _put(store, waiting, report)
            waiting, size = [], 0
    if waiting:
        _put(store, waiting, report)
    return report


def _put(store: Store, waiting: list[tuple[int, Letter]], report: ImportReport) -> None:
    """Put letters, and find those that the store refuses."""
    try:
        report.add(store.put([letter for _, letter in waiting], revive=True))
    except RefusedError as error:
        if len(waiting) == 1:
            report.refuse(waiting[0][0], str(error))
            return
        for one in waiting:
            _put(store, [one], report)


def _settled_in(letter: Letter, bodies: BodyFiles | None, queue: str | None) -> Letter:
    """Return a letter as it goes into a store of this machine."""
    if queue is not None:
        letter = letter.changed(queue=queue)
    if bodies is None or letter.body_file is not None:
        return letter
    moved = bodies.moved_out(letter)
    # A letter names the host that has its payload's file, which is this one from now on.
    return letter if moved.body_file is None else moved.changed(host=host_name())


def _lines_of(file: IO[bytes], longest: int) -> Iterator[tuple[int, bytes | None]]:
    """Give the lines of a file with their numbers; None for one that is too long."""
    number = 0
    while line := file.readline(longest + 1):
        number += 1
        if len(line) <= longest:
            if line.strip():
                yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_CHUNK)
        yield number, None


def append_lines(path: Path, lines: list[bytes]) -> None:
    """Append lines to a file so that they are on the disk when this returns, all or none of them.

    Raises:
        OSError: If they cannot be written.
    """
    import fcntl

    is_new = not path.exists()
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # two that append must not mix their lines
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        # What a process left that died in the middle of a line is a line of its own.
        unfinished = end > 0 and file.read(1) != b"\n"
        try:
            for line in [b"\n", *lines] if unfinished else lines:
                _write_all(descriptor, line)
            os.fsync(descriptor)
        except BaseException:
            with suppress(OSError):
                file.truncate(end)
            raise
    if is_new:
        sync_folder(path.parent)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: Path) -> None:
    """Have the names of a folder's files survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
