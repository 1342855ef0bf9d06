"""What the kernel writes under /proc is read right, whatever stands in it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from quiet_moment import in_a_quiet_moment

from periscope_otel.gauges.host import HostReader
from periscope_otel.gauges.portable import PortableSource
from periscope_otel.gauges.procfs import ProcfsSource, plain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., ProcfsSource]:
    """Write files of a /proc, and return what reads it."""

    def write(files: dict[str, str | bytes], since_boot: float = 1000.0) -> ProcfsSource:
        for name, content in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ProcfsSource(str(tmp_path), lambda: since_boot)

    return write


def everything(_name: str) -> bool:
    return True


# --- the host ------------------------------------------------------------------------------------


def row(name: str, *ticks: int) -> str:
    return f"{name} {' '.join(str(one * TICKS) for one in ticks)} 0 0\n"


def test_cpus_are_told_by_their_own_numbers(write):
    """A CPU that is switched off has no row, and the others are not taken for it."""
    stat = row("cpu ", 9, 8, 7, 6, 5, 4, 3, 2) + row("cpu0", *range(8)) + row("cpu3", *range(8))
    source = write({"stat": f"{stat}intr 1 2 3\nbtime 1700000000\n"})
    together = {
        "user": 9.0,
        "nice": 8.0,
        "system": 7.0,
        "idle": 6.0,
        "iowait": 5.0,
        "interrupt": 7.0,
        "steal": 2.0,
    }
    assert source.cpu_times(each=False) == (together, {})
    told = source.cpu_times(each=True)
    assert told.together == together
    assert list(told.each) == [0, 3]
    assert told.each[3]["idle"] == 3.0


@pytest.mark.parametrize("text", ["", "cpu", "cpux 1 2", "cpu a b c d e f g h", "cpu0 1 2 3\n"])
@pytest.mark.parametrize("each", [False, True])
def test_cpu_times_that_are_none_are_an_error(write, text, each):
    """Something else than times is an error, and no figure."""
    with pytest.raises((ValueError, IndexError)):
        write({"stat": text}).cpu_times(each)


MEMINFO = {
    "MemTotal": 1000,
    "MemFree": 300,
    "MemAvailable": 600,
    "Buffers": 10,
    "Cached": 200,
    "SwapCached": 7,
    "SReclaimable": 50,
}


def meminfo(**changed: int | None) -> dict[str, str | bytes]:
    lines = {**MEMINFO, **changed}
    return {
        "meminfo": "".join(
            f"{name + ':':16}{kib:8} kB\n" for name, kib in lines.items() if kib is not None
        )
    }


def test_memory_is_by_name_and_not_by_place(write):
    """Memory is what the lines are called, wherever they stand."""
    expected = tuple(1024 * one for one in (1000, 400, 300, 600, 10, 250))
    assert write(meminfo()).memory() == expected
    turned = "\n".join(reversed(str(meminfo()["meminfo"]).splitlines()))
    assert write({"meminfo": turned}).memory() == expected


def test_lines_that_are_missing_are_absent(write):
    """A kernel, or a container, without buffers has none: not 0."""
    told = write(meminfo(Buffers=None, Cached=None, SReclaimable=None)).memory()
    assert (told.buffers, told.cached) == (None, None)
    assert write(meminfo(SReclaimable=None)).memory().cached == 200 * 1024
    with pytest.raises(ValueError, match="MemAvailable"):
        write(meminfo(MemAvailable=None)).memory()


def test_more_available_than_there_is_cannot_be(write):
    """Where a container shows the host's memory as available, its own free memory is it."""
    told = write(meminfo(MemAvailable=5000)).memory()
    assert (told.available, told.used) == (300 * 1024, 700 * 1024)


def test_each_device_of_swap_space_is_told(write):
    """Files and devices of swap space are told one by one, blanks in their names included."""
    source = write(
        {
            "swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
            "/dev/dm-1                               partition\t1000\t\t24\t\t-2\n"
            "/var/swap\\040file\\040(deleted)        file\t\t500\t\t0\t\t-3\n"
        }
    )
    assert source.swaps() == [
        ("/dev/dm-1", 24 * 1024, 976 * 1024),
        ("/var/swap file (deleted)", 0, 500 * 1024),
    ]
    assert write({"swaps": "Filename Type Size Used Priority\n"}).swaps() == []


