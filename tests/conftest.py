"""What all tests share: internal errors are raised, and no test leaves telemetry behind."""

from __future__ import annotations

import gc
import os
import signal
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import covered_forks  # noqa: F401  (before the plugin)
import pytest

from periscope_otel import guard
from periscope_otel.dead_letter.in_use import in_use
from periscope_otel.resilience.breaker import breakers
from periscope_otel.resilience.budget import forget_budgets
from periscope_otel.telemetry.current import current
from periscope_otel.telemetry.letter_counts import letter_counts

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def uncovered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run programs without coverage, whose own lock does not stand forks and random interrupts.

    A child forked while another thread has that lock waits for it for ever, and Ctrl-C in the
    middle of it leaves it locked.
    """
    for variable in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
        monkeypatch.delenv(variable, raising=False)


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


@pytest.fixture(autouse=True)
def breakers_are_of_the_test() -> Iterator[None]:
    """Let no breaker that a test has only named, and no retry that it has made, reach another."""
    with breakers.set_aside(), pytest.MonkeyPatch.context() as patch:
        # Also those that a failed test, or a cycle that is not collected yet, still holds.
        patch.setattr(breakers, "_given", WeakValueDictionary())
        yield
    forget_budgets()


@pytest.fixture(autouse=True)
def dead_letters_stay_in_the_test(tmp_path_factory) -> Iterator[None]:
    """Keep the dead letters of a test, and of programs that it starts, out of the user's folder."""
    # Not by the fixture `monkeypatch`: what a test does with that would be undone too late.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))
        yield
        in_use.configure(None)
        letter_counts.clear()


def pytest_configure() -> None:
    """Let programs that tests start be interrupted, also where a shell runs all in background.

    Such a shell has what it starts ignore SIGINT, and whatever that starts inherits it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep thousands of collected tests out of each garbage collection.

    Such a collection stops all threads, on a busy machine for seconds, and with them those that a
    test waits for.
    """
    gc.collect()
    gc.freeze()


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
