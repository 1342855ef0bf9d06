"""GPUs: found, read, lost and found again, whatever the backend is that talks to the driver.

A driver that is missing, or that loses a device, is normal here: its figures are absent (never
zero), one log line says why and what helps, and it is looked for again with growing pauses. A
device that was seen and is gone is told as `failed` for as long as it is.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from periscope_otel.gauges.gpu_health import BackOff, Health
from periscope_otel.gauges.stats import GpuDeviceStats, GpuProblem, GpuStats

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from periscope_otel.gauges.stats import GpuIdentity

OK, DEGRADED, PREDICTED_FAILURE, FAILED = "ok", "degraded", "predicted_failure", "failed"
STATES = (OK, DEGRADED, PREDICTED_FAILURE, FAILED)
"""States of a device, by the semantic conventions."""

NOT_INSTALLED = ("library_not_found", "backend_not_installed")
"""Reasons that are no fault: most machines have no GPU."""

_MISSING = GpuProblem(
    "gpu_is_missing",
    "the driver does not list it any more",
    "look for Xid errors in the kernel's log; reset the GPU or restart the machine",
)


class GpuUnavailableError(Exception):
    """No GPU can be read at all: it is the driver that is missing, or does not work.

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


class GpuSilentError(GpuLostError):
    """A GPU answers nothing; where all are silent it is the driver that is gone.

    Args:
        problem: What is wrong with the device.
        of_driver: What is wrong with the driver if all devices are silent.
    """

    def __init__(self, problem: GpuProblem, of_driver: GpuProblem) -> None:
        super().__init__(problem)
        self.of_driver = of_driver


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


class RefusedGpu(NamedTuple):
    """A GPU that is there and cannot be opened."""

    name: str
    """Short, such as `GPU 1`."""
    id: str | None
    """The `id` of its identity, where that is known from before."""
    problem: GpuProblem


class FoundGpus(NamedTuple):
    """What a backend has found."""

    devices: Sequence[GpuDevice]
    """Each GPU, followed by its parts."""
    refused: Sequence[RefusedGpu] = ()


