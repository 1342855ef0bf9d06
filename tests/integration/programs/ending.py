"""Do some operations, say when they are done, then end as told."""

import sys
import threading
import time

import periscope_otel as periscope

WORK = 40


@periscope.monitored("work", feed="urlhaus")
def work():
    periscope.current_operation().received(2)
    periscope.current_operation().ingested(2)


def beat(done, number):
    while True:
        with periscope.operation("beat"):
            time.sleep(0.003)
        done[number] += 1


how = sys.argv[1]
periscope.configure()
for _ in range(WORK):
    work()
done = [0, 0, 0]
if how == "daemons":
    for number in range(len(done)):
        threading.Thread(target=beat, args=(done, number), daemon=True).start()
    while min(done) < 20:
        time.sleep(0.001)
print(sum(done), flush=True)
print(time.monotonic(), flush=True)
if how == "exit":
    sys.exit(3)
if how == "exception":
    raise LookupError("no such feed")
if how == "signal":
    sys.stdin.readline()
