"""What a breaker has to do, said once more in the plainest way: the model that it is tested by.

It keeps lists where the breaker keeps sums, exact fractions where that has floats, and looks at
everything again each time. It knows nothing of the breaker's code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from periscope_otel.failure import Failure
    from periscope_otel.resilience.policy import BreakerPolicy

PASSING = ("closed", "disabled", "observe")
MANUAL = ("forced_open", "disabled", "observe")


@dataclass(eq=False)
class ModelPermit:
    """One call that was let through."""

    generation: int
    running_since: float | None
    ran: float = 0.0
    outcome: str | None = None
    displaced: bool = False

    def seconds(self, now: float) -> float:
        """Return how long it has run by now, without its pauses."""
        return self.ran + (0.0 if self.running_since is None else now - self.running_since)

    def pause(self, now: float) -> None:
        """Stop its time."""
        self.ran, self.running_since = self.seconds(now), None

    def resume(self, now: float) -> None:
        """Let its time run."""
        if self.running_since is None:
            self.running_since = now


class Call(NamedTuple):
    """A call that counts in the window."""

    at: float
    failed: bool
    slow: bool


class Told(NamedTuple):
    """What a listener has to be told."""

    from_state: str
    to_state: str
    reason: str
    open_for: float | None
    error_type: str | None
    openings: int | None
    adopted: bool = False
    would_be: bool = False


@dataclass
class Model:
    """A breaker by its contract."""

    policy: BreakerPolicy
    chance: float
    now: float
    state: str = "closed"
    generation: int = 0
    openings: int = 0
    until: float = 0.0
    closed_since: float = 0.0
    in_a_row: int = 0
    slow_in_a_row: int = 0
    successes: int = 0
    out: int = 0
    calls: list[Call] = field(default_factory=list)
    leases: list[tuple[float, ModelPermit]] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: {"success": 0, "failure": 0, "ignored": 0, "rejected": 0}
    )
    told: list[Told] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.closed_since = self.now

    # Calls.

    def allow(self) -> ModelPermit | None:
        """Let a call pass, or reject it."""
        permit = self.watch()
        if permit is None:
            self.counts["rejected"] += 1
        return permit

    def watch(self) -> ModelPermit | None:
        """Let a call pass if one may."""
        if self.state in PASSING:
            return self._permit()
        if self.state == "open" and self.now >= self.until:
            self._change("half_open", "probing")
        if self.state != "half_open":
            return None
        if len(self.leases) == self.policy.probes:
            expires, oldest = min(self.leases, key=lambda lease: lease[0])
            if self.now < expires:
                return None
            oldest.displaced = True
            self.leases = [lease for lease in self.leases if lease[1] is not oldest]
        permit = self._permit()
        self.leases.append((self.now + self.policy.lease, permit))
        return permit

    def _permit(self) -> ModelPermit:
        self.out += 1
        return ModelPermit(self.generation, self.now)

    def settle(self, permit: ModelPermit, failure: Failure | None) -> bool:
        """Take a result; return whether it was the first of this permit."""
        if permit.outcome is not None:
            return False
        verdict = "success" if failure is None else failure.verdict
        permit.outcome = verdict
        self.out -= 1
        self.counts[verdict] += 1
        if permit.generation == self.generation and not permit.displaced:
            self.leases = [lease for lease in self.leases if lease[1] is not permit]
            self._judge(permit, failure, verdict)
        return True

    def _judge(self, permit: ModelPermit, failure: Failure | None, verdict: str) -> None:
        if self.state == "disabled":
            return
        threshold = self.policy.slow_threshold
        slow = threshold is not None and permit.seconds(self.now) >= threshold
        if failure is not None and verdict == "ignored":
            slow = slow and failure.outcome == "cancelled"
        if self._says_stop(failure):
            return
        if self.state == "half_open":
            self._judge_probe(failure, verdict, slow)
            return
        if verdict == "success":
            self.in_a_row = 0
        elif verdict == "failure":
            self.in_a_row += 1
        elif not slow:
            return
        self.slow_in_a_row = self.slow_in_a_row + 1 if slow else 0
        self.calls.append(Call(self.now, verdict == "failure", slow))
        if (reason := self._why_open()) is not None:
            self._open(reason, failure)

    def _says_stop(self, failure: Failure | None) -> bool:
        if failure is None:
            return False
        if failure.reason == "auth" and failure.verdict == "failure" and self.policy.open_on_auth:
            self._open("auth", failure)
            return True
        limited = failure.reason == "rate_limit" and failure.verdict == "ignored"
        if limited and self._hold(failure) > 0:
            self._open("rate_limit", failure)
            return True
        return False

    def _hold(self, failure: Failure | None) -> float:
        asked = (failure and failure.retry_after) or 0.0
        return min(asked, self.policy.longest_hold)

    def _judge_probe(self, failure: Failure | None, verdict: str, slow: bool) -> None:
        if verdict == "failure" or slow:
            self._open("probe_failed", failure)
        elif verdict == "success":
            self.successes += 1
            if self.successes == self.policy.successes:
                self._change("closed", "recovered")

    # The rates.

    def window(self) -> list[Call]:
        """Return the calls of the last ten steps."""
        step = Fraction(self.policy.window) / 10
        newest = math.floor(Fraction(self.now) / step)
        return [call for call in self.calls if math.floor(Fraction(call.at) / step) > newest - 10]

    def _why_open(self) -> str | None:
        policy, calls = self.policy, self.window()
        if policy.consecutive_failures and self.in_a_row >= policy.consecutive_failures:
            return "consecutive_failures"
        if policy.consecutive_slow and self.slow_in_a_row >= policy.consecutive_slow:
            return "consecutive_slow"
        if len(calls) < policy.minimum_calls:
            return None
        failures, slow = (sum(call[which] for call in calls) for which in (1, 2))
        if failures >= Fraction(str(policy.failure_rate)) * len(calls):
            return "failure_rate"
        if policy.slow_threshold is not None:  # noqa: SIM102
            if slow >= Fraction(str(policy.slow_rate)) * len(calls):
                return "slow_rate"
        return None

    # Changes.

    def _open(self, reason: str, failure: Failure | None) -> None:
        error_type = None if failure is None else failure.error_type
        if self.state == "observe":
            self.told.append(Told("observe", "open", reason, None, error_type, None, would_be=True))
            self.calls, self.in_a_row, self.slow_in_a_row = [], 0, 0
            return
        hold = self._hold(failure)
        self._heal()
        if reason == "rate_limit":
            open_for = hold
        else:
            wait = min(self.policy.open_time * 2**self.openings, self.policy.longest_open)
            wait += wait * self.policy.jitter * (self.chance * 2 - 1)
            open_for = max(wait, hold)
            self.openings = min(self.openings + 1, 60)
        self.until = self.now + open_for
        self._change("open", reason, open_for=open_for, error_type=error_type)

    def _heal(self) -> None:
        if self.state == "closed":
            times = math.floor((self.now - self.closed_since) / self.policy.decay)
            policy = self.policy
            longest = [n for n in range(60) if policy.open_time * 2**n >= policy.longest_open]
            for _ in range(min(times, 100)):
                self.openings = max(0, min([self.openings, *longest]) - 1)

    def _change(
        self,
        to: str,
        reason: str,
        *,
        open_for: float | None = None,
        error_type: str | None = None,
        adopted: bool = False,
    ) -> None:
        before, self.state = self.state, to
        self.generation += 1
        self.calls, self.leases, self.successes = [], [], 0
        self.in_a_row = self.slow_in_a_row = 0
        if to == "closed":
            self.closed_since = self.now
        if before != to:
            self.told.append(Told(before, to, reason, open_for, error_type, self.openings, adopted))

    def by_hand(self, state: str) -> None:
        """Do what somebody says."""
        self.openings = 0
        self._change(state, "manual")

    def adopt(self, state: str, reason: str, open_for: float, openings: int) -> None:
        """Take another process's word, unless somebody here has said otherwise by hand."""
        if self.state in MANUAL and reason != "manual":
            return
        self.openings = openings
        if state == "open":
            self.until = self.now + open_for
        if state != self.state:
            held = open_for if state == "open" else None
            self._change(state, reason, open_for=held, adopted=True)

    # What it says.

    def retry_after(self) -> float | None:
        """Return when a call may pass; None for now, or where nobody can tell."""
        if self.state == "open":
            return max(0.0, self.until - self.now)
        if self.state != "half_open":
            return None
        room = len(self.leases) < self.policy.probes
        return 0.0 if room or any(self.now >= expires for expires, _ in self.leases) else 1.0
