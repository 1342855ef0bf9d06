"""Reads a source every few seconds, in a thread of its own; whoever wants a figure has the latest.

A call into a GPU driver, or to a file system whose server is away, may hang for ever. Nobody waits
for it: not a callback, not the end of the process, not another source, and a fork only for a
moment. What is known to hang is told as such, until the call returns after all.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import weakref
from typing import TYPE_CHECKING, NamedTuple, Protocol

from periscope_otel import guard
from periscope_otel.telemetry.export import ForkGate

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("periscope_otel")

INTERVAL = 5.0
"""Seconds between two readings."""
SLOW_INTERVAL = 30.0
"""Seconds between two readings of what is slow to read, or slow to change."""
FIRST_PAUSE = 1.0
"""Seconds after the first reading: what needs two readings is there soon."""
STALE_AFTER = 3
"""Intervals after which a reading is too old to be told, and one under way is taken to hang."""
LEAST_PATIENCE = 2.0
"""Seconds that are not too long in any case: a busy machine delays threads by as much."""
FORK_WAIT = 0.05
"""Seconds that a fork waits at most for the reading that is under way."""
LOOK_INTERVAL = 0.01
"""Seconds between two looks of somebody who waits for a reading."""
STOP_WAIT = 0.2
"""Seconds that the end waits at most for the reading that is under way."""
QUIET = 3600.0
"""Seconds for which it is not said again that a source hangs."""


class Source(Protocol):
    """Something that can be read. Its calls come from one thread at a time."""

    @property
    def name(self) -> str:
        """What it is called in log lines."""
        ...

    def read(self, slow: bool) -> object:
        """Return an immutable reading.

        Args:
            slow: Whether what is slow to read, or slow to change, is due too.
        """
        ...

    def left_behind(self) -> object | None:
        """Return what is to be told while a reading hangs; None for nothing. Any thread asks."""
        ...

    def close(self) -> None:
        """Let go of what it holds; it may be read again afterwards."""

    def after_fork(self) -> None:
        """Start anew in the child of a fork."""


class _Reading(NamedTuple):
    said: object
    at: float
    """When it came back, on the sampler's clock."""


