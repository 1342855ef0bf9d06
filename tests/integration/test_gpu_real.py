"""GPU figures of a real NVIDIA GPU agree with what nvidia-smi says at the same time."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from nvml import reader
from processes import running

from periscope_otel.gauges.gpu import GpuReader
from periscope_otel.gauges.nvml import NvmlBackend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from processes import Program

    from periscope_otel.gauges import GpuDeviceStats

FIELDS = (
    "uuid",
    "name",
    "serial",
    "driver_version",
    "vbios_version",
    "utilization.gpu",
    "utilization.memory",
    "memory.total",
    "memory.used",
    "temperature.gpu",
    "power.draw",
    "enforced.power.limit",
    "clocks.sm",
    "clocks.mem",
)
MIB = 2**20
GIB = 2**30


def why_not() -> str | None:
    """Return why there is nothing to compare here."""
    if shutil.which("nvidia-smi") is None:
        return "there is no nvidia-smi here: no NVIDIA GPU"
    problem = GpuReader(NvmlBackend()).read(True).problem
    return None if problem is None else f"no NVIDIA GPU can be read here: {problem.message}"


pytestmark = [
    pytest.mark.hardware,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch, which makes the load, is missing"
)


def smi() -> dict[str, dict[str, str]]:
    """Return what nvidia-smi says of each GPU, by UUID."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    return {row[0]: dict(zip(FIELDS, row, strict=True)) for row in rows}


def whole(stats: Any) -> dict[str, GpuDeviceStats]:
    """Return the GPUs by UUID, without MIG instances."""
    return {one.identity.id: one for one in stats.devices if one.identity.parent is None}


@pytest.fixture
def gpus() -> Iterator[GpuReader]:
    reader = GpuReader(NvmlBackend())
    reader.read(True)
    yield reader
    reader.close()


@contextmanager
def load(*arguments: str) -> Iterator[tuple[Program, dict[str, Any]]]:
    """Keep the first GPU busy for a block."""
    with running("gpu_load", *arguments) as program:
        told = json.loads(program.line(120))
        if not arguments:
            time.sleep(4)  # clocks, power and heat follow the load, and smi averages over 1 s
        yield program, told


def sandwich(reader: GpuReader) -> Iterator[tuple[dict[str, str], GpuDeviceStats, GpuDeviceStats]]:
    """Return what nvidia-smi says of each GPU, and our readings before and after that."""
    before = whole(reader.read(True))
    said = smi()
    after = whole(reader.read(True))
    assert set(before) == set(said) == set(after)
    for uuid, row in said.items():
        yield row, before[uuid], after[uuid]


def number(text: str) -> float | None:
    """Return a figure of nvidia-smi; None for [N/A]."""
    try:
        return float(text)
    except ValueError:
        return None


def compare(
    row: dict[str, str], before: GpuDeviceStats, after: GpuDeviceStats
) -> list[tuple[str, float, float | None, float | None, float]]:
    """Return each figure: its name, nvidia-smi's, ours before and after, and the tolerance."""
    use, then = before.utilization or {}, after.utilization or {}
    clocks, clocks_then = before.clocks or {}, after.clocks or {}
    power = number(row["power.draw"]) or 0.0
    figures = [
        ("utilization.gpu", 1e-2, use.get("general"), then.get("general"), 0.15),
        ("utilization.memory", 1e-2, use.get("memory"), then.get("memory"), 0.15),
        ("memory.total", MIB, before.memory_total, after.memory_total, MIB),
        ("memory.used", MIB, before.memory_used, after.memory_used, 64 * MIB),
        ("temperature.gpu", 1, before.temperature, after.temperature, 3),
        ("power.draw", 1, before.power, after.power, 15 + 0.15 * power),
        ("enforced.power.limit", 1, before.power_limit, after.power_limit, 0.1),
        ("clocks.sm", 1e6, clocks.get("sm"), clocks_then.get("sm"), 200e6),
        ("clocks.mem", 1e6, clocks.get("memory"), clocks_then.get("memory"), 1e6),
    ]
    return [
        (name, said * unit, one, two, tolerance)
        for name, unit, one, two, tolerance in figures
        if (said := number(row[name])) is not None
    ]


def agree(reader: GpuReader) -> None:
    for row, before, after in sandwich(reader):
        for name, said, one, two, tolerance in compare(row, before, after):
            print(f"{name}: nvidia-smi {said:g}, ours {one} and {two}")
            assert one is not None, name
            assert two is not None, name
            assert min(one, two) - tolerance <= said <= max(one, two) + tolerance, name


