"""When a failed call is made again: the policy.

Nothing of it runs while calls succeed, but for a deposit into the budget: the state of a call
(`retrying`) is made when its first attempt has failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar

from periscope_otel import guard
from periscope_otel.failure import Failure, classify, classify_response
from periscope_otel.resilience.budget import RetryBudget, budget_of
from periscope_otel.resilience.pausing import pause, pause_async, resumed, shutting_down
from periscope_otel.resilience.policy import check_number
from periscope_otel.resilience.retried import AsyncAttempts, Attempts, caller, decorated
from periscope_otel.resilience.retrying import RetryDetails, Retrying, Why, set_active

if TYPE_CHECKING:
    from periscope_otel.resilience.breaker import Breaker

__all__ = ["Retry", "RetryDetails", "Retrying", "Why"]
__all__ += ["pause", "pause_async", "resumed", "set_active", "shutting_down"]

Errors: TypeAlias = type[BaseException] | tuple[type[BaseException], ...]
"""Classes of exceptions."""

OnError: TypeAlias = Errors | Callable[[BaseException], bool | None]
"""Which exceptions are retried: classes, or a predicate; its None stands for the default rule."""

_Function = TypeVar(
    "_Function", bound="Callable[..., Any] | classmethod[Any, Any, Any] | staticmethod[Any, Any]"
)

_now: Callable[[], float] = time.monotonic  # tests replace it


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
        except Exception as error:  # noqa: BLE001  (the user's predicate must not break the call)
            guard.warn("result of a retry", "result= of a Retry raised %s", type(error).__name__)
            return None
        if isinstance(verdict, BaseException):
            return classify(verdict)
        return classify_response(value) or _BAD_RESULT

    def may_retry(self, failure: Failure, error: BaseException | None) -> bool:
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
    except Exception as raised:  # noqa: BLE001  (the user's predicate must not break the call)
        guard.warn("on of a retry", "on= of a Retry raised %s", type(raised).__name__)
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
