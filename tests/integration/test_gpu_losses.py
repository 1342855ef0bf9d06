"""GPUs and drivers that are refused, lost and found, through the real pynvml and a stub of NVML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from nvml import FIRST, PARTS, SECOND, Reader, compile_stub, reader
from processes import running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INVALID_ARGUMENT, NO_PERMISSION, GPU_IS_LOST, RESET_REQUIRED, UNKNOWN = 2, 4, 15, 16, 999
DRIVER_CODES = [1, 9, 18, UNKNOWN]
LOST = [GPU_IS_LOST, RESET_REQUIRED]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_stub(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def gpus(library: Path) -> Iterator[Reader]:
    with reader(library) as running:
        yield running


def states(read: dict[str, Any]) -> dict[str, str | None]:
    return {id_: one["state"] for id_, one in read["devices"].items()}


def reason(read: dict[str, Any]) -> str | None:
    return None if read["problem"] is None else read["problem"]["reason"]


def starts(read: dict[str, Any]) -> list[str]:
    """Return what each log line is about."""
    return [line.split(":")[0] for line in read["logs"]]


# The driver.

OPENING = [
    (4, "no_permission"),
    (9, "driver_not_loaded"),
    (13, "function_not_found"),
    (15, "gpu_is_lost"),
    (16, "reset_required"),
    (18, "lib_rm_version_mismatch"),
    (UNKNOWN, "nvml_999"),
]


@pytest.mark.parametrize(("code", "why"), OPENING)
def test_a_driver_that_does_not_open(gpus, code, why):
    """A driver that does not open is told in one line; figures are absent until it does."""
    gpus.stub("answer", "nvmlInitWithFlags", -1, code)
    first = gpus.read(slow=True)
    assert first["devices"] == {}
    assert reason(first) == why
    assert first["problem"]["remedy"]
    assert starts(first) == ["WARNING no GPU figures"]
    assert why in first["logs"][0]
    for _ in range(20):
        gpus.wait(5)
        again = gpus.read()
        assert again["devices"] == {}
        assert again["logs"] == []
    # At once, then after 5, 10, 20 and 40 seconds.
    assert gpus.calls("nvmlInitWithFlags") == 5
    gpus.stub("answer", "nvmlInitWithFlags", -1, 0)
    gpus.wait(300)
    found = gpus.read()
    assert list(found["devices"]) == [FIRST, SECOND]
    assert found["problem"] is None
    assert found["devices"][FIRST]["energy"] == 2121.748
    gpus.wait(60)
    assert gpus.read()["logs"] == ["INFO GPU figures are back"]


def test_no_library(tmp_path):
    """On a machine without the library there is one line, no warning, and no figure."""
    with reader(tmp_path) as gpus:
        read = gpus.read(slow=True)
        assert read["devices"] == {}
        assert reason(read) == "library_not_found"
        assert starts(read) == ["INFO no GPU figures"]
        gpus.wait(1000)
        assert gpus.read(slow=True)["logs"] == []


def test_a_library_that_is_installed_later_is_found(tmp_path):
    """A driver that is installed while the process runs is found."""
    with reader(tmp_path) as gpus:
        assert gpus.read()["devices"] == {}
        compile_stub(tmp_path)
        gpus.wait(5)
        assert list(gpus.read()["devices"]) == [FIRST, SECOND]


def test_no_device(gpus):
    """A driver without a device is told, and its devices are found when they come."""
    gpus.stub("present", 0, 0)
    gpus.stub("present", 1, 0)
    assert reason(gpus.read()) == "no_device"
    gpus.stub("present", 1, 1)
    gpus.wait(5)
    assert list(gpus.read()["devices"]) == [SECOND]


@pytest.mark.parametrize("code", DRIVER_CODES)
def test_a_driver_that_is_lost_later(gpus, code):
    """A driver that stops answering, as after a reload of systemd, is opened again."""
    gpus.read(slow=True)
    for device in (-1, 0, 1):
        gpus.stub("answer", "*", device, code)
    assert starts(gpus.read()) == ["WARNING no GPU figures"]
    for seconds in (5, 10, 20):
        gpus.wait(seconds)
        read = gpus.read()
        assert states(read) == {FIRST: "failed", SECOND: "failed"}
        assert read["devices"][FIRST]["memory_total"] is None
    for device in (-1, 0, 1):
        gpus.stub("answer", "*", device, 0)
    gpus.wait(40)
    found = gpus.read()
    assert states(found) == {FIRST: "ok", SECOND: "ok"}
    assert found["problem"] is None


def test_nvml_that_others_have_shut_down(gpus):
    """Code of the application that shuts NVML down once too often costs figures for one beat."""
    gpus.read()
    gpus.stub("shut_down")
    read = gpus.read()
    assert states(read) == {FIRST: "failed", SECOND: "failed"}
    assert reason(read) == "uninitialized"
    gpus.wait(5)
    assert states(gpus.read()) == {FIRST: "ok", SECOND: "ok"}


def test_a_driver_that_fails_for_once_beside_a_gpu_that_is_gone(gpus):
    """A GPU that is away for hours does not delay that the others are found again."""
    gpus.read()
    gpus.stub("present", 0, 0)
    for _ in range(100):
        gpus.read(slow=True)
        gpus.wait(300)
    gpus.read()
    gpus.stub("shut_down")
    gpus.read()
    gpus.wait(5)
    assert states(gpus.read()) == {SECOND: "ok", FIRST: "failed"}


def test_what_nobody_foresaw_lets_go_of_nvml(gpus):
    """An error in the middle of opening leaves NVML closed, and is tried again with pauses."""
    gpus.break_("nvmlDeviceGetSerial")
    for _ in range(20):
        read = gpus.read(slow=True)
        assert reason(read) == "unexpected_error"
        assert gpus.stub("references") == 0
        gpus.wait(5)
    assert gpus.calls("nvmlInitWithFlags") == 5


@pytest.mark.parametrize(
    ("function", "device"), [("nvmlDeviceGetCount_v2", -1), ("nvmlDeviceGetHandleByIndex_v2", 0)]
)
def test_a_driver_that_goes_while_it_is_opened(gpus, function, device):
    """A driver that is gone in the middle of opening is let go of, and opened again later."""
    gpus.stub("answer", function, device, 9)
    read = gpus.read()
    assert read["devices"] == {}
    assert reason(read) == "driver_not_loaded"
    assert gpus.stub("references") == 0
    gpus.stub("answer", function, device, 0)
    gpus.wait(5)
    assert states(gpus.read()) == {FIRST: "ok", SECOND: "ok"}


def test_a_list_that_cannot_be_had_for_once(gpus):
    """That the driver does not say what has changed costs no figure of what is known."""
    gpus.read()
    gpus.stub("answer", "nvmlDeviceGetCount_v2", -1, UNKNOWN)
    read = gpus.read(slow=True)
    assert states(read) == {FIRST: "ok", SECOND: "ok"}
    assert read["problem"] is None


def test_gpus_that_cannot_be_told_apart_are_refused(gpus):
    """Without its UUID a GPU has no series, and a line of its own."""
    gpus.lack("nvmlDeviceGetUUID")
    read = gpus.read()
    assert read["devices"] == {}
    assert reason(read) == "not_readable"
    assert starts(read) == ["WARNING no figures of GPU 0", "WARNING no figures of GPU 1"]


def test_a_driver_without_a_version_is_read(gpus):
    """The driver's version is an attribute: that it cannot be had costs no figure."""
    gpus.stub("answer", "nvmlSystemGetDriverVersion", -1, UNKNOWN)
    device = gpus.read()["devices"][FIRST]
    assert device["identity"]["driver_version"] is None
    assert device["temperature"] == 37


