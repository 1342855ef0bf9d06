"""The contracts of `periscope_otel.testing` and of the pytest fixture."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING

import pytest
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from periscope_otel import monitored, operation
from periscope_otel.items import ItemAccount
from periscope_otel.telemetry.current import current
from periscope_otel.testing import capture_telemetry

if TYPE_CHECKING:
    from pathlib import Path

DURATION = "threat.ingest.operation.duration"


def run_python(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=environment,
        **more,
    )


def test_operations_are_listed_in_the_order_in_which_they_settled(captured_telemetry):
    """`operations` lists what has settled, inner before outer, all or those of one name."""
    with operation("fetch"), operation("store"):
        pass
    with operation("store"):
        pass
    listed = [one.name for one in captured_telemetry.operations()]
    assert listed == ["store", "fetch", "store"]
    assert len(captured_telemetry.operations("store")) == 2
    assert captured_telemetry.operations("other") == []


def test_operation_tells_what_its_span_tells(captured_telemetry):
    """A captured operation has name, feed, outcome, error.type, items, exceptions and parent."""

    def store_and_fail() -> None:
        with operation("store", feed="otx") as op:
            op.received(2)
            op.ingested(1)
        raise TimeoutError("slow")

    with pytest.raises(TimeoutError), operation("fetch", feed="misp"):
        store_and_fail()
    fetch = captured_telemetry.operation("fetch")
    store = captured_telemetry.operation("store")
    assert (fetch.name, fetch.feed, fetch.outcome, fetch.error_type) == (
        "fetch",
        "misp",
        "timeout",
        "TimeoutError",
    )
    assert (store.outcome, store.error_type) == ("partial", None)
    assert store.items == ItemAccount(received=2, ingested=1, unaccounted=1)
    assert fetch.items == ItemAccount()
    assert len(fetch.exceptions) == 1
    assert store.is_child_of(fetch)
    assert not fetch.is_child_of(store)
    assert repr(store) == "<CapturedOperation 'store' feed='otx' partial>"


def test_message_says_what_has_settled(captured_telemetry):
    """Asking for an operation that is not there, or there twice, fails and says what there is."""
    with pytest.raises(AssertionError, match=r"0 operations 'store' .*settled: \[\]"):
        captured_telemetry.operation("store")
    for name in ("fetch", "store", "store"):
        with operation(name):
            pass
    with pytest.raises(AssertionError) as raised:
        captured_telemetry.operation("stoer")
    assert "0 operations 'stoer'" in str(raised.value)
    assert "['fetch', 'store', 'store']" in str(raised.value)
    with pytest.raises(AssertionError, match="2 operations 'store'"):
        captured_telemetry.operation("store")


def test_live_operations_are_not_settled(captured_telemetry):
    """An operation that still runs is not among the settled ones, but active in the metrics."""
    with operation("store"):
        assert captured_telemetry.operations() == []
        assert captured_telemetry.metric("threat.ingest.operation.active") == 1
    assert len(captured_telemetry.operations()) == 1


def test_metric_is_summed_over_matching_labels(captured_telemetry):
    """`metric` sums the label sets that match; a label is named by its last part or more."""
    for feed, count in (("misp", 2), ("otx", 3)):
        for _ in range(count):
            with operation("fetch", feed=feed) as op:
                op.ingested(10)
    with pytest.raises(KeyError), operation("fetch", feed="misp"):
        raise KeyError
    metric = captured_telemetry.metric
    assert metric(DURATION) == 6
    assert metric(DURATION, feed_name="misp") == 3
    assert metric(DURATION, threat_feed_name="misp", outcome="ok") == 2
    assert metric(DURATION, error_type="KeyError") == 1
    assert metric(DURATION, feed_name="none") == 0
    assert metric(DURATION, no_such_label="x") == 0
    assert metric("no.such.metric") == 0
    assert metric("threat.ingest.items.received", feed_name="otx") == 30


def test_items_are_summed_over_matching_labels(captured_telemetry):
    """`items` adds up the account of all operations that match, from the metrics."""
    with operation("fetch", feed="misp") as op:
        op.received(4)
        op.converted(3)
        op.ingested(1)
        op.skipped(1, reason="old")
        op.failed(count=1)
    with operation("store", feed="misp") as op:
        op.received(1)
        op.ingested(2)
    assert captured_telemetry.items(operation_name="fetch") == ItemAccount(4, 3, 1, 1, 1, 1, 0)
    assert captured_telemetry.items(operation_name="store").excess == 1
    assert captured_telemetry.items(feed_name="misp").ingested == 3
    assert captured_telemetry.items(feed_name="otx") == ItemAccount()


def test_label_sets_are_those_of_the_metric(captured_telemetry):
    """`label_sets` lists every label set of a metric."""
    with operation("fetch"):
        pass
    assert captured_telemetry.label_sets(DURATION) == [
        {"threat.ingest.operation.name": "fetch", "threat.ingest.outcome": "ok"}
    ]
    assert captured_telemetry.label_sets("no.such.metric") == []


def test_captures_are_apart():
    """Each capture sees its own block only, and restores what was there before, nested too."""
    before = current.telemetry
    with capture_telemetry() as outer:
        with operation("one"):
            pass
        with capture_telemetry() as inner, operation("two"):
            pass
        with operation("three"):
            pass
    with capture_telemetry() as later:
        pass
    assert current.telemetry is before
    assert [one.name for one in outer.operations()] == ["one", "three"]
    assert [one.name for one in inner.operations()] == ["two"]
    assert later.operations() == []


def test_capture_ends_with_an_exception_too():
    """A block that raises leaves no telemetry of its own behind."""
    before = current.telemetry
    with pytest.raises(ZeroDivisionError), capture_telemetry():
        _ = 1 / 0
    assert current.telemetry is before


def test_what_settles_after_the_capture_harms_nobody():
    """An operation that outlives the capture settles without an error."""
    with capture_telemetry() as captured:
        block = operation("late")
        op = block.__enter__()
    block.__exit__(None, None, None)
    assert op.outcome == "ok"
    assert captured.operations() == []


def test_sampler_and_clock_are_injected():
    """With a sampler that drops all there is no span, and durations come from the given clock."""
    ticks = iter(range(0, 1000, 5))
    with capture_telemetry(clock=lambda: float(next(ticks)), sampler=ALWAYS_OFF) as captured:
        with operation("store"):
            pass
        assert captured.spans == []
        assert captured.metric(DURATION) == 1


def test_threads_are_captured(captured_telemetry):
    """Operations of other threads are captured too."""

    @monitored("fetch")
    def fetch() -> None: ...

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(captured_telemetry.operations("fetch")) == 4


def test_dropped_generators_are_settled_before_one_looks(captured_telemetry):
    """What a finaliser has handed to the worker is settled when the test looks."""

    @monitored("rows")
    def rows():
        yield 1
        yield 2

    for _ in range(50):
        for _row in rows():
            break
    assert len(captured_telemetry.operations("rows")) == 50
    assert captured_telemetry.metric(DURATION, outcome="ok") == 50


GLOBAL_PROVIDERS = """
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from periscope_otel import operation
from periscope_otel.testing import capture_telemetry

exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
tracers = TracerProvider()
tracers.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(tracers)
metrics.set_meter_provider(MeterProvider([reader]))

with operation("before"):
    pass
with capture_telemetry() as captured, operation("captured"):
    pass
with operation("after"):
    pass
assert [span.name for span in exporter.get_finished_spans()] == ["before", "after"]
assert [one.name for one in captured.operations()] == ["captured"]
text = reader.get_metrics_data().to_json()
assert '"after"' in text and '"before"' in text and '"captured"' not in text
"""


def test_capture_is_isolated_from_global_providers():
    """Global providers see nothing of a capture, and everything before and after it."""
    done = run_python("-c", GLOBAL_PROVIDERS)
    assert done.returncode == 0, done.stderr


def run_pytest(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "test_users.py").write_text(textwrap.dedent(code))
    return run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"),
        *("-p", "no:asyncio", "-W", "error", "test_users.py"),
        cwd=tmp_path,
    )


def test_fixture_comes_with_the_package(tmp_path):
    """A user's tests have `captured_telemetry` without any import, fresh for each test."""
    done = run_pytest(
        tmp_path,
        """
        import periscope_otel as periscope

        @periscope.monitored("store", feed="urlhaus")
        def store(rows):
            op = periscope.current_operation()
            op.received(len(rows))
            op.ingested(len(rows))

        def test_one(captured_telemetry):
            store([1, 2])
            assert captured_telemetry.operation("store").outcome == "ok"
            assert captured_telemetry.items().ingested == 2

        def test_two(captured_telemetry):
            assert captured_telemetry.operations() == []
            store([1])
            assert captured_telemetry.operation("store").items.received == 1
        """,
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_fixture_fails_a_users_test_with_a_message(tmp_path):
    """A wrong expectation fails the user's test with a message that says what has settled."""
    done = run_pytest(
        tmp_path,
        """
        from periscope_otel import operation

        def test_wrong(captured_telemetry):
            with operation("store"):
                pass
            captured_telemetry.operation("stoer")
        """,
    )
    assert done.returncode == 1
    assert "0 operations 'stoer' have settled; settled: ['store']" in done.stdout


def test_plugin_costs_nothing_where_it_is_not_used(tmp_path):
    """In a run that does not use the fixture the plugin loads neither the SDK nor an exporter."""
    done = run_pytest(
        tmp_path,
        """
        import sys

        def test_nothing():
            assert not [name for name in sys.modules if name.startswith("opentelemetry.sdk")]
            assert "periscope_otel.testing" not in sys.modules
        """,
    )
    assert done.returncode == 0, done.stdout
