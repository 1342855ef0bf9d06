"""End an operation in every way that there is, with everything that a span can carry."""

import asyncio
import sys

from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags

import periscope_otel as periscope

LINKED = SpanContext(0xABC << 100, 0xDEF, is_remote=True, trace_flags=TraceFlags(1))


class Answer:
    status_code = 503


@periscope.monitored(
    "fetch",
    feed=lambda args: args["feed"],
    kind=SpanKind.CLIENT,
    breaker="urlhaus.abuse.ch",
    attributes={"a.text": "bücher.example ☂", "a.flag": True, "a.number": 7, "a.share": 0.25},
    result=lambda answer: answer.status_code >= 400,
)
def fetch(feed, answer):
    if isinstance(answer, BaseException):
        raise answer
    return answer


@periscope.monitored("pull")
def pull(count):
    yield from range(count)


def end_in_every_way():
    with periscope.operation("ingest", feed="urlhaus") as op:
        op.received(5)
        op.converted(4)
        op.ingested(2)
        op.skipped(1, reason="known")
        op.failed({"id": "indicator--1"}, ValueError("no pattern"))
        op.set_attribute("stix.bundle.id", "bundle--1")
        op.set_attribute("a.list", ["one", "two"])
        with periscope.operation("store"), periscope.operation("write", attributes={"rows": 3}):
            pass
        list(pull(3))
    with periscope.operation("replay", links=[Link(LINKED)]):
        pass
    fetch("misp", Answer())
    Answer.status_code = 200
    fetch("misp", Answer())
    for error in (
        ConnectionError("https://user:secret@misp.example/events refused"),
        TimeoutError("no answer within 5 s"),
        asyncio.CancelledError(),
        ValueError("x" * 10_000),
    ):
        try:
            fetch("misp", error)
        except BaseException as raised:
            print(type(raised).__name__)


periscope.configure(service_name="outcomes", otlp_endpoint=sys.argv[1], otlp_protocol=sys.argv[2])
end_in_every_way()
periscope.shutdown()
