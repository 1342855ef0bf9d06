"""One NVIDIA GPU or MIG instance: its figures, and the calls that it does not support."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from periscope_otel.gauges.gpu import (
    DEGRADED,
    OK,
    PREDICTED_FAILURE,
    GpuLostError,
    GpuSilentError,
    GpuUnavailableError,
)
from periscope_otel.gauges.nvml_codes import (
    DEVICE_IS_GONE,
    DRIVER_IS_GONE,
    DRIVER_IS_SILENT,
    FUNCTION_NOT_FOUND,
    UNSUPPORTED,
    problem_of,
    silence_of,
)
from periscope_otel.gauges.stats import GpuDeviceStats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from periscope_otel.gauges.stats import GpuIdentity

ASK_AGAIN = 3600.0
"""Seconds after which a call that was not supported is made once more."""

_MEMORY_V2 = 0x02000028
_SM_CLOCK, _MEMORY_CLOCK = 1, 2
_CORRECTED, _UNCORRECTED, _SINCE_DRIVER_LOAD = 0, 1, 0
_PCIE_TRANSMITTED, _PCIE_RECEIVED = 197, 198
_PCIE = ("nvmlDeviceGetFieldValues", (_PCIE_TRANSMITTED, _PCIE_RECEIVED))
_64_BITS = (2, 3)  # NVML_VALUE_TYPE_UNSIGNED_LONG, NVML_VALUE_TYPE_UNSIGNED_LONG_LONG

_SLOWDOWNS = 0x08 | 0x20 | 0x40 | 0x80
"""Clock event reasons that are faults: slowdowns by hardware or heat, power brake.

Idle clocks, a clock or power limit that somebody set, and a display's needs are none.
"""


class NvmlDevice:
    """One GPU or MIG instance.

    Args:
        nvml: The module `pynvml`.
        handle: NVML's handle of the device.
        identity: Which one it is.
        counters: Its bytes over PCIe so far.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        nvml: Any,
        handle: Any,
        identity: GpuIdentity,
        counters: PcieCounters,
        clock: Callable[[], float],
    ) -> None:
        self._nvml = nvml
        self._handle = handle
        self._identity = identity
        self._counters = counters
        self._clock = clock
        self._unsupported: dict[tuple[object, ...], float] = {}
        """The calls that are not supported, and when that was found."""
        self._answers = 0
        self._last_code = 0
        self._slow = GpuDeviceStats(identity)

    @property
    def identity(self) -> GpuIdentity:
        """Which one it is."""
        return self._identity

    @property
    def unsupported(self) -> set[str]:
        """The calls that this device does not support, as far as they were tried."""
        return {str(key[0]) for key in self._unsupported}

    def read(self, *, slow: bool) -> GpuDeviceStats:
        """Return its figures; see `GpuDevice`.

        Raises:
            GpuLostError: If the device is gone, or all its calls fail.
            GpuUnavailableError: If the driver is gone.
        """
        self._answers = 0
        total, used = self._memory()
        remapped = self._remapped()
        fast = GpuDeviceStats(
            self._identity,
            state=self._state(remapped),
            utilization=self._utilization(),
            memory_total=total,
            memory_used=used,
            temperature=self._temperature(),
            power=self._power("nvmlDeviceGetPowerUsage"),
            power_limit=self._power("nvmlDeviceGetEnforcedPowerLimit"),
            errors=self._errors(),
            remapped_rows=_told({"corrected": remapped[0], "uncorrected": remapped[1]}),
            clocks=self._clocks(),
            process_memory=self._process_memory(),
        )
        if not self._answers:
            raise GpuSilentError(silence_of(self._last_code), DRIVER_IS_SILENT)
        if slow:
            self._slow = self._read_slow()
        return self._with_slow(fast)

    # The figures that cost microseconds.

    def _utilization(self) -> dict[str, float] | None:
        rates = self._ask("nvmlDeviceGetUtilizationRates")
        if rates is None:
            return None
        return _told({"general": _percent(rates.gpu), "memory": _percent(rates.memory)})

    def _memory(self) -> tuple[int | None, int | None]:
        info = self._ask("nvmlDeviceGetMemoryInfo", _MEMORY_V2)
        if info is None:
            info = self._ask("nvmlDeviceGetMemoryInfo")
        return (None, None) if info is None else (count(info.total), count(info.used))

    def _temperature(self) -> float | None:
        degrees = self._ask("nvmlDeviceGetTemperatureV", 0)
        if degrees is None:
            degrees = self._ask("nvmlDeviceGetTemperature", 0)
        return _divided(count(degrees, 32), 1)

    def _power(self, function: str) -> float | None:
        return _divided(count(self._ask(function), 32), 1000)

    def _clocks(self) -> dict[str, float] | None:
        asked = {
            "sm": count(self._ask("nvmlDeviceGetClockInfo", _SM_CLOCK), 32),
            "memory": count(self._ask("nvmlDeviceGetClockInfo", _MEMORY_CLOCK), 32),
        }
        return _told({name: None if mhz is None else mhz * 1e6 for name, mhz in asked.items()})

    def _errors(self) -> dict[str, int] | None:
        asked = {"corrected": _CORRECTED, "uncorrected": _UNCORRECTED}
        return _told(
            {
                kind: count(self._ask("nvmlDeviceGetTotalEccErrors", code, _SINCE_DRIVER_LOAD))
                for kind, code in asked.items()
            }
        )

    def _remapped(self) -> Sequence[int | None]:
        """Return rows remapped for corrected and uncorrected errors, pending and failed ones."""
        answer = self._ask("nvmlDeviceGetRemappedRows")
        return [None] * 4 if answer is None else [count(one, 32) for one in answer]

    def _state(self, remapped: Sequence[int | None]) -> str | None:
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # its name in drivers before 535
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        _, _, pending, failure = remapped
        if reasons is None and pending is None and failure is None:
            return None
        if failure:
            return PREDICTED_FAILURE  # a bad row could not be replaced
        return DEGRADED if pending or (reasons or 0) & _SLOWDOWNS else OK

    def _process_memory(self) -> int | None:
        """Return what this process uses; None where NVML does not list it.

        From inside a container that has process ids of its own, NVML may list the host's ids.
        Which of these is this process cannot be told from there, so the figure is absent.
        """
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses")
        if not processes:
            return None
        pids = own_pids(os.getpid())
        used = [count(one.usedGpuMemory) for one in processes if one.pid in pids]
        known = [one for one in used if one is not None]
        return sum(known) if known else None

    # The figures that cost milliseconds.

    def _read_slow(self) -> GpuDeviceStats:
        return GpuDeviceStats(
            self._identity,
            energy=_divided(count(self._ask("nvmlDeviceGetTotalEnergyConsumption")), 1000),
            io=self._io(),
            utilization=_told(
                {
                    "encoder": self._codec("nvmlDeviceGetEncoderUtilization"),
                    "decoder": self._codec("nvmlDeviceGetDecoderUtilization"),
                }
            ),
        )

    def _codec(self, function: str) -> float | None:
        answer = self._ask(function)
        return None if answer is None else _percent(answer[0])

    def _io(self) -> dict[str, int] | None:
        """Return bytes over PCIe, where the driver counts them in 64 bits.

        Where it counts in 32, as 580.159.04 does on an H100, a counter begins again every 75 ms
        at full rate, and nobody can tell how often it has between two readings.
        """
        values = self._ask(*_PCIE)
        if values is None:
            return None
        if all(one.nvmlReturn == 0 and one.valueType not in _64_BITS for one in values):
            self._unsupported[_PCIE] = self._clock()
        raw = [
            count(one.value.ullVal) if one.nvmlReturn == 0 and one.valueType in _64_BITS else None
            for one in values
        ]
        return self._counters.add(transmit=raw[0], receive=raw[1])

    def _with_slow(self, fast: GpuDeviceStats) -> GpuDeviceStats:
        slow = self._slow
        utilization = {**(fast.utilization or {}), **(slow.utilization or {})}
        return fast._replace(energy=slow.energy, io=slow.io, utilization=utilization or None)

    # Asking.

    def _ask(self, function: str, *arguments: object) -> Any:
        """Return what a call answers; None if it does not, or is known not to."""
        key = (function, *arguments)
        if key in self._unsupported and self._clock() - self._unsupported[key] < ASK_AGAIN:
            return None
        try:
            answer = getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError as error:
            return self._refused(key, error.value)
        except (AttributeError, TypeError):  # a pynvml that is older than this code
            return self._refused(key, FUNCTION_NOT_FOUND)
        self._unsupported.pop(key, None)
        self._answers += 1
        return answer

    def _refused(self, key: tuple[object, ...], code: int) -> None:
        self._last_code = code
        if code in DEVICE_IS_GONE:
            raise GpuLostError(problem_of(code)) from None
        if code in DRIVER_IS_GONE:
            raise GpuUnavailableError(problem_of(code)) from None
        if code in UNSUPPORTED:
            self._unsupported[key] = self._clock()


