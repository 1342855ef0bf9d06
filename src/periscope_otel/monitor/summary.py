"""The summary of a run: what every operation did, what became of the items, where telemetry went.

It is a listener like any exporter: it hears of each operation once that has settled, and holds a
few numbers for each operation name and feed. Nothing is drawn, and rich is not imported, until the
summary is printed.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self, TypeVar

from periscope_otel.items import FAILED, INGESTED, SKIPPED, UNACCOUNTED
from periscope_otel.redaction import clean_name
from periscope_otel.telemetry import names
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    from rich.console import Console, ConsoleOptions, RenderResult

    from periscope_otel.report import ExportReport
    from periscope_otel.server import Server
    from periscope_otel.telemetry.current import Telemetry
    from periscope_otel.telemetry.instruments import Settled
    from periscope_otel.telemetry.series import Series

_Key = TypeVar("_Key")

_ERROR_TYPES = 20
"""Error types that are told apart for one operation and feed; further ones become `other`."""

_BUCKET_RATIO = 1.05
_SHORTEST = 1e-7
_LONGEST = 1e6
_WAIT = 5.0
"""Seconds to wait at most for operations that finalisers have handed to the worker."""


class Observed(Protocol):
    """What a summary looks at; the `Runtime` that `configure()` returns is one."""

    telemetry: Telemetry
    server: Server | None

    @property
    def tracer_provider(self) -> object | None:
        """Where spans go."""

    @property
    def meter_provider(self) -> object | None:
        """Where metrics go."""

    @property
    def closed(self) -> bool:
        """Whether it was shut down."""
        ...

    def report(self) -> ExportReport:
        """Return what was exported so far."""
        ...


class Latency:
    """Durations in logarithmic buckets, 5 % apart, so that memory is bounded at any count.

    A quantile is within 2.5 % of the true one, and never beyond the shortest and longest duration,
    which are kept exactly.
    """

    def __init__(self) -> None:
        self.shortest = math.inf
        self.longest = 0.0
        self._buckets: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Take one duration."""
        self.shortest = min(self.shortest, seconds)
        self.longest = max(self.longest, seconds)
        within = min(max(seconds, _SHORTEST), _LONGEST)
        self._buckets[round(math.log(within, _BUCKET_RATIO))] += 1

    def quantile(self, share: float) -> float:
        """Return the duration that `share` of all (0 to 1) do not exceed; 0 if there are none."""
        if not self._buckets:
            return 0.0
        rank = max(1, math.ceil(share * self._buckets.total()))
        passed = 0
        for bucket in sorted(self._buckets):
            passed += self._buckets[bucket]
            if passed >= rank:
                return min(max(_BUCKET_RATIO**bucket, self.shortest), self.longest)
        return self.longest  # pragma: no cover  (the buckets add up to the total)


class OperationTotals:
    """All settled operations of one name and feed."""

    def __init__(self, operation: str, feed: str | None) -> None:
        self.operation = operation
        self.feed = feed
        self.outcomes: Counter[str] = Counter()
        """Calls by outcome."""
        self.errors: Counter[str] = Counter()
        """Calls by `error.type`, of those that have one."""
        self.latency = Latency()

    @property
    def calls(self) -> int:
        """How many there were."""
        return self.outcomes.total()

    def add(self, seconds: float, outcome: str, error_type: str | None) -> None:
        """Take one settled operation."""
        self.latency.add(seconds)
        self.outcomes[outcome] += 1
        if error_type is not None:
            known = error_type in self.errors or len(self.errors) < _ERROR_TYPES
            self.errors[error_type if known else names.OTHER] += 1


class ItemTotals(NamedTuple):
    """What became of the items of one operation and feed, or of all."""

    operation: str
    feed: str | None
    received: int
    converted: int
    ingested: int
    skipped: int
    failed: int
    unaccounted: int
    reasons: Mapping[str, int]
    """Skipped items by the reason that was given."""

    @property
    def difference(self) -> int:
        """What is missing from `received = ingested + skipped + failed + unaccounted`.

        It is 0 once all operations have settled; above 0 while some have not; below 0 where more
        items were settled than received.
        """
        return self.received - self.ingested - self.skipped - self.failed - self.unaccounted


_Row = TypeVar("_Row", OperationTotals, ItemTotals)