def test_disks_are_those_that_are_wanted(write):
    """Sectors are 512 bytes each; partitions of old kernels have no such row."""
    source = write(
        {
            "diskstats": b"   8  0 sda 100 1 20 3 200 4 40 5 0 7 8\n"
            b"   8  1 sda1 1 2 3 4\n"
            b" 259  0 nvme0n1 5 0 6 0 7 0 8 0 0 0 0 0 0 0 0 0 0\n"
            b"   8 16 sd\xff 1 0 1 0 1 0 1 0 0 0 0\n"
        }
    )
    assert source.disks({"sda", "sda1"}.__contains__) == [("sda", 20 * 512, 40 * 512, 100, 200)]
    assert [one.device for one in source.disks(everything)] == ["sda", "nvme0n1", "sd\udcff"]


def test_files_that_come_in_pieces_are_read_to_their_end(write):
    """The kernel gives long tables in pieces: none of their rows is lost."""
    rows = "".join(f"   8 {n} sd{n:05} {n} 0 1 0 2 0 3 0 0 0 0\n" for n in range(5000))
    told = write({"diskstats": rows}).disks(everything)
    assert [one.reads for one in told] == list(range(5000))


def test_interfaces_are_those_that_are_wanted(write):
    """A wide number stands next to the colon; names need not be UTF-8."""
    head = b"Inter-|   Receive    |  Transmit\n face |bytes  packets|bytes  packets\n"
    source = write(
        {
            "net/dev": head + b"    lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n"
            b"  eth0:7562636661 298562 1 2 0 0 0 0 25392296 193232 3 4 0 0 0 0\n"
            b" wan\xff: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n"
        }
    )
    assert source.networks({"eth0"}.__contains__) == [("eth0", 7562636661, 25392296, 1, 3, 2, 4)]
    names = [one.interface for one in source.networks(everything)]
    assert names == ["lo", "eth0", "wan\udcff"]


def test_uptime_counts_sleep(write):
    """The system's uptime is by the clock that goes on while it sleeps."""
    assert write({}, since_boot=77.0).uptime() == 77.0
    told = ProcfsSource().uptime()
    assert 0 <= time.clock_gettime(time.CLOCK_BOOTTIME) - told < 60


# --- this process --------------------------------------------------------------------------------


def test_the_name_of_a_program_may_be_anything(write):
    """Blanks and parentheses in the program's name do not move what comes after it."""
    fields = [*range(3, 53)]
    fields[20 - 3], fields[22 - 3], fields[23 - 3], fields[24 - 3] = 7, 600 * TICKS, 4096, 11
    text = " ".join(["S", *(str(one) for one in fields[1:])])
    told = write({"self/stat": f"1 (a) b (c) {text}\n"}).process_size()
    assert told == (11 * PAGE, 4096, 7, 400.0)


def test_a_process_is_not_older_than_the_system(write):
    """Where the clocks disagree the uptime is 0, and never negative."""
    text = " ".join(["S", *(["0"] * 18), str(2000 * TICKS), "1", "1", "1"])
    assert write({"self/stat": f"1 (x) {text}\n"}).process_size().uptime == 0.0


def test_io_is_by_name(write):
    """Bytes that were read and written are those of disks, by their names."""
    text = "rchar: 1\nwchar: 2\nsyscr: 3\nread_bytes: 40\nwrite_bytes: 50\n"
    assert write({"self/io": text}).process_io() == {"read": 40, "write": 50}
    with pytest.raises(KeyError):
        write({"self/io": "rchar: 1\n"}).process_io()


@in_a_quiet_moment
def test_descriptors_are_counted():
    """Descriptors that are opened are counted, exactly."""
    source = ProcfsSource()
    before = source.file_descriptors()
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    counted = source.file_descriptors()
    for one in opened:
        os.close(one)
    assert counted == before + 5
    assert source.file_descriptors() == before


def test_descriptors_are_counted_on_older_kernels(monkeypatch):
    """Where the folder has no size it is listed, less the descriptor that lists it."""
    source = ProcfsSource()
    real = os.stat

    def without_size(path: Any, **more: Any) -> Any:
        told = list(real(path, **more))
        told[6] = 0
        return os.stat_result(told)

    monkeypatch.setattr(os, "stat", without_size)

    @in_a_quiet_moment
    def agrees() -> None:
        assert source.file_descriptors() == pytest.approx(psutil.Process().num_fds(), abs=1)
        assert source.file_descriptors() == len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208

    agrees()


@in_a_quiet_moment
def test_a_reading_keeps_no_descriptor_open():
    """Nothing stays open between two readings, which a fork would share or somebody close."""
    host = HostReader()
    host.read(slow=True)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    host.read(slow=True)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.fixture
