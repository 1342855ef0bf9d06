"""Which devices are told, how many, by which labels, and that their counters never go back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from periscope_otel.gauges.choice import MOST_AT_ONCE, MOST_EVER, PATIENCE, Choice
from periscope_otel.gauges.counters import Counters
from periscope_otel.gauges.devices import DeviceClasses
from periscope_otel.gauges.labels import LONGEST, label
from periscope_otel.gauges.shares import LEAST_SPAN, Shares

if TYPE_CHECKING:
    from pathlib import Path

# --- classes -------------------------------------------------------------------------------------


def keep(sys: Path, kind: str, name: str, where: str) -> None:
    """Have the kernel list a device."""
    device = sys / "devices" / where
    device.mkdir(parents=True)
    (sys / kind).mkdir(parents=True, exist_ok=True)
    (sys / kind / name).symlink_to(device)


@pytest.mark.parametrize(
    ("name", "where", "told"),
    [
        ("sda", "pci0000:00/sda", True),
        ("cciss!c0d0", "pci0000:00/cciss!c0d0", True),
        ("nvme0n1", "virtual/nvme-subsystem/nvme-subsys0/nvme0n1", True),
        ("loop0", "virtual/block/loop0", False),
        ("ram0", "virtual/block/ram0", False),
        ("zram0", "virtual/block/zram0", False),
        ("dm-0", "virtual/block/dm-0", False),
        ("md127", "virtual/block/md127", False),
        ("zd0", "virtual/block/zd0", False),
        ("nbd0", "virtual/block/nbd0", False),
    ],
)
def test_disks_are_those_that_are_not_made_of_others(tmp_path, name, where, told):
    """A disk counts once: by itself, and not again as what is built upon it."""
    keep(tmp_path, "block", name, where)
    assert DeviceClasses(str(tmp_path)).is_disk(name.replace("!", "/")) is told


def test_partitions_and_hidden_paths_are_no_disks(tmp_path):
    """What the kernel does not list as a disk is none, nor is one of several paths to one."""
    keep(tmp_path, "block", "nvme0c0n1", "pci0000:00/nvme0/nvme0c0n1")
    (tmp_path / "block/nvme0c0n1/hidden").write_text("1\n")
    keep(tmp_path, "block", "nvme1n1", "pci0000:00/nvme1/nvme1n1")
    (tmp_path / "block/nvme1n1/hidden").write_text("0\n")
    classes = DeviceClasses(str(tmp_path))
    found = [classes.is_disk(one) for one in ("nvme0c0n1", "nvme1n1", "nvme1n1p1")]
    assert found == [False, True, False]


def test_anything_but_memory_may_stand_for_a_disk(tmp_path):
    """Where there is no other disk a volume is one; a loop, which is a file, is not."""
    for name in ("dm-0", "loop0", "zram0", "ram1"):
        keep(tmp_path, "block", name, f"virtual/block/{name}")
    classes = DeviceClasses(str(tmp_path))
    names = ("dm-0", "loop0", "zram0", "ram1", "dm-0p1")
    assert [classes.may_be_disk(one) for one in names] == [True, False, False, False, False]


def test_adapters_are_real(tmp_path):
    """Bridges and pairs of containers are no adapters; what the kernel does not list is none."""
    keep(tmp_path, "class/net", "eth0", "pci0000:00/net/eth0")
    keep(tmp_path, "class/net", "docker0", "virtual/net/docker0")
    classes = DeviceClasses(str(tmp_path))
    assert [classes.is_adapter(one) for one in ("eth0", "docker0", "eth1")] == [True, False, False]
    assert [classes.leads_away(one) for one in ("lo", "lo0", "lowpan")] == [False, False, True]


def test_a_platform_that_lists_nothing_has_only_real_devices(tmp_path):
    """Without /sys every device is taken for a real one, memory and loopback excepted."""
    classes = DeviceClasses(str(tmp_path))
    assert [classes.is_disk(one) for one in ("disk0", "loop0")] == [True, False]
    assert [classes.is_adapter(one) for one in ("en0", "lo0")] == [True, False]


def test_a_name_may_come_to_stand_for_another_device(tmp_path):
    """What a name stands for is looked up once, and again when it is asked for."""
    keep(tmp_path, "class/net", "eth0", "pci0000:00/net/eth0")
    classes = DeviceClasses(str(tmp_path))
    assert classes.is_adapter("eth0")
    (tmp_path / "class/net/eth0").unlink()
    keep(tmp_path, "class/net", "eth0", "virtual/net/eth0")
    assert classes.is_adapter("eth0")
    classes.look_again()
    assert not classes.is_adapter("eth0")


def test_names_of_short_lived_devices_are_forgotten(tmp_path):
    """However many names there are between two looks, a bounded number is remembered."""
    classes = DeviceClasses(str(tmp_path))
    for number in range(3000):
        classes.is_adapter(f"veth{number}")
    assert len(classes._adapters) <= 1024


# --- how many ------------------------------------------------------------------------------------


def sizes(*names: str, size: int = 1) -> dict[str, int]:
    return dict.fromkeys(names, size)


def choice(**more: bool) -> Choice[int]:
    return Choice("disks", lambda size: size, **more)


MANY = sizes(*(f"sd{number:03}" for number in range(MOST_AT_ONCE)), size=1000)


def test_only_so_many_are_told_and_they_stay():
    """The largest are told, and the same ones from reading to reading while they last."""
    chosen = choice()
    first = chosen.of({**MANY, "a": 1, "z": 5000}, slow=True)
    assert len(first) == MOST_AT_ONCE
    assert "z" in first
    assert "a" not in first
    assert chosen.of({**MANY, "a": 9999, "z": 5000}, slow=False) == first
    gone = {**MANY, "a": 9999}
    assert "a" in chosen.of(gone, slow=False)


def test_one_that_does_nothing_gives_way():
    """After twelve slow beats without a change a device gives way to one that does something."""
    chosen, busy = choice(), 0
    chosen.of(MANY, slow=True)
    for beat in range(PATIENCE):
        assert "new" not in chosen.of({**MANY, "new": busy}, slow=True), beat
        busy += 1
    told = chosen.of({**MANY, "new": busy}, slow=True)
    assert "new" in told
    assert len(told) == MOST_AT_ONCE


def test_one_that_does_something_does_not_give_way():
    """However busy others are, those told stay as long as they do something themselves."""
    chosen = choice()
    first = chosen.of({**MANY, "new": 0}, slow=True)
    for beat in range(3 * PATIENCE):
        found = {name: size + beat for name, size in MANY.items()}
        assert chosen.of({**found, "new": beat * 1000}, slow=True) == first


def test_where_size_is_no_work_nothing_gives_way():
    """Filesystems are told by their size, which seldom changes."""
    chosen = choice(gives_way=False)
    first = chosen.of(MANY, slow=True)
    for beat in range(3 * PATIENCE):
        assert chosen.of({**MANY, "new": beat}, slow=True) == first


def test_names_are_bounded_for_life(caplog):
    """Of devices that come and go two hundred are ever told; each limit is said once."""
    chosen = choice()
    told: set[str] = set()
    for number in range(0, 3 * MOST_EVER, 20):
        found = sizes(*(f"veth{one}" for one in range(number, number + 20)))
        told.update(chosen.of(found, slow=True))
    assert len(told) == MOST_EVER
    assert chosen.of(sizes("veth0", "new"), slow=True) == ["veth0"]
    assert [f"of which {MOST_AT_ONCE} are told" in one for one in caplog.messages] == [True, False]
    assert f"{MOST_EVER} have been told" in caplog.messages[1]


# --- counters ------------------------------------------------------------------------------------


def test_a_counter_that_begins_anew_goes_on():
    """A device that is made anew counts on from what was told of it, also after it was gone."""
    counters = Counters()
    assert counters.of("eth0", (4_000_000_000, 7)) == [4_000_000_000, 7]
    assert counters.of("eth0", (5_000, 7)) == [4_000_005_000, 7]
    assert counters.of("eth0", (6_000, 8)) == [4_000_006_000, 8]
    assert counters.of("eth1", (1, 1)) == [1, 1]
    assert counters.of("eth0", (10, 9)) == [4_000_006_010, 9]


def test_a_counter_that_goes_back_a_little_stands_still():
    """What goes back by less than half goes on from where it was, without a second time."""
    counters = Counters()
    told = [counters.of("sda", (count,))[0] for count in (100, 90, 95, 100, 110)]
    assert told == [100, 100, 105, 110, 120]


def test_a_time_that_goes_back_for_a_while_is_told_as_it_was():
    """Within the slack a counter is told as it was until it has caught up: nothing adds up."""
    counters = Counters(slack=1.0)
    told = [counters.of(None, (time,))[0] for time in (5.0, 4.5, 4.9, 5.1, 5.0, 5.2)]
    assert told == [5.0, 5.0, 5.0, 5.1, 5.1, 5.2]
    assert counters.of(None, (2.0,)) == [7.2]


def test_what_is_not_counted_stays_so():
    """None is told as None, and what is counted later begins then."""
    counters = Counters()
    told = [counters.of("en0", (count,))[0] for count in (None, 5, None, 3, 4)]
    assert told == [None, 5, None, 5, 6]


# --- shares --------------------------------------------------------------------------------------


def test_shares_are_of_what_was_counted():
    """A mode that goes back was spent nothing on, and the others share all of the time."""
    shares = Shares()
    assert shares.of(0.0, {"user": 10.0, "idle": 100.0, "iowait": 5.0}) is None
    told = shares.of(1.0, {"user": 13.0, "idle": 107.0, "iowait": 4.5})
    assert told == {"user": 0.3, "idle": 0.7, "iowait": 0.0}
    # From 4.5, and not from the 5 that the counter is told as.
    told = shares.of(2.0, {"user": 13.0, "idle": 107.0, "iowait": 5.0})
    assert told == {"user": 0.0, "idle": 0.0, "iowait": 1.0}


def test_a_mode_that_goes_far_back_spoils_one_share_only():
    """After idle has fallen by hours, the next share is right again."""
    shares = Shares()
    shares.of(0.0, {"user": 100.0, "idle": 50_000.0})
    assert shares.of(5.0, {"user": 100.5, "idle": 40_000.0}) == {"user": 1.0, "idle": 0.0}
    assert shares.of(10.0, {"user": 101.5, "idle": 40_004.0}) == {"user": 0.2, "idle": 0.8}


def test_a_short_time_is_no_measure():
    """Until half a second has passed the earlier share stands, and that time counts to the next."""
    shares = Shares()
    shares.of(0.0, {"user": 0.0, "idle": 0.0})
    assert shares.of(LEAST_SPAN - 0.01, {"user": 0.4, "idle": 0.0}) is None
    first = shares.of(1.0, {"user": 0.5, "idle": 0.5})
    assert first == {"user": 0.5, "idle": 0.5}
    assert shares.of(1.2, {"user": 0.7, "idle": 0.5}) is first
    assert shares.of(2.0, {"user": 0.7, "idle": 1.3}) == pytest.approx({"user": 0.2, "idle": 0.8})


def test_where_no_time_was_counted_the_share_stands():
    """Counters that stand still for a while do not make the share go away."""
    shares = Shares()
    shares.of(0.0, {"user": 0.0, "idle": 0.0})
    first = shares.of(1.0, {"user": 0.5, "idle": 0.5})
    assert shares.of(2.0, {"user": 0.5, "idle": 0.5}) is first


def test_shares_of_cpus_add_up_to_one_at_most():
    """Time on more CPUs than there were is scaled down together: no mode is cut by itself."""
    shares = Shares()
    shares.of(0.0, {"user": 0.0, "system": 0.0}, 0.5)
    assert shares.of(10.0, {"user": 2.5, "system": 0.0}, 0.5) == {"user": 0.5, "system": 0.0}
    assert shares.of(20.0, {"user": 6.5, "system": 4.0}, 0.5) == {"user": 0.5, "system": 0.5}
    assert shares.of(30.0, {"user": 15.5, "system": 5.0}, 0.5) == {"user": 0.9, "system": 0.1}


def test_a_share_cannot_be_changed():
    """Whoever is told a share cannot change it for others."""
    shares = Shares()
    shares.of(0.0, {"user": 0.0})
    told = shares.of(1.0, {"user": 1.0})
    with pytest.raises(TypeError):
        told["user"] = 2.0


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("eth0", "eth0"),
        ("/mnt/two  blanks", "/mnt/two  blanks"),
        ("/mnt/Übung", "/mnt/Übung"),
        ("/mnt/usb\udcff", "/mnt/usb\ufffd"),
        ("/mnt/\x1b[31mred\n", "/mnt/\ufffd[31mred\ufffd"),
        ("/" + "x" * 300, "/" + "x" * (LONGEST - 2) + "…"),
    ],
    ids=["plain", "blanks", "UTF-8", "no UTF-8", "control characters", "long"],
)
def test_labels_can_be_told(name, told):
    """A label is one line of valid text and of bounded length."""
    assert label(name) == told
    assert len(label(name).encode()) <= 3 * LONGEST
