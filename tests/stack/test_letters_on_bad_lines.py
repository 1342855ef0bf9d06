"""Letters on a bad line to Redis: slow, cut in the middle, without answers, refused."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest
from redis_servers import RedisServer
from servers import Toxiproxy

from periscope_otel.dead_letter import StoreError, forwarder, open_store, outbox
from periscope_otel.dead_letter.queue import DeadLetterQueue

pytest.register_assert_rewrite("store_conformance")

from store_conformance import everything, ids_of, some  # noqa: E402  (rewritten first)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("servers_exist")

WITHIN = 60.0
TOXICS = {
    "slow": ("latency", {"latency": 300, "jitter": 200}),
    "without answers": ("timeout", {"timeout": 0}),
    "cut after some bytes of an answer": ("limit_data", {"bytes": 40}),
    "reset": ("reset_peer", {"timeout": 20}),
    "in small pieces": ("slicer", {"average_size": 64, "size_variation": 32, "delay": 200}),
}


class Line(ExitStack):
    """A Redis, and a line to it that can be spoilt."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.server = self.enter_context(RedisServer("redis", folder / "redis"))
        self.proxy = self.enter_context(Toxiproxy(folder / "proxy"))
        begin = self.proxy.add("redis", f"127.0.0.1:{self.server.port}")
        self.url = f"redis://{begin}/0"

    def arrived(self) -> list[str]:
        """Return what is in the Redis."""
        with suppress(StoreError), open_store(self.server.url) as store:
            return ids_of(everything(store, limit=1000))
        return []


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """Return a line, with a forwarder that does not rest for long."""
    monkeypatch.setattr(outbox, "GRACE", 2.0)
    monkeypatch.setattr(forwarder, "SHORTEST_WAIT", 0.05)
    monkeypatch.setattr(forwarder, "LONGEST_WAIT", 0.5)
    with Line(tmp_path) as made:
        yield made


def put_slowly(queue: DeadLetterQueue, count: int) -> tuple[list[str], list[float]]:
    """Put letters over a second or more; returns their ids and how long each put took."""
    letters, took = some(count, error_stack="x" * 2000), []
    for letter in letters:
        began = time.perf_counter()
        assert queue.put([letter]) == "disk"
        took.append(time.perf_counter() - began)
        time.sleep(0.005)
    return ids_of(letters), took


def wait_for(line: Line, wanted: list[str]) -> None:
    """Wait until all letters are in the Redis, each once."""
    deadline = time.monotonic() + WITHIN
    while sorted(line.arrived()) != sorted(wanted):
        assert time.monotonic() < deadline, len(wanted) - len(line.arrived())
        time.sleep(0.1)


@pytest.mark.parametrize("toxic", TOXICS)
def test_a_bad_line_loses_and_repeats_nothing(line: Line, tmp_path: Path, toxic: str) -> None:
    """Each letter arrives once, though batches are cut and answers lost, and no put waits."""
    kind, attributes = TOXICS[toxic]
    with DeadLetterQueue(tmp_path / "data", redis_url=line.url) as queue:
        wanted, _ = put_slowly(queue, 50)
        with line.proxy.toxic("redis", kind, **attributes):
            during, took = put_slowly(queue, 200)
        after, _ = put_slowly(queue, 50)
        wait_for(line, [*wanted, *during, *after])
        assert (queue.in_memory, queue.lost) == (0, 0)
    with open_store(line.server.url) as store:
        assert {letter.attempts for letter in everything(store, limit=1000)} == {1}
    # What waits for the network takes half a second or more, and most would; a machine or a disk
    # that is busy holds a few up.
    assert sorted(took)[-4] < 0.4


def test_a_line_that_comes_and_goes_loses_nothing(line: Line, tmp_path: Path) -> None:
    """A line that is cut in the middle of batches again and again delivers all at last."""
    wanted: list[str] = []
    with DeadLetterQueue(tmp_path / "data", redis_url=line.url) as queue:
        for pause in (0.0, 0.01, 0.03, 0.05, 0.1):
            letters = some(200, error_stack="x" * 4000)
            queue.put(letters)
            wanted += ids_of(letters)
            time.sleep(pause)
            with line.proxy.down("redis"):
                time.sleep(0.05)
        wait_for(line, wanted)
