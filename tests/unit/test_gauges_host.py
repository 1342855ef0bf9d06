"""Host figures are those that the kernel gives, and absent where it gives none."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from quiet_moment import in_a_quiet_moment

from periscope_otel.gauges.host import HostReader

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

BURN = "import time\nend = time.monotonic() + {}\nwhile time.monotonic() < end: pass"
MIB = 2**20


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def host() -> HostReader:
    return HostReader()


def meminfo() -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines)
    }


# --- the host ------------------------------------------------------------------------------------


@linux
@in_a_quiet_moment
def test_memory_is_that_of_proc(host):
    """Memory is what /proc/meminfo says, used being what is not available."""
    before, memory, after = meminfo(), host.read(slow=False).memory, meminfo()
    assert memory.total == before["MemTotal"]
    tolerance = 64 * MIB  # others allocate in between
    for value, name in (
        (memory.free, "MemFree"),
        (memory.available, "MemAvailable"),
        (memory.buffers, "Buffers"),
    ):
        low, high = sorted((before[name], after[name]))
        assert low - tolerance <= value <= high + tolerance, name
    assert memory.used == memory.total - memory.available


@linux
@pytest.mark.skipif(shutil.which("free") is None, reason="there is no `free` here")
@in_a_quiet_moment
def test_memory_and_swap_are_those_of_free(host):
    """Memory and swap agree with `free`, within what others allocate meanwhile."""
    stats = host.read(slow=True)
    env = {**os.environ, "LC_ALL": "C"}
    said = subprocess.run(["free", "-b"], capture_output=True, text=True, check=True, env=env)
    rows = {line.split()[0]: line.split()[1:] for line in said.stdout.splitlines()[1:]}
    memory = [int(one) for one in rows["Mem:"]]
    assert stats.memory.total == memory[0]
    assert stats.memory.free == pytest.approx(memory[2], abs=64 * MIB)
    assert stats.memory.buffers + stats.memory.cached == pytest.approx(memory[4], abs=64 * MIB)
    assert stats.memory.available == pytest.approx(memory[5], abs=64 * MIB)
    assert sum(one.used for one in stats.paging) == int(rows["Swap:"][1])
    assert sum(one.free for one in stats.paging) == int(rows["Swap:"][2])


@linux
@in_a_quiet_moment
def test_cpu_times_are_those_of_proc(host):
    """CPU times are those of /proc/stat, softirq and irq together as interrupt."""
    times = host.read(slow=False).cpu.times
    fields = [int(one) for one in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, idle, iowait, irq, softirq, steal = (one / tick for one in fields)
    expected = {
        "user": user,
        "nice": nice,
        "system": system,
        "idle": idle,
        "iowait": iowait,
        "interrupt": irq + softirq,
        "steal": steal,
    }
    assert times == pytest.approx(expected, abs=1.0)


@linux
@in_a_quiet_moment
def test_disks_are_whole_and_real(host):
    """Disks are the whole real ones, with the kernel's own counts in bytes."""
    disks = {one.device: one for one in host.read(slow=False).disks}
    assert set(disks) <= {one.name for one in Path("/sys/block").iterdir()}
    assert not [one for one in disks if one.startswith(("loop", "ram", "zram"))]
    for name, disk in disks.items():
        fields = Path("/sys/block", name, "stat").read_text().split()
        reads, read_sectors, writes, written_sectors = (int(fields[one]) for one in (0, 2, 4, 6))
        assert 0 <= reads - disk.reads < 10_000
        assert 0 <= writes - disk.writes < 10_000
        assert 0 <= read_sectors * 512 - disk.read_bytes < 256 * MIB
        assert 0 <= written_sectors * 512 - disk.written_bytes < 256 * MIB