def test_identity(gpus):
    """Model, serial number, driver and firmware are those that nvidia-smi shows."""
    for row, device, _ in sandwich(gpus):
        identity = device.identity
        assert identity.model == row["name"]
        assert identity.driver_version == row["driver_version"]
        assert identity.firmware_version == row["vbios_version"]
        if number(row["serial"]) is not None:
            assert identity.serial_number == row["serial"]
        print(identity)


def test_figures_agree_when_idle(gpus):
    """Every figure agrees with nvidia-smi on an idle GPU."""
    agree(gpus)


@needs_torch
def test_figures_agree_under_load(gpus):
    """Every figure agrees with nvidia-smi on a busy GPU, and shows that it is busy."""
    idle = next(iter(whole(gpus.read(True)).values()))
    with load():
        agree(gpus)
        busy = next(iter(whole(gpus.read(True)).values()))
    print("idle", idle)
    print("busy", busy)
    assert busy.utilization["general"] >= 0.9
    assert busy.memory_used >= (idle.memory_used or 0) + 2 * GIB
    assert busy.power > idle.power + 50
    assert busy.state in ("ok", "degraded")


@needs_torch
def test_energy_is_power_over_time(gpus):
    """The energy counter grows by what the power says, within a sixth."""
    with load():
        powers, began = [], time.monotonic()
        first = next(iter(whole(gpus.read(True)).values()))
        while time.monotonic() < began + 6:
            powers.append(next(iter(whole(gpus.read(False)).values())).power)
            time.sleep(0.1)
        last = next(iter(whole(gpus.read(True)).values()))
        seconds = time.monotonic() - began
    expected = sum(powers) / len(powers) * seconds
    print(f"energy {last.energy - first.energy:.0f} J, power times time {expected:.0f} J")
    assert last.energy - first.energy == pytest.approx(expected, rel=1 / 6)


@needs_torch
def test_bytes_over_pcie(gpus):
    """What is copied to the GPU is counted as received, or absent where the counter is narrow."""
    received: dict[int, int] = {}
    with load("idle") as (program, _):
        for gib in (1, 3, 12):
            before, raw = whole(gpus.read(True)), raw_io()
            program.tell(f"copy {gib * GIB}")
            assert program.line() == "copied"
            after = whole(gpus.read(True))
            uuid = next(iter(after))
            print(f"{gib} GiB copied: {before[uuid].io} -> {after[uuid].io}; {raw} -> {raw_io()}")
            if any(code == 0 and kind in (2, 3) for code, kind, _ in raw):
                received[gib] = after[uuid].io["receive"] - before[uuid].io["receive"]
            else:
                assert before[uuid].io is None
                assert after[uuid].io is None
    for gib, count in received.items():
        assert gib * GIB * 0.99 <= count <= gib * GIB * 4 / 3 + 64 * MIB


def raw_io() -> list[tuple[int, int, int]]:
    """Return the driver's counters as they come: code, type and value, sent and received."""
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    values = pynvml.nvmlDeviceGetFieldValues(handle, [197, 198])
    return [(one.nvmlReturn, one.valueType, one.value.ullVal) for one in values]


@needs_torch
def test_memory_of_this_process():
    """The memory that a process uses is what nvidia-smi says of it, or absent where it cannot."""
    with load("idle") as (program, told):
        program.tell("figures")
        (uuid, ours), *_ = json.loads(program.line()).items()
        command = [
            "nvidia-smi",
            "--query-compute-apps=gpu_uuid,pid,used_memory",
            "--format=csv,noheader,nounits",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    listed = [number(row[2]) for row in rows if row[0] == uuid and row[1] == str(told["pid"])]
    print(f"nvidia-smi {rows}, ours {ours}, pid {told['pid']}")
    if listed and listed[0] is not None:
        assert ours == pytest.approx(listed[0] * MIB, abs=2 * MIB)
    else:
        # Another pid namespace: the driver lists processes by pids that mean nothing here.
        assert ours is None or ours >= 2 * GIB


def test_a_forked_child_reads_too():
    """A child of a fork reads the GPU by itself, and its parent goes on."""
    with reader(None) as gpus:
        before = gpus.read(slow=True)
        child = gpus.fork()
        after = gpus.read(slow=True)
    assert before["devices"]
    assert list(child["devices"]) == list(after["devices"]) == list(before["devices"])
    assert all(one["memory_total"] for one in child["devices"].values())
