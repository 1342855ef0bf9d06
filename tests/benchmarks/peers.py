"""A recorded call of ours divided by the same call under other decorators.

logfire's `@instrument`, traceloop's `@task` and autometrics, each in the set-up that its
documentation recommends, on a function that does nothing, with one short text as argument,
exporting in batches to nowhere. What each emits differs, and is left at its default: ours a span
and a duration histogram with exemplar; logfire and traceloop a span with the arguments and no
metrics; autometrics (its OpenTelemetry tracker, the default) a counter and a histogram and no
span. Whole-process CPU, everything drained (autometrics: scraped once a round).

Each peer has an environment of its own (environments.py) with the same OpenTelemetry as ours;
there both run in one process, interleaved. logfire's other form (no arguments) and autometrics'
other tracker (prometheus_client without OpenTelemetry, so without exemplars) are given too.

Not measured: failures, async functions, network export, the peers' other features.
"""

from __future__ import annotations

import os

from environments import interpreter
from harness import Measure, Report, Rounds, arguments, here, interleave, ratio, start_report
from hosts import Host

LOGFIRE_BARE = "logfire, extract_args=False"


def compare(peer: str, environment: str, subjects: list[str], rounds: int, calls: int) -> Rounds:
    """Interleave ours and a peer's subjects in one process of the peer's environment."""
    path = os.pathsep.join([str(here().parents[1] / "src"), str(here())])
    with Host(
        here() / "peer_host.py",
        peer,
        python=interpreter(environment),
        environment={"PYTHONPATH": path},
    ) as host:
        return interleave({name: host.subject(name) for name in ("ours", *subjects)}, rounds, calls)


def ratios(rounds: Rounds, under: str, name: str, target: float | None) -> list[Measure]:
    """Return the ratio of the process, which has the target, and that of the caller."""
    return [
        ratio(f"ours ÷ {name}, process", rounds, "ours", under, "process", target),
        ratio(f"ours ÷ {name}, caller", rounds, "ours", under, "thread"),
    ]


def add(report: Report, rounds: Rounds, named: dict[str, tuple[str, float | None]]) -> None:
    """Add a peer's ratios to the report."""
    for under, (name, target) in named.items():
        report.measures += ratios(rounds, under, name, target)
    report.indicate(rounds)


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__, rounds=40, calls=2_000)
    report = start_report(__doc__, options)
    size = (options.rounds, options.calls)
    rounds = compare("logfire", "logfire", ["logfire", LOGFIRE_BARE], *size)
    add(
        report,
        rounds,
        {"logfire": ("logfire @instrument", 0.25), LOGFIRE_BARE: (LOGFIRE_BARE, None)},
    )
    rounds = compare("traceloop", "traceloop", ["traceloop"], *size)
    add(report, rounds, {"traceloop": ("traceloop @task", 0.45)})
    rounds = compare("autometrics", "autometrics", ["autometrics"], *size)
    add(report, rounds, {"autometrics": ("autometrics", 1.0)})
    rounds = compare("autometrics-prometheus", "autometrics", ["autometrics"], *size)
    add(report, rounds, {"autometrics": ("autometrics, prometheus_client tracker", None)})
    report.publish(options.json)


if __name__ == "__main__":
    main()
