"""One reading of the host: each figure by itself, absent where it cannot be had, bounded."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from periscope_otel.gauges import cgroup
from periscope_otel.gauges import host as host_module
from periscope_otel.gauges.devices import DeviceClasses
from periscope_otel.gauges.host import MOST_CPUS, HostReader
from periscope_otel.gauges.host_source import CpuTimes, ProcessSize, ProcessUsage
from periscope_otel.gauges.observe import HOST
from periscope_otel.gauges.stats import (
    DiskStats,
    MemoryStats,
    NetworkStats,
    PagingStats,
    ProcessStats,
)

if TYPE_CHECKING:
    from pathlib import Path


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


class Machine:
    """A platform that says what it is told to."""

    def __init__(self, **said: Any) -> None:
        self.said = said

    def __getattr__(self, question: str) -> Any:
        return lambda *arguments: self._answer(question, *arguments)

    def _answer(self, question: str, *arguments: Any) -> Any:
        answer = self.said[question]
        if isinstance(answer, BaseException):
            raise answer
        return answer(*arguments) if callable(answer) else answer


def cpu_times(**seconds: float) -> dict[str, float]:
    return {"user": 1.0, "system": 1.0, "idle": 1.0, "iowait": 1.0, **seconds}


def usage(user: float, system: float) -> ProcessUsage:
    return ProcessUsage({"user": user, "system": system}, {"voluntary": 1}, {"minor": 1})


def disks(*names: str) -> Any:
    return lambda wanted: [DiskStats(one, 1, 2, 3, 4) for one in names if wanted(one)]


def networks(*names: str) -> Any:
    return lambda wanted: [NetworkStats(one, 1, 2, 3, 4, 5, 6) for one in names if wanted(one)]


SAID: dict[str, Any] = {
    "cpu_count": 2,
    "available_cpus": 2,
    "cpu_times": CpuTimes(cpu_times(), {}),
    "memory": MemoryStats(100, 60, 30, 40, 5, 6),
    "swaps": [PagingStats("/dev/sda2", 1, 2)],
    "disks": disks("sda"),
    "networks": networks("eth0"),
    "load": (1.0, 2.0, 3.0),
    "uptime": 1000.0,
    "process_size": ProcessSize(10, 20, 3, 50.0),
    "process_usage": usage(1.0, 2.0),
    "process_io": {"read": 1, "write": 2},
    "file_descriptors": 7,
}


class Simulated:
    """A reader of a machine that a test makes up."""

    def __init__(self, tmp_path: Path, **more: Any) -> None:
        self.clock = Clock()
        self.said = dict(SAID)
        self.reader = HostReader(
            clock=self.clock,
            sources=[Machine()],
            classes=DeviceClasses(str(tmp_path)),
            **more,
        )
        self.reader._sources[0].said = self.said

    def after(self, seconds: float, *, slow: bool = False, **said: Any) -> Any:
        """Return what is read so many seconds later, when this is what there is."""
        self.clock.now += seconds
        self.said.update(said)
        return self.reader.read(slow)


@pytest.fixture
def simulated(tmp_path: Path) -> Simulated:
    return Simulated(tmp_path)


# --- times and shares ----------------------------------------------------------------------------


def test_utilization_is_absent_until_it_is_measured(simulated):
    """Until half a second after the first reading there is none: not even 0."""
    for seconds in (0.0, 0.1, 0.3):
        stats = simulated.after(seconds)
        assert stats.cpu.utilization is None
        assert stats.process.cpu_utilization is None
    stats = simulated.after(1.0, cpu_times=CpuTimes(cpu_times(user=2.0), {}))
    assert sum(stats.cpu.utilization.values()) == pytest.approx(1.0)
    assert set(stats.process.cpu_utilization) == {"user", "system"}


def test_times_never_go_back_and_shares_are_of_what_was_counted(simulated):
    """The kernel's time of waiting may go back: the counter stands still, the share is right."""

    def cpu(**seconds: float) -> Any:
        return simulated.after(1.0, cpu_times=CpuTimes(cpu_times(**seconds), {})).cpu

    cpu(user=10, idle=100, iowait=5)
    second = cpu(user=13, idle=107, iowait=4.5)
    assert second.utilization == {"user": 0.3, "system": 0.0, "idle": 0.7, "iowait": 0.0}
    assert second.times["iowait"] == 5
    third = cpu(user=13, idle=107, iowait=5)
    assert third.utilization == {"user": 0.0, "system": 0.0, "idle": 0.0, "iowait": 1.0}


