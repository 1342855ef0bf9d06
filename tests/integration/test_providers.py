"""Where telemetry goes: the application's own providers, or what the standard variables say."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import pytest
from processes import otlp, run

if TYPE_CHECKING:
    from otlp import Receiver

WORK = 7


@pytest.mark.parametrize("how", ["given", "global"])
def test_the_applications_providers_are_used_flushed_and_left_running(how: str) -> None:
    """Given and global providers get everything, are flushed by shutdown() and never shut down."""
    ended = run("given", how)
    assert ended.status == 0, ended.stderr
    told = json.loads(ended.lines[0])
    assert told["calls"] == ["flush metrics", "flush traces"]
    assert (told["before"], told["spans"], told["count"], told["later"]) == (0, 5, 5, 1)


@pytest.mark.parametrize("how", ["given", "global"])
def test_configure_replaces_no_provider(how: str) -> None:
    """Global providers stay what the application set; a given one is not made global."""
    told = json.loads(run("given", how).lines[0])
    assert told["globals"] == [how == "global"] * 2


def test_configure_twice_with_the_same_arguments_is_silent() -> None:
    """A second configure() with the same arguments returns the same runtime and says nothing."""
    same = json.dumps({"service_name": "feeds", "exit_report": "never"})
    ended = run("configured_twice", same, same)
    assert ended.lines == ["True"]
    assert ended.stderr == ""


def test_configure_twice_with_other_arguments_names_the_difference() -> None:
    """A second configure() with other arguments is one warning that says what differs."""
    one, other = ({"service_name": name, "exit_report": "never"} for name in ("feeds", "lists"))
    ended = run("configured_twice", json.dumps(one), json.dumps(other))
    warning, same = ended.lines
    assert warning.startswith("WARNING ")
    assert "service_name: feeds -> lists" in warning
    assert "exit_report" not in warning
    assert same == "True"


def work(env: dict[str, str], **arguments: str) -> dict[str, Any]:
    """Run `variables` with an environment; returns what it tells."""
    ended = run("variables", env=env | {"ARGUMENTS": json.dumps(arguments)})
    assert ended.status == 0, ended.stderr
    return json.loads(ended.lines[-1]) | {"lines": ended.lines[:-1], "stderr": ended.stderr}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_the_standard_endpoint_and_protocol_are_kept(collector: Receiver, protocol: str) -> None:
    """OTEL_EXPORTER_OTLP_ENDPOINT and _PROTOCOL alone send both signals there, in that protocol."""
    work(otlp(collector.endpoint(protocol), protocol))
    assert collector.received().names() == {"work": WORK}
    assert collector.received().sums() == {"work": WORK}
    assert {one.protocol for one in collector.requests()} == {protocol.partition("/")[0]}


def test_an_endpoint_argument_wins_over_the_environment(collector: Receiver) -> None:
    """`otlp_endpoint=` is where telemetry goes, whatever OTEL_EXPORTER_OTLP_ENDPOINT says."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        elsewhere = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        work(otlp(elsewhere), otlp_endpoint=collector.http)
    assert collector.received().names() == {"work": WORK}
    assert {one.path for one in collector.requests()} == {"/v1/traces", "/v1/metrics"}


