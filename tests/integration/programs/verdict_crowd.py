"""Calls a dependency under a shared breaker until it is told to stop; tells how that went.

Arguments: the Redis's URL, the dependency's port, the breaker's name, the open time in seconds, and
`patient` where it shall not decide alone because the machine has stopped somebody for a while.

It begins at a first line, and ends at a second one, which may name a state to be in before.
"""

import json
import socket
import sys
import threading
import time

from periscope_otel import guard
from periscope_otel.failure import Failure
from periscope_otel.redis_link import TIMEOUT, RedisLink
from periscope_otel.resilience.breaker import breakers
from periscope_otel.resilience.sharing import talk, verdicts
from periscope_otel.resilience.sharing.verdicts import SharedVerdicts
from periscope_otel.telemetry.worker import worker

URL, PORT, NAME, OPEN_TIME = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
FAILED = Failure("error", "ConnectionError", "failure", retryable=True)
PATIENT = sys.argv[5] == "patient"
PAUSE = 0.01
WITHIN = 30.0


def call():
    """Make one call; returns what went wrong."""
    try:
        with socket.create_connection(("127.0.0.1", PORT), timeout=WITHIN) as connection:
            return None if connection.recv(1) == b"+" else FAILED
    except OSError:
        return FAILED


def main():
    steps, errors, calls, longest = [], [], 0, 0.0
    # The machine may be busy.
    breakers.defaults(NAME, open_time=OPEN_TIME, probe_wait=5.0 if PATIENT else 0.5)
    if PATIENT:
        verdicts.SLOW = talk.UNANSWERED = WITHIN
    breaker = breakers.get(NAME)
    breaker.listen(
        lambda one: steps.append((time.monotonic(), one.from_state, one.to_state, one.adopted))
    )
    shared = SharedVerdicts(RedisLink(URL, WITHIN if PATIENT else TIMEOUT), breakers)
    breakers.share(shared)
    shared.start()
    print("ready", flush=True)
    sys.stdin.readline()
    stopped = threading.Event()

    def stop_when_told():
        wanted = sys.stdin.readline().strip()
        deadline = time.monotonic() + WITHIN
        while wanted and breaker.state != wanted and time.monotonic() < deadline:
            time.sleep(PAUSE)
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
    closed = shared.close(WITHIN)
    worker.finish_posted(WITHIN)
    print(json.dumps({
        "steps": steps, "errors": errors, "calls": calls, "longest": longest, "state": state,
        "closed": closed, "internal_errors": guard.counts(),
    }), flush=True)  # fmt: skip


main()
