"""What a breaker tells of itself, and what it is told by other processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from opentelemetry.trace import SpanContext

    from periscope_otel.resilience.circuit import Circuit
    from periscope_otel.resilience.policy import State

BUSY: Final = 1.0
"""Seconds after which to ask again where all probes are out."""


class Transition(NamedTuple):
    """One change of a breaker's state, as listeners are told it."""

    name: str
    from_state: State
    to_state: State
    reason: str
    """`consecutive_failures`, `failure_rate`, `consecutive_slow`, `slow_rate`, `auth`,
    `rate_limit`, `probing`, `probe_failed`, `recovered` or `manual`."""
    open_for: float | None = None
    """Seconds until a probe may pass, where it has opened."""
    error_type: str | None = None
    """That of the failure that did it."""
    openings: int = 0
    """How many times in a row it has opened: the open time doubles with each."""
    adopted: bool = False
    """Whether another process has found this, and not this one."""
    would_be: bool = False
    """Whether it would have happened, in the state `observe`."""
    span_context: SpanContext | None = None
    """The span of the call that caused it."""


class BreakerView(NamedTuple):
    """A breaker at one moment."""

    name: str
    state: State
    generation: int
    retry_after: float | None
    """Seconds after which a call may pass; None where calls pass, or nobody can tell."""
    reason: str | None
    calls: int
    """Calls in the window, and how many of them failed or were slow."""
    failures: int
    slow: int
    consecutive_failures: int
    openings: int
    """How many times in a row it has opened."""
    in_flight: int
    """Permits that are out."""
    probes: int
    """How many of them are probes."""
    outcomes: dict[str, int]
    """Calls that have ended since the beginning, by `success`, `failure` and `ignored`."""
    rejections: int


class Grant(NamedTuple):
    """Other processes' word on whether this one may probe."""

    lease: str | None
    """The shared lease; None if others probe."""
    retry_after: float = BUSY


class Asked(Protocol):
    """A question to the other processes that is under way."""

    def wait(self, timeout: float) -> Grant | None:
        """Return the answer; None if there is none in time."""
        ...

    def wait_async(self, timeout: float) -> Awaitable[Grant | None]:
        """Return the answer without holding an event loop up."""
        ...


class Sharing(Protocol):
    """What tells other processes of a breaker's verdict; its methods only put into a queue."""

    def moved(self, breaker: Circuit, transition: Transition) -> None:
        """Take note of a change that this process has found."""

    def ask(self, breaker: Circuit) -> Asked | None:
        """Ask for a probe lease; None where it is known that nobody answers."""
        ...

    def settled(self, breaker: Circuit, lease: str, outcome: str) -> None:
        """Take note of how a probe under a shared lease has ended; see `Permit.outcome`."""
