"""The filesystems that are mounted, and how full they are.

A network filesystem whose server is gone, or a disk that is, keeps whoever asks it waiting, perhaps
for ever. So a thread of its own asks them, one after the other. It is left behind in one that does
not answer, which is left out until it does; another thread goes on with the others.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Protocol

from periscope_otel.gauges.absence import Absences
from periscope_otel.gauges.choice import Choice
from periscope_otel.gauges.labels import label
from periscope_otel.gauges.stats import FilesystemStats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger("periscope_otel")

FILESYSTEMS: Final = "filesystems"
"""What the source of these figures is called."""

ANSWER_WAIT: Final = 1.0
"""Seconds without any answer after which the filesystem that was asked is left out."""
MOST_HUNG: Final = 8
"""Filesystems that keep a thread waiting each, after which no other one is asked."""

_IMAGES: Final = frozenset({"squashfs", "iso9660", "erofs", "cramfs", "romfs"})
"""Filesystems that are always full: they are made so, and nobody can write to them."""
_WELL_KNOWN: Final = {"vfat": "fat32", "ntfs3": "ntfs", "ntfs-3g": "ntfs"} | (
    {"hfs": "hfsplus", "msdos": "fat32"} if sys.platform == "darwin" else {}
)
"""What the semantic conventions call a type; the others are called as the platform does."""


class Mount(Protocol):
    """A filesystem that is mounted; psutil's own struct."""

    device: str
    mountpoint: str
    fstype: str
    opts: str


class FilesystemReader:
    """Reads the filesystems, for a sampler.

    Args:
        mounts: Returns what is mounted; called with whether what is no disk counts too.
        answer_wait: Seconds that a filesystem has to answer in.
    """

    name = FILESYSTEMS

    def __init__(
        self,
        mounts: Callable[[bool], Sequence[Mount]] | None = None,
        answer_wait: float = ANSWER_WAIT,
    ) -> None:
        # As for the host: not at the top, and not in the sampler's thread.
        psutil: Any = import_module("psutil")
        self._mounts = mounts or psutil.disk_partitions
        self._answer_wait = answer_wait
        self._absences = Absences()
        self._begin()

    def _begin(self) -> None:
        self._told: tuple[FilesystemStats, ...] | None = None
        self._hung: dict[str, _Look] = {}
        self._choice = Choice[FilesystemStats]("filesystems", _size, gives_way=False)

    def left_behind(self) -> tuple[FilesystemStats, ...]:
        """Tell nothing where not even the list of them can be had."""
        return ()

    def close(self) -> None:
        """Do nothing: it holds nothing open."""

    def after_fork(self) -> None:
        """Start anew: no thread of this process waits for a filesystem."""
        self._begin()

    def read(self, slow: bool) -> tuple[FilesystemStats, ...]:
        """Return the filesystems, the largest if there are many.

        Args:
            slow: Whether to ask them; else what they said last counts.
        """
        if self._told is None or slow:
            try:
                self._told = self._choose(self._ask(self._mounted()))
            except RuntimeError:  # no more threads, or the interpreter is ending
                return self._told or ()
        return self._told

    def _mounted(self) -> list[Mount]:
        """Return what may be asked, the shortest mount points first."""
        try:
            found = [one for one in self._mounts(False) if one.fstype not in _IMAGES]
            if not any(one.mountpoint == "/" for one in found):
                # A container's root is a virtual filesystem, but it is the one that fills up.
                found += [one for one in self._mounts(True) if one.mountpoint == "/"][-1:]
        except Exception as error:  # noqa: BLE001  (a platform fails in any way it likes)
            self._absences.say("filesystems", error)
            return []
        points = {one.mountpoint for one in found}
        self._hung = {
            point: look
            for point, look in self._hung.items()
            if point in points and look.asks is not None
        }
        return sorted(found, key=lambda one: len(one.mountpoint))

    def _ask(self, mounts: list[Mount]) -> dict[str, FilesystemStats]:
        """Return those that answer, by device."""
        found: dict[str, FilesystemStats] = {}
        while len(self._hung) < MOST_HUNG:
            waiting = [one for one in mounts if one.mountpoint not in self._hung]
            look = _Look(waiting, found)
            if look.is_through(self._answer_wait):
                return found
            self._leave(look)
            found = dict(found)
        self._absences.say_once("too many", f"{MOST_HUNG} filesystems do not answer: none is told")
        return {}

    def _leave(self, look: _Look) -> None:
        if (point := look.asks) is not None:
            self._hung[point] = look
            logger.warning(
                "the filesystem at %s does not answer: it is left out until it does", label(point)
            )

    def _choose(self, found: dict[str, FilesystemStats]) -> tuple[FilesystemStats, ...]:
        by_name = {f"{one.device} {one.mountpoint}": one for one in found.values()}
        return tuple(by_name[name] for name in self._choice.of(by_name, slow=True))


class _Look:
    """One thread's look at filesystems.

    Args:
        mounts: Which to ask.
        found: Where to put one filesystem a device: the first of its mount points that is a folder.
    """

    def __init__(self, mounts: list[Mount], found: dict[str, FilesystemStats]) -> None:
        self.asks: str | None = None
        """The mount point that is to answer."""
        self._mounts = mounts
        self._found = found
        self._answers = 0
        self._is_left = False
        self._is_done = threading.Event()

    def is_through(self, answer_wait: float) -> bool:
        """Ask all of them; returns False when for so long none has answered."""
        threading.Thread(target=self._run, name="periscope-statvfs", daemon=True).start()
        seen = -1
        while not self._is_done.wait(answer_wait):
            if self._answers == seen:
                self._is_left = True
                return False
            seen = self._answers
        return True

    def _run(self) -> None:
        for mount in self._mounts:
            self.asks = mount.mountpoint
            stats = None if mount.device in self._found else _answer(mount)
            self.asks = None
            if self._is_left:
                return
            self._answers += 1
            if stats is not None:
                self._found[mount.device] = stats
        self._is_done.set()


def _answer(mount: Mount) -> FilesystemStats | None:
    """Return what a filesystem says; None if it is none, or fails."""
    point = mount.mountpoint
    try:
        # Containers mount single files of the host's disk; they are no filesystems of their own.
        if not stat.S_ISDIR(os.stat(point).st_mode):  # noqa: PTH116
            return None
        told = os.statvfs(point)
        return _stats(mount, told) if told.f_blocks else None
    except Exception:  # noqa: BLE001  (whatever one fails by, the others are to be asked)
        return None


def _stats(mount: Mount, told: os.statvfs_result) -> FilesystemStats:
    # Some tell of more free blocks than there are: what is told adds up to the size all the same.
    unused = min(max(told.f_bfree, 0), told.f_blocks)
    free = min(max(told.f_bavail, 0), unused)
    return FilesystemStats(
        device=label(mount.device),
        mountpoint=label(mount.mountpoint),
        type=label(_WELL_KNOWN.get(mount.fstype, mount.fstype)),
        mode="ro" if "ro" in mount.opts.split(",") else "rw",
        used=(told.f_blocks - unused) * told.f_frsize,
        free=free * told.f_frsize,
        reserved=(unused - free) * told.f_frsize,
    )


def _size(one: FilesystemStats) -> int:
    return one.used + one.free + one.reserved
