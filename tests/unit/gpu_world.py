"""A GPU backend of no make, whose devices answer until they have something to raise."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from periscope_otel.gauges.gpu import (
    OK,
    FoundGpus,
    GpuLostError,
    GpuReader,
    GpuSilentError,
    RefusedGpu,
)
from periscope_otel.gauges.stats import GpuDeviceStats, GpuIdentity, GpuProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

GONE = GpuProblem("gone", "it is gone", "bring it back")
SILENT = GpuProblem("silent", "it says nothing", "talk to it")
DRIVER_SILENT = GpuProblem("silent_driver", "nothing is said", "talk to it")
LOST = GpuLostError(GONE)
SAYS_NOTHING = GpuSilentError(SILENT, DRIVER_SILENT)


class Device:
    """A GPU that answers until it has something to raise."""

    def __init__(self, name: str, parent: str | None = None) -> None:
        self.identity = GpuIdentity(id=name, name=name.upper(), vendor="AMD", parent=parent)
        self.error: Exception | None = None
        self.meanwhile: Callable[[], None] = bool
        self.asked: list[bool] = []

    def read(self, *, slow: bool) -> GpuDeviceStats:
        self.asked.append(slow)
        self.meanwhile()
        if self.error is not None:
            raise self.error
        return GpuDeviceStats(self.identity, state=OK, temperature=40.0)


class Backend:
    """A driver with these devices, until there is something to raise."""

    def __init__(self, *devices: Device) -> None:
        self.devices = list(devices)
        self.refused: list[RefusedGpu] = []
        self.error: Exception | None = None
        self.calls: list[str] = []
        self.other = False
        self.not_to_touch: list[set[str]] = []
        self.meanwhile: Callable[[], None] = bool

    def open(self) -> FoundGpus:
        self.calls.append("open")
        self.other = False
        self.meanwhile()
        if self.error is not None:
            raise self.error
        return FoundGpus(list(self.devices), list(self.refused))

    def changed(self, lost: Collection[str]) -> bool:
        self.not_to_touch.append(set(lost))
        return self.other

    def close(self) -> None:
        self.calls.append("close")

    def after_fork(self) -> None:
        self.calls.append("after_fork")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def states(reader: GpuReader, *, slow: bool = False) -> dict[str, Any]:
    return {one.identity.id: one.state for one in reader.read(slow).devices}


def reason(reader: GpuReader) -> str | None:
    problem = reader.read(slow=False).problem
    return None if problem is None else problem.reason


def opens(reader: GpuReader, backend: Backend, clock: Clock, seconds: int) -> list[int]:
    """Read every second, and return the seconds in which the backend was opened."""
    found = []
    for second in range(seconds):
        before = backend.calls.count("open")
        reader.read(slow=False)
        if backend.calls.count("open") > before:
            found.append(second)
        clock.now += 1
    return found


def pauses(moments: list[int]) -> list[int]:
    return [later - earlier for earlier, later in pairwise(moments)]
