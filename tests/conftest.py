"""What all tests share: internal errors are raised, and no test leaves telemetry behind."""

from __future__ import annotations

import os
import signal
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


def pytest_configure() -> None:
    """Let programs that tests start be interrupted, also where a shell runs all in background.

    Such a shell has what it starts ignore SIGINT, and whatever that starts inherits it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let no test be skipped in continuous integration: what is missing there is a failure.

    Hardware and rights that such machines seldom have may be.
    """
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") != "true" or reporter is None:
        return
    skipped = [one for one in reporter.stats.get("skipped", []) if "hardware" not in one.keywords]
    if skipped:
        reporter.write_line(f"{len(skipped)} tests were skipped under CI=true", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
