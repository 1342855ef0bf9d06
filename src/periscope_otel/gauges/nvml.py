"""NVIDIA GPUs by NVML, through `pynvml` of the package nvidia-ml-py: which there are."""

from __future__ import annotations

import threading
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from periscope_otel.gauges.gpu import FoundGpus, GpuUnavailableError, RefusedGpu
from periscope_otel.gauges.nvml_codes import (
    BACKEND_NOT_INSTALLED,
    DRIVER_IS_GONE,
    NO_DEVICE,
    NOT_READABLE,
    problem_of,
)
from periscope_otel.gauges.nvml_device import NvmlDevice, PcieCounters
from periscope_otel.gauges.stats import GpuIdentity

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from periscope_otel.gauges.stats import GpuProblem

_Shape = tuple[str, bool, tuple[str, ...]]


class _Part(NamedTuple):
    """A MIG instance."""

    number: int
    """Which of its GPU's."""
    handle: Any
    id: str


class _Place(NamedTuple):
    """What there is at one of the indices by which NVML counts GPUs."""

    handle: Any
    id: str
    is_divided: bool
    parts: tuple[_Part, ...]

    @property
    def shape(self) -> _Shape:
        """What makes it another one when it changes."""
        return self.id, self.is_divided, tuple(part.id for part in self.parts)