def in_a_thread() -> Callable[[Callable[[], Any]], Any]:
    def run(work: Callable[[], Any]) -> Any:
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(work()))
        thread.start()
        thread.join()
        return answers[0]

    return run


def test_the_cpus_of_all_threads_are_available(in_a_thread):
    """A thread that is bound to one CPU, such as the one that reads, does not bind the others."""
    everywhere = os.sched_getaffinity(0)
    one = {min(everywhere)}
    source = ProcfsSource()

    def bound() -> int:
        os.sched_setaffinity(0, one)
        return source.available_cpus()

    assert in_a_thread(bound) == len(everywhere)
    free, done = threading.Event(), threading.Event()

    def unbound() -> None:
        free.set()
        assert done.wait(60)

    other = threading.Thread(target=unbound)
    other.start()
    assert free.wait(60)
    os.sched_setaffinity(0, one)  # the main thread's, if this is it
    try:
        assert source.available_cpus() == len(everywhere)
    finally:
        os.sched_setaffinity(0, everywhere)
        done.set()
        other.join()


def test_a_process_that_is_bound_has_as_many_cpus():
    """Where all threads are bound to one CPU there is one."""
    code = (
        "import os\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from periscope_otel.gauges.procfs import ProcfsSource\n"
        "print(ProcfsSource().available_cpus())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("field", "path"),
    [(b"/a\\040b", "/a b"), (b"/a\\134040", "/a\\040"), (b"/\xff", "/\udcff"), (b"/a", "/a")],
)
def test_paths_are_as_they_are(field, path):
    """Blanks and backslashes, which the kernel writes as octal numbers, are themselves again."""
    assert plain(field) == path


# --- against psutil ------------------------------------------------------------------------------


def agree(ours: Any, theirs: Any, **tolerance: float) -> None:
    for name, value in tolerance.items():
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=value), name


@in_a_quiet_moment
def test_both_sources_say_the_same():
    """What is read under /proc is what psutil says, within what happens in between."""
    ours, theirs = ProcfsSource(), PortableSource()
    assert ours.cpu_count() == theirs.cpu_count()
    assert ours.cpu_times(each=False).together == pytest.approx(
        dict(theirs.cpu_times(each=False).together), abs=5.0
    )
    mib = 2.0**20
    agree(
        ours.memory(),
        theirs.memory(),
        **dict.fromkeys(("total", "used", "free", "available", "buffers", "cached"), 256 * mib),
    )
    assert [one.device for one in ours.disks(everything)] == [
        one.device for one in theirs.disks(everything)
    ]
    assert {one.interface for one in ours.networks(everything)} == {
        one.interface for one in theirs.networks(everything)
    }
    assert sum(one.used + one.free for one in ours.swaps()) == sum(
        one.used + one.free for one in theirs.swaps()
    )
    assert ours.uptime() == pytest.approx(theirs.uptime(), abs=5.0)
    agree(
        ours.process_size(),
        theirs.process_size(),
        memory=16 * mib,
        virtual_memory=64 * mib,
        threads=0,
        uptime=5.0,
    )
    used, seen = ours.process_usage(), theirs.process_usage()
    assert used.cpu_times == pytest.approx(dict(seen.cpu_times), abs=1.0)
    assert set(used.context_switches) == set(seen.context_switches)
    assert used.paging_faults == pytest.approx(dict(seen.paging_faults or {}), abs=1000)
    assert ours.process_io() == pytest.approx(dict(theirs.process_io()), abs=16 * mib)
    assert ours.file_descriptors() == theirs.file_descriptors()
    assert ours.load() == pytest.approx(theirs.load(), abs=1.0)
    assert theirs.available_cpus() == os.cpu_count()


@pytest.mark.hardware
def test_a_proc_that_shows_processes_alone_costs_the_hosts_figures_only():
    """Where /proc is mounted with subset=pid the process's figures are told all the same."""
    program = (
        "from periscope_otel.gauges.host import HostReader\n"
        "from periscope_otel.gauges.filesystems import FilesystemReader\n"
        "host = HostReader(); host.read(True); stats = host.read(False)\n"
        "print(stats.cpu, stats.memory, FilesystemReader().read(True))\n"
        "print(stats.process.memory > 0, stats.process.threads, stats.uptime > 0)\n"
    )
    command = ["unshare", "--mount", "--pid", "--fork", "sh", "-c"]
    command += ['mount -t proc -o subset=pid proc /proc && exec "$0" -W error -c "$1"']
    done = subprocess.run(
        [*command, sys.executable, program], capture_output=True, text=True, check=False
    )
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"/proc cannot be mounted here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["None None ()", "True 1 True"]
