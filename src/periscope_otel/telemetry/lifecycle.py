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
from contextlib import suppress
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
        self._pid = os.getpid()
        self._terminated = False
        self._pipe: tuple[int, int] | None = None

    def install(self) -> None:
        """Register for every kind of end that can be had in this process."""
        self._pid = os.getpid()
        atexit.register(self._exit)
        self._install_signal_handler()
        self.watch_multiprocessing()

    def remove(self) -> None:
        """Undo `install`."""
        atexit.unregister(self._exit)
        # Elsewhere the handler cannot be put back: it stays, and so does the thread behind it.
        if threading.current_thread() is threading.main_thread():
            self._restore_signal_handler()

    def watch_multiprocessing(self) -> None:
        """Be told when this process ends, if it is a multiprocessing child."""
        process = sys.modules.get("multiprocessing.process")
        if process is None or process.parent_process() is None:
            return
        from multiprocessing import util

        util.Finalize(None, self._at_end, args=("end of a multiprocessing child",), exitpriority=10)

    def after_fork(self) -> None:
        """Put right in the child what it inherited; hooks of its own come with `install`."""
        self._terminated = False
        self._restore_signal_handler()
        util = sys.modules.get("multiprocessing.util")
        if util is not None:
            # A multiprocessing child forgets, at its start, what was registered for its end.
            util.register_after_fork(self, ExitHooks.watch_multiprocessing)

    def _exit(self) -> None:
        self._at_end("exit")
        if self._terminated:
            os.kill(os.getpid(), signal.SIGTERM)

    def _install_signal_handler(self) -> None:
        # Only the main thread may; and a handler of the application's own wins, before or after.
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return
        reader, writer = self._pipe = os.pipe()
        os.set_blocking(writer, False)
        threading.Thread(
            target=self._wait_for_sigterm, args=(reader,), name="periscope-exit", daemon=True
        ).start()
        signal.signal(signal.SIGTERM, self._on_sigterm)
        # The interpreter itself writes the signal's number as it arrives. A handler alone may be
        # called late or never: the main thread must first come back from what it waits for.
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)

    def _restore_signal_handler(self) -> None:
        """Put the default action back, if the handler is still ours, and end its thread."""
        if self._pipe is None:
            return
        (reader, writer), self._pipe = self._pipe, None
        with guard.contained("signal handler"):
            if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            before = signal.set_wakeup_fd(-1)
            if before not in (-1, writer):
                signal.set_wakeup_fd(before)
        os.close(writer)
        if self._pid != os.getpid():
            os.close(reader)  # in the child of a fork, which has no thread to do it

    def _on_sigterm(self, number: int, _frame: object) -> None:
        # The interrupted code may hold any lock, so nothing is flushed here: a thread that waits
        # for this does it and sends the signal again, so that the exit status is still "killed by
        # SIGTERM".
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._pid != os.getpid() or self._pipe is None:
            os.kill(os.getpid(), number)
            return
        self._terminated = True
        with suppress(OSError):
            os.write(self._pipe[1], bytes([number]))

    def _wait_for_sigterm(self, reader: int) -> None:
        while arrived := os.read(reader, 64):
            ours = self._terminated or signal.getsignal(signal.SIGTERM) == self._on_sigterm
            if signal.SIGTERM in arrived and ours:
                try:
                    self._at_end("SIGTERM")
                finally:
                    self._die()
                break
        os.close(reader)

    def _die(self) -> None:
        """End the process by SIGTERM with its default action, which only the main thread can set.

        A signal that arrives just before the main thread blocks does not wake it: hence the loop.
        """
        main = threading.main_thread().ident
        while main is not None and signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            signal.pthread_kill(main, signal.SIGTERM)
            time.sleep(_NUDGE_INTERVAL)
        os.kill(os.getpid(), signal.SIGTERM)


_NUDGE_INTERVAL = 0.02
"""Seconds between two attempts to wake the main thread."""
