"""Operations that fail, in all the ways in which a program may run them, and how it ends then."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
import threading

import patient  # noqa: F401  (for what importing it does)
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import periscope_otel as periscope


@periscope.monitored("store", feed="urlhaus", dead_letter=True)
def store(name: str) -> None:
    raise ValueError("no such column")


@periscope.monitored("fetch", feed="urlhaus", dead_letter="urgent")
async def fetch(name: str) -> None:
    raise TimeoutError("too slow")


def fail(name: str) -> None:
    with contextlib.suppress(ValueError):
        store(name)


async def fail_async(name: str) -> None:
    with contextlib.suppress(TimeoutError):
        await fetch(name)


def plain() -> None:
    fail("function")
    asyncio.run(fail_async("coroutine"))
    with periscope.operation("rows", dead_letter=True) as op:
        op.failed("item 1", ValueError("bad"))
        op.failed("item 2", ValueError("bad"))


def kill() -> None:
    plain()
    os.kill(os.getpid(), signal.SIGKILL)


def kill_coroutine() -> None:
    async def run() -> None:
        await asyncio.gather(*(fail_async(str(one)) for one in range(20)))
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(run())


def forks() -> None:
    """Fork with threads that fail, and fail in each child."""
    stop = threading.Event()
    failed = [0] * 3

    def go_on(number: int) -> None:
        while not stop.is_set():
            fail(f"thread {number} {failed[number]}")
            failed[number] += 1

    threads = [threading.Thread(target=go_on, args=(one,)) for one in range(3)]
    for one in threads:
        one.start()
    for number in range(10):
        pid = os.fork()
        if pid == 0:
            fail(f"child {number}")
            periscope.shutdown(20)  # where the file was busy for long it is in memory
            os._exit(0)
        os.waitpid(pid, 0)
    stop.set()
    for one in threads:
        one.join()
    print(sum(failed) + 10, flush=True)


def children() -> None:
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        with context.Pool(2) as pool:
            pool.map(fail, [f"{method} {one}" for one in range(5)])
            pool.close()
            pool.join()


def dropped() -> None:
    """End with a coroutine that nobody awaits any more, and no letter before."""

    @periscope.monitored("dropped", dead_letter=True)
    async def begin() -> None:
        periscope.current_operation().failed("item")
        await Never()

    coroutine = begin()
    coroutine.send(None)
    del coroutine


class Never:
    def __await__(self):
        yield


def figures() -> None:
    """Print how many letters a real reader is told of, until they are as many as they should be."""
    plain()
    while True:
        print(*_told(), flush=True)
        if sys.stdin.readline().strip() == "end":
            return


def _told() -> list[str]:
    data = reader.get_metrics_data()
    return [
        f"{metric.name}{sorted(map(str, point.attributes.values()))}={point.value:.0f}".replace(
            " ", ""
        )
        for one in data.resource_metrics
        for scope in one.scope_metrics
        for metric in scope.metrics
        if metric.name.startswith(("dead_letter", "periscope.outbox"))
        for point in metric.data.data_points
    ]


def late() -> None:
    """Ask for dead letters only after `configure()`."""
    with periscope.operation("rows", dead_letter="late") as op:
        op.failed("item")


def wait() -> None:
    plain()
    print("failed", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    what, folder, redis_url = (*sys.argv[1:], "", "")[:3]
    reader = InMemoryMetricReader()
    if folder:
        periscope.configure(
            data_dir=folder,
            redis_url=redis_url or None,
            # The SDK's own does not stand a fork while threads record.
            meter_provider=MeterProvider(metric_readers=[reader]) if what == "figures" else None,
        )
    globals()[what]()
