"""The providers that `configure()` builds, and how telemetry leaves them.

Given or global providers are used as they are. What is missing is built here: a TracerProvider
with a counted batch processor for each destination, a MeterProvider with our own readers.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider

from periscope_otel import guard
from periscope_otel.redaction import clean_name, redact
from periscope_otel.telemetry.export import CountedSpanProcessor, ExportAccount
from periscope_otel.telemetry.reader import ExportingReader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.util.types import AttributeValue

GRPC = "grpc"
HTTP = "http/protobuf"
_GRPC_PORT = 4317
_OTLP_BY_PROTOCOL = {"otlp_proto_grpc": GRPC, "otlp_proto_http": HTTP}
"""What the SDK's own names of exporters mean."""


class Destination(NamedTuple):
    """One exporter of one signal."""

    name: str
    make: Callable[..., Any]
    """Makes the exporter; one for OTLP takes `timeout=`, in seconds, and by HTTP `session=`."""
    is_grpc: bool = False
    is_otlp: bool = False


class _HashedResource(Resource):
    """A resource that computes its hash once.

    The OTLP encoder groups spans by resource, and the SDK's own hash is a JSON dump for each span:
    a fifth of what encoding costs.
    """

    _hash: int | None = None

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = super().__hash__()
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)

    def merge(self, other: Resource) -> Resource:
        merged = super().merge(other)
        return _HashedResource(merged.attributes, merged.schema_url)


def resource_of(service_name: str | None) -> Resource:
    """Return the resource that telemetry is about: service, host and process.

    The command line is left out, unlike in the SDK's own process detector: it may hold secrets.
    OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME count; an explicit service name wins.
    """
    known = Resource.create().attributes
    facts: dict[str, AttributeValue] = {
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
        "process.executable.name": os.path.basename(sys.executable or "python"),  # noqa: PTH119
        "process.runtime.name": sys.implementation.name,
        "process.runtime.version": platform.python_version(),
    }
    facts = {name: value for name, value in facts.items() if name not in known}
    if service_name is not None:
        facts["service.name"] = service_name
    made = Resource.create(facts)
    return _HashedResource(made.attributes, made.schema_url)


def resource_after_fork(inherited: Resource) -> Resource:
    """Return the resource of a forked child: the parent's, with its own process and instance."""
    own = resource_of(None).attributes
    mine = {name: own[name] for name in ("process.pid", "service.instance.id") if name in own}
    return inherited.merge(Resource(mine))


def renew_after_fork(provider: object) -> None:
    """Make the spans of a forked child about its own process, as far as the SDK does not."""
    update = getattr(provider, "_update_resource", None)
    if update is not None:
        update(Resource({"process.pid": os.getpid()}))


def destinations(signal: str, endpoint: str | None, protocol: str | None) -> list[Destination]:
    """Return where a signal goes; nowhere unless an argument or the environment says so.

    Args:
        signal: `traces` or `metrics`.
        endpoint: The OTLP base URL given by argument or setting; wins over the environment.
        protocol: `grpc` or `http/protobuf`; by default OTEL_EXPORTER_OTLP_PROTOCOL, then gRPC on
            port 4317 and HTTP elsewhere.
    """
    if endpoint:
        return [_otlp(signal, endpoint, protocol or _protocol_of(signal, endpoint))]
    # An empty variable is one that is not set (OpenTelemetry specification, environment variables).
    named = os.environ.get(f"OTEL_{signal.upper()}_EXPORTER", "").strip()
    if not named:
        configured = _endpoint_in_environment(signal)
        if not configured:
            return []
        return [_otlp(signal, None, protocol or _protocol_of(signal, configured))]
    found = [name.strip() for name in named.split(",")]
    return [_by_name(signal, name, protocol) for name in found if name not in ("", "none")]


def _endpoint_in_environment(signal: str) -> str | None:
    return os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT") or os.environ.get(
        "OTEL_EXPORTER_OTLP_ENDPOINT"
    )


def _protocol_of(signal: str, endpoint: str) -> str:
    named = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL"
    )
    return named or (GRPC if _port_of(endpoint) == _GRPC_PORT else HTTP)


def _port_of(endpoint: str) -> int | None:
    try:
        return urlsplit(endpoint).port
    except ValueError:  # whose text may have a part of a password in it
        raise ValueError("the OTLP endpoint cannot be read as a URL") from None


