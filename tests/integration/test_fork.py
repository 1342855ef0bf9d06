"""Children of a fork neither hang nor repeat their parent's counts, and lose none of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from otlp import OUTCOME, Receiver
from processes import Ended, otlp, run

if TYPE_CHECKING:
    from otlp import Received

pytestmark = pytest.mark.usefixtures("uncovered")

ENDS = {0: 3, 1: 3, 2: -15, 3: 0}
"""The exit status of each fourth child: sys.exit, os._exit after shutdown(), SIGTERM, normal."""


def did(ended: Ended) -> dict[int, int]:
    """Return how many operations each process says it did."""
    assert [line for line in ended.lines if line.startswith("hung")] == [], ended.stderr[-6000:]
    words = [line.split() for line in ended.lines]
    return {int(pid): int(count) for what, pid, count in words if what == "did"}


def by_process(received: Received, instances_of: str = "metrics") -> dict[int, int]:
    """Return the sum of the histogram's counts for each process that sent any."""
    pids = {
        one["service.instance.id"]: one["process.pid"] for one in received.resources()[instances_of]
    }
    sums = received.sums_by_instance()
    return {pids[instance]: total["work"] for instance, total in sums.items()}


@pytest.mark.parametrize(("protocol", "count"), [("http/protobuf", 240), ("grpc", 60)])
def test_children_of_a_busy_process_count_exactly(
    collector: Receiver, protocol: str, count: int
) -> None:
    """Of 300 forks while three threads record no child hangs, and each one's counts are its own."""
    env = otlp(collector.endpoint(protocol), protocol)
    ended = run("forks", str(count), "6", env=env, timeout=110)
    received = collector.received()
    expected = {pid: total for pid, total in did(ended).items() if total}
    lines = [line.split() for line in ended.lines]
    statuses = [int(status) for what, *_, status in lines if what == "ended"]
    wanted = sorted(ENDS[number % 4] for number in range(count))
    assert sorted(statuses) == wanted, ended.stderr[-6000:]
    counted = by_process(received)
    # A child that is forked in the middle of a call by gRPC cannot use it, and says so.
    refused = ended.stderr.count("forked in the middle of an export by gRPC")
    lost = {pid for pid in expected if pid not in counted}
    assert len(lost) <= refused <= (0 if protocol == "http/protobuf" else count // 4)
    expected = {pid: total for pid, total in expected.items() if pid not in lost}
    assert counted == expected
    assert received.names() == {"work": sum(expected.values())}
    assert received.sums("threat.ingest.items.received") == {"work": 2 * sum(expected.values())}
    assert received.duplicates() == []
    assert ended.status == 0


def test_a_childs_spans_and_metrics_are_about_the_same_process(collector: Receiver) -> None:
    """In a forked child spans and metrics carry one resource, with its own pid and instance."""
    ended = run("forks", "8", "4", env=otlp(collector.http))
    resources = collector.received().resources()
    active = {pid for pid, count in did(ended).items() if count}
    for signal in ("spans", "metrics"):
        assert {one["process.pid"] for one in resources[signal]} == active, signal
        assert len({one["service.instance.id"] for one in resources[signal]}) == len(active)
    spans, metrics = (
        {(one["process.pid"], one["service.instance.id"]) for one in resources[signal]}
        for signal in ("spans", "metrics")
    )
    assert spans == metrics


def test_children_of_a_process_with_prometheus_alone_do_not_hang() -> None:
    """Where metrics go to a Prometheus page alone, children of a busy process do not hang."""
    ended = run("forks", "80", "6", env={"PROMETHEUS": "1"}, timeout=110)
    lines = [line.split() for line in ended.lines]
    statuses = [int(status) for what, *_, status in lines if what == "ended"]
    assert sorted(statuses) == sorted(ENDS[number % 4] for number in range(80))
    assert ended.status == 0


@pytest.mark.parametrize("how", ["exit", "leave"])
def test_an_operation_open_across_a_fork_settles_in_the_parent(
    collector: Receiver, how: str
) -> None:
    """An operation that was open at the fork is one span and one count, the parent's."""
    ended = run("fork_open", how, env=otlp(collector.http))
    parent = int(ended.lines[0].split()[0])
    received = collector.received()
    pids = {span.name: span.resource["process.pid"] for span in received.spans}
    assert received.names() == {"across": 1, "inside": 1}
    assert received.outcomes("across") == ["ok"]
    assert received.sums() == {"across": 1, "inside": 1}
    assert received.sums("threat.ingest.items.received") == {"across": 1}
    assert pids["across"] == parent
    spans = {span.name: span for span in received.spans}
    assert spans["inside"].parent_id == spans["across"].span_id
    assert len(ended.reports) == 1
    assert ended.status == 0


METHODS = ("fork", "spawn", "forkserver")
CASES = [
    *(("processes", method) for method in METHODS),
    *(("terminated", method) for method in METHODS),
    *(("executor", method) for method in METHODS),
    ("pool", "fork"),
    ("pool", "spawn"),
    ("pool_ended_by_with", "fork"),
    ("from_thread", "fork"),
    ("raw_from_thread", "fork"),
]


@pytest.mark.parametrize(("what", "method"), CASES)
def test_children_of_multiprocessing_lose_nothing(
    collector: Receiver, what: str, method: str
) -> None:
    """What children of multiprocessing emit before their end arrives; their status is theirs."""
    ended = run("pools", what, method, env=otlp(collector.http))
    assert ended.status == 0, ended.stderr
    count, *statuses = map(int, ended.lines[-1].split())
    received = collector.received()
    assert received.sums()["work"] == count + 1, ended.stderr
    assert received.names()["work"] == count + 1
    assert received.duplicates() == []
    assert received.sums(by=OUTCOME) == {"ok": sum(received.names().values())}
    assert set(statuses) <= ({-15} if what == "terminated" else {0})
    assert len(ended.reports) >= 1
