"""What can happen to a Redis: each a block in which it has happened, and after which it is well."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from redis.exceptions import RedisError
from redis_servers import READY_WITHIN, RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


@contextmanager
def refused(server: RedisServer) -> Iterator[None]:
    """Nothing listens: it was killed, and comes back with nothing."""
    server.kill()
    yield
    server.start()


@contextmanager
def hung(server: RedisServer) -> Iterator[None]:
    """It accepts connections and never answers."""
    server.pause()
    yield
    server.resume()


@contextmanager
def restarted(server: RedisServer) -> Iterator[None]:
    """It is killed and comes back with nothing, while letters come."""
    yield
    server.kill()
    server.start()


@contextmanager
def out_of_memory(server: RedisServer) -> Iterator[None]:
    """It has no memory left, and may not evict."""
    with server.client as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        yield
        client.config_set("maxmemory", 0)


@contextmanager
def read_only(server: RedisServer) -> Iterator[None]:
    """It is the replica of a master that is away."""
    with server.client as client:
        client.replicaof("127.0.0.1", "1")
        yield
        client.replicaof("NO", "ONE")


@contextmanager
def failed_over(server: RedisServer) -> Iterator[None]:
    """Its replica, which lags behind, was made the master; it has that one's data from then on."""
    folder = server.folder / "replica"
    with RedisServer("redis", folder, repl_diskless_sync_delay="0") as other:
        other_client, client = other.client, server.client
        with other_client, client:
            client.replicaof("127.0.0.1", str(other.port))
            _wait_until(lambda: _info(client)["master_link_status"] == "up")
            yield
            client.replicaof("NO", "ONE")


@contextmanager
def flushed(server: RedisServer) -> Iterator[None]:
    """Everything in it is removed, as soon as there is something."""
    with server.client as client:
        yield
        deadline = time.monotonic() + 2.0
        while not client.dbsize() and time.monotonic() < deadline:
            time.sleep(0.01)
        client.flushall()


FAULTS: dict[str, Callable[[RedisServer], AbstractContextManager[None]]] = {
    "refused": refused,
    "hung": hung,
    "restarted": restarted,
    "out of memory": out_of_memory,
    "read-only": read_only,
    "failed over": failed_over,
    "flushed": flushed,
}


def _info(client) -> dict:
    try:
        return client.info("replication")
    except RedisError:
        return {"master_link_status": "down"}


def _wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 3 * READY_WITHIN
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
