"""What the unit tests share: neither a busy machine nor what others have left behind fails one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

# A busy machine stops any test for seconds, also in the middle of an example. Whatever else was
# chosen, as hypothesis does by itself where CI is set, stays.
settings.register_profile(
    "however long it takes",
    settings(),
    deadline=None,
    suppress_health_check=[*settings().suppress_health_check, HealthCheck.too_slow],
)
settings.load_profile("however long it takes")

OURS = ("periscope-worker", "periscope-letters")
"""Threads that a process has once, for whoever comes."""


@pytest.fixture(autouse=True)
def log_lines_are_of_the_test(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Let `caplog` have no line of a thread that another test has left behind."""
    left = {
        one
        for one in threading.enumerate()
        if one is not threading.current_thread() and not one.name.startswith(OURS)
    }

    def is_of_the_test(_record: object) -> bool:
        return threading.current_thread() not in left  # it is the thread that logs

    caplog.handler.addFilter(is_of_the_test)
    yield
    caplog.handler.removeFilter(is_of_the_test)