def test_each_signal_may_have_an_endpoint_of_its_own(collector: Receiver) -> None:
    """OTEL_EXPORTER_OTLP_TRACES_ENDPOINT alone sends spans, to that very URL, and no metrics."""
    work({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{collector.http}/own/path"})
    assert collector.received().names() == {"work": WORK}
    assert {one.path for one in collector.requests()} == {"/own/path"}


def test_each_signal_may_have_a_protocol_of_its_own(collector: Receiver) -> None:
    """OTEL_EXPORTER_OTLP_METRICS_PROTOCOL and _ENDPOINT steer metrics alone."""
    env = otlp(collector.http)
    env["OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"] = collector.grpc
    env["OTEL_EXPORTER_OTLP_METRICS_PROTOCOL"] = "grpc"
    work(env)
    kinds = {(one.protocol, hasattr(one.message, "resource_spans")) for one in collector.requests()}
    assert kinds == {("http", True), ("grpc", False)}
    assert collector.received().sums() == {"work": WORK}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize("compression", ["", "none", "gzip", "unheard-of"])
def test_every_compression_gets_through(
    collector: Receiver, protocol: str, compression: str
) -> None:
    """OTEL_EXPORTER_OTLP_COMPRESSION compresses where it says gzip, and breaks nothing else."""
    work(otlp(collector.endpoint(protocol), protocol, OTEL_EXPORTER_OTLP_COMPRESSION=compression))
    assert collector.received().names() == {"work": WORK}
    headers = collector.requests()[0].headers
    if protocol == "http/protobuf":
        assert headers.get("content-encoding") == ("gzip" if compression == "gzip" else None)


def test_no_traces_where_the_environment_says_none(collector: Receiver) -> None:
    """OTEL_TRACES_EXPORTER=none sends no span, and the counts stay exact."""
    work(otlp(collector.http, OTEL_TRACES_EXPORTER="none"))
    assert collector.received().spans == []
    assert collector.received().sums() == {"work": WORK}


def test_no_metrics_where_the_environment_says_none(collector: Receiver) -> None:
    """OTEL_METRICS_EXPORTER=none sends no metric, and every span."""
    work(otlp(collector.http, OTEL_METRICS_EXPORTER="none"))
    assert collector.received().points == []
    assert collector.received().names() == {"work": WORK}


def test_spans_go_to_the_console_where_the_environment_says_so(collector: Receiver) -> None:
    """OTEL_TRACES_EXPORTER=console writes spans to standard output and sends none."""
    told = work(otlp(collector.http, OTEL_TRACES_EXPORTER="console"))
    assert sum('"name": "work"' in line for line in told["lines"]) == WORK
    assert collector.received().spans == []
    assert collector.received().sums() == {"work": WORK}


def test_an_empty_exporter_variable_is_an_unset_one(collector: Receiver) -> None:
    """An empty OTEL_TRACES_EXPORTER or OTEL_METRICS_EXPORTER means the same as none at all."""
    work(otlp(collector.http, OTEL_TRACES_EXPORTER="", OTEL_METRICS_EXPORTER=""))
    assert collector.received().names() == {"work": WORK}
    assert collector.received().sums() == {"work": WORK}


def test_unsampled_operations_are_counted(collector: Receiver) -> None:
    """OTEL_TRACES_SAMPLER=always_off sends no span, and the counts stay exact."""
    work(otlp(collector.http, OTEL_TRACES_SAMPLER="always_off"))
    assert collector.received().names() == {}
    assert collector.received().sums() == {"work": WORK}
    assert collector.received().sums("threat.ingest.items.received") == {"work": 2 * WORK}


def test_a_disabled_sdk_sends_nothing(collector: Receiver) -> None:
    """OTEL_SDK_DISABLED=true sends nothing at all and changes nothing else."""
    work(otlp(collector.http, OTEL_SDK_DISABLED="true"))
    assert collector.requests() == []


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_headers_are_sent(collector: Receiver, protocol: str) -> None:
    """OTEL_EXPORTER_OTLP_HEADERS is sent with every request, and shown nowhere."""
    env = otlp(collector.endpoint(protocol), protocol)
    told = work(env | {"OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=cert,api-key=s3cr3t-value"})
    assert len(collector.requests()) >= 2
    for one in collector.requests():
        assert (one.headers["x-tenant"], one.headers["api-key"]) == ("cert", "s3cr3t-value")
    assert "s3cr3t" not in told["stderr"]


def test_requests_are_compressed_where_the_environment_says_so(collector: Receiver) -> None:
    """OTEL_EXPORTER_OTLP_COMPRESSION=gzip compresses every request."""
    work(otlp(collector.http, OTEL_EXPORTER_OTLP_COMPRESSION="gzip"))
    assert {one.headers["content-encoding"] for one in collector.requests()} == {"gzip"}
    assert collector.received().names() == {"work": WORK}


def test_delta_temporality_counts_exactly(collector: Receiver) -> None:
    """OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=delta sends deltas with the same sum."""
    env = {"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta"}
    work(otlp(collector.http) | env)
    points = [one for one in collector.received().points if one.metric.endswith(".duration")]
    assert {one.delta for one in points} == {True}
    assert collector.received().sums() == {"work": WORK}


@pytest.mark.parametrize("env", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}])
def test_without_an_endpoint_nothing_tries_the_network(env: dict[str, str]) -> None:
    """Where nothing names a destination no socket is used and no exporter is loaded."""
    told = work(env | {"OTEL_SERVICE_NAME": "feeds"})
    assert told["touched"] == []
    assert told["loaded"] == []


def test_the_resource_says_which_process_this_is(collector: Receiver) -> None:
    """Spans and metrics carry service, host, process and instance, and no command line."""
    env = otlp(collector.http, OTEL_SERVICE_NAME="feeds")
    env["OTEL_RESOURCE_ATTRIBUTES"] = "deployment.environment.name=test,service.name=other"
    told = work(env)
    resources = collector.received().resources()
    (resource,) = resources["spans"]
    assert resources["metrics"] == [resource]
    assert resource["service.name"] == "feeds"
    assert resource["deployment.environment.name"] == "test"
    assert resource["host.name"] == socket.gethostname()
    assert resource["process.pid"] == told["pid"]
    assert len(resource["service.instance.id"]) >= 8
    assert not any(name.startswith("process.command") for name in resource)
    assert "variables.py" not in repr(resource)


def test_the_service_name_argument_wins(collector: Receiver) -> None:
    """`service_name=` wins over OTEL_SERVICE_NAME."""
    work(otlp(collector.http, OTEL_SERVICE_NAME="environment"), service_name="argument")
    assert list(collector.by_service()) == ["argument"]
