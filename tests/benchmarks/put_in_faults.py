"""What a `put` costs while something happens to Redis, compared with before it.

In each round, and for each of the things that can happen, letters are put with a Redis that is
well, and then in the middle of it; the figures are the ratios of the 99th percentiles, and of the
medians. Exits with 1 where a letter is lost.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from harness import arguments, here, spread, start_report

sys.path.insert(0, str(here().parent / "integration"))

from redis_faults import FAULTS
from redis_servers import RedisServer
from store_conformance import everything, some

from periscope_otel.dead_letter import StoreError, forwarder, open_store, outbox
from periscope_otel.dead_letter.queue import DeadLetterQueue

PATIENCE = 60.0
PAUSE = 0.001


def percentiles(queue: DeadLetterQueue, count: int, ids: set[str]) -> tuple[float, float]:
    """Put letters; return the median and the 99th percentile of a put's seconds."""
    letters, took = some(count, error_stack="x" * 1500), []
    for letter in letters:
        began = time.perf_counter()
        queue.put([letter])
        took.append(time.perf_counter() - began)
        time.sleep(PAUSE)
    ids.update(letter.id for letter in letters)
    found = statistics.quantiles(took, n=100)
    return found[49], found[98]


def one(fault: str, calls: int) -> tuple[float, float, int]:
    """Return the ratios of the 99th percentiles and medians, and how many letters are missing."""
    ids: set[str] = set()
    outbox.GRACE = 60.0
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer("redis", Path(folder) / "redis") as server,
        DeadLetterQueue(Path(folder) / "data", redis_url=server.url) as queue,
        open_store(server.url) as store,
    ):
        percentiles(queue, 100, ids)
        before = percentiles(queue, calls, ids)
        with FAULTS[fault](server):
            during = percentiles(queue, calls, ids)
        outbox.GRACE = 0.5  # what Redis has forgotten is looked for at once
        deadline = time.monotonic() + PATIENCE
        missing = ids
        while missing and time.monotonic() < deadline:
            time.sleep(0.2)
            try:
                missing = ids - {letter.id for letter in everything(store, limit=1000)}
            except StoreError:
                continue
    return during[1] / before[1], during[0] / before[0], len(missing)


def main() -> None:
    """Measure, and say what was found."""
    forwarder.LONGEST_WAIT = 0.5
    options = arguments(__doc__, rounds=5, calls=1000)
    report = start_report(__doc__, options)
    lost = 0
    found: dict[str, list[tuple[float, float, int]]] = {fault: [] for fault in FAULTS}
    for _ in range(options.rounds):
        for fault, rounds in found.items():
            rounds.append(one(fault, options.calls))
    for fault, rounds in found.items():
        lost += sum(missing for _, _, missing in rounds)
        report.measures.append(spread(f"{fault}: put, p99", [one[0] for one in rounds], 2.0))
        report.measures.append(spread(f"{fault}: put, median", [one[1] for one in rounds]))
    report.notes.append(f"{lost} letters were lost")
    report.publish(options.json)
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
