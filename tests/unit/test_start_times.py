"""When series begin: where they were still 0, so that a backend sees all that they have grown."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import Counter, MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    InMemoryMetricReader,
    MetricsData,
)
from quiet_moment import in_a_quiet_moment

from periscope_otel.telemetry import names
from periscope_otel.telemetry.ages import process_age, system_age
from periscope_otel.telemetry.start_times import COUNTED_BY_SYSTEM, StartTimes

if TYPE_CHECKING:
    from pathlib import Path

    from opentelemetry.metrics import Meter

IT = "threat.ingest.it"
BEGAN = 1_000
"""Long before anything that a test measures."""


class Collects:
    """A meter, and what is collected from it with its starts put right."""

    def __init__(self, temporality: AggregationTemporality | None = None) -> None:
        preferred = {} if temporality is None else {Counter: temporality}
        self._reader = InMemoryMetricReader(preferred_temporality=preferred)
        self._provider = MeterProvider([self._reader], shutdown_on_exit=False)
        self.foreign_meter: Meter = self._provider.get_meter("somebody.elses")
        self.meter: Meter = self._provider.get_meter(names.SCOPE)
        self._starts = StartTimes(clock=lambda: BEGAN)

    def next(self) -> dict[Any, Any]:
        """Collect; returns points by metric, or by metric and feed."""
        collected = self._reader.get_metrics_data()
        assert isinstance(collected, MetricsData)
        right = self._starts.put_right(collected)
        return {
            (metric.name, *point.attributes.values()): point
            for scope in right.resource_metrics[0].scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        }


def make(meter: Meter, kind: str) -> None:
    """Make an instrument called IT that has grown to 5."""
    if kind == "counter":
        meter.create_counter(IT).add(5)
    elif kind == "histogram":
        meter.create_histogram(IT).record(5)
    else:
        meter.create_observable_counter(IT, [lambda _: [Observation(5)]])


@pytest.mark.parametrize("kind", ["counter", "histogram", "observable counter"])
def test_what_the_first_collect_finds_began_with_the_reader(kind: str) -> None:
    """A series of the first collect began when counting began, and still has at the second."""
    collects = Collects()
    make(collects.meter, kind)
    first, second = collects.next(), collects.next()
    assert first[IT,].start_time_unix_nano == BEGAN < first[IT,].time_unix_nano
    assert second[IT,].start_time_unix_nano == BEGAN


def test_a_later_series_began_at_the_last_collect_without_it() -> None:
    """A label set that comes later was 0 until the collect before, and keeps that start."""
    collects = Collects()
    counter = collects.meter.create_counter(IT)
    counter.add(5, {"feed": "urlhaus"})
    first = collects.next()
    counter.add(7, {"feed": "misp"})
    second, third = collects.next(), collects.next()
    for later in (second, third):
        assert later[IT, "urlhaus"].start_time_unix_nano == BEGAN
        assert later[IT, "misp"].start_time_unix_nano == first[IT, "urlhaus"].time_unix_nano
    assert second[IT, "misp"].value == 7


def test_what_does_not_only_grow_is_left_alone() -> None:
    """Gauges, up-down counters and delta series are as the SDK gave them."""
    collects = Collects(AggregationTemporality.DELTA)
    collects.meter.create_gauge("threat.gauge").set(5)
    collects.meter.create_up_down_counter("threat.queue").add(5)
    collects.meter.create_counter("threat.delta").add(5)
    points = collects.next()
    assert {point.value for point in points.values()} == {5}
    assert points["threat.queue",].start_time_unix_nano > BEGAN
    assert points["threat.delta",].start_time_unix_nano > BEGAN


@pytest.mark.parametrize("kind", ["counter", "histogram", "observable counter"])
def test_what_others_count_keeps_its_start(kind: str) -> None:
    """A counter of another library may have grown before this process: its start is its own."""
    collects = Collects()
    make(collects.foreign_meter, kind)
    assert collects.next()[IT,].start_time_unix_nano > BEGAN


def test_what_the_system_has_counted_keeps_its_start() -> None:
    """A counter that passes on what the host counts since its start did not begin with us."""
    collects = Collects()
    collects.meter.create_observable_counter("system.cpu.time", [lambda _: [Observation(10**6)]])
    assert collects.next()["system.cpu.time",].start_time_unix_nano > BEGAN


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_a_device_has_counted_keeps_its_start() -> None:
    """Rows of a GPU that were remapped long ago were not remapped since this process began."""
    collects = Collects()
    name = names.GPU_REMAPPED_ROWS.name
    collects.meter.create_observable_counter(name, [lambda _: [Observation(7)]])
    (point,) = collects.next().values()
    assert point.start_time_unix_nano > BEGAN


@in_a_quiet_moment
def test_what_the_system_counts_began_with_it() -> None:
    """Counters of the host began when it was started, those of the process with the process."""
    collects = Collects()
    for name in ("system.cpu.time", "process.cpu.time"):
        collects.meter.create_observable_counter(name, [lambda _: [Observation(10**6)]])
    first, second = collects.next(), collects.next()
    began = {
        "system.cpu.time": psutil.boot_time(),
        "process.cpu.time": psutil.Process().create_time(),
    }
    for name, seconds in began.items():
        assert first[name,].start_time_unix_nano / 1e9 == pytest.approx(seconds, abs=2.0)
        assert first[name,].start_time_unix_nano == second[name,].start_time_unix_nano


def test_differences_of_what_the_system_counts_are_left_alone() -> None:
    """A difference began where the SDK says; so did a counter that is no counter of the host's."""
    before = time.time()
    collects = Collects(AggregationTemporality.DELTA)
    collects.meter.create_counter("system.delta").add(5)
    collects.meter.create_observable_counter("hw.energy", [lambda _: [Observation(5)]])
    for point in collects.next().values():
        assert before - 5.0 <= point.start_time_unix_nano / 1e9 <= time.time() + 5.0


def test_what_has_no_known_beginning_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the platform does not tell when it was started, the start is the SDK's."""
    monkeypatch.setitem(COUNTED_BY_SYSTEM, "system.", lambda: None)
    before = time.time()
    collects = Collects()
    collects.meter.create_observable_counter("system.cpu.time", [lambda _: [Observation(5)]])
    (point,) = collects.next().values()
    assert before - 5.0 <= point.start_time_unix_nano / 1e9 <= time.time() + 5.0


def test_ages_without_a_proc_are_none(tmp_path: Path) -> None:
    """A process whose /proc is hidden, or says nothing of use, has no known age."""
    assert process_age(tmp_path) is None
    (tmp_path / "self").mkdir()
    (tmp_path / "self/stat").write_text("1 (cat) S 1 2")
    assert process_age(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_name_of_a_program_may_be_anything(tmp_path: Path) -> None:
    """Blanks and parentheses in the name of the program do not hide when it was started."""
    (tmp_path / "self").mkdir()
    fields = " ".join(str(number) for number in range(4, 40)).replace(" 22 ", " 500 ")
    (tmp_path / "self/stat").write_text(f"7 (a) (b 1 2 3) S {fields}")
    before, age, after = system_age(), process_age(tmp_path), system_age()
    assert before is not None
    assert before - 0.01 <= age + 500 / os.sysconf("SC_CLK_TCK") <= after + 0.01


def test_an_empty_collect_is_none_that_a_series_was_missing_from() -> None:
    """With nothing collected there is no time of a collect, and counting begins where it began."""
    starts = StartTimes(clock=lambda: BEGAN)
    assert starts.put_right(MetricsData(resource_metrics=[])).resource_metrics == []
