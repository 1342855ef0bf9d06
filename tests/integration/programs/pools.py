"""Run operations in the children of multiprocessing, started in several ways.

Arguments: what starts the children, and the start method. Writes how many operations there were
in the children, and each child's exit status where that can be had.
"""

import concurrent.futures
import multiprocessing
import os
import sys
import threading
import time

import periscope_otel as periscope


@periscope.monitored("work", feed="urlhaus")
def work(number=0):
    return number


def start():
    """Set up a child that inherits nothing."""
    periscope.configure()


def child(count):
    periscope.configure()
    for _ in range(count):
        work()


def child_that_waits(count, ready):
    child(count)
    ready.set()
    threading.Event().wait()


def processes(context):
    children = [context.Process(target=child, args=(count,)) for count in (3, 4, 0)]
    for one in children:
        one.start()
    for one in children:
        one.join()
    print(7, *(one.exitcode for one in children), flush=True)


def terminated(context):
    ready = context.Event()
    one = context.Process(target=child_that_waits, args=(5, ready))
    one.start()
    ready.wait()
    one.terminate()
    one.join()
    print(5, one.exitcode, flush=True)


def from_thread(context):
    thread = threading.Thread(target=processes, args=(context,))
    thread.start()
    thread.join()


def raw_from_thread(context):
    def fork():
        pid = os.fork()
        if pid == 0:
            child(5)
            os._exit(0 if periscope.shutdown().complete else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(5, status, flush=True)

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()


def pool(context):
    with context.Pool(2, initializer=start) as workers:
        workers.map(work, range(50), chunksize=1)
        workers.close()
        workers.join()
    print(50, flush=True)


def pool_ended_by_with(context):
    with context.Pool(2, initializer=start) as workers:  # the end of this block sends SIGTERM
        workers.map(work, range(50), chunksize=1)
    print(50, flush=True)


def executor(context):
    with concurrent.futures.ProcessPoolExecutor(2, context, initializer=start) as workers:
        list(workers.map(work, range(50)))
    print(50, flush=True)


if __name__ == "__main__":
    periscope.configure()
    work()
    stop = time.monotonic() + 0.05
    while time.monotonic() < stop:  # the parent has counts and a live connection of its own
        with periscope.operation("parent"):
            pass
    globals()[sys.argv[1]](multiprocessing.get_context(sys.argv[2]))
