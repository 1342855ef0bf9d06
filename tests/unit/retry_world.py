"""What tests of retries share: a clock that only waiting moves, and failures to be had."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from periscope_otel.failure import Failure
from periscope_otel.resilience import budget, pausing, retry, retrying

if TYPE_CHECKING:
    import pytest


class World:
    """Monotonic seconds, the waits that moved them, and the number that is drawn next."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []
        self.draw = 1.0
        """From 0 to 1: 1 makes every wait as long as it can be."""

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        if seconds > 1e-9:  # what is left of a rounding error is no wait
            self.waits.append(round(seconds, 6))
        self.now += seconds

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Have retries live in this world."""
        for module in (budget, pausing, retry, retrying):
            patch.setattr(module, "_now", self.clock)
        patch.setattr(retrying, "_random", lambda: self.draw)
        patch.setattr(pausing, "_sleep", self.sleep)
        patch.setattr(pausing, "_sleep_async", self.sleep_async)
        patch.setattr(pausing, "LONGEST_SLEEP", 1e9)
        budget.forget_budgets()


class Answer:
    """An HTTP answer as requests and httpx have them."""

    def __init__(self, status: int, retry_after: object = None) -> None:
        self.status_code = status
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}


class StatusError(Exception):
    """What `raise_for_status` raises."""

    def __init__(self, status: int, retry_after: object = None) -> None:
        super().__init__(status)
        self.response = Answer(status, retry_after)


class Says(Exception):  # noqa: N818  (it says itself what it is)
    """A failure that says of itself what it means."""

    def __init__(self, **about: Any) -> None:
        super().__init__()
        known: dict[str, Any] = {"outcome": "error", "error_type": "Says", "verdict": "failure"}
        self.periscope_failure = Failure(**{**known, "retryable": True, **about})


class Script:
    """A function that raises or returns one thing after the other, the last one for ever."""

    def __init__(self, *steps: object) -> None:
        self.steps = list(steps)
        self.calls = 0

    def __call__(self, *_args: object) -> Any:
        step = self.steps[min(self.calls, len(self.steps) - 1)]
        self.calls += 1
        if isinstance(step, BaseException):
            raise step
        return step


def waits_long() -> tuple[Exception, dict[str, Any]]:
    """Return a failure, and settings of a policy, that make a wait of five minutes for certain."""
    return Says(retry_after=300.0), {"deadline": None, "longest_retry_after": 300.0}
