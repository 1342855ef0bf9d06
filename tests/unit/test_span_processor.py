"""The contracts of breakers that learn from spans: each call counts once, where it belongs."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import (
    _SUPPRESS_HTTP_INSTRUMENTATION_KEY,
    _SUPPRESS_INSTRUMENTATION_KEY,
)
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from opentelemetry.trace import Link, SpanKind, StatusCode

from periscope_otel import guard
from periscope_otel.failure import Failure
from periscope_otel.resilience import awaiting
from periscope_otel.resilience.awaiting import (
    await_end,
    open_spans,
    permits_by_span,
    settle_awaiting,
)
from periscope_otel.resilience.breaker import Breaker, breakers
from periscope_otel.resilience.guards import GUARDED_KEY
from periscope_otel.resilience.sampler import RecordOnlySampler
from periscope_otel.resilience.span_processor import BreakerSpanProcessor
from periscope_otel.telemetry.names import SCOPE
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.trace import Span, Tracer

HOST = "feed.example"
OTHER_HOST = "other.example"
GET = {"http.request.method": "GET"}
SERVER_ERROR = Failure("error", "500", "failure", retryable=True, reason="server")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Let each test begin without breakers, and have it leave no open span behind."""
    with breakers.set_aside():
        yield
    assert not open_spans
    assert not permits_by_span


@pytest.fixture
def make() -> Iterator[Callable[..., Tracer]]:
    """Return a function that makes tracers of other libraries with some processors."""
    with ExitStack() as stack:

        def tracer(*processors: SpanProcessor, scope: str = "httpx", sampler: Any = None) -> Tracer:
            provider = TracerProvider(sampler=sampler or ALWAYS_ON, shutdown_on_exit=False)
            stack.callback(provider.shutdown)
            for processor in processors or (BreakerSpanProcessor(),):
                provider.add_span_processor(processor)
            return provider.get_tracer(scope)

        yield tracer


@pytest.fixture
def tracer(make) -> Tracer:
    return make()


def client(tracer: Tracer, host: str | None = HOST, **options: Any) -> Span:
    """Begin a client span."""
    attributes = GET if host is None else {**GET, "server.address": host}
    return tracer.start_span("GET", kind=SpanKind.CLIENT, attributes=attributes, **options)


def end(span: Span, status: int = 200) -> None:
    span.set_attribute("http.response.status_code", status)
    span.end()


def call(tracer: Tracer, status: int = 200, host: str = HOST, **options: Any) -> None:
    end(client(tracer, host, **options), status)


def counted(host: str = HOST) -> list[int]:
    """Return the calls of a host that succeeded, failed and were ignored."""
    found = breakers.find(host)
    return [0, 0, 0] if found is None else found.counts[:3]


def opening_after(failures: int, **policy: Any) -> Breaker:
    """Return the breaker of the host."""
    breakers.defaults(HOST, consecutive_failures=failures, **policy)
    return breakers.get(HOST)


def current(span: Span) -> Any:
    return trace.use_span(span, end_on_exit=False)


# Counting.


def test_client_spans_count_on_the_breaker_of_their_host(tracer):
    """By how they end."""
    for status in (200, 500, 404, 503):
        call(tracer, status)
    call(tracer, 200, OTHER_HOST)
    assert counted() == [1, 2, 1]
    assert counted(OTHER_HOST) == [1, 0, 0]


def test_failed_client_spans_open_the_breaker_that_guards(tracer):
    """One of that name which the application made; the transition has the span that did it."""
    breaker = opening_after(2)
    told = []
    breaker.listen(told.append)
    call(tracer, 500)
    span = client(tracer)
    end(span, 500)
    assert breaker.state == "open"
    assert breaker.allow() is None
    worker.finish_posted(30)
    assert (told[0].reason, told[0].error_type) == ("consecutive_failures", "500")
    assert told[0].span_context == span.get_span_context()


@pytest.mark.parametrize("kind", [kind for kind in SpanKind if kind is not SpanKind.CLIENT])
def test_only_client_spans_count(tracer, kind):
    """A call is what this process makes of another."""
    tracer.start_span("x", kind=kind, attributes={**GET, "server.address": HOST}).end()
    assert list(breakers) == []


def test_our_own_spans_are_no_dependencies(make):
    """A monitored operation of the kind CLIENT has a breaker if it says so."""
    call(make(scope=SCOPE), 500)
    assert list(breakers) == []


