"""The filesystems that are mounted, and how full they are.

A network filesystem whose server is gone, or a disk that is, keeps whoever asks it waiting,
perhaps for ever. So they are read apart from the other figures of the host, and one that did not
answer is left out until it does.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Protocol

from periscope_otel.gauges.absence import Absences
from periscope_otel.gauges.choice import Choice
from periscope_otel.gauges.labels import label
from periscope_otel.gauges.stats import FilesystemStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

logger = logging.getLogger("periscope_otel")

FILESYSTEMS: Final = "filesystems"
"""The part of the sampler that reads them."""

MOST_HUNG: Final = 4
"""Filesystems that keep a thread waiting for ever, after which no others are asked."""

_THE_LIST: Final = ""
"""What is asked for before any of them: which there are."""
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


class _Look:
    """One thread's look at all of them."""

    def __init__(self) -> None:
        self.asks: str | None = None
        """The mount point that is to answer."""


class FilesystemReader:
    """Reads the filesystems; a part of the sampler.

    Args:
        mounts: Returns what is mounted; called with whether what is no disk counts too.
    """

    name = FILESYSTEMS
    may_hang = True

    def __init__(self, mounts: Callable[[bool], Sequence[Mount]] | None = None) -> None:
        # As for the host: not at the top, and not in the sampler's thread.
        psutil: Any = import_module("psutil")
        self._mounts = mounts or psutil.disk_partitions
        self._absences = Absences()
        self._begin()

    def _begin(self) -> None:
        self._look: _Look | None = None
        self._hung: set[str] = set()
        self._told: tuple[FilesystemStats, ...] | None = None
        self._choice = Choice[FilesystemStats]("filesystems", _size, gives_way=False)

    @property
    def goes_on(self) -> bool:
        """Whether to read it again while a reading of it hangs: it leaves out what does."""
        hangs = None if self._look is None else self._look.asks
        return hangs != _THE_LIST and len(self._hung) < MOST_HUNG

    def left_behind(self) -> tuple[FilesystemStats, ...]:
        """Return the others while one does not answer."""
        return (self._told or ()) if self.goes_on else ()

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
        left = self._leave_what_hangs()
        if self._told is not None and not slow and not left:
            return self._told
        look = self._look = _Look()
        return self._choose(tuple(self._ask_all(look)), look)

    def _leave_what_hangs(self) -> bool:
        """Leave out the filesystem in which another thread still waits."""
        hangs = None if self._look is None else self._look.asks
        if hangs is None:
            return False
        self._hung.add(hangs)
        logger.warning(
            "the filesystem at %s does not answer: it is left out until it does", label(hangs)
        )
        return True

    def _choose(self, found: Sequence[FilesystemStats], look: _Look) -> tuple[FilesystemStats, ...]:
        if look is not self._look:  # another thread went on in its place
            return ()
        by_name = {f"{one.device} {one.mountpoint}": one for one in found}
        self._told = tuple(by_name[name] for name in self._choice.of(by_name, slow=True))
        return self._told

    def _ask_all(self, look: _Look) -> Iterator[FilesystemStats]:
        """Return one filesystem a device, at the shortest of the folders where it is mounted."""
        found = self._mounted(look)
        self._hung.intersection_update([one.mountpoint for one in found])
        devices: set[str] = set()
        for mount in sorted(found, key=lambda one: len(one.mountpoint)):
            if mount.device in devices or mount.mountpoint in self._hung:
                continue
            stats = self._ask(mount, look)
            if look is not self._look:
                return
            if stats is not None:
                devices.add(mount.device)
                yield stats

    def _mounted(self, look: _Look) -> list[Mount]:
        look.asks = _THE_LIST
        try:
            found = [one for one in self._mounts(False) if one.fstype not in _IMAGES]
            if not any(one.mountpoint == "/" for one in found):
                # A container's root is a virtual filesystem, but it is the one that fills up.
                found += [one for one in self._mounts(True) if one.mountpoint == "/"][-1:]
        except Exception as error:  # noqa: BLE001  (a platform fails in any way it likes)
            self._absences.say("filesystems", error)
            return []
        finally:
            look.asks = None
        return found

    def _ask(self, mount: Mount, look: _Look) -> FilesystemStats | None:
        look.asks = mount.mountpoint
        try:
            return _filesystem(mount)
        except (OSError, ValueError):
            return None
        finally:
            look.asks = None
            if look is not self._look:
                self._hung.discard(mount.mountpoint)


def _filesystem(mount: Mount) -> FilesystemStats | None:
    point = mount.mountpoint
    # Containers mount single files of the host's disk; they are no filesystems of their own.
    if not stat.S_ISDIR(os.stat(point).st_mode):  # noqa: PTH116
        return None
    told = os.statvfs(point)
    if not told.f_blocks:
        return None
    blocks = told.f_blocks
    # Some tell of more free blocks than there are: what is told adds up to the size all the same.
    unused = min(max(told.f_bfree, 0), blocks)
    free = min(max(told.f_bavail, 0), unused)
    return FilesystemStats(
        device=label(mount.device),
        mountpoint=label(point),
        type=label(_WELL_KNOWN.get(mount.fstype, mount.fstype)),
        mode="ro" if "ro" in mount.opts.split(",") else "rw",
        used=(blocks - unused) * told.f_frsize,
        free=free * told.f_frsize,
        reserved=(unused - free) * told.f_frsize,
    )


def _size(one: FilesystemStats) -> int:
    return one.used + one.free + one.reserved
