"""`configure()` and `shutdown()`: the one module that knows all parts and wires them."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from opentelemetry import metrics

from periscope_otel import guard
from periscope_otel.dead_letter.in_use import in_use, options_of
from periscope_otel.operation import Operation
from periscope_otel.report import ExportReport
from periscope_otel.resilience import wiring
from periscope_otel.resilience.breaker import breakers as all_breakers
from periscope_otel.resilience.pausing import resumed, shutting_down
from periscope_otel.settings import Settings, differences, load
from periscope_otel.telemetry.current import (
    Telemetry,
    current,
    telemetry_on,
)
from periscope_otel.telemetry.export import FORK_WAIT, ForkGate
from periscope_otel.telemetry.lifecycle import ExitHooks, Flushable, flush_all
from periscope_otel.telemetry.prometheus import PrometheusPage
from periscope_otel.telemetry.providers import Providers
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from periscope_otel.dead_letter.loss import OnLost
    from periscope_otel.dead_letter.queue import DeadLetterQueue
    from periscope_otel.doctor import Diagnosis
    from periscope_otel.doctor.program import Program
    from periscope_otel.gauges import Gauges
    from periscope_otel.resilience.policy import BreakerPolicy
    from periscope_otel.resilience.sharing.verdicts import SharedVerdicts
    from periscope_otel.resilience.span_processor import BreakerSpanProcessor
    from periscope_otel.server import Server

logger = logging.getLogger("periscope_otel")


class Runtime:
    """The parts that `configure()` has wired together.

    Args:
        settings: How.
        tracer_provider: Used as it is, if given; else the global one; else one is built.
        meter_provider: Likewise.
        on_lost: Called with each dead letter that could not be kept, and why.

    Raises:
        StoreError: If the folder of dead letters cannot be used.
        OSError: If the Prometheus address cannot be listened on.
        ValueError: If the environment names an exporter that is not installed.
    """

    def __init__(
        self,
        settings: Settings,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        on_lost: OnLost | None = None,
    ) -> None:
        self.settings = settings
        self.given = (tracer_provider, meter_provider)
        page = None if settings.prometheus is None else PrometheusPage()
        self._providers = Providers(settings, tracer_provider, meter_provider, page)
        self.server: Server | None = None
        self._gauges: Gauges | None = None
        self._ending = False
        self._pid = os.getpid()
        self._hooks = ExitHooks(self._end)
        self._reset_end()
        self._sharing: SharedVerdicts | None = None
        self._breaker_spans: BreakerSpanProcessor | None = None
        resumed()
        self._use_dead_letters(on_lost)
        if page is not None:
            self._serve(page)
        try:
            self._share_breakers()
            self._providers.wire_traces()
            self._drive_breakers()
            self._providers.wire_metrics()
            self.telemetry = self._use()
        except BaseException:
            self._close_parts(time.monotonic())
            raise
        self._providers.publish()
        self._hooks.install()

    @property
    def tracer_provider(self) -> TracerProvider | None:
        """Where spans go; None where they go nowhere."""
        return self._providers.tracer_provider

    @property
    def meter_provider(self) -> MeterProvider | None:
        """Where metrics go; None where they go nowhere."""
        return self._providers.meter_provider

    @property
    def dead_letters(self) -> DeadLetterQueue:
        """The queue of dead letters, opened now if it is not yet; its `store` has the letters.

        Raises:
            StoreError: If its folder cannot be used.
        """
        return in_use.queue()

    def flush(self, timeout: float = 5.0) -> bool:
        """Send everything that has ended, waiting `timeout` seconds at most.

        Returns:
            Whether all was dealt with in time; `report` says what was not exported.
        """
        deadline = time.monotonic() + timeout
        if not self.telemetry.inherited:
            # In the worker's thread, and not waited for long: a provider that hangs must not use up
            # the time in which the others are flushed. Every collect drains once more.
            worker.post(self.telemetry.instruments.drain)
            worker.finish_posted(timeout / 4)
        return flush_all(self._flushables(), deadline)

    def shutdown(self, timeout: float | None = None) -> ExportReport:
        """Flush everything, end the parts that were built here, and say what was left.

        Args:
            timeout: Seconds in all; the setting `shutdown_timeout` (5) by default.

        Returns:
            What was exported and what was not. A second call returns the same.
        """
        timeout = self.settings.shutdown_timeout if timeout is None else timeout
        if not self._closing.acquire(blocking=False):
            self._closed.wait(timeout)
            return self.report(in_time=self._closed.is_set())
        deadline = time.monotonic() + timeout
        shutting_down()
        in_time = self.flush(timeout)
        report = self.report(in_time=in_time)
        self._say(report)
        self._close_parts(deadline)
        self._closed.set()
        if not self._ending:
            resumed()  # the program may go on without telemetry
        return report

    @property
    def closed(self) -> bool:
        """Whether `shutdown` has begun."""
        return self._closing.locked()

    def report(self, *, in_time: bool = True) -> ExportReport:
        """Return what has been exported so far, by signal and destination."""
        return ExportReport(self._providers.report(), in_time)

    def examine(self, timeout: float = 3.0) -> Diagnosis:
        """Say what is well and what is not: settings, providers, servers, devices, losses.

        Args:
            timeout: Seconds that each server has to answer; the whole takes a few times that.

        Example:
            >>> for finding in runtime.examine().broken:
            ...     print(finding.message, finding.remedy)
        """
        from periscope_otel.doctor import examine
        from periscope_otel.doctor.program import program_findings

        # What it has is put together in a thread: a signal handler may ask for this, whatever it
        # has interrupted.
        return examine(
            self.settings, inside=lambda: program_findings(self._program()), timeout=timeout
        )

    # Wiring.

    def _serve(self, page: PrometheusPage) -> None:
        from periscope_otel.doctor.program import PAGE, ProgramPage, program_findings
        from periscope_otel.server import Page, Server

        address = self.settings.prometheus
        if address is None:
            return
        # Before all is wired there is nothing to be told.
        inside = ProgramPage(
            lambda: program_findings(self._program()) if hasattr(self, "telemetry") else ()
        )
        pages: dict[str, Callable[[str], Page]] = {
            "/metrics": lambda accept: Page(*page.render(accept)),
            "/health": lambda _accept: Page(b"ok\n", "text/plain"),
            PAGE: lambda _accept: Page(inside.render(), "application/json"),
        }
        self.server = Server(address.host, address.port, pages, local=[PAGE])

    def _program(self) -> Program:
        from periscope_otel.doctor.program import Program

        return Program(
            self.tracer_provider,
            self.meter_provider,
            builds_spans=self._providers.builds_spans,
            builds_metrics=self._providers.builds_metrics,
            drives_breakers=self._breaker_spans is not None,
            report=self.report(),
            instruments=self.telemetry.instruments,
            label_limit=self.settings.label_limit,
        )

    def _use_dead_letters(self, on_lost: OnLost | None) -> None:
        settings = self.settings
        in_use.configure(options_of(settings, on_lost))
        asked_for = settings.dead_letters or settings.data_dir or settings.redis_url
        if settings.dead_letters is not False and (asked_for or in_use.wanted):
            in_use.queue().start()

    def _share_breakers(self) -> None:
        url = self.settings.redis_url
        if url is not None and self.settings.breaker_sharing:
            self._sharing = wiring.share(url)

    def _drive_breakers(self) -> None:
        provider, is_ours = self.tracer_provider, self._providers.builds_spans
        wanted = self.settings.breaker_spans
        if provider is not None and (wanted or (wanted is None and is_ours)):
            recorded = self.settings.record_client_spans
            self._breaker_spans = wiring.drive(
                provider, is_ours=is_ours, record_client_spans=recorded
            )

    def _use(self) -> Telemetry:
        telemetry = telemetry_on(
            self.tracer_provider,
            self.meter_provider,
            label_limit=self.settings.label_limit,
            renew=self._renew_after_fork,
        )
        telemetry.instruments.export_accounts = self._providers.accounts
        current.silenced = False
        current.install(telemetry)
        worker.start()
        self._use_gauges()
        return telemetry

    def _use_gauges(self) -> None:
        """Switch the gauges on; in the child of a fork, on its own provider."""
        if not self.settings.gauges or isinstance(self.meter_provider, metrics.NoOpMeterProvider):
            return
        from periscope_otel.gauges import instrument_gauges

        before = self._gauges
        with guard.contained("gauges"):
            self._gauges = instrument_gauges(
                meter_provider=self.meter_provider,
                gauges=self.settings.gauges,
                interval=self.settings.gauges_interval,
            )
        if before is not None:
            before.close()

    def _flushables(self) -> list[Flushable]:
        queue = in_use.opened
        return [*self._providers.flushables, *([] if queue is None else [queue])]

    # The end.

    def _end(self, kind: str) -> None:
        """Called at the end of the process, whatever ends it."""
        self._ending = True
        shutting_down()  # what waits for an attempt ends with what its last one came to
        for operation in tuple(self.telemetry.live):
            with guard.contained("operation at the end"):
                if isinstance(operation, Operation):
                    operation.abort()
        with guard.contained(f"end of the process ({kind})"):
            self.shutdown()

    def _reset_end(self) -> None:
        self._closing = threading.Lock()
        self._closed = threading.Event()

    def _close_parts(self, deadline: float) -> None:
        """Shut down what was built here; what hangs is left behind when the time is up."""
        telemetry = getattr(self, "telemetry", None)
        if telemetry is not None and telemetry in (current.telemetry, current.behind):
            current.install(None)
        if self._gauges is not None:
            self._gauges.close()
        self._hooks.remove()
        if self.server is not None:
            self.server.close()
        self._providers.close(deadline)
        self._end_breakers(deadline)
        with guard.contained("dead letters"):
            in_use.close(max(0.1, deadline - time.monotonic()))
            in_use.configure(None)

    def _end_breakers(self, deadline: float) -> None:
        if self._breaker_spans is not None:
            self._breaker_spans.shutdown()
        if self._sharing is not None:
            with guard.contained("breaker sharing"):
                wiring.end_sharing(self._sharing, max(0.1, deadline - time.monotonic()))

    def _say(self, report: ExportReport) -> None:
        wanted = self.settings.exit_report
        if wanted == "never" or (not report.signals and report.complete):
            return
        in_child = self._pid != os.getpid()
        if report.complete and (wanted == "loss" or in_child):
            return
        try:
            sys.stderr.write(report.line() + "\n")
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):
            return  # no standard error to say it on

    # The child of a fork.

    def gates(self) -> list[ForkGate]:
        """Return what a fork waits for."""
        return self._providers.gates()

    def after_fork(self) -> None:
        """Put right at once, in the child, what cannot wait for its first operation."""
        self._reset_end()
        self._hooks.after_fork()
        if self.server is not None:
            self.server.after_fork()
            self.server = None
        self._providers.after_fork()

    def _renew_after_fork(self) -> Telemetry:
        """Make the child's own telemetry, on its first operation."""
        self._providers.renew_after_fork()
        self.telemetry = self._use()
        self._hooks.install()
        return self.telemetry


