"""How many spans a second one process gets through a Collector into Jaeger without losing any.

The servers are those of tests/stack, with the shipped configurations: a Collector whose queue is on
disk with fsync, a Jaeger that keeps traces in memory, a Prometheus. A process makes traces of 100
monitored operations at a pace, with the default settings of the SDK's batch processor. A pace is
sustained when the process kept it for `--seconds`, its own account shows no loss, and every span
is in Jaeger by the id of its trace. The highest such pace is searched for by halving the steps; it
is the result if it is sustained `--rounds` times in a row, else the next that is, 5 % lower each.

The processor time of each process is that of such a run, until Jaeger has taken all of it. All
share this machine, as they do where a user tries them, so the figure is lower than with servers
elsewhere.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from harness import Report, here, spread

sys.path[:0] = [str(here().parent / folder) for folder in ("stack", "integration")]
from processes import clean_environment  # noqa: E402
from servers import Collector, Jaeger, Prometheus  # noqa: E402

KEPT = 0.98
"""Share of a pace that has to be reached."""

FIRST, FINEST = 4_000, 250
"""The first pace that is tried, and the step below which the search ends; spans a second."""

LOWER = 0.95
"""What a pace is multiplied with that was not sustained every time."""

TAKEN = re.compile(r"^otelcol_receiver_accepted_spans\w*(?:{.*})? (\S+)", re.MULTILINE)
MOST_TRACES = "10000"
"""That Jaeger keeps: those of a run, and not those of all."""

ARRIVES_WITHIN = 30.0
"""Seconds after the process has ended."""


class Stack(NamedTuple):
    """The running servers."""

    collector: Collector
    jaeger: Jaeger
    prometheus: Prometheus


class Run(NamedTuple):
    """One run at one pace."""

    pace: float
    rate: float
    """Spans a second that were made."""
    sustained: bool
    cpu: dict[str, float]
    """Processor microseconds a span, by process."""
    why: str


def load(stack: Stack, protocol: str, pace: float, seconds: float) -> Run:
    """Run the load once, and count what arrives."""
    arrived = spans_taken(stack.jaeger)
    before = {server.name: server.cpu_seconds() for server in stack}
    command = [str(here() / "stack_load.py"), stack.collector.endpoint(protocol), protocol]
    done = subprocess.run(
        [sys.executable, *command, str(pace), str(seconds)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    wait_for_arrival(stack.jaeger, told["made"] + told["warm_up"] - told["lost"] + arrived)
    after = {server.name: server.cpu_seconds() for server in stack}
    missing = told["made"] - count(stack.jaeger, told["traces"])
    spans = told["made"] + told["warm_up"]
    cpu = {name: (after[name] - before[name]) / spans * 1e6 for name in after}
    cpu = {"program": told["cpu"] / told["made"] * 1e6, **cpu}
    rate = told["made"] / told["seconds"]
    lost = {"not exported": told["lost"], "not in Jaeger": missing}
    reasons = [f"{count:,} {what}" for what, count in lost.items() if count]
    if rate < KEPT * pace:
        reasons.append(f"only {rate:,.0f} a second were made")
    return Run(pace, rate, not reasons, cpu, ", ".join(reasons))


def spans_taken(jaeger: Jaeger) -> int:
    """Return how many spans Jaeger has taken so far, by its own count."""
    with urllib.request.urlopen(f"http://{jaeger.metrics_address}/metrics", timeout=10) as page:
        counts = TAKEN.findall(page.read().decode())
    return sum(int(float(count)) for count in counts)


def wait_for_arrival(jaeger: Jaeger, wanted: int) -> None:
    """Wait until Jaeger has taken so many spans, or the time is up."""
    deadline = time.monotonic() + ARRIVES_WITHIN
    while spans_taken(jaeger) < wanted and time.monotonic() < deadline:
        time.sleep(0.05)


def count(jaeger: Jaeger, traces: list[str]) -> int:
    """Return how many spans of these traces Jaeger can show."""
    return sum(len({span.span_id for span in jaeger.api.trace(one)}) for one in traces)


def search(stack: Stack, protocol: str, seconds: float) -> float:
    """Return the highest pace that is sustained."""
    pace, step, rising = float(FIRST), FIRST / 2, True
    best = float(FINEST)  # lower ones are not searched for
    while step >= FINEST:
        run = load(stack, protocol, pace, seconds)
        print(f"  {pace:,.0f} spans/s: {run.why or 'sustained'}", file=sys.stderr)
        best = max(best, pace) if run.sustained else best
        rising = rising and run.sustained
        step = step if rising else step / 2
        pace += step if run.sustained else -step
    return best


def confirm(stack: Stack, protocol: str, pace: float, seconds: float, rounds: int) -> list[Run]:
    """Run a pace several times, and lower ones until one is sustained every time."""
    while True:
        runs = []
        for _ in range(rounds):
            runs.append(load(stack, protocol, pace, seconds))
            if not runs[-1].sustained:
                break
        else:
            return runs
        print(f"  {pace:,.0f} spans/s, round {len(runs)}: {runs[-1].why}", file=sys.stderr)
        pace *= LOWER


def measure(report: Report, protocol: str, seconds: float, rounds: int) -> None:
    """Search for the pace of one protocol and add what it takes to a report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jaeger, prometheus = Jaeger(folder / "jaeger"), Prometheus(folder / "prometheus")
        jaeger.environment["JAEGER_MAX_TRACES"] = MOST_TRACES
        collector = Collector(folder / "collector", jaeger.otlp, prometheus.url)
        with jaeger, prometheus, collector:
            stack = Stack(collector, jaeger, prometheus)
            runs = confirm(stack, protocol, search(stack, protocol, seconds), seconds, rounds)
            memory = {server.name: server.memory() / 1e6 for server in stack}
    rates = [run.rate for run in runs]
    report.measures.append(spread(f"sustained over {protocol}", rates, unit=" spans/s"))
    for who in runs[0].cpu:
        each = [run.cpu[who] for run in runs]
        report.measures.append(spread(f"{protocol}: CPU of {who}", each, unit=" µs a span"))
    resident = ", ".join(f"{name} {size:.0f} MB" for name, size in memory.items())
    report.notes.append(f"{protocol}: resident at the end {resident}")


def main() -> None:
    """Measure both protocols and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="at the highest pace; default 5")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a run; default 10")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    options = parser.parse_args()
    settings = {"rounds": options.rounds, "seconds": options.seconds, "spans_a_trace": 100}
    report = Report(__doc__.splitlines()[0], settings)
    for protocol in ("http/protobuf", "grpc"):
        measure(report, protocol, options.seconds, options.rounds)
    report.publish(options.json)


if __name__ == "__main__":
    main()
