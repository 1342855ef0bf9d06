"""The folder of dead letters on this machine: looked at, and left as it was."""

from __future__ import annotations

import os
import stat
import tempfile
from typing import TYPE_CHECKING, Final

from periscope_otel.dead_letter.contents import NewerFileError, contents
from periscope_otel.dead_letter.database import refuse_networked
from periscope_otel.dead_letter.errors import StoreError
from periscope_otel.dead_letter.in_use import check_parent, options_of
from periscope_otel.dead_letter.queue import FILE
from periscope_otel.doctor.finding import broken, off, ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from periscope_otel.doctor.finding import Finding
    from periscope_otel.settings import Settings

_LEAST_SPACE: Final = 16 << 20
"""Bytes below which a letter may not find room."""
_REMEDIES: Final = {
    "SQLITE_BUSY": "look again: another process is at it, and letters wait for as long as it is",
    "SQLITE_LOCKED": "look again: another process is at it",
    "SQLITE_FULL": "free space on that disk",
    "SQLITE_IOERR": "free space on that disk, and look at what the kernel says of it",
    "SQLITE_CANTOPEN": "run this as the user of the program",
    "SQLITE_READONLY": "run this as the user of the program",
    "SQLITE_PERM": "run this as the user of the program",
    "SQLITE_AUTH": "run this as the user of the program",
}
"""What helps, by what SQLite's name of an error begins with (sqlite.org/rescode.html)."""
_FOR_DAMAGE: Final = (
    "keep a copy, have SQLite's .recover make a new file of it for `periscope dlq`, and move it "
    "away"
)
_ANOTHER: Final = "choose another folder in PERISCOPE_DATA_DIR"


def folder_findings(settings: Settings) -> Iterator[Finding]:
    """Say whether dead letters can be kept, how much room they have, and how many there are."""
    if settings.dead_letters is False:
        yield off("data_dir.folder", "dead letters are switched off (PERISCOPE_DEAD_LETTERS)")
        return
    options = options_of(settings)
    try:
        folder = options.folder
        there = _nearest(folder)
        refuse_networked(there)
        if options.data_dir is not None:
            check_parent(folder)
    except (StoreError, OSError, ValueError) as error:
        yield broken("data_dir.folder", str(error), _ANOTHER)
        return
    try:
        yield from _of_folder(folder, there)
        if there.is_dir():
            yield _of_space(there, _room_wanted(folder, options.largest_file))
            yield _of_file(folder / FILE)
    except OSError as error:
        yield broken(
            "data_dir.folder",
            f"{folder} cannot be looked at: {error.strerror}",
            "run this as the user of the program",
        )


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above that is there."""
    for one in (folder, *folder.parents):
        if one.exists() or one.is_symlink():
            return one
    return folder


def _of_folder(folder: Path, there: Path) -> Iterator[Finding]:
    check = "data_dir.folder"
    if not there.is_dir():
        yield broken(check, f"{there} is no folder", _ANOTHER)
        return
    fault = _fault_in_writing(there)
    if fault is not None:
        yield broken(check, f"{there} cannot be written to: {fault}", _ANOTHER)
    elif folder != there:
        yield ok(check, f"{folder} will be made at first use")
    elif stat.S_IMODE(folder.stat().st_mode) & 0o077:
        yield warning(
            check,
            f"{folder} is open to other users, who may see when letters are written",
            "take it from them: chmod 700",
        )
    else:
        yield ok(check, str(folder))


def _fault_in_writing(folder: Path) -> str | None:
    """Return why nothing can be written to a folder; tried with a file that has no name."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or type(error).__name__
    return None


def _room_wanted(folder: Path, largest: int) -> int:
    """Return how much the file may still grow."""
    try:
        return max(0, largest - (folder / FILE).stat().st_size)
    except OSError:
        return largest


def _of_space(folder: Path, wanted: int) -> Finding:
    told = os.statvfs(folder)
    free = told.f_bavail * told.f_frsize
    shown = f"{free / 1e9:.1f} GB are free" if free >= 1e8 else f"{free / 1e6:.1f} MB are free"
    if free < _LEAST_SPACE:
        return broken(
            "data_dir.space", f"{shown}: letters may not find room", "free space on that disk"
        )
    if free < wanted:
        return warning(
            "data_dir.space",
            f"{shown}, less than the file of dead letters may still grow by "
            f"({wanted / 1e9:.1f} GB)",
            "free space on that disk, or lower PERISCOPE_DEAD_LETTER_FILE_LIMIT",
        )
    return ok("data_dir.space", shown)


def _of_file(file: Path) -> Finding:
    check = "data_dir.file"
    try:
        owner = file.stat().st_uid
    except FileNotFoundError:
        return off(check, "no letter was ever kept here")
    if os.geteuid() not in (0, owner) or not os.access(file.parent, os.W_OK):
        return warning(
            check,
            f"{file} was not looked at: it is another user's, or its disk cannot be written to",
            "run this as the user of the program, where the program runs",
        )
    try:
        found = contents(file)
    except StoreError as error:
        return broken(check, str(error), _remedy_for(error))
    told = f"{found.letters} letters"
    if found.outbox:
        told += f", {found.outbox} on their way to the Redis"
    if found.journal:
        told += f", {found.journal} payloads of calls that have not ended"
    return ok(check, told)


def _remedy_for(error: StoreError) -> str:
    if isinstance(error, NewerFileError):
        return "update periscope-otel here, or choose another folder in PERISCOPE_DATA_DIR"
    kind = getattr(error.__cause__, "sqlite_errorname", "") or ""
    found = (remedy for sign, remedy in _REMEDIES.items() if kind.startswith(sign))
    return next(found, _FOR_DAMAGE)
