"""The contracts of the worker: posted work runs, in order, without a lock where it is posted."""

from __future__ import annotations

import gc
import os
import threading

import pytest

from periscope_otel import guard
from periscope_otel.telemetry.worker import Worker


def test_posted_work_runs_in_order():
    """What is posted runs on the worker's thread, one after the other, in order."""
    worker, ran = Worker(), []
    worker.start()
    for number in range(100):
        worker.post(lambda number=number: ran.append((number, threading.current_thread().name)))
    assert worker.finish_posted(30)
    assert [number for number, _ in ran] == list(range(100))
    assert {name for _, name in ran} == {"periscope-worker"}


def test_without_a_thread_posted_work_waits():
    """A worker that was never started keeps what is posted until somebody runs it."""
    worker, ran = Worker(), []
    worker.post(lambda: ran.append(1))
    assert not worker.alive
    assert ran == []
    worker.run_posted()
    worker.run_posted()
    assert ran == [1]


def test_finish_runs_the_work_where_there_is_no_thread():
    """`finish_posted` of a worker without a thread runs the work in the caller."""
    worker, ran = Worker(), []
    worker.post(lambda: ran.append(threading.current_thread()))
    assert worker.finish_posted(0)
    assert ran == [threading.current_thread()]


def test_work_posted_before_the_start_runs_after_it():
    """Starting the worker runs what waited."""
    worker, done = Worker(), threading.Event()
    worker.post(done.set)
    worker.start()
    assert done.wait(30)


def test_start_is_idempotent():
    """Starting twice, also from several threads at once, starts one thread."""
    worker, names = Worker(), []
    starters = [threading.Thread(target=worker.start) for _ in range(16)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    for _ in range(50):
        worker.post(lambda: names.append(threading.get_ident()))
    assert worker.finish_posted(30)
    assert len(names) == 50
    assert len(set(names)) == 1


def test_finish_is_bounded():
    """`finish_posted` gives up when its time is over, and says so."""
    worker, release = Worker(), threading.Event()
    worker.start()
    worker.post(release.wait)
    assert worker.finish_posted(0) is False
    release.set()
    assert worker.finish_posted(30) is True


def test_finish_from_the_worker_itself_does_not_wait_for_itself():
    """A task that finishes what is posted runs it, and does not wait for its own end."""
    worker, ran, answers = Worker(), [], []
    worker.start()

    def task() -> None:
        worker.post(lambda: ran.append(1))
        answers.append(worker.finish_posted(30))
        answers.append(len(ran))

    worker.post(task)
    assert worker.finish_posted(30)
    assert answers == [True, 1]


def test_task_that_raises_ends_nothing():
    """A task that raises is contained and counted; the next one runs."""
    guard.set_strict(False)
    worker, ran = Worker(), []
    worker.start()

    def raising() -> None:
        raise ValueError("ours")

    worker.post(raising)
    worker.post(lambda: ran.append(1))
    assert worker.finish_posted(30)
    assert ran == [1]
    assert worker.alive
    assert sum(guard.counts().values()) == 1


def test_work_of_many_threads_all_runs():
    """Nothing that several threads post is lost."""
    worker, ran = Worker(), []
    worker.start()

    def post() -> None:
        for _ in range(500):
            worker.post(lambda: ran.append(1))

    threads = [threading.Thread(target=post) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worker.finish_posted(30)
    assert len(ran) == 4000


def test_posting_from_finalisers_is_safe():
    """Finalisers that run at any moment, also while the worker works, can post."""
    worker, ran = Worker(), []
    worker.start()

    class Dropped:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            worker.post(lambda: ran.append(1))

    for _ in range(2000):
        Dropped()
    gc.collect()
    assert worker.finish_posted(30)
    assert len(ran) == 2000


def test_after_fork_it_starts_again():
    """What was posted before a fork does not run in the child, and a new thread can be started."""
    worker, ran = Worker(), []
    worker.post(lambda: ran.append("parent's"))
    worker.after_fork()
    assert not worker.alive
    worker.run_posted()
    assert ran == []
    worker.start()
    worker.post(lambda: ran.append("child's"))
    assert worker.finish_posted(30)
    assert ran == ["child's"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_worker_of_a_real_child_works():
    """In a real forked child, with the parent's thread running, posted work runs."""
    worker = Worker()
    worker.start()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            worker.after_fork()
            worker.start()
            worker.post(lambda: os.write(writer, b"ran"))
            worker.finish_posted(30)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        assert answer.read() == b"ran"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
