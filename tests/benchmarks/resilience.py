"""What breakers and retries cost while everything works, and what a rejected call costs.

Permit and settle
    `breaker.allow().settle()`, and `breaker.call(function)`, divided by pybreaker's
    `call(function)` in its default set-up (in memory, no listeners), which keeps no window, and by
    one recorded span written by hand (`start_as_current_span`, four `set_attribute`, batch export
    to nowhere). The function does nothing.
Guarded call
    A monitored call with a breaker divided by one without; both recorded.
Span processor
    A recorded call on a provider that has a `BreakerSpanProcessor` divided by one on a provider
    that has none; the same for a client span of somebody else's, which it records on a breaker.
Rejected call
    A monitored call that an open breaker rejects, with a span, and beyond the ten a second that
    have one, divided by a recorded call. Both raise and catch `CircuitOpenError`.
Retry
    A function under `Retry()` that succeeds divided by the same under `stamina.retry(on=...)`,
    with its default instrumentation.
Many breakers
    Permit and settle on 10,000 breakers in turn divided by the same on one, each found by its name
    in a dict as a registry does; and the memory that Python has allocated for 10,000 breakers on
    which each ten calls were made (tracemalloc).

The peers and ours run in one process of an environment of the peers' own, with the same
OpenTelemetry. CPU of the caller, but for whole calls, where it is that of the process too.

Not measured: shared verdicts, which are not in the caller's way (see
tests/integration/test_shared_verdict.py for what they save).
"""

from __future__ import annotations

import os

from environments import interpreter
from harness import Measure, arguments, here, interleave, ratio, spread, start_report
from hosts import Host

ONE = (
    "permit", "call", "pybreaker", "span by hand", "recorded", "guarded", "watched", "client span",
    "watched client span", "rejected", "rejected, counted only", "retry", "stamina",
)  # fmt: skip
MANY = ("one of many", "one alone")


def host(kind: str) -> Host:
    """Start a process that measures."""
    path = os.pathsep.join([str(here().parents[1] / "src"), str(here())])
    return Host(
        here() / "resilience_host.py",
        kind,
        python=interpreter("resilience"),
        environment={"PYTHONPATH": path},
    )


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__, rounds=40, calls=2_000)
    report = start_report(__doc__, options)
    with host("one") as one:
        rounds = interleave(
            {name: one.subject(name) for name in ONE}, options.rounds, options.calls
        )
    with host("many") as many:
        memory = many.ask("memory", 10_000)["bytes"] / 1e6
        rounds |= interleave(
            {name: many.subject(name) for name in MANY}, options.rounds, options.calls * 10
        )

    def of(what: str, over: str, under: str, clock: str, target: float | None = None) -> Measure:
        return ratio(what, rounds, over, under, clock, target)

    report.measures = [
        of("permit and settle ÷ pybreaker's call", "permit", "pybreaker", "thread", 1.2),
        of("Breaker.call ÷ pybreaker's call", "call", "pybreaker", "thread"),
        of("permit and settle ÷ a span by hand", "permit", "span by hand", "thread", 0.15),
        of("monitored with ÷ without a breaker, caller", "guarded", "recorded", "thread"),
        of("monitored with ÷ without a breaker, process", "guarded", "recorded", "process"),
        of("with ÷ without span processor, process", "watched", "recorded", "process", 1.05),
        of("client span with ÷ without span processor, process", "watched client span",
           "client span", "process"),
        of("rejected ÷ recorded, process", "rejected", "recorded", "process", 1.1),
        of("rejected, counted only ÷ recorded, process", "rejected, counted only", "recorded",
           "process", 0.3),
        of("rejected, counted only ÷ recorded, caller", "rejected, counted only", "recorded",
           "thread"),
        of("retry ÷ stamina, nothing fails", "retry", "stamina", "thread", 0.1),
        of("one of 10,000 breakers ÷ one alone", "one of many", "one alone", "thread", 1.1),
        spread("memory of 10,000 breakers", [memory], 30.0, " MB"),
    ]  # fmt: skip
    report.indicate(rounds)
    report.publish(options.json)


if __name__ == "__main__":
    main()
