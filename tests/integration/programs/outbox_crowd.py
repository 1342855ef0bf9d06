"""One of many processes that put letters into one outbox, with children that put their own.

Arguments: the folder, a Redis's URL, how many letters, a file that each letter's id is written to
once `put` has returned. Every twentieth letter is put by a forked child. Ends by itself; says how
many letters only were in memory, or lost.
"""

import os
import sys
import time
from pathlib import Path

import patient  # noqa: F401  (for what importing it does)

from periscope_otel import guard
from periscope_otel.dead_letter import outbox
from periscope_otel.dead_letter.codecs import encode_item
from periscope_otel.dead_letter.draft import Origin, cause_of, letter_of
from periscope_otel.dead_letter.queue import DeadLetterQueue

outbox.GRACE = 1.0
guard.set_strict(True)  # an error of our own shows
folder, url, count, log = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
origin = Origin("crowd", "urlhaus", "default")
elsewhere = 0


def put(number):
    """Put one letter; returns whether it is on the disk."""
    cause = cause_of("crowd", "ConnectTimeout", "timed out")
    letter = letter_of(origin, encode_item([os.getpid(), number]), cause)
    where = queue.put([letter])
    os.write(file, f"{letter.id}\n".encode())
    return where == "disk"


queue = DeadLetterQueue(folder, redis_url=url)
print("ready", flush=True)
sys.stdin.readline()
for number in range(count):
    if number % 20 == 7:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if put(number) else 2
            finally:
                queue.close()
                os._exit(status)
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            print(f"a child ended with {status}", file=sys.stderr)
            elsewhere += status == 2
    else:
        elsewhere += not put(number)
    time.sleep(0.002)
deadline = time.monotonic() + 60
while queue.in_memory and time.monotonic() < deadline:
    time.sleep(0.05)
print(elsewhere, queue.in_memory, queue.lost, flush=True)
sys.stdin.readline()
queue.close()
