"""Serve /metrics at an address and do what standard input says, line by line."""

import json
import os
import sys

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import periscope_otel as periscope

children = []


def say(*words):
    print(*words, flush=True)


def work(count):
    for _ in range(int(count)):
        with periscope.operation("work", feed="urlhaus") as operation:
            operation.received(2)
            operation.ingested(2)
    say("worked")


def fork():
    """Leave a child that does some work and then lives until it is told to end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        with periscope.operation("in child"):
            pass
        say(os.getpid())
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    children.append((pid, writing))


def end_children():
    for pid, writing in children:
        os.close(writing)
        os.waitpid(pid, 0)
    say("ended")


def shutdown():
    periscope.shutdown()
    say("shut down")


def configure(text):
    try:
        runtime = periscope.configure(**json.loads(text))
    except Exception as error:
        say(type(error).__name__, error)
    else:
        say(runtime.server.port)


if sys.argv[1] == "given":
    meters = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
    say(periscope.configure(meter_provider=meters, prometheus=sys.argv[2]).server.port)
elif sys.argv[1] == "built":
    configure(json.dumps({"prometheus": sys.argv[2]}))
for line in sys.stdin:
    command, *arguments = line.split(maxsplit=1)
    globals()[command](*(one.strip() for one in arguments))
