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
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from periscope_otel import guard
from periscope_otel.dead_letter.waiting import WaitingLetters
from periscope_otel.settings import SettingsError, load, read_environment
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from periscope_otel.dead_letter.letter import Letter
    from periscope_otel.dead_letter.loss import OnLost
    from periscope_otel.dead_letter.queue import DeadLetterQueue, Where
    from periscope_otel.settings import Settings

_TRY_AGAIN: Final = 5.0
"""Seconds after which a queue that could not be opened is tried again."""

_FORK_WAIT: Final = 1.0
_EXIT_WAIT: Final = 2.0

_NEEDED: Final = (
    "concurrent.futures.thread",
    "psutil",
    "periscope_otel.dead_letter.codecs",
    "periscope_otel.dead_letter.queue",
    "periscope_otel.dead_letter.tlp",
)
"""What a failure imports."""


class LetterBox(Protocol):
    """What takes letters; a test puts its own in place of the queue."""

    def put(self, letters: Sequence[Letter], *, journalled: bool = False) -> Where:
        """Keep letters; see `DeadLetterQueue`."""
        ...

    def journal(self, letter: Letter) -> bool:
        """Write a payload down before it is worked on."""
        ...

    def forget(self, ids: Sequence[str]) -> None:
        """Take payloads out of the journal."""
        ...


class Options(NamedTuple):
    """Where this process's letters go."""

    data_dir: Path | None
    redis_url: str | None
    largest_file: int
    largest_inline: int
    headers: tuple[str, ...]
    enabled: bool
    on_lost: OnLost | None

    @property
    def folder(self) -> Path:
        """Where the file is; by default in the user's state directory.

        Raises:
            StoreError: If there is no such directory to be found.
        """
        return default_folder() if self.data_dir is None else self.data_dir


def options_of(settings: Settings, on_lost: OnLost | None = None) -> Options:
    """Return what the settings say of dead letters."""
    return Options(
        data_dir=Path(settings.data_dir).absolute() if settings.data_dir else None,
        redis_url=settings.redis_url,
        largest_file=settings.dead_letter_file_limit,
        largest_inline=settings.dead_letter_inline_limit,
        headers=settings.dead_letter_headers,
        enabled=settings.dead_letters is not False,
        on_lost=on_lost,
    )


def default_folder() -> Path:
    """Return the user's state directory for this package (XDG Base Directory Specification)."""
    from periscope_otel.dead_letter.errors import StoreError

    state = os.environ.get("XDG_STATE_HOME", "")
    if state.startswith("/"):
        return Path(state) / "periscope-otel"
    try:
        return Path.home() / ".local" / "state" / "periscope-otel"
    except RuntimeError:
        raise StoreError(
            "there is no home directory to keep dead letters in: give data_dir="
        ) from None


def _from_environment() -> Options:
    """Return what the environment says; a variable that cannot be read is told, and left out."""
    settings, unreadable = read_environment(os.environ)
    for error in unreadable:
        variable = str(error).partition("=")[0]
        guard.warn(f"variable {variable}", "%s; it is left out", error)
    return options_of(settings)