_lock = threading.Lock()
_runtime: Runtime | None = None


def configure(
    *,
    service_name: str | None = None,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
    otlp_endpoint: str | None = None,
    otlp_protocol: str | None = None,
    prometheus: str | bool | None = None,
    label_limit: int | None = None,
    shutdown_timeout: float | None = None,
    exit_report: str | None = None,
    dead_letters: bool | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    redis_url: str | None = None,
    dead_letter_inline_limit: int | None = None,
    dead_letter_file_limit: int | None = None,
    dead_letter_headers: Sequence[str] | None = None,
    jaeger_url: str | None = None,
    breakers: Mapping[str, BreakerPolicy] | None = None,
    breaker_sharing: bool | None = None,
    breaker_spans: bool | None = None,
    record_client_spans: bool | None = None,
    on_lost: OnLost | None = None,
    gauges: bool | Iterable[str] | None = None,
    gauges_interval: float | None = None,
) -> Runtime:
    """Set everything up, once for the process. Every argument is optional.

    Providers that are given, or that the application has set globally, are used as they are. Each
    setting is taken from its keyword, else from `PERISCOPE_*`, else from its default.

    Args:
        service_name: `service.name`; else OTEL_SERVICE_NAME.
        tracer_provider: Where spans go; by default the global provider, else one is built.
        meter_provider: Where metrics go; likewise.
        otlp_endpoint: The OTLP base URL, such as `http://localhost:4318`; else
            OTEL_EXPORTER_OTLP_ENDPOINT; without either nothing tries the network.
        otlp_protocol: `grpc` or `http/protobuf`; by default gRPC on port 4317, HTTP elsewhere.
        prometheus: True to serve `/metrics` on 127.0.0.1:9464, or an address.
        label_limit: Label sets of one instrument before further values become `other`; 1,500.
        shutdown_timeout: Seconds at the end of the process in which everything is flushed; 5.
        exit_report: `always`, `loss` or `never`: when the end says in one line what was exported.
        dead_letters: True to open the queue of dead letters at once, False to keep none; by
            default it is opened if an operation wants it.
        data_dir: Where dead letters are kept; `$XDG_STATE_HOME/periscope-otel` by default. Its
            parent has to be there.
        redis_url: The Redis that dead letters are moved to; by default they stay in `data_dir`.
        dead_letter_inline_limit: Bytes of a payload, compressed, above which it is a file of its
            own; 8 MiB.
        dead_letter_file_limit: Bytes that the file of dead letters may grow to; 1 GiB.
        dead_letter_headers: Names of entries of the baggage that a dead letter carries along.
        jaeger_url: Where `periscope dlq show` finds traces.
        breakers: How breakers are made that are only named, by pattern of their names:
            `{"*.abuse.ch": BreakerPolicy(slow_threshold=20.0)}`.
        breaker_sharing: Whether processes that share `redis_url` share what their breakers find;
            True.
        breaker_spans: Whether client spans of other instrumentations are recorded on the breaker
            of their host; by default where the tracer provider is built here.
        record_client_spans: Whether these are recorded also where their trace is not sampled;
            False.
        on_lost: Called with each dead letter that could not be kept, and why.
        gauges: True for host and GPU figures, or some of `host`, `gpu` and `per_cpu`; off by
            default.
        gauges_interval: Seconds between two readings of these; 5.

    Returns:
        The runtime. A second call returns the same one, and warns of arguments that differ.

    Raises:
        SettingsError: If a setting's value does not fit.
        StoreError: If the folder of dead letters cannot be used; the message says why.
        OSError: If the Prometheus address cannot be listened on.

    Example:
        >>> runtime = configure(service_name="feeds", otlp_endpoint="http://localhost:4318")
        >>> runtime.shutdown()
    """
    global _runtime
    settings = load(
        {
            "service_name": service_name,
            "otlp_endpoint": otlp_endpoint,
            "otlp_protocol": otlp_protocol,
            "prometheus": prometheus,
            "label_limit": label_limit,
            "shutdown_timeout": shutdown_timeout,
            "exit_report": exit_report,
            "dead_letters": dead_letters,
            "data_dir": data_dir,
            "redis_url": redis_url,
            "dead_letter_inline_limit": dead_letter_inline_limit,
            "dead_letter_file_limit": dead_letter_file_limit,
            "dead_letter_headers": dead_letter_headers,
            "jaeger_url": jaeger_url,
            "breaker_sharing": breaker_sharing,
            "breaker_spans": breaker_spans,
            "record_client_spans": record_client_spans,
            "gauges": gauges,
            "gauges_interval": gauges_interval,
        }
    )
    for pattern, policy in (breakers or {}).items():
        all_breakers.defaults(pattern, policy)
    with _lock:
        if _runtime is None or _runtime.closed:
            _runtime = Runtime(settings, tracer_provider, meter_provider, on_lost)
        else:
            _warn_of_differences(_runtime, settings, (tracer_provider, meter_provider))
        return _runtime


