"""The one way to a Redis: bounded in time, without retries and without spans of its own.

redis-py alone waits up to a minute for a Redis that hangs, and repeats what failed; whoever asks
here has a queue, a back-off or a local decision to fall back on, and wants to know soon.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY as SUPPRESS_KEY
from opentelemetry.context import attach, detach, set_value

from periscope_otel.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Iterator

    from redis import Redis

TIMEOUT: Final = 0.5
"""Seconds for a connection, and for an answer."""


class RedisLink:
    """A Redis and what is known about it; connects when it is first asked.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py takes them.
        timeout: Seconds for a connection, and for an answer; the URL's query cannot change it.

    Raises:
        ValueError: If the URL cannot be read; the message may show a part of it.
    """

    def __init__(self, url: str, timeout: float = TIMEOUT) -> None:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._given = url, timeout
        self.shown = redact(url)
        """The URL without its password."""
        self.client: Redis = Redis.from_url(url)
        pool = self.client.connection_pool
        # Not as options of `from_url`: those of the URL's query would be put over them.
        pool.connection_kwargs.pop("retry_on_timeout", None)
        pool.connection_kwargs |= {
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            "retry": Retry(NoBackoff(), 0),
            "retry_on_error": [],
            "decode_responses": False,
            "encoding": "utf-8",
            "encoding_errors": "strict",
        }
        try:
            pool.connection_class(**pool.connection_kwargs)  # connects to nothing yet
        except TypeError:
            raise ValueError("the URL's query has an option that redis-py does not know") from None

    @contextmanager
    def quiet(self) -> Iterator[Redis]:
        """Give the client for a block in which other instrumentations of redis make no spans."""
        token = attach(set_value(SUPPRESS_KEY, True))
        try:
            yield self.client
        finally:
            detach(token)

    def renewed(self) -> RedisLink:
        """Return one to the same Redis that shares nothing with this one.

        For the child of a fork: redis-py makes its pool anew there under a lock that a thread of
        the parent may have held, and then nobody ever gives it back.
        """
        return RedisLink(*self._given)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


def errors() -> Any:
    """Return what a Redis that is away, full or not itself raises, for an `except`."""
    from redis.exceptions import RedisError

    return (RedisError, OSError)
