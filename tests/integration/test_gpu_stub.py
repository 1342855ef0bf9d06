"""GPU figures through the real pynvml, from a driver library that the test compiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from nvml import FIRST, PARTS, SECOND, Reader, compile_stub, reader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GPU_IS_LOST, UNKNOWN, NOT_SUPPORTED = 15, 999, 3


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_stub(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="module")
def old_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_stub(tmp_path_factory.mktemp("old_nvml"), "-DOLD_DRIVER")


@pytest.fixture
def gpus(library: Path) -> Iterator[Reader]:
    with reader(library) as running:
        yield running


IDLE = {
    "state": "ok",
    "utilization": {"general": 0.0, "memory": 0.0, "decoder": 0.12},
    "memory_total": 85520809984,
    "memory_used": 0,
    "temperature": 37,
    "power": 97.419,
    "power_limit": 700.0,
    "energy": 2121.748,
    "io": {"transmit": 780000, "receive": 619000},
    "errors": {
        "corrected": 0,
        "uncorrected": 0,
        "remapped_row_corrected": 0,
        "remapped_row_uncorrected": 0,
    },
    "clocks": {"sm": 915e6, "memory": 2619e6},
    "process_memory": None,
}
BUSY = {
    **IDLE,
    "utilization": {"general": 1.0, "memory": 0.33, "decoder": 0.12},
    "memory_used": 42760404992,
    "temperature": 57,
    "power": 696.581,
    "energy": 8295.448,
    "io": {"transmit": 4096, "receive": 8192},
    "errors": {
        "corrected": 3,
        "uncorrected": 1,
        "remapped_row_corrected": 2,
        "remapped_row_uncorrected": 1,
    },
    "clocks": {"sm": 1350e6, "memory": 2619e6},
    "process_memory": 1073741824,
}


def without_identity(device: dict) -> dict:
    return {name: value for name, value in device.items() if name != "identity"}


def test_every_figure_of_two_gpus(gpus):
    """All figures of an idle and of a busy H100 are those that its driver gives, in base units."""
    read = gpus.read(slow=True)
    assert read["problem"] is None
    assert without_identity(read["devices"][FIRST]) == IDLE
    assert without_identity(read["devices"][SECOND]) == BUSY


def test_identity_is_read_once(gpus):
    """Identity is complete, and asked for when a device is found, not again with each reading."""
    for _ in range(5):
        read = gpus.read()
    assert read["devices"][SECOND]["identity"] == {
        "id": SECOND,
        "name": "GPU 1",
        "model": "NVIDIA H100 80GB HBM3",
        "vendor": "NVIDIA",
        "serial_number": "1650000000002",
        "driver_version": "580.159.04",
        "firmware_version": "96.00.74.00.01",
        "parent": None,
    }
    for function in ("nvmlDeviceGetName", "nvmlDeviceGetSerial", "nvmlDeviceGetUUID"):
        assert gpus.calls(function) == 2


def test_slow_calls_have_a_beat_of_their_own(gpus):
    """Energy, PCIe and codecs are asked for on slow readings alone, and told on all."""
    for slow in (True, False, False, True, False):
        read = gpus.read(slow=slow)
    assert gpus.calls("nvmlDeviceGetTotalEnergyConsumption") == 2 * 2
    assert gpus.calls("nvmlDeviceGetFieldValues") == 2 * 2
    assert gpus.calls("nvmlDeviceGetDecoderUtilization") == 2 * 2
    assert gpus.calls("nvmlDeviceGetUtilizationRates") == 2 * 5
    assert read["devices"][FIRST]["energy"] == 2121.748
    assert read["devices"][FIRST]["utilization"]["decoder"] == 0.12


def test_the_sampling_call_of_pcie_is_never_made(gpus):
    """The stub has no nvmlDeviceGetPcieThroughput, which takes 21 ms: nothing misses it."""
    gpus.read(slow=True)
    assert "nvmlDeviceGetPcieThroughput" not in str(gpus.unsupported())


def test_what_is_not_supported_is_asked_once(gpus):
    """A call that a device does not support is made once on that device, and its figure absent."""
    gpus.stub("answer", "nvmlDeviceGetPowerUsage", 0, NOT_SUPPORTED)
    for _ in range(4):
        read = gpus.read(slow=True)
    assert gpus.calls("nvmlDeviceGetPowerUsage") == 1 + 4
    assert gpus.calls("nvmlDeviceGetEncoderUtilization") == 2
    assert read["devices"][FIRST]["power"] is None
    assert read["devices"][SECOND]["power"] == 696.581
    assert "encoder" not in read["devices"][SECOND]["utilization"]
    assert read["logs"] == []


def test_an_old_driver_lacks_functions_not_figures(old_library):
    """Where the newer functions are missing the older ones are used, and no figure is lost."""
    with reader(old_library) as gpus:
        for _ in range(2):
            read = gpus.read(slow=True)
        device = without_identity(read["devices"][FIRST])
        # Version 1 of the memory's figures counts what the driver reserves as used.
        assert device == {**IDLE, "memory_used": 503316480}
        assert "nvmlDeviceGetCurrentClocksEventReasons" in gpus.unsupported()[FIRST]


def test_memory_v2_that_fails_as_on_wsl(gpus):
    """Where version 2 of the memory's figures is refused as an argument, version 1 is used."""
    gpus.stub("answer", "nvmlDeviceGetMemoryInfo_v2", -1, 2)
    assert gpus.read()["devices"][FIRST]["memory_used"] == 503316480
    gpus.read()
    assert gpus.calls("nvmlDeviceGetMemoryInfo_v2") == 2


