"""GPUs: found, read, lost and found again, whatever the backend is that talks to the driver.

A driver that is missing, or that loses a device, is normal here: its figures are absent (never
zero), one log line says why and what helps, and it is looked for again with growing pauses.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

from periscope_otel.gauges.stats import GpuDeviceStats, GpuProblem, GpuStats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from periscope_otel.gauges.stats import GpuIdentity

logger = logging.getLogger("periscope_otel")

OK, DEGRADED, PREDICTED_FAILURE, FAILED = "ok", "degraded", "predicted_failure", "failed"
STATES = (OK, DEGRADED, PREDICTED_FAILURE, FAILED)
"""States of a device, by the semantic conventions."""

FIRST_RETRY = 5.0
"""Seconds until devices are looked for again; doubled each time."""
LAST_RETRY = 300.0
"""Seconds between two looks at most."""

NOT_INSTALLED = ("library_not_found", "backend_not_installed")
"""Reasons that are no fault: most machines have no GPU."""


class GpuUnavailableError(Exception):
    """No GPU can be read at all.

    Args:
        problem: Why, and what helps.
    """

    def __init__(self, problem: GpuProblem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class GpuLostError(Exception):
    """One GPU does not answer any more, and must not be asked again before it is found anew.

    Args:
        problem: Why, and what helps.
    """

    def __init__(self, problem: GpuProblem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class GpuDevice(Protocol):
    """One GPU, or a part of one that works like a GPU."""

    @property
    def identity(self) -> GpuIdentity:
        """Which one it is."""
        ...

    def read(self, *, slow: bool) -> GpuDeviceStats:
        """Return its figures.

        Args:
            slow: Whether to take the figures that cost milliseconds too. Without, those taken
                last are given again.

        Raises:
            GpuLostError: If the device is gone.
            GpuUnavailableError: If the driver is.
        """
        ...


class GpuBackend(Protocol):
    """What knows how to talk to one vendor's driver. Its calls come from one thread."""

    def open(self) -> Sequence[GpuDevice]:
        """Return the devices that there are now.

        Raises:
            GpuUnavailableError: If there is no driver, or it cannot be used.
        """
        ...

    def changed(self) -> bool:
        """Return whether `open` would return other devices than the last time."""
        ...

    def close(self) -> None:
        """Let go of the driver. Must not raise."""

    def after_fork(self) -> None:
        """Forget, in the child of a fork, what does not outlive one; `open` comes next."""


class GpuReader:
    """Reads all GPUs of a backend, and finds again what it has lost.

    Args:
        backend: Talks to the driver.
        clock: Monotonic seconds.
    """

    name = "gpu"
    may_hang = True

    def __init__(self, backend: GpuBackend, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._clock = clock
        self._devices: tuple[GpuDevice, ...] | None = None
        self._known: dict[str, GpuIdentity] = {}
        """All devices that have been seen, by id; parts of a device come and go, so without."""
        self._lost: dict[str, GpuIdentity] = {}
        self._problem: GpuProblem | None = None
        self._retry_at: float | None = 0.0
        """When to look for devices; None while there is no need to."""
        self._pause = FIRST_RETRY

    def read(self, slow: bool) -> GpuStats:
        """Return what all devices tell; the lost ones are `failed` and tell nothing else."""
        slow = self._look_again(slow) or slow
        taken: list[GpuDeviceStats] = []
        for device in self._devices or ():
            if device.identity.id not in self._lost:
                taken += self._read_device(device, slow)
        taken += [GpuDeviceStats(one, state=FAILED) for one in self._lost.values()]
        if self._devices and self._retry_at is None:
            self._all_is_well()
        return GpuStats(time.time(), tuple(taken), self._problem)

    def left_behind(self) -> GpuStats:
        """Return what is known while a reading hangs: every device is `failed`.

        Called by other threads.
        """
        problem = GpuProblem(
            "driver_hangs",
            "a call to the GPU driver does not return",
            "look for Xid errors in the kernel's log; the driver or the machine needs a restart",
        )
        failed = tuple(GpuDeviceStats(one, state=FAILED) for one in tuple(self._known.values()))
        return GpuStats(time.time(), failed, problem)

    def close(self) -> None:
        """Let go of the driver."""
        if self._devices is not None:
            self._devices = None
            self._retry_at = 0.0
            self._backend.close()

    def after_fork(self) -> None:
        """Start anew in the child: handles of the parent do not work there."""
        self._devices = None
        self._lost = {}
        self._retry_at = 0.0
        self._pause = FIRST_RETRY
        self._backend.after_fork()

    def _look_again(self, slow: bool) -> bool:
        """Open the backend where that is due; returns whether it was opened."""
        due = self._retry_at is not None and self._clock() >= self._retry_at
        if not due and not (slow and self._devices is not None and self._backend.changed()):
            return False
        self.close()
        try:
            self._take(self._backend.open())
        except GpuUnavailableError as error:
            self._lost = {}
            self._say(error.problem)
            self._retry_later()
            return False
        return True

    def _take(self, devices: Sequence[GpuDevice]) -> None:
        """Use these devices from now on; those that have been seen and are missing are lost."""
        self._devices = tuple(devices)
        found = {device.identity.id for device in devices}
        self._lost = {id_: one for id_, one in self._known.items() if id_ not in found}
        for device in devices:
            if device.identity.parent is None:
                self._known.setdefault(device.identity.id, device.identity)
        self._retry_at = None
        if self._lost:
            self._retry_later()

    def _all_is_well(self) -> None:
        """Every device has answered."""
        self._pause = FIRST_RETRY
        if self._problem is not None:
            self._problem = None
            logger.info("GPU figures are back: %d devices answer", len(self._devices or ()))

    def _read_device(self, device: GpuDevice, slow: bool) -> list[GpuDeviceStats]:
        try:
            stats = device.read(slow=slow)
        except GpuLostError as error:
            self._lost[device.identity.id] = device.identity
            self._say(error.problem)
            self._retry_later()
            return []
        except GpuUnavailableError as error:
            self._devices = ()
            self._lost = {}
            self._say(error.problem)
            self._retry_later()
            return []
        return [stats]

    def _retry_later(self) -> None:
        self._retry_at = self._clock() + self._pause
        self._pause = min(2 * self._pause, LAST_RETRY)

    def _say(self, problem: GpuProblem) -> None:
        """Log a problem once, for as long as it lasts."""
        known = self._problem is not None and self._problem.reason == problem.reason
        self._problem = problem
        if known:
            return
        level = logging.INFO if problem.reason in NOT_INSTALLED else logging.WARNING
        logger.log(
            level,
            "no GPU figures: %s (%s). What helps: %s",
            problem.message,
            problem.reason,
            problem.remedy,
        )
