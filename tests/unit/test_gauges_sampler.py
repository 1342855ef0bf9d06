"""The sampler: a thread that reads, and never keeps anybody waiting."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from periscope_otel import guard
from periscope_otel.gauges import sampler as module
from periscope_otel.gauges.sampler import FORK_WAIT, QUIET, SLOW_INTERVAL, Sampler, _Turn

if TYPE_CHECKING:
    from collections.abc import Iterator


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Source:
    """Counts its readings, and hangs or fails when told to."""

    name = "gpu"

    def __init__(self) -> None:
        self.readings: list[bool] = []
        self.error: BaseException | None = None
        self.free = threading.Event()
        self.free.set()
        self.inside = threading.Event()
        self.close_free = threading.Event()
        self.close_free.set()
        self.closed = 0
        self.forks = 0

    def read(self, slow: bool) -> object:
        self.readings.append(slow)
        self.inside.set()
        self.free.wait(60)
        if self.error is not None:
            raise self.error
        return f"reading {len(self.readings)}"

    def left_behind(self) -> object:
        return "hangs"

    def close(self) -> None:
        self.closed += 1
        self.close_free.wait(60)

    def after_fork(self) -> None:
        self.forks += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def nothing_is_read_by_itself(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After the first reading the thread reads when it is woken: real seconds mean nothing here."""
    wait, waited_for = module._wait, []

    def wait_for_somebody(wake: Any, _seconds: float) -> None:
        waited_for.append(wake)
        wait(wake, 3600.0)

    monkeypatch.setattr(module, "_wait", wait_for_somebody)
    yield
    for wake in waited_for:
        wake.put(None)  # also for a thread of which its sampler knows nothing any more


@pytest.fixture
def source() -> Iterator[Source]:
    made = Source()
    yield made
    made.free.set()
    made.close_free.set()


@pytest.fixture
def sampler(source: Source, clock: Clock) -> Iterator[Sampler]:
    made = Sampler(source, interval=5.0, clock=clock)
    yield made
    source.free.set()
    source.close_free.set()
    assert made.stop(30)


@pytest.fixture
def started(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sampler]:
    """A sampler that counts as started, whose readings the test makes itself."""
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda _self: None)
        sampler.start()
    yield sampler
    sampler._turn = None


def wait_until(condition: Any) -> None:
    pause = threading.Event()
    for _ in range(6000):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it did not come to be")


def test_what_was_read_last_is_told(started, source):
    """A figure is the one of the last reading, however often it is asked for."""
    assert started.latest() is None
    started.read_once(_Turn())
    assert [started.latest() for _ in range(3)] == ["reading 1"] * 3
    started.read_once(_Turn())
    assert started.latest() == "reading 2"
    assert len(source.readings) == 2


def test_a_reading_that_is_too_old_is_not_told(started, clock):
    """A reading older than three intervals is no figure any more."""
    started.read_once(_Turn())
    clock.now += 15.0
    assert started.latest() == "reading 1"
    clock.now += 0.1
    assert started.latest() is None


def test_short_intervals_do_not_make_impatient(started, clock):
    """With a short interval a reading is good for two seconds: a busy machine delays threads."""
    started.interval = 0.1
    started.read_once(_Turn())
    clock.now += 1.9
    assert started.latest() == "reading 1"
    clock.now += 0.2
    assert started.latest() is None


def test_slow_figures_are_due_less_often(started, source, clock):
    """The first reading is a slow one, and after that one every 30 seconds."""
    for _ in range(14):
        started.read_once(_Turn())
        clock.now += 5.0
    assert [index for index, slow in enumerate(source.readings) if slow] == [0, 6, 12]
    assert SLOW_INTERVAL == 30.0


def test_a_source_that_fails_is_reported(started, source, clock):
    """Its figure grows old, and is new again once it can be read."""
    guard.set_strict(False)
    source.error = RuntimeError("psutil")
    started.read_once(_Turn())
    assert started.latest() is None
    assert guard.counts() == {"reading gpu figures": 1}
    source.error = None
    started.read_once(_Turn())
    assert started.latest() == "reading 2"


