"""Loopback ports for servers that tests start, also again after a while."""

from __future__ import annotations

import os
import random
import socket

LOCALHOST = "127.0.0.1"

# Below what the kernel hands out for outgoing connections, so that a port of a server that is away
# for a while is still free when it comes back.
PORTS = range(20_000, 32_000)
_given: set[int] = set()
"""Ports that a server of this process has been given, which may not listen there yet."""


def free_ports(count: int) -> list[int]:
    """Return ports on which nothing listens, and none twice; workers of pytest-xdist share none."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    share = PORTS[int(worker.removeprefix("gw")) % 16 :: 16] if worker else PORTS
    own = [port for port in share if port not in _given]
    ports: list[int] = []
    for port in random.SystemRandom().sample(own, len(own)):
        with socket.socket() as probe:
            try:
                probe.bind((LOCALHOST, port))
            except OSError:
                continue
        ports.append(port)
        _given.add(port)
        if len(ports) == count:
            return ports
    raise OSError("there are no free ports")
