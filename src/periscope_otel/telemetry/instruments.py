"""Counts and durations: plain slots on the hot path, read by observable instruments.

What a settled operation records is one append to a bounded deque; the histogram is fed from it
by the worker's thread or by whoever collects (`drain`). Everything else is an integer in a table
that the callbacks below read, so the number of readers costs the caller nothing.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING, Protocol, TypeAlias

from opentelemetry.context import Context
from opentelemetry.metrics import Observation
from opentelemetry.trace import NonRecordingSpan, SpanContext, set_span_in_context

from periscope_otel import guard
from periscope_otel.telemetry import names
from periscope_otel.telemetry.breaker_instruments import create_breaker_instruments
from periscope_otel.telemetry.callbacks import contained
from periscope_otel.telemetry.letter_instruments import create_letter_instruments
from periscope_otel.telemetry.series import LABEL_LIMIT, LabelSet, LabelSets, Series
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from opentelemetry.metrics import Meter

    from periscope_otel.telemetry.export import ExportCounts

PENDING_LIMIT = 2048
"""Settled operations that may wait for the drain; one more is recorded at once, in the caller."""

DRAIN_BATCH = 512
"""Waiting operations at which the worker is asked to drain."""

_NO_SPAN = Context()

Settled: TypeAlias = tuple[float, Series, str, str | None, SpanContext | None]
"""Seconds, series, outcome, error type and span of one settled operation.

A bare tuple: it is built once a call, and a named one costs ten times as much to build.
"""


class LiveOperation(Protocol):
    """What is counted as active."""

    @property
    def series(self) -> Series | None:
        """The operation and feed that it is counted under."""

    def orphan(self) -> None:
        """Take note, in the child of a fork, that this is the parent's operation."""


class ExportTally(Protocol):
    """Counts of one signal's items on their way out."""

    signal: str

    def counts(self) -> ExportCounts:
        """Return what became of them so far."""
        ...


