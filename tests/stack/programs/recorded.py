"""Run a script, and write down every span as the program itself has it.

python recorded.py SPANS.json SCRIPT [ARGUMENTS...]
"""

import json
import runpy
import sys
from pathlib import Path

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import periscope_otel as periscope

ended = InMemorySpanExporter()
configure = periscope.configure


def configure_and_record(**given):
    runtime = configure(**given)
    runtime.tracer_provider.add_span_processor(SimpleSpanProcessor(ended))
    return runtime


def described(span):
    return {
        "name": span.name,
        "trace_id": f"{span.context.trace_id:032x}",
        "span_id": f"{span.context.span_id:016x}",
        "parent_id": f"{span.parent.span_id:016x}" if span.parent else None,
        "kind": span.kind.name.lower(),
        "start": span.start_time,
        "end": span.end_time,
        "status": span.status.status_code.name,
        "status_description": span.status.description,
        "attributes": dict(span.attributes),
        "events": [
            {"name": one.name, "time": one.timestamp, "attributes": dict(one.attributes)}
            for one in span.events
        ],
        "links": [
            [f"{one.context.trace_id:032x}", f"{one.context.span_id:016x}"] for one in span.links
        ],
        "resource": dict(span.resource.attributes),
        "scope": [span.instrumentation_scope.name, span.instrumentation_scope.version],
    }


periscope.configure = configure_and_record
written, script, *arguments = sys.argv[1:]
sys.argv = [script, *arguments]
sys.path.insert(0, str(Path(script).parent))
try:
    runpy.run_path(script, run_name="__main__")
finally:
    periscope.shutdown()
    Path(written).write_text(json.dumps([described(span) for span in ended.get_finished_spans()]))
