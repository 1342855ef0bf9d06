"""When a failed call is made again: the policy, and the state of one call under it.

Nothing of this runs while calls succeed, but for a deposit into the budget: the state of a call is
made when its first attempt has failed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, TypeVar

from periscope_otel import guard
from periscope_otel.failure import Failure, classify, classify_response
from periscope_otel.resilience.budget import RetryBudget, budget_of
from periscope_otel.resilience.pausing import (
    goes_on,
    pause,
    pause_async,
    resumed,
    shutting_down,
)
from periscope_otel.resilience.policy import check_number
from periscope_otel.resilience.retried import AsyncAttempts, Attempts, caller, decorated
from periscope_otel.resilience.transition import BUSY

if TYPE_CHECKING:
    from periscope_otel.resilience.breaker import Breaker
    from periscope_otel.resilience.circuit import Permit

__all__ = ["Retry", "RetryDetails", "Retrying", "Why"]
__all__ += ["pause", "pause_async", "resumed", "set_active", "shutting_down"]

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

Errors: TypeAlias = type[BaseException] | tuple[type[BaseException], ...]
"""Classes of exceptions."""

OnError: TypeAlias = Errors | Callable[[BaseException], bool | None]
"""Which exceptions are retried: classes, or a predicate; its None stands for the default rule."""

_Function = TypeVar(
    "_Function", bound="Callable[..., Any] | classmethod[Any, Any, Any] | staticmethod[Any, Any]"
)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """When a failed call is made again, and after how long. The defaults are safe for any call.

    It decorates functions, coroutine functions and generator functions, which keep their
    signature and types, and it is iterated over for blocks. The last attempt's exception is
    raised as it is. Retried are broken connections, timeouts, 5xx, 408 and 429; never what would
    fail alike: other 4xx, values that are not what they should be, and cancellations.

    The wait is drawn from 0 to `base` * 2^n, and at most `cap` (full jitter). What a peer asks
    for by Retry-After is waited at least; where that is too long, the call is given up at once,
    for asking earlier would be rude. Generators are not retried after their first item.

    Attributes:
        attempts: Attempts in all, 1 to 1,000.
        base: Seconds that the first wait is up to; each further one up to twice as long.
        cap: Seconds that doubling ends at.
        deadline: Seconds from the beginning of the first attempt within which the last one has to
            begin; None for any time.
        longest_retry_after: Seconds of Retry-After beyond which the call is given up.
        on: What is retried instead of the default: classes of exceptions, or a predicate of the
            exception, whose None means the default. By classes no value that is not what it
            should be is retried, unless such a class is listed, and no 4xx but 408 and 429.
        result: Called with what the function returned. A true answer means a failed attempt: an
            exception or text says which; for True a response's HTTP status is looked at. Not
            asked of generators, nor in blocks. After the last attempt the value is returned.
        budget: Caps the retries of all callers; None for that of the dependency or function by
            its name, False for none.
        on_retry: Called before each wait; what it raises is contained.

    Raises:
        ValueError: If a setting is out of its range; the message names it and what fits.
        TypeError: If a setting is of another type.

    Example:
        >>> @Retry(attempts=4)
        ... def fetch(url): ...
        >>> for attempt in Retry(deadline=20.0):
        ...     with attempt:
        ...         rows = fetch(url)
    """

    attempts: int = 3
    base: float = 0.5
    cap: float = 30.0
    deadline: float | None = 120.0
    longest_retry_after: float = 60.0
    on: OnError | None = None
    result: Callable[[Any], object] | None = None
    budget: RetryBudget | Literal[False] | None = None
    on_retry: Callable[[RetryDetails], object] | None = None

    def __post_init__(self) -> None:
        check_number("attempts", self.attempts, 1, 1000, whole=True)
        check_number("base", self.base, 0.0, 3600.0)
        check_number("cap", self.cap, 0.0, 86_400.0)
        check_number("longest_retry_after", self.longest_retry_after, 0.0, 86_400.0)
        if self.deadline is not None:
            check_number("deadline", self.deadline, 0.0, 604_800.0)
        if self.cap < self.base:
            raise ValueError(f"cap={self.cap}: expected at least base ({self.base})")
        _check_on(self.on)
        for name in ("result", "on_retry"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"{name}= takes a callable")
        if not (
            self.budget is None or self.budget is False or isinstance(self.budget, RetryBudget)
        ):
            raise TypeError("budget= takes a RetryBudget, or False for none")

    # Standalone.

    def __call__(self, function: _Function, /) -> _Function:
        """Decorate `function`: a call that fails is made again.

        Raises:
            TypeError: If it is no function or method.
        """
        made: _Function = decorated(self, function)
        return made

    def __iter__(self) -> Attempts:
        """Return attempts, each to be used by `with`; every loop has its own."""
        return Attempts(self, caller())

    def __aiter__(self) -> AsyncAttempts:
        """Return attempts for `async for`, each to be used by `with`."""
        return AsyncAttempts(self, caller())

    @staticmethod
    def set_active(active: bool) -> None:
        """Switch all retries of this process on or off, for tests; see `set_active`."""
        set_active(active)

    # For wrappers: one call from its first attempt on.

    def start(self, dependency: str | None) -> float:
        """Count a first attempt that begins now.

        Args:
            dependency: What is called; its budget is added to.

        Returns:
            When: what `begin` wants to know if it fails.
        """
        now = _now()
        budget = self._budget_of(dependency)
        if budget is not None:
            budget.deposit(now)
        return now

    def begin(
        self, started: float, dependency: str | None, *, breaker: Breaker | None = None
    ) -> Retrying:
        """Return the state of a call whose first attempt has failed.

        Args:
            started: When that began; `start` has returned it.
            dependency: What is called.
            breaker: Gives each attempt its permit; that of the first one is settled already.
        """
        return Retrying(self, started, dependency, self._budget_of(dependency), breaker)

    def _budget_of(self, dependency: str | None) -> RetryBudget | None:
        budget = self.budget
        if budget is None:
            return None if dependency is None else budget_of(dependency)
        return budget or None

    def failure_in(self, value: object) -> Failure | None:
        """Return why a returned value is a failed attempt; None if it is none."""
        if self.result is None:
            return None
        try:
            verdict = self.result(value)
            if not verdict:
                return None
        except Exception:  # noqa: BLE001  (the user's predicate must not break the call)
            guard.warn("result predicate", "the callable given as result= of a Retry raised")
            return None
        if isinstance(verdict, BaseException):
            return classify(verdict)
        return classify_response(value) or _BAD_RESULT

    def wants(self, failure: Failure, error: BaseException | None) -> bool:
        """Whether a failure is one that may be retried at all."""
        if failure.outcome in ("ok", "cancelled", "rejected"):
            return False
        if error is None or self.on is None:
            return failure.retryable
        if not isinstance(error, Exception):
            return False
        if isinstance(self.on, (type, tuple)):
            return isinstance(error, self.on) and not _is_hopeless(failure, error, self.on)
        verdict = _asked(self.on, error)
        return failure.retryable if verdict is None else verdict


class Retrying:
    """One call whose first attempt has failed: whether, and when, the next one begins.

    A wrapper settles the attempt's permit and tells `after` of the failure; where that returns a
    wait, `again` waits and takes the next permit. Where it gives up, `conclude` raises or returns
    what the last attempt came to. An attempt that a breaker inside of it rejected is no attempt.
    """

    __slots__ = (
        "_breaker", "_budget", "_until", "attempt", "dependency",
        "error", "permit", "policy", "value", "why",
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
        if failure.outcome == "rejected" and self.attempt:
            return self._after_rejection(failure.retry_after)
        self.attempt += 1
        self.error, self.value = error, value
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

    def held(self) -> float | None:
        """Return seconds to wait where the breaker has rejected the next attempt after a wait.

        Returns:
            None to give up; `why` is `"breaker"`.
        """
        breaker = self._breaker
        if breaker is None or breaker.state == "forced_open":
            self.why = "breaker"
            return None
        return self._after_rejection(breaker.retry_after or 0.0)

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
            self.permit = self._breaker.allow()
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
            self.permit = await self._breaker.allow_async()
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
            error.__context__ = context  # not what was handled when the call was given up
            del error

    def _why_none(self, failure: Failure, error: BaseException | None) -> Why | None:
        policy = self.policy
        if not _active:
            return "inactive"
        if not policy.wants(failure, error):
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

    def _after_rejection(self, held: float | None) -> float | None:
        """Return seconds after which to ask again; what was rejected is no attempt."""
        if not _active or not goes_on():
            self.why = "shutting_down" if _active else "inactive"
            return None
        left = self._until - _now()
        # A breaker that is due and rejects all the same: somebody else's probe is out.
        least = held or BUSY
        if held is None or least > left:
            self.why = "breaker"
            return None
        return min(least * (1.0 + _random() * _JITTER), left)

    def _call_hook(
        self, hook: Callable[[RetryDetails], object], wait: float, failure: Failure
    ) -> None:
        try:
            hook(RetryDetails(self.attempt, wait, failure, self.error, self.dependency))
        except Exception:  # noqa: BLE001  (the user's hook must not break the user's call)
            guard.warn("on_retry", "the callable given as on_retry= raised")


_BAD_RESULT: Final = Failure("error", "_OTHER", "failure", retryable=True)


def _check_on(on: object) -> None:
    classes = on if isinstance(on, tuple) else (on,) if isinstance(on, type) else ()
    listed = all(isinstance(one, type) and issubclass(one, BaseException) for one in classes)
    if not listed or not (on is None or isinstance(on, tuple) or callable(on)):
        raise TypeError("on= takes exception classes, or a predicate of the exception")


def _asked(on: Callable[[BaseException], bool | None], error: BaseException) -> bool | None:
    try:
        verdict = on(error)
        return None if verdict is None else bool(verdict)
    except Exception:  # noqa: BLE001  (the user's predicate must not break the user's call)
        guard.warn("retry predicate", "the callable given as on= of a Retry raised")
        return None


def _is_hopeless(failure: Failure, error: BaseException, on: Errors) -> bool:
    """Whether the same call must fail alike, whatever broad class of exceptions is listed."""
    if failure.reason == "validation":
        return not any(isinstance(error, one) and _is_of_validation(one) for one in _members(on))
    status = failure.error_type or ""
    return len(status) == 3 and status.isdecimal() and status[0] == "4" and not failure.retryable


def _is_of_validation(listed: type[BaseException]) -> bool:
    """Whether a class means by itself that a value is not what it should be."""
    try:
        return classify(listed.__new__(listed)).reason == "validation"
    except Exception:  # noqa: BLE001  (it cannot be made without arguments)
        return issubclass(listed, (ValueError, TypeError, LookupError))


def _members(on: Errors) -> tuple[type[BaseException], ...]:
    return on if isinstance(on, tuple) else (on,)
