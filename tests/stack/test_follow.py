"""Following a marker through the stack: found where it arrives, and where it is lost said why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from follow import follow
from processes import clean_environment
from servers import Collector, Jaeger, Prometheus

if TYPE_CHECKING:
    from conftest import Stack

FOLLOW = Path(__file__).parent / "follow.py"
WAY = [
    "span to the Collector",
    "span in Jaeger",
    "metric to the Collector",
    "metric in Prometheus",
]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_marker_is_followed_to_its_ends(stack: Stack, protocol: str) -> None:
    """Every hop is passed, and the last of each signal says where to look."""
    hops = follow(
        stack.collector.endpoint(protocol),
        jaeger=stack.jaeger.api.url,
        prometheus=stack.prometheus.url,
        protocol=protocol,
    )
    assert [(hop.name, hop.passed) for hop in hops] == [(name, True) for name in WAY]
    trace_id = hops[1].detail.rpartition("/")[2]
    assert [span.name for span in stack.jaeger.api.trace(trace_id)] == ["follow"]
    assert stack.prometheus.api.value(hops[3].detail) == 1


def test_a_marker_is_followed_whatever_the_sampler(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment that samples nothing does not hide the marker."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    hops = follow(stack.collector.http, jaeger=stack.jaeger.api.url)
    assert all(hop.passed for hop in hops)


def test_a_collector_that_is_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing behind it is asked, and the reason is there."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    away = Collector(tmp_path, jaeger="127.0.0.1:1", prometheus="http://127.0.0.1:1")
    hops = follow(away.http, jaeger="http://127.0.0.1:1", prometheus="http://127.0.0.1:1")
    assert [hop.name for hop in hops] == [WAY[0], WAY[2]]
    for hop in hops:
        assert not hop.passed
        assert away.http in hop.detail
        assert "Connection refused" in hop.detail


def test_a_destination_that_is_away_is_named(tmp_path: Path) -> None:
    """What the Collector took and cannot deliver is missing where it should be."""
    jaeger, prometheus = Jaeger(tmp_path / "j"), Prometheus(tmp_path / "p")
    with Collector(tmp_path / "c", "127.0.0.1:1", "http://127.0.0.1:1") as collector, prometheus:
        hops = follow(collector.http, jaeger=jaeger.api.url, prometheus=prometheus.url, timeout=0.5)
    assert [(hop.name, hop.passed) for hop in hops] == list(
        zip(WAY, [True, False] * 2, strict=True)
    )
    assert "refused" in hops[1].detail
    assert "is not in Prometheus" in hops[3].detail


def test_the_command_has_a_line_for_each_hop(stack: Stack) -> None:
    """Its exit code says whether all were passed."""
    arguments = {
        "--otlp": stack.collector.http,
        "--jaeger": stack.jaeger.api.url,
        "--prometheus": stack.prometheus.url,
    }
    command = [sys.executable, str(FOLLOW), *(part for pair in arguments.items() for part in pair)]
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line[:4] for line in done.stdout.splitlines()] == ["ok  "] * 4