class Instruments:
    """The metric instruments of operations and items on one meter.

    Args:
        meter: Where the instruments are made.
        label_limit: Label sets an instrument may have before values become `other`.
    """

    def __init__(self, meter: Meter, *, label_limit: int = LABEL_LIMIT) -> None:
        self._label_limit = label_limit
        self.export_accounts: tuple[ExportTally, ...] = ()
        """What tells how exporting goes, for the plugin's own metric."""
        self._listeners: tuple[Callable[[Settled], None], ...] = ()
        self.clear()
        self._create(meter)

    def clear(self) -> None:
        """Start from nothing: the child of a fork must not repeat what its parent counted."""
        self.labels = LabelSets(self._label_limit)
        self.pending: deque[Settled] = deque()
        self.live: set[LiveOperation] = set()
        """The operations that have begun and not settled."""
        self._drain_requested = False
        self._drain_lock = threading.Lock()
        self._calls: dict[LabelSet, int] = {}
        self._items_lock = threading.Lock()
        self._received: dict[Series, int] = {}
        self._converted: dict[Series, int] = {}
        self._items_settled: dict[LabelSet, int] = {}
        self._retries_lock = threading.Lock()
        self._retries: dict[LabelSet, int] = {}

    def _create(self, meter: Meter) -> None:
        self._duration = meter.create_histogram(
            names.DURATION.name,
            names.DURATION.unit,
            names.DURATION.description,
            explicit_bucket_boundaries_advisory=names.DURATION_BOUNDARIES,
        )
        # The first of these to be called drains, so that a collect has every settled operation:
        # an SDK calls all callbacks before it reads the histogram.
        for create, metric, observe in (
            (meter.create_observable_up_down_counter, names.ACTIVE, self._observe_active),
            (meter.create_observable_counter, names.RETRIES, self._observe_retries),
            (meter.create_observable_counter, names.RECEIVED, self._observe_received),
            (meter.create_observable_counter, names.CONVERTED, self._observe_converted),
            (meter.create_observable_counter, names.SETTLED, self._observe_settled),
            (meter.create_observable_gauge, names.LAST_SUCCESS, self._observe_last_success),
            (meter.create_observable_gauge, names.LAST_ITEM, self._observe_last_item),
            (meter.create_observable_counter, names.INTERNAL_ERRORS, _observe_internal_errors),
            (meter.create_observable_counter, names.EXPORT_ITEMS, self._observe_exports),
        ):
            create(metric.name, [contained(observe)], metric.unit, metric.description)
        create_letter_instruments(meter)
        create_breaker_instruments(meter)

    def record(self, settled: Settled) -> None:
        """Take one settled operation; its duration reaches the histogram at the next drain."""
        pending = self.pending
        waiting = len(pending)
        if waiting >= PENDING_LIMIT:
            self._record_now(settled)
            return
        pending.append(settled)
        if waiting >= DRAIN_BATCH and not self._drain_requested:
            self._drain_requested = True
            worker.post(self.drain)

    def count_retry(self, series: Series, error_type: str | None) -> None:
        """Add a retry, by the error that it follows."""
        labels = self.labels.admit(self._retries, (series, "retry", error_type))
        with self._retries_lock:
            self._retries[labels] = self._retries.get(labels, 0) + 1

    def count_items(self, series: Series, *, received: int = 0, converted: int = 0) -> None:
        """Add items that an operation received or converted."""
        with self._items_lock:
            if received:
                self._received[series] = self._received.get(series, 0) + received
                series.last_item = time.time()
            if converted:
                self._converted[series] = self._converted.get(series, 0) + converted

    def settle_items(self, series: Series, outcome: str, count: int, reason: str | None) -> None:
        """Add items that were ingested, skipped (for a reason), failed or left unaccounted."""
        labels = (series, outcome, reason)
        with self._items_lock:
            known = self._items_settled.get(labels)
            if known is not None:
                self._items_settled[labels] = known + count
                return
        # A new label set may have to be logged about, which no lock may wait for.
        labels = self.labels.admit(self._items_settled, labels)
        with self._items_lock:
            self._items_settled[labels] = self._items_settled.get(labels, 0) + count

    def item_counts(self) -> tuple[dict[Series, int], dict[Series, int], dict[LabelSet, int]]:
        """Return copies of the item tables: received, converted, and settled by label set."""
        with self._items_lock:
            return dict(self._received), dict(self._converted), dict(self._items_settled)

    def label_sets(self) -> dict[str, int]:
        """Return how many label sets each bounded instrument has."""
        return {
            names.DURATION.name: len(self._calls),
            names.RECEIVED.name: len(self._received),
            names.SETTLED.name: len(self._items_settled),
            names.RETRIES.name: len(self._retries),
        }

    def listen(self, listener: Callable[[Settled], None]) -> Callable[[], None]:
        """Call `listener` with every settled operation from now on, where the drain runs.

        Returns:
            A function that ends it.
        """
        self._listeners = (*self._listeners, listener)

        def end() -> None:
            self._listeners = tuple(one for one in self._listeners if one is not listener)

        return end

    def drain(self) -> None:
        """Move every waiting duration into the histogram, the newest of each bucket with its span.

        An exemplar reservoir keeps one exemplar a bucket, so the spans of the others are not even
        offered: half of what recording with a span costs.
        """
        with self._drain_lock:
            self._drain_requested = False
            popleft = self.pending.popleft
            # No more than waited at the start: callers that append faster than this records must
            # not keep a collect here for ever.
            batch = [popleft() for _ in range(len(self.pending))]
            with_exemplar = _newest_of_each_bucket(batch)
            attributes_of: dict[LabelSet, dict[str, str]] = {}
            for index, settled in enumerate(batch):
                labels = settled[1:4]
                attributes = attributes_of.get(labels)
                if attributes is None:
                    attributes = attributes_of[labels] = self._attributes_of(labels)
                span_context = settled[4] if index in with_exemplar else None
                self._record_duration(settled[0], attributes, span_context)
        for settled in batch if self._listeners else ():
            self._tell(settled)

    def _record_now(self, settled: Settled) -> None:
        self._record_duration(settled[0], self._attributes_of(settled[1:4]), settled[4])
        self._tell(settled)

    def _attributes_of(self, labels: LabelSet) -> dict[str, str]:
        series, outcome, error_type = self.labels.admit(self._calls, labels)
        attributes = series.attributes()
        attributes[names.OUTCOME] = outcome
        if error_type is not None:
            attributes[names.ERROR_TYPE] = error_type
        return attributes

    def _record_duration(
        self, seconds: float, attributes: dict[str, str], span_context: SpanContext | None
    ) -> None:
        """Record one duration; with a span context it is offered as an exemplar."""
        context = _NO_SPAN
        if span_context is not None:
            context = set_span_in_context(NonRecordingSpan(span_context), context)
        try:
            self._duration.record(seconds, attributes, context)
        except Exception as error:  # noqa: BLE001  (one that fails must not take the rest along)
            guard.report("histogram", error)

    def _tell(self, settled: Settled) -> None:
        for listener in self._listeners:
            with guard.contained("settled listener"):
                listener(settled)

    def _observe_active(self) -> Iterable[Observation]:
        self.drain()
        active = dict.fromkeys(tuple(self.labels.by_name.values()), 0)
        for operation in tuple(self.live):
            series = operation.series
            if series is not None:
                active[series] = active.get(series, 0) + 1
        return [Observation(count, series.attributes()) for series, count in active.items()]

    def _observe_retries(self) -> Iterator[Observation]:
        with self._retries_lock:
            counted = list(self._retries.items())
        for (series, _, error_type), count in counted:
            if count:
                attributes = series.attributes()
                if error_type is not None:
                    attributes[names.ERROR_TYPE] = error_type
                yield Observation(count, attributes)

    def _observe_received(self) -> Iterable[Observation]:
        return self._observe_by_series(self._received)

    def _observe_converted(self) -> Iterable[Observation]:
        return self._observe_by_series(self._converted)

    def _observe_by_series(self, counts: dict[Series, int]) -> Iterable[Observation]:
        with self._items_lock:
            counted = list(counts.items())
        return [Observation(count, series.attributes()) for series, count in counted]

    def _observe_settled(self) -> Iterator[Observation]:
        with self._items_lock:
            counted = list(self._items_settled.items())
        for (series, outcome, reason), count in counted:
            attributes = series.attributes()
            attributes[names.ITEM_OUTCOME] = outcome
            if reason is not None:
                attributes[names.SKIP_REASON] = reason
            yield Observation(count, attributes)

    def _observe_last_success(self) -> Iterable[Observation]:
        return self._observe_by_feed("last_success")

    def _observe_last_item(self) -> Iterable[Observation]:
        return self._observe_by_feed("last_item")

    def _observe_by_feed(self, moment: str) -> Iterable[Observation]:
        latest: dict[str, float] = {}
        for series in tuple(self.labels.by_name.values()):
            at: float = getattr(series, moment)
            if series.feed is not None and at > latest.get(series.feed, 0.0):
                latest[series.feed] = at
        return [Observation(at, {names.FEED_NAME: feed}) for feed, at in latest.items()]

    def _observe_exports(self) -> Iterable[Observation]:
        totals: dict[tuple[str, str], int] = {}
        for account in self.export_accounts:
            for outcome, count in account.counts()._asdict().items():
                key = (account.signal, outcome)
                totals[key] = totals.get(key, 0) + count
        return [
            Observation(count, {names.SIGNAL: signal, names.EXPORT_OUTCOME: outcome})
            for (signal, outcome), count in totals.items()
        ]


def _newest_of_each_bucket(batch: list[Settled]) -> set[int]:
    """Return the indices of those that exemplars are kept of: an SDK keeps one a bucket."""
    newest: dict[tuple[object, ...], int] = {}
    for index, (seconds, series, outcome, error_type, span_context) in enumerate(batch):
        if span_context is not None and span_context.trace_flags.sampled:
            bucket = bisect_left(names.DURATION_BOUNDARIES, seconds)
            newest[series, outcome, error_type, bucket] = index
    return set(newest.values())


def _observe_internal_errors() -> Iterable[Observation]:
    return [Observation(count, {names.COMPONENT: place}) for place, count in guard.counts().items()]
