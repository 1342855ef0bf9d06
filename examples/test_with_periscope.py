"""Test what your own code tells its telemetry; the fixture comes with periscope-otel.

python -m pytest examples/test_with_periscope.py
"""

# ruff: noqa: S101  (assert is what tests are made of)
from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import periscope_otel as periscope

if TYPE_CHECKING:
    from periscope_otel.testing import CapturedTelemetry


@periscope.monitored("store", feed="blocklist")
def store(domains: list[str]) -> set[str]:
    """Keep domains, leaving out those that are there already: the code under test."""
    if not domains:
        raise ValueError("an empty blocklist is a broken one")
    kept: set[str] = set()
    op = periscope.current_operation()
    for domain in op.track(domains):
        if domain in kept:
            op.skipped(reason="duplicate")
        else:
            kept.add(domain)
            op.ingested()
    return kept


def test_every_domain_is_accounted_for(captured_telemetry: CapturedTelemetry) -> None:
    """The account adds up, and says why a domain was left out."""
    store(["bad.example", "worse.example", "bad.example"])

    operation = captured_telemetry.operation("store")
    assert operation.outcome == "ok"
    assert operation.items.ingested == 2
    assert operation.items.skipped == 1
    assert operation.items.unaccounted == 0
    assert captured_telemetry.metric("threat.ingest.items.settled", reason="duplicate") == 1


def test_an_empty_list_is_an_error(captured_telemetry: CapturedTelemetry) -> None:
    """A failure has a type that a dashboard can group by, and the feed's name."""
    with pytest.raises(ValueError, match="broken"):
        store([])

    operation = captured_telemetry.operation("store")
    assert operation.outcome == "error"
    assert operation.error_type == "ValueError"
    assert operation.feed == "blocklist"
