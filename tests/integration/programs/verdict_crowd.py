"""Calls a dependency under a shared breaker until it is told to stop; tells how that went.

Arguments: the Redis's URL, the dependency's port, the breaker's name, the open time in seconds.
"""

import json
import socket
import sys
import threading
import time

from periscope_otel import guard
from periscope_otel.failure import Failure
from periscope_otel.redis_link import RedisLink
from periscope_otel.resilience.breaker import breakers
from periscope_otel.resilience.sharing.verdicts import SharedVerdicts
from periscope_otel.telemetry.worker import worker

URL, PORT, NAME, OPEN_TIME = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
FAILED = Failure("error", "ConnectionError", "failure", retryable=True)
PAUSE = 0.01


def call():
    """Make one call; returns what went wrong."""
    try:
        with socket.create_connection(("127.0.0.1", PORT), timeout=2.0) as connection:
            return None if connection.recv(1) == b"+" else FAILED
    except OSError:
        return FAILED


def main():
    steps, errors, calls, longest = [], [], 0, 0.0
    breakers.defaults(NAME, open_time=OPEN_TIME, probe_wait=0.5)  # the machine may be busy
    breaker = breakers.get(NAME)
    breaker.listen(
        lambda one: steps.append((time.monotonic(), one.from_state, one.to_state, one.adopted))
    )
    verdicts = SharedVerdicts(RedisLink(URL), breakers)
    breakers.share(verdicts)
    verdicts.start()
    print("ready", flush=True)
    sys.stdin.readline()
    stopped = threading.Event()

    def stop_when_told():
        sys.stdin.readline()
        stopped.set()

    threading.Thread(target=stop_when_told, daemon=True).start()
    while not stopped.is_set():
        try:
            began = time.perf_counter()
            permit = breaker.allow()
            longest = max(longest, time.perf_counter() - began)
            if permit is not None:
                calls += 1
                permit.settle(call())
        except Exception as error:
            errors.append(repr(error))
        time.sleep(PAUSE)
    state = breaker.state
    closed = verdicts.close(2.0)
    worker.finish_posted(2.0)
    print(json.dumps({
        "steps": steps, "errors": errors, "calls": calls, "longest": longest, "state": state,
        "closed": closed, "internal_errors": guard.counts(),
    }), flush=True)  # fmt: skip


main()
