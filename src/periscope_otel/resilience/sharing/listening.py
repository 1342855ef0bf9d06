"""Hearing of changes as they are told, where that is possible; the poll finds what is missed."""

from __future__ import annotations

import selectors
import time
from typing import TYPE_CHECKING, Any, Final

from periscope_otel.redis_link import errors
from periscope_otel.resilience.sharing.inbox import Selector
from periscope_otel.resilience.sharing.records import EVENTS, event_of

if TYPE_CHECKING:
    import socket

    from periscope_otel.redis_link import RedisLink
    from periscope_otel.resilience.sharing.records import Event

_MOST_AT_ONCE: Final = 1000
"""Messages that are read before something else has its turn."""

_REST_WITHIN: Final = 0.2
"""Seconds to wait for the rest of a message that has begun to come."""


class Listening:
    """A subscription, which is made again after it has broken.

    Args:
        link: The way to the Redis.
    """

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self._pubsub: Any = None

    def begin(self) -> bool:
        """Subscribe, unless it has; returns whether it has now."""
        if self._pubsub is not None:
            return True
        try:
            with self._link.quiet() as client:
                pubsub: Any = client.pubsub  # it has no types
                self._pubsub = pubsub(ignore_subscribe_messages=True)
                self._pubsub.subscribe(EVENTS)
        except errors():
            self.end()
            return False
        return True

    @property
    def socket(self) -> socket.socket | None:
        """What there is something to read at when a message comes."""
        connection = getattr(self._pubsub, "connection", None)
        return getattr(connection, "_sock", None)

    def wait(self, timeout: float) -> None:
        """Wait until there may be something to read, for so many seconds at most."""
        waited_for = self.socket
        if waited_for is None or waited_for.fileno() < 0:
            time.sleep(timeout)
            return
        with Selector() as selector:
            selector.register(waited_for, selectors.EVENT_READ)
            selector.select(timeout)

    def events(self) -> list[Event]:
        """Return what has come; waits for nothing."""
        found: list[Event] = []
        if self._pubsub is None:
            return found
        try:
            with self._link.quiet():
                for _ in range(_MOST_AT_ONCE):
                    if not self._has_message():
                        break
                    message = self._pubsub.get_message(timeout=_REST_WITHIN)
                    event = None if message is None else event_of(message.get("data"))
                    if event is not None:
                        found.append(event)
        except errors():
            self.end()
        return found

    def _has_message(self) -> bool:
        # `get_message` gives None both for nothing and for what is no message, and connects again
        # by itself, which may take long, where the connection has broken.
        connection = self._pubsub.connection
        return connection is not None and connection.is_connected and connection.can_read(0)

    def end(self) -> None:
        """End it."""
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            try:
                pubsub.close()
            except errors():
                return

    def abandon(self) -> object:
        """Leave it to the parent of this process, of which this is a fork.

        Returns:
            What must be kept: as redis-py removes it, it waits for locks that the parent may hold.
        """
        left, inherited = self._pubsub, self.socket
        self._pubsub = None
        if inherited is not None:
            inherited.close()
        return left
