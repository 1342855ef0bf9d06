"""The telemetry in use: what an operation emits to, and how it is found.

`current.telemetry` is read once an operation. `configure()` sets it, a test's captured telemetry
does, and `discover` does on the first operation after the application has set OpenTelemetry's
global providers. None means that there is no SDK: operations run without spans and metrics.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import TYPE_CHECKING

from opentelemetry import metrics, trace
from opentelemetry.metrics import _internal as metrics_api

from periscope_otel import guard
from periscope_otel.telemetry import names
from periscope_otel.telemetry.instruments import Instruments
from periscope_otel.telemetry.letter_counts import letter_counts
from periscope_otel.telemetry.series import LABEL_LIMIT
from periscope_otel.telemetry.worker import worker
from periscope_otel.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Tracer, TracerProvider


class Telemetry:
    """What a pair of providers gives an operation.

    Args:
        tracer: Starts the spans.
        instruments: Count and time.
        clock: Monotonic seconds; tests inject their own.
        renew: Makes the telemetry of a forked child; by default the same providers are used on.
    """

    def __init__(
        self,
        tracer: Tracer,
        instruments: Instruments,
        *,
        clock: Callable[[], float] = time.perf_counter,
        renew: Callable[[], Telemetry] | None = None,
    ) -> None:
        self.tracer = tracer
        self.start_span = tracer.start_span
        self.instruments = instruments
        self.live = instruments.live
        self.clock = clock
        self.inherited = False
        """True in the child of a fork: operations that began in the parent settle there."""
        self._renew = renew

    def renewed(self) -> Telemetry:
        """Return the telemetry to use in a forked child, with nothing of the parent's counts."""
        if self._renew is not None:
            return self._renew()
        return Telemetry(self.tracer, self.instruments, clock=self.clock)


class _Current:
    """The process's telemetry; a class so that the hot path reads one attribute."""

    def __init__(self) -> None:
        self.telemetry: Telemetry | None = None
        self.silenced = False
        """True once the global providers are ones that were built here and are shut down."""
        self.captured: Telemetry | None = None
        self.behind: Telemetry | None = None
        """In a test that captures telemetry: what it uses, and what is in use behind it."""
        self.forked: Telemetry | None = None
        """In the child of a fork until its first operation: what it inherited."""
        self.lock = threading.RLock()
        self.global_instruments: Instruments | None = None
        self.instruments: weakref.WeakKeyDictionary[MeterProvider, Instruments] = (
            weakref.WeakKeyDictionary()
        )
        # A provider named in the environment is loaded by the first public look at it.
        trace.get_tracer_provider()
        metrics.get_meter_provider()

    def install(self, telemetry: Telemetry | None) -> None:
        """Use `telemetry` from now on; in a test that captures, once it has ended."""
        if self.captured is None:
            self.telemetry = telemetry
        else:
            self.behind = telemetry

    def capture(self, telemetry: Telemetry) -> Telemetry | None:
        """Use a test's telemetry until `release`; returns what that needs."""
        before = self.captured
        if before is None:
            self.behind = self.telemetry
        self.captured = self.telemetry = telemetry
        return before

    def release(self, telemetry: Telemetry, before: Telemetry | None) -> None:
        """Use again what was in use before, or what was installed in the meantime."""
        if self.captured is telemetry:
            self.captured = before
            self.telemetry = self.behind if before is None else before


current = _Current()


def discover() -> Telemetry | None:
    """Return the telemetry to use, made now if the application has set a provider since."""
    if current.forked is not None:
        return _renewed()
    if current.silenced:
        return None
    # The API has no cheap public test for "no provider yet"; its getters read the environment on
    # every call, which costs more than all the rest of an operation without an SDK.
    if trace._TRACER_PROVIDER is None and metrics_api._METER_PROVIDER is None:
        return current.telemetry
    with current.lock:
        if current.telemetry is None:
            try:
                current.telemetry = telemetry_on()
                worker.start()
            except Exception as error:  # noqa: BLE001  (a provider that is not what the API says)
                current.silenced = True
                guard.report("global providers", error)
        return current.telemetry


def global_tracer_provider() -> TracerProvider | None:
    """Return the tracer provider that the application or its environment has set, if any."""
    provider = trace.get_tracer_provider()
    return None if trace._TRACER_PROVIDER is None else provider


def global_meter_provider() -> MeterProvider | None:
    """Return the meter provider that the application or its environment has set, if any."""
    provider = metrics.get_meter_provider()
    return None if metrics_api._METER_PROVIDER is None else provider


def is_proxy(provider: object) -> bool:
    """Whether it is the API's stand-in for a meter provider that will be set later."""
    return isinstance(provider, metrics_api._ProxyMeterProvider)


def telemetry_on(
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
    *,
    label_limit: int = LABEL_LIMIT,
    clock: Callable[[], float] = time.perf_counter,
    renew: Callable[[], Telemetry] | None = None,
) -> Telemetry:
    """Return telemetry that emits to the given providers, by default the global ones."""
    tracer = trace.get_tracer(
        names.SCOPE, __version__, tracer_provider=tracer_provider, schema_url=names.SCHEMA_URL
    )
    instruments = _instruments_on(meter_provider, label_limit)
    return Telemetry(tracer, instruments, clock=clock, renew=renew)


def _instruments_on(provider: MeterProvider | None, label_limit: int) -> Instruments:
    """Return the instruments of a provider: they may be made only once on each."""
    with current.lock:
        if provider is None or provider is metrics.get_meter_provider():
            if current.global_instruments is None:
                current.global_instruments = _new_instruments(None, label_limit)
            return current.global_instruments
        known = current.instruments.get(provider)
        if known is None:
            known = current.instruments[provider] = _new_instruments(provider, label_limit)
        known.labels.limit = label_limit
        return known


def _new_instruments(provider: MeterProvider | None, label_limit: int) -> Instruments:
    meter = metrics.get_meter(
        names.SCOPE, __version__, meter_provider=provider, schema_url=names.SCHEMA_URL
    )
    return Instruments(meter, label_limit=label_limit)


def _renewed() -> Telemetry | None:
    with current.lock:
        if current.forked is not None:
            with guard.contained("telemetry after fork"):
                current.telemetry = current.forked.renewed()
                worker.start()
            current.forked = None
        return current.telemetry


def _after_fork_in_child() -> None:
    current.lock = threading.RLock()
    guard.reset()
    worker.after_fork()
    letter_counts.clear()
    inherited = current.telemetry
    if inherited is not None:
        inherited.inherited = True
        for operation in inherited.live:
            operation.orphan()
        # The parent's threads may have held any of its locks; the counts are the parent's.
        inherited.instruments.clear()
        current.forked, current.telemetry = inherited, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
