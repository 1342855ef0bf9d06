"""The dead-letter queue that this process uses: opened when the first letter needs it.

`configure()` says where it is, and opens it at once if that was asked for; without `configure()` it
is in the user's state directory.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from periscope_otel import guard
from periscope_otel.settings import load
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from periscope_otel.dead_letter.letter import Letter
    from periscope_otel.dead_letter.queue import DeadLetterQueue, OnLost, Where
    from periscope_otel.settings import Settings

_TRY_AGAIN: Final = 5.0
"""Seconds after which a queue that could not be opened is tried again."""


class LetterBox(Protocol):
    """What takes letters; a test puts its own in place of the queue."""

    def put(self, letters: Sequence[Letter], *, journalled: bool = False) -> Where:
        """Keep letters; see `DeadLetterQueue`."""
        ...

    async def put_from_coroutine(
        self, letters: Sequence[Letter], *, journalled: bool = False
    ) -> Where:
        """Keep letters without holding the event loop up."""
        ...

    def journal(self, letter: Letter) -> bool:
        """Write a payload down before it is worked on."""
        ...

    def forget(self, ids: Sequence[str]) -> None:
        """Take payloads out of the journal."""
        ...


class Options(NamedTuple):
    """Where this process's letters go."""

    folder: Path
    redis_url: str | None
    largest_file: int
    largest_inline: int
    headers: tuple[str, ...]
    enabled: bool
    on_lost: OnLost | None


def options_of(settings: Settings, on_lost: OnLost | None = None) -> Options:
    """Return what the settings say of dead letters."""
    return Options(
        folder=Path(settings.data_dir) if settings.data_dir else default_folder(),
        redis_url=settings.redis_url,
        largest_file=settings.dead_letter_file_limit,
        largest_inline=settings.dead_letter_inline_limit,
        headers=settings.dead_letter_headers,
        enabled=settings.dead_letters is not False,
        on_lost=on_lost,
    )


def default_folder() -> Path:
    """Return the user's state directory for this package (XDG Base Directory Specification)."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    return base / "periscope-otel"


class InUse:
    """The process's queue, and where it is or will be."""

    def __init__(self) -> None:
        self.wanted = False
        """Whether any operation keeps dead letters."""
        self.captured: LetterBox | None = None
        """What a test has put in place of the queue."""
        self._options: Options | None = None
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._opened: DeadLetterQueue | None = None
        self._failed_at: float | None = None

    @property
    def opened(self) -> DeadLetterQueue | None:
        """The queue, if it has been opened."""
        return self._opened

    @property
    def options(self) -> Options:
        """Where letters go, by `configure()` or else by the environment."""
        if self._options is None:
            self._options = options_of(load({}))
        return self._options

    @property
    def enabled(self) -> bool:
        """Whether letters are kept at all."""
        return self.captured is not None or self.options.enabled

    def configure(self, options: Options | None) -> None:
        """Use another place from now on; None for what the environment says."""
        self.close()
        with self._lock:
            self._options = options

    def queue(self) -> DeadLetterQueue:
        """Return the queue, opened now if it is not yet.

        Raises:
            StoreError: If it cannot be; the message says why.
        """
        with self._lock:
            if self._opened is None:
                self._opened = _open(self.options)
                atexit.register(self._at_exit)
            return self._opened

    def box(self) -> LetterBox | None:
        """Return what takes letters; None where that cannot be opened now, which is told."""
        if self.captured is not None:
            return self.captured
        now = time.monotonic()
        if self._failed_at is not None and now - self._failed_at < _TRY_AGAIN:
            return None
        try:
            queue = self.queue()
        except Exception as error:  # noqa: BLE001  (the user's call must go on)
            self._failed_at = now
            guard.warn("dead letter folder", "dead letters cannot be kept: %s", error)
            return None
        self._failed_at = None
        return queue

    def close(self, timeout: float = 5.0) -> None:
        """Write out what is in memory and let go; a later letter opens it again."""
        with self._lock:
            opened, self._opened = self._opened, None
        atexit.unregister(self._at_exit)
        if opened is not None:
            opened.close(timeout)

    def _at_exit(self) -> None:
        worker.finish_posted(1.0)  # operations that finalisers have settled
        self.close()

    def after_fork(self) -> None:
        """Take a new lock in the child; the queue itself knows that it was forked."""
        opened = self._opened
        self._reset()
        self._opened = opened


def _open(options: Options) -> DeadLetterQueue:
    from periscope_otel.dead_letter.errors import StoreError
    from periscope_otel.dead_letter.queue import DeadLetterQueue

    parent = options.folder.parent
    if options.folder == default_folder():
        with suppress(OSError):  # what is wrong with it is said when it is opened
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    elif not parent.is_dir():  # a mistake, or a volume that is not mounted: nothing to be made
        raise StoreError(f"data_dir {options.folder}: there is no folder {parent}")
    return DeadLetterQueue(
        options.folder,
        redis_url=options.redis_url,
        largest_file=options.largest_file,
        largest_inline=options.largest_inline,
        on_lost=options.on_lost,
    )


in_use: Final = InUse()
"""That of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=in_use.after_fork)