class PcieCounters:
    """Bytes over PCIe that never become fewer, whatever becomes of the driver's counters."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}
        """What was counted before the driver began again at 0."""
        self._last: dict[str, int] = {}

    def add(self, **raw: int | None) -> dict[str, int] | None:
        """Take a reading of each direction, and return the totals; None if there is none."""
        return _told({direction: self._add(direction, value) for direction, value in raw.items()})

    def _add(self, direction: str, raw: int | None) -> int | None:
        if raw is None:
            return None
        last = self._last.get(direction, 0)
        before = self._before.get(direction, 0) + (last if raw < last else 0)
        self._before[direction], self._last[direction] = before, raw
        return before + raw


def count(value: int | None, bits: int = 64) -> int | None:
    """Return a number that NVML tells; None if it stands for one that is not available.

    Args:
        value: What NVML tells.
        bits: How wide it is there.
    """
    if value is None or not 0 <= value < 2**63 or value == 2**bits - 1:
        return None
    return value


@lru_cache(maxsize=1)
def own_pids(pid: int) -> frozenset[int]:
    """Return the ids of this process in all namespaces that can be seen from here.

    Args:
        pid: The process's own id for itself.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:  # no Linux
        return frozenset({pid})
    return frozenset({pid, *namespaced_pids(status)})


def namespaced_pids(status: str) -> list[int]:
    """Return the ids of a process, from the outermost namespace in sight to its own.

    Args:
        status: Its `/proc/…/status`.
    """
    for line in status.splitlines():
        name, _, ids = line.partition(":")
        if name == "NSpid":
            return [int(one) for one in ids.split()]
    return []  # a kernel before 4.1


def _told(values: dict[str, Any]) -> dict[str, Any] | None:
    """Return the values that there are; None if there is none."""
    return {name: value for name, value in values.items() if value is not None} or None


def _percent(value: int) -> float | None:
    return _divided(count(value, 32), 100)


def _divided(value: int | None, by: int) -> float | None:
    return None if value is None else value / by
