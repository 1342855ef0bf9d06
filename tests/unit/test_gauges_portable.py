"""Where there is no /proc psutil is asked, and what it only makes up is absent."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from quiet_moment import in_a_quiet_moment

from periscope_otel.gauges import portable as module
from periscope_otel.gauges.host import HostReader
from periscope_otel.gauges.observe import HOST
from periscope_otel.gauges.portable import PortableSource


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


def everything(_name: str) -> bool:
    return True


@pytest.fixture
def on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the platform be macOS as far as our own code asks."""
    monkeypatch.setattr(module, "_LINUX", False)
    monkeypatch.setattr(sys, "platform", "darwin")


def test_all_figures_are_there():
    """A reader that asks psutil alone tells every figure of this platform."""
    stats = HostReader(sources=[PortableSource()]).read(slow=True)
    assert stats.cpu is not None
    assert stats.memory is not None
    assert stats.uptime is not None
    assert stats.process.memory is not None
    assert stats.process.pid == os.getpid()
    assert stats.process.cpu_times is not None
    assert sum(len(list(one.observe(stats))) for one in HOST) > 20


@pytest.mark.usefixtures("on_macos")
def test_what_macos_does_not_count_is_absent(monkeypatch):
    """Packets dropped in sending and buffers, which psutil tells as 0 or not at all, are absent."""
    nic = SimpleNamespace(
        bytes_recv=1, bytes_sent=2, errin=3, errout=4, dropin=5, dropout=0, packets_sent=1
    )
    monkeypatch.setattr(psutil, "net_io_counters", lambda **_: {"en0": nic})
    (told,) = PortableSource().networks(everything)
    assert (told.receive_dropped, told.transmit_dropped) == (5, None)
    memory = SimpleNamespace(total=100, available=60, free=30, active=1, wired=2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    stats = HostReader(sources=[PortableSource()]).read(slow=True)
    assert stats.memory == (100, 40, 30, 60, None, None)
    dropped = next(one for one in HOST if one.metric.name == "system.network.packet.dropped")
    assert [one.attributes["network.io.direction"] for one in dropped.observe(stats)] == ["receive"]


@pytest.mark.usefixtures("on_macos")
def test_cpus_are_told_by_their_places(monkeypatch):
    """Where psutil has nothing but an order, a CPU's number is its place."""

    def times(percpu: bool = False) -> Any:
        one = SimpleNamespace(user=1.0, nice=0.0, system=2.0, idle=3.0)
        return [one, one] if percpu else one

    monkeypatch.setattr(psutil, "cpu_times", times)
    told = PortableSource().cpu_times(each=True)
    assert list(told.each) == [0, 1]
    assert told.together == {"user": 1.0, "nice": 0.0, "system": 2.0, "idle": 3.0}


def test_uptimes_do_not_follow_the_wall_clock(monkeypatch):
    """Uptimes go on by the monotonic clock, also where the wall clock is set."""
    clock = Clock()

    @in_a_quiet_moment
    def made() -> PortableSource:
        clock.now = time.monotonic()
        source = PortableSource(clock)
        host, process = source.uptime(), source.process_size().uptime
        assert host == pytest.approx(time.time() - psutil.boot_time(), abs=2.0)
        assert process == pytest.approx(time.time() - psutil.Process().create_time(), abs=2.0)
        return source

    source = made()
    host, process = source.uptime(), source.process_size().uptime
    monkeypatch.setattr(time, "time", lambda: 0.0)
    clock.now += 60.0
    assert source.uptime() == pytest.approx(host + 60.0)
    assert source.process_size().uptime == pytest.approx(process + 60.0)


def test_the_process_is_the_one_that_asks(monkeypatch):
    """In the child of a fork what psutil knew of the parent is not told."""
    source = PortableSource()
    source.process_size()
    parent = os.getppid()
    monkeypatch.setattr(os, "getpid", lambda: parent)
    assert source._this_process()[0].pid == parent


def test_no_swap_space_is_no_figure(monkeypatch):
    """A machine without swap space has no series of it: not one of 0."""
    swap = SimpleNamespace(total=0, used=0, free=0)
    monkeypatch.setattr(psutil, "swap_memory", lambda: swap)
    assert PortableSource().swaps() == []
    swap.total, swap.used, swap.free = 10, 4, 6
    assert PortableSource().swaps() == [(None, 4, 6)]


def test_a_platform_without_these_calls_has_no_such_figures(monkeypatch, caplog):
    """Calls that psutil or Python lack on a platform are figures that are absent, and no line."""
    for owner, name in (
        (os, "getloadavg"),
        (psutil.Process, "num_fds"),
        (psutil.Process, "io_counters"),
    ):
        monkeypatch.delattr(owner, name)
    monkeypatch.setattr(psutil, "cpu_count", lambda: None)
    stats = HostReader(sources=[PortableSource()]).read(slow=True)
    assert (stats.load, stats.process.file_descriptors, stats.process.disk_io) == (None,) * 3
    assert stats.cpu_count is None
    assert stats.memory is not None
    assert caplog.messages == []
