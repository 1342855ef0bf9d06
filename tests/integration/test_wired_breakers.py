"""What configure() wires for breakers: client spans, their sampling, and other processes."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from otlp import receiver
from processes import run
from redis_servers import RedisServer

import periscope_otel as periscope
from periscope_otel.resilience.breaker import breakers
from periscope_otel.testing import capture_telemetry

if TYPE_CHECKING:
    from otlp import Receiver


def wired(collector: Receiver | None, env: dict[str, str] | None = None, **arguments: Any) -> Any:
    """Run the program; returns its lines by their first word, and what it logged."""
    if collector is not None:
        arguments["otlp_endpoint"] = collector.endpoint("http/protobuf")
    ended = run("wired_breakers", json.dumps(arguments), env=env or {})
    assert ended.status == 0, ended.stderr
    return dict(line.split(" ", 1) for line in ended.lines)


def test_client_spans_drive_breakers_where_the_provider_is_built_here():
    """Three refused connections of httpx open the breaker of their host, without any guard."""
    with receiver() as collector:
        assert wired(collector)["state"] == "open"


def test_they_can_be_left_out():
    """With `breaker_spans=False` no breaker is made of what other libraries call."""
    with receiver() as collector:
        assert wired(collector, breaker_spans=False)["state"] == "None"


@pytest.mark.parametrize(("recorded", "state"), [(False, "None"), (True, "open")])
def test_unsampled_client_spans_are_seen_if_that_is_asked_for(recorded, state):
    """`record_client_spans` wraps the sampler that the environment names; nothing is exported."""
    with receiver() as collector:
        told = wired(collector, {"OTEL_TRACES_SAMPLER": "always_off"}, record_client_spans=recorded)
        assert told["state"] == state
        assert collector.received().names()["GET"] == 0


def test_a_given_provider_is_left_as_it_is():
    """Nothing is added to the application's own provider unless it is asked for."""
    assert wired(None, own_provider=True)["state"] == "None"


@pytest.mark.parametrize("recorded", [False, True])
def test_a_given_providers_sampler_is_told_of(recorded):
    """It cannot be wrapped: where breakers would not see all of it, one line says what to do."""
    told = wired(None, own_provider=True, breaker_spans=True, record_client_spans=recorded)
    assert told["state"] == "None"
    assert "RecordOnlySampler" in told["WARNING"]


def test_processes_share_what_they_find(tmp_path):
    """With `redis_url` the breaker that one process has opened is open in another one."""
    with RedisServer("redis", tmp_path / "redis") as server:
        breaker = breakers.get("localhost")
        runtime = periscope.configure(
            redis_url=server.url, data_dir=tmp_path / "letters", exit_report="never"
        )
        try:
            with receiver() as collector:
                told = wired(collector, redis_url=server.url, data_dir=str(tmp_path / "others"))
            assert (told["state"], told["sharing"], told["after"]) == ("open", "True", "False")
            deadline = time.monotonic() + 60
            while breaker.state != "open" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert (breaker.state, breaker.view().reason) == ("open", "consecutive_failures")
        finally:
            runtime.shutdown(5)
        assert breaker.sharing is None


def test_sharing_can_be_left_out(tmp_path):
    """With `breaker_sharing=False` a Redis is for dead letters alone."""
    with RedisServer("redis", tmp_path / "redis") as server, receiver() as collector:
        told = wired(collector, redis_url=server.url, breaker_sharing=False,
                     data_dir=str(tmp_path / "letters"))  # fmt: skip
        assert (told["state"], told["sharing"]) == ("open", "False")
        assert server.client.keys("*cb*") == []


def test_shutdown_ends_a_retrys_wait(tmp_path, monkeypatch):
    """A call that waits for its next attempt ends with its own error when `shutdown` is called."""
    monkeypatch.setattr("periscope_otel.resilience.retrying._random", lambda: 1.0)
    runtime = periscope.configure(data_dir=tmp_path, exit_report="never")
    waiting, ended = threading.Event(), []

    retry = periscope.Retry(
        base=300.0, cap=300.0, deadline=None, on_retry=lambda _details: waiting.set()
    )

    @periscope.monitored("fetch", retry=retry)
    def fetch() -> None:
        raise ConnectionError("refused")

    def call() -> None:
        with pytest.raises(ConnectionError, match="refused"):
            fetch()
        ended.append(time.monotonic())

    with capture_telemetry():
        thread = threading.Thread(target=call)
        thread.start()
        assert waiting.wait(60)
        began = time.monotonic()
        runtime.shutdown(2)
        thread.join(60)
    assert ended
    assert ended[0] - began < 60  # of 300


def test_breakers_and_retries_work_again_after_shutdown(tmp_path):
    """A program that goes on after `shutdown` has its retries back."""
    periscope.configure(data_dir=tmp_path, exit_report="never").shutdown(2)
    attempts = []

    @periscope.monitored("fetch", retry=periscope.Retry(attempts=2, base=0.001))
    def fetch() -> None:
        attempts.append(1)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        fetch()
    assert len(attempts) == 2
