"""Locks between processes that the kernel gives back when their holder dies.

They are POSIX record locks: a process that ends in whatever way loses them, a forked child does not
inherit them, and they hold between containers that share the folder. Closing any descriptor of the
file gives the lock up, so a file is opened once for each lock and kept open.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class ProcessLock:
    """A lock on a file, held by one process at a time.

    Args:
        path: The file; made if it is not there, readable by its user alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._pid = 0

    @property
    def held(self) -> bool:
        """Whether this process has it."""
        return self._descriptor is not None and self._pid == os.getpid()

    def acquire(self) -> bool:
        """Take it if nobody has it; returns whether this process has it now."""
        if self.held:
            return True
        descriptor = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._descriptor, self._pid = descriptor, os.getpid()
        return True

    def in_place(self) -> bool:
        """Whether the locked file is still the one at its path; somebody may have removed it."""
        if self._descriptor is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except OSError:
            return False

    def release(self) -> None:
        """Give it up."""
        if self.held and self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None
