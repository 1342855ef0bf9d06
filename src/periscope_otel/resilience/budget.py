"""How many retries a dependency gets: a share of the calls that are made to it, and a few more.

Back-off alone does not keep retries from making an outage worse: where every call fails, three
attempts are three times the load. A budget caps what all callers of a dependency add together.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from periscope_otel.resilience.policy import check_number

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS: Final = 10
"""Parts that a budget's time is divided into; it forgets one of them at a time."""

MOST_BUDGETS: Final = 1000
"""Dependencies whose budgets are remembered; those that were used last."""

_ROUNDING: Final = 1e-9
_now: Callable[[], float] = time.monotonic  # tests replace it


class RetryBudget:
    """Retries that the callers of one dependency may make, together; for threads.

    Each first attempt deposits `ratio`, each retry takes 1, and what is older than `ttl` is
    forgotten. `per_second` of the last `ttl` seconds may always be made, so that a dependency that
    is seldom called has retries too.

    Args:
        ratio: Retries for each call, 0 to 1,000.
        per_second: Retries a second that need no calls, 0 to 1,000,000.
        ttl: Seconds for which calls and retries count, 0.1 to 3,600.

    Raises:
        ValueError: If one of them is out of its range.
        TypeError: If one of them is no number.

    Example:
        >>> budget = RetryBudget(ratio=0.1, per_second=0)
        >>> budget.withdraw()
        False
    """

    __slots__ = (
        "__weakref__", "_calls", "_lock", "_newest", "_part", "_parts", "_reserve", "_retries",
        "_step", "per_second", "ratio", "ttl",
    )  # fmt: skip

    def __init__(self, ratio: float = 0.2, per_second: float = 1.0, ttl: float = 10.0) -> None:
        check_number("ratio", ratio, 0.0, 1000.0)
        check_number("per_second", per_second, 0.0, 1e6)
        check_number("ttl", ttl, 0.1, 3600.0)
        self.ratio, self.per_second, self.ttl = float(ratio), float(per_second), float(ttl)
        self._step = self.ttl / STEPS
        self._reserve = self.per_second * self.ttl
        self.clear()
        _all.add(self)

    def __repr__(self) -> str:
        return f"RetryBudget(ratio={self.ratio}, per_second={self.per_second}, ttl={self.ttl})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle its settings: what is spent belongs to this process."""
        return type(self), (self.ratio, self.per_second, self.ttl)

    def clear(self) -> None:
        """Forget every call and retry."""
        self._lock = threading.Lock()
        self._calls = self._retries = 0
        self._newest = -1
        self._part = [0, 0]
        self._parts: list[tuple[int, list[int]]] = []

    def deposit(self, now: float | None = None) -> None:
        """Count a first attempt; never blocks.

        Args:
            now: Monotonic seconds, where the caller knows them.
        """
        step = int((_now() if now is None else now) / self._step)
        with self._lock:
            if step > self._newest:
                self._move_to(step)
            self._calls += 1
            self._part[0] += 1

    def withdraw(self, now: float | None = None) -> bool:
        """Take what one retry needs, if it is there; never blocks.

        Args:
            now: Monotonic seconds, where the caller knows them.

        Returns:
            Whether the retry may be made.
        """
        step = int((_now() if now is None else now) / self._step)
        with self._lock:
            if step > self._newest:
                self._move_to(step)
            if self._left() < 1.0 - _ROUNDING:
                return False
            self._retries += 1
            self._part[1] += 1
            return True

    @property
    def balance(self) -> float:
        """How many retries may be made now; below 0 where calls are forgotten sooner."""
        step = int(_now() / self._step)
        with self._lock:
            if step > self._newest:
                self._move_to(step)
            return self._left()

    def _left(self) -> float:
        return self.ratio * self._calls + self._reserve - self._retries

    def _move_to(self, step: int) -> None:
        parts = self._parts
        # One part more than `STEPS`: the newest has only begun, and no retry counts too short.
        while parts and parts[0][0] < step - STEPS:
            calls, retries = parts.pop(0)[1]
            self._calls -= calls
            self._retries -= retries
        self._newest = step
        self._part = [0, 0]
        parts.append((step, self._part))


_all: Final[WeakSet[RetryBudget]] = WeakSet()
_lock = threading.Lock()
_by_name: Final[OrderedDict[str, RetryBudget]] = OrderedDict()


def budget_of(name: str) -> RetryBudget:
    """Return the budget that all callers of a dependency share.

    Args:
        name: What the dependency is known by, such as its breaker's name.

    Example:
        >>> budget_of("urlhaus.abuse.ch") is budget_of("urlhaus.abuse.ch")
        True
    """
    with _lock:
        budget = _by_name.get(name)
        if budget is None:
            budget = _by_name[name] = RetryBudget()
            if len(_by_name) > MOST_BUDGETS:
                _by_name.popitem(last=False)
        else:
            _by_name.move_to_end(name)
        return budget


def forget_budgets() -> None:
    """Begin anew, for tests: every budget is as if just made."""
    with _lock:
        _by_name.clear()
    for budget in list(_all):
        budget.clear()


def _after_fork_in_child() -> None:
    # The parent's threads may have held any of the locks, and what they spent is the parent's.
    global _lock
    _lock = threading.Lock()
    forget_budgets()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
