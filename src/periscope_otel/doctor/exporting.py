"""Where spans and metrics go: by a real, empty request to each destination."""

from __future__ import annotations

import logging
import os
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from periscope_otel.doctor.finding import broken, off, ok, said_by, warning
from periscope_otel.doctor.listening import Listener
from periscope_otel.doctor.listening import load as load_exporters
from periscope_otel.telemetry import pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from periscope_otel.doctor.finding import Finding
    from periscope_otel.settings import Settings
    from periscope_otel.telemetry.pipeline import Destination

SIGNALS: Final = {"traces": "spans", "metrics": "metrics"}


class _Reason(NamedTuple):
    """A kind of failure, as servers and libraries word it."""

    pattern: str
    message: str
    remedy: str


_SLOW: Final = _Reason(
    r"DEADLINE_EXCEEDED|[Tt]imed? ?out|timeout|unreachable|UNREACHABLE",
    "it does not answer in time",
    "look whether the Collector is overloaded, or a firewall drops what is sent there",
)
_INSECURE: Final = _Reason(
    r"SSL|TLS|Tls|certificate|CERTIFICATE",
    "no secure connection can be made",
    "use http:// if the Collector has no TLS; else give its CA's certificate in "
    "OTEL_EXPORTER_OTLP_CERTIFICATE",
)
_REASONS: Final = (
    _Reason(
        r"[Ff]ailed to read|No such file",
        "a file that the exporter needs cannot be read",
        "correct OTEL_EXPORTER_OTLP_CERTIFICATE, …_CLIENT_KEY and …_CLIENT_CERTIFICATE",
    ),
    _Reason(
        r"ProxyError|Unable to connect to proxy|Tunnel connection failed|InvalidProxyURL",
        "the proxy cannot be used that the environment names",
        "correct HTTP_PROXY or HTTPS_PROXY, or put the Collector's host in NO_PROXY",
    ),
    _Reason(
        r"No connection adapters|InvalidSchema|MissingSchema|Invalid URL|Failed to parse",
        "the endpoint is no URL that can be sent to",
        "begin it with http:// or https://, as in http://localhost:4318",
    ),
    _Reason(
        r"UNAUTHENTICATED|PERMISSION_DENIED|code: 40[13]\b",
        "it refuses the credentials",
        "correct the headers in OTEL_EXPORTER_OTLP_HEADERS",
    ),
    _Reason(
        r"Failed parsing HTTP/2|http2 header with status|BadStatusLine|HTTP/0\.9|http1\.x server"
        r"|RemoteDisconnected|Connection reset|code: 415\b|UNIMPLEMENTED",
        "it speaks another protocol than {protocol}",
        "gRPC is on port 4317 as a rule, HTTP on 4318: correct the port, or set "
        "OTEL_EXPORTER_OTLP_PROTOCOL to grpc or http/protobuf",
    ),
    _Reason(
        r"code: (?:404|405|501)\b",
        "there is no OTLP receiver at this path",
        "give the base URL in OTEL_EXPORTER_OTLP_ENDPOINT (/v1/traces and /v1/metrics are put "
        "after it), or the whole one in OTEL_EXPORTER_OTLP_TRACES_ENDPOINT and …_METRICS_ENDPOINT",
    ),
    _INSECURE,
    _Reason(
        r"NameResolutionError|Failed to resolve|hostname lookup|Domain name not found"
        r"|DNS resolution",
        "its name cannot be resolved",
        "correct the host in OTEL_EXPORTER_OTLP_ENDPOINT",
    ),
    _Reason(
        r"refused",
        "the connection is refused: nothing listens there",
        "start a Collector there (collector-config/ has one), or correct "
        "OTEL_EXPORTER_OTLP_ENDPOINT",
    ),
    _Reason(
        r"UNAVAILABLE|RESOURCE_EXHAUSTED|code: (?:429|50[234])\b",
        "it is overloaded, or not ready",
        "look at what the Collector logs, and whether its queues are full",
    ),
    _SLOW,
)
_OTHER_REASON: Final = _Reason(
    "", "it does not take requests", "look at what it logs, and at OTEL_EXPORTER_OTLP_ENDPOINT"
)


def export_findings(settings: Settings, signal: str, timeout: float) -> Iterator[Finding]:
    """Say of each destination of a signal whether it takes requests.

    Args:
        settings: Where to export to.
        signal: `traces` or `metrics`.
        timeout: Seconds that each destination has.
    """
    check = f"{signal}.export"
    try:
        wanted = pipeline.destinations(signal, settings.otlp_endpoint, settings.otlp_protocol)
    except Exception as error:  # noqa: BLE001 - an exporter is loaded by its name
        yield broken(check, said_by(error), "install it, or correct the variable")
        return
    if not wanted:
        yield off(check, f"{SIGNALS[signal]} go nowhere: no OTLP endpoint is set")
    for to in wanted:
        yield _tried(check, signal, to, timeout) if to.is_otlp else _made(check, signal, to)


