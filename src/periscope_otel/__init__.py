"""OpenTelemetry instrumentation for threat-intelligence ingest.

Put `@monitored` on the functions that pull feeds, convert indicators and store them; each call
becomes a span, is counted and timed, and accounts for every item.

Example:
    >>> import periscope_otel as periscope
    >>> periscope.configure(service_name="feeds", otlp_endpoint="http://localhost:4318")
    >>> @periscope.monitored("fetch", feed="urlhaus")
    ... def fetch(url): ...
"""

from typing import TYPE_CHECKING, Any

from periscope_otel.monitored import monitored
from periscope_otel.operation import Operation, current_operation
from periscope_otel.scope import operation
from periscope_otel.version import __version__

if TYPE_CHECKING:
    from periscope_otel.gauges import instrument_gauges
    from periscope_otel.patching import monitor_function
    from periscope_otel.resilience.breaker import Breaker
    from periscope_otel.resilience.errors import CircuitOpenError
    from periscope_otel.resilience.policy import BreakerPolicy
    from periscope_otel.resilience.retry import Retry
    from periscope_otel.runtime import configure, shutdown

__all__ = [
    "Breaker",
    "BreakerPolicy",
    "CircuitOpenError",
    "Operation",
    "Retry",
    "__version__",
    "configure",
    "current_operation",
    "instrument_gauges",
    "monitor_function",
    "monitored",
    "operation",
    "shutdown",
]

# Loaded when first used: by those who need them, and the OpenTelemetry SDK, exporters and wrapt.
_LATE = {
    "Breaker": "periscope_otel.resilience.breaker",
    "BreakerPolicy": "periscope_otel.resilience.policy",
    "CircuitOpenError": "periscope_otel.resilience.errors",
    "Retry": "periscope_otel.resilience.retry",
    "configure": "periscope_otel.runtime",
    "instrument_gauges": "periscope_otel.gauges",
    "monitor_function": "periscope_otel.patching",
    "shutdown": "periscope_otel.runtime",
}


def __getattr__(name: str) -> Any:
    module = _LATE.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return __all__
