"""The program `gauges`, and what a Collector and Prometheus get from it."""

from __future__ import annotations

import http.client
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nvml import ends_well
from processes import otlp, running
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from otlp import Point, Receiver
    from processes import Program


class Gauges:
    """The program `gauges`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.port = int(program.line())

    def ask(self, *command: object) -> Any:
        """Have it do something, and return its answer."""
        self.program.tell(json.dumps(command))
        return json.loads(self.program.line())


@contextmanager
def gauges(
    collector: Receiver | None = None, library: Path | None = None, **settings: object
) -> Iterator[Gauges]:
    """Run a program with these settings."""
    env = {} if collector is None else otlp(collector.http)
    if library is not None:
        env["LD_LIBRARY_PATH"] = str(library)
    with running("gauges", json.dumps(settings), env=env) as program:
        yield Gauges(program)
        ends_well(program)


def latest(collector: Receiver, metric: str, **labels: object) -> list[Point]:
    """Return the last point of each series of a metric, those with these attributes."""
    wanted = {name.replace("_", "."): value for name, value in labels.items()}
    found = {
        tuple(sorted(point.attributes.items())): point
        for point in collector.received().points
        if point.metric == metric and wanted.items() <= point.attributes.items()
    }
    return list(found.values())


def value(collector: Receiver, metric: str, **labels: object) -> float:
    """Return the value of the one series that matches."""
    (point,) = latest(collector, metric, **labels)
    return point.value


def scrape(port: int) -> dict[str, list[Any]]:
    """Return the samples of the Prometheus page by name."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    samples: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return samples
