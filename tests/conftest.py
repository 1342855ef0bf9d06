"""What all tests share: internal errors are raised, and no test leaves telemetry behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from periscope_otel import guard
from periscope_otel.telemetry.current import current

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def internal_errors_are_raised() -> Iterator[None]:
    """Let no error of the plugin's own hide behind its guard."""
    guard.set_strict(True)
    guard.reset()
    yield
    guard.set_strict(False)


@pytest.fixture(autouse=True)
def telemetry_is_left_as_it_was() -> Iterator[None]:
    """Fail the test that leaves a telemetry of its own in place."""
    before = current.telemetry
    yield
    assert current.telemetry is before
