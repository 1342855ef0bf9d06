"""Leave operations open in every way there is, and end as told."""

import sys
import threading
import types

import periscope_otel as periscope


@periscope.monitored("generator")
def items():
    yield 1
    yield 2


@types.coroutine
def suspension():
    yield


@periscope.monitored("coroutine")
async def fetch():
    await suspension()


def hold(ready):
    with periscope.operation("thread"):
        ready.set()
        threading.Event().wait()


periscope.configure()
block = periscope.operation("block")
block.__enter__()
nested = periscope.operation("nested")
nested.__enter__()
generator = items()
next(generator)
coroutine = fetch()
coroutine.send(None)
ready = threading.Event()
threading.Thread(target=hold, args=(ready,), daemon=True).start()
ready.wait()
print("open", flush=True)
if sys.argv[1] == "exit":
    sys.exit(3)
if sys.argv[1] == "signal":
    sys.stdin.readline()
