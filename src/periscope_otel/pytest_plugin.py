"""The pytest fixture `captured_telemetry`; loaded by pytest itself through its entry point."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from periscope_otel.testing import CapturedTelemetry


@pytest.fixture
def captured_telemetry() -> Iterator[CapturedTelemetry]:
    """Spans, metrics and item counts of this test, in isolation from global providers.

    Example:
        >>> def test_store(captured_telemetry):
        ...     store(bundle)
        ...     assert captured_telemetry.operation("store").outcome == "ok"
    """
    # Imported here: pytest loads plugins in every run, also where no test uses this one.
    from periscope_otel.testing import capture_telemetry

    with capture_telemetry() as captured:
        yield captured
