"""What dead letters cost, as ratios.

put ÷ XADD
    Putting one letter of a 2 KiB payload (made before), with a Redis behind the outbox and without
    one, divided by one bare XADD of redis-py with the same bytes to that Redis, on this machine.
    Each round makes `--calls` of each; the ratio is of their medians, and of their means.
recording ÷ RQ, dramatiq
    Everything from the exception to the letter on disk, divided by what a peer's worker does to
    record that a job has failed for good (letter_peer_host.py), means of the same round.
draining
    Letters that wait in an outbox, forwarded; the rate divided by that of storing one letter a
    round trip in the same Redis.
1,000,000 letters
    One put, one page, one claim and its release, in a store that holds that many (`--many`),
    divided by the same in one that holds 1,000; both are there at the same time and take turns.
memory
    What Redis uses for one letter, in excess of 1.25 times the letter as it is encoded.

A real redis-server is started for it. Its figures are wall clock, since what is compared waits for
disk or network. Not measured: several processes, a Redis that is far away.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from environments import interpreter
from harness import (
    Measure,
    Report,
    Rounds,
    here,
    interleave,
    parser_of,
    ratio,
    spread,
    start_report,
)
from hosts import Host
from letter_subjects import Ours, a_letter, a_small_letter, timed

from periscope_otel.dead_letter import Filter, open_store
from periscope_otel.dead_letter.forwarder import Forwarder
from periscope_otel.dead_letter.outbox import Outbox

sys.path.append(str(here().parent / "integration"))
from redis_servers import RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from harness import Sample
    from redis import Redis

    from periscope_otel.dead_letter.letter import Letter
    from periscope_otel.dead_letter.store import Store

FEW = 1_000


def against_xadd(folder: Path, server: RedisServer, rounds: int, calls: int) -> Rounds:
    """Interleave puts and bare XADDs of the same bytes."""
    outbox, file = Ours(folder / "outbox", server.url), Ours(folder / "file", None)
    client = server.client
    try:
        return _against_xadd(outbox, file, client, rounds, calls)
    finally:  # or what is flushed here would be put again while something else is measured
        outbox.queue.close()
        file.queue.close()


def _against_xadd(outbox: Ours, file: Ours, client: Redis, rounds: int, calls: int) -> Rounds:
    def xadd(calls: int) -> Sample:
        blobs = iter([a_letter().encode() for _ in range(calls)])
        sample = timed(lambda: client.xadd("bench", {"b": next(blobs)}), calls)
        client.delete("bench")
        return sample

    subjects = {"outbox": outbox.put, "file": file.put, "XADD": xadd}
    return interleave(subjects, rounds, calls)


def against_peer(peer: str, folder: Path, server: RedisServer, rounds: int, calls: int) -> Rounds:
    """Interleave recordings of ours and of a peer, in the peer's environment."""
    path = os.pathsep.join([str(here().parents[1] / "src"), str(here())])
    url, other_url = server.url, server.url[:-1] + "1"
    with Host(
        here() / "letter_peer_host.py", peer, url, other_url, str(folder / peer),
        python=interpreter(peer), environment={"PYTHONPATH": path},
    ) as host:  # fmt: skip
        return interleave({name: host.subject(name) for name in ("ours", peer)}, rounds, calls)


def draining(folder: Path, server: RedisServer, rounds: int, calls: int) -> Rounds:
    """Interleave forwarding a full outbox and one round trip a letter."""
    outbox, store = Outbox(folder / "drain.db", checkpoints=False), open_store(server.url)
    forwarder = Forwarder(outbox, store)

    def drain(calls: int) -> Sample:
        outbox.put([a_letter() for _ in range(calls)])
        began = time.perf_counter()
        while outbox.waiting().letters:
            forwarder.round()
        return {"mean": (time.perf_counter() - began) / calls}

    def one_by_one(calls: int) -> Sample:
        letters = iter([a_letter() for _ in range(calls)])
        return timed(lambda: store.put([next(letters)]), calls)

    taken = interleave({"forwarded": drain, "one by one": one_by_one}, rounds, calls)
    server.client.flushdb()
    return taken


def fill(store: Store, many: int) -> None:
    """Put very many letters into a store."""
    batch = 500
    for start in range(0, many, batch):
        store.put([a_small_letter(number) for number in range(start, start + batch)])