class RunSummary:
    """Listens to every operation of a block and tells what happened.

    An item is counted in the operation whose account it is in: an item that passes through two
    operations which both count it is in both rows, and twice in the totals. What the exporters
    have sent is read when the summary is printed, so flush or shut down the runtime before; what
    is still queued then is shown as waiting. Latencies come from logarithmic buckets (see
    `Latency`): p50 and p95 within 2.5 %, the maximum exact.

    Args:
        runtime: What `configure()` returned.

    Example:
        >>> with RunSummary(periscope.configure()) as summary:
        ...     ingest()
        >>> summary.print()
    """

    def __init__(self, runtime: Observed) -> None:
        self._runtime = runtime
        self._instruments = runtime.telemetry.instruments
        self._clock = runtime.telemetry.clock
        self._lock = threading.Lock()
        self._totals: dict[Series, OperationTotals] = {}
        self._end_listening: Callable[[], None] | None = None
        self._began = 0.0
        self._ended: float | None = None
        self._items_before = self._instruments.item_counts()
        self._items_after = self._items_before

    def __enter__(self) -> Self:
        self._catch_up()  # what settled before is not of this run
        self._items_before = self._instruments.item_counts()
        self._began = self._clock()
        self._end_listening = self._instruments.listen(self._take)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended = self._clock()
        self._catch_up()
        self._items_after = self._instruments.item_counts()
        if self._end_listening is not None:
            self._end_listening()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from periscope_otel.monitor.summary_view import render

        return render(self, options)

    @property
    def seconds(self) -> float:
        """How long the block took, or has taken so far."""
        return (self._clock() if self._ended is None else self._ended) - self._began

    @property
    def running(self) -> int:
        """Operations that have begun and not settled."""
        return len(self._instruments.live)

    def operations(self) -> list[OperationTotals]:
        """Return the totals of each operation and feed, in the order in which they began."""
        if self._ended is None:
            self._catch_up()
        with self._lock:
            return self._in_order(self._totals.values())

    def items(self) -> list[ItemTotals]:
        """Return the account of each operation and feed that counted items."""
        now = self._instruments.item_counts() if self._ended is None else self._items_after
        received = _since(self._items_before[0], now[0])
        converted = _since(self._items_before[1], now[1])
        settled = _since(self._items_before[2], now[2])
        rows = dict.fromkeys((*received, *converted, *(key[0] for key in settled)))
        ends: dict[Series, list[tuple[str, str | None, int]]] = {series: [] for series in rows}
        for (series, outcome, reason), count in settled.items():
            ends[series].append((outcome, reason, count))
        made = (
            _item_totals(one, received.get(one, 0), converted.get(one, 0), ends[one])
            for one in rows
        )
        return self._in_order(row for row in made if any(row[2:8]))

    def where(self) -> tuple[ExportReport, list[str]]:
        """Return what was exported, and in words where else telemetry can be had."""
        runtime, report = self._runtime, self._runtime.report()
        signals = {signal.signal for signal in report.signals}
        told = []
        if runtime.server is not None:
            address = f"{_bracketed(runtime.server.host)}:{runtime.server.port}"
            verb = "were" if runtime.closed else "are"
            told.append(f"Metrics {verb} served to Prometheus at http://{address}/metrics")
        if runtime.tracer_provider is not None and "spans" not in signals:
            told.append("Spans go to the application's own TracerProvider")
        if (
            runtime.meter_provider is not None
            and "metric points" not in signals
            and runtime.server is None
        ):
            told.append("Metrics go to the application's own MeterProvider")
        return report, told

    def print(self, console: Console | None = None) -> None:
        """Print the summary.

        Args:
            console: Where; standard output by default.
        """
        if console is None:
            from rich.console import Console

            console = Console(highlight=False)
        console.print(self)

    def _take(self, settled: Settled) -> None:
        seconds, series, outcome, error_type, _ = settled
        # Mostly the drain's thread is here, but a caller whose queue is full may be as well.
        with self._lock:
            totals = self._totals.get(series)
            if totals is None:
                totals = self._totals[series] = OperationTotals(series.operation, series.feed)
            totals.add(seconds, outcome, None if error_type is None else clean_name(error_type))

    def _catch_up(self) -> None:
        """Hear of all operations that have settled by now."""
        worker.finish_posted(_WAIT)
        self._instruments.drain()

    def _in_order(self, rows: Iterable[_Row]) -> list[_Row]:
        """Return rows in the order in which their operations and feeds began for the first time."""
        begun = tuple(self._instruments.labels.by_name.values())
        places = {(one.operation, one.feed): place for place, one in enumerate(begun)}
        return sorted(rows, key=lambda row: places.get((row.operation, row.feed), len(places)))


def total_of(rows: Iterable[ItemTotals]) -> ItemTotals:
    """Return the sum of several accounts."""
    rows = list(rows)
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(row.reasons)
    return ItemTotals(
        operation="total",
        feed=None,
        received=sum(row.received for row in rows),
        converted=sum(row.converted for row in rows),
        ingested=sum(row.ingested for row in rows),
        skipped=sum(row.skipped for row in rows),
        failed=sum(row.failed for row in rows),
        unaccounted=sum(row.unaccounted for row in rows),
        reasons=reasons,
    )


def _since(before: Mapping[_Key, int], now: Mapping[_Key, int]) -> dict[_Key, int]:
    """Return what was added to the counts of a table."""
    return {key: count - before.get(key, 0) for key, count in now.items()}


def _item_totals(
    series: Series,
    received: int,
    converted: int,
    settled: Iterable[tuple[str, str | None, int]],
) -> ItemTotals:
    ends: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for outcome, reason, count in settled:
        ends[outcome] += count
        if outcome == SKIPPED and count:
            reasons[reason or "no reason given"] += count
    return ItemTotals(
        series.operation,
        series.feed,
        received,
        converted,
        ends[INGESTED],
        ends[SKIPPED],
        ends[FAILED],
        ends[UNACCOUNTED],
        reasons,
    )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