def _otlp(signal: str, endpoint: str | None, protocol: str) -> Destination:
    """Return an OTLP destination; without `endpoint` the exporter reads the environment itself."""
    shown = redact(endpoint or _endpoint_in_environment(signal) or "the default OTLP endpoint")
    if protocol == GRPC:
        return Destination(
            shown, partial(_grpc_exporter, signal, endpoint), is_grpc=True, is_otlp=True
        )
    url = None if endpoint is None else f"{endpoint.rstrip('/')}/v1/{signal}"
    return Destination(shown, partial(_http_exporter, signal, url), is_otlp=True)


def _grpc_exporter(signal: str, endpoint: str | None, timeout: float | None = None) -> Any:
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    make = OTLPSpanExporter if signal == "traces" else OTLPMetricExporter
    return make(endpoint=endpoint, timeout=timeout, compression=_grpc_compression(signal))


def _grpc_compression(signal: str) -> Any:
    """Return what OTEL_EXPORTER_OTLP_COMPRESSION asks for.

    The exporter itself raises for `none`, which is a standard value, and for those that it does not
    know, which are to be ignored (OpenTelemetry specification, environment variables).
    """
    from grpc import Compression

    known = {
        "": Compression.NoCompression,
        "none": Compression.NoCompression,
        "gzip": Compression.Gzip,
        "deflate": Compression.Deflate,
    }
    variables = (
        f"OTEL_EXPORTER_OTLP_{signal.upper()}_COMPRESSION",
        "OTEL_EXPORTER_OTLP_COMPRESSION",
    )
    named = next((os.environ[one] for one in variables if os.environ.get(one)), "").strip().lower()
    if named not in known:
        guard.warn(
            "compression", "OTLP compression %.40s is not known; none is used", clean_name(named)
        )
    return known.get(named, Compression.NoCompression)


def _http_exporter(
    signal: str, url: str | None, timeout: float | None = None, session: Any = None
) -> Any:
    # What requests imports only when it first sends must be there before a thread does: a child
    # forked in the middle of an import waits for ever for the lock of that import.
    import encodings.idna
    import netrc
    import stringprep

    _ = (encodings.idna, netrc, stringprep)
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    make = OTLPSpanExporter if signal == "traces" else OTLPMetricExporter
    return make(endpoint=url, timeout=timeout, session=session)


def _by_name(signal: str, name: str, protocol: str | None) -> Destination:
    """Return the exporter that OTEL_TRACES_EXPORTER or OTEL_METRICS_EXPORTER names."""
    if name in _OTLP_BY_PROTOCOL:
        return _otlp(signal, None, protocol or _OTLP_BY_PROTOCOL[name])
    if name == "otlp":
        endpoint = _endpoint_in_environment(signal)
        # Without an endpoint the meaning of plain `otlp` in Python is gRPC to localhost:4317.
        chosen = protocol or (_protocol_of(signal, endpoint) if endpoint else GRPC)
        return _otlp(signal, None, chosen)
    found = list(entry_points(group=f"opentelemetry_{signal}_exporter", name=name))
    if not found:
        raise ValueError(f"OTEL_{signal.upper()}_EXPORTER={name}: no such exporter is installed")
    return Destination(name, found[0].load())


def span_processors(wanted: Sequence[Destination]) -> list[CountedSpanProcessor]:
    """Return a counted batch processor for each destination."""
    return [
        CountedSpanProcessor(to.make, ExportAccount("spans", to.name, fork_waits=to.is_grpc))
        for to in wanted
    ]


def build_tracer_provider(
    resource: Resource, processors: Sequence[CountedSpanProcessor]
) -> TracerProvider:
    """Return a TracerProvider; its end is ours to bound, so it does not register one."""
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for processor in processors:
        provider.add_span_processor(processor)
    return provider


def build_meter_provider(resource: Resource, readers: Sequence[MetricReader]) -> MeterProvider:
    """Return a MeterProvider; its end is ours to bound, so it does not register one."""
    return MeterProvider(metric_readers=readers, resource=resource, shutdown_on_exit=False)


def metric_readers(wanted: Sequence[Destination]) -> list[MetricReader]:
    """Return a reader for each destination; one that is a reader by itself is used as it is."""
    from opentelemetry.sdk.metrics.export import MetricReader

    readers: list[MetricReader] = []
    for to in wanted:
        made = to.make()
        if isinstance(made, MetricReader):
            readers.append(made)
        else:
            account = ExportAccount("metrics", to.name, fork_waits=to.is_grpc)
            readers.append(ExportingReader(made, account))
    return readers
