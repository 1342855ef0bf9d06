"""One daemon thread for what must not happen where it is noticed.

Finalisers and signal handlers may run between any two bytecodes, also inside an SDK call that
holds a lock, so they may take none: they post the work here. `queue.SimpleQueue.put` is reentrant
by design, which is why it is the only thing they touch.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from periscope_otel import guard

if TYPE_CHECKING:
    from collections.abc import Callable


class Worker:
    """Runs posted callables one after the other.

    Without its thread (never started, or lost in a fork) posted work waits for `run_posted`.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._start_lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_started(self) -> bool:
        """Whether `start` has nothing to do."""
        return self._thread is not None

    def start(self) -> None:
        """Start the thread; does nothing where it runs already."""
        if self._thread is not None:
            return
        with self._start_lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="periscope-worker", daemon=True)
                thread.start()
                self._thread = thread

    def post(self, task: Callable[[], None]) -> None:
        """Have `task` run soon; safe in finalisers and signal handlers."""
        self._queue.put(task)

    def run_posted(self) -> None:
        """Run in this thread what waits; for callers that hold no lock."""
        while True:
            try:
                task = self._queue.get_nowait()
            except queue.Empty:
                return
            _run_contained(task)

    def finish_posted(self, timeout: float) -> bool:
        """Wait until everything that is posted now has run.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            Whether it has.
        """
        if not self.alive or threading.current_thread() is self._thread:
            self.run_posted()
            return True
        done = threading.Event()
        self._queue.put(done.set)
        return done.wait(timeout)

    def after_fork(self) -> None:
        """Start again in the child of a fork, where neither thread nor posted work belongs."""
        self._reset()

    def _run(self) -> None:
        while True:
            _run_contained(self._queue.get())


def _run_contained(task: Callable[[], None]) -> None:
    with guard.contained("worker"):
        task()


worker = Worker()
"""The process's one worker."""
