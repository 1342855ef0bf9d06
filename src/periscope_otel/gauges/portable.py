"""The host and this process by psutil: on other platforms, and where /proc does not tell."""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from periscope_otel.gauges.host_source import CpuTimes, ProcessSize, ProcessUsage
from periscope_otel.gauges.stats import DiskStats, MemoryStats, NetworkStats, PagingStats

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LINUX: Final = sys.platform == "linux"

_MODES: Final = (
    ("user", ("user",)),
    ("nice", ("nice",)),
    ("system", ("system",)),
    ("idle", ("idle",)),
    ("iowait", ("iowait",)),
    ("interrupt", ("irq", "softirq", "interrupt")),
    ("steal", ("steal",)),
)
"""Modes by the semantic conventions, and what psutil calls them. Guests are part of user."""


class PortableSource:
    """Asks psutil.

    Args:
        clock: Monotonic seconds: what has begun once goes on by these, also where the wall clock,
            which psutil compares with, is set.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        # Not at the top: `import periscope_otel` does without. Here, in the caller's thread, and
        # not in the sampler's: a fork in the middle of an import blocks that import in the child.
        self._psutil: Any = import_module("psutil")
        self._clock = clock
        self._booted: float | None = None
        self._of_pid: tuple[int, Any, float] | None = None

    # The host.

    def cpu_count(self) -> int:
        """Return how many CPUs there are."""
        count: int | None = self._psutil.cpu_count()
        if count is None:
            raise NotImplementedError("the number of CPUs")
        return count

    def cpu_times(self, each: bool) -> CpuTimes:
        """Return the CPUs' times; which CPU is which, psutil tells by the place alone."""
        together = _modes(self._psutil.cpu_times())
        # On Linux a CPU that is switched off moves the others up: none is better than another's.
        if not each or _LINUX:
            return CpuTimes(together, {})
        told = self._psutil.cpu_times(percpu=True)
        return CpuTimes(together, {number: _modes(one) for number, one in enumerate(told)})

    def memory(self) -> MemoryStats:
        """Return the memory, used being what is not available."""
        told = self._psutil.virtual_memory()
        return MemoryStats(
            total=told.total,
            used=told.total - told.available,
            free=told.free,
            available=told.available,
            buffers=getattr(told, "buffers", None),
            cached=getattr(told, "cached", None),
        )

    def swaps(self) -> list[PagingStats]:
        """Return all swap space together, if there is any."""
        told = self._psutil.swap_memory()
        return [PagingStats(None, told.used, told.free)] if told.total else []

    def disks(self, wanted: Callable[[str], bool]) -> list[DiskStats]:
        """Return what these disks have done."""
        # Without `nowrap`, whose lock a child of a fork may inherit taken.
        told = self._psutil.disk_io_counters(perdisk=True, nowrap=False) or {}
        return [
            DiskStats(name, one.read_bytes, one.write_bytes, one.read_count, one.write_count)
            for name, one in told.items()
            if wanted(name)
        ]

    def networks(self, wanted: Callable[[str], bool]) -> list[NetworkStats]:
        """Return what these interfaces have done."""
        told = self._psutil.net_io_counters(pernic=True, nowrap=False) or {}
        return [
            NetworkStats(
                name,
                one.bytes_recv,
                one.bytes_sent,
                one.errin,
                one.errout,
                one.dropin,
                # macOS does not count these, which psutil says as 0.
                None if sys.platform == "darwin" else one.dropout,
            )
            for name, one in told.items()
            if wanted(name)
        ]

    def load(self) -> tuple[float, float, float]:
        """Return the load averages."""
        return os.getloadavg()

    def uptime(self) -> float:
        """Return the seconds since the system was started, by the monotonic clock."""
        now = self._clock()
        booted = self._booted
        if booted is None:
            booted = self._booted = now - (time.time() - self._psutil.boot_time())
        return now - booted

    # This process.

    def process_size(self) -> ProcessSize:
        """Return how large this process is."""
        process, started = self._this_process()
        with process.oneshot():
            memory, threads = process.memory_info(), process.num_threads()
        return ProcessSize(memory.rss, memory.vms, threads, self._clock() - started)

    def process_usage(self) -> ProcessUsage:
        """Return what this process has used."""
        process, _ = self._this_process()
        times, switches = process.cpu_times(), process.num_ctx_switches()
        return ProcessUsage(
            {"user": times.user, "system": times.system},
            {"voluntary": switches.voluntary, "involuntary": switches.involuntary},
            _faults(),
        )

    def process_io(self) -> Mapping[str, int]:
        """Return what this process has read from and written to disks."""
        told = self._this_process()[0].io_counters()
        return {"read": told.read_bytes, "write": told.write_bytes}

    def file_descriptors(self) -> int:
        """Return how many file descriptors are open."""
        count: int = self._this_process()[0].num_fds()
        return count - 1 if _LINUX else count  # less the one by which psutil lists them there

    def available_cpus(self) -> int:
        """Return how many CPUs there are: where psutil knows of no others."""
        return os.cpu_count() or 1

    def _this_process(self) -> tuple[Any, float]:
        """Return psutil's view of this process, and when it began on the monotonic clock."""
        pid = os.getpid()
        if self._of_pid is None or self._of_pid[0] != pid:
            process = self._psutil.Process(pid)
            started = self._clock() - (time.time() - process.create_time())
            self._of_pid = (pid, process, started)
        return self._of_pid[1], self._of_pid[2]


def _modes(told: Any) -> dict[str, float]:
    return {
        mode: sum(getattr(told, name, 0.0) for name in names)
        for mode, names in _MODES
        if any(hasattr(told, name) for name in names)
    }


def _faults() -> dict[str, int] | None:
    if sys.platform == "win32":
        return None
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"minor": used.ru_minflt, "major": used.ru_majflt}