def by_depth(
    open_: Callable[[str], Store], many: int, rounds: int, calls: int
) -> dict[str, Rounds]:
    """Interleave what is done to a store with few letters and to one with very many."""
    stores = {"few": open_("few"), "many": open_("many")}
    for name, size in (("few", FEW), ("many", many)):
        fill(stores[name], size)
    number = iter(range(10**9, 10**12))

    def put(store: Store, calls: int) -> Sample:
        letters = [a_small_letter(next(number)) for _ in range(calls)]
        given = iter(letters)
        sample = timed(lambda: store.put([next(given)]), calls)
        store.purge(Filter(ids=tuple(one.id for one in letters)), dry_run=False)
        return sample

    def page(store: Store, calls: int) -> Sample:
        return timed(lambda: store.list(Filter(), limit=100), max(10, calls // 20))

    def claim(store: Store, calls: int) -> Sample:
        def once() -> None:
            (claimed,) = store.claim("bench", 60.0, 1, Filter())
            store.release(claimed)

        return timed(once, max(10, calls // 4))

    taken = {}
    for what, act in (("put", put), ("page", page), ("claim", claim)):
        subjects = {name: _on(store, act) for name, store in stores.items()}
        taken[what] = interleave(subjects, rounds, calls)
    for store in stores.values():
        store.close()
    return taken


def _on(store: Store, act: Callable[[Store, int], Sample]) -> Callable[[int], Sample]:
    return lambda calls: act(store, calls)


def memory(server: RedisServer, letters: Sequence[Letter]) -> list[float]:
    """Return the bytes a letter that Redis uses beyond 1.25 times its encoded form."""
    client = server.client
    client.flushdb()
    with ExitStack() as stack:
        store = open_store(server.url)
        stack.callback(store.close)
        store.put([a_letter()])  # what there is once
        before = client.info("memory")["used_memory"]
        for start in range(0, len(letters), 64):
            store.put(letters[start : start + 64])
        used = (client.info("memory")["used_memory"] - before) / len(letters)
    encoded = sum(len(one.encode()) for one in letters) / len(letters)
    return [used - 1.25 * encoded]


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__, rounds=20, calls=500)
    parser.add_argument("--many", type=int, default=1_000_000, help="letters of a full store")
    options = parser.parse_args()
    report = start_report(__doc__, options)
    report.settings["many"] = options.many
    # On a disk: the usual place for temporary files may be memory.
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=Path.cwd()))
    try:
        with RedisServer("redis", folder / "redis") as server:
            measured(report, folder, server, options.rounds, options.calls, options.many)
    finally:
        shutil.rmtree(folder)
    report.publish(options.json)


def measured(  # noqa: PLR0917  (sizes of a run)
    report: Report, folder: Path, server: RedisServer, rounds: int, calls: int, many: int
) -> None:
    """Take all measures."""
    add = report.measures.append
    taken = against_xadd(folder, server, rounds, calls)
    add(ratio("put, Redis behind ÷ XADD, medians", taken, "outbox", "XADD", "median", 0.8))
    add(ratio("put, Redis behind ÷ XADD, means", taken, "outbox", "XADD", "mean", 1.0))
    add(ratio("put, file alone (FULL) ÷ XADD, medians", taken, "file", "XADD", "median", 3.0))
    add(ratio("put, file alone (FULL) ÷ XADD, means", taken, "file", "XADD", "mean"))
    indicate(report, taken)
    server.client.flushdb()
    for peer in ("rq", "dramatiq"):
        taken = against_peer(peer, folder, server, rounds, calls)
        add(ratio(f"recording ÷ {peer}, means", taken, "ours", peer, "mean", 0.35))
        add(ratio(f"recording ÷ {peer}, medians", taken, "ours", peer, "median"))
        told = f"recording and forwarding ÷ {peer}, CPU of the process"
        add(ratio(told, taken, "ours", peer, "process"))
        indicate(report, taken)
        server.client.flushdb()
    taken = draining(folder, server, rounds, calls * 4)
    add(
        ratio(
            "one letter forwarded ÷ one round trip", taken, "forwarded", "one by one", "mean", 0.2
        )
    )
    indicate(report, taken)
    add(memory_of(server))
    server.client.flushdb()
    add_depths(report, "SQLite", lambda name: open_store(f"sqlite:///{folder / name}.db"),
               many, rounds, calls)  # fmt: skip
    add_depths(
        report, "Redis", lambda name: open_store(server.url, prefix=name), many, rounds, calls
    )


def memory_of(server: RedisServer) -> Measure:
    """Return what Redis uses for a letter beyond 1.25 times its encoded form."""
    letters = [a_letter() for _ in range(5_000)]
    return spread("Redis, bytes beyond 1.25 letters", memory(server, letters), 1400, " B")


def add_depths(  # noqa: PLR0917
    report: Report, name: str, open_: Callable[[str], Store], many: int, rounds: int, calls: int
) -> None:
    """Add the ratios of a store with very many letters."""
    for what, taken in by_depth(open_, many, rounds, calls).items():
        told = f"{name}, {what}: {many:,} letters ÷ {FEW:,}"
        report.measures.append(ratio(told, taken, "many", "few", "median", 1.3))
        indicate(report, taken)


def indicate(report: Report, rounds: Rounds) -> None:
    """Add each subject's microseconds, as an indication."""
    for name, samples in rounds.items():
        mean = sorted(sample["mean"] for sample in samples)[len(samples) // 2] * 1e6
        report.indications.append(f"{name}: {mean:.3g} µs")


if __name__ == "__main__":
    main()