@linux
@in_a_quiet_moment
def test_networks_are_those_of_proc(host):
    """Interfaces are the real ones (in a container: all but loopback), with the kernel's counts."""
    networks = host.read(slow=False).networks
    rows = {}
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        name, _, rest = line.partition(":")
        rows[name.strip()] = [int(one) for one in rest.split()]
    for one in networks:
        assert one.interface != "lo"
        row = rows[one.interface]
        assert 0 <= row[0] - one.received_bytes < 64 * MIB
        assert 0 <= row[8] - one.transmitted_bytes < 64 * MIB
        assert (one.receive_errors, one.receive_dropped) == (row[2], row[3])
        assert (one.transmit_errors, one.transmit_dropped) == (row[10], row[11])


@linux
@in_a_quiet_moment
def test_uptime_load_and_cpus_are_the_kernels(host):
    """Uptime, load averages and the number of CPUs are those of the kernel."""
    stats = host.read(slow=False)
    assert stats.uptime == pytest.approx(float(Path("/proc/uptime").read_text().split()[0]), abs=2)
    assert stats.load == pytest.approx(os.getloadavg(), abs=1.0)
    cpus = re.findall(r"^cpu\d+", Path("/proc/stat").read_text(), re.MULTILINE)
    assert stats.cpu_count == len(cpus)


# --- shares of time ------------------------------------------------------------------------------


@linux
@in_a_quiet_moment
def test_a_busy_process_is_seen_in_the_host(host):
    """A loop on one of n CPUs is 1/n of the host's time, with what else is busy."""
    cpus = os.cpu_count() or 1
    burning = subprocess.Popen([sys.executable, "-c", BURN.format(60)])
    try:
        process = psutil.Process(burning.pid)
        host.read(slow=False)
        before = ticks()
        begun = sum(process.cpu_times()[:2])
        while sum(process.cpu_times()[:2]) < begun + 1.0:
            time.sleep(0.02)
        use = host.read(slow=False).cpu.utilization
        spent = [after - one for one, after in zip(before, ticks(), strict=True)]
    finally:
        burning.kill()
        burning.wait()
    idle = use["idle"] + use.get("iowait", 0.0)
    # Others may keep it from its CPU, and then their time is busy as well.
    assert 0.8 / cpus <= 1.0 - idle
    assert idle == pytest.approx(sum(spent[3:5]) / sum(spent), abs=0.06)


def ticks() -> list[int]:
    """Return the kernel's own counts of all CPUs: user, nice, system, idle, iowait and so on."""
    first, _, _ = Path("/proc/stat").read_text(encoding="ascii").partition("\n")
    return [int(one) for one in first.split()[1:9]]


@linux
@in_a_quiet_moment
def test_a_busy_loop_in_the_process_is_its_utilization():
    """A loop in this process is the share of its CPUs that the kernel counted."""
    available = len(os.sched_getaffinity(0))
    host = HostReader()
    host.read(slow=True)
    cpu, wall = time.process_time(), time.monotonic()
    while time.monotonic() < wall + 0.5:
        pass
    use = host.read(slow=False).process.cpu_utilization
    expected = (time.process_time() - cpu) / (time.monotonic() - wall) / available
    assert use["user"] + use["system"] == pytest.approx(expected, abs=0.05)
    assert 0.0 < use["user"] <= 1.0


def test_each_cpu_is_opt_in():
    """CPUs are told one by one only where that was asked for, and then all of them."""
    assert HostReader().read(slow=False).cpus == ()
    told = HostReader(per_cpu=True).read(slow=False).cpus
    rows = re.findall(r"^cpu(\d+)", Path("/proc/stat").read_text(), re.MULTILINE)
    assert [one.number for one in told] == [int(one) for one in rows]
    assert all(one.times["user"] >= 0 for one in told)


def test_a_snapshot_cannot_be_changed(host):
    """Whoever changes what was told changes nobody else's figures."""
    stats = host.read(slow=True)
    process = stats.process
    for told in (
        stats.cpu.times,
        process.cpu_times,
        process.context_switches,
        process.paging_faults,
        process.disk_io,
    ):
        with pytest.raises(TypeError):
            told["user"] = 0


