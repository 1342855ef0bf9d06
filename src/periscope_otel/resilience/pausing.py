"""Waiting for the next attempt, in threads and in event loops, until the process ends.

A thread that sleeps would hold up the end of the process: `shutting_down` wakes it.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST_SLEEP: Final = 0.5
"""Seconds after which a waiting call looks whether the process still goes on."""


class _Gate:
    """What threads sleep at until it is opened, once; that is safe in a signal handler.

    `threading.Event` is not: a handler that sets one hangs where it has interrupted its `wait`.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def sleep(self, seconds: float) -> None:
        if self._lock.acquire(timeout=seconds):
            self._lock.release()  # for whoever sleeps beside this one

    def open(self) -> None:
        self.is_open = True
        with suppress(RuntimeError):  # it is open already
            self._lock.release()


_end = _Gate()
_now: Callable[[], float] = time.monotonic  # tests replace these three


def _sleep(seconds: float) -> None:
    _end.sleep(seconds)


async def _sleep_async(seconds: float) -> None:
    from asyncio import sleep

    await sleep(seconds)


def pause(seconds: float) -> bool:
    """Wait, holding only this thread up.

    Args:
        seconds: How long.

    Returns:
        Whether the next attempt may be made: False, and at once, where the process shuts down.
    """
    until = _now() + seconds
    while goes_on():
        left = until - _now()
        if left <= 0:
            return True
        _sleep(min(left, LONGEST_SLEEP))
    return False


async def pause_async(seconds: float) -> bool:
    """Wait as `pause` does, without holding the event loop up; a cancellation ends it."""
    until = _now() + seconds
    while goes_on():
        left = until - _now()
        if left <= 0:
            return True
        await _sleep_async(min(left, LONGEST_SLEEP))
    return False


def goes_on() -> bool:
    """Whether the process neither shuts down nor has lost its main thread."""
    return not _end.is_open and threading.main_thread().is_alive()


def shutting_down() -> None:
    """Have no attempt wait any longer: each call ends with what its last attempt came to."""
    _end.open()


def resumed() -> None:
    """Let attempts wait again: the process goes on after all."""
    global _end
    if _end.is_open:
        _end = _Gate()


def _after_fork_in_child() -> None:
    global _end
    _end = _Gate()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
