"""Kill workers with `journal=True` at random moments; then see that every payload is there.

Each worker is forked from this program before anything is configured, works in one of five phases,
and is killed by SIGKILL a random time after it began. Arguments: the folder, a Redis's URL or `-`,
the seed, how many workers, how many at once. Writes one JSON object: what was counted.

Every payload is noted in a file, by one write, when its attempt begins and when it is ingested.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import patient
import redis  # noqa: F401  (imported once, for all workers)

import periscope_otel as periscope
from periscope_otel.dead_letter import Filter, StoreError, outbox, queue, sqlite_store  # noqa: F401
from periscope_otel.dead_letter.codecs import decode_plain
from periscope_otel.dead_letter.letter import STATES
from periscope_otel.dead_letter.store import open_store
from periscope_otel.replay import replay

PHASES = ("before the attempt", "in the attempt", "in put", "in forward", "in replay")
LONGEST = 0.06
"""Seconds that a worker lives at most once it has begun."""
LEASE = 1.0
PATIENCE = 90.0

queue.LOOK = 0.05  # dead workers are looked for often
outbox.GRACE = 0.5

folder, redis_url, seed = sys.argv[1:4]
count, at_once = map(int, sys.argv[4:6])
log = Path(folder) / "log"
data = Path(folder) / "data"
url = f"sqlite:///{data / queue.FILE}" if redis_url == "-" else redis_url
file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
everything = Filter(states=STATES)
phase = ""


def note(*words):
    """Append a line."""
    os.write(file, (" ".join(words) + "\n").encode())


@periscope.monitored("work", feed="urlhaus", dead_letter=True, journal=True)
def work(payload: str) -> None:
    """Ingest a payload, or fail, as the phase has it."""
    note("attempt", payload)
    if phase in ("in put", "in forward"):
        raise ConnectionError("away")
    if phase == "in the attempt":
        time.sleep(0.002)
    if phase == "in replay":
        time.sleep(0.001)
        if random.random() < 0.3:
            raise TimeoutError("still away")
    note("ingested", payload, str(periscope.current_operation().idempotency_key))


def configure():
    """Use the folder, and the Redis if there is one."""
    periscope.configure(
        data_dir=data, redis_url=None if redis_url == "-" else redis_url, dead_letters=True
    )


def live(number):
    """Be a worker, until somebody kills it."""
    global phase
    random.seed(f"{seed} {number} worker")
    configure()
    phase = PHASES[number % len(PHASES)]
    os.write(1, b"\n")  # it has begun
    if phase == "in replay":
        while True:
            try:
                with open_store(url) as store:
                    while True:
                        replay(store, lease=LEASE, concurrency=2)
                        time.sleep(0.001)
            except StoreError as error:  # held by others for too long
                print(error, file=sys.stderr)
    for turn in itertools.count():
        with suppress(ConnectionError):
            work(f"{number}-{turn}")
        if phase == "in forward" and turn % 50 == 49:
            time.sleep(0.01)


def fork(number):
    """Start a worker; returns its process id and the pipe on which it says that it has begun."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.dup2(writing, 1)
        try:
            live(number)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    return pid, reading


def kill_all():
    """Start and kill all workers; returns how each phase's ended."""
    ended = Counter()
    numbers, alive = iter(range(count)), {}
    randomly = random.Random(seed)
    while True:
        for number in itertools.islice(numbers, at_once - len(alive)):
            pid, reading = fork(number)
            os.read(reading, 1)
            os.close(reading)
            alive[pid] = (number, time.monotonic() + randomly.uniform(0, LONGEST))
        if not alive:
            return ended
        pid, (number, due) = min(alive.items(), key=lambda one: one[1][1])
        time.sleep(max(0.0, due - time.monotonic()))
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ended[f"{PHASES[number % len(PHASES)]}: {status}"] += 1
        del alive[pid]


def noted():
    """Return the payloads that were attempted, and the keys of those that were ingested."""
    attempted, ingested = set(), defaultdict(list)
    for line in log.read_text().splitlines():
        what, payload, *key = line.split()
        if what == "attempt":
            attempted.add(payload)
        else:
            ingested[payload] += key
    return attempted, ingested


def letters_of(store):
    """Return the payloads that are letters, with their keys."""
    found, cursor = defaultdict(set), None
    while True:
        page = store.list(everything, cursor=cursor, limit=1000)
        for letter in page.letters:
            found[decode_plain(letter.payload())["payload"]].add(letter.key)
        cursor = page.cursor
        if cursor is None:
            return found


def wait_until_all_are_there(store):
    """Return the payloads that are neither ingested nor letters, once there is none or too late."""
    deadline = time.monotonic() + PATIENCE
    while True:
        attempted, ingested = noted()
        letters = letters_of(store)
        missing = attempted - ingested.keys() - letters.keys()
        if not missing or time.monotonic() > deadline:
            return attempted, ingested, letters, missing
        time.sleep(0.2)


def heal(store):
    """Replay until there is no letter left."""
    deadline = time.monotonic() + PATIENCE
    while store.stats().total and time.monotonic() < deadline:
        store.unpark(Filter(states=("parked",)))
        replay(store, lease=LEASE, concurrency=2)
        time.sleep(0.1)


began = time.monotonic()
ended = kill_all()
killed_in = time.monotonic() - began
configure()
with open_store(url, **({"busy": patient.PATIENT} if redis_url == "-" else {})) as store:
    attempted, ingested, letters, missing = wait_until_all_are_there(store)
    abandoned = len(store.list(Filter(states=STATES, error_type="abandoned"), limit=1000).letters)
    heal(store)
    left = store.stats().total
periscope.shutdown()
_, at_last = noted()
print(
    json.dumps(
        {
            "seconds of killing": round(killed_in, 1),
            "ended": dict(sorted(ended.items())),
            "payloads": len(attempted),
            "ingested": len(ingested),
            "letters": len(letters),
            "abandoned": abandoned,
            "lost": sorted(missing),
            "left": left,
            "never ingested": sorted(attempted - at_last.keys()),
            "ingested twice": sum(len(keys) > 1 for keys in at_last.values()),
            "under two keys": sorted(one for one, keys in at_last.items() if len(set(keys)) > 1),
        }
    )
)
