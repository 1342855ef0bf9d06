"""Every way into the stack gives the same: gRPC and HTTP, plain and compressed, and scraping."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

import pytest
from main_job import EXAMPLES, environment
from processes import running
from test_user_path import CALLS, PROGRAMS, in_jaeger, run
from waiting import until, until_equal

if TYPE_CHECKING:
    from pathlib import Path

    from apis import Sample

    from conftest import Stack

OF_THE_WAY = {
    *("instance", "job", "service_instance_id", "service_name", "host_name"),
    *("otel_scope_name", "otel_scope_version", "otel_scope_schema_url"),
}
"""Labels that say where a series came from; a way that adds them adds them to all."""


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_every_transport_delivers_all_of_it(
    stack: Stack, tmp_path: Path, protocol: str, compression: str
) -> None:
    """Each span is in Jaeger and each call in Prometheus, whatever carries them."""
    done = run(
        tmp_path,
        PROGRAMS / "outcomes.py",
        stack.collector.endpoint(protocol),
        protocol,
        OTEL_EXPORTER_OTLP_COMPRESSION=compression,
    )
    found = in_jaeger(stack, done)
    assert found.keys() == {span["span_id"] for span in done.spans}
    calls = f'sum({CALLS}{{instance="{done.instance}"}})'
    until_equal(len(done.spans), lambda: stack.prometheus.api.value(calls))


def test_scraping_gives_what_otlp_gives(stack: Stack) -> None:
    """Every series of a program has the same labels and value over both ways."""
    script = EXAMPLES / "ingest_attack.py"
    arguments = ("--otlp", stack.collector.http, "--serve", "127.0.0.1:0")
    with running(script, *arguments, env=environment()) as job:
        served = ""
        while "Serving until Ctrl-C" not in served:
            served += job.line() + "\n"
        address = re.search(r"http://([\d.:]+)/metrics", served)
        assert address, served
        stack.prometheus.scrape("scraped", address[1])
        scraped = until(lambda: stack.prometheus.api.query('{__name__=~"threat_.+",job="scraped"}'))
        # It may arrive later than what is scraped.
        until_equal(by_series(scraped), lambda: by_series(shipped_last(stack)))
        stack.prometheus.forget("scraped")
        job.send(signal.SIGINT)
        job.ended()
    assert len(scraped) > 50


def shipped_last(stack: Stack) -> list[Sample]:
    """Return what came by OTLP of the instance of the main job that began last."""
    ran = "timestamp(threat_ingest_feed_last_success_time_seconds{job='ingest-attack'})"
    jobs = stack.prometheus.api.query(ran)
    if not jobs:
        return []
    instance = max(jobs, key=lambda one: one.value).labels["instance"]
    return stack.prometheus.api.query(f'{{__name__=~"threat_.+",instance="{instance}"}}')


def by_series(samples: list[Sample]) -> dict[frozenset[tuple[str, str]], float]:
    """Return values by what the program itself says of a series."""
    return {frozenset(own_labels(one.labels).items()): one.value for one in samples}


def own_labels(labels: dict[str, str]) -> dict[str, str]:
    """Return a series' labels, the same for both ways into Prometheus.

    Prometheus itself writes a whole bound as `10.0` where it has scraped it, and as `10` where it
    came by OTLP.
    """
    own = {name: value for name, value in labels.items() if name not in OF_THE_WAY}
    if "le" in own:
        own["le"] = str(float(own["le"]))
    return own
