"""Make traces at a steady pace until told to stop, and know which of them were accepted.

    python stream.py ENDPOINT PROTOCOL TRACES_A_SECOND

It writes `accepted N` whenever another batch was accepted, and at the end a line of JSON: which
spans were accepted, by trace, and its own account of spans and items. "Accepted" is what the
exporter returned for a batch, so what was accepted is the receiver's to keep.
"""

import json
import sys
import threading
import time

import opentelemetry.exporter.otlp.proto.grpc.trace_exporter as over_grpc
import opentelemetry.exporter.otlp.proto.http.trace_exporter as over_http
from opentelemetry.sdk.trace.export import SpanExportResult

import periscope_otel as periscope

SPANS = 10
"""Of one trace: a pull and what it stores."""

accepted = {}
told_to_stop = threading.Event()


def note_what_is_accepted(exporter):
    whole = exporter.export

    def export(self, spans):
        result = whole(self, spans)
        if result is SpanExportResult.SUCCESS:
            for span in spans:
                trace_id = f"{span.context.trace_id:032x}"
                accepted.setdefault(trace_id, []).append(f"{span.context.span_id:016x}")
            print("accepted", sum(map(len, accepted.values())), flush=True)
        return result

    exporter.export = export


def read_stdin():
    sys.stdin.readline()
    told_to_stop.set()


def pull():
    with periscope.operation("pull", feed="urlhaus") as op:
        op.received(SPANS - 1)
        for _ in range(SPANS - 1):
            with periscope.operation("store"):
                pass
            op.ingested()


note_what_is_accepted(over_grpc.OTLPSpanExporter)
note_what_is_accepted(over_http.OTLPSpanExporter)
endpoint, protocol, pace = sys.argv[1:]
periscope.configure(service_name="stream", otlp_endpoint=endpoint, otlp_protocol=protocol)
threading.Thread(target=read_stdin, daemon=True).start()
pulls, began = 0, time.monotonic()
while not told_to_stop.is_set():
    pull()
    pulls += 1
    told_to_stop.wait(max(0.0, began + pulls / float(pace) - time.monotonic()))
report = periscope.shutdown()
print(
    json.dumps(
        {
            "accepted": accepted,
            "pulls": pulls,
            "made": pulls * SPANS,
            "items": pulls * (SPANS - 1),
            "signals": {one.signal: one._asdict() for one in report.signals},
        }
    ),
    flush=True,
)