@pytest.mark.parametrize(
    "key",
    [_SUPPRESS_INSTRUMENTATION_KEY, _SUPPRESS_HTTP_INSTRUMENTATION_KEY],
    ids=["all", "http"],  # the keys themselves are others in each process
)
def test_what_is_to_be_quiet_is_not_counted(tracer, key):
    """In the current context as in a given one."""
    quiet = otel_context.set_value(key, True)
    call(tracer, 500, context=quiet)
    token = otel_context.attach(quiet)
    call(tracer, 500)
    otel_context.detach(token)
    assert list(breakers) == []


def test_links_count_for_nothing(tracer):
    """A span that is linked to a client span is nested in none."""
    outer = client(tracer)
    call(tracer, 500, links=[Link(outer.get_span_context())])
    end(outer)
    assert counted() == [1, 1, 0]


def test_a_span_that_does_not_say_whom_it_calls_is_not_counted(tracer):
    """There is no breaker without a name."""
    end(client(tracer, None), 500)
    assert list(breakers) == []


def test_a_matcher_names_the_breaker(make):
    """A span that it gives no name is not counted."""
    names = {"GET": "feeds", "POST": None}
    tracer = make(BreakerSpanProcessor(lambda span: names[span.attributes["http.request.method"]]))
    call(tracer, 500)
    span = client(tracer)
    span.set_attribute("http.request.method", "POST")  # looked at too late
    end(span, 500)
    post = tracer.start_span(
        "POST", kind=SpanKind.CLIENT, attributes={"http.request.method": "POST"}
    )
    end(post, 500)
    assert breakers.totals()["feeds"]["failure"] == 2


# Attributes that come late.


def redis_command(tracer: Tracer, **options: Any) -> Span:
    """Begin a span as redis' instrumentation does: it sets all attributes afterwards."""
    span = tracer.start_span("GET", kind=SpanKind.CLIENT, **options)
    span.set_attribute("db.system", "redis")
    span.set_attribute("net.peer.name", HOST)
    return span


def test_a_name_may_come_after_the_beginning(tracer):
    """As with redis: the span is looked at again at its end."""
    redis_command(tracer).end()
    span = redis_command(tracer)
    span.record_exception(ConnectionError())
    span.set_status(StatusCode.ERROR)
    span.end()
    assert counted() == [1, 1, 0]


def test_a_late_name_counts_the_time_from_the_beginning(make):
    """A slow call is slow, whenever it is known whose."""
    breakers.defaults(HOST, slow_threshold=20.0, minimum_calls=1)
    span = redis_command(make())
    open_spans[span.get_span_context().span_id].began -= 20.0
    span.end()
    assert breakers.get(HOST).state == "open"


def test_a_call_from_before_a_change_changes_nothing(tracer):
    """Whether its name was known at its beginning or came late."""
    breaker = opening_after(1)
    named, unnamed = client(tracer), redis_command(tracer)
    breaker.force_open()
    breaker.reset()
    unnamed.set_status(StatusCode.ERROR)
    unnamed.end()
    end(named, 500)
    assert breaker.state == "closed"
    call(tracer, 500)
    assert breaker.state == "open"


# Once for each call.


def test_a_client_span_in_another_for_the_same_dependency_counts_once(tracer):
    """The outer one, whatever the inner one says."""
    outer = client(tracer)
    with current(outer):
        call(tracer, 500)
        call(tracer, 200, OTHER_HOST)
    end(outer)
    assert counted() == [1, 0, 0]
    assert counted(OTHER_HOST) == [1, 0, 0]


@pytest.mark.parametrize("scope", ["app", SCOPE])
@pytest.mark.parametrize("depth", [1, 3])
def test_spans_of_other_kinds_may_come_in_between(make, scope, depth):
    """Those of the application and our own alike."""
    processor = BreakerSpanProcessor()
    tracer, between = make(processor), make(processor, scope=scope)
    outer = client(tracer)
    with ExitStack() as stack:
        stack.enter_context(current(outer))
        for _ in range(depth):
            stack.enter_context(between.start_as_current_span("x"))
        call(tracer, 500)
    end(outer)
    assert counted() == [1, 0, 0]


def test_what_comes_in_between_may_be_unsampled(make):
    """Spans beneath a client span are recorded with it."""
    tracer = make(sampler=RecordOnlySampler(ALWAYS_OFF))
    outer = client(tracer)
    with current(outer), tracer.start_as_current_span("x"), tracer.start_as_current_span("y"):
        call(tracer, 500)
    end(outer)
    assert counted() == [1, 0, 0]


