"""The host and this process on Linux, as the kernel tells of them under /proc.

Not psutil: this costs a third of it (tests/benchmarks/gauges.py), tells which CPU is which where
some are switched off, and when the process was started to a hundredth of a second. Each file is
opened, read and closed each time. A descriptor that was kept would be shared with forked children,
closed by programs that close all of them, and still of the network namespace that it was opened in.
"""

from __future__ import annotations

import os
import re
import sys
import time
from typing import TYPE_CHECKING, Final

from periscope_otel.gauges.host_source import CpuTimes, ProcessSize, ProcessUsage
from periscope_otel.gauges.stats import DiskStats, MemoryStats, NetworkStats, PagingStats

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_FLAGS: Final = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
_CHUNK: Final = 16_384
_ENCODING: Final = sys.getfilesystemencoding()
_SECTOR: Final = 512
"""Bytes that /proc/diskstats calls a sector, whatever the disk's own are."""
_MOST_THREADS: Final = 256
"""Threads whose CPUs are looked at: of those that share a limit one is as good as another."""
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


class ProcfsSource:
    """Reads /proc.

    Args:
        proc: Where it is mounted.
        since_boot: Seconds since the system was started, those in which it slept included.
    """

    def __init__(self, proc: str = "/proc", since_boot: Callable[[], float] | None = None) -> None:
        self._proc = proc
        self._since_boot = since_boot or _since_boot
        self._ticks = os.sysconf("SC_CLK_TCK")
        self._page = os.sysconf("SC_PAGE_SIZE")

    # The host.

    def cpu_count(self) -> int:
        """Return how many CPUs are switched on."""
        return os.sysconf("SC_NPROCESSORS_ONLN")

    def cpu_times(self, each: bool) -> CpuTimes:
        """Return the times of /proc/stat; a CPU that is switched off has none of its own."""
        if not each:
            line, _, _ = _first(f"{self._proc}/stat", 512).partition(b"\n")
            return CpuTimes(self._modes(line, b"cpu"), {})
        rows = [row for row in _whole(f"{self._proc}/stat").split(b"\n") if row.startswith(b"cpu")]
        numbers = [int(row[3 : row.index(b" ")]) for row in rows[1:]]
        return CpuTimes(
            self._modes(rows[0], b"cpu"),
            {number: self._modes(row) for number, row in zip(numbers, rows[1:], strict=True)},
        )

    def _modes(self, row: bytes, name: bytes | None = None) -> dict[str, float]:
        fields = row.split()
        if name is not None and fields[0] != name:
            raise ValueError(f"/proc/stat begins with {fields[0]!r}")
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[1:9])
        ticks = self._ticks
        return {
            "user": user / ticks,  # guests included
            "nice": nice / ticks,
            "system": system / ticks,
            "idle": idle / ticks,
            "iowait": iowait / ticks,
            "interrupt": (irq + softirq) / ticks,
            "steal": steal / ticks,
        }

    def memory(self) -> MemoryStats:
        """Return the memory of /proc/meminfo, with the slabs that can be freed as cached."""
        told = b"\n" + _first(f"{self._proc}/meminfo", _CHUNK)
        total, free = _kib(told, b"MemTotal"), _kib(told, b"MemFree")
        available = _kib(told, b"MemAvailable")
        if total is None or free is None or available is None:
            raise ValueError("/proc/meminfo lacks MemTotal, MemFree or MemAvailable")
        if available > total:  # some containers show the host's beside a total of their own
            available = free
        cached, slabs = _kib(told, b"Cached"), _kib(told, b"SReclaimable")
        return MemoryStats(
            total=total,
            used=total - available,
            free=free,
            available=available,
            buffers=_kib(told, b"Buffers"),
            cached=None if cached is None else cached + (slabs or 0),
        )

    def swaps(self) -> list[PagingStats]:
        """Return the devices and files of /proc/swaps."""
        found = []
        for line in _whole(f"{self._proc}/swaps").splitlines()[1:]:
            name, _type, size, used, _priority = line.rsplit(None, 4)
            taken = int(used) * 1024
            found.append(PagingStats(plain(name), taken, int(size) * 1024 - taken))
        return found

    def disks(self, wanted: Callable[[str], bool]) -> list[DiskStats]:
        """Return what /proc/diskstats says of these."""
        found = []
        for line in _whole(f"{self._proc}/diskstats").split(b"\n"):
            # Most rows are of partitions and the like: only those that are wanted are taken apart.
            row = line.split(None, 3)
            if len(row) < 4 or not wanted(name := _name(row[2])):
                continue
            fields = line.split(None, 10)
            if len(fields) > 9:  # partitions of old kernels have no more than four counts
                read, written = int(fields[5]) * _SECTOR, int(fields[9]) * _SECTOR
                found.append(DiskStats(name, read, written, int(fields[3]), int(fields[7])))
        return found

    def networks(self, wanted: Callable[[str], bool]) -> list[NetworkStats]:
        """Return what /proc/net/dev says of these."""
        found = []
        for line in _whole(f"{self._proc}/net/dev").split(b"\n")[2:]:
            told, _, rest = line.partition(b":")
            if rest and wanted(name := _name(told.strip())):
                row = rest.split(None, 12)
                received, receive_errors, receive_dropped = int(row[0]), int(row[2]), int(row[3])
                sent, send_errors, send_dropped = int(row[8]), int(row[10]), int(row[11])
                found.append(
                    NetworkStats(
                        name,
                        received,
                        sent,
                        receive_errors,
                        send_errors,
                        receive_dropped,
                        send_dropped,
                    )
                )
        return found

    def load(self) -> tuple[float, float, float]:
        """Return the load averages."""
        return os.getloadavg()

    def uptime(self) -> float:
        """Return the seconds since the system was started."""
        return self._since_boot()

    # This process.

    def process_size(self) -> ProcessSize:
        """Return what /proc/self/stat says."""
        told = _first(f"{self._proc}/self/stat", 4096)
        # The program's name, before these, may have blanks and parentheses in it.
        fields = told[told.rindex(b")") + 1 :].split(None, 22)
        return ProcessSize(
            memory=int(fields[21]) * self._page,
            virtual_memory=int(fields[20]),
            threads=int(fields[17]),
            uptime=max(0.0, self._since_boot() - int(fields[19]) / self._ticks),
        )

    def process_usage(self) -> ProcessUsage:
        """Return what the kernel has counted for all threads together."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return ProcessUsage(
            {"user": used.ru_utime, "system": used.ru_stime},
            {"voluntary": used.ru_nvcsw, "involuntary": used.ru_nivcsw},
            {"minor": used.ru_minflt, "major": used.ru_majflt},
        )

    def process_io(self) -> Mapping[str, int]:
        """Return what /proc/self/io says of disks."""
        told = _first(f"{self._proc}/self/io", 4096).split()
        counted = dict(zip(told[::2], told[1::2], strict=False))
        return {"read": int(counted[b"read_bytes:"]), "write": int(counted[b"write_bytes:"])}

    def file_descriptors(self) -> int:
        """Return the size of /proc/self/fd, which newer kernels (from 6.2) have counted."""
        folder = f"{self._proc}/self/fd"
        # The one that lists the folder is among those that it lists.
        return os.stat(folder).st_size or len(os.listdir(folder)) - 1  # noqa: PTH116, PTH208

    def available_cpus(self) -> int:
        """Return how many CPUs any thread may run on; each may be bound to some of its own."""
        cpus = os.sched_getaffinity(os.getpid())
        count = self.cpu_count()
        if len(cpus) >= count:
            return len(cpus)
        for thread in os.listdir(f"{self._proc}/self/task")[:_MOST_THREADS]:  # noqa: PTH208
            try:
                cpus |= os.sched_getaffinity(int(thread))
            except OSError:
                continue  # it has just ended
        return len(cpus)


def plain(path: bytes) -> str:
    """Return a path as it is: the kernel writes blanks in it as octal numbers.

    Args:
        path: A field of a line under /proc.
    """
    return os.fsdecode(_OCTAL.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), path))


def _name(told: bytes) -> str:
    """Return what `os.fsdecode` does, several times as fast."""
    return told.decode(_ENCODING, "surrogateescape")


def _since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _kib(told: bytes, name: bytes) -> int | None:
    """Return a field of /proc/meminfo in bytes."""
    key = b"\n" + name + b":"
    at = told.find(key)
    if at < 0:
        return None
    at += len(key)
    return int(told[at : at + 32].split(None, 1)[0]) * 1024


def _first(path: str, size: int) -> bytes:
    """Return the beginning of a file that the kernel writes in one go."""
    file = os.open(path, _FLAGS)
    try:
        return os.read(file, size)
    finally:
        os.close(file)


def _whole(path: str) -> bytes:
    """Return a file that may come in pieces."""
    file = os.open(path, _FLAGS)
    try:
        told = piece = os.read(file, _CHUNK)
        while piece:
            piece = os.read(file, _CHUNK)
            told += piece
        return told
    finally:
        os.close(file)
