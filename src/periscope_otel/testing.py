"""Help for users' own tests: what operations emitted, in isolation from global providers.

Example:
    >>> with capture_telemetry() as captured:
    ...     ingest(bundle)
    >>> captured.operation("store").outcome
    'ok'
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricsData
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from periscope_otel.dead_letter.in_use import in_use
from periscope_otel.items import ItemAccount
from periscope_otel.resilience.breaker import breakers
from periscope_otel.resilience.budget import forget_budgets
from periscope_otel.telemetry import names
from periscope_otel.telemetry.current import current, telemetry_on
from periscope_otel.telemetry.letter_counts import letter_counts
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from opentelemetry.sdk.metrics.export import Metric
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.trace.sampling import Sampler

    from periscope_otel.dead_letter.letter import Letter
    from periscope_otel.dead_letter.queue import Where

__all__ = ["CapturedOperation", "CapturedTelemetry", "capture_telemetry"]

_WAIT = 10.0
"""Seconds to wait at most for what finalisers have handed to the worker."""


class _PatientReader(InMemoryMetricReader):
    """Waits long for a collect: with the many threads of a test it gets little of the processor."""

    _data: MetricsData | None = None

    def get_metrics_data(self) -> MetricsData | None:
        """Collect now, and return what there is."""
        self.collect(timeout_millis=120_000)
        return self._data

    def _receive_metrics(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **_kwargs: Any
    ) -> None:
        self._data = metrics_data


class CapturedOperation:
    """One settled operation, as its span tells it."""

    def __init__(self, span: ReadableSpan) -> None:
        self.span = span

    def __repr__(self) -> str:
        return f"<CapturedOperation {self.name!r} feed={self.feed!r} {self.outcome}>"

    @property
    def attributes(self) -> Mapping[str, Any]:
        """All attributes of the span."""
        return self.span.attributes or {}

    @property
    def name(self) -> str:
        """The operation's name."""
        return str(self.attributes[names.OPERATION_NAME])

    @property
    def feed(self) -> str | None:
        """The feed's name."""
        return self.attributes.get(names.FEED_NAME)

    @property
    def outcome(self) -> str:
        """`ok`, `error`, `timeout`, `cancelled`, `rejected` or `partial`."""
        return str(self.attributes[names.OUTCOME])

    @property
    def error_type(self) -> str | None:
        """The failure's `error.type`; None on success."""
        return self.attributes.get(names.ERROR_TYPE)

    @property
    def exceptions(self) -> list[Event]:
        """The exceptions recorded in this very span."""
        return [event for event in self.span.events if event.name == names.EXCEPTION_EVENT]

    @property
    def items(self) -> ItemAccount:
        """How the operation's items add up."""
        read = self.attributes.get
        return ItemAccount(
            received=read(names.ITEMS_RECEIVED, 0),
            converted=read(names.ITEMS_CONVERTED, 0),
            ingested=read(names.ITEMS_INGESTED, 0),
            skipped=read(names.ITEMS_SKIPPED, 0),
            failed=read(names.ITEMS_FAILED, 0),
            unaccounted=read(names.ITEMS_UNACCOUNTED, 0),
            excess=read(names.ITEMS_EXCESS, 0),
        )

    def is_child_of(self, other: CapturedOperation) -> bool:
        """Whether this operation's span is a direct child of the other's."""
        parent, context = self.span.parent, other.span.context
        return parent is not None and context is not None and parent.span_id == context.span_id


class _CapturedLetters:
    """Takes dead letters in place of the process's queue."""

    def __init__(self) -> None:
        self.letters: list[Letter] = []
        self.journal_entries: dict[str, Letter] = {}

    def put(self, letters: Sequence[Letter], *, journalled: bool = False) -> Where:
        if journalled:
            self.forget([letter.id for letter in letters])
        self.letters += letters
        for letter in letters:
            letter_counts.put(letter.queue, "memory")
        return "memory"

    def journal(self, letter: Letter) -> bool:
        self.journal_entries[letter.id] = letter
        return True

    def forget(self, ids: Sequence[str]) -> None:
        for one in ids:
            self.journal_entries.pop(one, None)


