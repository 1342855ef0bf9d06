"""Threads of our own, in which letters are written for coroutines.

Those of the event loop will not do: the application may have all of them wait for the very
coroutine whose letter it is.
"""

from __future__ import annotations

import contextvars
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future, ThreadPoolExecutor

_MOST: Final = 4
"""Enough: one at a time writes to the file, the others only to files of large payloads."""

_executor: ThreadPoolExecutor | None = None


def submit(run: Callable[[], None]) -> Future[None] | None:
    """Have `run` run in one of the threads; None where it has been run here and now instead.

    That is at the end of the interpreter, when no thread takes anything any more.
    """
    global _executor
    from concurrent.futures import ThreadPoolExecutor

    if _executor is None:
        _executor = ThreadPoolExecutor(_MOST, thread_name_prefix="periscope-letters")
    try:
        return _executor.submit(contextvars.copy_context().run, run)
    except RuntimeError:
        run()
        return None


async def in_a_thread(run: Callable[[], None]) -> None:
    """Run `run` in a thread where asyncio runs; a cancellation does not interrupt it."""
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:  # another library's event loop
        run()
        return
    future = submit(run)
    if future is not None:
        await asyncio.shield(asyncio.wrap_future(future))


def _after_fork_in_child() -> None:
    global _executor
    _executor = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
