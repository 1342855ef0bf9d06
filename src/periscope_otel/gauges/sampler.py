"""One thread reads everything; whoever wants a figure gets what was read last.

A call into a GPU driver may hang for ever. The thread that made it is then left behind, and
another goes on without that part, until the call returns after all. Nobody ever waits for a
reading: not a callback, not the end of the process, and a fork only for a moment.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, NamedTuple, Protocol

from periscope_otel import guard
from periscope_otel.telemetry.export import ForkGate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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
LOOK_INTERVAL = 0.05
"""Seconds between two looks of somebody who waits for a reading."""
STOP_WAIT = 0.2
"""Seconds that the end waits at most for the reading that is under way."""


class Part(Protocol):
    """Something that the sampler reads."""

    name: str
    may_hang: bool
    """Whether to read it after the others, so that these have been read when it hangs."""

    def read(self, slow: bool) -> object:
        """Return an immutable reading.

        Args:
            slow: Whether what is slow to read, or slow to change, is due too.
        """
        ...

    def left_behind(self) -> object | None:
        """Return what is to be told while a reading hangs; None for nothing."""
        ...

    def close(self) -> None:
        """Let go of what it holds; called by the sampler's thread."""

    def after_fork(self) -> None:
        """Start anew in the child of a fork."""


class Reading(NamedTuple):
    """What one part said, and when on the sampler's clock."""

    said: object
    at: float


class Beat:
    """One thread's turn as the sampler."""

    def __init__(self) -> None:
        self.wake = threading.Event()
        self.stopping = False
        self.gate = ForkGate()
        self.thread: threading.Thread | None = None
        self.reading: tuple[str, float] | None = None
        """The part that is being read and since when."""
        self.left_behind = False


