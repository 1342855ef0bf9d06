"""Spans on their way out, counted: emitted = exported + failed + dropped + still waiting."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

_DEFAULT_QUEUE_SIZE = 2048
"""Spans that may wait where OTEL_BSP_MAX_QUEUE_SIZE says nothing else; the standard default."""


class ExportCounts(NamedTuple):
    """What became of one signal's items so far."""

    exported: int
    failed: int
    dropped: int


class ExportAccount:
    """Counts what became of one signal on its way to one destination.

    Args:
        signal: `spans` or `metrics`.
        destination: Where it goes, as a person would name it; free of secrets.
        fork_waits: Whether a fork should wait a moment for an export that is under way.
    """

    def __init__(self, signal: str, destination: str, *, fork_waits: bool = False) -> None:
        self.signal = signal
        self.destination = destination
        self.fork_waits = fork_waits
        self.clear()

    def clear(self) -> None:
        """Start from nothing, as the child of a fork does."""
        self._lock = threading.Lock()
        self._exported = 0
        self._failed = 0
        self._dropped = 0

    def add(self, *, exported: bool, count: int) -> None:
        """Add items that the exporter has dealt with."""
        with self._lock:
            if exported:
                self._exported += count
            else:
                self._failed += count

    def drop(self) -> None:
        """Add an item that found the queue full."""
        with self._lock:
            self._dropped += 1

    def counts(self) -> ExportCounts:
        """Return the counts so far."""
        with self._lock:
            return ExportCounts(self._exported, self._failed, self._dropped)


class ForkGate:
    """Lets a fork wait a moment for an export that is under way.

    gRPC's core does not survive a fork in the middle of a call: the child's own first call waits
    for ever or aborts the process. The wait is short, since the application's fork must not be
    held up by a Collector that does not answer; a child forked all the same exports nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forking: int | None = None
        """The thread that forks; two may at once."""

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def before_fork(self, deadline: float) -> None:
        """Wait for the export under way, until `deadline` at most, and let no other begin."""
        if self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self._forking = threading.get_ident()

    def after_fork_in_parent(self) -> None:
        """Let exports begin again."""
        if self._forking == threading.get_ident():
            self._forking = None
            self._lock.release()

    @property
    def child_is_safe(self) -> bool:
        """In the child: whether no export was under way when it was forked."""
        return self._forking is not None

    def after_fork_in_child(self) -> None:
        """Start anew."""
        self.__init__()  # type: ignore[misc]


FORK_WAIT = 0.2
"""Seconds that a fork waits at most for exports by gRPC that are under way."""


def refuse_to_export() -> SpanExporter:
    """Stand for the exporter of a child that cannot export."""
    raise RuntimeError("forked in the middle of an export by gRPC")


class CountedSpanExporter(SpanExporter):
    """Passes spans to an exporter that is made when first needed, and anew in a forked child.

    A child must not use the parent's connections: both would read each other's answers.
    """

    def __init__(self, make: Callable[[], SpanExporter], account: ExportAccount) -> None:
        self._make = make
        self._exporter: SpanExporter | None = make()
        self._account = account
        self.gate = ForkGate()
        self.taken = 0
        """Spans that have left the queue."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export a batch and count it; called by one thread at a time."""
        self.taken += len(spans)
        exported = False
        try:
            if self._exporter is None:
                self._exporter = self._make()
            with self.gate:
                result = self._exporter.export(spans)
            exported = result is SpanExportResult.SUCCESS
        finally:
            self._account.add(exported=exported, count=len(spans))
        return result

    def after_fork(self, *, usable: bool) -> None:
        """Forget the parent's exporter and counts; export nothing if that is not `usable` here."""
        keep_for_ever(self._exporter)
        self._exporter = None
        if not usable:
            self._make = refuse_to_export
        self.gate.after_fork_in_child()
        self.taken = 0

    def shutdown(self) -> None:
        """Shut the exporter down, which also ends its wait for the next retry."""
        if self._exporter is not None:
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:  # noqa: ARG002
        """Nothing waits here."""
        return True


class CountedSpanProcessor(BatchSpanProcessor):
    """The SDK's batch processor, with an exact account of what it took and what it could not.

    The SDK's own queue drops its oldest span without a trace when it is full. This one never
    lets it overflow: a span that finds it full is counted as dropped.
    """

    def __init__(self, make: Callable[[], SpanExporter], account: ExportAccount) -> None:
        self._counted_exporter = CountedSpanExporter(make, account)
        self._room = _queue_size_from_environment()
        super().__init__(self._counted_exporter, max_queue_size=self._room)
        self.account = account
        self.gate = self._counted_exporter.gate
        self._accepted = 0
        self._accept_lock = threading.Lock()

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a sampled span, or count it as dropped."""
        context = span.context
        if context is None or not context.trace_flags.sampled:
            return
        with self._accept_lock:
            fits = self._accepted - self._counted_exporter.taken < self._room
            if fits:
                self._accepted += 1
        if fits:
            super().on_end(span)
        else:
            self.account.drop()

    @property
    def waiting(self) -> int:
        """Spans that were queued and of which it is not known yet whether they got out."""
        counts = self.account.counts()
        with self._accept_lock:
            return max(0, self._accepted - counts.exported - counts.failed)

    def after_fork(self, *, usable: bool) -> None:
        """Forget the parent's spans, connections and counts; the SDK empties the queue itself."""
        self._accept_lock = threading.Lock()
        self._accepted = 0
        self.account.clear()
        self._counted_exporter.after_fork(usable=usable)


def keep_for_ever(inherited: object) -> None:
    """Keep what a child inherited from being freed, even at the end of its interpreter.

    A gRPC channel that is freed says goodbye on its connection, which is still the parent's.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


def _queue_size_from_environment() -> int:
    try:
        return int(os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE", ""))
    except ValueError:
        return _DEFAULT_QUEUE_SIZE
