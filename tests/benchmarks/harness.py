"""What all benchmarks share: interleaved rounds, ratios round by round, and one report.

In each round every subject is measured once, in a random order, in one process (or in processes
that take turns, see hosts.py). A result is the median, with quartiles, of the ratios *of the same
round*, so that what else the machine does hits both sides alike. Microseconds are printed as an
indication only. The first rounds warm up and are thrown away.

CPU time is what is compared: of the calling thread, and of the whole process including what
background threads do for the calls. Each measured round ends only when everything emitted in it
has been drained and exported, so no side can put its cost off. The garbage collector is on, as in
production; a full collection runs before each measurement, outside of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Sample = dict[str, float]
"""Figures of one subject in one round, such as CPU seconds a call."""

Rounds = dict[str, list[Sample]]
"""Samples by subject, in the order of the rounds."""

WARM_UP_ROUNDS = 3


@dataclass(frozen=True)
class Subject:
    """Something to be measured: what to call, and how to wait for what the calls left behind."""

    call: Callable[[], object]
    drain: Callable[[], None] = lambda: None
    before: Callable[[], None] = lambda: None
    """Runs before each measurement, outside of it."""

    def measure(self, calls: int) -> Sample:
        """Make `calls` calls and drain; CPU seconds a call of the thread and of the process."""
        return measure(lambda: repeat_call(self.call, calls), calls, self.drain, self.before)


def measure(
    run: Callable[[], object],
    calls: int,
    drain: Callable[[], None] = lambda: None,
    before: Callable[[], None] = lambda: None,
) -> Sample:
    """Time `run`, which makes `calls` calls, and the drain after it."""
    before()
    gc.collect()
    wall, process, thread = time.perf_counter(), time.process_time(), time.thread_time()
    run()
    thread = time.thread_time() - thread
    drain()
    process, wall = time.process_time() - process, time.perf_counter() - wall
    return {"thread": thread / calls, "process": process / calls, "wall": wall / calls}


def repeat_call(call: Callable[[], object], calls: int) -> None:
    """Call ten times a turn, so that the loop itself hardly counts."""
    for _ in repeat(None, calls // 10):
        call(), call(), call(), call(), call(), call(), call(), call(), call(), call()


def interleave(
    subjects: Mapping[str, Callable[[int], Sample]], rounds: int, calls: int, seed: int = 1
) -> Rounds:
    """Measure every subject once a round, in random order; returns samples by subject."""
    order, shuffle = list(subjects), random.Random(seed).shuffle
    taken: Rounds = {name: [] for name in subjects}
    for number in range(-WARM_UP_ROUNDS, rounds):
        shuffle(order)
        for name in order:
            sample = subjects[name](calls)
            if number >= 0:
                taken[name].append(sample)
    return taken


@dataclass(frozen=True)
class Measure:
    """One line of a report: a median with its quartiles, and its target if it has one."""

    what: str
    target: float | None
    median: float
    lower: float
    upper: float
    unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        return None if self.target is None else self.median <= self.target

    def row(self) -> tuple[str, str, str, str]:
        """What is measured, its target, the result and the verdict, as texts."""
        target = "" if self.target is None else f"≤ {self.target:g}{self.unit}"
        result = f"{_shown(self.median)} [{_shown(self.lower)}-{_shown(self.upper)}]{self.unit}"
        verdict = {None: "", True: "yes", False: "NO"}[self.met]
        return self.what, target, result, verdict


def _shown(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 1_000 else f"{figure:.3g}"


def spread(what: str, values: list[float], target: float | None = None, unit: str = "") -> Measure:
    """Return the median and quartiles of `values`."""
    if len(values) == 1:
        return Measure(what, target, *values * 3, unit)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Measure(what, target, median, lower, upper, unit)


def ratio(  # noqa: PLR0917  (a table of these reads best without keywords)
    what: str, rounds: Rounds, over: str, under: str, clock: str, target: float | None = None
) -> Measure:
    """Return the ratios, round by round, of one figure of two subjects."""
    pairs = zip(rounds[over], rounds[under], strict=True)
    return spread(what, [a[clock] / b[clock] for a, b in pairs], target)


@dataclass
class Report:
    """What a script has found; printed as a table and written as JSON."""

    title: str
    settings: dict[str, Any]
    measures: list[Measure] = field(default_factory=list)
    indications: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def indicate(self, rounds: Rounds) -> None:
        """Add each subject's microseconds a call, as an indication."""
        for name, samples in rounds.items():
            thread = statistics.median(sample["thread"] for sample in samples) * 1e6
            process = statistics.median(sample["process"] for sample in samples) * 1e6
            self.indications.append(
                f"{name}: {thread:.3g} µs CPU in the caller, {process:.3g} µs in the process"
            )

    def publish(self, json_file: Path | None) -> None:
        """Print the report, and write it to a file if one is given."""
        print(f"\n{self.title}\n{environment_line()}\n")
        print_table([("measure", "target", "median [quartiles]", "met"), *self.rows()])
        for title, lines in (("Indication only", self.indications), ("Notes", self.notes)):
            if lines:
                print(f"\n{title}:\n  " + "\n  ".join(lines))
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(self.as_json(), indent=2) + "\n")

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table's lines."""
        return [one.row() for one in self.measures]

    def as_json(self) -> dict[str, Any]:
        """Everything, with the environment it was measured in."""
        return {
            "title": self.title,
            "environment": environment(),
            "settings": self.settings,
            "measures": [{**vars(one), "met": one.met} for one in self.measures],
            "indications": self.indications,
            "notes": self.notes,
        }


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "opentelemetry-api": _version("opentelemetry-api"),
        "opentelemetry-sdk": _version("opentelemetry-sdk"),
        "periscope-otel": _version("periscope-otel"),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "gc": "on; a full collection before each measurement" if gc.isenabled() else "off",
    }


def environment_line() -> str:
    """The environment in one line."""
    return ", ".join(f"{name} {value}" for name, value in environment().items())


def arguments(doc: str, *, rounds: int, calls: int) -> argparse.Namespace:
    """Parse what every script takes: `--rounds`, `--calls` and `--json FILE`."""
    return parser_of(doc, rounds=rounds, calls=calls).parse_args()


def parser_of(doc: str, *, rounds: int, calls: int) -> argparse.ArgumentParser:
    """Return a parser of that, for a script that takes more."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    parser.add_argument("--calls", type=int, default=calls, help=f"a round; default {calls}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    return parser


def start_report(doc: str, options: argparse.Namespace) -> Report:
    """Return an empty report titled by the first line of a script's docstring."""
    settings = {"rounds": options.rounds, "calls": options.calls, "warm_up_rounds": WARM_UP_ROUNDS}
    return Report(doc.strip().splitlines()[0], settings)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def here() -> Path:
    """The folder of the benchmarks."""
    return Path(sys.modules[__name__].__file__ or "").resolve().parent
