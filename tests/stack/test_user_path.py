"""Decorated code to Collector to Jaeger and Prometheus: what the program did is what they show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from main_job import EXAMPLES, account, environment, reasons
from waiting import until, until_equal

if TYPE_CHECKING:
    from apis import Span

    from conftest import Stack

README = Path(__file__).parents[2] / "README.md"
PROGRAMS = Path(__file__).parent / "programs"
CALLS = "threat_ingest_operation_duration_seconds_count"
SETTLED = "threat_ingest_items_settled_total"


class Run(NamedTuple):
    """A program that has run: what it said, and the spans that it made, as it had them itself."""

    output: str
    spans: list[dict[str, Any]]

    @property
    def instance(self) -> str:
        """Its `service.instance.id`, which is `instance` in Prometheus."""
        return self.spans[0]["resource"]["service.instance.id"]

    @property
    def trace_ids(self) -> set[str]:
        """The traces of its spans."""
        return {span["trace_id"] for span in self.spans}


def run(folder: Path, script: Path, *arguments: str, **variables: str) -> Run:
    """Run a script to its end, recorded."""
    spans = folder / "spans.json"
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "recorded.py"), str(spans), str(script), *arguments],
        env=environment(**{"PERISCOPE_SHUTDOWN_TIMEOUT": "15"} | variables),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing was left" in done.stderr, done.stderr
    return Run(done.stdout, json.loads(spans.read_text()))


@pytest.fixture(scope="module")
def job(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The main job, shipped to the Collector."""
    folder = tmp_path_factory.mktemp("job")
    script = EXAMPLES / "ingest_attack.py"
    return run(folder, script, "--otlp", stack.collector.http)


