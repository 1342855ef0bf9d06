"""Programs whose Collector is in the tests' own process, which a busy machine stops for seconds."""

from __future__ import annotations

import processes

ENDS_WITHIN = "15"


def otlp(endpoint: str, protocol: str = "http/protobuf", **more: str) -> dict[str, str]:
    """Return the environment that sends OTLP somewhere, and waits at the end until it is there."""
    return processes.otlp(endpoint, protocol, **{"PERISCOPE_SHUTDOWN_TIMEOUT": ENDS_WITHIN} | more)
