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
        "__weakref__", "_calls", "_ends", "_lock", "_new_calls", "_new_retries", "_newest",
        "_parts", "_reserve", "_retries", "_step", "in_use", "per_second", "ratio", "ttl",
    )  # fmt: skip

    def __init__(self, ratio: float = 0.2, per_second: float = 1.0, ttl: float = 10.0) -> None:
        check_number("ratio", ratio, 0.0, 1000.0)
        check_number("per_second", per_second, 0.0, 1e6)
        check_number("ttl", ttl, 0.1, 3600.0)
        self.ratio, self.per_second, self.ttl = float(ratio), float(per_second), float(ttl)
        self._step = self.ttl / STEPS
        self._reserve = self.per_second * self.ttl
        self.in_use = False
        """Whether it was asked for since the last time that somebody looked; see `budget_of`."""
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
        self._new_calls = self._new_retries = 0
        self._newest, self._ends = -1, 0.0
        self._parts: list[tuple[int, int, int]] = []

    def deposit(self, now: float | None = None) -> None:
        """Count a first attempt; never blocks.

        Args:
            now: Monotonic seconds, where the caller knows them.
        """
        if now is None:
            now = _now()
        with self._lock:
            if now >= self._ends:
                self._move_to(now)
            self._new_calls += 1

    def withdraw(self, now: float | None = None) -> bool:
        """Take what one retry needs, if it is there; never blocks.

        Args:
            now: Monotonic seconds, where the caller knows them.

        Returns:
            Whether the retry may be made.
        """
        if now is None:
            now = _now()
        with self._lock:
            if now >= self._ends:
                self._move_to(now)
            if self._left() < 1.0 - _ROUNDING:
                return False
            self._new_retries += 1
            return True

    @property
    def balance(self) -> float:
        """How many retries may be made now; below 0 where calls are forgotten before retries."""
        now = _now()
        with self._lock:
            if now >= self._ends:
                self._move_to(now)
            return self._left()

    def _left(self) -> float:
        calls, retries = self._calls + self._new_calls, self._retries + self._new_retries
        return self.ratio * calls + self._reserve - retries

    def _move_to(self, now: float) -> None:
        """Begin a new part, and forget those that have become too old."""
        before, step = self._newest, max(int(now / self._step), self._newest + 1)
        if self._new_calls or self._new_retries:
            self._parts.append((before, self._new_calls, self._new_retries))
            self._calls += self._new_calls
            self._retries += self._new_retries
            self._new_calls = self._new_retries = 0
        self._newest = step
        self._ends = (step + 1) * self._step
        # One part more than `STEPS`: the newest has only begun, and no retry counts too short.
        while self._parts and self._parts[0][0] < step - STEPS:
            _, calls, retries = self._parts.pop(0)
            self._calls -= calls
            self._retries -= retries


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
    budget = _by_name.get(name)
    if budget is None:
        return _new_budget(name)
    budget.in_use = True
    return budget


def _new_budget(name: str) -> RetryBudget:
    with _lock:
        budget = _by_name.get(name)
        if budget is None:
            if len(_by_name) >= MOST_BUDGETS:
                _forget_one()
            budget = _by_name[name] = RetryBudget()
        return budget


def _forget_one() -> None:
    """Forget the first one that was not asked for since the last time; the lock is held.

    What is in use is passed over once: to keep the order of use itself would cost every call.
    """
    while True:
        name, budget = next(iter(_by_name.items()))
        if not budget.in_use:
            del _by_name[name]
            return
        budget.in_use = False
        _by_name.move_to_end(name)


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
