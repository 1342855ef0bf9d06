"""Host figures are those that the kernel gives, and absent where it gives none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from periscope_otel.gauges import cgroup
from periscope_otel.gauges.host import Choice, HostReader, _DeviceClasses
from periscope_otel.gauges.observe import HOST
from periscope_otel.gauges.stats import DiskStats

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
    assert stats.paging == (int(rows["Swap:"][1]), int(rows["Swap:"][2]))


@linux
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
def test_disks_are_whole_and_real(host):
    """Disks are the whole real ones, with the kernel's own counts in bytes."""
    disks = {one.device: one for one in host.read(slow=False).disks}
    real = {
        one.name
        for one in Path("/sys/block").iterdir()
        if "/devices/virtual/" not in str(one.resolve())
    }
    assert set(disks) <= real
    for name, disk in disks.items():
        fields = Path("/sys/block", name, "stat").read_text().split()
        reads, read_sectors, writes, written_sectors = (int(fields[one]) for one in (0, 2, 4, 6))
        assert 0 <= reads - disk.reads < 10_000
        assert 0 <= writes - disk.writes < 10_000
        assert 0 <= read_sectors * 512 - disk.read_bytes < 256 * MIB
        assert 0 <= written_sectors * 512 - disk.written_bytes < 256 * MIB


@linux
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


def test_the_root_filesystem_is_told_with_its_sizes(host):
    """The root filesystem is told, its states add up to its size, and `df` says the same."""
    root = next(one for one in host.read(slow=True).filesystems if one.mountpoint == "/")
    told = os.statvfs("/")
    assert root.used + root.free + root.reserved == told.f_blocks * told.f_frsize
    assert root.free == pytest.approx(shutil.disk_usage("/").free, abs=256 * MIB)
    assert root.used == pytest.approx(shutil.disk_usage("/").used, abs=256 * MIB)
    assert root.mode in ("rw", "ro")


@linux
def test_uptime_load_and_cpus_are_the_kernels(host):
    """Uptime, load averages and the number of CPUs are those of the kernel."""
    stats = host.read(slow=False)
    assert stats.uptime == pytest.approx(float(Path("/proc/uptime").read_text().split()[0]), abs=2)
    assert stats.load == pytest.approx(os.getloadavg(), abs=1.0)
    cpus = re.findall(r"^cpu\d+", Path("/proc/stat").read_text(), re.MULTILINE)
    assert stats.cpu_count == len(cpus)


# --- shares of time ------------------------------------------------------------------------------


def test_utilization_is_absent_until_it_is_measured(host):
    """After one reading there is no utilisation, of the host or of the process: not even 0."""
    first = host.read(slow=True)
    assert first.cpu.utilization is None
    assert first.process.cpu_utilization is None
    time.sleep(0.05)  # the kernel counts in hundredths of a second
    second = host.read(slow=False)
    assert sum(second.cpu.utilization.values()) == pytest.approx(1.0)
    assert set(second.process.cpu_utilization) == {"user", "system"}


def cpu_times(**seconds: float) -> SimpleNamespace:
    return SimpleNamespace(**{"user": 0.0, "system": 0.0, "idle": 0.0, "iowait": 0.0, **seconds})


def test_shares_are_exact_and_between_0_and_1(host):
    """Shares are of the time between two readings, and what goes back counts as nothing."""
    host.read(slow=False)
    host._cpus.clear()
    host._cpu(None, cpu_times(user=10, idle=100, iowait=5))
    second = host._cpu(None, cpu_times(user=13, idle=107, iowait=4.5))
    assert second.utilization == {"user": 0.3, "system": 0.0, "idle": 0.7, "iowait": 0.0}
    assert second.times["iowait"] == 5
    third = host._cpu(None, cpu_times(user=13, idle=107, iowait=5))
    assert third.utilization == second.utilization  # no time has passed


