"""What a queue may be called."""

from __future__ import annotations

import re
from typing import Final

from periscope_otel.redaction import clean_name

_QUEUE: Final = re.compile(r"[A-Za-z0-9._-]{1,100}")


def queue_name(text: str) -> str:
    """Return the name of a queue: it becomes part of keys, labels and command lines.

    Raises:
        ValueError: If it is none.
    """
    if _QUEUE.fullmatch(text) is None:
        shown = clean_name(text, 100)
        raise ValueError(f"{shown!r} is no name of a queue: 1 to 100 of A-Z a-z 0-9 . _ -")
    return text
