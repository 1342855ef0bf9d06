"""When our own series began: at the last collect that did not have them yet.

The SDK lets a series begin when it is first measured, and an observable counter when it is first
collected. What a job did that exports once, at its end, has then begun at that very moment, and a
backend that looks at how much a counter has grown finds nothing. What is counted here from nothing
was 0 for as long as a collect did not find it, so that is where it begins: a true start, as
OpenTelemetry's data model (Metrics Data Model, "Resets and Gaps") wants it. What only passes on
what the system counts began with the system, or with the process. Counters of others keep the start
they have, and so do differences: the first of those is all that was counted before.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.metrics.export import AggregationTemporality, MetricsData

from periscope_otel.telemetry import names
from periscope_otel.telemetry.ages import process_age, system_age

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.sdk.metrics.export import Metric


COUNTED_HERE = ("threat.", "circuit_breaker.", "dead_letter.", "periscope.")
"""What the names of the metrics begin with that this package counts from nothing."""

COUNTED_BY_DEVICES = ("periscope.gpu.",)
"""What of these only passes on what a device has counted, since who knows when."""

COUNTED_BY_SYSTEM: dict[str, Callable[[], float | None]] = {
    "system.": system_age,
    "process.": process_age,
}
"""What those begin with that the system counts, and for how many seconds it has."""


class StartTimes:
    """Puts right when our own cumulative series began; for one reader.

    Args:
        clock: Nanoseconds since 1970; what is counted begins now.
    """

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._last_collect = clock()
        self._origins: dict[str, int] = {}
        """When the system, and the process, began: once and for all, since clocks are set."""
        self._starts: dict[int, int] = {}
        """The true start for each start that the SDK gave; no more than there are series."""

    def put_right(self, collected: MetricsData) -> MetricsData:
        """Return what was collected, with true starts; wants to see each collect."""
        latest = self._last_collect
        resources = []
        for resource in collected.resource_metrics:
            scopes = []
            for scope in resource.scope_metrics:
                latest = max(latest, _latest_in(scope.metrics))
                if scope.scope.name == names.SCOPE:
                    metrics = [self._metric(metric) for metric in scope.metrics]
                    scope = replace(scope, metrics=metrics)  # noqa: PLW2901
                scopes.append(scope)
            resources.append(replace(resource, scope_metrics=scopes))
        self._last_collect = latest
        return MetricsData(resource_metrics=resources)

    def _metric(self, metric: Metric) -> Metric:
        data: Any = metric.data
        temporality = getattr(data, "aggregation_temporality", None)  # a gauge has none
        only_grows = getattr(data, "is_monotonic", True)  # a histogram does
        if temporality is not AggregationTemporality.CUMULATIVE or not only_grows:
            return metric
        start_of = self._start_in(metric.name)
        if start_of is None:
            return metric
        points = [
            replace(point, start_time_unix_nano=start_of(point.start_time_unix_nano))
            for point in data.data_points
        ]
        return replace(metric, data=replace(data, data_points=points))

    def _start_in(self, name: str) -> Callable[[int], int] | None:
        """Return what makes a true start of one that the SDK gave; None if that is to stand."""
        if name.startswith(COUNTED_HERE) and not name.startswith(COUNTED_BY_DEVICES):
            return lambda given: self._starts.setdefault(given, min(given, self._last_collect))
        prefix = name[: name.find(".") + 1]
        if prefix not in COUNTED_BY_SYSTEM:
            return None
        origin = self._origins.get(prefix)
        if origin is None:
            age = COUNTED_BY_SYSTEM[prefix]()
            if age is None:
                return None
            origin = self._origins[prefix] = time.time_ns() - round(age * 1e9)
        return lambda given: min(given, origin)


def _latest_in(metrics: Sequence[Metric]) -> int:
    times = (point.time_unix_nano for one in metrics for point in one.data.data_points)
    return max(times, default=0)