def test_the_thread_reads_and_ends(sampler, source):
    """The thread is a daemon, reads at once, and ends when it is stopped, closing the source."""
    sampler.start()
    thread = sampler._turn.thread
    assert thread.daemon
    assert sampler.wait(30) == "reading 1"
    sampler.start()
    assert sampler._turn.thread is thread
    assert sampler.stop(30)
    assert not thread.is_alive()
    assert source.closed == 1
    assert sampler.latest() is None


def test_it_can_be_started_again(sampler, source):
    """With a new thread, and a reading of everything."""
    for number in (1, 2, 3):
        sampler.start()
        assert sampler.wait(30) == f"reading {number}"
        assert sampler.stop(30)
    assert source.readings == [True] * 3
    assert source.closed == 3


def test_a_start_while_it_ends_goes_on_reading(sampler, source):
    """Whoever starts it while the source is being closed has it read on, by one thread."""
    sampler.start()
    assert sampler.wait(30) == "reading 1"
    source.close_free.clear()
    assert not sampler.stop(0.0)
    wait_until(lambda: source.closed == 1)
    thread = sampler._turn.thread
    sampler.start()
    source.close_free.set()
    assert sampler.wait(30) == "reading 2"
    assert sampler._turn.thread is thread


def test_a_shorter_interval_counts_at_once(sampler, source):
    """The thread does not sleep the longer one out."""
    sampler.interval = 3600.0  # and so long is the pause after the first reading here
    sampler.start()
    wait_until(lambda: len(source.readings) == 1)
    sampler.interval = 1800.0
    wait_until(lambda: len(source.readings) == 2)


def test_it_ends_where_nobody_wants_it(source, clock):
    """Asked before each reading, the thread ends and the source is closed; it may begin again."""
    wanted = True
    sampler = Sampler(source, clock=clock, is_wanted=lambda: wanted)
    sampler.start()
    assert sampler.wait(30) == "reading 1"
    thread = sampler._turn.thread
    wanted = False
    sampler.wake()
    thread.join(30)
    assert (thread.is_alive(), source.closed, sampler.alive) == (False, 1, False)
    wanted = True
    sampler.start()
    assert sampler.wait(30) == "reading 2"
    assert sampler.stop(30)


def test_waiting_for_a_reading_ends(sampler):
    """Where no reading comes, waiting for one ends in time with nothing."""
    assert sampler.wait(0.0) is None


@pytest.fixture
def hanging(sampler: Sampler, source: Source) -> Source:
    """A source that hangs in a running sampler."""
    source.free.clear()
    sampler.start()
    assert source.inside.wait(30)
    return source


def test_a_reading_that_hangs_is_told_of(sampler, clock, hanging, caplog):
    """After three intervals a reading is taken to hang: told as such, and logged once."""
    caplog.set_level(logging.INFO, "periscope_otel")
    clock.now += 15.0
    assert sampler.latest() is None
    assert (sampler.hangs, caplog.messages) == (False, [])
    clock.now += 0.1
    assert [sampler.latest() for _ in range(5)] == ["hangs"] * 5
    assert sampler.hangs
    assert len(caplog.messages) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert "reading the gpu figures has not come back for 15 s" in caplog.messages[0]
    assert hanging.readings == [True]


def test_a_reading_that_comes_back_is_told(sampler, clock, hanging, caplog):
    """What a slow driver says in the end is what it has said last, and it is asked again."""
    caplog.set_level(logging.INFO, "periscope_otel")
    clock.now += 16.0
    assert sampler.latest() == "hangs"
    hanging.free.set()
    wait_until(lambda: sampler.latest() == "reading 1")
    wait_until(lambda: caplog.messages[-1] == "reading the gpu figures works again")
    sampler.wake()
    wait_until(lambda: sampler.latest() == "reading 2")