class GpuBackend(Protocol):
    """What knows how to talk to one vendor's driver. Its calls come from one thread."""

    def open(self) -> FoundGpus:
        """Return the devices that there are now, and those that cannot be opened.

        Raises:
            GpuUnavailableError: If there is no driver, or it cannot be used.
        """
        ...

    def changed(self, lost: Collection[str]) -> bool:
        """Return whether `open` would return other devices than the last time.

        Args:
            lost: The ids of devices that must not be touched.
        """
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

    def __init__(self, backend: GpuBackend, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._clock = clock
        self._is_open = False
        self._devices: tuple[GpuDevice, ...] = ()
        self._known: Mapping[str, GpuIdentity] = {}
        """All GPUs that have been seen, by id; parts of them come and go, so without."""
        self._lost: Mapping[str, GpuIdentity] = {}
        """GPUs that are told as failed. Replaced and never changed: other threads read it."""
        self._reading: GpuIdentity | None = None
        """The device that is asked at this moment."""
        self._driver = Health(clock, "GPU figures", NOT_INSTALLED)
        self._health: dict[str, Health] = {}
        """Of GPUs, by id; of those that were never open, by name."""
        self._refused: tuple[str, ...] = ()
        """The keys of those that cannot be opened now."""
        self._parts: dict[str, BackOff] = {}
        self._silent_parts: set[str] = set()

    def read(self, slow: bool) -> GpuStats:
        """Return what all devices tell; the lost ones are `failed` and tell nothing else."""
        opened = self._must_open(slow) and self._open()
        taken = [] if self._driver.problem else self._read_devices(slow or opened)
        taken += [GpuDeviceStats(one, state=FAILED) for one in self._lost.values()]
        return GpuStats(time.time(), tuple(taken), self._problem())

    def left_behind(self) -> GpuStats:
        """Return what is known while a reading hangs: the device that is asked is `failed`.

        Others are, if they were before; all are, if no device is asked, but the driver itself.
        Called by other threads.
        """
        asked = self._reading
        failed = self._known if asked is None else {**self._lost, asked.id: asked}
        about = "" if asked is None else f" about {asked.name} ({asked.id})"
        problem = GpuProblem(
            "driver_hangs",
            f"a call to the GPU driver{about} does not return",
            "look for Xid errors in the kernel's log; the driver or the machine needs a restart",
        )
        told = tuple(GpuDeviceStats(one, state=FAILED) for one in failed.values())
        return GpuStats(time.time(), told, problem)

    def close(self) -> None:
        """Let go of the driver."""
        if self._is_open:
            self._is_open = False
            self._devices = ()
            self._backend.close()

    def after_fork(self) -> None:
        """Start anew in the child: handles of the parent do not work there."""
        self._is_open = False
        self._devices = ()
        self._reading = None
        for one in (self._driver, *self._health.values(), *self._parts.values()):
            one.try_now()
        self._backend.after_fork()

    # Finding.

    def _must_open(self, slow: bool) -> bool:
        if self._driver.problem is not None:
            return self._driver.is_due
        if not self._is_open:
            return True
        if any(one.is_due for one in (*self._health.values(), *self._parts.values())):
            return True
        return slow and self._backend.changed(self._lost.keys())

    def _open(self) -> bool:
        """Open the backend, anew where it is open; returns whether that worked."""
        self.close()
        try:
            found = self._backend.open()
        except GpuUnavailableError as error:
            problem = error.problem
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not be tried at once
            problem = _unexpected(error)
        else:
            self._is_open = True
            self._driver.answer()
            self._take(found)
            return True
        self._lose_driver(problem)
        return False

    def _lose_driver(self, problem: GpuProblem) -> None:
        """Tell GPUs that were there as failed, for as long as nobody can reach them."""
        self._lost = self._known
        self._driver.fail_with(problem)

    def _take(self, found: FoundGpus) -> None:
        """Use these devices from now on; those that have been seen and are missing are lost."""
        self._devices = tuple(found.devices)
        identities = [device.identity for device in found.devices]
        whole = {one.id: one for one in identities if one.parent is None}
        self._known = {**self._known, **whole}
        self._lost = {id_: one for id_, one in self._known.items() if id_ not in whole}
        refused = {one.id or one.name: one for one in found.refused}
        for identity in whole.values():
            self._take_health(identity, refused)
        self._note_missing(refused)
        self._forget_parts({one.id for one in identities})

    def _take_health(self, identity: GpuIdentity, refused: Collection[str]) -> None:
        """Keep a GPU's health by its id, also if it is one that was refused until now."""
        until_now = None if identity.name in refused else self._health.pop(identity.name, None)
        if identity.id not in self._health:
            self._health[identity.id] = until_now or Health(self._clock, "")
        self._health[identity.id].missing = f"figures of {identity.name} ({identity.id})"

    def _note_missing(self, refused: Mapping[str, RefusedGpu]) -> None:
        """Note which GPUs cannot be had, and why."""
        for id_ in self._lost:
            one = refused.get(id_)
            self._health[id_].fail_with(_MISSING if one is None else one.problem)
        self._refused = tuple(key for key in refused if key not in self._lost)
        for key in self._refused:
            if key not in self._health:
                self._health[key] = Health(self._clock, f"figures of {refused[key].name}")
            self._health[key].fail_with(refused[key].problem)
        kept = {*self._known, *self._refused}
        self._health = {key: one for key, one in self._health.items() if key in kept}

    def _forget_parts(self, found: Collection[str]) -> None:
        """Forget the parts that are not there any more, and ask the others again."""
        self._parts = {id_: one for id_, one in self._parts.items() if id_ in found}
        self._silent_parts = set()

    # Reading.

    def _read_devices(self, slow: bool) -> list[GpuDeviceStats]:
        taken: list[GpuDeviceStats] = []
        silent: dict[str, tuple[GpuIdentity, GpuSilentError]] = {}
        for device in self._devices:
            identity = device.identity
            if self._is_out(identity) or identity.parent in silent:
                continue
            try:
                taken.append(self._read_device(device, slow))
            except GpuSilentError as error:
                silent[identity.id] = (identity, error)
            except GpuLostError as error:
                self._lose(identity, error.problem)
            except GpuUnavailableError as error:
                self._lose_driver(error.problem)
                return []
        self._judge(silent.values())
        return taken

    def _read_device(self, device: GpuDevice, slow: bool) -> GpuDeviceStats:
        identity = device.identity
        self._reading = identity
        try:
            stats = device.read(slow=slow)
        except (GpuLostError, GpuUnavailableError):
            raise
        except Exception as error:
            raise GpuLostError(_unexpected(error)) from error
        finally:
            self._reading = None
        self._health_of(identity).answer()
        return stats

    def _judge(self, silent: Collection[tuple[GpuIdentity, GpuSilentError]]) -> None:
        """Blame the silent devices, or the driver where all GPUs are silent."""
        whole = [error for identity, error in silent if identity.parent is None]
        if whole and len(whole) == sum(one.identity.parent is None for one in self._devices):
            self._lose_driver(whole[0].of_driver)
            return
        self._driver.answer()
        for identity, error in silent:
            self._lose(identity, error.problem)

    def _lose(self, identity: GpuIdentity, problem: GpuProblem) -> None:
        if identity.parent is None:
            self._lost = {**self._lost, identity.id: identity}
            self._health[identity.id].fail_with(problem)
        else:
            # Parts are made and removed as one likes: no fault, but the list of them is old.
            self._silent_parts.add(identity.id)
            self._health_of(identity).fail()

    def _is_out(self, identity: GpuIdentity) -> bool:
        lost = identity.id in self._lost or identity.parent in self._lost
        return lost or identity.id in self._silent_parts

    def _health_of(self, identity: GpuIdentity) -> BackOff:
        if identity.parent is None:
            return self._health[identity.id]
        return self._parts.setdefault(identity.id, BackOff(self._clock))

    def _problem(self) -> GpuProblem | None:
        """Return what is wrong now: with the driver, or else with the first device in trouble."""
        if self._driver.problem is not None:
            return self._driver.problem
        for key in (*self._lost, *self._refused):
            health = self._health[key]
            if health.problem is not None:
                message = f"no {health.missing}: {health.problem.message}"
                return health.problem._replace(message=message)
        return None


def _unexpected(error: Exception) -> GpuProblem:
    return GpuProblem(
        "unexpected_error",
        f"{type(error).__name__}: {error}"[:200],
        "update the driver, and the package that talks to it (nvidia-ml-py)",
    )
