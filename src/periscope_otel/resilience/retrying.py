"""One call under a `Retry` whose first attempt has failed: whether and when the next one begins."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from periscope_otel import guard
from periscope_otel.resilience.pausing import goes_on, pause, pause_async
from periscope_otel.resilience.transition import BUSY

if TYPE_CHECKING:
    from collections.abc import Callable

    from periscope_otel.failure import Failure
    from periscope_otel.resilience.breaker import Breaker
    from periscope_otel.resilience.budget import RetryBudget
    from periscope_otel.resilience.circuit import Permit
    from periscope_otel.resilience.retry import Retry

Why = Literal[
    "attempts",  # all of them are made
    "breaker",  # it rejects, and would for too long
    "budget",  # the dependency's callers retry too much already
    "deadline",  # the next attempt would begin too late
    "inactive",  # `set_active(False)`
    "not_retryable",  # the next attempt would fail alike
    "retry_after",  # the peer wants to be left alone for longer than is waited
    "shutting_down",
]
"""Why a call is not made again, in one word."""

_JITTER: Final = 0.1
"""Share by which a wait that others have set is made longer, so that not all come back at once."""

_now: Callable[[], float] = time.monotonic  # tests replace both
_random: Callable[[], float] = random.random

_active = True


def set_active(active: bool) -> None:
    """Switch all retries of this process on or off, for tests.

    Args:
        active: False to make exactly one attempt, everywhere.
    """
    global _active
    _active = active


class RetryDetails(NamedTuple):
    """One retry, as `on_retry` is told of it."""

    attempt: int
    """The number of the attempt that failed, from 1."""
    wait: float
    """Seconds until the next one."""
    failure: Failure
    """Why it failed."""
    error: BaseException | None
    """What it raised; None where what it returned meant failure."""
    dependency: str | None
    """What was called, or the name of the function."""


class Retrying:
    """The state of one call; `Retry.begin` makes it.

    A wrapper settles the attempt's permit and tells `after` of the failure. Where that returns a
    wait, `again` waits and takes the next permit; the next attempt is made outside of the `except`,
    or it would be chained to this one. Where there is none, `conclude` raises or returns what the
    last attempt came to. In the end, however it comes, `let_go` is called.

    An attempt that a breaker inside of it rejected counts as none: it is waited for that breaker,
    and the error of the attempt before is kept.

    Example:
        >>> wait = retrying.after(failure, error)
        >>> if wait is None or not retrying.again(wait):
        ...     return retrying.conclude()
    """

    __slots__ = (
        "_breaker", "_budget", "_rejections", "_until", "attempt", "dependency", "error",
        "permit", "policy", "rejected", "value", "why",
    )  # fmt: skip

    def __init__(
        self,
        policy: Retry,
        started: float,
        dependency: str | None,
        budget: RetryBudget | None,
        breaker: Breaker | None,
    ) -> None:
        self.policy = policy
        self.dependency = dependency
        self.attempt = 0
        """The number of the last attempt that failed, from 1."""
        self.why: Why | None = None
        """Why there is no further attempt; None while there is."""
        self.error: BaseException | None = None
        """What the last attempt raised, or None, and what it returned then."""
        self.value: Any = None
        self.permit: Permit | None = None
        """The next attempt's, where there is a breaker."""
        self.rejected = False
        """Whether the last attempt was none: a breaker inside of it rejected it."""
        self._rejections = 0
        self._until = float("inf") if policy.deadline is None else started + policy.deadline
        self._budget = budget
        self._breaker = breaker

    def after(
        self, failure: Failure, error: BaseException | None = None, value: object = None
    ) -> float | None:
        """Take note of an attempt that has failed.

        Args:
            failure: Why.
            error: What it raised.
            value: What it returned, where that meant failure.

        Returns:
            Seconds to wait before the next one; None to give up, and `why` says why.
        """
        self.rejected = failure.outcome == "rejected" and self.attempt > 0
        if not self.rejected:
            self.attempt += 1
            self.error, self.value = error, value
        try:
            return self._after_rejection(failure) if self.rejected else self._after(failure, error)
        except Exception as own_error:  # noqa: BLE001  (the call ends with its own error)
            guard.report("retry", own_error)
            self.why = "not_retryable"
            return None

    def held(self) -> float | None:
        """Return seconds to wait where the breaker has rejected the next attempt after a wait.

        Returns:
            None to give up; `why` is `"breaker"`.
        """
        breaker = self._breaker
        if breaker is None or breaker.state == "forced_open":
            self.why = "breaker"
            return None
        return self._until_it_passes(breaker.retry_after or BUSY)

    def again(self, wait: float) -> bool:
        """Wait, and take the next attempt's `permit`.

        Args:
            wait: Seconds, as `after` has returned them.

        Returns:
            Whether it may be made; `why` says why not.
        """
        further: float | None = wait
        while further is not None:
            if not pause(further):
                self.why = "shutting_down"
                return False
            if self._breaker is None:
                return True
            try:
                self.permit = self._breaker.allow(rejecting=False)
            except Exception as own_error:  # noqa: BLE001  (the call goes on without the breaker)
                guard.report("retry", own_error)
                return True
            if self.permit is not None:
                return True
            further = self.held()
        return False

    async def again_async(self, wait: float) -> bool:
        """Wait as `again` does, without holding the event loop up."""
        further: float | None = wait
        while further is not None:
            if not await pause_async(further):
                self.why = "shutting_down"
                return False
            if self._breaker is None:
                return True
            try:
                self.permit = await self._breaker.allow_async(rejecting=False)
            except Exception as own_error:  # noqa: BLE001  (the call goes on without the breaker)
                guard.report("retry", own_error)
                return True
            if self.permit is not None:
                return True
            further = self.held()
        return False

    def let_go(self) -> None:
        """Forget what the last attempt came to: the exception's frames would refer to it."""
        self.error = self.value = None

    def conclude(self) -> Any:
        """Return what the last attempt returned, or raise what it raised, as it was."""
        error, value = self.error, self.value
        self.let_go()
        if error is None:
            return value
        context = error.__context__
        try:
            raise error
        finally:
            # Not what was handled when the call was given up. The base's setter: a frozen
            # exception class may forbid its own.
            BaseException.__setattr__(error, "__context__", context)
            del error

    def _after(self, failure: Failure, error: BaseException | None) -> float | None:
        self.why = self._why_none(failure, error)
        if self.why is not None:
            return None
        now = _now()
        wait = self._wait(failure, now)
        if wait is not None and self._budget is not None and not self._budget.withdraw(now):
            self.why = "budget"
            return None
        if wait is not None and self.policy.on_retry is not None:
            self._call_hook(self.policy.on_retry, wait, failure)
        return wait

    def _why_none(self, failure: Failure, error: BaseException | None) -> Why | None:
        policy = self.policy
        if not _active:
            return "inactive"
        if not policy.may_retry(failure, error):
            return "not_retryable"
        if self.attempt >= policy.attempts:
            return "attempts"
        if not goes_on():
            return "shutting_down"
        if (failure.retry_after or 0.0) > policy.longest_retry_after:
            return "retry_after"
        return None

    def _wait(self, failure: Failure, now: float) -> float | None:
        """Return seconds to wait; None if that is too long."""
        policy = self.policy
        left = self._until - now
        held = self._held_for()
        if held is None or held > left:
            self.why = "breaker"
            return None
        least = failure.retry_after or 0.0
        if least > left:
            self.why = "retry_after"
            return None
        wait = _random() * min(policy.cap, policy.base * 2.0 ** min(self.attempt - 1, 60))
        if (least := max(least, held)) > 0.0:
            jitter = _random() * max(policy.base, least * _JITTER)
            wait = min(max(wait, least + jitter), left)
        if wait > left:
            self.why = "deadline"
            return None
        return wait

    def _held_for(self) -> float | None:
        """Return for how long the breaker will let nothing pass; None for nobody knows."""
        breaker = self._breaker
        state = None if breaker is None else breaker.state
        if breaker is None or state not in ("open", "forced_open"):
            return 0.0
        return None if state == "forced_open" else breaker.retry_after or 0.0

    def _after_rejection(self, failure: Failure) -> float | None:
        """Return seconds after which to ask again: longer each time, for code of the user's runs.

        It may have called something else before it came to the breaker that rejects.
        """
        if not _active or not goes_on():
            self.why = "shutting_down" if _active else "inactive"
            return None
        if failure.retry_after is None:  # nobody can tell
            self.why = "breaker"
            return None
        longer = min(BUSY * 2.0 ** min(self._rejections, 60), max(self.policy.cap, BUSY))
        self._rejections += 1
        return self._until_it_passes(max(failure.retry_after, longer))

    def _until_it_passes(self, seconds: float) -> float | None:
        """Return for how long to wait, with a little jitter; None if that is too long."""
        left = self._until - _now()
        if seconds > left:
            self.why = "breaker"
            return None
        return min(seconds * (1.0 + _random() * _JITTER), left)

    def _call_hook(
        self, hook: Callable[[RetryDetails], object], wait: float, failure: Failure
    ) -> None:
        try:
            hook(RetryDetails(self.attempt, wait, failure, self.error, self.dependency))
        except Exception as error:  # noqa: BLE001  (the user's hook must not break the call)
            guard.warn("on_retry of a retry", "on_retry= raised %s", type(error).__name__)
