"""The Prometheus page: exact, on this machine only by default, and not disturbed by its clients."""

from __future__ import annotations

import http.client
import json
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import pytest
from processes import Program, running
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterator

ANY_PORT = "127.0.0.1:0"
COUNT = "threat_ingest_operation_duration_seconds_count"
RECEIVED = "threat_ingest_items_received_total"


class Answer(NamedTuple):
    """What the server answered."""

    status: int
    headers: dict[str, str]
    body: str


def ask(port: int, path: str = "/metrics", method: str = "GET", **headers: str) -> Answer:
    """Send one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        named = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, named, response.read().decode())
    finally:
        connection.close()


def samples(families: Any, name: str) -> dict[str, float]:
    """Return the values of a sample by operation."""
    return {
        sample.labels["threat_ingest_operation_name"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


def listening(pid: int) -> set[tuple[str, int]]:
    """Return the addresses on which a process listens."""
    connections = psutil.Process(pid).net_connections(kind="inet")
    return {tuple(one.laddr) for one in connections if one.status == psutil.CONN_LISTEN}


@contextmanager
def page(kind: str = "built", address: str = ANY_PORT) -> Iterator[tuple[Program, int]]:
    """Run a program with a page; gives it and the port."""
    with running("page", kind, address) as program:
        yield program, int(program.line())


def do(program: Program, *command: str) -> str:
    """Tell the program `page` something and return its answer."""
    program.tell(" ".join(command))
    return program.line()


@pytest.mark.parametrize("kind", ["built", "given"])
def test_the_page_counts_exactly(kind: str) -> None:
    """/metrics parses as Prometheus text and has exact counts, also on a given MeterProvider."""
    with page(kind) as (program, port):
        for total in (5, 12):
            do(program, "work", "5" if total == 5 else "7")
            families = list(text_string_to_metric_families(ask(port).body))
            assert samples(families, COUNT) == {"work": total}
            assert samples(families, RECEIVED) == {"work": 2 * total}


def test_the_page_speaks_openmetrics() -> None:
    """A client that accepts OpenMetrics gets it, with exact counts."""
    with page() as (program, port):
        do(program, "work", "5")
        answer = ask(port, Accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = list(openmetrics.text_string_to_metric_families(answer.body))
    assert samples(families, COUNT) == {"work": 5}


@pytest.mark.parametrize(
    ("address", "host"),
    [
        (ANY_PORT, "127.0.0.1"),
        (":0", "127.0.0.1"),
        ("localhost:0", "127.0.0.1"),
        ("0.0.0.0:0", "0.0.0.0"),
    ],
)
def test_the_page_listens_where_the_address_says(address: str, host: str) -> None:
    """The page is bound to loopback alone, unless its address says otherwise."""
    with page(address=address) as (program, port):
        assert listening(program.pid) == {(host, port)}


def test_the_page_listens_on_ipv6_where_the_address_says() -> None:
    """An IPv6 address, which the setting takes, is one that the page listens on."""
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
    with running("page", "built", "[::1]:0") as program:
        answer = program.line()
        assert answer.isdecimal(), answer
        assert listening(program.pid) == {("::1", int(answer))}


def test_a_taken_port_is_one_clear_error() -> None:
    """A port in use is an OSError that names it, and configure() works with another one then."""
    with socket.create_server(("127.0.0.1", 0)) as holder, running("page", "later") as program:
        taken = holder.getsockname()[1]
        answer = do(program, "configure", json.dumps({"prometheus": f"127.0.0.1:{taken}"}))
        assert answer.startswith("OSError "), answer
        assert str(taken) in answer
        port = int(do(program, "configure", json.dumps({"prometheus": ANY_PORT})))
        do(program, "work", "3")
        families = list(text_string_to_metric_families(ask(port).body))
        assert samples(families, COUNT) == {"work": 3}


def test_health_answers_ok() -> None:
    """/health answers 200 with a short text."""
    with page() as (_, port):
        answer = ask(port, "/health")
    assert (answer.status, answer.body) == (200, "ok\n")


def test_an_unknown_path_is_not_found() -> None:
    """Any other path is 404."""
    with page() as (_, port):
        assert [ask(port, path).status for path in ("/", "/metricsx", "/%00", "/../etc")] == [
            404
        ] * 4


def test_head_has_the_headers_and_no_body() -> None:
    """HEAD answers as GET does, without the body."""
    with page() as (program, port):
        do(program, "work", "1")
        head = ask(port, method="HEAD")
    assert head.status == 200
    assert head.body == ""
    assert head.headers["content-type"].startswith("text/plain")
    assert int(head.headers["content-length"]) > 100


GARBAGE = (
    b"\x00\xff" * 500 + b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET /metrics HTTP/9.9\r\n\r\n",
    b"\r\n" * 10,
)


def test_slow_and_garbled_clients_do_no_harm() -> None:
    """With clients that stall, send garbage or hang up the page answers others as before."""
    with page() as (program, port):
        do(program, "work", "4")
        stalled = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(40)]
        for connection in stalled:
            connection.sendall(b"GET /metr")
        for garbage in GARBAGE:
            with socket.create_connection(("127.0.0.1", port), 10) as connection:
                connection.sendall(garbage)
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc")
        families = list(text_string_to_metric_families(ask(port).body))
        assert samples(families, COUNT) == {"work": 4}
        assert do(program, "shutdown") == "shut down"
        for connection in stalled:
            connection.close()
        program.send(9)
        assert "Traceback" not in program.ended().stderr


@pytest.mark.usefixtures("uncovered")
def test_a_forked_child_does_not_hold_the_port() -> None:
    """A child listens on nothing, and the port is free again once the parent has shut down."""
    with page() as (program, port):
        child = int(do(program, "fork"))
        do(program, "work", "2")
        assert listening(child) == set()
        families = list(text_string_to_metric_families(ask(port).body))
        assert samples(families, COUNT) == {"work": 2}
        do(program, "shutdown")
        assert listening(program.pid) == set()
        with socket.create_server(("127.0.0.1", port)):
            pass
        assert psutil.pid_exists(child)
        do(program, "end_children")


def test_shutdown_frees_the_port_for_the_next_configure() -> None:
    """After shutdown() the same port can be configured again, and it counts from nothing."""
    with page() as (program, port):
        do(program, "work", "3")
        do(program, "shutdown")
        again = do(program, "configure", json.dumps({"prometheus": f"127.0.0.1:{port}"}))
        assert again == str(port)
        do(program, "work", "2")
        families = list(text_string_to_metric_families(ask(port).body))
        assert samples(families, COUNT) == {"work": 2}
