"""What can only be told inside of the program: its providers, its losses, its label sets.

A running program tells it to `periscope doctor` by a page on its Prometheus address.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from periscope_otel import guard
from periscope_otel.doctor.finding import Finding, broken, off, ok, warning
from periscope_otel.doctor.pipelines import double_findings, duplicate_findings
from periscope_otel.resilience.policy import BY_HAND
from periscope_otel.resilience.sampler import check_sampler
from periscope_otel.telemetry.breaker_instruments import source as breaker_source
from periscope_otel.telemetry.letter_counts import letter_counts
from periscope_otel.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from periscope_otel.report import ExportReport
    from periscope_otel.telemetry.instruments import Instruments

PROGRAM: Final = "program."
"""What the names of these checks begin with."""
PAGE: Final = "/doctor"
"""Where a program tells it."""

_NEAR: Final = 0.8
"""Share of the label limit from which a warning is due."""
_LONG: Final = 300.0
"""Seconds that a letter may wait for the Redis before a warning is due."""
_FORKING_SERVERS: Final = ("gunicorn", "uwsgi", "celery", "billiard")
_FRESH: Final = 5.0
"""Seconds for which a page is told again: looking for providers takes a while."""


class Program(NamedTuple):
    """What a program is examined by."""

    tracer_provider: TracerProvider | None
    meter_provider: MeterProvider | None
    builds_spans: bool
    """Whether the TracerProvider is `configure()`'s own."""
    builds_metrics: bool
    drives_breakers: bool
    """Whether client spans are recorded on breakers."""
    report: ExportReport
    instruments: Instruments
    label_limit: int


def program_findings(program: Program) -> Iterator[Finding]:
    """Say what is well and what is not inside of a program."""
    for name, provider, is_ours in (
        ("traces", program.tracer_provider, program.builds_spans),
        ("metrics", program.meter_provider, program.builds_metrics),
    ):
        yield _of_provider(name, provider, is_ours)
    yield from double_findings(program.tracer_provider, program.meter_provider)
    yield from duplicate_findings(program.tracer_provider, program.meter_provider, program.report)
    yield from _sampler(program)
    yield from _forks(program)
    yield _losses(program.report)
    yield _labels(program)
    yield _letters()
    yield _internal_errors()
    yield _breakers()
    yield _gauges()


