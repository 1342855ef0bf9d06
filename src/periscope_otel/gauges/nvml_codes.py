"""NVML's return codes (nvml.h, nvmlReturn_t): what each means for us, and what helps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from periscope_otel.gauges.stats import GpuProblem

if TYPE_CHECKING:
    from collections.abc import Mapping

UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION = 1, 2, 3, 4
DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, FUNCTION_NOT_FOUND, GPU_IS_LOST = 9, 12, 13, 15
RESET_REQUIRED, VERSION_MISMATCH, ARGUMENT_VERSION_MISMATCH, DEPRECATED = 16, 18, 25, 26

UNSUPPORTED = {
    INVALID_ARGUMENT,  # MemoryInfo v2 on WSL
    NOT_SUPPORTED,
    NO_PERMISSION,
    FUNCTION_NOT_FOUND,
    ARGUMENT_VERSION_MISMATCH,
    DEPRECATED,
}
"""What a call answers that need not be made again soon on this device."""

DEVICE_IS_GONE = {GPU_IS_LOST, RESET_REQUIRED}
DRIVER_IS_GONE = {UNINITIALIZED, DRIVER_NOT_LOADED, VERSION_MISMATCH}

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
        "the GPU has fallen off the bus, or is otherwise inaccessible",
        "look for Xid errors in the kernel's log; reset the GPU or restart the machine",
    ),
    RESET_REQUIRED: GpuProblem(
        "reset_required", "the GPU needs a reset", "nvidia-smi --gpu-reset, or restart the machine"
    ),
    VERSION_MISMATCH: GpuProblem(
        "lib_rm_version_mismatch",
        "the NVIDIA library and kernel module are of different versions",
        "restart the machine, or reload the kernel module: the driver was updated",
    ),
}
NO_DEVICE = GpuProblem(
    "no_device", "the NVIDIA driver has no device", "give the container a GPU; see nvidia-smi -L"
)
NOT_READABLE = GpuProblem(
    "not_readable",
    "NVML gives an answer that cannot be read",
    "update the NVIDIA driver, and the package nvidia-ml-py",
)
DRIVER_IS_SILENT = GpuProblem(
    "no_answer",
    "the NVIDIA driver answers nothing any more",
    "in a container: restart it (a reload of systemd takes its devices away)",
)
BACKEND_NOT_INSTALLED = GpuProblem(
    "backend_not_installed", "pynvml is not installed", "pip install nvidia-ml-py"
)


def problem_of(code: int) -> GpuProblem:
    """Return what a code means, and what helps."""
    return _PROBLEMS.get(code) or GpuProblem(
        f"nvml_{code}",
        f"NVML answers {code}",
        "see nvmlReturn_t in NVIDIA's documentation; in a container, restart it",
    )


def silence_of(code: int) -> GpuProblem:
    """Return the problem of a device all of whose calls fail, this code being the last."""
    return GpuProblem(
        "no_answer",
        f"none of its calls works, the last with NVML's code {code}",
        "look for Xid errors in the kernel's log; reset the GPU, or restart the container",
    )