def test_a_source_that_is_slow_again_and_again_is_no_news(started, source, clock, caplog):
    """That it hangs is said once an hour at most."""
    caplog.set_level(logging.WARNING, "periscope_otel")
    turn = started._turn
    for _ in range(20):
        turn.reading_since = clock.now
        clock.now += 16.0
        assert started.latest() == "hangs"
        started.read_once(turn)
        assert started.latest() is not None
    assert len(caplog.messages) == 1
    clock.now += QUIET
    turn.reading_since = clock.now - 16.0
    assert started.latest() == "hangs"
    assert len(caplog.messages) == 2


def test_the_end_does_not_wait_for_what_hangs(sampler, hanging, caplog):
    """Stopping waits a moment; what comes back then is closed, and no news."""
    caplog.set_level(logging.INFO, "periscope_otel")
    assert not sampler.stop(0.01)
    assert hanging.closed == 0
    thread = sampler._turn.thread
    hanging.free.set()
    thread.join(30)
    assert hanging.closed == 1
    assert caplog.messages == []


def test_a_hang_in_closing_is_told_of(sampler, source, clock):
    """A source that does not come back from being closed hangs, for whoever starts it again."""
    sampler.start()
    assert sampler.wait(30) == "reading 1"
    source.close_free.clear()
    assert not sampler.stop(0.0)
    wait_until(lambda: source.closed == 1)
    sampler.start()
    clock.now += 16.0
    assert sampler.latest() == "hangs"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_has_died_is_replaced(sampler, source):
    """Whatever ended it, the next who asks has another one started."""
    source.error = SystemExit()
    sampler.start()
    wait_until(lambda: not sampler.alive)
    source.error = None
    assert sampler.wait(30) == "reading 2"


