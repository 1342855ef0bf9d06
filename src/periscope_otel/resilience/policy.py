"""When a breaker opens, for how long, and what lets it close again: its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args

from periscope_otel.failure import Verdict

State = Literal["closed", "open", "half_open", "forced_open", "disabled", "observe"]
"""What a breaker does with calls: `closed` and `disabled` let them pass, `open` and `forced_open`
reject them, `half_open` lets a few probes pass, `observe` lets them pass and says what it would
have done."""

STATES: Final[tuple[State, ...]] = get_args(State)

BY_HAND: Final[frozenset[State]] = frozenset({"forced_open", "disabled", "observe"})
"""Those that a breaker is only in if somebody has set it."""

Judge = Callable[[BaseException], Verdict | None]
"""Says what an exception means to a breaker; None for what it would mean without asking."""


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """The settings of a breaker. The defaults suit feeds that are polled once a minute or less.

    It opens when `consecutive_failures` calls in a row fail or `consecutive_slow` are slow, when
    at least `minimum_calls` were made in the last `window` seconds and `failure_rate` of them
    failed or `slow_rate` were slow, and at once when the dependency refuses the credentials.

    Attributes:
        window: Seconds of the past that count, in ten steps.
        minimum_calls: Calls in the window below which the rates say nothing.
        failure_rate: Share of failed calls that opens it, above 0 and up to 1.
        consecutive_failures: Failed calls in a row that open it; None for no such rule.
        slow_threshold: Seconds from which a call is slow; None (the default) if none is.
        slow_rate: Share of slow calls that opens it, above 0 and up to 1.
        consecutive_slow: Slow calls in a row that open it, where there is a `slow_threshold`; None
            for no such rule.
        open_time: Seconds for which it is open the first time; each further time twice as long.
        longest_open: Seconds that doubling ends at; for a dependency with many calls a second, 60
            rather than the default 600 finds a recovery sooner, at the price of some more probes.
        jitter: Share by which an open time is made longer or shorter at random, so that many
            processes do not come back at once.
        decay: Seconds that it has to be closed for the open time to be halved again.
        longest_hold: Seconds that a Retry-After can hold it at most.
        probes: Calls that are let through at the same time when it is half open.
        successes: Probes that have to succeed for it to close; one that fails opens it again.
        lease: Seconds after which a probe that has not ended makes room for another.
        open_on_auth: Whether refused credentials (401, 403) open it at once.
        probe_wait: Seconds that a call waits for other processes' word on who probes; 0 rejects
            it, and the next one passes.
        shared: Whether other processes are told, where there is a Redis to tell them by.
        judge: Asked first what an exception means: `"success"`, `"failure"`, `"ignored"`, or None
            for the usual rules (`periscope_otel.failure`).

    Raises:
        ValueError: If a setting is out of its range; the message names it and what fits.
        TypeError: If a setting is of another type.

    Example:
        >>> BreakerPolicy(slow_threshold=20.0, open_time=60.0).probes
        1
    """

    window: float = 60.0
    minimum_calls: int = 10
    failure_rate: float = 0.5
    consecutive_failures: int | None = 5
    slow_threshold: float | None = None
    slow_rate: float = 0.8
    consecutive_slow: int | None = 5
    open_time: float = 30.0
    longest_open: float = 600.0
    jitter: float = 0.2
    decay: float = 300.0
    longest_hold: float = 86_400.0
    probes: int = 1
    successes: int = 2
    lease: float = 60.0
    open_on_auth: bool = True
    probe_wait: float = 0.05
    shared: bool = True
    judge: Judge | None = None

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            check_number(name, getattr(self, name), low, high, whole=name in _WHOLE)
        if self.longest_open < self.open_time:
            raise ValueError(
                f"longest_open={self.longest_open}: expected at least open_time ({self.open_time})"
            )
        for name in ("open_on_auth", "shared"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}= takes True or False")
        if self.judge is not None and not callable(self.judge):
            raise TypeError("judge= takes a callable")

    def changed(self, **changes: Any) -> BreakerPolicy:
        """Return one that differs in these settings.

        Raises:
            TypeError: If there is no such setting; the message names them all.
        """
        known = [field.name for field in fields(self)]
        if unknown := [name for name in changes if name not in known]:
            raise TypeError(
                f"{unknown[0]!r} is no setting of a breaker; there are {', '.join(known)}"
            )
        return BreakerPolicy(**{name: getattr(self, name) for name in known} | changes)


_DAY: Final = 86_400.0
_SMALLEST: Final = 1e-6
_RANGES: Final[tuple[tuple[str, float, float], ...]] = (
    ("window", 0.01, _DAY),
    ("minimum_calls", 1, 1_000_000),
    ("failure_rate", _SMALLEST, 1.0),
    ("consecutive_failures", 1, 1_000_000),
    ("slow_threshold", 0.0, _DAY),
    ("slow_rate", _SMALLEST, 1.0),
    ("consecutive_slow", 1, 1_000_000),
    ("open_time", 0.0, _DAY),
    ("longest_open", 0.0, _DAY),
    ("jitter", 0.0, 1.0),
    ("decay", 0.001, 30 * _DAY),
    ("longest_hold", 0.0, _DAY),
    ("probes", 1, 1_000),
    ("successes", 1, 1_000),
    ("lease", 0.001, _DAY),
    ("probe_wait", 0.0, 5.0),
)
_WHOLE: Final = ("minimum_calls", "consecutive_failures", "probes", "successes", "consecutive_slow")
_MAY_BE_NONE: Final = ("consecutive_failures", "slow_threshold", "consecutive_slow")


def check_number(name: str, value: object, low: float, high: float, *, whole: bool = False) -> None:
    """Raise unless a setting is a number, or None where it may be, in its range.

    Args:
        name: What the setting is called.
        value: What it is set to.
        low: The least that it may be.
        high: The most.
        whole: Whether it has to be a whole number.

    Raises:
        ValueError: If it is out of its range; the message names it and what fits.
        TypeError: If it is of another type.
    """
    if value is None and name in _MAY_BE_NONE:
        return
    fitting = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, fitting):
        kind = "a whole number" if whole else "a number"
        raise TypeError(f"{name}={value!r:.40}: expected {kind}")
    if not low <= value <= high:  # false for NaN too
        least = "above 0" if low == _SMALLEST else f"from {low:g}"
        raise ValueError(f"{name}={value!r:.40}: expected a number {least} to {high:g}")


DEFAULT_POLICY: Final = BreakerPolicy()