def test_an_inner_span_may_end_after_the_outer_one(tracer):
    """It began inside, so it is the same call."""
    outer = client(tracer)
    with current(outer), tracer.start_as_current_span("x") as between:
        inner = client(tracer)
    end(outer)
    between.end()
    end(inner, 500)
    assert counted() == [1, 0, 0]


def test_siblings_count_each(tracer):
    """Calls that run at the same time under one parent."""
    with tracer.start_as_current_span("x"):
        first, second = client(tracer), client(tracer)
        end(first)
        end(second, 500)
    assert counted() == [1, 1, 0]


def test_late_names_are_nested_too(tracer):
    """Whichever of the two has a name first, and whichever it is that has not."""
    outer = redis_command(tracer)
    with current(outer):
        inner = redis_command(tracer)
        inner.end()
        call(tracer, 500)
    outer.end()
    assert counted() == [1, 0, 0]


def test_an_outer_span_that_is_named_last_is_counted_by_the_inner_one(tracer):
    """Its dependency is known only when the call is counted already."""
    outer = tracer.start_span("x", kind=SpanKind.CLIENT)
    with current(outer):
        call(tracer, 500)
    outer.set_attribute("server.address", HOST)
    outer.end()
    assert counted() == [0, 1, 0]


def test_a_call_of_this_process_to_itself_is_another_one(tracer):
    """The parent of what the server does is remote."""
    outer = client(tracer)
    remote = trace.SpanContext(
        outer.get_span_context().trace_id, outer.get_span_context().span_id, is_remote=True
    )
    context = trace.set_span_in_context(trace.NonRecordingSpan(remote))
    call(tracer, 500, context=context)
    end(outer)
    assert counted() == [1, 1, 0]


def test_two_processors_count_a_span_once(make):
    """On one provider, and one instance on two: an inner span knows the outer one of either."""
    processor = BreakerSpanProcessor()
    one, other = make(processor, BreakerSpanProcessor()), make(processor)
    call(one, 500)
    call(other, 500)
    redis_command(one).end()
    assert counted() == [1, 2, 0]
    outer = client(one)
    with current(outer):
        call(other, 500)
    end(outer)
    assert counted() == [2, 2, 0]


def test_a_guard_of_the_same_breaker_counts_the_call(tracer):
    """`with breaker` around it; one of another breaker counts its own."""
    with breakers.get(HOST):
        call(tracer, 500)
        redis_command(tracer).end()
        call(tracer, 500, OTHER_HOST)
    assert counted() == [1, 0, 0]
    assert counted(OTHER_HOST) == [0, 1, 0]


def test_a_guard_in_the_context_counts_the_call(tracer):
    """That of a monitored operation, in a given context or the current one."""
    guards = tuple(Breaker(name).allow() for name in ("x", HOST))
    guarded = otel_context.set_value(GUARDED_KEY, guards)
    call(tracer, 500, context=guarded)
    token = otel_context.attach(guarded)
    call(tracer, 500)
    call(tracer, 500, OTHER_HOST)
    otel_context.detach(token)
    assert counted() == [0, 0, 0]
    assert counted(OTHER_HOST) == [0, 1, 0]
    guards[1].settle()
    call(tracer, 500, context=guarded)  # as of a task that has outlived the guarded call
    assert counted() == [1, 1, 0]


def test_a_call_to_an_open_breaker_is_not_counted(tracer):
    """It is made anyway; nothing asked whether it may be."""
    breakers.get(HOST).force_open()
    call(tracer, 500)
    redis_command(tracer).end()
    assert counted() == [0, 0, 0]
    assert breakers.get(HOST).view().rejections == 0


def test_calls_that_are_made_anyway_are_probes_once_the_open_time_is_over(tracer):
    """Two that succeed close it, though nothing asked it."""
    breaker = opening_after(1, open_time=30.0, jitter=0.0)
    now = [time.monotonic()]
    breaker.clock = lambda: now[0]
    call(tracer, 500)
    call(tracer)
    assert breaker.state == "open"
    now[0] += 31
    call(tracer)
    assert breaker.state == "half_open"
    redis_command(tracer).end()
    assert breaker.state == "closed"


# Many at a time.