class NvmlBackend:
    """NVIDIA's driver, by NVML.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        try:
            # Imported here, in the caller's thread, and not by the sampler's: a child that is
            # forked in the middle of an import waits for ever for the lock of that import.
            self._nvml: Any = import_module("pynvml")
        except ImportError:
            self._nvml = None
        self._clock = clock
        self._names = DeviceNames()
        self._counters: dict[str, PcieCounters] = {}
        self._layout: tuple[_Shape | None, ...] = ()
        """What was found at each index; None where that was refused."""
        self._ids: dict[int, str] = {}
        """Which GPU was seen last at each index."""
        self._refusals: tuple[type[Exception], ...] = (
            # What a pynvml lacks that is older than this code, or cannot decode.
            *(AttributeError, TypeError, UnicodeDecodeError),
            *(() if self._nvml is None else (self._nvml.NVMLError,)),
        )

    def open(self) -> FoundGpus:
        """Return all GPUs and, of those that are divided, the MIG instances.

        Returns:
            The devices, and the GPUs that are listed but cannot be used: lost ones, and those
            that this user has no permission for.

        Raises:
            GpuUnavailableError: If there is no driver, or it cannot be used.
        """
        if self._nvml is None:
            raise GpuUnavailableError(BACKEND_NOT_INSTALLED)
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise GpuUnavailableError(problem_of(error.value)) from None
        try:
            return self._find()
        except self._nvml.NVMLError as error:
            self.close()
            raise GpuUnavailableError(problem_of(error.value)) from None
        except BaseException:
            self.close()
            raise

    def changed(self, lost: Collection[str]) -> bool:
        """Return whether there are other GPUs or MIG instances than before.

        Args:
            lost: The ids of GPUs that must not be touched.
        """
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._refusals:
            return False  # the reading itself says what is wrong
        if count != len(self._layout):
            return True
        return any(
            self._shape_at(index) != before
            for index, before in enumerate(self._layout)
            if before is not None and before[0] not in lost
        )

    def close(self) -> None:
        """Let go of NVML; others in the process may still use it."""
        try:
            self._nvml.nvmlShutdown()
        except self._refusals:
            return  # it was not open any more

    def after_fork(self) -> None:
        """Forget the parent's lock, which another of its threads may have held."""
        if self._nvml is not None and hasattr(self._nvml, "libLoadLock"):
            self._nvml.libLoadLock = threading.Lock()

    # Finding.

    def _find(self) -> FoundGpus:
        count = self._nvml.nvmlDeviceGetCount()
        if not count:
            raise GpuUnavailableError(NO_DEVICE)
        driver = self._told("nvmlSystemGetDriverVersion")
        places: dict[int, _Place] = {}
        problems: dict[int, GpuProblem] = {}
        for index in range(count):
            try:
                places[index] = self._place_at(index)
            except self._refusals as error:
                problems[index] = self._problem_of(error)
        self._layout = tuple(
            places[index].shape if index in places else None for index in range(count)
        )
        refused = [
            RefusedGpu(f"GPU {index}", self._id_at(index, places), problem)
            for index, problem in problems.items()
        ]
        self._ids.update({index: place.id for index, place in places.items()})
        devices = [
            device
            for index, place in places.items()
            for device in self._devices_of(index, place, driver)
        ]
        return FoundGpus(devices, refused)

    def _problem_of(self, error: Exception) -> GpuProblem:
        """Return why a GPU is refused.

        Raises:
            GpuUnavailableError: If it is the driver that refuses.
        """
        code = getattr(error, "value", None)
        if code is None:
            return NOT_READABLE
        if code in DRIVER_IS_GONE:
            raise GpuUnavailableError(problem_of(code))
        return problem_of(code)

    def _id_at(self, index: int, places: dict[int, _Place]) -> str | None:
        """Return which GPU is refused: the one that was there, unless it has moved."""
        before = self._ids.get(index)
        return None if before in {place.id for place in places.values()} else before

    def _place_at(self, index: int) -> _Place:
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        mode = self._told("nvmlDeviceGetMigMode", handle)
        is_divided = bool(mode and mode[0])
        return _Place(
            handle,
            self._nvml.nvmlDeviceGetUUID(handle),
            is_divided,
            tuple(self._parts_of(handle)) if is_divided else (),
        )

    def _parts_of(self, handle: Any) -> Iterator[_Part]:
        for number in range(self._told("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            try:
                part = self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
                yield _Part(number, part, self._nvml.nvmlDeviceGetUUID(part))
            except self._refusals:
                continue  # there are gaps, and what is just being removed

    def _shape_at(self, index: int) -> _Shape | None:
        try:
            return self._place_at(index).shape
        except self._refusals:
            return None

    # Devices.

    def _devices_of(self, index: int, place: _Place, driver: str | None) -> Iterator[NvmlDevice]:
        whole = GpuIdentity(
            id=place.id,
            name=self._names.of_gpu(place.id, index),
            model=self._told("nvmlDeviceGetName", place.handle),
            vendor="NVIDIA",
            serial_number=self._told("nvmlDeviceGetSerial", place.handle),
            driver_version=driver,
            firmware_version=self._told("nvmlDeviceGetVbiosVersion", place.handle),
        )
        yield self._device(place.handle, whole)
        for part in place.parts:
            yield self._device(
                part.handle,
                whole._replace(
                    id=part.id,
                    name=self._names.of_part(part.id, f"{whole.name} MIG {part.number}"),
                    model=self._told("nvmlDeviceGetName", part.handle),
                    firmware_version=None,
                    parent=whole.id,
                ),
            )

    def _device(self, handle: Any, identity: GpuIdentity) -> NvmlDevice:
        counters = PcieCounters()
        if identity.parent is None:  # parts have none, and come and go
            counters = self._counters.setdefault(identity.id, counters)
        return NvmlDevice(self._nvml, handle, identity, counters, self._clock)

    def _told(self, function: str, *arguments: Any) -> Any:
        """Return what the driver or a device says of itself; None if it does not."""
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._refusals:
            return None


class DeviceNames:
    """Gives each device a short name, and the same one for as long as the process lives.

    NVML's own indices move when a GPU goes, and one series would then be two.
    """

    def __init__(self) -> None:
        self._gpus: dict[str, str] = {}
        self._parts: dict[str, str] = {}

    def of_gpu(self, id_: str, index: int) -> str:
        """Return the name of a GPU that is found at this index."""
        while id_ not in self._gpus:
            wanted = f"GPU {index}"
            if wanted not in self._gpus.values():
                self._gpus[id_] = wanted
            index += 1
        return self._gpus[id_]

    def of_part(self, id_: str, wanted: str) -> str:
        """Return the name of a part, which it takes over from one that was removed."""
        if id_ not in self._parts:
            self._parts = {other: name for other, name in self._parts.items() if name != wanted}
            self._parts[id_] = wanted
        return self._parts[id_]
