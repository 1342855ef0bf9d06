"""Install a SIGTERM handler of the application's own, before or after configure()."""

import signal
import sys

import periscope_otel as periscope


def on_sigterm(number, frame):
    print("own handler", flush=True)
    sys.exit(7)


HANDLERS = {"function": on_sigterm, "ignore": signal.SIG_IGN}

when, handler = sys.argv[1:]
if when == "before":
    signal.signal(signal.SIGTERM, HANDLERS[handler])
periscope.configure()
if when == "after":
    signal.signal(signal.SIGTERM, HANDLERS[handler])
with periscope.operation("work"):
    pass
print("ready", flush=True)
sys.stdin.readline()