class InUse:
    """The process's queue, and where it is or will be."""

    def __init__(self) -> None:
        self.wanted = False
        """Whether any operation keeps dead letters."""
        self.queues = {"default"}
        """Those that operations put their letters into: how many they hold is told of from the
        start, not only once this process has put one more."""
        self._fork = threading.local()  # two threads may fork
        self.captured: LetterBox | None = None
        """What a test has put in place of the queue."""
        self._options: Options | None = None
        self._usable: Options | None = None
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._opened: DeadLetterQueue | None = None
        self._waiting: WaitingLetters | None = None
        self._failed_at: float | None = None

    @property
    def opened(self) -> DeadLetterQueue | None:
        """The queue, if it has been opened."""
        return self._opened

    @property
    def options(self) -> Options:
        """Where letters go, by `configure()` or else by the environment.

        Raises:
            SettingsError: If a variable does not fit.
        """
        if self._options is None:
            self._options = options_of(load({}))
        return self._options

    @property
    def usable(self) -> Options:
        """Those options without the variables that do not fit: operations have to go on."""
        if self._options is None and self._usable is None:
            try:
                return self.options
            except SettingsError:
                self._usable = _from_environment()
        return self._options or self._usable or self.options

    @property
    def enabled(self) -> bool:
        """Whether letters are kept at all."""
        return self.captured is not None or self.usable.enabled

    def configure(self, options: Options | None) -> None:
        """Use another place from now on; None for what the environment says."""
        self.close()
        with self._lock:
            self._options, self._usable = options, None

    def queue(self) -> DeadLetterQueue:
        """Return the queue, opened now if it is not yet.

        Raises:
            StoreError: If it cannot be; the message says why.
        """
        with self._lock:
            if self._opened is None:
                queue = _open(self.usable)
                if self._waiting is not None:
                    self._waiting.move_to(queue)
                self._opened = queue
            return self._opened

    def want(self, queue: str) -> None:
        """Take note that an operation keeps dead letters in a queue."""
        self.queues.add(queue)
        if not self.wanted:
            with self._lock:
                _load()
            self.wanted = True

    def box(self) -> LetterBox:
        """Return what takes letters: the memory, for as long as the queue cannot be opened."""
        if self.captured is not None:
            return self.captured
        opened = self._opened
        return self._open_now_or_later() if opened is None else opened

    def _open_now_or_later(self, only_for: WaitingLetters | None = None) -> LetterBox:
        why: Exception | None = None
        now = time.monotonic()
        with self._lock:
            if only_for is not None and (only_for is not self._waiting or self._opened is not None):
                return only_for  # closed, or opened, in the meantime
            if self._failed_at is None or now - self._failed_at >= _TRY_AGAIN:
                try:
                    return self.queue()
                except Exception as error:  # noqa: BLE001  (the user's call must go on)
                    self._failed_at, why = now, error
            waiting, first = self._waiting, self._waiting is None
            if waiting is None:
                waiting = self._waiting = WaitingLetters(self.usable.on_lost)
        if why is not None:
            guard.warn("dead letter folder", "dead letters are kept in memory: %s", why)
        if first:
            self._try_again_later(waiting)
        return waiting

    def _try_again_later(self, waiting: WaitingLetters) -> None:
        """Open the queue when that can be done, also if no further letter comes."""

        def run() -> None:
            while waiting is self._waiting and self._opened is None:
                time.sleep(_TRY_AGAIN)
                with guard.contained("dead letter folder"):
                    self._open_now_or_later(only_for=waiting)

        with suppress(RuntimeError):  # at the end of the interpreter no thread starts
            threading.Thread(target=run, name="periscope-dead-letter-folder", daemon=True).start()

    def close(self, timeout: float = 5.0) -> None:
        """Write out what is in memory and let go; a later letter opens it again."""
        with self._lock:
            if self._opened is None and self._waiting is not None:
                with suppress(Exception):  # it has been told before
                    self.queue()
            (opened, self._opened), (waiting, self._waiting) = (
                (self._opened, None),
                (self._waiting, None),
            )
            self._failed_at = None
        if waiting is not None:
            waiting.lose()
        if opened is not None:
            opened.close(timeout)

    def at_exit(self) -> None:
        """Write out and send what there is, where `shutdown` has not done it."""
        if not self.wanted and self._opened is None:
            return
        worker.finish_posted(1.0)  # operations that finalisers have settled
        opened = self._opened
        if opened is not None:
            opened.start_flush()
            opened.wait_flushed(_EXIT_WAIT)
        self.close()

    def before_fork(self) -> None:
        """Let a fork wait for what is being imported or opened, for a moment at most.

        A child would wait for ever for a module that a thread of its parent was importing.
        """
        self._fork.waited = self._lock.acquire(timeout=_FORK_WAIT)

    def after_fork_in_parent(self) -> None:
        """Let it go on."""
        if self._fork.waited:
            self._lock.release()

    def after_fork(self) -> None:
        """Take a new lock in the child; the queue itself knows that it was forked."""
        opened = self._opened
        self._reset()
        self._opened = opened


def _load() -> None:
    """Import what a failure needs now, rather than in the middle of it."""
    for name in _NEEDED:
        with suppress(ImportError):  # a platform that it does not work on: said when it is used
            import_module(name)


def check_parent(folder: Path) -> None:
    """Raise a StoreError where a folder that was asked for has nothing to be made in.

    That is a mistake, or a volume that is not mounted.
    """
    from periscope_otel.dead_letter.errors import StoreError

    if not folder.parent.is_dir():
        raise StoreError(f"data_dir {folder}: there is no folder {folder.parent}")


def _open(options: Options) -> DeadLetterQueue:
    from periscope_otel.dead_letter.queue import DeadLetterQueue

    folder = options.folder
    parent = folder.parent
    if options.data_dir is None:
        with suppress(OSError):  # what is wrong with it is said when it is opened
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    else:
        check_parent(folder)
    return DeadLetterQueue(
        folder,
        redis_url=options.redis_url,
        largest_file=options.largest_file,
        largest_inline=options.largest_inline,
        on_lost=options.on_lost,
        queues=in_use.queues,
    )


in_use: Final = InUse()
"""That of this process."""

# Now, and so before `configure()` registers what it does at the end: that comes first then.
atexit.register(in_use.at_exit)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=in_use.before_fork,
        after_in_parent=in_use.after_fork_in_parent,
        after_in_child=in_use.after_fork,
    )
