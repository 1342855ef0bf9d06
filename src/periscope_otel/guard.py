"""Our own errors never reach the user's code.

Every place where the plugin runs inside somebody else's call catches what goes wrong and hands it
to `report`: it is counted, logged at most once a minute for each place, and forgotten. In strict
mode (the project's own tests) it is raised instead, so that a bug cannot hide.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("periscope_otel")

LOG_INTERVAL = 60.0
"""Seconds between two log lines about the same place."""

_lock = threading.Lock()
_counts: dict[str, int] = {}
_last_logged: dict[str, float] = {}
_strict = False


def set_strict(strict: bool) -> None:
    """Raise internal errors instead of containing them; for the project's own tests.

    Args:
        strict: True to raise, False (the default at start) to contain.
    """
    global _strict
    _strict = strict


def is_strict() -> bool:
    """Return whether internal errors are raised."""
    return _strict


def report(place: str, error: BaseException) -> None:
    """Count an error of our own and log it, at most once a minute for each place.

    Args:
        place: Which part of the plugin failed, a short fixed text such as `"operation.begin"`.
        error: What was raised there.

    Raises:
        BaseException: `error` itself, in strict mode only.
    """
    if _strict:
        raise error
    if _counted_and_due(place):
        _log(
            "periscope-otel contained an error of its own in %s; the call went on without it: %s",
            place,
            _shape_of(error),
        )


def warn(place: str, message: str, *args: object) -> None:
    """Log a warning about how the plugin is used, at most once a minute for each place."""
    if _due(place):
        _log(message, *args)


@contextmanager
def contained(place: str) -> Iterator[None]:
    """Contain whatever the block raises, except what asks the process to stop."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  (this is the one place whose task it is)
        report(place, error)


def counts() -> dict[str, int]:
    """Return how many internal errors each place has had in this process."""
    with _lock:
        return dict(_counts)


def reset() -> None:
    """Forget counts and log times: after a fork the child starts at zero."""
    global _lock
    _lock = threading.Lock()
    _counts.clear()
    _last_logged.clear()


def _log(message: str, *args: object) -> None:
    try:
        logger.warning(message, *args)
    except Exception:  # noqa: BLE001  (a handler of the application's: the call must go on)
        return


def _shape_of(error: BaseException) -> str:
    """Return an error's type and the last places it passed; its message may hold secrets."""
    places: deque[str] = deque(maxlen=4)
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        places.append(f"{code.co_filename}:{traceback.tb_lineno} in {code.co_name}")
        traceback = traceback.tb_next
    return f"{type(error).__name__} ({' < '.join(reversed(places))})"


def _counted_and_due(place: str) -> bool:
    with _lock:
        _counts[place] = _counts.get(place, 0) + 1
    return _due(place)


def _due(place: str) -> bool:
    now = time.monotonic()
    with _lock:
        last = _last_logged.get(place)
        if last is not None and now - last < LOG_INTERVAL:
            return False
        _last_logged[place] = now
        return True
