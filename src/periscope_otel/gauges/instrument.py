"""`instrument_gauges()`: the instruments that tell what the process's samplers read."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

from opentelemetry import metrics

from periscope_otel import guard
from periscope_otel.gauges.filesystems import FILESYSTEMS, FilesystemReader
from periscope_otel.gauges.gpu import NOT_INSTALLED, GpuReader
from periscope_otel.gauges.host import SUPPORTED, HostReader
from periscope_otel.gauges.nvml import NvmlBackend
from periscope_otel.gauges.observe import (
    COUNTER,
    FILESYSTEM,
    GAUGE,
    GPU,
    HOST,
    UP_DOWN_COUNTER,
    Figure,
)
from periscope_otel.gauges.sampler import INTERVAL, STOP_WAIT, Sampler
from periscope_otel.settings import GAUGE_GPU, GAUGE_HOST, GAUGE_PER_CPU, read_gauges
from periscope_otel.telemetry import names
from periscope_otel.telemetry.callbacks import contained
from periscope_otel.telemetry.current import global_meter_provider, is_proxy
from periscope_otel.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation

    from periscope_otel.gauges.stats import GpuProblem, GpuStats, SystemStats

logger = logging.getLogger("periscope_otel")

_FIGURES = {GAUGE_HOST: HOST, FILESYSTEMS: FILESYSTEM, GAUGE_GPU: GPU}
"""What is told of what each source says."""
_GAUGE_OF = {GAUGE_HOST: GAUGE_HOST, FILESYSTEMS: GAUGE_HOST, GAUGE_GPU: GAUGE_GPU}
"""By what name each source is asked for."""

_CONTRIB = "opentelemetry.instrumentation.system_metrics"

IDLE = 60.0
"""Seconds for which a source is read on for somebody who has only asked for its stats once."""


class Gauges:
    """Gauges on one meter provider, until they are closed."""

    def __init__(self, instruments: _Instruments, chosen: frozenset[str], interval: float) -> None:
        self.wanted = chosen & {GAUGE_HOST, GAUGE_GPU}
        """`host` and `gpu`, as far as they were asked for."""
        self.per_cpu = GAUGE_PER_CPU in chosen
        self.interval = interval
        self._instruments = instruments

    def wants(self, source: str) -> bool:
        """Whether figures of this source were asked for."""
        return _GAUGE_OF[source] in self.wanted

    def close(self) -> None:
        """Tell nothing more, and end what nobody else wants to be read."""
        self._instruments.users.pop(self, None)
        _state.users.pop(self, None)
        _state.adapt()


def instrument_gauges(
    *,
    meter_provider: MeterProvider | None = None,
    gauges: bool | str | Iterable[str] = True,
    interval: float = INTERVAL,
) -> Gauges:
    """Tell host and GPU figures by observable instruments, on the semantic conventions' names.

    They are read in the background by a thread for each source, however many providers and readers
    there are. Figures that cannot be had are absent. Host figures stay off while OpenTelemetry's
    own system-metrics instrumentation is active.

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
    if not SUPPORTED and GAUGE_HOST in chosen:
        chosen -= {GAUGE_HOST, GAUGE_PER_CPU}
        logger.warning("host gauges stay off: they are for Linux and macOS, not for Windows")
    instruments = _state.instruments_on(None if is_proxy(meter_provider) else meter_provider)
    if instruments.are_disabled:
        return Gauges(instruments, frozenset(), interval)
    handle = Gauges(instruments, chosen, interval)
    instruments.make(source for source in _FIGURES if handle.wants(source))
    instruments.users[handle] = _state.users[handle] = None
    try:
        _state.adapt()
    except BaseException:
        handle.close()
        raise
    if GAUGE_HOST in chosen:
        _state.contrib_is_active()  # to say so now
    return handle


def get_system_stats(timeout: float = 1.0) -> SystemStats | None:
    """Return the latest figures of the host and this process.

    Where nothing samples them yet, that begins now, and ends a minute after nobody asks any more.

    Args:
        timeout: Seconds to wait at most for the first reading.

    Returns:
        The figures, no older than three intervals; None if there are none, as on Windows.

    Example:
        >>> stats = get_system_stats()
        >>> stats.process.pid > 0
        True
    """
    if not SUPPORTED:
        return None
    deadline = time.monotonic() + timeout
    reading = _asked(FILESYSTEMS)  # these two at once
    stats = cast("SystemStats | None", _asked(GAUGE_HOST).wait(timeout))
    filesystems: Any = reading.wait(deadline - time.monotonic())
    return None if stats is None else stats._replace(filesystems=filesystems or ())


