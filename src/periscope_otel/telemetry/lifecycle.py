"""How a process ends and how it forks: everything is flushed together, within one bounded time.

Parts register what they can flush and what a fork does to them. The end may be a normal exit, an
unhandled exception, SIGINT (all by `atexit`), SIGTERM (by a handler that hands over to a
thread), or the end of a multiprocessing child, which runs no `atexit` functions.
"""

from __future__ import annotations

import atexit
import os
import queue
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Protocol

from periscope_otel import guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Flushable(Protocol):
    """Something that holds what is not yet out, and a thread that can send it."""

    def start_flush(self) -> None:
        """Begin to send everything, without waiting."""

    def wait_flushed(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for that; returns whether all was dealt with."""
        ...


class FlushThread:
    """Makes a blocking flush a `Flushable`: the call has no bound, so a thread of ours makes it.

    Args:
        name: The thread's name.
        flush: The blocking call.
    """

    def __init__(self, name: str, flush: Callable[[], object]) -> None:
        self._name = name
        self._flush = flush
        self.restart()

    def restart(self) -> None:
        """Start the thread, again in the child of a fork.

        It starts before it is needed: at the end of the interpreter no thread can be started.
        """
        self._requests: queue.SimpleQueue[threading.Event | None] = queue.SimpleQueue()
        self._latest = threading.Event()
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def start_flush(self) -> None:
        """Ask the thread to flush."""
        self._latest = threading.Event()
        self._requests.put(self._latest)

    def wait_flushed(self, timeout: float) -> bool:
        """Wait for the flush asked for last."""
        return self._latest.wait(timeout)

    def stop(self) -> None:
        """End the thread after what it is doing."""
        self._requests.put(None)

    def _run(self) -> None:
        while (request := self._requests.get()) is not None:
            with guard.contained("flush"):
                self._flush()
            request.set()


def flush_all(flushables: Iterable[Flushable], deadline: float) -> bool:
    """Flush everything at the same time.

    Args:
        flushables: What to flush.
        deadline: When to stop waiting, on the monotonic clock.

    Returns:
        Whether all was done in time.
    """
    started = list(flushables)
    for flushable in started:
        with guard.contained("flush"):
            flushable.start_flush()
    done = [one.wait_flushed(max(0.0, deadline - time.monotonic())) for one in started]
    return all(done)


class ExitHooks:
    """Runs `at_end` once at whatever end the process has, without changing its exit status.

    Args:
        at_end: Called with a word for the kind of end; must return in bounded time.
    """

    def __init__(self, at_end: Callable[[str], None]) -> None:
        self._at_end = at_end
        self._sigterms: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def install(self) -> None:
        """Register for every kind of end that can be had in this process."""
        atexit.register(self._exit)
        self._install_signal_handler()
        self.watch_multiprocessing()

    def remove(self) -> None:
        """Undo `install`."""
        atexit.unregister(self._exit)
        self.restore_signal_handler()
        self._sigterms.put(False)

    def watch_multiprocessing(self) -> None:
        """Be told when this process ends, if it is a multiprocessing child."""
        process = sys.modules.get("multiprocessing.process")
        if process is None or process.parent_process() is None:
            return
        from multiprocessing import util

        util.Finalize(None, self._at_end, args=("end of a multiprocessing child",), exitpriority=10)

    def _exit(self) -> None:
        self._at_end("exit")

    def _install_signal_handler(self) -> None:
        # Only the main thread may; and a handler of the application's own wins, before or after.
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return
        self._sigterms = queue.SimpleQueue()
        threading.Thread(target=self._wait_for_sigterm, name="periscope-exit", daemon=True).start()
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def restore_signal_handler(self) -> None:
        """Put the default action back, if the handler is still ours."""
        if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            with guard.contained("signal handler"):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_sigterm(self, _number: int, _frame: object) -> None:
        # The interrupted code may hold any lock, so nothing is flushed here: a thread that waits
        # for this does it and sends the signal again, so that the exit status is still "killed by
        # SIGTERM". The queue's put is reentrant by design.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._sigterms.put(True)

    def _wait_for_sigterm(self) -> None:
        if not self._sigterms.get():
            return
        try:
            self._at_end("SIGTERM")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
