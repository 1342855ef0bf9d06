"""For how long the system and this process run, by the clock that does not stop when it sleeps."""

from __future__ import annotations

import os
import time
from pathlib import Path


def system_age() -> float | None:
    """Return the seconds since the system was started; None where it does not tell."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)  # Linux's
    return None if clock is None else time.clock_gettime(clock)


def process_age(proc: Path = Path("/proc")) -> float | None:
    """Return the seconds since this process was started; None where the system does not tell.

    Args:
        proc: Where the kernel tells about processes.
    """
    system = system_age()
    try:
        told = (proc / "self/stat").read_bytes()
        # The program's name, in parentheses, may have blanks and parentheses in it.
        began = int(told[told.rindex(b")") + 1 :].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    return None if system is None else max(0.0, system - began)
