"""Whether a GPU answers, or the driver: when to try again, and what the log says of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from periscope_otel.gauges.stats import GpuProblem

logger = logging.getLogger("periscope_otel")

FIRST_RETRY = 5.0
"""Seconds until the next try; doubled each time."""
LAST_RETRY = 300.0
"""Seconds between two tries at most."""
STEADY = 60.0
"""Seconds of answers after which something is well again, and not only for a moment."""
SAY_AGAIN = 3600.0
"""Seconds between two log lines on the same reason, where it comes and goes."""


class BackOff:
    """Pauses between tries that grow until it was well for a while.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pause = FIRST_RETRY
        self._retry_at: float | None = None
        self._well_since: float | None = None

    @property
    def is_due(self) -> bool:
        """Whether it is to be tried again now."""
        return self._retry_at is not None and self._clock() >= self._retry_at

    @property
    def is_steady(self) -> bool:
        """Whether it was well for a while."""
        return self._well_since is not None and self._clock() - self._well_since >= STEADY

    def fail(self) -> None:
        """Note that a try has failed."""
        self._well_since = None
        self._retry_at = self._clock() + self._pause
        self._pause = min(2 * self._pause, LAST_RETRY)

    def try_now(self) -> None:
        """Try at once what waits for its next try."""
        self._pause = FIRST_RETRY
        if self._retry_at is not None:
            self._retry_at = self._clock()

    def answer(self) -> None:
        """Note that it answers."""
        self._retry_at = None
        if self._well_since is None:
            self._well_since = self._clock()
        if self.is_steady:
            self._pause = FIRST_RETRY


class Health(BackOff):
    """A back-off that knows the problem there is, and logs each once for as long as it lasts.

    What comes and goes is logged once an hour at most.

    Args:
        clock: Monotonic seconds.
        missing: What there is none of while it fails, such as `figures of GPU 1`.
        harmless: Reasons that are no fault, and so no warning.
    """

    def __init__(
        self, clock: Callable[[], float], missing: str, harmless: Collection[str] = ()
    ) -> None:
        super().__init__(clock)
        self.missing = missing
        self.problem: GpuProblem | None = None
        """What is wrong now."""
        self._harmless = harmless
        self._said_at: dict[str, float] = {}
        self._said_now: set[str] = set()
        """Reasons that were logged since it answered last."""
        self._owes_good_news = False

    def fail_with(self, problem: GpuProblem) -> None:
        """Note that a try has failed, and why."""
        self.fail()
        self.problem = problem
        if self._is_news(problem.reason):
            self._said_at[problem.reason] = self._clock()
            self._said_now.add(problem.reason)
            self._owes_good_news = True
            self._log(problem)

    def answer(self) -> None:
        """Note that it answers."""
        super().answer()
        self.problem = None
        self._said_now.clear()
        if self._owes_good_news and self.is_steady:
            self._owes_good_news = False
            logger.info("%s are back", self.missing)

    def _is_news(self, reason: str) -> bool:
        if reason in self._said_now:
            return False
        said_at = self._said_at.get(reason)
        return said_at is None or self._clock() - said_at >= SAY_AGAIN

    def _log(self, problem: GpuProblem) -> None:
        level = logging.INFO if problem.reason in self._harmless else logging.WARNING
        logger.log(
            level,
            "no %s: %s (%s). What helps: %s",
            self.missing,
            problem.message,
            problem.reason,
            problem.remedy,
        )
