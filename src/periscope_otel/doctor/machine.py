"""The host and its GPUs: whether they can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from periscope_otel.doctor.finding import Finding, bounded, broken, off, ok, warning
from periscope_otel.gauges.gpu import (
    DEGRADED,
    FAILED,
    NOT_INSTALLED,
    PREDICTED_FAILURE,
    GpuLostError,
    GpuUnavailableError,
)
from periscope_otel.gauges.host import HostReader
from periscope_otel.gauges.nvml import NvmlBackend
from periscope_otel.settings import GAUGE_GPU

if TYPE_CHECKING:
    from collections.abc import Iterator

    from periscope_otel.gauges.gpu import GpuDevice, RefusedGpu
    from periscope_otel.gauges.stats import GpuProblem
    from periscope_otel.settings import Settings

_STATES: Final = {
    DEGRADED: (
        "is slowed down by heat, a power brake or a fault",
        "nvidia-smi -q -d PERFORMANCE says which",
    ),
    PREDICTED_FAILURE: ("has memory rows that could not be replaced", "have the GPU exchanged"),
    FAILED: ("does not answer", "look for Xid errors in the kernel's log; restart the machine"),
}


def host_findings() -> Iterator[Finding]:
    """Say what there is of the host."""
    stats = HostReader().read(slow=True)
    memory, limits = stats.memory, stats.container
    told = f"{stats.cpu_count or 'unknown'} CPUs"
    if memory is not None:
        told += f", {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB of memory available"
    if limits.cpus is not None:
        told += f", at most {limits.cpus:g} CPUs for this container"
    if limits.memory is not None:
        told += f", at most {limits.memory / 1e9:.1f} GB for this container"
    yield ok("host.figures", told)


def gpu_findings(settings: Settings) -> Iterator[Finding]:
    """Say which GPUs there are, and what keeps them from being read. May hang with the driver."""
    backend = NvmlBackend()
    try:
        found = backend.open()
    except GpuUnavailableError as error:
        yield _of_problem(settings, error.problem)
        return
    try:
        refused = [_of_refused(settings, one) for one in found.refused]
        devices = [_of_device(settings, one) for one in found.devices]
        yield from bounded([*refused, *devices])
    finally:
        backend.close()


def hanging_gpu(settings: Settings, timeout: float) -> Finding:
    """Return the finding that the driver does not answer in time."""
    message = f"a call to the GPU driver has not returned within {timeout:g} s"
    return _unless_asked_for(settings, message, "look for Xid errors in the kernel's log")


def _of_device(settings: Settings, device: GpuDevice) -> Finding:
    identity = device.identity
    named = " ".join(filter(None, (identity.name, identity.model, f"({identity.id})")))
    try:
        stats = device.read(slow=True)
    except (GpuLostError, GpuUnavailableError) as error:
        problem = error.problem
        return _unless_asked_for(settings, f"{named}: {problem.message}", problem.remedy)
    if stats.state in _STATES:
        message, remedy = _STATES[stats.state]
        make = warning if stats.state == DEGRADED else broken
        return make("gpu.devices", f"{named} {message}", remedy)
    facts = [f"driver {identity.driver_version or 'unknown'}"]
    if stats.temperature is not None:
        facts.append(f"{stats.temperature:.0f} °C")
    if stats.memory_used is not None and stats.memory_total is not None:
        facts.append(
            f"{stats.memory_used / 1e9:.1f} of {stats.memory_total / 1e9:.1f} GB of memory used"
        )
    return ok("gpu.devices", f"{named}: {', '.join(facts)}")


def _of_refused(settings: Settings, gpu: RefusedGpu) -> Finding:
    named = " ".join(filter(None, (gpu.name, gpu.id and f"({gpu.id})")))
    return _unless_asked_for(settings, f"{named}: {gpu.problem.message}", gpu.problem.remedy)


def _of_problem(settings: Settings, problem: GpuProblem) -> Finding:
    if problem.reason in NOT_INSTALLED:
        return off("gpu.devices", problem.message, problem.remedy)
    return _unless_asked_for(settings, problem.message, problem.remedy)


def _unless_asked_for(settings: Settings, message: str, remedy: str) -> Finding:
    if GAUGE_GPU in settings.gauges:
        return broken("gpu.devices", message, remedy)
    return off("gpu.devices", f"{message} (GPU gauges are not asked for)", remedy)