def load(settings: Settings) -> None:
    """Import what the destinations' exporters need, in the caller's thread."""
    for signal in SIGNALS:
        with suppress(Exception):  # what is wrong is said when they are looked at
            wanted = pipeline.destinations(signal, settings.otlp_endpoint, settings.otlp_protocol)
            for is_grpc in {one.is_grpc for one in wanted if one.is_otlp}:
                load_exporters(is_grpc=is_grpc)


def late_findings(signal: str) -> Finding:
    """Return the finding that a destination neither answers nor hangs up."""
    return broken(
        f"{signal}.export", "the destination does not end its answer in time", _SLOW.remedy
    )


def anywhere_findings(settings: Settings) -> Iterator[Finding]:
    """Say if telemetry goes nowhere at all."""
    endpoint, protocol = settings.otlp_endpoint, settings.otlp_protocol
    try:
        wanted = any(pipeline.destinations(signal, endpoint, protocol) for signal in SIGNALS)
    except Exception:  # noqa: BLE001 - it was meant to go somewhere, and that is said
        return
    if not wanted and settings.prometheus is None:
        yield warning(
            "export.anywhere",
            "neither spans nor metrics go anywhere, unless the program sets providers of its own",
            "set OTEL_EXPORTER_OTLP_ENDPOINT for a Collector, or PERISCOPE_PROMETHEUS=true for a "
            "page that Prometheus reads",
        )


def _made(check: str, signal: str, to: Destination) -> Finding:
    """Make an exporter that is none for OTLP, unless that alone has it listen on a port."""
    if to.name != "prometheus":
        try:
            shutdown = getattr(to.make(), "shutdown", None)
            if shutdown is not None:
                shutdown()
        except Exception as error:  # noqa: BLE001 - of whatever is installed under that name
            return broken(
                check,
                f"the exporter {to.name} cannot be made: {said_by(error)}",
                "correct what it is configured by, or name another one",
            )
    return ok(check, f"{SIGNALS[signal]} go to the exporter {to.name}, which was not tried")


def _tried(check: str, signal: str, to: Destination, timeout: float) -> Finding:
    protocol = "gRPC" if to.is_grpc else "HTTP"
    named = f"OTLP over {protocol} to {to.name}"
    with Listener(is_grpc=to.is_grpc) as heard:
        try:
            session = {} if to.is_grpc else heard.session(signal)
            exporter = to.make(timeout=timeout, **session)
        except Exception as error:  # noqa: BLE001 - whatever a wrong header or certificate raises
            return broken(
                check,
                f"{named}: the exporter cannot be made: {said_by(error)}",
                "correct the OTEL_EXPORTER_OTLP_* variables",
            )
        began = time.monotonic()
        taken = _export_nothing(exporter, signal)
        took = time.monotonic() - began
        exporter.shutdown()
    if taken:
        return ok(check, f"{named}: takes requests, within {1000 * took:.0f} ms")
    reason = _reason_of(" ".join(heard.said))
    message = reason.message.format(protocol=protocol)
    detail = f" ({heard.said[-1]})" if heard.said and reason is _OTHER_REASON else ""
    through = _grpc_proxy() if to.is_grpc else ""
    besides = "" if to.is_grpc or reason is not _INSECURE else _other_certificates()
    return broken(check, f"{named}{through}: {message}{detail}", reason.remedy + besides)


def _grpc_proxy() -> str:
    """Return how gRPC goes if the environment names a proxy (grpc/doc/environment_variables.md)."""
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        if os.environ.get(name):
            return f" through the proxy of {name}"
    return ""


def _other_certificates() -> str:
    """Return what to do about a variable that requests heeds before the exporter's certificate."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if os.environ.get(name):
            return f", and unset {name}, which takes the place of that"
    return ""


def _export_nothing(exporter: Any, signal: str) -> bool:
    """Send a request without spans or points; returns whether it was taken."""
    from opentelemetry.sdk.metrics.export import MetricsData

    nothing: Any = [] if signal == "traces" else MetricsData(resource_metrics=[])
    try:
        return bool(exporter.export(nothing).name == "SUCCESS")
    except Exception:
        logging.getLogger("opentelemetry.exporter").exception("export failed")
        return False


def _reason_of(said: str) -> _Reason:
    found = (one for one in _REASONS if re.search(one.pattern, said))
    return next(found, _OTHER_REASON)