class ProgramPage:
    """The page on which a program tells what is found in it.

    Args:
        findings: Examines the program.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        findings: Callable[[], Iterable[Finding]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._findings = findings
        self._clock = clock
        self._lock = threading.Lock()
        self._told: tuple[float, bytes] | None = None

    def render(self) -> bytes:
        """Return the page as JSON; the same for a few seconds."""
        with self._lock:
            now = self._clock()
            if self._told is None or now - self._told[0] > _FRESH:
                findings = [one.as_json() for one in self._findings()]
                page = {"periscope-otel": __version__, "findings": findings}
                self._told = now, json.dumps(page).encode()
            return self._told[1]


# --- providers -----------------------------------------------------------------------------------


def _of_provider(name: str, provider: object, is_ours: bool) -> Finding:
    check = f"program.{name}"
    if provider is None:
        return off(check, f"no provider: {name} go nowhere")
    kind = type(provider)
    if is_ours:
        return ok(check, f"the {kind.__name__} that configure() has built")
    return ok(check, f"the application's {kind.__module__}.{kind.__qualname__}, used as it is")


def _sampler(program: Program) -> Iterator[Finding]:
    fault = check_sampler(program.tracer_provider) if program.drives_breakers else None
    if fault is None:
        return
    yield warning(
        "program.sampler",
        fault,
        "set PERISCOPE_RECORD_CLIENT_SPANS=true"
        if program.builds_spans
        else "wrap the sampler in RecordOnlySampler, as README shows",
    )


def _forks(program: Program) -> Iterator[Finding]:
    if program.builds_metrics or program.meter_provider is None:
        yield ok("program.fork", "forked children get a MeterProvider of their own")
        return
    how = multiprocessing.get_start_method(allow_none=True)
    servers = [name for name in _FORKING_SERVERS if name in sys.modules]
    by = [*servers, *(["multiprocessing"] if how == "fork" else [])]
    if by:
        yield warning(
            "program.fork",
            f"{' and '.join(by)} may fork this process, and a child can hang at its first "
            "measurement on the application's MeterProvider, whose locks it inherits",
            "let configure() build the provider, or make it in each worker after the fork",
        )
    else:
        yield ok("program.fork", "nothing here forks the application's MeterProvider")


# --- what goes wrong -----------------------------------------------------------------------------


def _losses(report: ExportReport) -> Finding:
    lost = [
        f"of {one.signal} to {one.destination} {one.failed} failed and {one.dropped} were dropped"
        for one in report.signals
        if one.failed or one.dropped
    ]
    if lost:
        return warning(
            "program.losses",
            "; ".join(lost),
            "look whether the Collector was away, refuses requests or is too slow",
        )
    exported = ", ".join(f"{one.exported} {one.signal}" for one in report.signals)
    return ok("program.losses", f"nothing was lost{f' of {exported}' if exported else ''}")


def _labels(program: Program) -> Finding:
    limit = program.label_limit
    program.instruments.drain()  # what has ended and not yet been counted
    usage = program.instruments.label_sets()
    name, most = max(usage.items(), key=lambda one: one[1])
    told = f"{name} has {most} of {limit} label sets"
    if most < _NEAR * limit:
        return ok("program.labels", told)
    what = "further values are counted as `other`" if most >= limit else "near its limit"
    return warning(
        "program.labels",
        f"{told}: {what}",
        "look for an operation or feed that is named after an item; "
        "PERISCOPE_LABEL_LIMIT may be up to 1500",
    )


def _letters() -> Finding:
    lost = sum(letter_counts.losses().values())
    if lost:
        return broken(
            "program.letters",
            f"{lost} dead letters were lost",
            "the log says why: mostly a full disk, or a payload that cannot be kept",
        )
    outbox = letter_counts.outbox()
    waited = 0.0 if outbox is None or outbox.oldest is None else time.time() - outbox.oldest
    if outbox is not None and outbox.letters and waited > _LONG:
        return warning(
            "program.letters",
            f"{outbox.letters} letters wait for the Redis, the oldest for {waited:.0f} s",
            "look whether the Redis is away, full, or refuses them (`periscope doctor` asks it)",
        )
    return ok("program.letters", "none was lost")


def _internal_errors() -> Finding:
    counts = guard.counts()
    number = sum(counts.values())
    if not number:
        return ok("program.errors", "none")
    worst = max(counts, key=lambda place: counts[place])
    return warning(
        "program.errors",
        f"{number} errors inside of periscope-otel were contained, most of them in: {worst}",
        "the log has one line for each place: please report it",
    )


def _breakers() -> Finding:
    figures = breaker_source.figures
    states = {} if figures is None else figures.states()
    by_hand = sorted(name for (name, state), on in states.items() if on and state in BY_HAND)
    if by_hand:
        return warning(
            "program.breakers",
            f"set by hand: {', '.join(by_hand[:5])}",
            "reset() lets a breaker judge by itself again",
        )
    opened = sorted(name for (name, state), on in states.items() if on and state == "open")
    number = len({name for name, _ in states})
    told = f": {', '.join(opened[:5])}" if opened else ""
    return ok("program.breakers", f"{len(opened)} of {number} are open{told}")


def _gauges() -> Finding:
    module: Any = sys.modules.get("periscope_otel.gauges.instrument")
    condition = None if module is None else module.condition()
    if condition is None:
        return off("program.gauges", "no host or GPU figures are sampled")
    if condition.hanging:
        return warning(
            "program.gauges",
            f"reading the {' and '.join(condition.hanging)} figures hangs",
            "look for Xid errors in the kernel's log; the driver may need a restart",
        )
    if condition.problem is not None:
        return warning("program.gauges", condition.problem.message, condition.problem.remedy)
    return ok("program.gauges", f"sampled: {', '.join(condition.parts)}")