def test_a_busy_process_is_seen_in_the_host(host):
    """A loop that keeps one of n CPUs busy is at least 1/n of the host's time that is not idle."""
    cpus = os.cpu_count() or 1
    subprocess.run([sys.executable, "-c", BURN.format(0.2)], check=True)
    host.read(slow=False)
    burning = subprocess.Popen([sys.executable, "-c", BURN.format(1.5)])
    time.sleep(0.3)
    host.read(slow=False)
    time.sleep(1.0)
    use = host.read(slow=False).cpu.utilization
    burning.wait()
    busy = use["user"] + use["nice"] + use["system"]
    # Other programs may use more, and a hypervisor may take some of it away.
    assert busy >= 0.8 / cpus - use.get("steal", 0.0)
    assert busy <= 1.0


@linux
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


def test_a_quota_makes_fewer_cpus_available(monkeypatch):
    """Within a quota of half a CPU a process that uses it up is at 1, not at a fraction."""
    monkeypatch.setattr(cgroup, "limits", lambda: cgroup.ContainerLimits(None, 0.5))
    clock = Clock()
    host = HostReader(clock=clock)
    host.read(slow=True)
    clock.now += 10.0
    user, system = host._process_before[1].values()
    use = host._process_utilization({"user": user + 2.5, "system": system})
    assert use == pytest.approx({"user": 0.5, "system": 0.0})
    clock.now += 10.0
    assert host._process_utilization({"user": 1e6, "system": 1e6})["user"] == 1.0


def test_each_cpu_is_opt_in():
    """CPUs are told one by one only where that was asked for, and then all of them."""
    assert HostReader().read(slow=False).cpus == ()
    told = HostReader(per_cpu=True).read(slow=False).cpus
    assert [one.number for one in told] == list(range(psutil.cpu_count()))
    assert all(one.times["user"] >= 0 for one in told)


# --- this process --------------------------------------------------------------------------------


def status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: rest.strip() for name, _, rest in (line.partition(":") for line in lines)}


@linux
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
    block = bytearray(32 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    after = host.read(slow=False).process.paging_faults
    assert after["minor"] > before["minor"]
    assert after["major"] >= before["major"]


def test_uptime_of_the_process_does_not_follow_the_wall_clock(monkeypatch):
    """The process's uptime goes on by the monotonic clock, also where the wall clock is set."""
    clock = Clock()
    host = HostReader(clock=clock)
    first = host.read(slow=False).process.uptime
    assert first == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    clock.now += 60.0
    assert host.read(slow=False).process.uptime == pytest.approx(first + 60.0)


def test_what_the_platform_does_not_tell_is_absent(host, monkeypatch):
    """Where a figure cannot be had, as in some containers, it is None and the others are there."""
    host.read(slow=False)

    def refuse(*_: Any, **__: Any) -> Any:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "io_counters", refuse)
    monkeypatch.setattr(psutil.Process, "num_fds", refuse)
    for function in ("disk_io_counters", "net_io_counters", "disk_partitions", "swap_memory"):
        monkeypatch.setattr(psutil, function, refuse)
    monkeypatch.setattr(os, "getloadavg", refuse)
    stats = host.read(slow=True)
    assert (stats.process.disk_io, stats.process.file_descriptors, stats.load) == (None, None, None)
    assert (stats.disks, stats.networks, stats.filesystems, stats.paging) == ((), (), (), None)
    assert stats.process.memory > 0
    provider = [list(figure.observe(stats)) for figure in HOST]
    assert sum(map(len, provider)) > 20


FORK = """
import os, time
from periscope_otel.gauges.host import HostReader
host = HostReader()
end = time.process_time() + 0.3
while time.process_time() < end: pass
parent = host.read(slow=True).process
pid = os.fork()
told = host.read(slow=False).process
if pid == 0:
    assert told.pid == os.getpid() != parent.pid
    assert sum(told.cpu_times.values()) < 0.2 < sum(parent.cpu_times.values())
    assert told.uptime < parent.uptime
    assert told.cpu_utilization is None
    os._exit(7)
assert told.cpu_utilization is not None
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
"""


