"""Payloads too large for a store, in files of this machine beside it.

A file is named by the SHA-256 of what it holds, so one payload is kept once, however often it
fails. The letter in the store names the file and this machine.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from periscope_otel import guard
from periscope_otel.dead_letter.draft import host_name
from periscope_otel.dead_letter.errors import DamagedLetterError, PayloadElsewhereError

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from periscope_otel.dead_letter.letter import Letter

FOLDER: Final = "payloads"

INLINE: Final = 8 << 20
"""Bytes of a payload, compressed, up to which it travels in its letter."""

_NAME: Final = re.compile(r"[0-9a-f]{64}z?")
_DRAFT: Final = "draft-"
_LARGEST: Final = 1 << 30
"""Bytes of a file that is read."""
_JUST_WRITTEN: Final = 3600.0
"""Seconds for which a file is not believed unused: its letter may be on its way."""


class BodyFiles:
    """The files in one folder.

    Args:
        folder: Made when the first file is written, for this user alone.
        inline: Bytes up to which a payload stays in its letter.
    """

    def __init__(self, folder: str | Path, inline: int = INLINE) -> None:
        self.folder = Path(folder)
        self._inline = inline

    def moved_out(self, letter: Letter) -> Letter:
        """Return a letter that fits into a store: a large payload is in a file from now on.

        Where the file cannot be written the payload stays where it is: it is never cut.
        """
        if len(letter.body) <= self._inline:
            return letter
        name = letter.sha256.hex() + letter.compression[:1]
        try:
            self._write(name, letter.body)
        except OSError as error:
            guard.warn("payload file", "a large payload stays in its letter: %s", error)
            return letter
        return letter.changed(body=b"", body_file=name)

    def payload_of(self, letter: Letter) -> bytes:
        """Return a letter's payload, wherever it is.

        Raises:
            PayloadElsewhereError: If it is in a file that this machine does not have.
            DamagedLetterError: If it is not what was put in.
        """
        if letter.body_file is None:
            return letter.payload()
        return letter.unpack(self._read(letter, letter.body_file))

    def remove_unused(self, used: AbstractSet[str], clock: Callable[[], float] = time.time) -> int:
        """Remove the files that no letter names; returns how many.

        Args:
            used: The names in all letters of the store.
            clock: Unix time in seconds.
        """
        removed = 0
        for path in self.files():
            with suppress(OSError):
                if path.name not in used and path.stat().st_mtime < clock() - _JUST_WRITTEN:
                    path.unlink()
                    removed += 1
        return removed

    def files(self) -> list[Path]:
        """Return the files that there are, also those that were never finished."""
        try:
            found = list(self.folder.iterdir())
        except OSError:
            return []
        return [
            path for path in found if _NAME.fullmatch(path.name) or path.name.startswith(_DRAFT)
        ]

    def _read(self, letter: Letter, name: str) -> bytes:
        if not _NAME.fullmatch(name):
            raise DamagedLetterError(f"letter {letter.id} names no payload file")
        where = f"the payload of letter {letter.id} is the file {name} of host {letter.host}"
        try:
            with (self.folder / name).open("rb") as file:
                body = file.read(_LARGEST + 1)
        except FileNotFoundError:
            here = "" if letter.host != host_name() else f" and is no longer in {self.folder}"
            raise PayloadElsewhereError(f"{where}{here or '; replay it there'}") from None
        except OSError as error:
            raise PayloadElsewhereError(f"{where}, which cannot be read: {error}") from None
        return body

    def _write(self, name: str, body: bytes) -> None:
        path = self.folder / name
        if path.exists() and path.stat().st_size == len(body):  # else it is damaged
            os.utime(path)  # in use again
            return
        self.folder.mkdir(mode=0o700, exist_ok=True)
        # Readable by this user alone, as `mkstemp` makes it.
        descriptor, draft = tempfile.mkstemp(prefix=_DRAFT, dir=self.folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(descriptor)
            Path(draft).rename(path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
        self._sync_folder()

    def _sync_folder(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
