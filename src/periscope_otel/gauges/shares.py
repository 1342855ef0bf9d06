"""Utilisation: the share of the time that has passed which was spent in each mode."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

LEAST_SPAN: Final = 0.5
"""Seconds that a share is taken over at least: the kernel counts in hundredths of a second."""


class Shares:
    """Shares since the reading before, by what was really counted."""

    def __init__(self) -> None:
        self._base: tuple[float, Mapping[str, float]] | None = None
        self._known: Mapping[str, float] | None = None

    def of(
        self, now: float, spent: Mapping[str, float], cpus: float | None = None
    ) -> Mapping[str, float] | None:
        """Return the shares, which add up to 1 at most; None until there are two readings.

        Args:
            now: Monotonic seconds.
            spent: Seconds by mode, counted from any beginning.
            cpus: How many CPUs there were to spend them on; by default all that was spent is 1.
        """
        if self._base is None:
            self._base = (now, spent)
        passed = now - self._base[0]
        if passed < LEAST_SPAN:
            return self._known
        before = self._base[1]
        self._base = (now, spent)
        # What goes back was spent on nothing.
        since = {mode: max(0.0, one - before.get(mode, one)) for mode, one in spent.items()}
        # A thread may have run for longer than the clock says, between two ticks of the kernel's.
        whole = max(sum(since.values()), passed * (cpus or 0.0))
        if whole > 0:
            self._known = MappingProxyType({mode: one / whole for mode, one in since.items()})
        return self._known