def test_mig_instances_are_devices_of_their_parent(gpus):
    """MIG instances are devices with a parent; what they do not tell is absent."""
    gpus.stub("mig", 1)
    read = gpus.read(slow=True)
    assert list(read["devices"]) == [FIRST, *PARTS, SECOND]
    first = read["devices"][PARTS[0]]
    assert first["identity"]["parent"] == FIRST
    assert first["identity"]["name"] == "GPU 0 MIG 0"
    assert first["identity"]["model"] == "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
    told = {name for name, value in without_identity(first).items() if value is not None}
    assert told == {"memory_total", "memory_used"}
    assert (first["memory_total"], first["memory_used"]) == (10200547328, 15728640)
    assert "general" not in read["devices"][FIRST]["utilization"]
    assert read["logs"] == []


def test_mig_that_is_switched_is_noticed(gpus):
    """Instances that are made or removed later are found at the next slow reading."""
    assert list(gpus.read(slow=True)["devices"]) == [FIRST, SECOND]
    gpus.stub("mig", 1)
    assert list(gpus.read()["devices"]) == [FIRST, SECOND]
    assert list(gpus.read(slow=True)["devices"]) == [FIRST, *PARTS, SECOND]
    gpus.stub("mig", 0)
    read = gpus.read(slow=True)
    assert list(read["devices"]) == [FIRST, SECOND]
    assert read["problem"] is None


@pytest.mark.parametrize(
    ("reasons", "pending", "failure", "state"),
    [
        (0x0, 0, 0, "ok"),
        (0x1, 0, 0, "ok"),  # idle
        (0x4, 0, 0, "ok"),  # at its power limit
        (0x100, 0, 0, "ok"),
        (0x8, 0, 0, "degraded"),
        (0x20 | 0x4, 0, 0, "degraded"),
        (0x40, 0, 0, "degraded"),
        (0x80, 0, 0, "degraded"),
        (0x1, 1, 0, "degraded"),
        (0x1, 0, 1, "predicted_failure"),
        (0x8, 1, 1, "predicted_failure"),
    ],
)
def test_states(gpus, reasons, pending, failure, state):
    """Slowdowns by hardware or heat and pending row remaps degrade; a failed remap foretells."""
    gpus.stub("reasons", 0, reasons)
    gpus.stub("remapped", 0, pending, failure)
    assert gpus.read()["devices"][FIRST]["state"] == state


@pytest.mark.parametrize("kind", [1, 3])
def test_counters_of_pcie_are_summed_over_their_wraps(gpus, kind):
    """A counter of 32 bits that begins again at 0 goes on in the figure, whatever it is sent as."""
    before = gpus.read(slow=True)["devices"][FIRST]["io"]
    gpus.stub("io", 0, 2**32 - 10, 2**32 - 1, kind)
    gpus.read(slow=True)
    gpus.stub("io", 0, 90, 0, kind)
    after = gpus.read(slow=True)["devices"][FIRST]["io"]
    assert before == {"transmit": 780000, "receive": 619000}
    assert after == {"transmit": 2**32 + 90, "receive": 2**32}


OPENING = [
    (4, "no_permission", "WARNING"),
    (9, "driver_not_loaded", "WARNING"),
    (13, "function_not_found", "WARNING"),
    (15, "gpu_is_lost", "WARNING"),
    (18, "lib_rm_version_mismatch", "WARNING"),
    (UNKNOWN, "nvml_999", "WARNING"),
]


@pytest.mark.parametrize(("code", "reason", "level"), OPENING)
def test_a_driver_that_does_not_open(gpus, code, reason, level):
    """A driver that does not open is told in one line; figures are absent until it does."""
    gpus.stub("answer", "nvmlInitWithFlags", -1, code)
    first = gpus.read(slow=True)
    assert first["devices"] == {}
    assert first["problem"]["reason"] == reason
    assert first["problem"]["remedy"]
    assert len(first["logs"]) == 1
    assert first["logs"][0].startswith(f"{level} no GPU figures: ")
    assert reason in first["logs"][0]
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
    assert found["logs"] == ["INFO GPU figures are back: 2 devices answer"]
    assert found["devices"][FIRST]["energy"] == 2121.748