# One GPU of two.


@pytest.mark.parametrize(("code", "why"), [(4, "no_permission"), (15, "gpu_is_lost")])
@pytest.mark.parametrize("function", ["nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetUUID"])
def test_a_device_that_cannot_be_opened_is_told(gpus, function, code, why):
    """One GPU that is lost or not permitted is one line that names it, and costs no others."""
    gpus.stub("answer", function, 0, code)
    read = gpus.read()
    assert states(read) == {SECOND: "ok"}
    assert reason(read) == why
    assert read["problem"]["message"].startswith("no figures of GPU 0: ")
    assert starts(read) == ["WARNING no figures of GPU 0"]
    for _ in range(6):
        assert gpus.read(slow=True)["logs"] == []
    gpus.stub("answer", function, 0, 0)
    gpus.wait(5)
    found = gpus.read()
    assert states(found) == {FIRST: "ok", SECOND: "ok"}
    assert found["problem"] is None


def test_what_changes_beside_a_refused_gpu_is_noticed(gpus):
    """One GPU that this user may not use does not hide what becomes of the others."""
    gpus.stub("answer", "nvmlDeviceGetHandleByIndex_v2", 1, NO_PERMISSION)
    assert list(gpus.read(slow=True)["devices"]) == [FIRST]
    gpus.stub("mig", 1)
    assert list(gpus.read(slow=True)["devices"]) == [FIRST, *PARTS]


