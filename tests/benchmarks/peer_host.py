"""Our call and one peer's, each in its recommended set-up; served to peers.py.

Every subject does the same nothing with the same small argument, and exports to nowhere in
batches. What a peer does by default it does here too, such as recording arguments.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from harness import Sample, Subject
from hosts import serve
from subjects import NullExporter, Pipeline, drain_ours, telemetry_of, use

from periscope_otel import monitored

if TYPE_CHECKING:
    from collections.abc import Callable

URL = "https://urlhaus.abuse.ch/downloads/csv/"


def ours() -> dict[str, Subject]:
    """Our call: span and metrics with exemplar."""
    pipeline = Pipeline()

    @monitored("fetch", feed="urlhaus", attributes={"circuit_breaker.name": "urlhaus.abuse.ch"})
    def function(url: str) -> None:
        """Do nothing, monitored."""

    switch = use(telemetry_of(pipeline))
    return {"ours": Subject(lambda: function(URL), drain_ours(pipeline), switch)}


def logfire() -> dict[str, Subject]:
    """logfire's `@instrument`: a span with the arguments, which can be switched off."""
    import logfire
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    processor = BatchSpanProcessor(NullExporter())
    logfire.configure(send_to_logfire=False, console=False, additional_span_processors=[processor])

    @logfire.instrument("store {url=}")
    def function(url: str) -> None:
        """Do nothing, instrumented."""

    @logfire.instrument("store", extract_args=False)
    def without_arguments(url: str) -> None:
        """Do nothing, instrumented."""

    return {
        "logfire": Subject(lambda: function(URL), processor.force_flush),
        "logfire, extract_args=False": Subject(
            lambda: without_arguments(URL), processor.force_flush
        ),
    }


def traceloop() -> dict[str, Subject]:
    """traceloop's `@task`: a span with arguments and result."""
    from opentelemetry import trace
    from traceloop.sdk import Traceloop
    from traceloop.sdk.decorators import task

    Traceloop.init(
        app_name="benchmark",
        exporter=NullExporter(),
        disable_batch=False,
        telemetry_enabled=False,
    )

    @task(name="store")
    def function(url: str) -> None:
        """Do nothing, instrumented."""

    provider = trace.get_tracer_provider()
    return {"traceloop": Subject(lambda: function(URL), provider.force_flush)}


def autometrics(tracker: str) -> dict[str, Subject]:
    """`@autometrics` with one of its trackers; a scrape at the end of each round."""
    from autometrics import autometrics as decorate
    from autometrics import init
    from prometheus_client import REGISTRY, generate_latest

    init(tracker=tracker, service_name="benchmark")

    @decorate
    def function(url: str) -> None:
        """Do nothing, instrumented."""

    return {"autometrics": Subject(lambda: function(URL), lambda: generate_latest(REGISTRY))}


PEERS: dict[str, Callable[[], dict[str, Subject]]] = {
    "logfire": logfire,
    "traceloop": traceloop,
    "autometrics": lambda: autometrics("opentelemetry"),
    "autometrics-prometheus": lambda: autometrics("prometheus"),
}


def subjects() -> dict[str, Callable[[int], Sample]]:
    """Return ours and those of the peer that the command line names."""
    # Ours first: a peer sets global providers, which ours, having its own, must not depend on.
    made = {**ours(), **PEERS[sys.argv[1]]()}
    return {name: subject.measure for name, subject in made.items()}


if __name__ == "__main__":
    serve(subjects)
