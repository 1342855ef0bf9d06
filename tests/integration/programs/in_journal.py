"""A journalled call of a payload, which ends as standard input says."""

import contextlib
import os
import sys

import patient  # noqa: F401  (for what importing it does)

import periscope_otel as periscope


@periscope.monitored("store", feed="urlhaus", dead_letter=True, journal=True)
def store(url: str) -> None:
    print("begun", flush=True)
    word = sys.stdin.readline().strip()
    if word == "fail":
        raise ValueError("as told")
    if word == "fork":
        pid = os.fork()
        if pid == 0:
            print("forked", flush=True)
            sys.stdin.readline()
            os._exit(0)
        os.waitpid(pid, 0)


periscope.configure(data_dir=sys.argv[1])
with contextlib.suppress(ValueError):
    store(sys.argv[2])
print("ended", flush=True)
sys.stdin.readline()