@pytest.mark.parametrize("code", LOST)
@pytest.mark.parametrize("slow", [False, True])
def test_a_lost_gpu_fails_alone_and_is_found_again(gpus, code, slow):
    """A GPU that is lost is `failed` and not touched again until it is looked for anew."""
    gpus.read(slow=True)
    gpus.stub("answer", "*", 0, code)
    lost = gpus.read(slow=slow)
    told = {name: value for name, value in lost["devices"][FIRST].items() if value is not None}
    assert set(told) == {"identity", "state"}
    assert states(lost) == {FIRST: "failed", SECOND: "ok"}
    assert lost["problem"]["message"].startswith(f"no figures of GPU 0 ({FIRST}): ")
    assert starts(lost) == [f"WARNING no figures of GPU 0 ({FIRST})"]
    counted = ("nvmlDeviceGetRemappedRows", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetUUID")
    before = [gpus.calls(one) for one in counted]
    for _ in range(3):
        read = gpus.read(slow=True)
        assert read["devices"][FIRST]["state"] == "failed"
        assert read["logs"] == []
    # The other GPU alone.
    assert [gpus.calls(one) for one in counted] == [one + 3 for one in before]
    gpus.wait(5)
    assert states(gpus.read()) == {FIRST: "failed", SECOND: "ok"}
    gpus.stub("answer", "*", 0, 0)
    gpus.wait(10)
    found = gpus.read()
    assert states(found) == {FIRST: "ok", SECOND: "ok"}
    assert found["problem"] is None
    gpus.wait(60)
    assert gpus.read()["logs"] == [f"INFO figures of GPU 0 ({FIRST}) are back"]


def test_a_gpu_that_fell_off_the_bus_is_failed(gpus):
    """A GPU that was there and is not listed any more is `failed`, and others go on."""
    gpus.read(slow=True)
    gpus.stub("present", 0, 0)
    read = gpus.read(slow=True)
    assert states(read) == {FIRST: "failed", SECOND: "ok"}
    assert reason(read) == "gpu_is_missing"
    assert starts(read) == [f"WARNING no figures of GPU 0 ({FIRST})"]
    gpus.stub("present", 0, 1)
    gpus.wait(5)
    assert gpus.read()["devices"][FIRST]["state"] == "ok"


def test_the_only_gpu_stays_failed(gpus):
    """A machine's only GPU that is lost is `failed` for as long as it is."""
    gpus.stub("present", 1, 0)
    gpus.read(slow=True)
    for way, back in [
        (("answer", "*", 0, GPU_IS_LOST), ("answer", "*", 0, 0)),
        (("present", 0, 0), ("present", 0, 1)),
        (("answer", "nvmlInitWithFlags", -1, 9), ("answer", "nvmlInitWithFlags", -1, 0)),
    ]:
        gpus.stub(*way)
        if way[1] == "nvmlInitWithFlags":
            gpus.stub("shut_down")
            gpus.read()
        for _ in range(60):
            gpus.wait(60)
            assert states(gpus.read(slow=True)) == {FIRST: "failed"}
        gpus.stub(*back)
        gpus.wait(300)
        found = gpus.read(slow=True)
        assert states(found) == {FIRST: "ok"}
        assert found["problem"] is None


@pytest.mark.parametrize("code", [INVALID_ARGUMENT, NO_PERMISSION, UNKNOWN])
def test_a_silent_gpu_is_lost_alone(gpus, code):
    """A GPU none of whose calls works, whatever the code, does not cost those of the others."""
    gpus.read(slow=True)
    gpus.stub("answer", "*", 0, code)
    lines = []
    for number in range(240):
        read = gpus.read(slow=number % 6 == 0)
        assert states(read) == {FIRST: "failed", SECOND: "ok"}
        lines += starts(read)
        gpus.wait(5)
    assert lines == [f"WARNING no figures of GPU 0 ({FIRST})"]


def test_one_call_that_fails_for_once(gpus):
    """A call that fails for an unknown reason costs its own figure, this once."""
    gpus.read()
    gpus.stub("answer", "nvmlDeviceGetPowerUsage", 0, UNKNOWN)
    read = gpus.read()
    assert read["devices"][FIRST]["power"] is None
    assert read["devices"][FIRST]["temperature"] == 37
    gpus.stub("answer", "nvmlDeviceGetPowerUsage", 0, 0)
    assert gpus.read()["devices"][FIRST]["power"] == 97.419


# MIG instances.


@pytest.mark.parametrize("code", [INVALID_ARGUMENT, NO_PERMISSION, UNKNOWN])
@pytest.mark.parametrize("function", ["nvmlDeviceGetUUID", "nvmlDeviceGetMigDeviceHandleByIndex"])
def test_one_mig_instance_that_is_refused_is_left_out(gpus, function, code):
    """An instance that cannot be opened costs neither the other instances nor any GPU."""
    gpus.stub("mig", 1)
    gpus.stub("answer", function, 2, code)
    read = gpus.read(slow=True)
    assert list(read["devices"]) == [FIRST, PARTS[1], SECOND]
    assert read["problem"] is None
    assert read["logs"] == []


def test_a_mig_instance_that_is_destroyed_is_no_fault(gpus):
    """An instance that answers nothing any more is left out at once, and without a word."""
    gpus.stub("mig", 1)
    gpus.read(slow=True)
    gpus.stub("answer", "*", 2, INVALID_ARGUMENT)
    for _ in range(20):
        read = gpus.read()
        assert list(read["devices"]) == [FIRST, PARTS[1], SECOND]
        assert read["problem"] is None
        assert read["logs"] == []
        gpus.wait(5)
    # When its silence was noticed it was looked for, and that was that.
    assert gpus.calls("nvmlInitWithFlags") == 2


def test_a_forked_child_opens_the_driver_for_itself(uncovered, gpus):
    """In the child of a fork, where the parent's handles do not work, all figures are read."""
    before = gpus.read(slow=True)
    child = gpus.fork()
    assert child["devices"] == {
        **before["devices"],
        SECOND: {**before["devices"][SECOND], "process_memory": 1073741824},
    }
    assert child["logs"] == []
    assert list(gpus.read()["devices"]) == [FIRST, SECOND]


def test_the_stub_says_when_its_table_is_full(library):
    """A test that makes more rules than the stub has room for ends with a message."""
    with running("gpu_reader", env={"LD_LIBRARY_PATH": str(library)}) as program:
        gpus = Reader(program)
        for number in range(512):
            gpus.stub("answer", f"function{number}", 0, 0)
        program.tell('["stub", "answer", "one too many", 0, 0]')
        ended = program.ended()
    assert ended.status == -6
    assert "nvml_stub: more than 512 rules" in ended.stderr
