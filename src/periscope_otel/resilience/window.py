"""How the calls of the last while ended: what a breaker's rates are of."""

from __future__ import annotations

from typing import Final

STEPS: Final = 10
"""Parts of a window: it moves on by one of them at a time."""


class Window:
    """Counts of calls, failures and slow calls of the last `seconds`; each call costs the same.

    Its parts are made as calls come, so one that is not used holds next to nothing. It takes no
    lock: whoever has it does.

    Args:
        seconds: How far back it reaches.
    """

    __slots__ = ("_newest", "_part", "_parts", "_step", "calls", "failures", "slow")

    def __init__(self, seconds: float) -> None:
        self._step = seconds / STEPS
        self.clear()

    def clear(self) -> None:
        """Forget every call."""
        self.calls = self.failures = self.slow = 0
        self._newest = -1
        self._part = [0, 0, 0]
        self._parts: list[tuple[int, list[int]]] | None = None

    def add(self, now: float, failed: bool, slow: bool) -> None:
        """Count a call that has ended at `now`."""
        step = int(now / self._step)
        if step > self._newest:
            self._move_to(step)
        part = self._part
        self.calls += 1
        part[0] += 1
        if failed:
            self.failures += 1
            part[1] += 1
        if slow:
            self.slow += 1
            part[2] += 1

    def move_to(self, now: float) -> None:
        """Forget what has become too old by `now`."""
        step = int(now / self._step)
        if step > self._newest:
            self._move_to(step)

    def _move_to(self, step: int) -> None:
        parts = self._parts
        if parts is None:
            parts = self._parts = []
        while parts and parts[0][0] <= step - STEPS:
            calls, failures, slow = parts.pop(0)[1]
            self.calls -= calls
            self.failures -= failures
            self.slow -= slow
        self._newest = step
        self._part = [0, 0, 0]
        parts.append((step, self._part))