def get_gpu_stats(timeout: float = 1.0) -> GpuStats | None:
    """Return the latest figures of all GPUs, and what keeps them from being read.

    Where nothing samples them yet, that begins now, and ends a minute after nobody asks any more.

    Args:
        timeout: Seconds to wait at most for the first reading.

    Returns:
        The figures, no older than three intervals; None if there are none yet.

    Example:
        >>> stats = get_gpu_stats(timeout=10.0)
        >>> bool(stats.devices) or stats.problem is not None
        True
    """
    return cast("GpuStats | None", _asked(GAUGE_GPU).wait(timeout))


def _asked(source: str) -> Sampler:
    """Return a source's sampler, which reads on while somebody asks."""
    _state.asked[source] = time.monotonic()
    sampler = _state.sampler_of(source)
    sampler.start()
    return sampler


class Condition(NamedTuple):
    """How sampling goes."""

    parts: tuple[str, ...]
    """What is read."""
    hanging: tuple[str, ...]
    """What does not come back from being read."""
    problem: GpuProblem | None
    """What keeps GPUs from being read, unless there simply are none."""


def condition() -> Condition | None:
    """Return how sampling goes; None where nothing is read."""
    running = {name: one for name, one in _state.samplers.items() if one.alive}
    if not running:
        return None
    hanging = tuple(name for name, one in running.items() if one.hangs)
    gpu = running.get(GAUGE_GPU)
    stats = None if gpu is None else cast("GpuStats | None", gpu.latest())
    problem = None if stats is None else stats.problem
    if problem is not None and problem.reason in NOT_INSTALLED:
        problem = None
    return Condition(tuple(running), hanging, problem)


