"""What type checkers must make of the public API; checked by mypy --strict and pyright, never run.

A comment that ignores an error is a claim too: there both must refuse, or they call it unused.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
)
from typing import Any, ParamSpec, TypeVar, assert_type

from opentelemetry.trace import Span, SpanKind

import periscope_otel as periscope
from periscope_otel.dead_letter import Letter
from periscope_otel.gauges import Gauges, GpuStats, SystemStats, get_gpu_stats, get_system_stats
from periscope_otel.patching import Patch
from periscope_otel.resilience.budget import RetryBudget, budget_of
from periscope_otel.resilience.retry import Retry, RetryDetails
from periscope_otel.testing import CapturedTelemetry, capture_telemetry

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# --- functions -----------------------------------------------------------------------------------


@periscope.monitored
def bare(url: str, *, limit: int = 5) -> list[str]:
    return [url] * limit


@periscope.monitored()
def called(url: str) -> int:
    return len(url)


@periscope.monitored("named")
def named(url: str) -> int:
    return len(url)


@periscope.monitored(
    "full",
    feed=lambda args: args["url"],
    breaker=lambda args: args["url"],
    kind=SpanKind.CLIENT,
    attributes={"peer": "x", "number": 1, "many": ["a", "b"]},
    result=lambda value: value is None,
)
def full(url: str) -> bytes | None:
    return url.encode()


@periscope.monitored(name=lambda args: args["kind"], feed="urlhaus", breaker="urlhaus.abuse.ch")
def generic(kind: str, items: Iterable[T]) -> list[T]:
    return list(items)


assert_type(bare("u", limit=3), list[str])
assert_type(called("u"), int)
assert_type(named("u"), int)
assert_type(full("u"), bytes | None)
assert_type(generic("k", [1]), list[int])
assert_type(periscope.monitored(len)("text"), int)

bare(1)  # type: ignore[arg-type]
bare("u", 3)  # type: ignore[call-arg]
named()  # type: ignore[call-arg]


# --- coroutines and generators -------------------------------------------------------------------


@periscope.monitored
async def coroutine(url: str) -> bytes:
    return url.encode()


@periscope.monitored("generator")
def generator(count: int) -> Generator[int, str, bool]:
    sent = yield count
    return bool(sent)


@periscope.monitored
def iterator(count: int) -> Iterator[int]:
    yield count


@periscope.monitored("async generator", feed="misp")
async def async_generator(count: int) -> AsyncGenerator[int, str]:
    yield count


@periscope.monitored
async def async_iterator(count: int) -> AsyncIterator[int]:
    yield count


made: Coroutine[Any, Any, bytes] = coroutine("u")
assert_type(generator(1), Generator[int, str, bool])
assert_type(generator(1).send("x"), int)
assert_type(iterator(1), Iterator[int])
assert_type(async_generator(1), AsyncGenerator[int, str])
assert_type(async_iterator(1), AsyncIterator[int])


async def use_async() -> None:
    assert_type(await coroutine("u"), bytes)
    assert_type(await async_generator(1).asend("x"), int)
    async for one in async_iterator(1):
        assert_type(one, int)


# --- methods -------------------------------------------------------------------------------------


class Client:
    @periscope.monitored
    def method(self, text: str) -> int:
        return len(text)

    @periscope.monitored("amethod")
    async def amethod(self, text: str) -> int:
        return len(text)

    @periscope.monitored("rows")
    def rows(self) -> Iterator[str]:
        yield ""

    @periscope.monitored("outer class")
    @classmethod
    def outer_class(cls, text: str) -> int:
        return len(text)

    @classmethod
    @periscope.monitored("inner class")
    def inner_class(cls, text: str) -> int:
        return len(text)

    @periscope.monitored
    @staticmethod
    def outer_static(text: str) -> int:
        return len(text)

    @staticmethod
    @periscope.monitored
    def inner_static(text: str) -> int:
        return len(text)

    @property
    @periscope.monitored("prop")
    def prop(self) -> int:
        return 1


class Sub(Client):
    pass


async def use_methods(client: Client, sub: Sub) -> None:
    assert_type(client.method("x"), int)
    assert_type(Client.method(client, "x"), int)
    assert_type(sub.method(text="x"), int)
    assert_type(await client.amethod("x"), int)
    assert_type(client.rows(), Iterator[str])
    assert_type(client.outer_class("x"), int)
    assert_type(Client.outer_class("x"), int)
    assert_type(Sub.outer_class("x"), int)
    assert_type(client.inner_class("x"), int)
    assert_type(Client.inner_class("x"), int)
    assert_type(client.outer_static("x"), int)
    assert_type(Client.outer_static("x"), int)
    assert_type(client.inner_static("x"), int)
    assert_type(Client.inner_static("x"), int)
    assert_type(client.prop, int)
    client.method(1)  # type: ignore[arg-type]
    Client.outer_class()  # type: ignore[call-arg]
    Client.outer_static(1)  # type: ignore[arg-type]


# --- decorators and callables as values ----------------------------------------------------------


def twice(function: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[tuple[R, R]]]:
    @periscope.monitored("twice")
    async def call(*args: P.args, **kwargs: P.kwargs) -> tuple[R, R]:
        return await function(*args, **kwargs), await function(*args, **kwargs)

    return call


decorator = periscope.monitored("reused", feed="otx")
assert_type(decorator(len)("text"), int)
remade: Coroutine[Any, Any, bytes] = decorator(coroutine)("u")
takes_callable: Callable[[str], int] = named

periscope.monitored(3)  # type: ignore[call-overload]
periscope.monitored("x")(3)  # type: ignore[type-var]
periscope.monitored("x", fed="y")  # type: ignore[call-overload]
periscope.monitored("x", feed=3)  # type: ignore[call-overload]
periscope.monitored(property(lambda _self: 1))  # type: ignore[call-overload]


# --- operation, current_operation, monitor_function ----------------------------------------------


async def use_operations(items: list[str], aitems: AsyncIterator[bytes], span: Span) -> None:
    with periscope.operation("store", feed="urlhaus", links=[span.get_span_context()]) as op:
        assert_type(op, periscope.Operation)
        assert_type(op.span, Span)
        assert_type(op.name, str)
        assert_type(op.feed, str | None)
        assert_type(op.outcome, str | None)
        assert_type(op.track(items), Iterator[str])
        assert_type(op.track(aitems), AsyncIterator[bytes])
        op.received(3)
        op.converted()
        op.ingested(1)
        op.skipped(1, reason="no_content")
        op.failed(items[0], ValueError("bad"))
        op.fail("quota")
        op.fail(ValueError("bad"))
        op.set_attribute("key", ["a", "b"])
        op.received("3")  # type: ignore[arg-type]
    async with periscope.operation("store", kind=SpanKind.PRODUCER) as aop:
        assert_type(aop, periscope.Operation)
    assert_type(periscope.current_operation(), periscope.Operation)
    assert_type(periscope.monitor_function("vendor:fetch", feed="taxii"), Patch)
    with periscope.monitor_function("vendor:fetch", result=lambda value: not value) as patch:
        assert_type(patch, Patch)
        assert_type(patch.undo(), None)


def returns_after_a_block() -> int:
    with periscope.operation("store"):
        return 1  # a block that might swallow exceptions would make this function return None


@periscope.monitored("fetch", dead_letter=True, journal=True, dead_letter_rejected=True)
def keeps_its_arguments(url: str) -> int:
    return len(url)


@periscope.monitored(dead_letter="urgent", payload=lambda it: it["url"], idempotency_key=str)
async def keeps_what_it_selects(url: str) -> int:
    return len(url)


async def use_dead_letters() -> None:
    assert_type(keeps_its_arguments("a"), int)
    assert_type(await keeps_what_it_selects("a"), int)
    keeps_its_arguments(1)  # type: ignore[arg-type]
    with periscope.operation("s", dead_letter="items", payload=[1], idempotency_key="k") as op:
        assert_type(op.idempotency_key, str | None)
        op.idempotency_key = "mine"
        op.idempotency_key = 1  # type: ignore[assignment]
    with capture_telemetry() as captured:
        assert_type(captured.letters, list[Letter])
        assert_type(captured.journal, list[Letter])
    periscope.monitored(dead_letter=1)  # type: ignore[call-overload]
    periscope.monitored(dead_letter=True, payload="url")  # type: ignore[call-overload]
    periscope.monitor_function("vendor:fetch", dead_letter=True, journal=True)


def use_testing() -> None:
    with capture_telemetry() as captured:
        assert_type(captured, CapturedTelemetry)
        assert_type(captured.operation("store").outcome, str)
        assert_type(captured.metric("x", outcome="ok"), float)
        assert_type(captured.items().unaccounted, int)


# --- retries -------------------------------------------------------------------------------------

retry = Retry(attempts=4, on=(OSError,), result=lambda value: not value, deadline=None)


@Retry(attempts=4)
def fetched(url: str, *, limit: int = 5) -> list[str]:
    return [url] * limit


@retry
async def fetched_by_coroutine(url: str) -> bytes:
    return url.encode()


@retry
def fetched_rows(count: int) -> Generator[int, str, bool]:
    sent = yield count
    return bool(sent)


@retry
async def fetched_async_rows(count: int) -> AsyncGenerator[int, str]:
    yield count


class Feed:
    @retry
    def method(self, text: str) -> int:
        return len(text)

    @retry
    @classmethod
    def outer_class(cls, text: str) -> int:
        return len(text)

    @staticmethod
    @retry
    def inner_static(text: str) -> int:
        return len(text)


async def use_retries(feed: Feed) -> None:
    assert_type(fetched("u", limit=3), list[str])
    assert_type(await fetched_by_coroutine("u"), bytes)
    assert_type(fetched_rows(1), Generator[int, str, bool])
    assert_type(fetched_async_rows(1), AsyncGenerator[int, str])
    assert_type(feed.method("x"), int)
    assert_type(Feed.outer_class("x"), int)
    assert_type(Feed.inner_static("x"), int)
    assert_type(retry(len)("text"), int)
    fetched(1)  # type: ignore[arg-type]
    feed.method(1)  # type: ignore[arg-type]
    for attempt in retry:
        with attempt:
            assert_type(attempt.number, int)
    async for attempt in retry:
        with attempt:
            assert_type(attempt.number, int)
    Retry.set_active(False)
    retry.attempts = 3  # type: ignore[misc]


def told_of_a_retry(details: RetryDetails) -> None:
    assert_type(details.wait, float)
    assert_type(details.error, BaseException | None)


Retry(on=ConnectionError, budget=RetryBudget(ratio=0.1), on_retry=told_of_a_retry)
Retry(on=lambda error: None, budget=False)
Retry(budget=budget_of("urlhaus.abuse.ch"))
Retry(3)  # type: ignore[call-arg]
Retry(attempts="3")  # type: ignore[arg-type]
Retry(budget=True)  # type: ignore[arg-type]
Retry(on=3)  # type: ignore[arg-type]
retry(3)  # type: ignore[type-var]


def use_gauges() -> None:
    gauges = periscope.instrument_gauges(gauges={"host", "gpu"}, interval=10)
    assert_type(gauges, Gauges)
    assert_type(gauges.close(), None)
    periscope.instrument_gauges(gauges=7)  # type: ignore[arg-type]
    system = get_system_stats()
    assert_type(system, SystemStats | None)
    if system is not None and system.memory is not None:
        assert_type(system.memory.available, int)
    gpu = get_gpu_stats(timeout=2)
    assert_type(gpu, GpuStats | None)
    if gpu is not None and gpu.problem is not None:
        assert_type(gpu.problem.remedy, str)
    periscope.configure(gauges=True)
    periscope.configure(gauges={"host"})


assert_type(periscope.__version__, str)