def test_where_no_thread_can_be_started_the_next_who_asks_tries_again(sampler, monkeypatch):
    """There are no figures then, and no error; as at the end of the interpreter."""

    def refuse(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        sampler.start()
        assert sampler.latest() is None
    assert sampler.wait(30) == "reading 1"


def test_a_fork_does_not_wait_for_what_hangs(sampler, clock, hanging):
    """A fork waits a moment for a reading, and not at all for one that has taken longer."""
    clock.now += FORK_WAIT
    gate = sampler._turn.gate
    sampler.before_fork()
    assert not gate.child_is_safe
    sampler.after_fork_in_parent()


def test_a_fork_waits_for_a_reading_that_ends(sampler, source):
    """While a process forks no reading begins, and one begins again afterwards."""
    sampler.start()
    wait_until(lambda: sampler.readings == 1)  # the gate is open again
    gate = sampler._turn.gate
    sampler.before_fork()
    assert gate.child_is_safe
    sampler.wake()
    threading.Event().wait(0.05)
    assert len(source.readings) == 1
    sampler.after_fork_in_parent()
    wait_until(lambda: len(source.readings) == 2)


def test_the_child_of_a_fork_samples_for_itself(sampler, source):
    """A child has no reading of its parent's, and one of its own once somebody asked."""
    sampler.start()
    sampler.wait(30)
    parents = sampler._turn
    sampler.after_fork_in_child()  # as the hook does, in a process whose thread is gone
    assert source.forks == 1
    assert not sampler.alive
    source.free.clear()
    assert sampler.latest() is None
    assert sampler.alive
    source.free.set()
    assert sampler.wait(30) == "reading 2"
    assert sampler.stop(30)
    assert parents.thread.is_alive()  # in a test it is not gone
    parents.wake.put(None)
    parents.thread.join(30)
    assert not parents.thread.is_alive()


def test_a_stopped_sampler_is_not_started_by_asking(sampler):
    """Once it is stopped, asking for a figure starts no thread."""
    sampler.start()
    sampler.stop(30)
    sampler.latest()
    assert not sampler.alive


INTERRUPTED = """
import signal
import threading
import time
from periscope_otel.gauges.sampler import Sampler

class Source:
    name, at_once, most = "host", 0, 0
    def read(self, slow):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.at_once -= 1
        return "reading"
    def left_behind(self): return None
    def close(self): pass
    def after_fork(self): pass

source = Source()
sampler = Sampler(source)
calls = inside = 0

def handle(_number, _frame):
    global calls, inside
    calls += 1
    if inside > 9:  # where one takes longer than the timer it is interrupted without an end
        return
    inside += 1
    sampler.start()
    sampler.latest()
    if calls % 7 == 0:
        sampler.stop(0.0)
    inside -= 1

signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
while calls < 2000:
    sampler.start()
    sampler.latest()
    sampler.stop(0.0)
signal.setitimer(signal.ITIMER_REAL, 0)
sampler.start()
assert sampler.wait(30) == "reading"
assert source.most == 1
deadline = time.monotonic() + 30
while threading.active_count() != 2:  # others are about to end
    assert time.monotonic() < deadline, threading.enumerate()
assert sampler.stop(30)
"""


@pytest.mark.usefixtures("uncovered")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signals by a timer")
def test_a_signal_handler_may_ask_and_stop_whatever_it_interrupts():
    """It waits for nobody, raises nothing, and one thread reads in the end."""
    subprocess.run([sys.executable, "-c", INTERRUPTED], check=True, timeout=120)


def test_nobody_waits_for_a_thread_that_starts_it(sampler, monkeypatch):
    """A handler would for ever, where that thread itself needs what the interrupted code holds."""
    begin, entered, free = sampler._begin, threading.Event(), threading.Event()

    def held_up() -> None:
        entered.set()
        free.wait(60)
        begin()

    monkeypatch.setattr(sampler, "_begin", held_up)
    other = threading.Thread(target=sampler.start)
    other.start()
    assert entered.wait(30)
    sampler.start()
    assert sampler.latest() is None
    assert sampler.stop(30)
    assert (other.is_alive(), sampler._turn) == (True, None)
    sampler.start()
    free.set()
    other.join(30)
    assert sampler.wait(30) == "reading 1"


def test_a_signal_handler_that_stops_a_thread_as_it_is_started_raises_nothing(sampler, monkeypatch):
    """The thread ends after its first reading."""
    start, stopped, threads = threading.Thread.start, [], []

    def interrupted(thread: threading.Thread) -> None:
        threads.append(thread)
        stopped.append(sampler.stop(30))  # as a handler does
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        sampler.start()
    threads[0].join(30)
    assert (stopped, threads[0].is_alive(), sampler.alive) == ([False], False, False)


def test_after_ctrl_c_while_its_thread_is_started_one_thread_reads(sampler, monkeypatch):
    """The next who asks has one started; one that nobody knows of ends."""
    start, started = threading.Thread.start, []

    def interrupted(thread: threading.Thread) -> None:
        started.append(thread)
        start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sampler.start()
    assert sampler.wait(30) is not None
    assert sampler._turn.thread is not started[0]


def test_a_signal_handler_that_interrupts_a_start_starts_no_second_thread(sampler, monkeypatch):
    """Wherever it comes: one thread reads."""
    begin, begun = sampler._begin, []

    def interrupted() -> None:
        begun.append(len(begun))
        if len(begun) == 1:
            sampler.start()  # as a handler does
        begin()

    monkeypatch.setattr(sampler, "_begin", interrupted)
    sampler.start()
    assert begun == [0]
    assert sampler.wait(30) is not None


FORK = """
import os
from periscope_otel.gauges.sampler import Sampler
class Source:
    name, forks = "host", 0
    def read(self, slow): return os.getpid()
    def close(self): pass
    def after_fork(self): self.forks += 1
source = Source()
sampler = Sampler(source)
sampler.start()
assert sampler.wait(30) == os.getpid()
pid = os.fork()
if pid == 0:
    assert (source.forks, sampler.readings, sampler.alive) == (1, 0, False)
    assert sampler.wait(30) == os.getpid()
    os._exit(7)
assert (source.forks, sampler.alive) == (0, True)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("uncovered")
def test_hooks_are_registered_for_forks():
    """A real fork calls the hooks: the child begins anew, and its parent goes on."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)
