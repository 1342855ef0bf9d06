"""What one monitored call costs.

Recorded call
    `@monitored` on a function that does nothing: span, duration histogram with exemplar, batch
    export to a null exporter, one metric reader collected at the end of each round. Divided by
    the same telemetry written by hand: `start_as_current_span`, four `set_attribute`, one
    `counter.add` and one `histogram.record` inside the span (so with exemplars). Both spans carry
    the same four attributes (operation, feed, breaker, outcome). The hand-written metrics have
    four labels (operation, feed, outcome, error.type, which is empty on success); ours have the
    first three on success, so the ratio to a hand-written call with these three is given too.
    In whole-process CPU, with everything drained, and in the calling thread alone.
Unsampled call
    The same with `ParentBased(TraceIdRatioBased(0))`: no span, the metrics as before.
No SDK
    In a process that never imports the SDK, divided by an empty `functools.wraps` closure with
    try/finally around the same empty function. The loop, a tenth of a turn a call, is included.
Async call
    A coroutine awaited in a running loop, divided by the sync call; the empty coroutine's own
    cost is included and stated.

Not measured: exceptions, items, generators, several threads, network export.
"""

from __future__ import annotations

import asyncio
from itertools import repeat
from typing import TYPE_CHECKING

from harness import Rounds, Sample, Subject, arguments, here, interleave, measure, ratio
from harness import start_report as start
from hosts import Host
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from subjects import BREAKER, FEED, FOUR_LABELS, OUR_LABELS, hand_written, ours

from periscope_otel import monitored
from periscope_otel.telemetry import names

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

RECORDED = "recorded call"
OWN_PIPELINE = "recorded call, the span processor that configure() builds"
UNSAMPLED = "unsampled call"
BY_HAND = "by hand, 4 labels"
BY_HAND_3 = "by hand, our 3 labels"
ASYNC = "recorded async call"
EMPTY_COROUTINE = "empty coroutine"
BARE, BARE_METHOD, CLOSURE = "call without an SDK", "method without an SDK", "empty closure"


@monitored("store_async", feed=FEED, attributes={names.BREAKER_NAME: BREAKER})
async def monitored_coroutine() -> None:
    """Do nothing, monitored."""


async def empty_coroutine() -> None:
    """Do nothing."""


async def await_repeatedly(call: Callable[[], Awaitable[object]], calls: int) -> None:
    """Await ten calls a turn, like `repeat_call`."""
    for _ in repeat(None, calls // 10):
        await call(), await call(), await call(), await call(), await call()
        await call(), await call(), await call(), await call(), await call()


def awaited(call: Callable[[], Awaitable[object]], like: Subject) -> Callable[[int], Sample]:
    """Return a subject that awaits in a loop, with the telemetry of `like`."""
    loop = asyncio.new_event_loop()

    def run(calls: int) -> Sample:
        return measure(
            lambda: loop.run_until_complete(await_repeatedly(call, calls)),
            calls,
            like.drain,
            like.before,
        )

    return run


def recorded_rounds(rounds: int, calls: int) -> Rounds:
    """Interleave everything that needs an SDK."""
    recorded = ours()
    return interleave(
        {
            RECORDED: recorded.measure,
            BY_HAND: hand_written(FOUR_LABELS).measure,
            BY_HAND_3: hand_written(OUR_LABELS).measure,
            OWN_PIPELINE: ours(counted=True).measure,
            UNSAMPLED: ours(ParentBased(TraceIdRatioBased(0.0))).measure,
            ASYNC: awaited(monitored_coroutine, recorded),
            EMPTY_COROUTINE: awaited(empty_coroutine, Subject(lambda: None)),
        },
        rounds,
        calls,
    )


def bare_rounds(rounds: int, calls: int) -> Rounds:
    """Interleave what runs without an SDK, in a process that has not imported it."""
    with Host(here() / "no_sdk.py") as host:
        return interleave(
            {name: host.subject(name) for name in (BARE, BARE_METHOD, CLOSURE)}, rounds, calls
        )


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__, rounds=60, calls=2_000)
    report = start(__doc__, options)
    rounds = recorded_rounds(options.rounds, options.calls)
    bare = bare_rounds(options.rounds, options.calls * 10)
    report.measures = [
        ratio("recorded ÷ by hand, process", rounds, RECORDED, BY_HAND, "process", 0.70),
        ratio("recorded ÷ by hand, caller", rounds, RECORDED, BY_HAND, "thread", 0.50),
        ratio("recorded ÷ by hand with 3 labels, process", rounds, RECORDED, BY_HAND_3, "process"),
        ratio("recorded ÷ by hand with 3 labels, caller", rounds, RECORDED, BY_HAND_3, "thread"),
        ratio("configure() ÷ by hand, process", rounds, OWN_PIPELINE, BY_HAND, "process"),
        ratio("configure() ÷ by hand, caller", rounds, OWN_PIPELINE, BY_HAND, "thread"),
        ratio("unsampled ÷ recorded, process", rounds, UNSAMPLED, RECORDED, "process", 0.50),
        ratio("unsampled ÷ recorded, caller", rounds, UNSAMPLED, RECORDED, "thread"),
        ratio("no SDK ÷ empty closure", bare, BARE, CLOSURE, "thread", 8),
        ratio("no SDK, method ÷ empty closure", bare, BARE_METHOD, CLOSURE, "thread"),
        ratio("async ÷ sync, process", rounds, ASYNC, RECORDED, "process", 1.25),
        ratio("async ÷ sync, caller", rounds, ASYNC, RECORDED, "thread"),
    ]  # fmt: skip
    report.indicate(rounds)
    report.indicate(bare)
    report.publish(options.json)


if __name__ == "__main__":
    main()
