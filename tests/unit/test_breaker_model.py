"""A breaker does, step by step, what a plain model of its contract does."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from breaker_model import Model, ModelPermit, Told
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from periscope_otel.failure import Failure
from periscope_otel.resilience.breaker import Breaker
from periscope_otel.resilience.policy import BreakerPolicy
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from periscope_otel.resilience.circuit import Permit
    from periscope_otel.resilience.transition import Transition

FAILED = Failure("error", "ConnectionError", "failure", retryable=True, reason="connect")
BUSY = Failure("error", "503", "failure", retryable=True, retry_after=90.0, reason="server")
NOT_FOUND = Failure("error", "404", "ignored", retryable=False, reason="client")
CANCELLED = Failure("cancelled", None, "ignored", retryable=False)
REFUSED = Failure("error", "401", "failure", retryable=False, reason="auth")
KNOWN_REFUSED = Failure("error", "403", "ignored", retryable=False, reason="auth")
TOLERATED = Failure("error", "502", "success", retryable=False, reason="server")
LIMITED = Failure("error", "429", "ignored", retryable=True, reason="rate_limit")
NOT_NOW = Failure("error", "429", "ignored", True, retry_after=0.0, reason="rate_limit")
HELD = Failure("error", "429", "ignored", True, retry_after=45.0, reason="rate_limit")
HELD_LONG = Failure("error", "503", "ignored", True, retry_after=86_400.0, reason="rate_limit")
RESULTS = (
    None, None, None, FAILED, FAILED, FAILED, BUSY, NOT_FOUND, CANCELLED, REFUSED,
    KNOWN_REFUSED, TOLERATED, LIMITED, NOT_NOW, HELD, HELD_LONG,
)  # fmt: skip

# Numbers that a float holds exactly, or that end in a decimal that users write: where two ways to
# calculate would differ in the last bit, only one of them is what the policy says.
POLICIES = st.builds(
    BreakerPolicy,
    window=st.sampled_from([5.0, 20.0, 60.0]),
    minimum_calls=st.sampled_from([1, 3, 10, 20]),
    failure_rate=st.sampled_from([0.07, 0.3, 0.5, 0.55, 0.7, 1.0]),
    consecutive_failures=st.sampled_from([None, 1, 2, 5]),
    slow_threshold=st.sampled_from([None, 0.0, 2.0, 20.0]),
    slow_rate=st.sampled_from([0.2, 0.55, 0.8, 1.0]),
    consecutive_slow=st.sampled_from([None, None, 2, 3]),
    open_time=st.sampled_from([0.0, 4.0, 30.0]),
    longest_open=st.sampled_from([30.0, 96.0, 600.0]),
    jitter=st.sampled_from([0.0, 0.25, 1.0]),
    decay=st.sampled_from([8.0, 300.0]),
    probes=st.integers(1, 3),
    successes=st.integers(1, 3),
    lease=st.sampled_from([4.0, 60.0]),
    open_on_auth=st.booleans(),
    longest_hold=st.sampled_from([0.0, 64.0, 3600.0]),
)
MOMENTS = st.sampled_from([0.0, 0.125, 0.5, 1.0, 2.0, 6.0, 20.0, 64.0, 301.0, 5000.0])
STATES = st.sampled_from(["closed", "open", "half_open", "forced_open", "disabled", "observe"])
ANY = st.integers(0, 1_000_000)


class Machine(RuleBasedStateMachine):
    """Drives a breaker and the model side by side."""

    steps: ClassVar[int] = 0
    seen: ClassVar[Counter[tuple[str, str, str]]] = Counter()

    @initialize(policy=POLICIES, chance=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    def begin(self, policy: BreakerPolicy, chance: float) -> None:
        self.now = 1000.0
        self.heard: list[Transition] = []
        self.breaker = Breaker("model", policy, clock=lambda: self.now, rng=lambda: chance)
        self.breaker.listen(self.heard.append)
        self.model = Model(policy, chance, self.now)
        self.out: list[tuple[Permit, ModelPermit]] = []
        self.done: list[tuple[Permit, ModelPermit]] = []

    def agree(self, permit: Permit | None, expected: ModelPermit | None) -> None:
        assert (permit is None) == (expected is None)
        if permit is not None and expected is not None:
            self.out.append((permit, expected))

    def settle_one(self, index: int, failure: Failure | None) -> None:
        permit, expected = self.out.pop(index % len(self.out))
        assert permit.settle(failure) is self.model.settle(expected, failure) is True
        self.done.append((permit, expected))

    @rule()
    def allow(self) -> None:
        """One more call, which stays out."""
        self.agree(self.breaker.allow(), self.model.allow())

    @rule()
    def watch(self) -> None:
        """A call that is made anyway."""
        self.agree(self.breaker.watch(), self.model.watch())

    @rule(failure=st.sampled_from(RESULTS), times=st.integers(1, 12), each=MOMENTS)
    def calls(self, failure: Failure | None, times: int, each: float) -> None:
        """Calls one after the other that end alike, each taking its time."""
        for _ in range(times):
            before = len(self.out)
            self.allow()
            if each < 64:
                self.tick(each)
            if len(self.out) > before:
                self.settle_one(-1, failure)

    @precondition(lambda self: self.out)
    @rule(index=ANY, failure=st.sampled_from(RESULTS))
    def settle(self, index: int, failure: Failure | None) -> None:
        """Any call that is out comes back, of whatever generation it is."""
        self.settle_one(index, failure)

    @precondition(lambda self: self.out)
    @rule(index=ANY, failure=st.sampled_from(RESULTS))
    def conclude(self, index: int, failure: Failure | None) -> None:
        """A permit that was told how its call ended is settled by somebody who does not know."""
        permit, expected = self.out.pop(index % len(self.out))
        permit.conclude(failure)
        assert permit.settle() is self.model.settle(expected, failure) is True
        self.done.append((permit, expected))

    @precondition(lambda self: self.done)
    @rule(index=ANY, failure=st.sampled_from(RESULTS))
    def settle_again(self, index: int, failure: Failure | None) -> None:
        """A permit settles once."""
        permit, expected = self.done[index % len(self.done)]
        assert permit.settle(failure) is self.model.settle(expected, failure) is False

    @precondition(lambda self: self.out)
    @rule(index=ANY)
    def lose(self, index: int) -> None:
        """A call that never comes back: its permit is out for ever."""
        self.out.pop(index % len(self.out))

    @precondition(lambda self: self.out)
    @rule(index=ANY, resumes=st.booleans())
    def pause(self, index: int, resumes: bool) -> None:
        """A generator yields, or goes on; also twice in a row."""
        permit, expected = self.out[index % len(self.out)]
        if resumes:
            permit.resume()
            expected.resume(self.now)
        else:
            permit.pause()
            expected.pause(self.now)

    @rule(seconds=MOMENTS)
    def tick(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        self.model.now = self.now

    @rule()
    def tick_until_it_may_pass(self) -> None:
        """Time passes to the very moment at which a probe may."""
        self.tick(self.model.retry_after() or 0.0)

    @rule()
    def tick_past_the_lease(self) -> None:
        """Time passes until no probe that is out counts."""
        self.tick(self.model.policy.lease)

    @rule(does=st.sampled_from(["force_open", "disable", "observe", "reset", "reset", "reset"]))
    def by_hand(self, does: str) -> None:
        """Somebody sets the state."""
        getattr(self.breaker, does)()
        self.model.by_hand(
            {"force_open": "forced_open", "disable": "disabled", "reset": "closed"}.get(does, does)
        )

    @rule(
        state=STATES,
        reason=st.sampled_from(["failure_rate", "recovered", "manual"]),
        open_for=st.sampled_from([0.0, 8.0, 600.0]),
        openings=st.integers(0, 4),
    )
    def adopt(self, state: Any, reason: str, open_for: float, openings: int) -> None:
        """Another process says something."""
        self.breaker.adopt(state, reason=reason, open_for=open_for, openings=openings)
        self.model.adopt(state, reason, open_for, openings)

    @invariant()
    def is_as_the_model(self) -> None:
        """All that can be seen of the one is as in the other."""
        type(self).steps += 1
        model, view = self.model, self.breaker.view()
        assert self.breaker.state == view.state == model.state
        assert view.in_flight == model.out
        assert view.probes == len(model.leases) <= model.policy.probes
        assert view.generation == model.generation
        assert view.consecutive_failures == model.in_a_row
        assert {**view.outcomes, "rejected": view.rejections} == model.counts
        window = model.window()
        assert view.calls == len(window)
        assert view.failures == sum(call.failed for call in window)
        assert view.slow == sum(call.slow for call in window)
        assert self.breaker.retry_after == view.retry_after == model.retry_after()
        for permit, expected in self.out:
            assert permit.seconds(self.now) == expected.seconds(self.now)

    @invariant()
    def has_told_all(self) -> None:
        """Listeners have heard every transition, in order."""
        assert worker.finish_posted(30)
        heard = [
            Told(*one[1:6], None if one.would_be else one.openings, one.adopted, one.would_be)
            for one in self.heard
        ]
        assert heard == self.model.told
        self.seen.update((one.from_state, one.to_state, one.reason) for one in heard)
        self.heard.clear()
        self.model.told.clear()


@pytest.mark.timeout(900)
def test_a_breaker_is_as_its_model():
    """Over 20,000 random steps under random policies nothing differs, and all paths are taken."""
    Machine.steps = 0
    Machine.seen.clear()
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=500,
            stateful_step_count=100,
            derandomize=True,
            deadline=None,
            phases=[Phase.generate],
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Machine.steps >= 20_000
    assert wanted_transitions() - set(Machine.seen) == set()


def wanted_transitions() -> set[tuple[str, str, str]]:
    """Return what has to have happened, or the steps were no test of it."""
    return {
        ("closed", "open", "consecutive_failures"),
        ("closed", "open", "failure_rate"),
        ("closed", "open", "slow_rate"),
        ("closed", "open", "consecutive_slow"),
        ("closed", "open", "auth"),
        ("closed", "open", "rate_limit"),
        ("open", "half_open", "probing"),
        ("half_open", "open", "probe_failed"),
        ("half_open", "open", "auth"),
        ("half_open", "open", "rate_limit"),
        ("half_open", "closed", "recovered"),
        ("observe", "open", "failure_rate"),
        ("observe", "open", "auth"),
        ("forced_open", "closed", "manual"),
    }
