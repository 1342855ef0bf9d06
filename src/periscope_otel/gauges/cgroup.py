"""What the process's control group may use: in a container the host's figures say little.

Control groups of version 2 and of version 1, also side by side (Linux, Documentation/admin-guide/
cgroup-v2.rst and cgroup-v1). A limit of a group holds for all groups below it, so the tightest one
on the way to the root counts.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from periscope_otel.gauges.procfs import plain
from periscope_otel.gauges.stats import ContainerLimits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NO_LIMITS: Final = ContainerLimits(None, None)

_UNIFIED: Final = ""
"""What stands for version 2, in which one group has all controllers."""
_UNLIMITED: Final = 2**62
"""Bytes from which on a limit of version 1 is none."""


_Limit = TypeVar("_Limit", int, float)


class _Mount(NamedTuple):
    """A part of the groups that is mounted somewhere."""

    controllers: tuple[str, ...]
    root: PurePosixPath
    point: Path


def limits(proc: Path = Path("/proc/self")) -> ContainerLimits:
    """Return the tightest limits of this process's groups and those above them.

    Args:
        proc: Where the kernel tells about this process.
    """
    try:
        groups, mounts = _groups(proc), _mounts(proc)
    except (OSError, ValueError, IndexError):
        return NO_LIMITS  # not Linux, or a /proc that hides it
    unified = _way_up(_UNIFIED, groups, mounts)
    memory = [_memory(folder) for folder in unified]
    cpus = [_cpus(folder) for folder in unified]
    memory += [_memory_v1(folder) for folder in _way_up("memory", groups, mounts)]
    cpus += [_cpus_v1(folder) for folder in _way_up("cpu", groups, mounts)]
    return ContainerLimits(_tightest(memory), _tightest(cpus))


def _tightest(found: Iterable[_Limit | None]) -> _Limit | None:
    return min((one for one in found if one is not None), default=None)


def _groups(proc: Path) -> dict[str, PurePosixPath]:
    """Return the process's group by controller."""
    groups = {}
    for line in (proc / "cgroup").read_bytes().splitlines():
        _number, controllers, path = line.split(b":", 2)
        for one in controllers.decode("ascii", "replace").split(","):
            groups[one] = PurePosixPath(plain(path))
    return groups


def _mounts(proc: Path) -> list[_Mount]:
    """Return what of the groups is mounted where."""
    found = []
    for line in (proc / "mountinfo").read_bytes().splitlines():
        mounted, _, filesystem = line.partition(b" - ")
        if not filesystem.startswith(b"cgroup"):
            continue
        fields, (kind, _source, options) = mounted.split(b" "), filesystem.split(b" ", 2)
        controllers = [_UNIFIED] if kind == b"cgroup2" else plain(options).split(",")
        root, point = PurePosixPath(plain(fields[3])), Path(plain(fields[4]))
        found.append(_Mount(tuple(controllers), root, point))
    return found


def _way_up(
    controller: str, groups: dict[str, PurePosixPath], mounts: Iterable[_Mount]
) -> list[Path]:
    """Return the folder of the process's group, and those of all groups above it."""
    group = groups.get(controller)
    if group is None or ".." in group.parts:  # outside of what this process may see
        return []
    covering = [
        one for one in mounts if controller in one.controllers and group.is_relative_to(one.root)
    ]
    if not covering:
        return []
    # What is mounted later hides what was there; the last of equals is the one that is seen.
    mount = max(reversed(covering), key=lambda one: len(one.root.parts))
    return list(_up(mount.point / group.relative_to(mount.root), mount.point))


def _up(folder: Path, top: Path) -> Iterator[Path]:
    yield folder
    while folder != top:
        folder = folder.parent
        yield folder


def _memory(folder: Path) -> int | None:
    return _number(_text(folder / "memory.max"))


def _cpus(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    return _share(quota, period)


def _memory_v1(folder: Path) -> int | None:
    limit = _number(_text(folder / "memory.limit_in_bytes"))
    return None if limit is None or limit >= _UNLIMITED else limit


def _cpus_v1(folder: Path) -> float | None:
    return _share(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _share(quota: str, period: str) -> float | None:
    """Return CPUs' worth of time; None without a quota, which is `max` or -1."""
    used, of = _number(quota), _number(period)
    return used / of if used is not None and of else None


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() else None


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("ascii", "replace").strip()
    except OSError:
        return ""  # the root group has no limits, and a controller may be switched off
