"""NVIDIA GPUs by NVML, through `pynvml` of the package nvidia-ml-py."""

from __future__ import annotations

import os
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any

from periscope_otel.gauges.gpu import (
    DEGRADED,
    OK,
    PREDICTED_FAILURE,
    GpuLostError,
    GpuUnavailableError,
)
from periscope_otel.gauges.stats import GpuDeviceStats, GpuIdentity, GpuProblem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# NVML's return codes (nvml.h, nvmlReturn_t).
UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 1, 2, 3, 4, 6
DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, FUNCTION_NOT_FOUND, GPU_IS_LOST = 9, 12, 13, 15
RESET_REQUIRED, VERSION_MISMATCH, ARGUMENT_VERSION_MISMATCH, DEPRECATED = 16, 18, 25, 26

_NEVER = {
    INVALID_ARGUMENT,  # MemoryInfo v2 on WSL
    NOT_SUPPORTED,
    NO_PERMISSION,
    FUNCTION_NOT_FOUND,
    ARGUMENT_VERSION_MISMATCH,
    DEPRECATED,
}
"""What a call answers that need not be made again on this device."""

_DEVICE_IS_GONE = {GPU_IS_LOST, RESET_REQUIRED}
_DRIVER_IS_GONE = {UNINITIALIZED, DRIVER_NOT_LOADED, VERSION_MISMATCH}

_PROBLEMS: Mapping[int, GpuProblem] = {
    UNINITIALIZED: GpuProblem(
        "uninitialized", "NVML was shut down by other code", "none needed: it is opened again"
    ),
    NO_PERMISSION: GpuProblem(
        "no_permission",
        "this user may not use the NVIDIA driver",
        "give the user, or the container, access to /dev/nvidia*",
    ),
    DRIVER_NOT_LOADED: GpuProblem(
        "driver_not_loaded",
        "the NVIDIA driver is not loaded",
        "load the kernel module (modprobe nvidia), or reinstall the driver after a kernel update",
    ),
    LIBRARY_NOT_FOUND: GpuProblem(
        "library_not_found",
        "there is no NVIDIA driver library (libnvidia-ml.so.1) here",
        "with an NVIDIA GPU: install its driver, and start containers with the NVIDIA runtime",
    ),
    FUNCTION_NOT_FOUND: GpuProblem(
        "function_not_found",
        "the NVIDIA driver is too old",
        "update the NVIDIA driver",
    ),
    GPU_IS_LOST: GpuProblem(
        "gpu_is_lost",
        "a GPU has fallen off the bus, or is otherwise inaccessible",
        "look for Xid errors in the kernel's log; reset the GPU or restart the machine",
    ),
    RESET_REQUIRED: GpuProblem(
        "reset_required", "a GPU needs a reset", "nvidia-smi --gpu-reset, or restart the machine"
    ),
    VERSION_MISMATCH: GpuProblem(
        "lib_rm_version_mismatch",
        "the NVIDIA library and kernel module are of different versions",
        "restart the machine, or reload the kernel module: the driver was updated",
    ),
}
_NO_DEVICE = GpuProblem(
    "no_device", "the NVIDIA driver has no device", "give the container a GPU; see nvidia-smi -L"
)
_SILENT = GpuProblem(
    "no_answer",
    "the NVIDIA driver answers nothing any more",
    "in a container: restart it (a reload of systemd takes its devices away)",
)
_NOT_INSTALLED = GpuProblem(
    "backend_not_installed", "pynvml is not installed", "pip install nvidia-ml-py"
)

_MEMORY_V2 = 0x02000028
_SM_CLOCK, _MEMORY_CLOCK = 1, 2
_CORRECTED, _UNCORRECTED, _SINCE_DRIVER_LOAD = 0, 1, 0
_PCIE_TRANSMITTED, _PCIE_RECEIVED = 197, 198
_UNSIGNED_INT = 1

_SLOWDOWNS = 0x08 | 0x20 | 0x40 | 0x80
"""Clock event reasons that are faults: slowdowns by hardware or heat, power brake.

Idle clocks, a clock or power limit that somebody set, and a display's needs are none.
"""


def _problem_of(code: int) -> GpuProblem:
    return _PROBLEMS.get(code) or GpuProblem(
        f"nvml_{code}",
        f"NVML answers {code}",
        "see nvmlReturn_t in NVIDIA's documentation; in a container, restart it",
    )