def test_after_a_fork_the_figures_are_the_childs():
    """A child's figures are its own: pid, times and uptime, and no share of its parent's."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


# --- bounds --------------------------------------------------------------------------------------


def disk(name: str, size: int) -> DiskStats:
    return DiskStats(name, size, 0, 0, 0)


def chosen(choice: Choice[DiskStats], **sizes: int) -> list[str]:
    found = [disk(name, size) for name, size in sizes.items()]
    return [one.device for one in choice.of(found, lambda one: one.read_bytes)]


def test_only_so_many_devices_are_told():
    """The busiest devices are told, and the same ones from reading to reading while they last."""
    choice = Choice[DiskStats](most=2)
    assert chosen(choice, a=1, b=3, c=2) == ["b", "c"]
    assert chosen(choice, a=9, b=3, c=2) == ["b", "c"]
    assert chosen(choice, a=9, b=3) == ["a", "b"]
    assert chosen(choice, c=9, d=8, e=7) == ["c", "d"]


def test_a_host_with_many_devices_is_bounded(host, monkeypatch):
    """With hundreds of disks and interfaces no more than 16 of each are told."""
    host.read(slow=False)
    io = SimpleNamespace(read_bytes=1, write_bytes=1, read_count=1, write_count=1)
    net = SimpleNamespace(
        bytes_recv=1, bytes_sent=1, errin=0, errout=0, dropin=0, dropout=0
    )  # fmt: skip
    monkeypatch.setattr(psutil, "disk_io_counters", lambda **_: {f"sd{n}": io for n in range(300)})
    monkeypatch.setattr(psutil, "net_io_counters", lambda **_: {f"eth{n}": net for n in range(300)})
    monkeypatch.setattr(_DeviceClasses, "is_disk", lambda *_: True)
    monkeypatch.setattr(_DeviceClasses, "is_real_interface", lambda *_: True)
    stats = host.read(slow=True)
    assert (len(stats.disks), len(stats.networks)) == (16, 16)


def test_virtual_devices_are_left_out(tmp_path):
    """Loop devices, partitions and bridges are not told; adapters and whole disks are."""
    for kind, name, where in (
        ("block", "sda", "pci0000:00/sda"),
        ("block", "loop0", "virtual/block/loop0"),
        ("block", "cciss!c0d0", "pci0000:00/cciss!c0d0"),
        ("class/net", "eth0", "pci0000:00/eth0"),
        ("class/net", "docker0", "virtual/net/docker0"),
    ):
        device = tmp_path / "devices" / where
        device.mkdir(parents=True)
        folder = tmp_path / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(device)
    classes = _DeviceClasses(tmp_path)
    disks = ("sda", "sda1", "loop0", "cciss/c0d0")
    assert [classes.is_disk(one) for one in disks] == [True, False, False, True]
    assert [classes.is_real_interface(one) for one in ("eth0", "docker0")] == [True, False]
    assert [classes.is_loopback(one) for one in ("lo", "lo0", "lowpan")] == [True, True, False]


def test_in_a_container_virtual_interfaces_are_all_there_is(host, monkeypatch):
    """Where no interface is a real one, all but loopback are told."""
    monkeypatch.setattr(_DeviceClasses, "is_real_interface", lambda *_: False)
    net = SimpleNamespace(bytes_recv=1, bytes_sent=1, errin=0, errout=0, dropin=0, dropout=0)
    monkeypatch.setattr(psutil, "net_io_counters", lambda **_: {"lo": net, "eth0": net})
    assert [one.interface for one in host.read(slow=False).networks] == ["eth0"]


def mount(device: str, point: str, kind: str = "ext4", opts: str = "rw") -> SimpleNamespace:
    return SimpleNamespace(device=device, mountpoint=point, fstype=kind, opts=opts)


def test_files_that_a_container_mounts_are_no_filesystems(host, monkeypatch, tmp_path):
    """Single mounted files are not told, a device once, and the root though it is virtual."""
    hosts = tmp_path / "hosts"
    hosts.touch()
    real = [mount("/dev/sda1", str(hosts)), mount("/dev/sdb1", str(tmp_path), opts="ro,nosuid")]
    real += [mount("/dev/sdb1", f"{tmp_path}/longer")]
    virtual = [mount("overlay", "/", "overlay"), mount("proc", "/proc", "proc")]
    monkeypatch.setattr(
        psutil,
        "disk_partitions",
        lambda all: [*real, *virtual] if all else real,  # noqa: A006
    )
    told = {one.device: one for one in host.read(slow=True).filesystems}
    assert set(told) == {"/dev/sdb1", "overlay"}
    assert told["/dev/sdb1"].mountpoint == str(tmp_path)
    assert told["/dev/sdb1"].mode == "ro"
    assert told["overlay"].type == "overlay"


# --- control groups ------------------------------------------------------------------------------


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text + "\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc/self of a process in the group /a/b, and the control groups' filesystem."""
    made = tmp_path / "proc"
    made.mkdir()
    root = str(tmp_path / "cgroup fs").replace(" ", "\\040")
    (made / "cgroup").write_text("1:name=systemd:/x\n0::/a/b\n")
    (made / "mountinfo").write_text(
        "24 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"30 24 0:26 / {root} rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
    )
    return made


