"""Replay a store's letters until there are none; say what became of each.

Arguments: the store's URL, a file for what the handlers do, the concurrency, the lease, and the
seconds that a handler takes. Begins when a line arrives. Handlers append `begin KEY PID` and
`end KEY PID` to the file, each by one write, so that the order is that in which it happened. The
owner's name of its claims begins with its PID.
"""

import os
import sys
import time

import patient

from periscope_otel import current_operation, monitored
from periscope_otel.dead_letter import Filter, open_store
from periscope_otel.dead_letter.letter import STATES
from periscope_otel.replay import replay, run

url, log = sys.argv[1:3]
concurrency, lease, seconds = int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5])
file = os.open(log, os.O_WRONLY | os.O_APPEND)


def note(what):
    """Append a line."""
    os.write(file, f"{what} {current_operation().idempotency_key} {os.getpid()}\n".encode())


@monitored("replayer", feed="urlhaus", dead_letter=True)
def ingest(value):
    """Take a while."""
    note("begin")
    time.sleep(seconds)
    note("end")


def tell(replayed):
    """Say what became of a letter."""
    sys.stdout.write(f"{replayed.outcome} {replayed.letter.id} {replayed.detail}\n")


new_owner = run.new_owner
run.new_owner = lambda: f"{os.getpid()} {new_owner()}"
print("ready")
sys.stdin.readline()
with open_store(url, **({"busy": patient.PATIENT} if url.startswith("sqlite") else {})) as store:
    while store.list(Filter(states=STATES), limit=1).letters:
        replay(store, concurrency=concurrency, lease=lease, on_replayed=tell)
        time.sleep(0.05)
