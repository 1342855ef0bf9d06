"""At most so many of the devices that there are, and of those that there ever were.

Each device is a series of several metrics, and the SDK keeps a series for good: a host on which
containers come and go would fill it up, until the figures of all devices run into one.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger("periscope_otel")

MOST_AT_ONCE: Final = 16
"""Devices of a kind that are told of at one time."""
MOST_EVER: Final = 200
"""Devices of a kind that are told of in the life of a process."""
PATIENCE: Final = 12
"""Slow beats without any change after which a device gives way to one that does something."""

_Device = TypeVar("_Device")


class Choice(Generic[_Device]):
    """Those devices of one kind that are told of: the largest, and once chosen they stay.

    Args:
        kind: What they are called, for a log line: `disks`.
        size: How much a device has done, or how large it is.
        gives_way: Whether one whose size does not change gives way to one whose does.
    """

    def __init__(
        self, kind: str, size: Callable[[_Device], int], *, gives_way: bool = True
    ) -> None:
        self._kind = kind
        self._size = size
        self._gives_way = gives_way
        self._chosen: set[str] = set()
        self._ever: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._growth: dict[str, int] = {}
        self._idle: dict[str, int] = {}
        self._said: set[int] = set()

    def of(self, found: Mapping[str, _Device], slow: bool) -> list[str]:
        """Return the names of those to tell of, in order.

        Args:
            found: What there is now, by name.
            slow: Whether to look again which do something.
        """
        self._chosen.intersection_update(found)
        if slow and self._gives_way:
            self._watch(found)
        if len(found) > len(self._chosen):
            self._fill(found)
        return sorted(self._chosen)

    def _fill(self, found: Mapping[str, _Device]) -> None:
        if len(found) > MOST_AT_ONCE:
            self._say_once(MOST_AT_ONCE, f"{len(found)}, of which {MOST_AT_ONCE} are told")
        room = MOST_AT_ONCE - len(self._chosen)
        if room <= 0:
            return
        others = sorted(found.keys() - self._chosen, key=lambda one: self._rank(one, found[one]))
        for name in others:
            if room and self._may_be_told(name):
                self._chosen.add(name)
                room -= 1

    def _rank(self, name: str, device: _Device) -> tuple[int, int, str]:
        return -self._growth.get(name, 0), -self._size(device), name

    def _may_be_told(self, name: str) -> bool:
        if name not in self._ever:
            if len(self._ever) >= MOST_EVER:
                self._say_once(MOST_EVER, f"{MOST_EVER} have been told, further ones will not be")
                return False
            self._ever.add(name)
        return True

    def _watch(self, found: Mapping[str, _Device]) -> None:
        """Count for how long each does nothing, and leave as many as others have use for."""
        if len(found) <= MOST_AT_ONCE:
            self._sizes, self._growth, self._idle = {}, {}, {}
            return
        before, sizes = self._sizes, {name: self._size(one) for name, one in found.items()}
        self._sizes = sizes
        if not before:
            return
        self._growth = {
            name: abs(size - before[name])
            for name, size in sizes.items()
            if name in before and size != before[name]
        }
        self._idle = {
            name: 0 if name in self._growth else self._idle.get(name, 0) + 1
            for name in self._chosen
        }
        tired = sorted(name for name, beats in self._idle.items() if beats >= PATIENCE)
        waiting = len(self._growth.keys() - self._chosen)
        self._chosen.difference_update(tired[:waiting])

    def _say_once(self, limit: int, line: str) -> None:
        if limit not in self._said:
            self._said.add(limit)
            logger.warning("host gauges, %s: %s", self._kind, line)
