"""What the process's control group may use: in a container the host's figures say little.

Control groups version 2 (Linux, Documentation/admin-guide/cgroup-v2.rst). A limit of a group
holds for all groups below it, so the tightest one on the way to the root counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from periscope_otel.gauges.stats import ContainerLimits

if TYPE_CHECKING:
    from collections.abc import Iterator

NO_LIMITS = ContainerLimits(None, None)


def limits(proc: Path = Path("/proc/self")) -> ContainerLimits:
    """Return the tightest limits of this process's group and those above it.

    Args:
        proc: Where the kernel tells about this process.
    """
    try:
        folders = list(_folders(proc))
    except (OSError, ValueError):
        return NO_LIMITS  # not Linux, or a /proc that hides it
    memory = [_memory(folder) for folder in folders]
    cpus = [_cpus(folder) for folder in folders]
    return ContainerLimits(
        min((one for one in memory if one is not None), default=None),
        min((one for one in cpus if one is not None), default=None),
    )


def _folders(proc: Path) -> Iterator[Path]:
    """Return the folder of the process's group, and those of all groups above it."""
    path = _group(proc)
    mount = _mount(proc)
    if path is None or mount is None:
        return
    root, point = mount
    folder = point / path.relative_to(root) if path.is_relative_to(root) else point
    yield folder
    while folder != point:
        folder = folder.parent
        yield folder


def _group(proc: Path) -> Path | None:
    for line in (proc / "cgroup").read_text().splitlines():
        number, _, path = line.split(":", 2)
        if number == "0":
            return Path(path)
    return None


def _mount(proc: Path) -> tuple[Path, Path] | None:
    """Return which group is mounted where."""
    for line in (proc / "mountinfo").read_text().splitlines():
        mounted, _, filesystem = line.partition(" - ")
        if filesystem.startswith("cgroup2 "):
            fields = mounted.split(" ")
            return Path(_plain(fields[3])), Path(_plain(fields[4]))
    return None


def _plain(path: str) -> str:
    """Return a path of mountinfo as it is: blanks are written as octal numbers there."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path


def _memory(folder: Path) -> int | None:
    text = _text(folder / "memory.max")
    return int(text) if text.isdecimal() else None


def _cpus(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""  # the root group has no limits, and a controller may be switched off
