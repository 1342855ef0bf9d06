"""Have client spans of httpx drive a breaker, as configure() wires it."""

import contextlib
import json
import logging
import sys

import httpx
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

import periscope_otel as periscope
from periscope_otel.resilience.breaker import breakers

arguments = json.loads(sys.argv[1])
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
if arguments.pop("own_provider", False):
    arguments["tracer_provider"] = TracerProvider(sampler=ParentBased(ALWAYS_OFF))
runtime = periscope.configure(
    exit_report="never",
    breakers={"localhost": periscope.BreakerPolicy(consecutive_failures=3)},
    **arguments,
)
HTTPXClientInstrumentor().instrument(tracer_provider=runtime.tracer_provider)
with httpx.Client() as client:
    for _ in range(3):
        with contextlib.suppress(httpx.ConnectError):
            client.get("http://localhost:9/", timeout=60)  # nothing listens on the discard port
found = breakers.find("localhost")
state = None if found is None else found.state
sharing = found is not None and found.sharing is not None
runtime.shutdown(30)  # the machine may be busy
after = found is not None and found.sharing is not None
# In one piece: what is logged in the background must not come in between.
sys.stdout.write(f"state {state}\nsharing {sharing}\nafter {after}\n")
