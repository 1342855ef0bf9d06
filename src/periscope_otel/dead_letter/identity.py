"""Names for letters: an id each, and a fingerprint for those that failed for the same cause."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
import uuid
from typing import TYPE_CHECKING

from periscope_otel.failure import message_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

_FRAMES = 5
"""The innermost calls that tell one cause from another."""

_VARIES = re.compile(
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|0x[0-9a-f]+|[0-9a-f]{8,}|\d+"
    r"|'[^']*'|\"[^\"]*\"|https?://\S+",
    re.IGNORECASE,
)
"""What differs between two messages about the same thing: numbers, ids, quoted values, URLs."""


class LetterIds:
    """Makes UUIDs of version 7 (RFC 9562, section 5.7), each greater than the one before.

    The first 48 bits are milliseconds, the next 12 a counter (section 6.2, method 1), so that ids
    of one process sort in the order in which they were made.

    Args:
        clock: Unix nanoseconds.
    """

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._lock = threading.RLock()  # a signal handler may interrupt who has it
        self._last = 0

    def new(self) -> str:
        """Return the next id, as text."""
        now = self._clock() // 1_000_000 << 12
        with self._lock:
            # Without a call, at which a signal handler might come in between.
            following = self._last + 1
            self._last = stamp = now if now > following else following  # noqa: FURB136
        random = int.from_bytes(os.urandom(8), "big") & (1 << 62) - 1
        milliseconds, counter = stamp >> 12, stamp & 0xFFF
        number = milliseconds << 80 | 7 << 76 | counter << 64 | 0b10 << 62 | random
        return str(uuid.UUID(int=number))

    def after_fork(self) -> None:
        """Start anew in a child: a thread that it does not have may have held the lock."""
        self._lock = threading.RLock()


def content_key(operation: str, feed: str | None, sha256: bytes) -> str:
    """Return the idempotency key of a payload that was given none: the same for the same content.

    Args:
        operation: The operation that the payload is for.
        feed: Its feed.
        sha256: Of the payload.
    """
    about = repr((operation, feed or "")).encode(errors="replace")
    return hashlib.sha256(about + sha256).hexdigest()[:32]


def fingerprint(operation: str, error_type: str | None, error: object) -> str:
    """Return the same short text for failures of the same cause.

    What counts is the operation, the type of the error, and where an exception came from: the
    innermost functions, without line numbers, which an edit elsewhere changes. A failure that was
    not raised is told by its message, without what varies in it.

    Args:
        operation: The operation's name.
        error_type: As in telemetry.
        error: The exception, or a text.

    Example:
        >>> fingerprint("store", "KeyError", error)
        '5f0c1a9be3d24c77'
    """
    if isinstance(error, BaseException) and error.__traceback__ is not None:
        where = "\n".join(list(_functions(error.__traceback__))[-_FRAMES:])
    else:
        where = _VARIES.sub(
            "…", message_of(error) if isinstance(error, BaseException) else str(error)[:1000]
        )
    cause = f"{operation}\0{error_type or ''}\0{where}"
    return hashlib.sha256(cause.encode(errors="replace")).hexdigest()[:16]


def _functions(traceback: TracebackType | None) -> Iterator[str]:
    while traceback is not None:
        frame = traceback.tb_frame
        module = str(frame.f_globals.get("__name__"))
        if not module.startswith("periscope_otel."):
            yield f"{module}.{frame.f_code.co_qualname}"
        traceback = traceback.tb_next