def test_a_quota_makes_fewer_cpus_available(simulated, monkeypatch):
    """Within a quota of half a CPU a process that uses it up is at 1, not at a fraction."""
    monkeypatch.setattr(cgroup, "limits", lambda: cgroup.ContainerLimits(None, 0.5))
    simulated.after(0.0, process_usage=usage(0.0, 0.0))
    use = simulated.after(10.0, process_usage=usage(2.5, 0.0)).process.cpu_utilization
    assert use == pytest.approx({"user": 0.5, "system": 0.0})
    use = simulated.after(10.0, process_usage=usage(8.5, 6.0)).process.cpu_utilization
    assert use == pytest.approx({"user": 0.5, "system": 0.5})
    assert simulated.after(0.0).process.cpu_utilization == use


def test_each_cpu_keeps_its_number(tmp_path):
    """A CPU that is switched off takes its series with it, and the others keep theirs."""
    simulated = Simulated(tmp_path, per_cpu=True)

    def busy(**seconds: float) -> dict[int, float]:
        each = {int(name[3:]): cpu_times(user=user) for name, user in seconds.items()}
        stats = simulated.after(5.0, cpu_times=CpuTimes(cpu_times(), each))
        assert [one.times["user"] for one in stats.cpus] == list(seconds.values())
        return {one.number: (one.utilization or {}).get("user") for one in stats.cpus}

    assert busy(cpu0=100.0, cpu1=5000.0, cpu3=200.0) == {0: None, 1: None, 3: None}
    assert busy(cpu0=101.0, cpu3=200.0) == {0: 1.0, 3: None}
    assert busy(cpu0=101.0, cpu1=5001.0, cpu3=201.0) == {0: 1.0, 1: 1.0, 3: 1.0}


def test_very_many_cpus_are_told_together(tmp_path, caplog):
    """With more CPUs than there is room for in the series all are told as one, which is said."""
    simulated = Simulated(tmp_path, per_cpu=True)
    each = {number: cpu_times() for number in range(MOST_CPUS + 1)}
    for _ in range(2):
        stats = simulated.after(5, cpu_times=CpuTimes(cpu_times(), each))
        assert (stats.cpu.number, stats.cpus) == (None, ())
    assert [line for line in caplog.messages if "201 CPUs are told together" in line]
    assert len(caplog.messages) == 1
    del each[0]
    stats = simulated.after(5, cpu_times=CpuTimes(cpu_times(), each))
    assert len(stats.cpus) == MOST_CPUS


def test_times_of_nothing_but_zeros_are_absent(simulated):
    """A /proc that some containers make up has no CPU times: they are absent, not zero."""
    nothing = dict.fromkeys(cpu_times(), 0.0)
    assert simulated.after(0, cpu_times=CpuTimes(nothing, {})).cpu is None


# --- what cannot be read -------------------------------------------------------------------------

FIGURES = {
    "cpu_count": "cpu_count",
    "cpu_times": "cpu",
    "memory": "memory",
    "swaps": "paging",
    "disks": "disks",
    "networks": "networks",
    "load": "load",
    "uptime": "uptime",
    "process_size": "process.memory",
    "process_usage": "process.cpu_times",
    "process_io": "process.disk_io",
    "file_descriptors": "process.file_descriptors",
}
"""What a platform is asked for, and the figure that is made of it."""

