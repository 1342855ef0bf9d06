"""Dead letters and what they are compared with: subjects for dead_letters.py and its hosts."""

from __future__ import annotations

import gc
import os
import statistics
import time
from typing import TYPE_CHECKING

from periscope_otel.dead_letter.codecs import Encoded, encode_arguments
from periscope_otel.dead_letter.draft import Origin, cause_of, letter_of
from periscope_otel.dead_letter.queue import DeadLetterQueue

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from harness import Sample

    from periscope_otel.dead_letter.letter import Letter

PAYLOAD = 2048
"""Bytes of a payload."""


def store(rows: str, *, source: str) -> None:
    """Fail, some calls deep."""
    _connect(rows, source)


def _connect(rows: str, source: str) -> None:
    raise ConnectionError(f"{source} refused {len(rows)} bytes")


def an_error() -> ConnectionError:
    """Return an exception with a traceback."""
    try:
        store("x", source="urlhaus")
    except ConnectionError as error:
        return error
    raise AssertionError


def rows_of(size: int = PAYLOAD) -> str:
    """Return text that is no other call's: it neither compresses nor merges."""
    return os.urandom(size // 2).hex()


ERROR = an_error()
ORIGIN = Origin("store", "urlhaus", "default")


def a_letter(size: int = PAYLOAD) -> Letter:
    """Return the letter of a failed call, made as a failing operation makes it."""
    encoded = encode_arguments(store, (rows_of(size),), {"source": "urlhaus"})
    return letter_of(ORIGIN, encoded, cause_of("store", "ConnectionError", ERROR))


def a_small_letter(number: int) -> Letter:
    """Return a letter whose content is of no weight: for stores with very many."""
    encoded = Encoded(str(number).encode(), "item")
    return letter_of(
        Origin("store", f"feed-{number % 7}", "default"),
        encoded,
        cause_of("store", "ConnectionError", f"refused by host {'abcdefgh'[number % 8]}"),
    )


def timed(record: Callable[[], object], calls: int) -> Sample:
    """Record `calls` times; seconds of wall clock a call, in the mean, at the median and p99."""
    taken = []
    clock = time.perf_counter
    gc.collect()
    process = time.process_time()
    for _ in range(calls):
        began = clock()
        record()
        taken.append(clock() - began)
    process = time.process_time() - process
    taken.sort()
    return {
        "mean": statistics.fmean(taken),
        "median": taken[len(taken) // 2],
        "p99": taken[int(len(taken) * 0.99)],
        "process": process / calls,
    }


class Ours:
    """A queue of ours, and the letters that are to be put into it."""

    def __init__(self, folder: Path, redis_url: str | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.queue = DeadLetterQueue(folder, redis_url=redis_url, largest_file=8 << 30)

    def put(self, calls: int) -> Sample:
        """Put letters that are made already: the local write alone."""
        letters = iter([a_letter() for _ in range(calls)])
        sample = timed(lambda: self.queue.put([next(letters)]), calls)
        self.drain()
        return sample

    def record(self, calls: int) -> Sample:
        """Record failures: everything from the exception to the letter on disk."""
        process = time.process_time()
        sample = timed(lambda: self.queue.put([a_letter()]), calls)
        self.drain()
        sample["process"] = (time.process_time() - process) / calls  # with the forwarding
        return sample

    def drain(self) -> None:
        """Wait until all have arrived, so that no round works for the one before."""
        self.queue.start_flush()
        self.queue.wait_flushed(60)
