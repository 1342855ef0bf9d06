"""GPU figures through the real pynvml, from a driver library that the test compiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from nvml import FIRST, PARTS, SECOND, Reader, compile_stub, reader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOT_SUPPORTED, NO_PERMISSION = 3, 4


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
    "errors": {"corrected": 0, "uncorrected": 0},
    "remapped_rows": {"corrected": 0, "uncorrected": 0},
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
    "errors": {"corrected": 3, "uncorrected": 1},
    "remapped_rows": {"corrected": 2, "uncorrected": 1},
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


def test_mig_mode_that_is_switched_without_instances_is_noticed(gpus):
    """What MIG mode alone keeps a GPU from telling is told at the next slow reading without it."""
    gpus.stub("present", 2, 0)
    gpus.stub("present", 3, 0)
    gpus.stub("mig", 1)
    assert "general" not in gpus.read(slow=True)["devices"][FIRST]["utilization"]
    gpus.stub("mig", 0)
    assert gpus.read(slow=True)["devices"][FIRST]["utilization"]["general"] == 0.0


def test_gpus_that_are_swapped_are_noticed(gpus):
    """Another GPU at the same index is found at the next slow reading."""
    gpus.stub("present", 1, 0)
    assert list(gpus.read(slow=True)["devices"]) == [FIRST]
    gpus.stub("present", 0, 0)
    gpus.stub("present", 1, 1)
    read = gpus.read(slow=True)["devices"]
    assert {id_: one["state"] for id_, one in read.items()} == {FIRST: "failed", SECOND: "ok"}


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


@pytest.mark.parametrize("kind", [2, 3])
def test_counters_of_pcie_never_decrease(gpus, kind):
    """Counters of 64 bits that begin again at 0, as after a reload of the driver, are added up."""
    gpus.stub("io", 0, 2**32 + 10, 7, kind)
    before = gpus.read(slow=True)["devices"][FIRST]["io"]
    gpus.stub("io", 0, 90, 8, kind)
    again = gpus.read(slow=True)["devices"][FIRST]["io"]
    gpus.stub("mig", 1)  # the driver is opened anew
    gpus.stub("io", 0, 80, 9, kind)
    anew = gpus.read(slow=True)["devices"][FIRST]["io"]
    assert before == {"transmit": 2**32 + 10, "receive": 7}
    assert again == {"transmit": 2**32 + 100, "receive": 8}
    assert anew == {"transmit": 2**32 + 180, "receive": 9}


def test_counters_of_pcie_that_are_narrow_are_absent(gpus):
    """Counters of 32 bits wrap unseen, so there is no figure, and they are not asked for again."""
    gpus.stub("io", 0, 780000, 619000, 1)
    for _ in range(3):
        assert gpus.read(slow=True)["devices"][FIRST]["io"] is None
    assert gpus.calls("nvmlDeviceGetFieldValues") == 2
    assert "nvmlDeviceGetFieldValues" in gpus.unsupported()[FIRST]


def test_what_was_not_supported_is_asked_once_an_hour(gpus):
    """A call that was refused is made again after an hour, and its figure told if it works."""
    gpus.stub("answer", "nvmlDeviceGetPowerUsage", 0, NO_PERMISSION)
    for _ in range(60):
        assert gpus.read()["devices"][FIRST]["power"] is None
        gpus.wait(60)
    assert gpus.calls("nvmlDeviceGetPowerUsage") == 1 + 60
    gpus.stub("answer", "nvmlDeviceGetPowerUsage", 0, 0)
    assert gpus.read()["devices"][FIRST]["power"] == 97.419
    assert gpus.read()["devices"][FIRST]["power"] == 97.419


def test_what_is_not_available_is_absent(gpus):
    """Numbers by which NVML says that there is none, and those too large to be sent, are absent."""
    gpus.stub("power", 0, 2**32 - 1)
    gpus.stub("memory", 0, -1)
    gpus.stub("ecc", 0, -1)
    gpus.stub("ecc", 1, -(2**63))
    gpus.stub("io", 0, -1, 2**63, 3)
    read = gpus.read(slow=True)["devices"]
    first, second = read[FIRST], read[SECOND]
    assert (first["power"], first["memory_used"], first["io"]) == (None, None, None)
    assert first["memory_total"] == 85520809984
    assert first["errors"] == {"uncorrected": 0}
    assert second["errors"] == {"uncorrected": 1}


@pytest.mark.parametrize("function", ["nvmlDeviceGetTemperatureV", "nvmlDeviceGetPowerUsage"])
def test_a_pynvml_that_lacks_a_function(gpus, function):
    """An older pynvml costs the figure of the function that it lacks, or nothing."""
    gpus.lack(function)
    read = gpus.read(slow=True)
    assert function in gpus.unsupported()[FIRST]
    power = None if "Power" in function else 97.419
    assert without_identity(read["devices"][FIRST]) == {**IDLE, "power": power}


def test_identity_that_cannot_be_decoded_is_absent(gpus):
    """A serial number that is no text costs itself alone."""
    gpus.stub("garble", 0)
    read = gpus.read(slow=True)
    assert read["devices"][FIRST]["identity"]["serial_number"] is None
    assert without_identity(read["devices"][FIRST]) == IDLE
    assert read["devices"][SECOND]["identity"]["serial_number"] == "1650000000002"


def test_names_stay_when_indices_move(gpus):
    """A GPU keeps the name it got first, also when NVML counts it differently."""
    gpus.stub("present", 0, 0)
    assert names(gpus.read(slow=True)) == {SECOND: "GPU 0"}
    gpus.stub("present", 0, 1)
    assert names(gpus.read(slow=True)) == {FIRST: "GPU 1", SECOND: "GPU 0"}
    gpus.stub("present", 0, 0)
    assert names(gpus.read(slow=True)) == {FIRST: "GPU 1", SECOND: "GPU 0"}


def names(read: dict) -> dict[str, str]:
    return {id_: one["identity"]["name"] for id_, one in read["devices"].items()}


@pytest.mark.parametrize(("listed", "told"), [(0, 1073741824), (999_999_999, None)])
def test_memory_of_this_process_is_found_by_its_pid(gpus, listed, told):
    """Where NVML lists this process by an id that cannot be seen from here, there is no figure."""
    gpus.stub("pid", listed)
    assert gpus.read()["devices"][SECOND]["process_memory"] == told
