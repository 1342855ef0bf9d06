"""Killed at random moments, a process loses nothing that had ended and does not hang."""

from __future__ import annotations

import json
import secrets
import signal
from typing import TYPE_CHECKING

import pytest
from processes import running

if TYPE_CHECKING:
    from otlp import Receiver

KILL_POINTS = 200
AT_ONCE = 6


@pytest.mark.usefixtures("uncovered")
def test_no_kill_point_loses_what_had_ended(collector: Receiver) -> None:
    """At 200 random kill points all operations that had ended arrive, as span and count."""
    seed = secrets.token_hex(4)
    env = {
        "OTEL_BSP_MAX_QUEUE_SIZE": "50000",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "60",  # what is given up too early arrives twice
        "PERISCOPE_SHUTDOWN_TIMEOUT": "60",
    }
    arguments = (collector.http, seed, str(KILL_POINTS), str(AT_ONCE))
    with running("kill_points", *arguments, env=env) as driver:
        ended = driver.ended(280)
    programs = [json.loads(line) for line in ended.lines]
    services = collector.by_service()
    wrong = []
    for program in programs:
        received = services.get(f"program-{program['number']}")
        spans = 0 if received is None else received.names()["work"]
        counts = 0 if received is None else received.sums()["work"]
        items = 0 if received is None else received.sums("threat.ingest.items.received")["work"]
        # After SIGTERM the main thread works on until the flush is done; after SIGINT it does not.
        due = program["before" if program["signal"] == signal.SIGTERM else "ended"]
        right = (
            program["status"] == -program["signal"]
            and not program["hung"]
            and min(spans, counts, items) >= due >= 1
            and received.duplicates() == []
            and program["stderr"].count("periscope-otel: exported ") == 1
        )
        if not right:
            wrong.append({"spans": spans, "counts": counts, "items": items} | program)
    assert ended.status == 0, ended.stderr
    assert wrong == [], f"seed {seed}, {len(wrong)} of {len(programs)}: {wrong[:3]}"
    assert len(programs) == KILL_POINTS
