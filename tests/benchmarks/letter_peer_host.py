"""Recording one failed job: ours, and one peer's own way; served to dead_letters.py.

The arguments are the peer, the URL of a Redis and a folder. Ours is everything from the exception
to the letter on disk, with the forwarder moving letters on to that Redis. A peer's is what its
worker does with a job that has failed for good: the job itself is in Redis before, and what the
worker does to fetch it is not counted.
"""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hosts import serve
from letter_subjects import ERROR, Ours, rows_of, store, timed

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Sample


def rq(url: str) -> Callable[[int], Sample]:
    """RQ: the worker's `handle_job_failure`, with the exception's text."""
    from redis import Redis
    from rq import Queue, SimpleWorker

    connection = Redis.from_url(url)
    queue = Queue("bench", connection=connection)
    worker = SimpleWorker([queue], connection=connection, log_job_description=False)
    logging.getLogger("rq.worker").setLevel(logging.CRITICAL)

    def measure(calls: int) -> Sample:
        jobs = iter([queue.enqueue(store, rows_of(), source="urlhaus") for _ in range(calls)])

        def record() -> None:
            told = "".join(traceback.format_exception(ERROR))
            worker.handle_job_failure(next(jobs), queue, exc_string=told)

        sample = timed(record, calls)
        connection.flushdb()
        return sample

    return measure


def dramatiq(url: str) -> Callable[[int], Sample]:
    """dramatiq: the middleware's `after_process_message`, then the consumer's `nack`."""
    import dramatiq as library
    from dramatiq.brokers.redis import RedisBroker

    broker = RedisBroker(url=url)
    library.set_broker(broker)
    actor = library.actor(store, max_retries=0, queue_name="bench")
    logging.getLogger("dramatiq").setLevel(logging.CRITICAL)

    def measure(calls: int) -> Sample:
        for _ in range(calls):
            actor.send(rows_of(), source="urlhaus")
        consumer = broker.consume("bench", prefetch=calls)
        messages: Any = iter([next(consumer) for _ in range(calls)])

        def record() -> None:
            message = next(messages)
            broker.emit_after("process_message", message, exception=ERROR)
            consumer.nack(message)

        sample = timed(record, calls)
        broker.client.flushdb()
        return sample

    return measure


PEERS: dict[str, Callable[[str], Callable[[int], Sample]]] = {"rq": rq, "dramatiq": dramatiq}


def subjects() -> dict[str, Callable[[int], Sample]]:
    """Return ours and the one that the command line names."""
    peer, url, other_url, folder = sys.argv[1:]
    ours = Ours(Path(folder), url)
    return {"ours": ours.record, peer: PEERS[peer](other_url)}


if __name__ == "__main__":
    serve(subjects)
