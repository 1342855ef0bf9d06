"""Which disks and network interfaces stand for hardware, and which are made of others."""

from __future__ import annotations

import errno
import os
import re
from typing import Final

_MADE_OF_OTHERS: Final = re.compile(r"/devices/virtual/block/(?:loop|z?ram|dm-|md|zd|nbd)")
"""Where the kernel keeps disks that are none. Not all that it calls virtual are: an NVMe disk with
several paths to it is under `devices/virtual/nvme-subsystem`."""
_IN_MEMORY: Final = re.compile(r"(?:loop|z?ram)\d")
_MOST_KNOWN: Final = 1024
"""Names that are remembered between two looks."""


class DeviceClasses:
    """Tells devices by their names; what it has found counts until it looks again.

    Args:
        sys: Where the kernel lists devices.
    """

    def __init__(self, sys: str = "/sys") -> None:
        self._block = f"{sys}/block"
        self._net = f"{sys}/class/net"
        self._disks: dict[str, bool] = {}
        self._adapters: dict[str, bool] = {}

    def look_again(self) -> None:
        """Forget what was found: a name may come to stand for another device."""
        self._disks.clear()
        self._adapters.clear()

    def is_disk(self, name: str) -> bool:
        """Whether it is a whole disk of its own: no partition, and not made of other disks."""
        known = self._disks.get(name)
        return _remember(self._disks, name, self._look_at_disk(name)) if known is None else known

    def may_be_disk(self, name: str) -> bool:
        """Whether it can stand for a disk where there is none: anything but memory and files."""
        return not _IN_MEMORY.match(name) and _link(self._block, name) is not None

    def is_adapter(self, name: str) -> bool:
        """Whether it is a network adapter: no bridge, tunnel, or one end of a container's pair."""
        known = self._adapters.get(name)
        if known is None:
            return _remember(self._adapters, name, self._look_at_interface(name))
        return known

    def leads_away(self, name: str) -> bool:
        """Whether it is no loopback, which leads back to this host."""
        return name.rstrip("0123456789") != "lo"

    def _look_at_disk(self, name: str) -> bool:
        device = _link(self._block, name.replace("/", "!"))  # as in cciss!c0d0
        if device is None or _IN_MEMORY.match(name) or _MADE_OF_OTHERS.search(device):
            return False
        return not _is_hidden(f"{self._block}/{name}")

    def _look_at_interface(self, name: str) -> bool:
        device = _link(self._net, name)
        return device is not None and "/devices/virtual/" not in device and self.leads_away(name)


def _remember(known: dict[str, bool], name: str, answer: bool) -> bool:
    if len(known) >= _MOST_KNOWN:  # names of short-lived devices
        known.clear()
    known[name] = answer
    return answer


def _link(folder: str, name: str) -> str | None:
    """Return where the kernel keeps a device; None if it does not list it, "" if it lists none."""
    try:
        return os.readlink(f"{folder}/{name}")  # noqa: PTH115
    except (OSError, ValueError) as error:
        listed = getattr(error, "errno", None) == errno.EINVAL  # there, but not as a link
        return "" if listed or not os.path.isdir(folder) else None  # noqa: PTH112


def _is_hidden(device: str) -> bool:
    """Whether it is one of several paths to a disk, which is listed by itself."""
    try:
        with open(f"{device}/hidden", "rb") as file:  # noqa: PTH123
            return file.read(1) == b"1"
    except OSError:
        return False
