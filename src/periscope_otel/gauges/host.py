"""The host and this process: one reading, through psutil.

A utilisation is the share between two readings, so it is absent after the first; what the
platform does not tell is absent too, never zero.
"""

from __future__ import annotations

import os
import resource
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from periscope_otel.gauges import cgroup
from periscope_otel.gauges.stats import (
    CpuStats,
    DiskStats,
    FilesystemStats,
    MemoryStats,
    NetworkStats,
    PagingStats,
    ProcessStats,
    SystemStats,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

MOST_DEVICES = 16
"""Disks, filesystems and interfaces that are told of, of each kind."""

_MODES = (
    ("user", ("user",)),
    ("nice", ("nice",)),
    ("system", ("system",)),
    ("idle", ("idle",)),
    ("iowait", ("iowait",)),
    ("interrupt", ("irq", "softirq", "interrupt")),
    ("steal", ("steal",)),
)
"""Modes by the semantic conventions, and what psutil calls them. Guests are part of user."""

_Device = TypeVar("_Device", DiskStats, NetworkStats)


class HostReader:
    """Reads the host and this process.

    Args:
        per_cpu: Whether to tell of each CPU by itself too.
        clock: Monotonic seconds.
    """

    name = "host"
    may_hang = False

    def __init__(
        self, *, per_cpu: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        # Not at the top: `import periscope_otel` does without. Here, in the caller's thread, and
        # not in the sampler's: a fork in the middle of an import blocks that import in the child.
        self._psutil: Any = import_module("psutil")
        self.per_cpu = per_cpu
        self._clock = clock
        self._classes = _DeviceClasses()
        self._pid = 0

    def after_fork(self) -> None:
        """Start anew with the next reading: what another process has used is its own."""
        self._pid = 0

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._process = self._psutil.Process()
        self._started = self._clock() - (time.time() - self._process.create_time())
        self._cpus: dict[int | None, CpuStats] = {}
        self._process_before: tuple[float, Mapping[str, float]] | None = None
        self._disks = Choice[DiskStats]()
        self._networks = Choice[NetworkStats]()
        self._filesystems: tuple[FilesystemStats, ...] = ()
        self._container = cgroup.NO_LIMITS

    def left_behind(self) -> None:
        """Tell nothing while a reading hangs."""

    def close(self) -> None:
        """Do nothing: it holds nothing open."""

    def read(self, slow: bool) -> SystemStats:
        """Return what the host and this process do now.

        Args:
            slow: Whether to look at swap, filesystems and limits again too, which change slowly.
        """
        new = self._pid != os.getpid()
        if new:
            self._begin()
        if new or slow:
            self._swap: PagingStats | None = self._told(self._read_swap)
            self._filesystems = self._told(self._read_filesystems) or ()
            self._container = cgroup.limits()
        psutil = self._psutil
        return SystemStats(
            taken_at=time.time(),
            cpu_count=psutil.cpu_count(),
            cpu=self._cpu(None, psutil.cpu_times()),
            cpus=self._each_cpu(),
            memory=self._memory(),
            paging=self._swap,
            disks=self._told(self._read_disks) or (),
            filesystems=self._filesystems,
            networks=self._told(self._read_networks) or (),
            load=self._told(os.getloadavg),
            uptime=self._uptime(),
            container=self._container,
            process=self._read_process(),
        )

    # The host.

    def _each_cpu(self) -> tuple[CpuStats, ...]:
        if not self.per_cpu:
            return ()
        each = enumerate(self._psutil.cpu_times(percpu=True))
        return tuple(self._cpu(number, times) for number, times in each)

    def _cpu(self, number: int | None, told: Any) -> CpuStats:
        before = self._cpus.get(number)
        times = {
            mode: sum(getattr(told, name, 0.0) for name in names_)
            for mode, names_ in _MODES
            if any(hasattr(told, name) for name in names_)
        }
        if before is None:
            stats = CpuStats(number, times, None)
        else:
            # The kernel's iowait and idle may go back a little; a counter may not.
            times = {mode: max(spent, before.times[mode]) for mode, spent in times.items()}
            stats = CpuStats(number, times, _shares(before.times, times))
            if stats.utilization is None:  # no time has passed: what was known is still so
                stats = stats._replace(utilization=before.utilization)
        self._cpus[number] = stats
        return stats

    def _memory(self) -> MemoryStats:
        told = self._psutil.virtual_memory()
        return MemoryStats(
            total=told.total,
            used=told.total - told.available,
            free=told.free,
            available=told.available,
            buffers=getattr(told, "buffers", None),
            cached=getattr(told, "cached", None),
        )

    def _read_swap(self) -> PagingStats:
        told = self._psutil.swap_memory()
        return PagingStats(told.used, told.free)

    def _read_disks(self) -> tuple[DiskStats, ...]:
        # Without `nowrap`, whose lock a child of a fork may inherit taken; 64 bits do not wrap.
        told = self._psutil.disk_io_counters(perdisk=True, nowrap=False) or {}
        found = [
            DiskStats(name, one.read_bytes, one.write_bytes, one.read_count, one.write_count)
            for name, one in told.items()
            if self._classes.is_disk(name)
        ]
        return self._disks.of(found, lambda one: one.read_bytes + one.written_bytes)

    def _read_networks(self) -> tuple[NetworkStats, ...]:
        told = self._psutil.net_io_counters(pernic=True, nowrap=False) or {}
        found = [
            NetworkStats(
                name,
                one.bytes_recv,
                one.bytes_sent,
                one.errin,
                one.errout,
                one.dropin,
                one.dropout,
            )
            for name, one in told.items()
            if not self._classes.is_loopback(name)
        ]
        # In a container every interface is a virtual one.
        real = [one for one in found if self._classes.is_real_interface(one.interface)]
        return self._networks.of(
            real or found, lambda one: one.received_bytes + one.transmitted_bytes
        )

    def _read_filesystems(self) -> tuple[FilesystemStats, ...]:
        by_device: dict[str, Any] = {}
        for one in self._psutil.disk_partitions(all=False):
            known = by_device.get(one.device)
            if known is None or len(one.mountpoint) < len(known.mountpoint):
                by_device[one.device] = one
        if not any(one.mountpoint == "/" for one in by_device.values()):
            # A container's root is a virtual filesystem, but it is the one that fills up.
            everything = self._psutil.disk_partitions(all=True)
            by_device |= {one.device: one for one in everything if one.mountpoint == "/"}
        stats = [found for one in by_device.values() if (found := _filesystem(one)) is not None]
        stats.sort(key=lambda one: (-one.used - one.free, one.mountpoint))
        return tuple(stats[:MOST_DEVICES])

    def _uptime(self) -> float:
        if hasattr(time, "CLOCK_BOOTTIME"):
            return time.clock_gettime(time.CLOCK_BOOTTIME)
        boot: float = self._psutil.boot_time()
        return time.time() - boot

    # This process.

    def _read_process(self) -> ProcessStats:
        process = self._process
        used = resource.getrusage(resource.RUSAGE_SELF)
        times = {"user": used.ru_utime, "system": used.ru_stime}
        with process.oneshot():
            memory = process.memory_info()
            threads: int = process.num_threads()
        return ProcessStats(
            pid=self._pid,
            cpu_times=times,
            cpu_utilization=self._process_utilization(times),
            memory=memory.rss,
            virtual_memory=memory.vms,
            threads=threads,
            file_descriptors=self._told(process.num_fds),
            context_switches={"voluntary": used.ru_nvcsw, "involuntary": used.ru_nivcsw},
            paging_faults={"minor": used.ru_minflt, "major": used.ru_majflt},
            disk_io=self._told(lambda: _disk_io(process)),
            uptime=self._clock() - self._started,
        )

    def _process_utilization(self, times: Mapping[str, float]) -> Mapping[str, float] | None:
        now, before = self._clock(), self._process_before
        self._process_before = (now, times)
        if before is None or now <= before[0]:
            return None
        available = (now - before[0]) * self._available_cpus()
        return {
            mode: min(1.0, max(0.0, spent - before[1][mode]) / available)
            for mode, spent in times.items()
        }

    def _available_cpus(self) -> float:
        """Return how many CPUs this process may use: those it is bound to, within its quota."""
        bound = getattr(os, "sched_getaffinity", None)
        count = len(bound(0)) if bound is not None else (os.cpu_count() or 1)
        return min(float(count), self._container.cpus or float(count))

    def _told(self, ask: Callable[[], Any]) -> Any:
        """Return what the platform tells; None if it does not, or not this user."""
        try:
            return ask()
        except (
            AttributeError,  # psutil has no such function on this platform
            NotImplementedError,
            OSError,
            RuntimeWarning,  # an incomplete /proc, where warnings are errors
            self._psutil.Error,
        ):
            return None


class Choice(Generic[_Device]):
    """At most so many of the devices that there are: the busiest, once chosen kept."""

    def __init__(self, most: int = MOST_DEVICES) -> None:
        self._most = most
        self._chosen: set[str] = set()

    def of(self, found: Iterable[_Device], size: Callable[[_Device], int]) -> tuple[_Device, ...]:
        """Return those chosen of `found`, in the order of their names."""
        by_name = {one[0]: one for one in found}
        self._chosen &= by_name.keys()
        room = self._most - len(self._chosen)
        others = [one for name, one in by_name.items() if name not in self._chosen]
        self._chosen |= {one[0] for one in sorted(others, key=size, reverse=True)[:room]}
        return tuple(by_name[name] for name in sorted(self._chosen))


class _DeviceClasses:
    """Which devices stand for hardware; looked up once each."""

    def __init__(self, sys: Path = Path("/sys")) -> None:
        self._sys = sys
        self._disks: dict[str, bool] = {}
        self._interfaces: dict[str, bool] = {}

    def is_disk(self, name: str) -> bool:
        """Whether it is a whole disk: no partition, loop device or other virtual one."""
        known = self._disks.get(name)
        return self._look(self._disks, "block", name) if known is None else known

    def is_real_interface(self, name: str) -> bool:
        """Whether it is a network adapter: no bridge, tunnel, or one end of a container's pair."""
        known = self._interfaces.get(name)
        return self._look(self._interfaces, "class/net", name) if known is None else known

    def is_loopback(self, name: str) -> bool:
        """Whether it leads back to this host."""
        return name.rstrip("0123456789") == "lo"

    def _look(self, known: dict[str, bool], folder: str, name: str) -> bool:
        if len(known) > 1024:  # names of short-lived devices
            known.clear()
        known[name] = _is_real(self._sys / folder, name)
        return known[name]


def _is_real(folder: Path, name: str) -> bool:
    """Whether the kernel lists a device that is not virtual; without a /sys, all are."""
    if not folder.is_dir():
        return True
    device = folder / name.replace("/", "!")  # as in cciss!c0d0
    return device.exists() and "/devices/virtual/" not in str(device.resolve())


def _filesystem(mount: Any) -> FilesystemStats | None:
    point = mount.mountpoint
    try:
        told = os.statvfs(point)
    except OSError:
        return None
    # Containers mount single files of the host's disk; they are no filesystems of their own.
    if not told.f_blocks or not Path(point).is_dir():
        return None
    size = told.f_frsize
    return FilesystemStats(
        device=mount.device,
        mountpoint=point,
        type=mount.fstype,
        mode="ro" if "ro" in mount.opts.split(",") else "rw",
        used=(told.f_blocks - told.f_bfree) * size,
        free=told.f_bavail * size,
        reserved=(told.f_bfree - told.f_bavail) * size,
    )


def _shares(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float] | None:
    """Return each mode's share of the time that has passed; None if none has."""
    spent = {mode: seconds - before[mode] for mode, seconds in after.items()}
    total = sum(spent.values())
    if total <= 0:
        return None
    return {mode: min(1.0, one / total) for mode, one in spent.items()}


def _disk_io(process: Any) -> dict[str, int]:
    told = process.io_counters()
    return {"read": told.read_bytes, "write": told.write_bytes}
