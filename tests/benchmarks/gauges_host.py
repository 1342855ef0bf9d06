"""Host figures: our reading and callbacks, and the peer's collect; served to gauges.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import Sample, Subject, measure
from hosts import serve
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from periscope_otel.gauges.host import HostReader
from periscope_otel.gauges.instrument import _state, instrument_gauges
from periscope_otel.gauges.observe import HOST

if TYPE_CHECKING:
    from collections.abc import Callable

SAME_SET: dict[str, list[str] | None] = {
    "system.cpu.time": ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"],
    "system.cpu.utilization": ["user", "nice", "system", "idle", "iowait", "irq", "steal"],
    "system.memory.usage": ["used", "free", "buffers", "cached"],
    "system.memory.utilization": ["used", "free", "buffers", "cached"],
    "system.swap.usage": ["used", "free"],
    "system.disk.io": ["read", "write"],
    "system.disk.operations": ["read", "write"],
    "system.network.dropped.packets": ["transmit", "receive"],
    "system.network.errors": ["transmit", "receive"],
    "system.network.io": ["transmit", "receive"],
    "process.context_switches": ["involuntary", "voluntary"],
    "process.cpu.time": ["user", "system"],
    "process.cpu.utilization": ["user", "system"],
    "process.memory.usage": None,
    "process.memory.virtual": None,
    "process.open_file_descriptor.count": None,
    "process.thread.count": None,
    "process.disk.io": ["read", "write"],
}
"""What the peer has of what we tell; we tell filesystems, load, uptime, limits and faults too."""


def collector() -> tuple[MeterProvider, InMemoryMetricReader]:
    """Return a provider, and the reader that collects from it."""
    reader = InMemoryMetricReader()
    return MeterProvider([reader], shutdown_on_exit=False), reader


def ours() -> dict[str, Subject]:
    """A reading with the callbacks, and with a collect by the SDK; each of these alone."""
    provider, reader = collector()
    # The sampler's own thread sleeps through the measurement, which reads in its place.
    instrument_gauges(meter_provider=provider, gauges={"host"}, interval=86_400)
    sampler = _state.samplers["host"]
    sampler.wait(10)
    turn = sampler._turn
    assert turn is not None
    slow = HostReader()

    def read_and_collect() -> None:
        sampler.read_once(turn)
        reader.collect()

    def read_and_call_back() -> None:
        sampler.read_once(turn)
        call_back()

    def call_back() -> list[Any]:
        stats = sampler.latest()
        return [list(figure.observe(stats)) for figure in HOST]

    return {
        "ours": Subject(read_and_call_back),
        "ours, collected": Subject(read_and_collect),
        "our reading": Subject(lambda: sampler.read_once(turn)),
        "our slow reading": Subject(lambda: slow.read(slow=True)),
        "our callbacks": Subject(call_back),
        "our collect": Subject(reader.collect),
    }


def peer(config: dict[str, list[str] | None] | None) -> Subject:
    """A collect of OpenTelemetry's own system-metrics instrumentation, which reads in it."""
    from opentelemetry.instrumentation.system_metrics import SystemMetricsInstrumentor

    # It is a singleton, which keeps us silent while it is active; here both are wanted.
    SystemMetricsInstrumentor._instance = None
    provider, reader = collector()
    made = SystemMetricsInstrumentor(config=config)
    made.instrument(meter_provider=provider)
    SystemMetricsInstrumentor._instance = None
    return Subject(reader.collect)


def subjects() -> dict[str, Callable[[int], Sample]]:
    """Return all by name."""
    made = {
        **ours(),
        "peer, same figures": peer(SAME_SET),
        "peer, its default": peer(None),
    }
    return {name: lambda calls, one=one: run(one, calls) for name, one in made.items()}


def run(subject: Subject, calls: int) -> Sample:
    """Make so many calls, at least one."""

    def repeat() -> None:
        for _ in range(max(1, calls)):
            subject.call()

    return measure(repeat, max(1, calls))


if __name__ == "__main__":
    serve(subjects)