class _Turn:
    """One thread's work."""

    def __init__(self) -> None:
        # A SimpleQueue, since a signal handler may put into it wherever its thread is.
        self.wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.gate = ForkGate()
        self.thread: threading.Thread | None = None
        self.has_begun = False
        """Set by the thread itself: one that does not run yet has not died."""
        self.reading_since: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether its thread has died, by an exception that nobody may contain."""
        thread = self.thread
        return self.has_begun and thread is not None and not thread.is_alive()


class Sampler:
    """Reads one source every interval while it is started, in a daemon thread.

    Args:
        source: What to read.
        interval: Seconds between two readings.
        clock: Monotonic seconds.
        is_wanted: Asked before each reading but the first; where it says no, the thread ends, until
            somebody starts the sampler or asks for the latest reading.
    """

    # No lock: a signal handler may start, ask and stop, and must not wait for a thread that itself
    # waits for what the interrupted code holds (that of `threading.Thread.start`, to name one).

    def __init__(
        self,
        source: Source,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self.source = source
        self._interval = interval
        self._clock = clock
        self._is_wanted = is_wanted
        self._started = False
        self._said_at: float | None = None
        self.readings = 0
        """How often the source was read, in this process."""
        self._reset()
        _samplers.add(self)

    def _reset(self) -> None:
        self._decider: dict[None, object] = {}
        """Who says which thread reads: one at a time, whoever came first by `dict.setdefault`."""
        self._turn: _Turn | None = None
        self._latest: _Reading | None = None
        self._slow_due = 0.0
        self._forking: dict[int, ForkGate] = {}
        """The gates that forks have closed, by the thread that forks."""
        self._told_hanging = False

    @property
    def interval(self) -> float:
        """Seconds between two readings."""
        return self._interval

    @interval.setter
    def interval(self, seconds: float) -> None:
        sooner = seconds < self._interval
        self._interval = seconds
        if sooner:
            self.wake()

    @property
    def patience(self) -> float:
        """Seconds after which a reading is too old, or taken to hang."""
        return max(STALE_AFTER * self._interval, LEAST_PATIENCE)

    @property
    def alive(self) -> bool:
        """Whether its thread runs and is to go on."""
        turn = self._turn
        thread = None if turn is None else turn.thread
        return self._started and thread is not None and thread.is_alive()

    @property
    def hangs(self) -> bool:
        """Whether a reading takes longer than it may."""
        turn = self._turn
        since = None if turn is None else turn.reading_since
        return since is not None and self._clock() - since > self.patience

    def start(self) -> None:
        """Read from now on; does nothing where that goes on already."""
        self._started = True
        while (turn := self._turn) is None or turn.is_over:
            mine = object()
            try:
                if self._decider.setdefault(None, mine) is not mine:
                    return  # another thread is here, or the code that a handler has interrupted
                if self._turn is turn:
                    self._begin()
                    return
            finally:
                self._leave_deciding(mine)

    def stop(self, timeout: float = STOP_WAIT) -> bool:
        """End the thread after what it is reading.

        Args:
            timeout: Seconds to wait for that at most.

        Returns:
            Whether it has ended.
        """
        self._started = False
        turn = self._turn
        self.wake()
        thread = None if turn is None else turn.thread
        if thread is None:
            return True
        try:
            thread.join(timeout)
        except RuntimeError:  # it ends as soon as it runs, or comes back from here
            return False
        return not thread.is_alive()

    def wake(self) -> None:
        """Have it read at once."""
        turn = self._turn
        if turn is not None:
            turn.wake.put(None)

    def latest(self) -> object | None:
        """Return what the source said last; None if it has not, or too long ago. Never waits."""
        if not self._started:
            return None
        turn = self._turn
        if turn is None or turn.is_over:  # in the child of a fork, or its thread has died
            self.start()
        if self.hangs:
            self._say_that_it_hangs()
            return self.source.left_behind()
        reading = self._latest
        if reading is None or self._clock() - reading.at > self.patience:
            return None
        return reading.said

    def wait(self, timeout: float) -> object | None:
        """Return the same, waiting up to `timeout` seconds until there is something to tell."""
        deadline = time.monotonic() + timeout
        while (said := self.latest()) is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            time.sleep(min(remaining, LOOK_INTERVAL))
        return said

    # The thread.

    def _begin(self) -> None:
        """Start a thread; the caller decides alone."""
        turn = _Turn()
        turn.thread = threading.Thread(
            target=self._run, args=(turn,), name=f"periscope-{self.source.name}", daemon=True
        )
        self._turn = turn
        try:
            turn.thread.start()
        except RuntimeError:  # no more threads, or the interpreter is ending
            self._turn = None
        except BaseException:  # Ctrl-C: nobody knows whether it runs
            self._turn = None
            raise

    def _leave_deciding(self, mine: object) -> None:
        if self._decider.get(None) is mine:
            del self._decider[None]

    def _run(self, turn: _Turn) -> None:
        turn.has_begun = True
        pause = min(FIRST_PAUSE, self._interval)
        while self._turn is turn:
            self.read_once(turn)
            _wait(turn.wake, pause)
            if self._ends(turn):
                return
            pause = self._interval

    def read_once(self, turn: _Turn) -> None:
        """Read the source, and keep what it says."""
        began = self._clock()
        slow = began >= self._slow_due
        if slow:
            self._slow_due = began + max(SLOW_INTERVAL, self._interval)
        name = self.source.name
        with turn.gate:
            turn.reading_since = began
            try:
                with guard.contained(f"reading {name} figures"):
                    said = self.source.read(slow)
                    self._latest = _Reading(said, self._clock())
            finally:
                turn.reading_since = None
        self.readings += 1
        if self._told_hanging:
            self._told_hanging = False
            if self._started:
                logger.info("reading the %s figures works again", name)

    def _ends(self, turn: _Turn) -> bool:
        """Whether nobody wants more; the source is closed then."""
        if self._goes_on():
            return False
        self._latest = None
        self._close_source(turn)
        if self._goes_on():
            return False
        if self._turn is turn:
            self._turn = None  # from here on whoever starts it begins another thread
        return not (self._goes_on() and self._takes_up(turn))

    def _goes_on(self) -> bool:
        return self._started and self._is_wanted()

    def _takes_up(self, turn: _Turn) -> bool:
        """Have a thread go on that was no longer the one that reads, unless another one is."""
        mine = object()
        try:
            if self._decider.setdefault(None, mine) is not mine:
                return False
            if self._turn is None:
                self._turn = turn
            return self._turn is turn
        finally:
            self._leave_deciding(mine)

    def _close_source(self, turn: _Turn) -> None:
        self._slow_due = 0.0
        turn.reading_since = self._clock()  # it may hang as well
        try:
            with guard.contained(f"closing {self.source.name} figures"):
                self.source.close()
        finally:
            turn.reading_since = None

    def _say_that_it_hangs(self) -> None:
        now = self._clock()
        if self._told_hanging:
            return
        self._told_hanging = True
        if self._said_at is None or now - self._said_at >= QUIET:
            self._said_at = now
            logger.warning(
                "reading the %s figures has not come back for %.0f s: they are absent until it "
                "does, and it is not waited for",
                self.source.name,
                self.patience,
            )

    # Forks.

    def before_fork(self) -> None:
        """Let the reading that is under way end, unless it takes longer than a fork may wait."""
        turn = self._turn
        if turn is not None:
            since = turn.reading_since
            taken = 0.0 if since is None else self._clock() - since
            self._forking[threading.get_ident()] = turn.gate
            turn.gate.before_fork(time.monotonic() + FORK_WAIT - taken)

    def after_fork_in_parent(self) -> None:
        """Let readings begin again."""
        gate = self._forking.pop(threading.get_ident(), None)
        if gate is not None:
            gate.after_fork_in_parent()

    def after_fork_in_child(self) -> None:
        """Forget the parent's thread and readings; one of its own starts when it is wanted."""
        self.readings = 0
        self._said_at = None
        self._reset()
        with guard.contained(f"{self.source.name} figures after fork"):
            self.source.after_fork()


def _wait(wake: queue.SimpleQueue[None], seconds: float) -> None:
    """Wait until somebody wakes the thread, and take all that woke it since."""
    try:
        wake.get(timeout=seconds)
        while True:
            wake.get_nowait()
    except queue.Empty:
        return


_samplers: weakref.WeakSet[Sampler] = weakref.WeakSet()


def _before_fork() -> None:
    for sampler in list(_samplers):
        sampler.before_fork()


def _after_fork_in_parent() -> None:
    for sampler in list(_samplers):
        sampler.after_fork_in_parent()


def _after_fork_in_child() -> None:
    for sampler in list(_samplers):
        sampler.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
