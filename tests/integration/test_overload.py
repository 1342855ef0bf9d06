"""More spans than can be sent: each is exported, failed, dropped or waiting, and counted so."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from otlp import black_hole, refusing
from processes import otlp, run
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from otlp import Receiver

QUEUE = {
    "OTEL_BSP_MAX_QUEUE_SIZE": "200",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "50",
    "OTEL_METRICS_EXPORTER": "none",
}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_the_report_accounts_for_every_span(protocol: str) -> None:
    """Before a black hole emitted = exported + failed + dropped + waiting, to the span."""
    with black_hole() as endpoint:
        env = otlp(endpoint, protocol, **QUEUE, PERISCOPE_SHUTDOWN_TIMEOUT="1")
        ended = run("overload", "now", env=env)
    told = json.loads(ended.lines[0])
    assert told["report"]["exported"] == 0
    assert told["report"]["dropped"] > 0
    assert sum(told["report"].values()) == told["emitted"], told
    (line,) = ended.reports
    lost = re.search(r"NOT exported: (\d+) spans", line)
    assert lost is not None, line
    assert int(lost[1]) == told["emitted"]


@pytest.mark.parametrize("broken", [black_hole, refusing])
def test_the_metric_agrees_with_the_report(
    broken: Callable[[], AbstractContextManager[str]],
) -> None:
    """`periscope.export.items` says of every span what the report says."""
    with broken() as endpoint:
        env = otlp(endpoint, OTEL_EXPORTER_OTLP_TIMEOUT="1", **QUEUE)
        ended = run("overload", "wait", env=env | {"PERISCOPE_SHUTDOWN_TIMEOUT": "1"})
    assert ended.status == 0, ended.lines
    told = json.loads(ended.lines[0])
    metric = {
        sample.labels["periscope_export_outcome"]: sample.value
        for family in text_string_to_metric_families(told["page"])
        for sample in family.samples
        if sample.name == "periscope_export_items_total"
        and sample.labels["periscope_signal"] == "spans"
    }
    assert metric == {name: told["report"][name] for name in ("exported", "failed", "dropped")}
    assert metric["failed"] > 0


def test_a_working_collector_gets_what_is_reported_as_exported(collector: Receiver) -> None:
    """With too small a queue the Collector has exactly the spans counted as exported."""
    ended = run("overload", "now", env=otlp(collector.http, **QUEUE))
    told = json.loads(ended.lines[0])
    assert sum(told["report"].values()) == told["emitted"]
    assert len(collector.received().spans) == told["report"]["exported"]
    assert told["report"]["failed"] == told["report"]["waiting"] == 0
