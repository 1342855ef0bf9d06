"""Filesystems are told with their sizes, and one that does not answer costs the others nothing."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from quiet_moment import in_a_quiet_moment

from periscope_otel.gauges import filesystems as module
from periscope_otel.gauges.filesystems import MOST_HUNG, FilesystemReader
from periscope_otel.gauges.observe import FILESYSTEM

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20
PATIENCE = 60.0
"""Seconds in which even a thread that is seldom run has asked: nothing is to be left out."""


def mount(device: str, point: object, kind: str = "ext4", opts: str = "rw") -> SimpleNamespace:
    return SimpleNamespace(device=device, mountpoint=str(point), fstype=kind, opts=opts)


def reader(*disks: SimpleNamespace, others: tuple[SimpleNamespace, ...] = ()) -> FilesystemReader:
    """Return a reader of a machine on which these are mounted."""
    return FilesystemReader(
        lambda every: [*disks, *(others if every else ())], answer_wait=PATIENCE
    )


def points(told: tuple[Any, ...]) -> list[str]:
    return sorted(one.mountpoint for one in told)


@in_a_quiet_moment
def test_the_root_filesystem_is_told_with_its_sizes():
    """The root filesystem is told, its states add up to its size, and `df` says the same."""
    told = FilesystemReader(answer_wait=PATIENCE).read(slow=True)
    root = next(one for one in told if one.mountpoint == "/")
    size = os.statvfs("/")
    assert root.used + root.free + root.reserved == size.f_blocks * size.f_frsize
    assert root.free == pytest.approx(shutil.disk_usage("/").free, abs=256 * MIB)
    assert root.used == pytest.approx(shutil.disk_usage("/").used, abs=256 * MIB)
    assert root.mode in ("rw", "ro")


def test_files_that_a_container_mounts_are_no_filesystems(tmp_path):
    """Single mounted files are not told, a device once, and the root though it is virtual."""
    hosts = tmp_path / "hosts"
    hosts.touch()
    told = reader(
        mount("/dev/sda1", hosts),
        mount("/dev/sdb1", tmp_path, opts="ro,nosuid"),
        mount("/dev/sdb1", f"{tmp_path}/longer"),
        others=(mount("overlay", "/", "overlay"), mount("proc", "/proc", "proc")),
    ).read(slow=True)
    by_device = {one.device: one for one in told}
    assert set(by_device) == {"/dev/sdb1", "overlay"}
    assert by_device["/dev/sdb1"].mountpoint == str(tmp_path)
    assert by_device["/dev/sdb1"].mode == "ro"
    assert by_device["overlay"].type == "overlay"


def test_a_mounted_file_does_not_hide_the_volume_of_its_device(tmp_path):
    """A file with a shorter path, such as /etc/hosts, does not stand for a device with a folder."""
    (tmp_path / "f").touch()
    (tmp_path / "data/of/it").mkdir(parents=True)
    told = reader(
        mount("/dev/sda1", tmp_path / "f"), mount("/dev/sda1", tmp_path / "data/of/it")
    ).read(slow=True)
    assert f"{tmp_path}/data/of/it" in points(told)


@pytest.mark.parametrize("kind", ["squashfs", "iso9660", "erofs", "cramfs", "romfs"])
def test_images_are_left_out(tmp_path, kind):
    """What is made full and stays so is no figure."""
    told = reader(mount("/dev/loop3", tmp_path, kind), mount("/dev/sda1", "/")).read(slow=True)
    assert points(told) == ["/"]


@pytest.mark.parametrize(
    ("kind", "told"),
    [("vfat", "fat32"), ("ntfs3", "ntfs"), ("ntfs", "ntfs"), ("ext4", "ext4"), ("xfs", "xfs")],
)
def test_types_are_called_as_the_conventions_do(kind, told):
    """Types for which the conventions have a name are called by it."""
    assert reader(mount("/dev/sda1", "/", kind)).read(slow=True)[0].type == told


@pytest.mark.parametrize(
    ("blocks", "bfree", "bavail", "states"),
    [
        (100, 40, 30, (60, 30, 10)),
        (100, 10, 20, (90, 10, 0)),
        (100, 120, 120, (0, 100, 0)),
        (100, 40, -5, (60, 0, 40)),
    ],
)
def test_states_are_never_negative(monkeypatch, blocks, bfree, bavail, states):
    """Whatever a filesystem says, its states add up to its size and none is below 0."""
    said = SimpleNamespace(f_blocks=blocks, f_bfree=bfree, f_bavail=bavail, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: said)
    (told,) = reader(mount("/dev/sda1", "/")).read(slow=True)
    assert (told.used, told.free, told.reserved) == tuple(4096 * one for one in states)
    shares = [one.value for one in FILESYSTEM[1].observe([told])]
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) >= 0


@pytest.mark.parametrize("call", ["stat", "statvfs"])
@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), ValueError("null byte"), KeyError("x")]
)
def test_one_that_fails_costs_no_other(monkeypatch, tmp_path, call, error):
    """A filesystem that cannot be read is absent, and the others are told."""
    real = getattr(os, call)

    def ask(point: Any, **more: Any) -> Any:
        if point == str(tmp_path):
            raise error
        return real(point, **more)

    monkeypatch.setattr(os, call, ask)
    told = reader(mount("/dev/sda1", "/"), mount("/dev/sdb1", tmp_path)).read(slow=True)
    assert points(told) == ["/"]


def test_names_are_labels_and_the_path_is_as_it_is(tmp_path):
    """A mount point that is no UTF-8 is asked by its own bytes, and told as text."""
    point = os.fsdecode(os.fsencode(tmp_path) + b"/usb\xff")
    Path(point).mkdir()
    (told,) = reader(mount("/dev/sd\udcfe", point), mount("/dev/sda1", "/nowhere")).read(slow=True)
    assert (told.device, told.mountpoint) == ("/dev/sd\ufffd", f"{tmp_path}/usb\ufffd")


def test_the_largest_are_told(monkeypatch):
    """Of many filesystems no more than 16 are told, the largest, and the same ones each time."""
    said = SimpleNamespace(f_bfree=1, f_bavail=1, f_frsize=1)
    monkeypatch.setattr(os, "stat", lambda *_, **__: os.lstat("/"))
    monkeypatch.setattr(
        os, "statvfs", lambda point: SimpleNamespace(f_blocks=int(point[2:]), **vars(said))
    )
    host = reader(*(mount(f"/dev/sd{number}", f"/m{number}") for number in range(1, 41)))
    first = host.read(slow=True)
    assert points(first) == sorted(f"/m{number}" for number in range(25, 41))
    assert host.read(slow=True) == first


def test_they_are_asked_on_the_slow_beat_alone():
    """In between the figures are those of the last slow beat."""
    asked = []

    def mounts(every: bool) -> list[Any]:
        asked.append(every)
        return [mount("/dev/sda1", "/")]

    host = FilesystemReader(mounts, answer_wait=PATIENCE)
    first = host.read(slow=False)
    assert host.read(slow=False) is first
    assert len(asked) == 1
    host.read(slow=True)
    assert len(asked) == 2


def test_where_there_is_no_list_of_them_there_is_one_line(caplog):
    """A /proc that hides the list costs the filesystems, and a line once."""

    def refuse(_every: bool) -> Any:
        raise FileNotFoundError(2, "No such file or directory", "/proc/filesystems")

    host = FilesystemReader(refuse)
    assert [host.read(slow=True) for _ in range(3)] == [()] * 3
    assert len(caplog.messages) == 1
    assert "filesystems: cannot be read" in caplog.messages[0]


# --- one that hangs ------------------------------------------------------------------------------


class Stuck:
    """A filesystem whose server is gone: whoever asks waits until it is back."""

    def __init__(self) -> None:
        self.points: set[str] = set()
        self.back = threading.Event()
        self.asked = 0
        self.waiting: set[threading.Thread] = set()
        self._statvfs = os.statvfs

    def statvfs(self, point: Any) -> Any:
        if point in self.points and not self.back.is_set():
            self.asked += 1
            self.waiting.add(threading.current_thread())
            assert self.back.wait(60)
        return self._statvfs(point)


def looks() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name == "periscope-statvfs"}


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    """Have filesystems hang, and no other one be taken for one that does: it is waited for."""
    before = looks()
    made = Stuck()

    class Look(module._Look):
        by: threading.Thread | None = None

        def is_through(self, answer_wait: float) -> bool:
            self._is_done = Answers(lambda: self.by in made.waiting)
            return super().is_through(answer_wait)

        def _run(self) -> None:
            self.by = threading.current_thread()
            super()._run()

    monkeypatch.setattr(os, "statvfs", made.statvfs)
    monkeypatch.setattr(module, "_Look", Look)
    yield made
    made.back.set()
    wait_until(lambda: looks() <= before)


class Answers(threading.Event):
    """Waits, however long that takes, for all answers or for the question that hangs."""

    def __init__(self, hangs: Any) -> None:
        super().__init__()
        self._hangs = hangs

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout == PATIENCE
        wait_until(lambda: self.is_set() or self._hangs())
        return self.is_set()


def wait_until(condition: Any) -> None:
    pause = threading.Event()
    for _ in range(6000):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it did not come to be")


def test_one_that_does_not_answer_costs_no_other(stuck, tmp_path, caplog):
    """It is left out, one line says so, and it is not asked again until it answers."""
    nas = tmp_path / "a" / "b"
    nas.mkdir(parents=True)
    stuck.points = {str(nas)}
    last = tmp_path / "a" / "b" / "longer"
    last.mkdir()
    host = reader(mount("/dev/sda1", "/"), mount("nas:/x", nas), mount("/dev/sdb1", last))
    assert points(host.read(slow=True)) == sorted(["/", str(last)])
    assert points(host.read(slow=True)) == sorted(["/", str(last)])
    assert stuck.asked == 1
    assert len(caplog.messages) == 1
    assert f"{nas} does not answer" in caplog.messages[0]
    look = host._hung[str(nas)]
    stuck.back.set()
    wait_until(lambda: look.asks is None)
    assert points(host.read(slow=True)) == sorted(["/", str(nas), str(last)])


def test_one_that_is_gone_is_forgotten(stuck, tmp_path):
    """A filesystem that was unmounted while it did not answer is asked when it is mounted anew."""
    stuck.points = {str(tmp_path)}
    mounted = [mount("/dev/sda1", "/"), mount("nas:/x", tmp_path)]
    host = FilesystemReader(lambda _every: mounted, answer_wait=PATIENCE)
    host.read(slow=True)
    gone = mounted.pop()
    host.read(slow=True)
    assert host._hung == {}
    stuck.points = set()
    mounted.append(gone)
    assert points(host.read(slow=True)) == sorted(["/", str(tmp_path)])


def test_threads_that_wait_are_bounded(stuck, tmp_path, caplog):
    """With very many that do not answer no further one is asked, and none is told."""
    folders = [tmp_path / f"nas{number}" for number in range(MOST_HUNG + 5)]
    for folder in folders:
        folder.mkdir()
    stuck.points = {str(one) for one in folders}
    host = reader(mount("/dev/sda1", "/"), *(mount(f"nas:{one}", one) for one in folders))
    assert [host.read(slow=True) for _ in range(3)] == [()] * 3
    assert stuck.asked == MOST_HUNG
    assert len([line for line in caplog.messages if "none is told" in line]) == 1


def test_where_no_thread_can_be_started_the_last_figures_stand(monkeypatch):
    """At the end of the interpreter, or of what a user may have, nothing new is read: no error."""

    def refuse(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    host = reader(mount("/dev/sda1", "/"))
    told = host.read(slow=True)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert host.read(slow=True) is told
    assert reader(mount("/dev/sda1", "/")).read(slow=True) == ()


def test_a_child_of_a_fork_asks_for_itself(stuck, tmp_path):
    """In a child no thread waits: what did not answer its parent is asked once more."""
    stuck.points = {str(tmp_path)}
    host = reader(mount("/dev/sda1", "/"), mount("nas:/x", tmp_path))
    host.read(slow=True)
    host.after_fork()  # as the hook does
    assert points(host.read(slow=False)) == ["/"]
    assert stuck.asked == 2


def test_while_even_the_list_hangs_there_are_none():
    """A sampler whose reader does not come back tells no filesystem."""
    assert FilesystemReader().left_behind() == ()


def test_psutil_tells_what_is_mounted():
    """By default what psutil calls the partitions is what there is."""
    told = FilesystemReader()._mounted()
    listed = {one.mountpoint for one in psutil.disk_partitions(all=True)}
    assert {one.mountpoint for one in told} <= listed
    assert "/" in {one.mountpoint for one in told}
    assert module.ANSWER_WAIT == 1.0