def test_the_tightest_limit_on_the_way_up_counts(proc, tmp_path):
    """A group is limited by those above it too; `max` is no limit."""
    root = tmp_path / "cgroup fs"
    group(root)
    group(root / "a", memory_max="1073741824", cpu_max="150000 100000")
    group(root / "a/b", memory_max="max", cpu_max="200000 100000")
    assert cgroup.limits(proc) == (1073741824, 1.5)
    group(root / "a/b", memory_max="1048576", cpu_max="max 100000")
    assert cgroup.limits(proc) == (1048576, 1.5)


def test_no_limits_are_absent(proc, tmp_path):
    """Without limits, files, control groups or a /proc there are none: not zero, no error."""
    assert cgroup.limits(proc) == (None, None)
    group(tmp_path / "cgroup fs/a/b", memory_max="max", cpu_max="max 100000")
    assert cgroup.limits(proc) == (None, None)
    group(tmp_path / "cgroup fs/a/b", memory_max="", cpu_max="nonsense")
    assert cgroup.limits(proc) == (None, None)
    (proc / "cgroup").write_text("2:memory:/a\n")
    assert cgroup.limits(proc) == (None, None)
    (proc / "cgroup").write_text("nonsense\n")
    assert cgroup.limits(proc) == (None, None)
    assert cgroup.limits(tmp_path / "nowhere") == (None, None)


def test_limits_of_a_container_with_a_namespace_of_its_own(proc, tmp_path):
    """In a container the process's group is the root that it sees, and its files are there."""
    (proc / "cgroup").write_text("0::/\n")
    group(tmp_path / "cgroup fs", memory_max="268435456", cpu_max="50000 100000")
    assert cgroup.limits(proc) == (268435456, 0.5)


def test_limits_of_a_part_of_the_groups_that_is_mounted(proc, tmp_path):
    """Where only a part of the groups is mounted, the process's place in it is found."""
    text = (proc / "mountinfo").read_text().replace("0:26 / ", "0:26 /a ")
    (proc / "mountinfo").write_text(text)
    group(tmp_path / "cgroup fs/b", memory_max="1000")
    assert cgroup.limits(proc) == (1000, None)


@pytest.mark.hardware
@linux
def test_limits_of_a_real_group():
    """In a control group made here the limits are those that it was given."""
    root = Path("/sys/fs/cgroup")
    controllers = root / "cgroup.controllers"
    if not controllers.exists() or not {"cpu", "memory"} <= set(controllers.read_text().split()):
        pytest.skip("no control groups of version 2 with cpu and memory here")
    folder = root / f"periscope-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.max").write_text(str(512 * MIB))
        (folder / "cpu.max").write_text("50000 100000")
    except OSError as error:
        if folder.exists():
            folder.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    program = (
        f"open({str(folder / 'cgroup.procs')!r}, 'w').write('0')\n"
        "from periscope_otel.gauges import cgroup\n"
        "print(*cgroup.limits())"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert done.stdout.split() == [str(512 * MIB), "0.5"], done.stderr
    finally:
        folder.rmdir()
