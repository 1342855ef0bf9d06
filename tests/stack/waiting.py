"""Waiting for what real servers do in their own time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

from apis import UnansweredError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

WITHIN = 90.0
PERIOD = 0.1


def until_equal(expected: Any, look: Callable[[], Any], within: float = WITHIN) -> None:
    """Look until what is seen is what is expected; fail with the difference if it never is."""
    seen = until(look, lambda found: found == expected, within)
    assert seen == expected


def until(look: Callable[[], T], enough: Callable[[T], object] = bool, within: float = WITHIN) -> T:
    """Look until what is seen is enough, or the time is up; return what was seen last."""
    deadline = time.monotonic() + within
    while True:
        try:
            seen = look()
        except UnansweredError:
            if time.monotonic() > deadline:
                raise
        else:
            if enough(seen) or time.monotonic() > deadline:
                return seen
        time.sleep(PERIOD)
