"""Forks while verdicts are exchanged; each child opens a breaker and hears of the parent's.

Argument: the Redis's URL.
"""

import os
import sys
import time
import traceback
import warnings

from periscope_otel import guard
from periscope_otel.failure import Failure
from periscope_otel.redis_link import RedisLink
from periscope_otel.resilience.breaker import breakers
from periscope_otel.resilience.sharing.records import Records
from periscope_otel.resilience.sharing.verdicts import SharedVerdicts

URL = sys.argv[1]
FAILED = Failure("error", "ConnectionError", "failure", retryable=True)
IGNORED = Failure("cancelled", "CancelledError", "ignored", retryable=False)
CHILDREN = 20
WITHIN = 40.0

warnings.simplefilter("ignore", DeprecationWarning)  # of threads and forks, from Python 3.12 on
guard.set_strict(True)
breakers.defaults("*", open_time=0.1, jitter=0.0, probe_wait=1.0)


def until(happened):
    deadline = time.monotonic() + WITHIN
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def trip(breaker):
    for _ in range(5):
        breaker.acquire().settle(FAILED)


def probe(breaker):
    """Have one call probe, under a lease that all know of."""

    def probed():
        permit = breaker.allow()
        if permit is None:
            return False
        # Without a lease where no answer came in time: so many processes are slow.
        permit.settle(None if permit.lease else IGNORED)
        return permit.lease is not None

    until(probed)


def in_child(number):
    own = breakers.get(f"child{number}")
    trip(own)
    probe(own)
    probe(own)
    until(lambda: own.state == "closed")
    until(lambda: breakers.get("parents").state == "forced_open")
    assert verdicts.close(WITHIN)  # all is told


verdicts = SharedVerdicts(RedisLink(URL, WITHIN), breakers)
breakers.share(verdicts)
verdicts.start()
parents, busy = breakers.get("parents"), breakers.get("busy")
children = []
for number in range(CHILDREN):
    busy.force_open()
    busy.reset()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            in_child(number)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    children.append(pid)
time.sleep(0.5)
parents.force_open()
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * CHILDREN
print(f"all {CHILDREN} children shared")

link = RedisLink(URL, WITHIN)
seen = Records(link).read([f"child{number}" for number in range(CHILDREN)])
assert {one.state for one in seen} == {"closed"}
own = breakers.get("own")
trip(own)
time.sleep(0.2)
probe(own)
assert verdicts.close(WITHIN)
link.close()
print("the parent shares still")
