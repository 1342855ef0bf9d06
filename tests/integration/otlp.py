"""Collectors for tests: a real OTLP receiver that keeps everything, and three that do not work."""

from __future__ import annotations

import gzip
import socket
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import (
    metrics_service_pb2,
    metrics_service_pb2_grpc,
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

DURATION = "threat.ingest.operation.duration"
OPERATION = "threat.ingest.operation.name"
OUTCOME = "threat.ingest.outcome"
DELTA = 1


@dataclass(frozen=True)
class Request:
    """One export request as it came in."""

    protocol: str
    path: str
    headers: dict[str, str]
    message: Any
    size: int


@dataclass(frozen=True)
class Span:
    """One span received."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One metric data point received; the value of a histogram is its count."""

    metric: str
    value: float
    attributes: dict[str, Any]
    resource: dict[str, Any]
    start: int
    time: int
    delta: bool


@dataclass
class Received:
    """What a receiver has got, all of it or that of one service."""

    spans: list[Span] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    def names(self) -> Counter[str]:
        """Return how many spans there are of each name."""
        return Counter(span.name for span in self.spans)

    def outcomes(self, name: str) -> list[str]:
        """Return the outcomes of all spans of a name."""
        return [span.attributes[OUTCOME] for span in self.spans if span.name == name]

    def sums(self, metric: str = DURATION, by: str = OPERATION) -> Counter[Any]:
        """Return the total of a metric by an attribute: its last points, or all if delta."""
        total: Counter[Any] = Counter()
        for _instance, label, value in self._totals(metric, by):
            total[label] += value
        return total

    def sums_by_instance(self, metric: str = DURATION, by: str = OPERATION) -> dict[str, Counter]:
        """Return the same for each `service.instance.id`."""
        totals: dict[str, Counter[Any]] = defaultdict(Counter)
        for instance, label, value in self._totals(metric, by):
            totals[instance][label] += value
        return dict(totals)

    def _totals(self, metric: str, by: str) -> Iterator[tuple[str, Any, int]]:
        series: dict[Any, list[Point]] = defaultdict(list)
        for point in self.points:
            if point.metric == metric:
                instance = point.resource["service.instance.id"]
                key = (instance, tuple(sorted(point.attributes.items())), point.start)
                series[(*key, point.time) if point.delta else key].append(point)
        for (instance, *_), points in series.items():
            last = max(points, key=lambda point: point.time)
            yield instance, last.attributes.get(by), int(last.value)

    def duplicates(self) -> list[str]:
        """Return the ids of spans that came more than once."""
        counts = Counter((span.trace_id, span.span_id) for span in self.spans)
        return [span_id for (_, span_id), count in counts.items() if count > 1]

    def resources(self) -> dict[str, list[dict[str, Any]]]:
        """Return the different resources of spans and of metrics."""

        def distinct(many: list[Any]) -> list[dict[str, Any]]:
            return list({repr(one.resource): one.resource for one in many}.values())

        return {"spans": distinct(self.spans), "metrics": distinct(self.points)}


class Receiver:
    """An OTLP receiver over gRPC and HTTP/protobuf on free loopback ports.

    Args:
        unavailable: Refuse every request as a Collector does that is overloaded: 503, UNAVAILABLE.
    """

    def __init__(self, *, unavailable: bool = False) -> None:
        self.unavailable = unavailable
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        self._http = _HTTPReceiver(("127.0.0.1", 0), _handler_for(self))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()
        self._grpc = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        traces, metrics = _services(self)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(traces, self._grpc)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(metrics, self._grpc)
        grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        self.http = f"http://127.0.0.1:{self._http.server_address[1]}"
        self.grpc = f"http://127.0.0.1:{grpc_port}"

    def close(self) -> None:
        """Stop both servers."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(10)
        self._grpc.stop(0).wait(10)

    def take(self, request: Request) -> bool:
        """Keep a request; returns whether it was accepted."""
        if self.unavailable:
            return False
        with self._lock:
            self._requests.append(request)
        return True

    def endpoint(self, protocol: str) -> str:
        """Return the URL for `grpc` or `http/protobuf`."""
        return self.grpc if protocol == "grpc" else self.http

    def requests(self) -> list[Request]:
        """Return the requests so far."""
        with self._lock:
            return list(self._requests)

    def received(self) -> Received:
        """Return everything so far."""
        whole = Received()
        for one in self.by_service().values():
            whole.spans += one.spans
            whole.points += one.points
        return whole

    def by_service(self) -> dict[str, Received]:
        """Return everything so far for each `service.name`."""
        services: dict[str, Received] = defaultdict(Received)
        for request in self.requests():
            for part in getattr(request.message, "resource_spans", ()):
                resource = _dict(part.resource.attributes)
                services[resource["service.name"]].spans += _spans(part, resource)
            for part in getattr(request.message, "resource_metrics", ()):
                resource = _dict(part.resource.attributes)
                services[resource["service.name"]].points += _points(part, resource)
        return dict(services)


@contextmanager
def receiver(*, unavailable: bool = False) -> Iterator[Receiver]:
    """Run a receiver for a block."""
    running = Receiver(unavailable=unavailable)
    try:
        yield running
    finally:
        running.close()


@contextmanager
def black_hole() -> Iterator[str]:
    """Run a server that accepts connections and never answers; gives its URL."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:

        def accept() -> None:
            while True:
                try:
                    held.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            for connection in held:
                connection.close()


@contextmanager
def refusing() -> Iterator[str]:
    """Hold a port on which nothing listens, so that connections to it are refused."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


class _HTTPReceiver(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a program that is killed breaks its connection."""


def _handler_for(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            plain = gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
            kind = (
                metrics_service_pb2.ExportMetricsServiceRequest
                if "metrics" in self.path
                else trace_service_pb2.ExportTraceServiceRequest
            )
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request("http", self.path, headers, kind.FromString(plain), len(body))
            self.send_response(200 if receiver.take(request) else 503)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    return Handler


def _services(receiver: Receiver) -> tuple[Any, Any]:
    def take(message: Any, context: Any) -> None:
        headers = {name: str(value) for name, value in context.invocation_metadata()}
        if not receiver.take(Request("grpc", "", headers, message, message.ByteSize())):
            context.abort(grpc.StatusCode.UNAVAILABLE, "overloaded")

    class Traces(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            take(request, context)
            return trace_service_pb2.ExportTraceServiceResponse()

    class Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            take(request, context)
            return metrics_service_pb2.ExportMetricsServiceResponse()

    return Traces(), Metrics()


def _spans(part: Any, resource: dict[str, Any]) -> Iterator[Span]:
    for scope in part.scope_spans:
        for span in scope.spans:
            ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
            yield Span(span.name, *ids, _dict(span.attributes), resource)


def _points(part: Any, resource: dict[str, Any]) -> Iterator[Point]:
    for scope in part.scope_metrics:
        for metric in scope.metrics:
            data = getattr(metric, metric.WhichOneof("data"))
            delta = getattr(data, "aggregation_temporality", 0) == DELTA
            for point in data.data_points:
                kind = "count" if hasattr(point, "count") else point.WhichOneof("value")
                yield Point(
                    metric.name,
                    getattr(point, kind),
                    _dict(point.attributes),
                    resource,
                    point.start_time_unix_nano,
                    point.time_unix_nano,
                    delta,
                )


def _dict(attributes: Any) -> dict[str, Any]:
    return {
        one.key: getattr(one.value, one.value.WhichOneof("value") or "string_value")
        for one in attributes
    }