class _Instruments:
    """The instruments of one meter: made once, silent while nobody wants them.

    Args:
        meter: Where they are made.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._lock = threading.RLock()
        self._made: set[str] = set()
        self.users: dict[Gauges, None] = {}

    @property
    def are_disabled(self) -> bool:
        """Whether whatever is told here goes nowhere (OTEL_SDK_DISABLED)."""
        return isinstance(self._meter, metrics.NoOpMeter)

    def make(self, sources: Iterable[str]) -> None:
        """Make the instruments of these sources, as far as they are not made yet."""
        with self._lock:
            for source in sources:
                self._make_all(source)

    def _make_all(self, source: str) -> None:
        for figure in _FIGURES[source]:
            if figure.metric.name not in self._made:
                self._make(source, figure)
                self._made.add(figure.metric.name)

    def _make(self, source: str, figure: Figure) -> None:
        create = {
            COUNTER: self._meter.create_observable_counter,
            UP_DOWN_COUNTER: self._meter.create_observable_up_down_counter,
            GAUGE: self._meter.create_observable_gauge,
        }[figure.kind]
        metric = figure.metric
        create(metric.name, [self._callback(source, figure)], metric.unit, metric.description)

    def _callback(
        self, source: str, figure: Figure
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe() -> Iterable[Observation]:
            users = [one for one in self._all_users() if one.wants(source)]
            stats = _state.latest(source) if users else None
            if stats is None:
                return ()
            if source == GAUGE_HOST and not any(one.per_cpu for one in users):
                stats = stats._replace(cpus=())
            return figure.observe(stats)

        observe.__name__ = figure.metric.name  # by which it is reported where it fails
        return contained(observe)

    def _all_users(self) -> tuple[Gauges, ...]:
        """Return whoever wants figures on this provider, also as the global one.

        The SDK gives instruments that were made a second time no callbacks of their own.
        """
        before = _state.on_proxy
        if before is None or before is self or not _state.is_global(self):
            return tuple(self.users)
        return (*self.users, *before.users)


class _State:
    """What a process has one of."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may come in between
        self.users: dict[Gauges, None] = {}
        self.asked: dict[str, float] = {}
        """When somebody has last asked for what a source says."""
        self.samplers: dict[str, Sampler] = {}
        self.on_proxy: _Instruments | None = None
        self._instruments: WeakKeyDictionary[MeterProvider, _Instruments] = WeakKeyDictionary()
        self._of_unkeyable: dict[int, tuple[MeterProvider, _Instruments]] = {}
        self._contrib_was_active = False

    def sampler_of(self, source: str) -> Sampler:
        """Return what reads a source; it is made once."""
        known = self.samplers.get(source)
        if known is not None:
            return known
        # Not under the lock: pynvml and psutil are imported for it. In the caller's thread, since
        # a child that is forked in the middle of a thread's import waits for ever for its lock.
        sampler = Sampler(_make_source(source), is_wanted=lambda: self._is_wanted(source))
        with self._lock:
            if not self.samplers:
                atexit.register(_at_exit)
            return self.samplers.setdefault(source, sampler)

    def adapt(self) -> None:
        """Read what is wanted, as often as it is wanted, and nothing else."""
        for source in _FIGURES:
            users = [one for one in tuple(self.users) if one.wants(source)]
            if users:
                sampler = self.sampler_of(source)
                sampler.interval = min(one.interval for one in users)
                if isinstance(sampler.source, HostReader):
                    per_cpu = any(one.per_cpu for one in users)
                    were, sampler.source.per_cpu = sampler.source.per_cpu, per_cpu
                    if per_cpu and not were:
                        sampler.wake()  # each CPU was not read so far, and is wanted now
                sampler.start()
            elif (known := self.samplers.get(source)) is not None:
                known.interval = INTERVAL
                if not self._is_wanted(source):
                    known.stop()
                    if self._is_wanted(source):  # by somebody who came in between
                        known.start()

    def _is_wanted(self, source: str) -> bool:
        asked = self.asked.get(source)
        if asked is not None and time.monotonic() - asked < IDLE:
            return True
        return any(one.wants(source) for one in tuple(self.users))

    def latest(self, source: str) -> Any:
        """Return what is to be told of a source now."""
        sampler = self.samplers.get(source)
        if sampler is None or (_GAUGE_OF[source] == GAUGE_HOST and self.contrib_is_active()):
            return None
        return sampler.latest()

    def instruments_on(self, provider: MeterProvider | None) -> _Instruments:
        """Return the instruments of a provider: they may be made only once on each."""
        in_use = global_meter_provider()
        real = in_use if provider is None else provider
        known = self._known(real)
        if known is None and (real is None or real is in_use):
            known = self.on_proxy  # made before there was a global provider
        if known is not None:
            return known
        meter = metrics.get_meter(
            names.SCOPE, __version__, meter_provider=real, schema_url=names.SCHEMA_URL
        )
        with self._lock:
            return self._known(real) or self._keep(_Instruments(meter), real)

    def is_global(self, instruments: _Instruments) -> bool:
        """Whether they are those of the provider that is the global one by now."""
        provider = global_meter_provider()
        return provider is not None and self._known(provider) is instruments

    def _known(self, provider: MeterProvider | None) -> _Instruments | None:
        if provider is None:
            return self.on_proxy
        try:
            return self._instruments.get(provider)
        except TypeError:  # it cannot be hashed, or referred to weakly
            known = self._of_unkeyable.get(id(provider))
            return None if known is None else known[1]

    def _keep(self, made: _Instruments, provider: MeterProvider | None) -> _Instruments:
        if provider is None:
            self.on_proxy = made
            return made
        try:
            self._instruments[provider] = made
        except TypeError:
            self._of_unkeyable[id(provider)] = (provider, made)
        return made

    def contrib_is_active(self) -> bool:
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
        """Start anew in the child; the samplers see to themselves."""
        self._lock = threading.RLock()


def _instrumented_by_contrib() -> bool:
    instrumentor = getattr(sys.modules.get(_CONTRIB), "SystemMetricsInstrumentor", None)
    # A class with one instance, which making would be the first of.
    instance = getattr(instrumentor, "_instance", None)
    return bool(getattr(instance, "is_instrumented_by_opentelemetry", False))


def _make_source(source: str) -> HostReader | FilesystemReader | GpuReader:
    if source == GAUGE_HOST:
        return HostReader()
    return FilesystemReader() if source == FILESYSTEMS else GpuReader(NvmlBackend())


_state = _State()


def _at_exit() -> None:
    """End the threads before the C library's end, which a call into a driver may not survive."""
    deadline = time.monotonic() + STOP_WAIT
    for sampler in _state.samplers.values():
        with guard.contained("end of the gauges"):
            sampler.stop(max(0.0, deadline - time.monotonic()))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_state.after_fork)