# --- this process --------------------------------------------------------------------------------


def status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: rest.strip() for name, _, rest in (line.partition(":") for line in lines)}


@linux
@in_a_quiet_moment
def test_the_process_is_that_of_proc(host):
    """Memory, threads, descriptors, times and I/O of the process are those of /proc/self."""
    process, said = host.read(slow=False).process, status()
    assert process.pid == os.getpid()
    assert process.memory == pytest.approx(int(said["VmRSS"].split()[0]) * 1024, abs=8 * MIB)
    assert process.virtual_memory == pytest.approx(
        int(said["VmSize"].split()[0]) * 1024, abs=64 * MIB
    )
    assert process.threads == int(said["Threads"])
    assert process.file_descriptors == pytest.approx(
        len(list(Path("/proc/self/fd").iterdir())), abs=2
    )
    told = os.times()
    assert process.cpu_times == pytest.approx({"user": told.user, "system": told.system}, abs=0.1)
    counted = dict(
        line.split(": ") for line in Path("/proc/self/io").read_text().splitlines() if line
    )
    assert 0 <= int(counted["read_bytes"]) - process.disk_io["read"] < 64 * MIB
    assert 0 <= int(counted["write_bytes"]) - process.disk_io["write"] < 64 * MIB


def test_switches_of_all_threads_are_counted(host):
    """Context switches are those of every thread, not of the first alone."""
    before = host.read(slow=False).process.context_switches["voluntary"]
    ready = threading.Barrier(2)
    others = [threading.Thread(target=lambda: [ready.wait() for _ in range(200)]) for _ in "ab"]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert host.read(slow=False).process.context_switches["voluntary"] >= before + 100


def test_faults_grow_with_memory(host):
    """Pages that are touched for the first time are minor faults."""
    before = host.read(slow=False).process.paging_faults
    # A map of its own: the allocator may have such a block left over, touched long ago.
    with mmap.mmap(-1, 32 * MIB) as block:
        block[::4096] = b"x" * len(block[::4096])
        after = host.read(slow=False).process.paging_faults
    assert after["minor"] > before["minor"]
    assert after["major"] >= before["major"]


@linux
def test_uptime_of_the_process_is_precise(host):
    """The process's uptime is that since its start, to a hundredth of a second and more."""
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    code = (
        "import time\n"
        "from periscope_otel.gauges.host import HostReader\n"
        "told = HostReader().read(slow=False).process.uptime\n"
        "print(time.clock_gettime(time.CLOCK_BOOTTIME) - told)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ended = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert began - 0.02 <= float(done.stdout) <= ended


@linux
def test_uptime_of_the_process_does_not_follow_the_wall_clock(host, monkeypatch):
    """The process's uptime goes on by the kernel's clock, also where the wall clock is set."""
    first = host.read(slow=False).process.uptime
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert HostReader().read(slow=False).process.uptime >= first


FORK = """
import os, time
from periscope_otel.gauges.host import HostReader
now = [time.monotonic()]
host = HostReader(clock=lambda: now[0])
end = time.process_time() + 0.3
while time.process_time() < end: pass
parent = host.read(slow=True).process
forked_at = time.monotonic()
pid = os.fork()
now[0] += 1.0
told = host.read(slow=False).process
if pid == 0:
    began_at = time.monotonic() - told.uptime  # not when it was first run
    assert told.pid == os.getpid() != parent.pid
    assert sum(told.cpu_times.values()) < 0.2 < sum(parent.cpu_times.values())
    assert began_at >= forked_at - 0.02  # the kernel counts in hundredths
    assert told.cpu_utilization is None
    os._exit(7)
assert told.cpu_utilization is not None
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
"""


def test_after_a_fork_the_figures_are_the_childs():
    """A child's figures are its own: pid, times and uptime, and no share of its parent's."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)