class CapturedTelemetry:
    """What was emitted while it was captured."""

    def __init__(
        self,
        exporter: InMemorySpanExporter,
        reader: InMemoryMetricReader,
        box: _CapturedLetters | None = None,
    ) -> None:
        self._exporter = exporter
        self._reader = reader
        self._box = box or _CapturedLetters()

    @property
    def letters(self) -> list[Letter]:
        """All dead letters that operations have made; none of them reaches a store."""
        worker.finish_posted(_WAIT)
        return list(self._box.letters)

    @property
    def journal(self) -> list[Letter]:
        """The payloads that are in the journal now: those of calls with `journal=True`."""
        return list(self._box.journal_entries.values())

    @property
    def spans(self) -> list[ReadableSpan]:
        """All spans that have ended, in the order in which they did."""
        worker.finish_posted(_WAIT)
        return list(self._exporter.get_finished_spans())

    def operations(self, name: str | None = None) -> list[CapturedOperation]:
        """Return the settled operations, in the order in which they settled.

        Args:
            name: Only those of this name; by default all.
        """
        found = [
            CapturedOperation(span)
            for span in self.spans
            if names.OUTCOME in (span.attributes or {})  # a replay's span has a name alone
        ]
        return [one for one in found if name is None or one.name == name]

    def operation(self, name: str) -> CapturedOperation:
        """Return the one settled operation of this name.

        Raises:
            AssertionError: If there is none or more than one; the message says what there is.
        """
        found = self.operations(name)
        if len(found) != 1:
            seen = [one.name for one in self.operations()]
            raise AssertionError(f"{len(found)} operations {name!r} have settled; settled: {seen}")
        return found[0]

    def metric(self, name: str, /, **labels: str) -> float:
        """Return a metric's value, summed over the label sets that match.

        For a histogram that is its count: how many operations there were.

        Args:
            name: The metric's name, such as `"threat.ingest.items.received"`.
            labels: The label sets to take: those with these values. A label is named by its last
                part or more, with `_` for dots: `outcome="ok"`, `feed_name="urlhaus"`.
        """
        return sum(
            _value_of(point)
            for metric in self._metrics()
            if metric.name == name
            for point in metric.data.data_points
            if _matches(point.attributes or {}, labels)
        )

    def label_sets(self, name: str) -> list[dict[str, Any]]:
        """Return the label sets that a metric has."""
        return [
            dict(point.attributes or {})
            for metric in self._metrics()
            if metric.name == name
            for point in metric.data.data_points
        ]

    def items(self, **labels: str) -> ItemAccount:
        """Return how the items of all operations add up in the metrics.

        Args:
            labels: As for `metric`.
        """
        settled = {
            outcome: int(self.metric(names.SETTLED.name, item_outcome=outcome, **labels))
            for outcome in ("ingested", "skipped", "failed", "unaccounted")
        }
        received = int(self.metric(names.RECEIVED.name, **labels))
        return ItemAccount(
            received=received,
            converted=int(self.metric(names.CONVERTED.name, **labels)),
            excess=max(0, sum(settled.values()) - received),
            **settled,
        )

    def _metrics(self) -> list[Metric]:
        worker.finish_posted(_WAIT)
        data = self._reader.get_metrics_data()
        if data is None:
            return []
        return [
            metric
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        ]


def _value_of(point: Any) -> float:
    return float(point.count if hasattr(point, "count") else point.value)


def _matches(attributes: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return all(
        any(f".{name.replace('.', '_')}".endswith((f".{label}", f"_{label}")) and value == wanted
            for name, value in attributes.items())
        for label, wanted in labels.items()
    )  # fmt: skip


@contextmanager
def capture_telemetry(
    *, clock: Callable[[], float] = time.perf_counter, sampler: Sampler = ALWAYS_ON
) -> Iterator[CapturedTelemetry]:
    """Capture what operations emit in the block, with providers of its own, and their dead letters.

    Global providers see nothing of it, and it sees nothing of them. Breakers that are only named
    are new ones, and so are the budgets of retries. It is for one test at a time:
    operations of other threads are captured too.

    Args:
        clock: Monotonic seconds for durations; give one of your own to test them.
        sampler: Decides which spans are recorded; all by default.
    """
    exporter, reader = InMemorySpanExporter(), _PatientReader()
    tracer_provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    tracer_provider.add_span_processor(SimpleSpanProcessor(exporter))
    meter_provider = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    worker.start()
    telemetry = telemetry_on(tracer_provider, meter_provider, clock=clock)
    before = current.capture(telemetry)
    box, box_before = _CapturedLetters(), in_use.captured
    in_use.captured = box
    forget_budgets()
    try:
        with letter_counts.set_aside(), breakers.set_aside():
            yield CapturedTelemetry(exporter, reader, box)
    finally:
        forget_budgets()
        in_use.captured = box_before
        current.release(telemetry, before)
        worker.finish_posted(_WAIT)
        tracer_provider.shutdown()
        meter_provider.shutdown()
