"""Counters of the kernel that go back, told as counters that do not.

An interface that is made anew counts from zero; 32 bits wrap; the time in which a CPU waited may be
a little less than it was. A backend takes each such step for a new counter, or for a huge rate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable


class Counters:
    """Several counters of each device, none of which goes back.

    One that has fallen to less than half has begun anew: what it counts is added to what was told.
    One that has fallen less goes on from where it was.

    Args:
        slack: By how much one may go back for a while; it is then told as it was.
    """

    def __init__(self, slack: float = 0.0) -> None:
        self._slack = slack
        self._known: dict[Hashable, tuple[list[float | None], list[float]]] = {}

    def of(self, device: Hashable, counted: Iterable[float | None]) -> list[float | None]:
        """Return what is to be told.

        Args:
            device: Which device; it is remembered for good, so there must not be too many.
            counted: What is counted now, always in the same order; None for what is not.
        """
        now = list(counted)
        known = self._known.get(device)
        if known is None:
            self._known[device] = (now, [0] * len(now))
            return list(now)
        last, offsets = known
        told: list[float | None] = []
        for index, count in enumerate(now):
            if count is None:
                told.append(None)
                continue
            before = last[index]
            if before is not None and count < before:
                if before - count <= self._slack:
                    told.append(before + offsets[index])
                    continue
                offsets[index] += before if count < before / 2 else before - count
            last[index] = count
            told.append(count + offsets[index])
        return told
