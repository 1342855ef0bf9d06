"""What the Collector has accepted arrives, whatever ends it and whatever is away meanwhile."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from main_job import run
from processes import Program, running
from servers import Collector, Jaeger, Prometheus, Toxiproxy
from waiting import until, until_equal

if TYPE_CHECKING:
    from collections.abc import Iterator

STREAM = Path(__file__).parent / "programs" / "stream.py"
FAST = {
    "OTEL_BSP_SCHEDULE_DELAY": "100",
    "OTEL_BSP_MAX_QUEUE_SIZE": "50000",  # a stream that was held up by a busy machine catches up
    "OTEL_METRIC_EXPORT_INTERVAL": "500",
    "PERISCOPE_SHUTDOWN_TIMEOUT": "15",  # for a Collector that the machine stops for a while
}
ENDS = ("exported", "failed", "dropped", "waiting")
RECEIVED = "threat_ingest_items_received_total"


class Streamed(NamedTuple):
    """What a stream says of itself at its end."""

    accepted: dict[str, set[str]]
    """The spans of each trace that the Collector has accepted."""
    made: int
    items: int
    signals: dict[str, Any]

    @property
    def count(self) -> int:
        """How many spans were accepted."""
        return sum(map(len, self.accepted.values()))


@contextmanager
def streaming(
    collector_url: str, protocol: str = "http/protobuf", pace: int = 100, **variables: str
) -> Iterator[Program]:
    """Run a stream of traces for a block."""
    arguments = (collector_url, protocol, str(pace))
    with running(STREAM, *arguments, env=FAST | variables) as program:
        yield program


def wait_for_accepted(program: Program, more: int) -> None:
    """Wait until that many further spans have been accepted."""
    goal = None
    while True:
        word, count = program.line().split()
        assert word == "accepted"
        goal = goal or int(count) + more
        if int(count) >= goal:
            return


def end(program: Program) -> Streamed:
    """Stop a stream, and return what it says."""
    program.tell("stop")
    told = json.loads(program.ended().lines[-1])
    accepted = {trace: set(spans) for trace, spans in told["accepted"].items()}
    return Streamed(accepted, told["made"], told["items"], told["signals"])


def missing(jaeger: Jaeger, streamed: Streamed) -> int:
    """Return how many accepted spans Jaeger does not have."""
    found: dict[str, set[str]] = {}
    for span in jaeger.api.spans("stream", traces=100_000):
        found.setdefault(span.trace_id, set()).add(span.span_id)
    return sum(
        len(spans - found.get(trace_id, set())) for trace_id, spans in streamed.accepted.items()
    )


def wait_for_items(prometheus: Prometheus, streamed: Streamed) -> None:
    """Wait until Prometheus has counted every item of the stream."""
    until_equal(streamed.items, lambda: prometheus.api.value(f'sum({RECEIVED}{{job="stream"}})'))


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_killed_in_mid_stream_loses_nothing(tmp_path: Path, protocol: str) -> None:
    """Killed twice by kill -9 with Jaeger and Prometheus away, it delivers what it accepted."""
    jaeger, prometheus = Jaeger(tmp_path / "jaeger"), Prometheus(tmp_path / "prometheus")
    with Collector(tmp_path / "collector", jaeger.otlp, prometheus.url) as collector:
        with streaming(collector.endpoint(protocol), protocol) as program:
            for _ in range(2):
                wait_for_accepted(program, 500)
                collector.kill()
                collector.start()
            wait_for_accepted(program, 500)
            streamed = end(program)
        collector.kill()
        with jaeger, prometheus, collector:
            assert streamed.count > 1_500
            until_equal(0, lambda: missing(jaeger, streamed))
            wait_for_items(prometheus, streamed)


def test_a_collector_killed_with_a_full_queue_loses_nothing(tmp_path: Path) -> None:
    """It refuses what no longer fits, which the program counts, and delivers all else."""
    jaeger, prometheus = Jaeger(tmp_path / "jaeger"), Prometheus(tmp_path / "prometheus")
    small = {"COLLECTOR_QUEUE_BYTES": "1000000"}
    with Collector(tmp_path / "c", jaeger.otlp, prometheus.url, **small) as collector, prometheus:
        with streaming(collector.http, pace=300, OTEL_EXPORTER_OTLP_TIMEOUT="1") as program:
            prometheus.scrape("collector", collector.metrics_address)
            refused = "otelcol_exporter_enqueue_failed_spans_total"
            until(lambda: prometheus.api.value(f"sum({refused}) > 0"))
            streamed = end(program)
        collector.kill()
        with jaeger, collector:
            until_equal(0, lambda: missing(jaeger, streamed))
    spans = streamed.signals["spans"]
    assert spans["exported"] == streamed.count > 1_000
    assert spans["failed"] > 0
    assert sum(spans[end] for end in ENDS) == streamed.made


def test_destinations_that_come_back_get_what_they_missed(tmp_path: Path) -> None:
    """With Jaeger and Prometheus away for a while nothing is lost, and no item counts twice."""
    jaeger, prometheus = Jaeger(tmp_path / "jaeger"), Prometheus(tmp_path / "prometheus")
    with Toxiproxy(tmp_path / "toxiproxy") as proxy:
        to_jaeger = proxy.add("jaeger", jaeger.otlp)
        to_prometheus = proxy.add("prometheus", prometheus.address)
        with (
            jaeger, prometheus,
            Collector(tmp_path / "c", to_jaeger, f"http://{to_prometheus}") as collector,
            streaming(collector.grpc, "grpc") as program,
        ):  # fmt: skip
            wait_for_accepted(program, 300)
            with proxy.down("jaeger"), proxy.down("prometheus"):
                wait_for_accepted(program, 1_000)
            streamed = end(program)
            assert streamed.signals["spans"]["exported"] == streamed.made
            until_equal(0, lambda: missing(jaeger, streamed))
            wait_for_items(prometheus, streamed)


def test_a_program_with_a_wrong_clock_harms_no_other(tmp_path: Path) -> None:
    """What Prometheus refuses of one program is counted, and takes nothing of others with it."""
    jaeger, prometheus = Jaeger(tmp_path / "jaeger"), Prometheus(tmp_path / "prometheus")
    with prometheus, Collector(tmp_path / "c", jaeger.otlp, prometheus.url) as collector:
        for service, ahead in (("one", 0), ("fast", 3600), ("two", 0)):
            send_a_point(collector, service, time.time() + ahead)
        until_equal({"one", "two"}, lambda: set(prometheus.api.sums("clock", "job")))
        prometheus.scrape("collector", collector.metrics_address)
        lost = "otelcol_exporter_send_failed_metric_points_total"
        until_equal(1, lambda: prometheus.api.value(f"sum({lost})"))


def send_a_point(collector: Collector, service: str, at: float) -> None:
    """Send one point of a gauge by OTLP, as a program does whose clock says so."""
    name = {"key": "service.name", "value": {"stringValue": service}}
    point = {"timeUnixNano": str(int(at * 1e9)), "asInt": "1"}
    metrics = [{"name": "clock", "gauge": {"dataPoints": [point]}}]
    body = {
        "resourceMetrics": [
            {"resource": {"attributes": [name]}, "scopeMetrics": [{"metrics": metrics}]}
        ]
    }
    request = urllib.request.Request(
        f"{collector.http}/v1/metrics",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_bad_line_to_the_collector_loses_nothing_silently(tmp_path: Path, protocol: str) -> None:
    """Over a line that is slow and breaks, each span arrives or is counted as not exported."""
    jaeger, prometheus = Jaeger(tmp_path / "jaeger"), Prometheus(tmp_path / "prometheus")
    with (
        Toxiproxy(tmp_path / "toxiproxy") as proxy, jaeger, prometheus,
        Collector(tmp_path / "collector", jaeger.otlp, prometheus.url) as collector,
    ):  # fmt: skip
        line = proxy.add("collector", collector.endpoint(protocol).removeprefix("http://"))
        with streaming(f"http://{line}", protocol) as program:
            with proxy.toxic("collector", "latency", latency=50, jitter=50):
                wait_for_accepted(program, 300)
            for _ in range(3):
                with proxy.toxic("collector", "reset_peer", timeout=0):
                    time.sleep(0.3)  # the line is broken for that long
                wait_for_accepted(program, 200)
            streamed = end(program)
        spans = streamed.signals["spans"]
        assert spans["exported"] == streamed.count
        assert (
            sum(spans[end] for end in ("exported", "failed", "dropped", "waiting")) == streamed.made
        )
        until_equal(0, lambda: missing(jaeger, streamed))
        wait_for_items(prometheus, streamed)


def test_without_a_collector_the_job_ends_in_time_and_says_what_is_missing(tmp_path: Path) -> None:
    """With nothing at the endpoint from the start the job does its work, and counts the spans."""
    collector = Collector(tmp_path, jaeger="127.0.0.1:1", prometheus="http://127.0.0.1:1")
    for protocol in ("grpc", "http/protobuf"):
        done = run(
            "--otlp",
            collector.endpoint(protocol),
            OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
            # Without a bound of ours it would go on for so long, and that is waited for by no run.
            OTEL_EXPORTER_OTLP_TIMEOUT="600",
        )
        assert done.returncode == 0
        assert "✓ 1,826 received = 1,784 ingested" in done.stdout
        assert re.search(rf"spans +{collector.endpoint(protocol)} +0 +\d+ +0 +\d+\n", done.stdout)
        assert "NOT exported: 23 spans" in done.stderr
