"""What a call is told that a breaker does not let through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from periscope_otel.failure import Failure

if TYPE_CHECKING:
    from periscope_otel.resilience.policy import State


class CircuitOpenError(Exception):
    """A breaker did not let a call through: nothing was sent.

    Attributes:
        name: The breaker's name.
        state: Its state, mostly `"open"`.
        retry_after: Seconds after which a call may pass; None where nobody can tell.
        reason: Why it opened, in one word.

    Example:
        >>> try:
        ...     fetch(url)
        ... except CircuitOpenError as error:
        ...     schedule(error.retry_after)
    """

    def __init__(
        self,
        name: str,
        state: State = "open",
        retry_after: float | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(name, state, retry_after, reason)
        self.name = name
        self.state = state
        self.retry_after = retry_after
        self.reason = reason

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        after = self.retry_after
        when = (
            "" if after is None else f"; try again in {round(after, 0 if after > 99 else 2):.8g} s"
        )
        return f"breaker {self.name} is {self.state}{why}{when}"

    @property
    def periscope_failure(self) -> Failure:
        """What it means to everybody else."""
        return Failure(
            "rejected", type(self).__name__, "ignored",
            retryable=False, retry_after=self.retry_after,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.state, self.retry_after, self.reason)
