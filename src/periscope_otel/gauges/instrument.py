"""`instrument_gauges()`: the process's one sampler, and the instruments that tell what it reads."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple, cast

from opentelemetry import metrics

from periscope_otel import guard
from periscope_otel.gauges.gpu import NOT_INSTALLED, GpuReader
from periscope_otel.gauges.host import HostReader
from periscope_otel.gauges.nvml import NvmlBackend
from periscope_otel.gauges.observe import COUNTER, GAUGE, GPU, HOST, UP_DOWN_COUNTER, Figure
from periscope_otel.gauges.sampler import INTERVAL, Sampler
from periscope_otel.settings import GAUGE_GPU, GAUGE_HOST, GAUGE_PER_CPU, read_gauges
from periscope_otel.telemetry import names
from periscope_otel.telemetry.current import global_meter_provider
from periscope_otel.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation

    from periscope_otel.gauges.stats import GpuProblem, GpuStats, SystemStats

logger = logging.getLogger("periscope_otel")

_FIGURES = {GAUGE_HOST: HOST, GAUGE_GPU: GPU}

_CONTRIB = "opentelemetry.instrumentation.system_metrics"


class Gauges:
    """Gauges on one meter provider, until they are closed."""

    def __init__(self, instruments: _Instruments, wanted: frozenset[str]) -> None:
        self._instruments = instruments
        self.wanted = wanted
        """`host` and `gpu`, as far as they were asked for."""

    def close(self) -> None:
        """Tell nothing more, and end the sampler with the last that are closed."""
        with _state.lock:
            self._instruments.users.discard(self)
            _state.users.discard(self)
            sampler = None if _state.users else _state.take_sampler()
        if sampler is not None:
            sampler.stop()


def instrument_gauges(
    *,
    meter_provider: MeterProvider | None = None,
    gauges: bool | str | Iterable[str] = True,
    interval: float = INTERVAL,
) -> Gauges:
    """Tell host and GPU figures by observable instruments, on the semantic conventions' names.

    They are read in the background by one thread of the process, however many providers and
    readers there are. Figures that cannot be had are absent. Host figures stay off while
    OpenTelemetry's own system-metrics instrumentation is active.

    Args:
        meter_provider: Where the metrics go; the global provider by default.
        gauges: What to tell: `host`, `gpu`, and `per_cpu` for each CPU's figures; True for host
            and GPU.
        interval: Seconds between two readings, from 0.1; the shortest that was asked for counts.

    Returns:
        What was switched on; its `close` ends it.

    Raises:
        ValueError: If `gauges` or `interval` do not fit.

    Example:
        >>> gauges = instrument_gauges(gauges={"host"})
        >>> gauges.close()
    """
    try:
        chosen = frozenset(read_gauges(gauges))
    except TypeError as error:
        raise ValueError(f"gauges={gauges!r}") from error
    if not 0.1 <= interval <= 86_400:
        raise ValueError(f"interval={interval!r}: expected seconds from 0.1 to 86400")
    wanted = chosen & _FIGURES.keys()
    with _state.lock:
        instruments = _state.instruments_on(meter_provider)
        handle = Gauges(instruments, wanted)
        _state.users.add(handle)
        instruments.users.add(handle)
        sampler = _state.sampler_of(wanted, interval, per_cpu=GAUGE_PER_CPU in chosen)
    if wanted:
        sampler.start()
    instruments.make(wanted)
    return handle


def get_system_stats(timeout: float = 1.0) -> SystemStats | None:
    """Return the latest figures of the host and this process.

    Where nothing samples them yet, that begins now.

    Args:
        timeout: Seconds to wait at most for the first reading.

    Returns:
        The figures, no older than three intervals; None if there are none.

    Example:
        >>> stats = get_system_stats()
        >>> stats.memory.total > 0
        True
    """
    return cast("SystemStats | None", _stats(GAUGE_HOST, timeout))


def get_gpu_stats(timeout: float = 1.0) -> GpuStats | None:
    """Return the latest figures of all GPUs, and what keeps them from being read.

    Where nothing samples them yet, that begins now.

    Args:
        timeout: Seconds to wait at most for the first reading.

    Returns:
        The figures, no older than three intervals; None if there are none yet.

    Example:
        >>> stats = get_gpu_stats(timeout=10.0)
        >>> bool(stats.devices) or stats.problem is not None
        True
    """
    return cast("GpuStats | None", _stats(GAUGE_GPU, timeout))


def _stats(part: str, timeout: float) -> object | None:
    with _state.lock:
        sampler = _state.sampler_of({part}, None, per_cpu=False)
    sampler.start()
    return sampler.wait_for(part, timeout)


class Condition(NamedTuple):
    """How the sampler is."""

    parts: tuple[str, ...]
    """What it reads."""
    hanging: tuple[str, ...]
    """What does not come back from being read."""
    problem: GpuProblem | None
    """What keeps GPUs from being read, unless there simply are none."""


def condition() -> Condition | None:
    """Return how the sampler is; None if there is none."""
    sampler = _state.sampler
    if sampler is None:
        return None
    stats = cast("GpuStats | None", sampler.latest(GAUGE_GPU)) if sampler.has(GAUGE_GPU) else None
    problem = None if stats is None else stats.problem
    if problem is not None and problem.reason in NOT_INSTALLED:
        problem = None
    return Condition(sampler.part_names, tuple(sorted(sampler.hanging)), problem)


class _Instruments:
    """The instruments of one meter: made once, silent while nobody wants them."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._made: set[str] = set()
        self.users: set[Gauges] = set()

    def make(self, wanted: Iterable[str]) -> None:
        """Make the instruments of these parts, as far as they are not made yet."""
        for part in wanted:
            with _state.lock:
                new = part not in self._made
                self._made.add(part)
            for figure in _FIGURES[part] if new else ():
                self._make(part, figure)

    def _make(self, part: str, figure: Figure) -> None:
        create = {
            COUNTER: self._meter.create_observable_counter,
            UP_DOWN_COUNTER: self._meter.create_observable_up_down_counter,
            GAUGE: self._meter.create_observable_gauge,
        }[figure.kind]
        metric = figure.metric
        create(metric.name, [self._callback(part, figure)], metric.unit, metric.description)

    def _callback(
        self, part: str, figure: Figure
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        """Make an SDK callback: one that cannot raise, since that ends a whole collect."""

        def callback(_options: CallbackOptions) -> Iterable[Observation]:
            try:
                if not any(part in user.wanted for user in tuple(self.users)):
                    return ()
                stats = _state.latest(part)
                return () if stats is None else list(figure.observe(stats))
            except Exception as error:  # noqa: BLE001
                guard.report(f"observing {figure.metric.name}", error)
                return ()

        return callback


class _State:
    """What a process has one of."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users: set[Gauges] = set()
        self._sampler: Sampler | None = None
        self._host: HostReader | None = None
        self._on_proxy: _Instruments | None = None
        self._instruments: weakref.WeakKeyDictionary[MeterProvider, _Instruments] = (
            weakref.WeakKeyDictionary()
        )
        self._contrib_was_active = False

    def sampler_of(
        self, wanted: Iterable[str], interval: float | None, *, per_cpu: bool
    ) -> Sampler:
        """Return the sampler, which reads these parts; the caller holds the lock."""
        sampler = self._sampler
        if sampler is None:
            sampler = self._sampler = Sampler(INTERVAL if interval is None else interval)
            atexit.unregister(_at_exit)
            atexit.register(_at_exit)
        elif interval is not None:
            sampler.interval = min(sampler.interval, interval)
        if GAUGE_HOST in wanted and self._host is None:
            self._host = HostReader()
            sampler.add(self._host)
        if per_cpu and self._host is not None:
            self._host.per_cpu = True
        if GAUGE_GPU in wanted and not sampler.has(GAUGE_GPU):
            sampler.add(GpuReader(NvmlBackend()))
        return sampler

    @property
    def sampler(self) -> Sampler | None:
        """The sampler, if there is one."""
        return self._sampler

    def take_sampler(self) -> Sampler | None:
        """Return the sampler, to be stopped; the caller holds the lock."""
        sampler, self._sampler, self._host = self._sampler, None, None
        return sampler

    def latest(self, part: str) -> object | None:
        """Return what is to be told of a part now."""
        sampler = self._sampler
        if sampler is None or (part == GAUGE_HOST and self._contrib_is_active()):
            return None
        return sampler.latest(part)

    def instruments_on(self, provider: MeterProvider | None) -> _Instruments:
        """Return the instruments of a provider: they may be made only once on each."""
        in_use = global_meter_provider()
        real = in_use if provider is None else provider
        known = None if real is None else self._instruments.get(real)
        if known is None and (real is None or real is in_use):
            known = self._on_proxy  # made before there was a global provider
        if known is None:
            known = _Instruments(
                metrics.get_meter(
                    names.SCOPE, __version__, meter_provider=real, schema_url=names.SCHEMA_URL
                )
            )
            if real is None:
                self._on_proxy = known
            else:
                self._instruments[real] = known
        return known

    def _contrib_is_active(self) -> bool:
        """Whether OpenTelemetry's own instrumentation tells the same, by older names."""
        active = _instrumented_by_contrib()
        if active and not self._contrib_was_active:
            logger.warning(
                "host gauges stay off: %s is active, and would tell the same figures twice",
                _CONTRIB,
            )
        self._contrib_was_active = active
        return active

    def after_fork(self) -> None:
        """Start anew in the child; the sampler sees to itself."""
        self.lock = threading.Lock()


def _instrumented_by_contrib() -> bool:
    instrumentor = getattr(sys.modules.get(_CONTRIB), "SystemMetricsInstrumentor", None)
    # A class with one instance, which making would be the first of.
    instance = getattr(instrumentor, "_instance", None)
    return bool(getattr(instance, "is_instrumented_by_opentelemetry", False))


_state = _State()


def _at_exit() -> None:
    """End the thread before the C library's own end, which a call into a driver may not survive."""
    with guard.contained("end of the gauges"):
        sampler = _state._sampler
        if sampler is not None:
            sampler.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_state.after_fork)
