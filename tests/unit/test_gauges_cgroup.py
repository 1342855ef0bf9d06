"""Limits of the process's control groups, of both versions, are the tightest there are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from periscope_otel.gauges import cgroup

linux = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")

MIB = 2**20


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        file = name if "." in name else name.replace("_", ".")
        (folder / file).write_text(text + "\n")


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


def test_the_mount_that_shows_most_of_the_way_counts(proc, tmp_path):
    """Of several mounts the one counts in which the group lies, the nearest and then the last."""
    root, near, other = tmp_path / "cgroup fs", tmp_path / "near", tmp_path / "other"
    group(root / "a/b", memory_max="500")
    group(other, memory_max="7")
    group(near / "b", memory_max="300")
    mount = "31 24 0:26 {} {} rw - cgroup2 cgroup2 rw\n"
    text = (proc / "mountinfo").read_text()
    (proc / "mountinfo").write_text(mount.format("/other.slice", other) + text)
    assert cgroup.limits(proc) == (500, None)
    (proc / "mountinfo").write_text(mount.format("/a", near) + text)
    assert cgroup.limits(proc) == (300, None)
    (proc / "mountinfo").write_text(text + mount.format("/", other))
    assert cgroup.limits(proc) == (7, None)


@pytest.mark.parametrize("path", ["/elsewhere", "/../x", "/ab"])
def test_a_group_that_is_nowhere_mounted_has_no_limits(proc, tmp_path, path):
    """Limits of other groups are not taken for those of one that cannot be seen."""
    text = (proc / "mountinfo").read_text().replace("0:26 / ", "0:26 /a ")
    (proc / "mountinfo").write_text(text)
    group(tmp_path / "cgroup fs", memory_max="1000", cpu_max="50000 100000")
    (proc / "cgroup").write_text(f"0::{path}\n")
    assert cgroup.limits(proc) == (None, None)


def test_paths_need_not_be_utf_8(proc, tmp_path):
    """Mounts and groups of any name are read, whoever has mounted what."""
    (proc / "cgroup").write_bytes(b"0::/a\xff\n")
    old = (proc / "mountinfo").read_bytes()
    (proc / "mountinfo").write_bytes(b"25 1 8:2 / /mnt/\xfe rw - ext4 /dev/sdb1 rw\n" + old)
    group(Path(os.fsdecode(os.fsencode(tmp_path / "cgroup fs") + b"/a\xff")), memory_max="1000")
    assert cgroup.limits(proc) == (1000, None)


def version_1(proc: Path, tmp_path: Path, path: str, root: str) -> tuple[Path, Path]:
    """Mount controllers of version 1 beside an empty version 2; return memory's and cpu's."""
    memory, cpu = tmp_path / "memory", tmp_path / "cpu,cpuacct"
    (proc / "cgroup").write_text(f"5:memory:{path}\n4:cpu,cpuacct:{path}\n1:name=systemd:/\n0::/\n")
    (proc / "mountinfo").write_text(
        f"40 24 0:30 {root} {memory} ro - cgroup cgroup rw,memory\n"
        f"41 24 0:31 {root} {cpu} ro - cgroup cgroup rw,cpu,cpuacct\n"
        f"42 24 0:32 / {tmp_path}/unified rw - cgroup2 cgroup2 rw\n"
    )
    return memory, cpu


@pytest.mark.parametrize(("root", "below"), [("/docker/x", ""), ("/", "docker/x")])
def test_limits_of_version_1(proc, tmp_path, root, below):
    """Each controller of version 1 has its own mount and its own files."""
    memory, cpu = version_1(proc, tmp_path, "/docker/x", root)
    group(memory / below, **{"memory.limit_in_bytes": "268435456"})
    group(cpu / below, **{"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"})
    assert cgroup.limits(proc) == (268435456, 0.5)


def test_no_limits_of_version_1_are_absent(proc, tmp_path):
    """Version 1 says without limit by a huge number of bytes, and by a quota of -1."""
    memory, cpu = version_1(proc, tmp_path, "/", "/")
    group(memory, **{"memory.limit_in_bytes": "9223372036854771712"})
    group(cpu, **{"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"})
    assert cgroup.limits(proc) == (None, None)
    group(memory, **{"memory.limit_in_bytes": "nonsense"})
    group(cpu, **{"cpu.cfs_quota_us": "1", "cpu.cfs_period_us": "0"})
    assert cgroup.limits(proc) == (None, None)


FILES = {
    2: ({"": {"memory.max": str(512 * MIB), "cpu.max": "50000 100000"}}),
    1: {
        "memory": {"memory.limit_in_bytes": str(512 * MIB)},
        "cpu": {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"},
    },
}


@pytest.mark.hardware
@linux
@pytest.mark.parametrize("version", FILES)
def test_limits_of_a_real_group(version):
    """In control groups made here the limits are those that they were given."""
    made: list[Path] = []
    try:
        for controller, files in FILES[version].items():
            made.append(Path("/sys/fs/cgroup", controller, f"periscope-test-{os.getpid()}"))
            made[-1].mkdir()
            for name, text in files.items():
                # Never made here: what is no control group stays as it was.
                with (made[-1] / name).open("r+") as file:
                    file.write(text)
        joined = "".join(f"open({str(one / 'cgroup.procs')!r}, 'w').write('0')\n" for one in made)
        program = f"{joined}from periscope_otel.gauges import cgroup\nprint(*cgroup.limits())"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert done.stdout.split() == [str(512 * MIB), "0.5"], done.stderr
    except OSError as error:
        pytest.skip(f"no control groups of version {version} can be made here: {error}")
    finally:
        for one in made:
            if one.exists():
                one.rmdir()
