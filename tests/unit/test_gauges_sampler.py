"""The sampler: one thread that reads, and never keeps anybody waiting."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from periscope_otel import guard
from periscope_otel.gauges.sampler import FORK_WAIT, SLOW_INTERVAL, Beat, Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Part:
    """Counts its readings, and hangs or fails when told to."""

    def __init__(self, name: str = "host", *, may_hang: bool = False) -> None:
        self.name = name
        self.may_hang = may_hang
        self.readings: list[bool] = []
        self.error: Exception | None = None
        self.free = threading.Event()
        self.free.set()
        self.inside = threading.Event()
        self.closed = 0
        self.forks = 0

    def read(self, slow: bool) -> object:
        self.readings.append(slow)
        self.inside.set()
        self.free.wait(30)
        if self.error is not None:
            raise self.error
        return f"{self.name} {len(self.readings)}"

    def left_behind(self) -> object:
        return f"{self.name} hangs"

    def close(self) -> None:
        self.closed += 1

    def after_fork(self) -> None:
        self.forks += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sampler(clock: Clock) -> Iterator[Sampler]:
    made = Sampler(interval=5.0, clock=clock)
    yield made
    made.stop(10)


def wait_until(condition: Any) -> None:
    pause = threading.Event()
    for _ in range(2000):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it did not come to be")


def test_what_was_read_last_is_told(sampler):
    """A figure is the one of the last reading, however often it is asked for."""
    part = Part()
    sampler.add(part)
    beat = Beat()
    assert sampler.latest("host") is None
    sampler.read_all(beat)
    assert [sampler.latest("host") for _ in range(3)] == ["host 1"] * 3
    sampler.read_all(beat)
    assert sampler.latest("host") == "host 2"
    assert len(part.readings) == 2


def test_a_reading_that_is_too_old_is_not_told(sampler, clock):
    """A reading older than three intervals is no figure any more."""
    sampler.add(Part())
    sampler.read_all(Beat())
    clock.now += 15.0
    assert sampler.latest("host") == "host 1"
    clock.now += 0.1
    assert sampler.latest("host") is None


def test_short_intervals_do_not_make_impatient(sampler, clock):
    """With a short interval a reading is good for two seconds: a busy machine delays threads."""
    sampler.interval = 0.1
    sampler.add(Part())
    sampler.read_all(Beat())
    clock.now += 1.9
    assert sampler.latest("host") == "host 1"
    clock.now += 0.2
    assert sampler.latest("host") is None


def test_slow_figures_are_due_less_often(sampler, clock):
    """The first reading is a slow one, and after that one every 30 seconds."""
    part = Part()
    sampler.add(part)
    for _ in range(14):
        sampler.read_all(Beat())
        clock.now += 5.0
    assert [index for index, slow in enumerate(part.readings) if slow] == [0, 6, 12]
    assert SLOW_INTERVAL == 30.0


def test_what_may_hang_is_read_last(sampler):
    """A part that may hang is read after the others, whichever was added first."""
    order: list[str] = []
    for name, may_hang in (("gpu", True), ("host", False)):
        part = Part(name, may_hang=may_hang)
        part.read = lambda _slow, name=name: order.append(name)
        sampler.add(part)
    sampler.read_all(Beat())
    assert order == ["host", "gpu"]


def test_one_failing_part_does_not_cost_the_others(sampler, caplog):
    """A part that raises is reported; its figure grows old, and those of others are new."""
    guard.set_strict(False)
    bad, good = Part("bad"), Part("good")
    bad.error = RuntimeError("psutil")
    sampler.add(bad)
    sampler.add(good)
    sampler.read_all(Beat())
    assert sampler.latest("bad") is None
    assert sampler.latest("good") == "good 1"
    assert guard.counts() == {"reading bad figures": 1}


def test_the_thread_reads_and_ends(sampler):
    """The thread is a daemon, reads at once, and ends when it is stopped, closing its parts."""
    part = Part()
    sampler.add(part)
    sampler.start()
    thread = sampler._beat.thread
    assert thread.daemon
    assert sampler.wait_for("host", 10) == "host 1"
    sampler.start()
    assert sampler._beat.thread is thread
    assert sampler.stop(10)
    assert not thread.is_alive()
    assert part.closed == 1


def test_a_part_that_is_added_later_is_read_at_once(sampler):
    """A part that is added to a running sampler does not wait for the next beat."""
    sampler.add(Part("host"))
    sampler.start()
    sampler.wait_for("host", 10)
    sampler.add(Part("gpu"))
    assert sampler.wait_for("gpu", 10) == "gpu 1"


def test_waiting_for_a_reading_ends(sampler):
    """Where no reading comes, waiting for one ends in time with nothing."""
    assert sampler.wait_for("host", 0.0) is None


@pytest.fixture
def hanging(sampler, clock) -> Part:
    """A GPU part that hangs in a running sampler, beside a host part that does not."""
    part = Part("gpu", may_hang=True)
    sampler.add(part)
    sampler.add(Part("host"))
    part.free.clear()
    sampler.start()
    assert part.inside.wait(10)
    yield part
    part.free.set()


def test_a_reading_that_hangs_is_left_behind(sampler, clock, hanging, caplog):
    """After three intervals a reading is taken to hang: told, logged once, and gone on without."""
    caplog.set_level(logging.INFO, "periscope_otel")
    first = sampler._beat
    clock.now += 15.0
    assert sampler.latest("gpu") is None
    assert caplog.messages == []
    clock.now += 0.1
    assert sampler.latest("gpu") == "gpu hangs"
    wait_until(lambda: sampler.latest("host") == "host 2")
    assert [sampler.latest("gpu") for _ in range(5)] == ["gpu hangs"] * 5
    assert len(caplog.messages) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert "reading the gpu figures hangs" in caplog.messages[0]
    assert first.thread.is_alive()
    assert hanging.readings == [True]


def test_a_reading_that_comes_back_is_taken_up_again(sampler, clock, hanging, caplog):
    """Once the call that hung returns, its thread ends, and the part is read again."""
    caplog.set_level(logging.INFO, "periscope_otel")
    first = sampler._beat
    clock.now += 16.0
    assert sampler.latest("gpu") == "gpu hangs"
    hanging.free.set()
    first.thread.join(10)
    assert not first.thread.is_alive()
    sampler._beat.wake.set()
    assert sampler.wait_for("gpu", 10) == "gpu 2"
    assert caplog.messages[-1] == "reading the gpu figures works again"


def test_the_end_does_not_wait_for_what_hangs(sampler, hanging):
    """Stopping waits a moment for a reading that hangs, and no longer."""
    assert not sampler.stop(0.01)
    hanging.free.set()


def test_a_part_that_hangs_is_not_closed(sampler, clock, hanging):
    """At the end a part in which another thread still hangs is left alone, the others closed."""
    clock.now += 16.0
    sampler.latest("gpu")
    wait_until(lambda: sampler.latest("host") == "host 2")
    assert sampler.stop(10)
    assert hanging.closed == 0
    assert sampler._parts["host"].closed == 1


def test_a_fork_does_not_wait_for_what_hangs(sampler, clock, hanging):
    """A fork waits a moment for a reading, and not at all for one that has taken longer."""
    clock.now += FORK_WAIT
    gate = sampler._beat.gate
    sampler.before_fork()
    assert not gate.child_is_safe
    sampler.after_fork_in_parent()


def test_a_fork_waits_for_a_reading_that_ends(sampler):
    """While a process forks no reading begins, and one begins again afterwards."""
    part = Part()
    sampler.add(part)
    sampler.start()
    sampler.wait_for("host", 10)
    gate = sampler._beat.gate
    sampler.before_fork()
    assert gate.child_is_safe
    sampler._beat.wake.set()
    threading.Event().wait(0.05)
    assert len(part.readings) == 1
    sampler.after_fork_in_parent()
    wait_until(lambda: len(part.readings) == 2)


def test_the_child_of_a_fork_samples_for_itself(sampler):
    """A child has no reading of its parent's, and one of its own once somebody asked."""
    part = Part()
    sampler.add(part)
    sampler.start()
    sampler.wait_for("host", 10)
    sampler.after_fork_in_child()  # as the hook does, in a process whose thread is gone
    assert part.forks == 1
    assert not sampler.alive
    part.free.clear()
    assert sampler.latest("host") is None
    assert sampler.alive
    part.free.set()
    assert sampler.wait_for("host", 10) == "host 2"