def test_calls_of_many_threads_are_counted_exactly(tracer):
    """None gets in the way of another, nor leaves anything behind."""

    def calls() -> None:
        for number in range(300):
            with tracer.start_as_current_span("x"):
                outer = client(tracer)
                with current(outer), tracer.start_as_current_span("y"):
                    call(tracer, 500)
                end(outer, 404 if number % 2 else 200)

    threads = [threading.Thread(target=calls) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted() == [900, 0, 900]
    assert breakers.get(HOST).view().in_flight == 0


def test_a_span_may_end_in_another_thread(tracer):
    """What is known of it is not a thread's."""
    span = client(tracer)
    thread = threading.Thread(target=end, args=(span, 500))
    thread.start()
    thread.join()
    assert counted() == [0, 1, 0]


def test_spans_that_never_end_are_forgotten(tracer, monkeypatch):
    """The oldest first, beyond a bound; their permits are given back, and a late end is nothing."""
    monkeypatch.setattr(awaiting, "MOST_OPEN", 10)
    spans = [client(tracer) for _ in range(30)]
    assert len(open_spans) == 10
    assert counted() == [0, 0, 20]
    assert breakers.get(HOST).view().in_flight == 10
    for span in spans:
        end(span, 500)
    assert counted() == [0, 10, 20]
    assert breakers.get(HOST).view().in_flight == 0


def test_an_endless_chain_of_nested_calls_keeps_nothing_alive(tracer):
    """Each begins within the one before, which then ends."""
    before = client(tracer, "0.example")
    first = weakref.ref(before)
    kept = []
    for number in range(1, 100):
        with current(before):
            span = client(tracer, f"{number % 50}.example")
        opened = open_spans[span.get_span_context().span_id]
        kept.append(len(opened.above))
        end(before)
        before = span
    assert first() is None
    assert max(kept) <= 16
    end(before)


def test_a_span_is_not_kept_after_its_end(make):
    """Nor what it has, also where nested ones are still open."""
    tracer = make()
    outer = client(tracer)
    with current(outer):
        inner = client(tracer, OTHER_HOST)
    end(outer)
    gone = weakref.ref(outer)
    del outer
    gc.collect()
    assert gone() is None or open_spans[inner.get_span_context().span_id].above[0].span is None
    end(inner)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_the_child_of_a_fork_forgets_open_spans(tracer):
    """The parent counts them; what begins in the child is counted there."""
    span = client(tracer)
    permits_by_span[1] = breakers.get("x").acquire()
    child = os.fork()
    if child == 0:
        try:
            end(span, 500)
            call(tracer, 500)
            right = (counted(), len(open_spans), len(permits_by_span)) == ([0, 1, 0], 0, 0)
        except BaseException:
            right = False
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    end(span)
    settle_awaiting(1)
    assert counted() == [1, 0, 0]


# Permits of operations.


def test_the_end_of_a_span_settles_the_permit_that_waits_for_it(make):
    """With how the call ended, and its span; afterwards there is nothing left to settle."""
    tracer = make(scope=SCOPE)
    breaker = Breaker("operation")
    span, permit = tracer.start_span("x"), breaker.acquire()
    permit.conclude(SERVER_ERROR, span.get_span_context())
    await_end(span.get_span_context().span_id, permit)
    assert permit.outcome is None
    span.end()
    assert permit.outcome == "failure"
    settle_awaiting(span.get_span_context().span_id)
    assert breaker.counts[:3] == [0, 1, 0]


def test_a_permit_whose_span_nobody_sees_is_settled_by_the_operation():
    """Without an SDK, or where the span is not recorded."""
    permit = Breaker("operation").acquire()
    permit.conclude(SERVER_ERROR)
    await_end(5, permit)
    assert permit.outcome is None
    settle_awaiting(5)
    assert permit.outcome == "failure"
    settle_awaiting(5)


def test_a_permit_without_a_span_of_its_own_is_settled_at_once():
    """Without an SDK all spans have the id 0; and a span has one operation."""
    breaker = Breaker("operation")
    first, second, third = (breaker.acquire() for _ in range(3))
    await_end(0, first)
    assert first.outcome == "success"
    await_end(7, second)
    await_end(7, third)
    assert (second.outcome, third.outcome) == (None, "success")
    settle_awaiting(7)
    assert second.outcome == "success"


# What must not happen in the caller's path.


class HostileError(Exception):
    """What hostile code raises."""


def hostile(*_: Any) -> Any:
    raise HostileError


@pytest.fixture
def lenient() -> Iterator[None]:
    """Let errors be contained, as outside of tests."""
    guard.set_strict(False)
    yield
    worker.finish_posted(30)
    guard.reset()


@pytest.mark.usefixtures("lenient")
def test_a_matcher_that_raises_is_contained(make, monkeypatch):
    """The span ends as ever, and the error is reported by another thread."""
    threads = []
    tracer = make(BreakerSpanProcessor(hostile))
    monkeypatch.setattr(
        guard.logger, "handle", lambda _: threads.append(threading.current_thread())
    )
    call(tracer, 500)
    worker.finish_posted(30)
    assert guard.counts() == {"breaker span processor": 1}
    assert threads
    assert threading.current_thread() not in threads


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("hook", ["on_start", "on_end"])
def test_a_span_that_is_none_is_contained(hook):
    """Whatever calls the processor."""
    open_spans[1] = None  # something is open: there is work to do
    try:
        getattr(BreakerSpanProcessor(), hook)(object())
    finally:
        open_spans.clear()
    worker.finish_posted(30)
    assert guard.counts() == {"breaker span processor": 1}


@pytest.mark.usefixtures("lenient")
def test_a_span_that_cannot_be_read_at_its_end_gives_its_permit_back(tracer, monkeypatch):
    """It says nothing about the dependency."""
    monkeypatch.setattr("periscope_otel.resilience.span_processor.failure_of", hostile)
    call(tracer, 500)
    assert counted() == [0, 0, 1]
    assert breakers.get(HOST).view().in_flight == 0


@pytest.mark.usefixtures("lenient")
def test_errors_are_bounded_while_nothing_reports_them(make, monkeypatch):
    """As with a log handler that hangs."""
    posted = []
    monkeypatch.setattr(worker, "post", posted.append)
    tracer = make(BreakerSpanProcessor(hostile))
    for _ in range(300):
        call(tracer, 500)
    assert len(posted) == 100
    posted[0]()
    assert guard.counts() == {"breaker span processor": 100}


@pytest.mark.parametrize("name", [5, b"x", "", " ", "\x00", (), len])
def test_what_is_no_name_names_no_breaker(make, name):
    """Whatever a matcher returns."""
    call(make(BreakerSpanProcessor(lambda _: name)), 500)
    assert list(breakers) == []


def test_a_name_from_a_span_is_made_fit(tracer):
    """A breaker's name stands in logs and on labels."""
    call(tracer, 500, "feed\n\x1b[31m.example" + "x" * 10_000)
    (breaker,) = breakers
    assert breaker.name.startswith("feed .examplex")
    assert len(breaker.name) <= 200
    call(tracer, 500, breaker.name.upper())
    assert breaker.counts[1] == 2


def test_dependencies_are_bounded(tracer, monkeypatch, caplog):
    """Beyond the bound they have no breaker; it is said once, and not in the caller's path."""
    monkeypatch.setattr("periscope_otel.resilience.breakers.MOST_WATCHED", 5)
    posted = []
    monkeypatch.setattr(worker, "post", posted.append)
    for number in range(9):
        call(tracer, 500, f"{number}.example")
    assert len(list(breakers)) == 5
    assert (len(posted), caplog.records) == (1, [])
    posted[0]()
    assert len(caplog.records) == 1


def test_shut_down_it_counts_nothing_new(make):
    """What is open is settled still; a flush has nothing to wait for."""
    processor = BreakerSpanProcessor()
    tracer = make(processor)
    span = client(tracer)
    processor.shutdown()
    processor.shutdown()
    call(tracer, 500)
    end(span)
    assert counted() == [1, 0, 0]
    assert processor.force_flush() is True
    assert processor.force_flush(timeout_millis=0) is True


def test_other_spans_cost_next_to_nothing():
    """Below a microsecond for beginning and end together, most of it the calls themselves."""
    processor = BreakerSpanProcessor()
    provider = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False)
    span = provider.get_tracer("app").start_span("x")
    best = float("inf")
    for _ in range(20):
        before = time.thread_time()  # others' share of the processor does not count
        for _ in range(2000):
            processor.on_start(span, parent_context=None)
            processor.on_end(span)
        best = min(best, (time.thread_time() - before) / 2000)
    assert best < (1e-6 if sys.gettrace() is None else 1e-5)  # coverage traces each line
