"""A queue whose one reader waits for it and for a socket at the same time.

Whoever puts something takes no lock that could be held: `SimpleQueue.put` and a byte to a socket
that does not block are safe in finalisers, too.
"""

from __future__ import annotations

import queue
import selectors
import socket
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

_Item = TypeVar("_Item")

Selector: Final[Any] = getattr(selectors, "PollSelector", selectors.SelectSelector)
"""One that needs no file descriptor of its own, where there is such a one."""


class Inbox(Generic[_Item]):
    """What a thread is given to do, in order."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def __len__(self) -> int:
        return self._items.qsize()

    def put(self, item: _Item) -> None:
        """Give something to do."""
        self._items.put(item)
        self.wake()

    def wake(self) -> None:
        """Have `wait` end."""
        with suppress(OSError):  # full: the reader is awake already; or closed: nobody reads
            self._writer.send(b"\0")

    def take(self) -> _Item | None:
        """Return the next; None if there is none."""
        try:
            return self._items.get_nowait()
        except queue.Empty:
            return None

    def wait(self, timeout: float, other: socket.socket | None = None) -> None:
        """Wait until there may be something here, or something to read at the other socket.

        Args:
            timeout: Seconds at most.
            other: The other socket.
        """
        with Selector() as selector:
            selector.register(self._reader, selectors.EVENT_READ)
            if other is not None and other.fileno() >= 0:
                selector.register(other, selectors.EVENT_READ)
            selector.select(max(0.0, timeout))
        with suppress(OSError):
            while self._reader.recv(4096):
                pass

    def close(self) -> None:
        """Close the sockets; what is put from then on is found by `take` only."""
        self._reader.close()
        self._writer.close()