ERRORS = [
    PermissionError(13, "Permission denied"),
    FileNotFoundError(2, "No such file or directory"),
    ValueError("not sure how to interpret line"),
    KeyError(b"Cached"),
    IndexError("list index out of range"),
    AssertionError("x"),
    RuntimeError("x"),
    RuntimeWarning("memory stats couldn't be determined"),
    psutil.AccessDenied(1),
]


def figure(stats: Any, path: str) -> Any:
    for name in path.split("."):
        stats = getattr(stats, name)
    return stats


@pytest.mark.parametrize("error", ERRORS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("broken", FIGURES)
def test_what_cannot_be_read_costs_no_other_figure(simulated, broken, error, caplog):
    """Whatever a figure fails by, it alone is absent, and one line says so however long."""
    for _ in range(3):
        stats = simulated.after(5.0, slow=True, **{broken: error})
        for question, path in FIGURES.items():
            assert bool(figure(stats, path)) is (question != broken), path
        assert sum(len(list(one.observe(stats))) for one in HOST) > 20
    assert len(caplog.messages) == 1
    assert type(error).__name__ in caplog.messages[0]
    again = simulated.after(5.0, slow=True, **{broken: SAID[broken]})
    assert figure(again, FIGURES[broken])


def test_what_a_platform_does_not_have_is_no_line(simulated, caplog):
    """Figures that a platform does not have are absent without a word."""
    stats = simulated.after(0, process_io=AttributeError("x"), load=NotImplementedError("x"))
    assert (stats.process.disk_io, stats.load) == (None, None)
    assert caplog.messages == []


def test_where_nothing_can_be_read_nothing_is_told(simulated):
    """A platform that tells nothing at all is no error: every figure is absent."""
    stats = simulated.after(0, slow=True, **dict.fromkeys(SAID, OSError("gone")))
    absent = (stats.cpu, stats.memory, stats.load, stats.uptime, stats.cpu_count)
    assert absent == (None,) * 5
    assert (stats.cpus, stats.paging, stats.disks, stats.networks) == ((), (), (), ())
    assert stats.process == ProcessStats(os.getpid(), *(None,) * 10)
    observed = [point for one in HOST for point in one.observe(stats)]
    assert {point.value for point in observed} <= {stats.container.memory, stats.container.cpus}


def test_the_next_source_is_asked_where_the_first_fails(tmp_path, caplog):
    """A figure that the first source cannot tell is the second one's, without a line."""
    first = Machine(**{**SAID, "memory": OSError("hidden"), "disks": ValueError("x")})
    second = Machine(**{**SAID, "uptime": 5.0})
    reader = HostReader(sources=[first, second], classes=DeviceClasses(str(tmp_path)))
    stats = reader.read(slow=True)
    assert stats.memory == SAID["memory"]
    assert [one.device for one in stats.disks] == ["sda"]
    assert stats.uptime == 1000.0
    assert caplog.messages == []


def test_a_first_reading_that_fails_is_no_end(simulated):
    """Where nothing could be read at first, everything is there as soon as it can be."""
    simulated.after(0, slow=True, **dict.fromkeys(SAID, OSError("not yet")))
    stats = simulated.after(5, slow=True, **SAID)
    assert stats.memory == SAID["memory"]
    assert stats.process.memory == 10
    assert simulated.after(5).process.cpu_utilization is not None


def test_limits_that_cannot_be_read_are_absent(simulated, monkeypatch):
    """An error in reading control groups costs the limits alone."""

    def refuse() -> Any:
        raise RuntimeError("x")

    monkeypatch.setattr(cgroup, "limits", refuse)
    stats = simulated.after(0)
    assert stats.container == (None, None)
    assert stats.memory == SAID["memory"]


def test_windows_is_refused_by_name(monkeypatch):
    """Where there are no host figures, a reader says for which platforms there are."""
    monkeypatch.setattr(host_module, "SUPPORTED", False)
    with pytest.raises(NotImplementedError, match="Windows"):
        HostReader()


# --- devices -------------------------------------------------------------------------------------


def test_counters_of_devices_never_go_back(simulated):
    """An interface that is made anew, or was away, goes on from what was told of it."""

    def told(received: int | None) -> list[int]:
        there = [] if received is None else [NetworkStats("eth0", received, 0, 0, 0, 0, 0)]
        stats = simulated.after(5, networks=lambda _wanted: there)
        return [one.received_bytes for one in stats.networks]

    assert told(4_000_000_000) == [4_000_000_000]
    assert told(5_000) == [4_000_005_000]
    assert told(None) == []
    assert told(10) == [4_000_005_010]


def test_each_kind_of_device_is_bounded(simulated):
    """With hundreds of disks, interfaces and swap files no more than 16 of each are told."""
    names = [f"x{number}" for number in range(300)]
    swaps = [PagingStats(name, 1, 1) for name in names]
    stats = simulated.after(
        0, slow=True, disks=disks(*names), networks=networks(*names), swaps=swaps
    )
    assert (len(stats.disks), len(stats.networks), len(stats.paging)) == (16, 16, 16)


def keep(tmp_path: Path, folder: str, **where: str) -> None:
    """Have the kernel list these devices."""
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, place in where.items():
        device = tmp_path / "devices" / place / name
        device.mkdir(parents=True)
        (tmp_path / folder / name).unlink(missing_ok=True)
        (tmp_path / folder / name).symlink_to(device)


def interfaces(stats: Any) -> list[str]:
    return [one.interface for one in stats.networks]


def test_in_a_container_virtual_interfaces_are_all_there_is(simulated, tmp_path):
    """Where no interface is a real one, all but loopback are told."""
    keep(tmp_path, "class/net", lo="virtual/net", eth0="virtual/net")
    assert interfaces(simulated.after(0, networks=networks("lo", "eth0"))) == ["eth0"]


def test_once_an_adapter_was_seen_virtual_interfaces_stay_out(simulated, tmp_path):
    """When the one adapter goes away no bridges and pairs come in its place."""
    keep(tmp_path, "class/net", eth0="pci0", veth1="virtual/net", docker0="virtual/net")
    found = simulated.after(0, networks=networks("eth0", "veth1", "docker0"))
    assert interfaces(found) == ["eth0"]
    assert interfaces(simulated.after(5, networks=networks("veth1", "docker0"))) == []


def test_classes_are_looked_up_again_on_the_slow_beat(simulated, tmp_path):
    """A name that another device has taken is told as what it stands for now."""
    keep(tmp_path, "class/net", eth0="pci0", eth1="pci1")
    both = networks("eth0", "eth1")
    assert interfaces(simulated.after(0, slow=True, networks=both)) == ["eth0", "eth1"]
    keep(tmp_path, "class/net", eth1="virtual/net")
    assert interfaces(simulated.after(5)) == ["eth0", "eth1"]
    assert interfaces(simulated.after(5, slow=True)) == ["eth0"]


def test_where_there_is_no_disk_volumes_are_told(simulated, tmp_path):
    """On a machine with nothing but mapped disks these are told, memory is not."""
    keep(tmp_path, "block", **{"dm-0": "virtual/block", "zram0": "virtual/block"})
    stats = simulated.after(0, disks=disks("dm-0", "dm-0p1", "zram0"))
    assert [one.device for one in stats.disks] == ["dm-0"]


def test_names_of_devices_are_labels(simulated):
    """Names that are no text are told as text, and two that look alike then as one."""
    swaps = [PagingStats("/swap\udcff", 1, 1), PagingStats(None, 1, 1)]
    names = networks("wan\udcff", "wan\udcfe", "lan")
    stats = simulated.after(0, slow=True, networks=names, swaps=swaps)
    assert interfaces(stats) == ["lan", "wan\ufffd"]
    assert [one.device for one in stats.paging] == [None, "/swap\ufffd"]