def test_no_library(tmp_path):
    """On a machine without the library there is one line, no warning, and no figure."""
    with reader(tmp_path) as gpus:
        read = gpus.read(slow=True)
        assert read["devices"] == {}
        assert read["problem"]["reason"] == "library_not_found"
        assert [line.split()[0] for line in read["logs"]] == ["INFO"]
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
    assert gpus.read()["problem"]["reason"] == "no_device"
    gpus.stub("present", 1, 1)
    gpus.wait(5)
    assert list(gpus.read()["devices"]) == [SECOND]


@pytest.mark.parametrize("refused", [4, 15])
def test_a_device_that_cannot_be_had_leaves_the_others(gpus, refused):
    """One GPU that is lost or not permitted does not cost the figures of the others."""
    gpus.stub("answer", "nvmlDeviceGetHandleByIndex_v2", 0, refused)
    assert list(gpus.read()["devices"]) == [SECOND]


def test_a_lost_gpu_fails_alone_and_is_found_again(gpus):
    """A GPU that is lost is `failed` and not touched again until it is looked for anew."""
    gpus.read(slow=True)
    gpus.stub("answer", "*", 0, GPU_IS_LOST)
    lost = gpus.read(slow=True)
    told = {name: value for name, value in lost["devices"][FIRST].items() if value is not None}
    assert set(told) == {"identity", "state"}
    assert told["state"] == "failed"
    assert lost["devices"][SECOND]["state"] == "ok"
    assert lost["problem"]["reason"] == "gpu_is_lost"
    assert [line.split()[0] for line in lost["logs"]] == ["WARNING"]
    before = gpus.calls("nvmlDeviceGetRemappedRows")
    for _ in range(3):
        read = gpus.read()
        assert read["devices"][FIRST]["state"] == "failed"
        assert read["logs"] == []
    assert gpus.calls("nvmlDeviceGetRemappedRows") == before + 3  # the other GPU alone
    gpus.wait(5)
    assert gpus.read()["devices"][FIRST]["state"] == "failed"
    gpus.stub("answer", "*", 0, 0)
    gpus.wait(10)
    found = gpus.read()
    assert found["devices"][FIRST]["state"] == "ok"
    assert found["problem"] is None
    assert found["logs"] == ["INFO GPU figures are back: 2 devices answer"]


def test_a_gpu_that_fell_off_the_bus_is_failed(gpus):
    """A GPU that was there and is not listed any more is `failed`, and others go on."""
    gpus.read(slow=True)
    gpus.stub("present", 0, 0)
    read = gpus.read(slow=True)
    assert read["devices"][FIRST]["state"] == "failed"
    assert read["devices"][SECOND]["state"] == "ok"
    gpus.stub("present", 0, 1)
    gpus.wait(5)
    assert gpus.read()["devices"][FIRST]["state"] == "ok"


@pytest.mark.parametrize("code", [1, 9, 18, UNKNOWN])
def test_a_driver_that_is_lost_later(gpus, code):
    """A driver that stops answering, as after a reload of systemd, is opened again."""
    gpus.read(slow=True)
    gpus.stub("answer", "*", -1, code)
    for device in (0, 1):
        gpus.stub("answer", "*", device, code)
    read = gpus.read()
    assert read["devices"] == {}
    assert len(read["logs"]) == 1
    gpus.wait(5)
    assert gpus.read()["devices"] == {}
    for device in (-1, 0, 1):
        gpus.stub("answer", "*", device, 0)
    gpus.wait(10)
    assert list(gpus.read()["devices"]) == [FIRST, SECOND]


def test_one_call_that_fails_for_once(gpus):
    """A call that fails for an unknown reason costs its own figure, this once."""
    gpus.read()
    gpus.stub("answer", "nvmlDeviceGetPowerUsage", 0, UNKNOWN)
    read = gpus.read()
    assert read["devices"][FIRST]["power"] is None
    assert read["devices"][FIRST]["temperature"] == 37
    gpus.stub("answer", "nvmlDeviceGetPowerUsage", 0, 0)
    assert gpus.read()["devices"][FIRST]["power"] == 97.419


def test_nvml_that_others_have_shut_down(gpus):
    """Code of the application that shuts NVML down once too often costs figures for one beat."""
    gpus.read()
    gpus.stub("answer", "*", 0, 1)
    assert gpus.read()["problem"]["reason"] == "uninitialized"
    gpus.stub("answer", "*", 0, 0)
    gpus.wait(5)
    assert list(gpus.read()["devices"]) == [FIRST, SECOND]


def test_a_forked_child_opens_the_driver_for_itself(gpus):
    """In the child of a fork, where the parent's handles do not work, all figures are read."""
    gpus.read(slow=True)
    child = gpus.fork()
    assert without_identity(child["devices"][FIRST]) == IDLE
    assert child["logs"] == []
    assert list(gpus.read()["devices"]) == [FIRST, SECOND]
