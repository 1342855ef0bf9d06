"""The host and this process: one reading, each figure by itself.

A utilisation is the share between two readings, so it is absent after the first; what the platform
does not tell is absent too, never zero, and costs no other figure.
"""

from __future__ import annotations

import os
import sys
import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

from periscope_otel.gauges import cgroup
from periscope_otel.gauges.absence import Absences
from periscope_otel.gauges.choice import Choice
from periscope_otel.gauges.counters import Counters
from periscope_otel.gauges.devices import DeviceClasses
from periscope_otel.gauges.labels import label
from periscope_otel.gauges.portable import PortableSource
from periscope_otel.gauges.procfs import ProcfsSource
from periscope_otel.gauges.shares import Shares
from periscope_otel.gauges.stats import (
    ContainerLimits,
    CpuStats,
    DiskStats,
    NetworkStats,
    PagingStats,
    ProcessStats,
    SystemStats,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from periscope_otel.gauges.host_source import CpuTimes, HostSource

SUPPORTED: Final = sys.platform != "win32"
"""Whether there are host figures on this platform."""

MOST_CPUS: Final = 200
"""CPUs beyond which they are told together: each of them is seven series of two metrics."""

_CPU_SLACK: Final = 1.0
"""Seconds by which a CPU's time may go back for a while: it waited for less than was thought."""

_Told = TypeVar("_Told")
_Device = TypeVar("_Device", bound=tuple[Any, ...])


class _Slow(NamedTuple):
    """What changes slowly, as it was read last."""

    cpu_count: int | None
    available_cpus: float
    paging: tuple[PagingStats, ...]
    container: ContainerLimits


class HostReader:
    """Reads the host and this process, for a sampler.

    Args:
        per_cpu: Whether to tell of each CPU by itself too.
        clock: Monotonic seconds.
        sources: Who is asked, the first that answers; the platform's own by default.
        classes: Which devices stand for hardware.

    Raises:
        NotImplementedError: On Windows.
    """

    name = "host"

    def __init__(
        self,
        *,
        per_cpu: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sources: Sequence[HostSource] | None = None,
        classes: DeviceClasses | None = None,
    ) -> None:
        if not SUPPORTED:
            raise NotImplementedError("host figures are read on Linux and macOS, not on Windows")
        self.per_cpu = per_cpu
        self._clock = clock
        self._sources = _sources_of_platform(clock) if sources is None else tuple(sources)
        self._classes = classes or DeviceClasses()
        self._absences = Absences()
        self._forget()
        self._pid = 0

    def after_fork(self) -> None:
        """Start anew with the next reading: what another process has used is its own."""
        self._pid = 0

    def _forget(self) -> None:
        self._cpus: dict[int | None, _Cpu] = {}
        self._disks = _Devices(
            "disks", DiskStats._make, lambda one: one.read_bytes + one.written_bytes
        )
        self._networks = _Devices(
            "network interfaces",
            NetworkStats._make,
            lambda one: one.received_bytes + one.transmitted_bytes,
        )
        self._swaps = Choice[PagingStats](
            "swap devices", lambda one: one.used + one.free, gives_way=False
        )
        self._process = Shares()
        self._slow = _Slow(None, 1.0, (), cgroup.NO_LIMITS)

    def left_behind(self) -> None:
        """Tell nothing while a reading hangs."""

    def close(self) -> None:
        """Do nothing: it holds nothing open."""

    def read(self, slow: bool) -> SystemStats:
        """Return what the host and this process do now; filesystems are read by themselves.

        Args:
            slow: Whether to look at what changes slowly again too, such as swap space and limits.
        """
        pid = os.getpid()
        if self._pid != pid:
            self._forget()
            slow = True
        if slow:
            self._classes.look_again()
            self._slow = self._read_slow()
        cpu, cpus = self._read_cpus()
        stats = SystemStats(
            taken_at=time.time(),
            cpu_count=self._slow.cpu_count,
            cpu=cpu,
            cpus=cpus,
            memory=self._ask("memory", lambda source: source.memory()),
            paging=self._slow.paging,
            disks=self._read_disks(slow),
            filesystems=(),
            networks=self._read_networks(slow),
            load=self._ask("load", lambda source: source.load()),
            uptime=self._ask("uptime", lambda source: source.uptime()),
            container=self._slow.container,
            process=self._read_process(pid),
        )
        self._pid = pid
        return stats

    # Each figure by itself.

    def _ask(self, figure: str, question: Callable[[HostSource], _Told]) -> _Told | None:
        """Return what the first source says that can; None if none can."""
        failed: Exception | None = None
        for source in self._sources:
            try:
                return question(source)
            except Exception as error:  # noqa: BLE001  (a platform fails in any way it likes)
                failed = failed or error
        self._absences.say(figure, failed)
        return None

    def _told(self, figure: str, work_out: Callable[[], _Told], otherwise: _Told) -> _Told:
        """Return what can be worked out of what was told."""
        try:
            return work_out()
        except Exception as error:  # noqa: BLE001
            self._absences.say(figure, error)
            return otherwise

    def _read_slow(self) -> _Slow:
        count = self._ask("CPU count", lambda source: source.cpu_count())
        available = self._ask("available CPUs", lambda source: source.available_cpus())
        container = self._told("container limits", cgroup.limits, cgroup.NO_LIMITS)
        cpus = float(available or count or 1)
        return _Slow(
            cpu_count=count,
            available_cpus=min(cpus, container.cpus or cpus),
            paging=self._told("swap space", self._read_swaps, ()),
            container=container,
        )

    def _read_swaps(self) -> tuple[PagingStats, ...]:
        told = self._ask("swap space", lambda source: source.swaps()) or ()
        by_name = {label(one.device or ""): one for one in told}
        return tuple(
            by_name[name]._replace(device=name or None)
            for name in self._swaps.of(by_name, slow=True)
        )

    def _read_cpus(self) -> tuple[CpuStats | None, tuple[CpuStats, ...]]:
        times = self._ask("CPU times", lambda source: source.cpu_times(self.per_cpu))
        if times is None:
            return None, ()
        now = self._clock()
        return (
            self._told("CPU times", lambda: self._cpu(None, times.together, now), None),
            self._told("CPU times", lambda: self._each_cpu(times, now), ()),
        )

    def _each_cpu(self, times: CpuTimes, now: float) -> tuple[CpuStats, ...]:
        if len(times.each) > MOST_CPUS:
            line = f"{len(times.each)} CPUs are told together: that is too many for one by one"
            self._absences.say_once("each CPU", line)
            return ()
        each = (self._cpu(number, one, now) for number, one in times.each.items())
        return tuple(one for one in each if one is not None)

    def _cpu(self, number: int | None, times: Mapping[str, float], now: float) -> CpuStats | None:
        if not any(times.values()):
            return None  # some containers' /proc has nothing but zeros
        cpu = self._cpus.get(number)
        if cpu is None:
            cpu = self._cpus[number] = _Cpu()
        return cpu.stats(number, times, now)

    def _read_disks(self, slow: bool) -> tuple[DiskStats, ...]:
        def read(wanted: Callable[[str], bool]) -> Iterable[DiskStats]:
            return self._ask("disks", lambda source: source.disks(wanted)) or ()

        def work_out() -> tuple[DiskStats, ...]:
            return self._disks.read(read, self._classes.is_disk, self._classes.may_be_disk, slow)

        return self._told("disks", work_out, ())

    def _read_networks(self, slow: bool) -> tuple[NetworkStats, ...]:
        def read(wanted: Callable[[str], bool]) -> Iterable[NetworkStats]:
            return self._ask("networks", lambda source: source.networks(wanted)) or ()

        def work_out() -> tuple[NetworkStats, ...]:
            classes = self._classes
            # In a container every interface is a virtual one.
            return self._networks.read(read, classes.is_adapter, classes.leads_away, slow)

        return self._told("networks", work_out, ())

    def _read_process(self, pid: int) -> ProcessStats:
        size = self._ask("process size", lambda source: source.process_size())
        usage = self._ask("process usage", lambda source: source.process_usage())
        times = None if usage is None else usage.cpu_times
        return ProcessStats(
            pid=pid,
            cpu_times=_fixed(times),
            cpu_utilization=None
            if times is None
            else self._process.of(self._clock(), times, self._slow.available_cpus),
            memory=None if size is None else size.memory,
            virtual_memory=None if size is None else size.virtual_memory,
            threads=None if size is None else size.threads,
            file_descriptors=self._ask(
                "file descriptors", lambda source: source.file_descriptors()
            ),
            context_switches=None if usage is None else _fixed(usage.context_switches),
            paging_faults=None if usage is None else _fixed(usage.paging_faults),
            disk_io=_fixed(self._ask("process I/O", lambda source: source.process_io())),
            uptime=None if size is None else size.uptime,
        )


class _Cpu:
    """All CPUs together, or one of them, from reading to reading."""

    def __init__(self) -> None:
        self._counters = Counters(_CPU_SLACK)
        self._shares = Shares()

    def stats(self, number: int | None, times: Mapping[str, float], now: float) -> CpuStats:
        told: dict[str, Any] = dict(
            zip(times, self._counters.of(None, times.values()), strict=True)
        )
        # Of what was counted, not of what is told: that stands still while a counter goes back.
        return CpuStats(number, MappingProxyType(told), self._shares.of(now, times))


class _Devices(Generic[_Device]):
    """The disks, or the network interfaces, from reading to reading."""

    def __init__(
        self,
        kind: str,
        make: Callable[[Iterable[Any]], _Device],
        size: Callable[[_Device], int],
    ) -> None:
        self._make = make
        self._choice: Choice[_Device] = Choice(kind, size)
        self._counters = Counters()
        self._some_are_real = False

    def read(
        self,
        read: Callable[[Callable[[str], bool]], Iterable[_Device]],
        is_real: Callable[[str], bool],
        may_be: Callable[[str], bool],
        slow: bool,
    ) -> tuple[_Device, ...]:
        """Return the real ones; where there never was one, those that may stand for them."""
        found = list(read(is_real))
        if found:
            self._some_are_real = True
        elif not self._some_are_real:
            found = list(read(may_be))
        by_name = {label(one[0]): one for one in found}
        return tuple(
            self._make((name, *self._counters.of(name, by_name[name][1:])))
            for name in self._choice.of(by_name, slow)
        )


def _sources_of_platform(clock: Callable[[], float]) -> tuple[HostSource, ...]:
    portable = PortableSource(clock)
    return (ProcfsSource(), portable) if sys.platform == "linux" else (portable,)


def _fixed(values: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return values that nobody can change who is told them."""
    return None if values is None else MappingProxyType(dict(values))