class NvmlBackend:
    """NVIDIA's driver, by NVML."""

    def __init__(self) -> None:
        try:
            # Imported here, in the caller's thread, and not by the sampler's: a child that is
            # forked in the middle of an import waits for ever for the lock of that import.
            self._nvml: Any = import_module("pynvml")
        except ImportError:
            self._nvml = None
        self._layout: tuple[object, ...] = ()

    def open(self) -> list[NvmlDevice]:
        """Return all GPUs and, of those that are divided, the MIG instances.

        Raises:
            GpuUnavailableError: If there is no driver, or it cannot be used.
        """
        if self._nvml is None:
            raise GpuUnavailableError(_NOT_INSTALLED)
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise GpuUnavailableError(_problem_of(error.value)) from None
        try:
            devices = self._devices()
        except self._nvml.NVMLError as error:
            self.close()
            raise GpuUnavailableError(_problem_of(error.value)) from None
        except GpuUnavailableError:
            self.close()
            raise
        self._layout = self._layout_now()
        return devices

    def changed(self) -> bool:
        """Return whether there are other GPUs or MIG instances than before."""
        return self._layout_now() != self._layout

    def close(self) -> None:
        """Let go of NVML; others in the process may still use it."""
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            return  # it was not open any more

    def after_fork(self) -> None:
        """Forget the parent's lock, which another of its threads may have held."""
        if self._nvml is not None and hasattr(self._nvml, "libLoadLock"):
            self._nvml.libLoadLock = threading.Lock()

    def _devices(self) -> list[NvmlDevice]:
        nvml = self._nvml
        driver = nvml.nvmlSystemGetDriverVersion()
        count = nvml.nvmlDeviceGetCount()
        if not count:
            raise GpuUnavailableError(_NO_DEVICE)
        devices: list[NvmlDevice] = []
        refused: Exception | None = None
        for index in range(count):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                devices.append(self._device(handle, f"GPU {index}", driver))
            except nvml.NVMLError as error:
                refused = error  # one that is lost, or not for this user; others may work
                continue
            devices += self._mig_devices(devices[-1], handle)
        if refused is not None and not devices:
            raise refused
        return devices

    def _device(
        self, handle: Any, name: str, driver: str, parent: GpuIdentity | None = None
    ) -> NvmlDevice:
        identity = GpuIdentity(
            id=self._nvml.nvmlDeviceGetUUID(handle),
            name=name,
            model=self._told("nvmlDeviceGetName", handle),
            vendor="NVIDIA",
            serial_number=(
                self._told("nvmlDeviceGetSerial", handle)
                if parent is None
                else parent.serial_number
            ),
            driver_version=driver,
            firmware_version=self._told("nvmlDeviceGetVbiosVersion", handle),
            parent=None if parent is None else parent.id,
        )
        return NvmlDevice(self._nvml, handle, identity)

    def _mig_devices(self, device: NvmlDevice, handle: Any) -> list[NvmlDevice]:
        identity = device.identity
        return [
            self._device(
                part, f"{identity.name} MIG {index}", identity.driver_version or "", identity
            )
            for index, part in self._mig_handles(handle)
        ]

    def _mig_handles(self, handle: Any) -> Iterator[tuple[int, Any]]:
        nvml = self._nvml
        mode = self._told("nvmlDeviceGetMigMode", handle)
        if not mode or not mode[0]:
            return
        for index in range(self._told("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            try:
                yield index, nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
            except nvml.NVMLError as error:
                if error.value != NOT_FOUND:  # there are gaps
                    return

    def _layout_now(self) -> tuple[object, ...]:
        """Return the number of GPUs, and the ids of the MIG instances of each."""
        nvml = self._nvml
        try:
            count = nvml.nvmlDeviceGetCount()
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        except nvml.NVMLError:
            return self._layout  # the reading itself says what is wrong
        parts = [
            tuple(self._told("nvmlDeviceGetUUID", part) for _, part in self._mig_handles(handle))
            for handle in handles
        ]
        return (count, *parts)

    def _told(self, function: str, handle: Any) -> Any:
        """Return what a device says of itself; None if it does not."""
        try:
            return getattr(self._nvml, function)(handle)
        except self._nvml.NVMLError:
            return None


class NvmlDevice:
    """One GPU or MIG instance.

    Args:
        nvml: The module `pynvml`.
        handle: NVML's handle of the device.
        identity: Which one it is.
    """

    def __init__(self, nvml: Any, handle: Any, identity: GpuIdentity) -> None:
        self._nvml = nvml
        self._handle = handle
        self._identity = identity
        self._unsupported: set[tuple[object, ...]] = set()
        self._answers = 0
        self._slow = GpuDeviceStats(identity)
        self._received = WrappingCounter()
        self._transmitted = WrappingCounter()

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
            GpuLostError: If the device is gone.
            GpuUnavailableError: If the driver is, or answers nothing.
        """
        self._answers = 0
        total, used = self._memory()
        remapped = self._ask("nvmlDeviceGetRemappedRows")
        fast = GpuDeviceStats(
            self._identity,
            state=self._state(remapped),
            utilization=self._utilization(),
            memory_total=total,
            memory_used=used,
            temperature=self._temperature(),
            power=_divided(self._ask("nvmlDeviceGetPowerUsage"), 1000),
            power_limit=_divided(self._ask("nvmlDeviceGetEnforcedPowerLimit"), 1000),
            errors=self._errors(remapped),
            clocks=self._clocks(),
            process_memory=self._process_memory(),
        )
        if not self._answers:
            raise GpuUnavailableError(_SILENT)
        if slow:
            self._slow = self._read_slow()
        return self._with_slow(fast)

    # The figures that cost microseconds.

    def _utilization(self) -> dict[str, float] | None:
        rates = self._ask("nvmlDeviceGetUtilizationRates")
        if rates is None:
            return None
        return {"general": rates.gpu / 100, "memory": rates.memory / 100}

    def _memory(self) -> tuple[int | None, int | None]:
        info = self._ask("nvmlDeviceGetMemoryInfo", _MEMORY_V2)
        if info is None:
            info = self._ask("nvmlDeviceGetMemoryInfo")
        return (None, None) if info is None else (info.total, info.used)

    def _temperature(self) -> float | None:
        degrees = self._ask("nvmlDeviceGetTemperatureV", 0)
        if degrees is None:
            degrees = self._ask("nvmlDeviceGetTemperature", 0)
        return _divided(degrees, 1)

    def _clocks(self) -> dict[str, float] | None:
        asked = {
            "sm": self._ask("nvmlDeviceGetClockInfo", _SM_CLOCK),
            "memory": self._ask("nvmlDeviceGetClockInfo", _MEMORY_CLOCK),
        }
        return {name: mhz * 1e6 for name, mhz in asked.items() if mhz is not None} or None

    def _errors(self, remapped: tuple[int, int, int, int] | None) -> dict[str, int] | None:
        counts = {
            kind: self._ask("nvmlDeviceGetTotalEccErrors", code, _SINCE_DRIVER_LOAD)
            for kind, code in (("corrected", _CORRECTED), ("uncorrected", _UNCORRECTED))
        }
        if remapped is not None:
            counts["remapped_row_corrected"], counts["remapped_row_uncorrected"] = remapped[:2]
        return {kind: count for kind, count in counts.items() if count is not None} or None

    def _state(self, remapped: tuple[int, int, int, int] | None) -> str | None:
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # its name in drivers before 535
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        if reasons is None and remapped is None:
            return None
        _, _, pending, failure = remapped or (0, 0, 0, 0)
        if failure:
            return PREDICTED_FAILURE  # a bad row could not be replaced
        return DEGRADED if pending or (reasons or 0) & _SLOWDOWNS else OK

    def _process_memory(self) -> int | None:
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses") or ()
        pid = os.getpid()
        used = [one.usedGpuMemory for one in processes if one.pid == pid]
        known = [one for one in used if one is not None]
        return sum(known) if known else None

    # The figures that cost milliseconds.

    def _read_slow(self) -> GpuDeviceStats:
        return GpuDeviceStats(
            self._identity,
            energy=_divided(self._ask("nvmlDeviceGetTotalEnergyConsumption"), 1000),
            io=self._io(),
            utilization={
                task: found[0] / 100
                for task, found in (
                    ("encoder", self._ask("nvmlDeviceGetEncoderUtilization")),
                    ("decoder", self._ask("nvmlDeviceGetDecoderUtilization")),
                )
                if found is not None
            },
        )

    def _with_slow(self, fast: GpuDeviceStats) -> GpuDeviceStats:
        slow = self._slow
        utilization = {**(fast.utilization or {}), **(slow.utilization or {})}
        return fast._replace(energy=slow.energy, io=slow.io, utilization=utilization or None)

    def _io(self) -> dict[str, int] | None:
        values = self._ask("nvmlDeviceGetFieldValues", (_PCIE_TRANSMITTED, _PCIE_RECEIVED))
        if values is None:
            return None
        counted: dict[str, int] = {}
        for direction, counter, value in (
            ("transmit", self._transmitted, values[0]),
            ("receive", self._received, values[1]),
        ):
            if value.nvmlReturn == 0:
                narrow = value.valueType == _UNSIGNED_INT
                raw = value.value.uiVal if narrow else value.value.ullVal
                counted[direction] = counter.add(raw, 32 if narrow else 64)
        return counted or None

    # Asking.

    def _ask(self, function: str, *arguments: object) -> Any:
        """Return what a call answers; None if it does not, or is known not to."""
        key = (function, *arguments)
        if key in self._unsupported:
            return None
        try:
            answer = getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError as error:
            code = error.value
            if code in _DEVICE_IS_GONE:
                raise GpuLostError(_problem_of(code)) from None
            if code in _DRIVER_IS_GONE:
                raise GpuUnavailableError(_problem_of(code)) from None
            if code in _NEVER:
                self._unsupported.add(key)
            return None
        self._answers += 1
        return answer


class WrappingCounter:
    """Adds up a counter of the driver that begins again at 0 when it is full."""

    def __init__(self) -> None:
        self.total = 0
        self._last: int | None = None

    def add(self, raw: int, bits: int) -> int:
        """Take a reading and return the total; the first reading is the total so far.

        Args:
            raw: What the driver's counter says.
            bits: How wide it is.
        """
        if self._last is None:
            self.total = raw
        elif raw >= self._last:
            self.total += raw - self._last
        else:
            # Some 64-bit answers carry a 32-bit counter.
            width = 32 if self._last < 2**32 else bits
            self.total += raw - self._last + 2**width
        self._last = raw
        return self.total


def _divided(value: int | None, by: int) -> float | None:
    return None if value is None else value / by