def test_a_stopped_sampler_is_not_started_by_asking(sampler):
    """Once it is stopped, asking for a figure starts no thread."""
    sampler.add(Part())
    sampler.start()
    sampler.stop(10)
    sampler.latest("host")
    assert not sampler.alive


def test_at_the_end_of_the_interpreter_no_thread_is_no_error(sampler, monkeypatch):
    """Where no thread can be started any more there are no figures, and no error."""
    sampler.add(Part())

    def refuse(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    sampler.start()
    assert sampler.latest("host") is None


FORK = """
import os
from periscope_otel.gauges.sampler import Sampler
class Part:
    name, may_hang, forks = "host", False, 0
    def read(self, slow): return os.getpid()
    def close(self): pass
    def after_fork(self): self.forks += 1
part, sampler = Part(), Sampler()
sampler.add(part)
sampler.start()
assert sampler.wait_for("host", 10) == os.getpid()
pid = os.fork()
if pid == 0:
    assert (part.forks, sampler.readings, sampler.alive) == (1, 0, False)
    sampler.latest("host")
    assert sampler.wait_for("host", 10) == os.getpid()
    os._exit(7)
assert (part.forks, sampler.alive) == (0, True)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
"""


def test_hooks_are_registered_for_forks():
    """A real fork calls the hooks: the child begins anew, and its parent goes on."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)