@pytest.fixture(scope="module")
def outcomes(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A program whose operations end in every way."""
    script = PROGRAMS / "outcomes.py"
    return run(tmp_path_factory.mktemp("outcomes"), script, stack.collector.grpc, "grpc")


def in_jaeger(stack: Stack, done: Run) -> dict[str, Span]:
    """Return a run's spans by id, as soon as Jaeger has them all."""

    def look() -> dict[str, Span]:
        found = (stack.jaeger.api.trace(trace_id) for trace_id in done.trace_ids)
        return {span.span_id: span for trace in found for span in trace}

    return until(look, lambda found: len(found) >= len(done.spans))


# Jaeger.


@pytest.mark.parametrize("program", ["job", "outcomes"])
def test_jaeger_has_every_span_as_it_was_made(
    stack: Stack, program: str, request: pytest.FixtureRequest
) -> None:
    """Each operation's span is there once, with its parent, attributes, status, events, links."""
    done: Run = request.getfixturevalue(program)
    found = in_jaeger(stack, done)
    assert found.keys() == {span["span_id"] for span in done.spans}
    for made in done.spans:
        assert shown(found[made["span_id"]]) == expected(made), made["name"]


def shown(span: Span) -> dict[str, Any]:
    """Return what Jaeger says of a span, without what it adds in its own words."""
    return {
        "name": span.name,
        "trace_id": span.trace_id,
        "parent_id": span.parent_id,
        "kind": span.kind,
        "start": span.start,
        "duration": span.duration,
        "status": (span.status, span.status_description),
        "attributes": {
            name: value
            for name, value in span.attributes.items()
            if not name.startswith("otel.") and name not in ("span.kind", "error")
        },
        "scope": [span.attributes["otel.scope.name"], span.attributes["otel.scope.version"]],
        "events": span.events,
        "links": span.links,
        "resource": span.resource,
    }


def expected(made: dict[str, Any]) -> dict[str, Any]:
    """Return what Jaeger should say of a span that a program has made."""
    return {
        "name": made["name"],
        "trace_id": made["trace_id"],
        "parent_id": made["parent_id"],
        "kind": made["kind"],
        "start": made["start"] // 1000,
        "duration": (made["end"] - made["start"]) // 1000,
        "status": (made["status"], made["status_description"]),
        "attributes": {name: as_tag(value) for name, value in made["attributes"].items()},
        "scope": made["scope"],
        "events": [
            {"event": one["name"], "time": one["time"] // 1000, **one["attributes"]}
            for one in made["events"]
        ],
        "links": [tuple(link) for link in made["links"]],
        "resource": made["resource"],
    }


def as_tag(value: Any) -> Any:
    """Return a value as Jaeger holds it: lists as JSON."""
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else value


def test_the_main_job_is_one_trace(stack: Stack, job: Run) -> None:
    """The `ingest` operation is the root, and all others are called by it."""
    found = in_jaeger(stack, job).values()
    (root,) = (span for span in found if span.parent_id is None)
    assert root.name == "ingest"
    assert {span.parent_id for span in found if span is not root} == {root.span_id}
    assert "ingest-attack" in stack.jaeger.api.services()


def test_a_failure_is_found_by_its_tag(stack: Stack, outcomes: Run) -> None:
    """A search for `error.type` finds the trace that failed so, and no secret is in it."""
    in_jaeger(stack, outcomes)
    tagged = stack.jaeger.api.spans("outcomes", tags='{"error.type":"ConnectionError"}')
    found = [span for span in tagged if span.trace_id in outcomes.trace_ids]
    assert [span.attributes["error.type"] for span in found] == ["ConnectionError"]
    assert found[0].status == "ERROR"
    assert "secret" not in repr(found)
    assert "misp.example" in repr(found)


# Prometheus.


def test_prometheus_counts_every_item_of_the_main_job(stack: Stack, job: Run) -> None:
    """Items received and settled, by outcome and by reason, are those of the printed account."""
    received, ingested, skipped, failed, unaccounted = account(job.output)
    sums, own = stack.prometheus.api.sums, {"instance": job.instance}
    settled = {
        "ingested": ingested,
        "skipped": skipped,
        "failed": failed,
        "unaccounted": unaccounted,
    }
    until_equal(
        {outcome: count for outcome, count in settled.items() if count},
        lambda: sums(SETTLED, "threat_ingest_item_outcome", **own),
    )
    skips = sums(SETTLED, "threat_ingest_skip_reason", **own, threat_ingest_item_outcome="skipped")
    assert skips == reasons(job.output)
    assert sums("threat_ingest_items_received_total", "job", **own) == {"ingest-attack": received}


def test_prometheus_counts_every_call_of_the_main_job(stack: Stack, job: Run) -> None:
    """Calls by operation are those of the printed summary."""
    told = dict(re.findall(r"^ *(\w+) +ics-attack +(\d+) +\d+ ok ", job.output, re.MULTILINE))
    assert set(told) == {"ingest", "fetch", "parse", "convert", "store"}
    until_equal(
        {name: int(count) for name, count in told.items()},
        lambda: stack.prometheus.api.sums(
            CALLS, "threat_ingest_operation_name", instance=job.instance
        ),
    )


def test_prometheus_counts_every_outcome(stack: Stack, outcomes: Run) -> None:
    """Calls by operation, outcome and error type are those of the spans."""
    labels = ("threat.ingest.operation.name", "threat.feed.name", "threat.ingest.outcome",
              "error.type")  # fmt: skip
    made: dict[tuple[str, ...], int] = {}
    for span in outcomes.spans:
        key = tuple(span["attributes"].get(label, "") for label in labels)
        made[key] = made.get(key, 0) + 1
    by = [label.replace(".", "_") for label in labels]
    until_equal(made, lambda: stack.prometheus.api.sums(CALLS, *by, instance=outcomes.instance))


@pytest.mark.parametrize(
    ("metric", "by", "grown"),
    [
        (SETTLED, "threat_ingest_item_outcome", {"ingested": 1784, "skipped": 42}),
        (CALLS, "threat_ingest_operation_name",
         {"ingest": 1, "fetch": 1, "parse": 1, "convert": 10, "store": 10}),
    ],
)  # fmt: skip
def test_a_job_that_exported_once_has_grown_from_nothing(
    stack: Stack, job: Run, metric: str, by: str, grown: dict[str, int]
) -> None:
    """A series begins with 0, so its increase is all that a job did which exported only once."""
    own = f'{metric}{{instance="{job.instance}"}}'

    def look() -> dict[str, float]:
        found = stack.prometheus.api.query(f"sum by ({by}) (increase({own}[5m] anchored))")
        return {one.labels[by]: one.value for one in found}

    until_equal(grown, look)


def test_an_exemplar_leads_to_its_trace(stack: Stack, job: Run) -> None:
    """The exemplars of the duration histogram name traces and spans that Jaeger has."""
    spans = in_jaeger(stack, job)
    selector = f'threat_ingest_operation_duration_seconds_bucket{{instance="{job.instance}"}}'
    begin = min(span["start"] for span in job.spans) / 1e9

    def look() -> list[tuple[str, str, str]]:
        found = stack.prometheus.api.exemplars(selector, begin - 60, begin + 600)
        return [
            (one.labels["trace_id"], one.labels["span_id"],
             one.series["threat_ingest_operation_name"])
            for one in found
        ]  # fmt: skip

    found = until(look)
    assert {name for _, _, name in found} >= {"ingest", "convert"}
    for trace_id, span_id, name in found:
        assert (spans[span_id].trace_id, spans[span_id].name) == (trace_id, name)


def test_the_readme_asks_what_prometheus_can_answer(stack: Stack, job: Run) -> None:
    """Each query of the README finds something once the main job has run."""
    section = README.read_text().partition("## See it in Jaeger and Prometheus")[2]
    queries = re.findall(r"\| `([^`]+)` \|$", section.partition("\n## ")[0], re.MULTILINE)
    assert len(queries) == 5
    for query in queries:
        found = until(lambda query=query: stack.prometheus.api.query(query))
        assert any(one.value > 0 for one in found), query


def test_prometheus_knows_what_the_metrics_are_about(stack: Stack, job: Run) -> None:
    """Service and host are labels of each series, all else of the resource is in target_info."""
    (one,) = until(
        lambda: stack.prometheus.api.query(
            f'threat_ingest_items_received_total{{instance="{job.instance}"}}'
        )
    )
    resource = job.spans[0]["resource"]
    assert one.labels["service_name"] == one.labels["job"] == "ingest-attack"
    assert one.labels["host_name"] == resource["host.name"]
    (info,) = stack.prometheus.api.query(f'target_info{{instance="{job.instance}"}}')
    assert info.labels["process_pid"] == str(resource["process.pid"])
