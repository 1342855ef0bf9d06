"""Configure from the environment alone, work, and tell what touched the network."""

import json
import os
import sys

touched = []


def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind"):
        touched.append(event)


sys.addaudithook(watch)

import periscope_otel as periscope  # noqa: E402  (the hook comes first)

arguments = json.loads(os.environ.get("ARGUMENTS", "{}"))
periscope.configure(**arguments)
for _ in range(7):
    with periscope.operation("work", feed="urlhaus") as operation:
        operation.received(2)
        operation.ingested(2)
report = periscope.shutdown()
loaded = [
    name for name in sys.modules if name == "grpc" or name.startswith("opentelemetry.exporter.otlp")
]
print(json.dumps({"pid": os.getpid(), "touched": touched, "loaded": loaded}), flush=True)