def shutdown(timeout: float = 5.0) -> ExportReport | None:
    """Flush everything within `timeout` seconds and say what was left; undoes `configure()`.

    Returns:
        What was exported and what was not; None if nothing was configured.
    """
    runtime = _runtime
    return None if runtime is None else runtime.shutdown(timeout)


def _warn_of_differences(
    runtime: Runtime,
    settings: Settings,
    given: tuple[TracerProvider | None, MeterProvider | None],
) -> None:
    told = differences(runtime.settings, settings)
    for name, old, new in zip(
        ("tracer_provider", "meter_provider"), runtime.given, given, strict=True
    ):
        if old is not new:
            told.append(f"{name}: another one")
    if told:
        logger.warning(
            "configure() was called before; it keeps its settings. What differs now: %s. "
            "Call shutdown() first to change them",
            "; ".join(told),
        )


def _before_fork() -> None:
    if _runtime is not None and not _runtime.closed:
        deadline = time.monotonic() + FORK_WAIT
        for gate in _runtime.gates():
            gate.before_fork(deadline)


def _after_fork_in_parent() -> None:
    if _runtime is not None:
        for gate in _runtime.gates():
            gate.after_fork_in_parent()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    if _runtime is not None and not _runtime.closed:
        with guard.contained("fork"):
            _runtime.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
