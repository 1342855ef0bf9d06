"""The HTTP interfaces of Jaeger and Prometheus, as far as they are asked here.

Only the standard library is used, and nothing of pytest: whoever wants to know whether telemetry
arrives can import this.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

ANSWER_WITHIN = 10.0
"""Seconds for one answer."""


class UnansweredError(Exception):
    """A server gave no answer, or not the one that its interface promises; says which and why."""


def get_json(url: str, **parameters: str) -> Any:
    """Ask for a document; parameters become the query.

    Raises:
        UnansweredError: If there is no such answer.
    """
    whole = f"{url}?{urlencode(parameters)}" if parameters else url
    try:
        with urllib.request.urlopen(whole, timeout=ANSWER_WITHIN) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read(500).decode(errors="replace").strip()
        raise UnansweredError(f"{url}: {error.code} {said}") from None
    except (OSError, ValueError) as error:
        raise UnansweredError(f"{url}: {getattr(error, 'reason', error)}") from None


class Span(NamedTuple):
    """One span as Jaeger has it."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str | None
    start: int
    """Microseconds since 1970."""
    duration: int
    """Microseconds."""
    attributes: dict[str, Any]
    events: list[dict[str, Any]]
    """Each with its `event` name, its attributes and its `time` in microseconds."""
    links: list[tuple[str, str]]
    """Trace id and span id of each linked span."""
    resource: dict[str, Any]

    @property
    def status(self) -> str:
        """`ERROR`, `OK` or `UNSET`."""
        return self.attributes.get("otel.status_code", "UNSET")

    @property
    def status_description(self) -> str | None:
        """What the status says beside its code."""
        return self.attributes.get("otel.status_description")

    @property
    def kind(self) -> str:
        """`internal`, `client`, `server`, `producer` or `consumer`."""
        return self.attributes.get("span.kind", "internal")


class Jaeger:
    """Asks a Jaeger for traces.

    Args:
        url: Of its user interface, such as http://127.0.0.1:16686.

    Example:
        >>> Jaeger("http://127.0.0.1:16686").services()
        ['ingest-attack']
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def services(self) -> list[str]:
        """Return the names of the services that it has traces of."""
        return sorted(get_json(f"{self.url}/api/services")["data"] or ())

    def trace(self, trace_id: str) -> list[Span]:
        """Return the spans of a trace; none if it is not known."""
        try:
            return _spans(get_json(f"{self.url}/api/traces/{quote(trace_id)}"))
        except UnansweredError as error:
            if ": 404 " in str(error):
                return []
            raise

    def spans(self, service: str, traces: int = 1000, **parameters: str) -> list[Span]:
        """Return the spans of the newest traces in which a service takes part."""
        found = get_json(
            f"{self.url}/api/traces",
            service=service,
            limit=str(traces),
            lookback="1h",
            **parameters,
        )
        return _spans(found)

    def link(self, trace_id: str) -> str:
        """Return where a browser shows a trace."""
        return f"{self.url}/trace/{trace_id}"


def _spans(answer: dict[str, Any]) -> list[Span]:
    return [
        _span(span, trace["processes"][span["processID"]])
        for trace in answer["data"] or ()
        for span in trace["spans"]
    ]


def _span(span: dict[str, Any], process: dict[str, Any]) -> Span:
    references = [(one["refType"], one["traceID"], one["spanID"]) for one in span["references"]]
    parents = [
        reference
        for reference in references
        if reference[0] == "CHILD_OF" and reference[1] == span["traceID"]
    ]
    return Span(
        span["operationName"],
        span["traceID"],
        span["spanID"],
        parents[0][2] if parents else None,
        span["startTime"],
        span["duration"],
        _tags(span["tags"]),
        [_tags(log["fields"]) | {"time": log["timestamp"]} for log in span["logs"] or ()],
        [reference[1:] for reference in references if reference not in parents[:1]],
        {"service.name": process["serviceName"], **_tags(process["tags"])},
    )


def _tags(tags: list[dict[str, Any]] | None) -> dict[str, Any]:
    return {tag["key"]: tag["value"] for tag in tags or ()}


class Sample(NamedTuple):
    """The value of one series."""

    labels: dict[str, str]
    value: float


class Exemplar(NamedTuple):
    """One measurement of a series that leads to the span which made it."""

    series: dict[str, str]
    labels: dict[str, str]
    value: float
    time: float


class Prometheus:
    """Asks a Prometheus for samples.

    Args:
        url: Such as http://127.0.0.1:9090.

    Example:
        >>> Prometheus("http://127.0.0.1:9090").value("sum(up)")
        3.0
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def query(self, expression: str, at: float | None = None) -> list[Sample]:
        """Return the samples of an expression now, or at a Unix time.

        Raises:
            UnansweredError: If there is no answer, or the expression is wrong.
        """
        moment = {} if at is None else {"time": f"{at:.3f}"}
        found = get_json(f"{self.url}/api/v1/query", query=expression, **moment)
        return [Sample(one["metric"], float(one["value"][1])) for one in found["data"]["result"]]

    def value(self, expression: str, at: float | None = None) -> float | None:
        """Return the one value of an expression; None if there is no series."""
        found = self.query(expression, at)
        if len(found) > 1:
            raise ValueError(f"{expression} has {len(found)} series, not one")
        return found[0].value if found else None

    def sums(self, metric: str, *by: str, **labels: str) -> dict[Any, float]:
        """Return the sums of a metric by labels: a dict of values, or of tuples of them."""
        matchers = ",".join(f'{name}="{value}"' for name, value in labels.items())
        found = self.query(f"sum by ({','.join(by)}) ({metric}{{{matchers}}})")
        keys = (tuple(one.labels.get(name, "") for name in by) for one in found)
        return {
            key[0] if len(by) == 1 else key: one.value for key, one in zip(keys, found, strict=True)
        }

    def exemplars(self, selector: str, start: float, end: float) -> list[Exemplar]:
        """Return the exemplars of the series that a selector chooses, between two Unix times."""
        found = get_json(
            f"{self.url}/api/v1/query_exemplars", query=selector, start=str(start), end=str(end)
        )
        return [
            Exemplar(series["seriesLabels"], one["labels"], float(one["value"]), one["timestamp"])
            for series in found["data"]
            for one in series["exemplars"]
        ]
