"""Our breakers and retries, and the peers', in one process; served to resilience.py."""

from __future__ import annotations

import gc
import itertools
import sys
import tracemalloc
from typing import TYPE_CHECKING

import pybreaker
import stamina
from harness import Sample, Subject
from hosts import serve
from opentelemetry.trace import SpanKind
from subjects import (
    BREAKER,
    FEED,
    OPERATION,
    SPAN_ATTRIBUTES,
    Pipeline,
    drain_ours,
    monitored_function,
    telemetry_of,
    use,
)

from periscope_otel import Breaker, CircuitOpenError, Retry, monitored
from periscope_otel.resilience import circuit
from periscope_otel.resilience.span_processor import BreakerSpanProcessor

if TYPE_CHECKING:
    from collections.abc import Callable

MANY = 10_000
HOST = {"server.address": BREAKER, "http.response.status_code": 200}


def nothing() -> None:
    """Do nothing."""


def ours_alone() -> dict[str, Subject]:
    """Breakers and retries without telemetry, and the peers'."""
    breaker, theirs = Breaker(BREAKER), pybreaker.CircuitBreaker()
    retried = Retry()(nothing)
    stamina_retried = stamina.retry(on=ConnectionError)(nothing)
    return {
        "permit": Subject(lambda: breaker.allow().settle()),
        "call": Subject(lambda: breaker.call(nothing)),
        "pybreaker": Subject(lambda: theirs.call(nothing)),
        "retry": Subject(retried),
        "stamina": Subject(stamina_retried),
    }


def many_breakers() -> dict[str, Subject]:
    """Ten thousand breakers in turn, and one as often."""
    many = {f"host-{number}.example": Breaker(f"host-{number}.example") for number in range(MANY)}
    alone = dict.fromkeys(many, Breaker("alone.example"))
    names, same_names = itertools.cycle(many), itertools.cycle(alone)
    return {
        "one of many": Subject(lambda: many[next(names)].allow().settle()),
        "one alone": Subject(lambda: alone[next(same_names)].allow().settle()),
    }


def monitored_calls() -> dict[str, Subject]:
    """Monitored calls: plain, guarded, watched by the processor, and rejected."""
    plain, watched = Pipeline(), Pipeline()
    watched.tracer_provider.add_span_processor(BreakerSpanProcessor())
    open_breaker = Breaker("open.example")
    open_breaker.force_open()

    @monitored(OPERATION, feed=FEED, breaker=Breaker(BREAKER))
    def guarded() -> None:
        """Do nothing, guarded."""

    @monitored(OPERATION, feed=FEED, breaker=open_breaker)
    def never_made() -> None:
        """Not be called."""

    def rejected() -> None:
        try:
            never_made()
        except CircuitOpenError:
            return

    def telling(pipeline: Pipeline, most: int) -> Callable[[], None]:
        switch = use(telemetry_of(pipeline))

        def before() -> None:
            switch()
            circuit.MOST_TOLD = most

        return before

    drain, switch = drain_ours(plain), use(telemetry_of(plain))
    return {
        "recorded": Subject(monitored_function, drain, switch),
        "guarded": Subject(guarded, drain, switch),
        "watched": Subject(monitored_function, drain_ours(watched), use(telemetry_of(watched))),
        "rejected": Subject(rejected, drain, telling(plain, 10**9)),
        "rejected, counted only": Subject(rejected, drain, telling(plain, 0)),
        "client span": client_span(plain),
        "watched client span": client_span(watched),
        "span by hand": span_by_hand(),
    }


def client_span(pipeline: Pipeline) -> Subject:
    """Return a client span as another instrumentation makes it."""
    tracer = pipeline.tracer_provider.get_tracer("somebody else")

    def call() -> None:
        with tracer.start_as_current_span("GET", kind=SpanKind.CLIENT, attributes=HOST):
            pass

    return Subject(call, pipeline.drain)


def span_by_hand() -> Subject:
    """Return one span in the usual way."""
    pipeline = Pipeline()
    tracer = pipeline.tracer_provider.get_tracer("by hand")

    def call() -> None:
        with tracer.start_as_current_span(OPERATION) as span:
            for name, value in SPAN_ATTRIBUTES.items():
                span.set_attribute(name, value)

    return Subject(call, pipeline.drain)


def memory(count: int) -> Sample:
    """Return the bytes of so many breakers on which calls were made."""
    gc.collect()
    tracemalloc.start()
    breakers = [Breaker(f"memory-{number}.example") for number in range(count)]
    for breaker in breakers:
        for _ in range(10):
            breaker.allow().settle()
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return {"bytes": float(taken)}


def subjects() -> dict[str, Callable[[int], Sample]]:
    """Return all of them."""
    made = many_breakers() if sys.argv[1] == "many" else {**ours_alone(), **monitored_calls()}
    return {"memory": memory, **{name: subject.measure for name, subject in made.items()}}


if __name__ == "__main__":
    serve(subjects)