class Sampler:
    """Reads its parts every interval, in one daemon thread; for one start and one stop.

    Args:
        interval: Seconds between two readings.
        clock: Monotonic seconds.
    """

    def __init__(
        self, interval: float = INTERVAL, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.interval = interval
        self._clock = clock
        self._parts: dict[str, Part] = {}
        self._wanted = False
        self.readings = 0
        """How often everything was read, in this process."""
        self._reset()
        _samplers.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._published = threading.Condition()
        self._beat: Beat | None = None
        self._snapshot: Mapping[str, Reading] = {}
        self._hanging: frozenset[str] = frozenset()
        self._slow_due = 0.0
        self._forking: dict[int, ForkGate] = {}
        """The gates that forks have closed, by the thread that forks."""

    @property
    def patience(self) -> float:
        """Seconds after which a reading is too old, or taken to hang."""
        return max(STALE_AFTER * self.interval, LEAST_PATIENCE)

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        thread = None if self._beat is None else self._beat.thread
        return thread is not None and thread.is_alive()

    def add(self, part: Part) -> None:
        """Read `part` too from now on; does nothing if there is one of its name."""
        if part.name not in self._parts:
            parts = sorted([*self._parts.values(), part], key=lambda one: one.may_hang)
            self._parts = {one.name: one for one in parts}
            if self._beat is not None:
                self._beat.wake.set()

    @property
    def part_names(self) -> tuple[str, ...]:
        """What it reads."""
        return tuple(self._parts)

    @property
    def hanging(self) -> frozenset[str]:
        """What does not come back from being read."""
        return self._hanging

    def has(self, name: str) -> bool:
        """Whether there is a part of this name."""
        return name in self._parts

    def start(self) -> None:
        """Start the thread; does nothing where it runs already."""
        self._wanted = True
        with self._lock:
            if self._beat is None:
                self._start_beat()

    def stop(self, timeout: float = STOP_WAIT) -> bool:
        """End the thread after what it is reading.

        Args:
            timeout: Seconds to wait for that at most.

        Returns:
            Whether it has ended.
        """
        self._wanted = False
        with self._lock:
            beat, self._beat = self._beat, None
        if beat is None or beat.thread is None:
            return True
        beat.stopping = True
        beat.wake.set()
        if beat.thread is not threading.current_thread():
            beat.thread.join(timeout)
        return not beat.thread.is_alive()

    def latest(self, name: str) -> object | None:
        """Return what a part said last; None if it has not, or too long ago. Never waits."""
        beat = self._beat
        if beat is None:
            self._start_again()
        else:
            self._leave_what_hangs(beat)
        if name in self._hanging:
            part = self._parts.get(name)
            return None if part is None else part.left_behind()
        reading = self._snapshot.get(name)
        if reading is None or self._clock() - reading.at > self.patience:
            return None
        return reading.said

    def wait_for(self, name: str, timeout: float) -> object | None:
        """Return the same, waiting up to `timeout` seconds until there is something to tell."""
        deadline = time.monotonic() + timeout
        while (said := self.latest(name)) is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            with self._published:
                # No longer at once: it is looking that notices a reading that hangs.
                self._published.wait(min(remaining, LOOK_INTERVAL))
        return said

    def read_all(self, beat: Beat) -> None:
        """Read every part that does not hang, and publish each."""
        now = self._clock()
        slow = now >= self._slow_due
        if slow:
            self._slow_due = now + max(SLOW_INTERVAL, self.interval)
        for name, part in self._parts.items():
            if name in self._hanging:
                continue
            self._read(beat, name, part, slow)
            if beat.left_behind:
                self._came_back(name)
                return
        self.readings += 1

    def _read(self, beat: Beat, name: str, part: Part, slow: bool) -> None:
        with beat.gate:
            beat.reading = (name, self._clock())
            try:
                with guard.contained(f"reading {name} figures"):
                    said = part.read(slow)
                    if not beat.left_behind and not beat.stopping:
                        self._publish(name, Reading(said, self._clock()))
            finally:
                beat.reading = None

    def _publish(self, name: str, reading: Reading) -> None:
        with self._published:
            self._snapshot = {**self._snapshot, name: reading}
            self._published.notify_all()

    # The thread.

    def _start_beat(self) -> None:
        """Start a thread; the caller holds the lock."""
        beat = Beat()
        beat.thread = threading.Thread(
            target=self._run, args=(beat,), name="periscope-gauges", daemon=True
        )
        try:
            beat.thread.start()
        except RuntimeError:
            return  # the interpreter is ending
        self._beat = beat

    def _run(self, beat: Beat) -> None:
        pause = min(FIRST_PAUSE, self.interval)
        while not beat.stopping and not beat.left_behind:
            self.read_all(beat)
            beat.wake.wait(pause)
            beat.wake.clear()
            pause = self.interval
        if not beat.left_behind:
            for name, part in self._parts.items():
                if name not in self._hanging:  # where another thread is still inside
                    with guard.contained(f"closing {name} figures"):
                        part.close()

    def _start_again(self) -> None:
        """In the child of a fork: start the thread when somebody first wants a figure."""
        if self._wanted:
            with self._lock:
                if self._wanted and self._beat is None:
                    self._start_beat()

    def _leave_what_hangs(self, beat: Beat) -> None:
        reading = beat.reading
        if reading is None or self._clock() - reading[1] <= self.patience:
            return
        with self._lock:
            if self._beat is not beat or beat.reading != reading:
                return  # another thread was first, or it has just come back
            beat.left_behind = True
            self._hanging |= {reading[0]}
            self._start_beat()
        logger.warning(
            "reading the %s figures hangs since %.0f s: the thread that does is left behind, and "
            "figures of %s are absent until it comes back",
            reading[0],
            self._clock() - reading[1],
            reading[0],
        )

    def _came_back(self, name: str) -> None:
        with self._lock:
            self._hanging -= {name}
        logger.info("reading the %s figures works again", name)

    # Forks.

    def before_fork(self) -> None:
        """Let the reading that is under way end, unless it takes longer than a fork may wait."""
        beat = self._beat
        if beat is not None:
            reading = beat.reading
            since = self._clock() if reading is None else reading[1]
            self._forking[threading.get_ident()] = beat.gate
            beat.gate.before_fork(time.monotonic() + FORK_WAIT - (self._clock() - since))

    def after_fork_in_parent(self) -> None:
        """Let readings begin again."""
        gate = self._forking.pop(threading.get_ident(), None)
        if gate is not None:
            gate.after_fork_in_parent()

    def after_fork_in_child(self) -> None:
        """Forget the parent's thread and readings; one of its own starts when it is wanted."""
        self.readings = 0
        self._reset()
        for part in self._parts.values():
            with guard.contained(f"{part.name} figures after fork"):
                part.after_fork()


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
