"""`periscope doctor` against real servers, files and a driver, and what they may do to it."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from signal import SIGABRT, SIGINT
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from doctoring import (
    ENDS_WITHIN,
    HOSTILE,
    UNHURRIED,
    Told,
    checks_of,
    command,
    doctor,
    doctor_apart,
    listing,
    told_in,
)
from nvml import compile_stub
from otlp import black_hole, receiver, refusing
from processes import clean_environment, running
from redis_servers import RedisServer

from periscope_otel.redis_link import RedisLink
from periscope_otel.resilience.sharing.records import INDEX, Records, Verdict, record_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SECRET = "geheim-4711-Qx9"
PROTOCOLS = ["http/protobuf", "grpc"]
SIGNALS = ["traces", "metrics"]
SOON = ("--timeout", "0.5")
UNSAFE = HOSTILE.replace("\ud800", "").encode()


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    """Keep the letters of others out, and certificates that this machine trusts."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


# --- servers that are not what they should be ----------------------------------------------------


@contextmanager
def serving(answer: Callable[[socket.socket], object]) -> Iterator[int]:
    """Serve connections, each by `answer` in a thread of its own; gives the port."""
    held: list[socket.socket] = []
    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:

        def run(connection: socket.socket) -> None:
            with suppress(OSError):
                answer(connection)
            connection.close()

        def accept() -> None:
            while True:
                try:
                    held.append(listener.accept()[0])
                except OSError:
                    return
                threads.append(threading.Thread(target=run, args=(held[-1],)))
                threads[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join(10)
            for connection in held:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)


def saying(payload: bytes) -> Callable[[socket.socket], None]:
    """Return what reads a request and answers it."""

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(payload)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass

    return answer


def dripping(beginning: bytes) -> Callable[[socket.socket], None]:
    """Return what answers a little at a time, for ever."""

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(beginning)
        while True:
            connection.sendall(b"x")
            wait.wait(0.05)

    wait = threading.Event()
    return answer


def flooding(beginning: bytes) -> Callable[[socket.socket], None]:
    """Return what answers as much as it can, for ever."""

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(beginning)
        while True:
            connection.sendall(b"x" * 65536)

    return answer


def http_answer(status: int, body: bytes = b"", reason: bytes = b"As told", *more: bytes) -> bytes:
    lines = [b"HTTP/1.1 %d %s" % (status, reason), b"Content-Length: %d" % len(body), *more]
    return b"\r\n".join([*lines, b"", body])


HTTP_FOR_EVER = b"HTTP/1.1 500 As told\r\nContent-Type: text/plain\r\n\r\n"


class Answers(grpc.GenericRpcHandler):
    """A gRPC service that answers every call with a status."""

    def __init__(self, code: grpc.StatusCode | None = None, details: str = "as told") -> None:
        self._code = code
        self._details = details

    def service(self, call: Any) -> Any:
        def answer(request: bytes, context: Any) -> bytes:
            if self._code is not None:
                context.abort(self._code, self._details)
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def grpc_server(*handlers: Answers, credentials: Any = None) -> Iterator[int]:
    """Run a gRPC server; gives its port."""
    server = grpc.server(ThreadPoolExecutor(4), handlers, options=[("grpc.so_reuseport", 0)])
    port = (
        server.add_insecure_port("127.0.0.1:0")
        if credentials is None
        else server.add_secure_port("127.0.0.1:0", credentials)
    )
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait(10)


class Certificate:
    """A certificate for 127.0.0.1 that nobody has signed."""

    def __init__(self, folder: Path) -> None:
        self.path, self.key = folder / "cert.pem", folder / "key.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
             "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost",
             "-keyout", str(self.key), "-out", str(self.path)],
            check=True, capture_output=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Certificate:
    return Certificate(tmp_path_factory.mktemp("certificate"))


@contextmanager
def tls_server(certificate: Certificate, protocol: str) -> Iterator[str]:
    """Run a server that takes every export, with TLS; gives its URL."""
    if protocol == "grpc":
        pair = (certificate.key.read_bytes(), certificate.path.read_bytes())
        with grpc_server(Answers(), credentials=grpc.ssl_server_credentials([pair])) as port:
            yield f"https://127.0.0.1:{port}"
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.path, certificate.key)

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            saying(http_answer(200))(secure)

    with serving(answer) as port:
        yield f"https://127.0.0.1:{port}"


def otlp(endpoint: str, protocol: str = "http/protobuf", **more: str) -> dict[str, str]:
    """Return the variables that send OTLP somewhere, by an exporter that waits for long."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "600",
        **more,
    }


def both_broken(found: Told, *words: str) -> None:
    """Fail unless both signals are broken, for a reason in which one of these words is."""
    for signal in SIGNALS:
        one = found.one(f"{signal}.export")
        assert one["status"] == "broken", one
        text = found.text(f"{signal}.export")
        assert any(word in text for word in words), text


# --- OTLP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_collector_that_takes_both_signals_is_ok(collector, protocol):
    """With where it is, the protocol and how long it took; nothing is warned of."""
    found = doctor(*UNHURRIED, **otlp(collector.endpoint(protocol), protocol))
    for signal in SIGNALS:
        one = found.one(f"{signal}.export")
        assert one["status"] == "ok", one
        assert collector.endpoint(protocol).removeprefix("http://") in one["message"]
        assert protocol.partition("/")[0] in one["message"].lower()
        assert "ms" in one["message"]
    assert found.is_well("export.anywhere")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_requests_are_real_and_empty(collector, protocol):
    """One of each signal, with the headers that exports have, and nothing in them to store."""
    doctor(
        *UNHURRIED,
        **otlp(collector.endpoint(protocol), protocol, OTEL_EXPORTER_OTLP_HEADERS="x-tenant=feeds"),
    )
    requests = collector.requests()
    kinds = Counter(type(one.message).__name__ for one in requests)
    assert kinds == {"ExportTraceServiceRequest": 1, "ExportMetricsServiceRequest": 1}
    assert [one.headers.get("x-tenant") for one in requests] == ["feeds"] * 2
    received = collector.received()
    assert (received.spans, received.points) == ([], [])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_endpoint_of_the_settings_is_asked(collector, protocol):
    """As `configure()` would do, on the paths that it would use."""
    found = doctor(
        *UNHURRIED,
        PERISCOPE_OTLP_ENDPOINT=collector.endpoint(protocol),
        PERISCOPE_OTLP_PROTOCOL=protocol,
    )
    assert [found.status_of(f"{signal}.export") for signal in SIGNALS] == ["ok", "ok"]
    if protocol != "grpc":
        assert {one.path for one in collector.requests()} == {"/v1/traces", "/v1/metrics"}


def test_each_signal_is_judged_by_its_own_endpoint(collector):
    """One may work where the other does not."""
    with refusing() as nobody:
        found = doctor(
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{collector.http}/v1/traces",
            OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=f"{nobody}/v1/metrics",
            OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        )
    assert found.status_of("traces.export") == "ok"
    assert found.status_of("metrics.export") == "broken"
    assert found.status == 1


def test_each_destination_of_a_signal_is_tried(collector):
    """A network for one, none for the other."""
    found = doctor(*UNHURRIED, **otlp(collector.http), OTEL_TRACES_EXPORTER="console,otlp")
    told = found.all("traces.export")
    assert [one["status"] for one in told] == ["ok", "ok"]
    assert "console" in told[0]["message"]
    assert collector.http.removeprefix("http://") in told[1]["message"]


@pytest.mark.parametrize("timeout", ["0.5", "3"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_refused_connection_is_broken(protocol, timeout):
    """It is said that nothing listens there, however little time there is."""
    with refusing() as nobody:
        for _ in range(5):
            found = doctor("--timeout", timeout, **otlp(nobody, protocol))
            told = [found.text(f"{signal}.export") for signal in SIGNALS]
            if all("nothing listens" in one or "refused" in one for one in told):
                break  # else the machine has stopped it for longer than it had
    both_broken(found, "refused", "nothing listens")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_name_that_is_not_known_is_broken(protocol):
    """By that name; where no name server answers, that it took too long."""
    found = doctor(*SOON, **otlp("http://nobody.invalid:4321", protocol))
    both_broken(found, "name", "resol", "dns", "within", "seconds", "time")
    assert "nobody.invalid" in found.text("traces.export")


@pytest.mark.parametrize("status", [401, 403])
def test_credentials_that_are_refused_are_broken(status):
    """Over HTTP; what helps is the variable that has them."""
    with serving(saying(http_answer(status))) as port:
        found = doctor(**otlp(f"http://127.0.0.1:{port}"))
    both_broken(found, str(status), "credentials")
    for signal in SIGNALS:
        assert "OTEL_EXPORTER_OTLP_HEADERS" in (found.one(f"{signal}.export")["remedy"] or "")


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "PERMISSION_DENIED"])
def test_credentials_that_are_refused_by_grpc_are_broken(code):
    """Likewise."""
    with grpc_server(Answers(grpc.StatusCode[code])) as port:
        found = doctor(**otlp(f"http://127.0.0.1:{port}", "grpc"))
    both_broken(found, code.lower(), code.lower().replace("_", " "), "credentials")
    for signal in SIGNALS:
        assert "OTEL_EXPORTER_OTLP_HEADERS" in (found.one(f"{signal}.export")["remedy"] or "")


def test_a_path_that_is_not_there_is_broken():
    """404: the endpoint has a path too many, or it is not a collector."""
    with serving(saying(http_answer(404, b"<html>not here</html>"))) as port:
        found = doctor(**otlp(f"http://127.0.0.1:{port}/otlp"))
    both_broken(found, "404", "path")
    assert "path" in found.text("traces.export")


def test_a_service_that_is_not_there_is_broken():
    """A gRPC server of something else."""
    with grpc_server() as port:
        both_broken(doctor(**otlp(f"http://127.0.0.1:{port}", "grpc")), "unimplemented", "otlp")


@pytest.mark.parametrize(
    ("protocol", "other"), [("grpc", "http"), ("http/protobuf", "grpc")], ids=["grpc", "http"]
)
def test_the_wrong_protocol_for_a_port_is_broken(collector, protocol, other):
    """What helps is the other protocol, or the other port."""
    wrong = "http/protobuf" if protocol == "grpc" else "grpc"
    found = doctor(**otlp(collector.endpoint(wrong), protocol))
    for signal in SIGNALS:
        assert found.status_of(f"{signal}.export") == "broken"
        remedy = found.one(f"{signal}.export")["remedy"] or ""
        assert other in remedy.lower(), found.one(f"{signal}.export")
        assert "protocol" in remedy.lower() or "port" in remedy.lower()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_collector_that_is_overloaded_is_broken(protocol):
    """It is not tried again and again: the time is bounded."""
    with receiver(unavailable=True) as busy:
        found = doctor(**otlp(busy.endpoint(protocol), protocol))
    both_broken(found, "503", "unavailable", "overloaded")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_answers_nothing_is_broken(protocol, uncovered):
    """After --timeout, whatever OTEL_EXPORTER_OTLP_TIMEOUT says; and the command ends."""
    with black_hole() as silent:
        found = doctor_apart(*SOON, **otlp(silent, protocol))
    both_broken(found, "time", "within", "no answer", "0.5")
    assert found.stderr == ""


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("way", [dripping, flooding])
def test_a_server_that_never_ends_its_answer_is_broken(protocol, way, uncovered):
    """A byte now and then, or without end, holds nothing up."""
    with serving(way(HTTP_FOR_EVER)) as port:
        found = doctor_apart(*SOON, **otlp(f"http://127.0.0.1:{port}", protocol))
    both_broken(found, "")
    assert found.stderr == ""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tls_to_a_server_without_it_is_broken(collector, protocol):
    """By that word."""
    endpoint = collector.endpoint(protocol).replace("http:", "https:")
    both_broken(doctor(**otlp(endpoint, protocol)), "tls", "ssl")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_certificate_that_nobody_has_signed_is_broken(certificate, protocol):
    """What helps is the variable for certificates."""
    with tls_server(certificate, protocol) as endpoint:
        found = doctor(**otlp(endpoint, protocol))
    both_broken(found, "certificate", "tls")
    assert "OTEL_EXPORTER_OTLP_CERTIFICATE" in (found.one("traces.export")["remedy"] or "")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_certificate_file_that_is_missing_is_broken(certificate, tmp_path, protocol):
    """And not taken for a server that is away."""
    with tls_server(certificate, protocol) as endpoint:
        found = doctor(
            **otlp(
                endpoint, protocol, OTEL_EXPORTER_OTLP_CERTIFICATE=str(tmp_path / "missing.pem")
            ),
        )
    both_broken(found, "certificate", "missing.pem")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_certificate_that_is_known_is_ok(certificate, protocol):
    """As the exporter takes it from the environment."""
    with tls_server(certificate, protocol) as endpoint:
        found = doctor(
            *UNHURRIED,
            **otlp(endpoint, protocol, OTEL_EXPORTER_OTLP_CERTIFICATE=str(certificate.path)),
        )
    assert [found.status_of(f"{signal}.export") for signal in SIGNALS] == ["ok", "ok"]


def test_a_variable_that_is_heeded_before_the_certificate_is_named(certificate, tmp_path):
    """OTLP over HTTP goes through requests, which has one of its own."""
    others = {
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(certificate.path),
        "REQUESTS_CA_BUNDLE": str(Certificate(tmp_path).path),
    }
    with tls_server(certificate, "http/protobuf") as endpoint:
        found = doctor(**otlp(endpoint, "http/protobuf", **others))
    both_broken(found, "secure")
    assert "unset REQUESTS_CA_BUNDLE" in (found.one("traces.export")["remedy"] or "")


ECHO = f"no such user: authorization=Bearer {SECRET} Bearer {SECRET} {SECRET}".encode()


@pytest.mark.parametrize(
    "answer",
    [
        http_answer(500, UNSAFE * 5000),
        http_answer(400, b"<" * 100_000),
        http_answer(429, UNSAFE, UNSAFE.replace(b"\r\n", b"")),
        http_answer(403, b"\xff" * 100_000, b"x" * 50_000),
        http_answer(302, b"", b"Found", b"Location: http://" + b"x" * 60_000),
        http_answer(200, UNSAFE * 100),
        b"HTTP/1.1 200 OK\r\n" + b"x-y: " + b"x" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 999999 \x1b[2J\r\n\r\n",
        UNSAFE * 5000,
        b"",
    ],
    ids=[
        *("500", "400", "reason", "bytes", "redirect", "body of 200", "header", "status"),
        *("garbage", "nothing"),
    ],
)
def test_whatever_an_http_server_answers_only_lines_come_out(answer, uncovered):
    """Each finding is a bounded line, and nothing is on standard error."""
    with serving(saying(answer)) as port:
        found = doctor_apart(*SOON, **otlp(f"http://127.0.0.1:{port}"))
    assert len(found.all("traces.export")) == 1
    assert found.stderr == ""


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "INTERNAL"])
@pytest.mark.parametrize(
    "details", [HOSTILE.replace("\ud800", ""), "x" * 6000, "\u202e" * 1000], ids=len
)
def test_whatever_a_grpc_server_answers_only_lines_come_out(code, details, uncovered):
    """Likewise."""
    with grpc_server(Answers(grpc.StatusCode[code], details)) as port:
        found = doctor_apart(*SOON, **otlp(f"http://127.0.0.1:{port}", "grpc"))
    both_broken(found, "")
    assert found.stderr == ""


@pytest.mark.parametrize("answer", [UNSAFE * 5000, b"+OK\r\n", http_answer(200)], ids=len)
def test_what_is_no_grpc_server_only_gives_lines(answer, uncovered):
    """Likewise."""
    with serving(saying(answer)) as port:
        found = doctor_apart(*SOON, **otlp(f"http://127.0.0.1:{port}", "grpc"))
    both_broken(found, "")
    assert found.stderr == ""


@pytest.mark.parametrize("status", [401, 500])
def test_a_server_that_repeats_the_credentials_reveals_none(status):
    """What it says of them is not shown, nor is it logged."""
    with serving(saying(http_answer(status, ECHO, ECHO))) as port:
        done = command(
            "--json",
            *SOON,
            **otlp(
                f"http://127.0.0.1:{port}",
                OTEL_EXPORTER_OTLP_HEADERS=f"authorization=Bearer {SECRET}",
            ),
        )
    both_broken(told_in(done.stdout, done.returncode, strict=False), "")
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "INTERNAL"])
def test_a_grpc_server_that_repeats_the_credentials_reveals_none(code):
    """Likewise."""
    with grpc_server(Answers(grpc.StatusCode[code], ECHO.decode())) as port:
        done = command(
            "--json",
            *SOON,
            **otlp(
                f"http://127.0.0.1:{port}",
                "grpc",
                OTEL_EXPORTER_OTLP_HEADERS=f"authorization=Bearer {SECRET}",
            ),
        )
    both_broken(told_in(done.stdout, done.returncode, strict=False), "")
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_refusals_are_told_on_standard_output_alone(protocol, uncovered):
    """No exporter logs what the findings tell."""
    with refusing() as nobody:
        found = doctor_apart(*SOON, **otlp(nobody, protocol), PERISCOPE_REDIS_URL="redis://[::1]:1")
    both_broken(found, "")
    assert found.status_of("redis.reached") == "broken"
    assert found.stderr == ""


# --- the Prometheus page -------------------------------------------------------------------------


def test_the_page_is_looked_for_only_where_it_is_configured():
    """No program listens unless it is told to."""
    assert doctor().all("metrics.prometheus") == []


def test_a_page_where_nothing_listens_is_off():
    """The program does not run now."""
    with refusing() as nobody:
        found = doctor(PERISCOPE_PROMETHEUS=nobody.removeprefix("http://"))
    assert found.status_of("metrics.prometheus") == "off"
    assert found.status == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_program_of_ours_is_found_on_its_page(address):
    """Also where it listens on all addresses."""
    with running("page", "built", f"{address}:0") as program:
        port = int(program.line())
        found = doctor(*UNHURRIED, PERISCOPE_PROMETHEUS=f"{address}:{port}")
    assert found.status_of("metrics.prometheus") == "ok"


@pytest.mark.parametrize(
    "answer",
    [
        saying(http_answer(200, b"# HELP up other\nup 1\n", b"OK", b"Content-Type: text/plain")),
        saying(http_answer(404)),
        saying(http_answer(200, UNSAFE * 5000)),
        saying(UNSAFE),
        saying(b""),
        dripping(HTTP_FOR_EVER),
        flooding(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"),
        dripping(b""),
    ],
    ids=[
        *("other metrics", "not found", "hostile page", "garbage", "nothing"),
        *("drips", "floods", "drips at once"),
    ],
)
def test_something_else_in_the_place_of_the_page_is_broken(answer, uncovered):
    """The program could not listen there; nothing holds the command up."""
    with serving(answer) as port:
        found = doctor_apart(*SOON, PERISCOPE_PROMETHEUS=f"127.0.0.1:{port}")
    assert found.status_of("metrics.prometheus") == "broken"
    assert found.stderr == ""


def test_something_else_where_a_program_was_asked_for_is_broken(collector):
    """Here a Collector."""
    found = doctor("--program", collector.http.removeprefix("http://"))
    assert found.status_of("metrics.prometheus") == "broken"


# --- Redis ---------------------------------------------------------------------------------------


@pytest.fixture
def client(redis) -> Iterator[Any]:
    """Return a client of the Redis, which is as it was started, and empty."""
    with redis.client as made:
        made.flushall()
        before = made.config_get("*max*mem*")
        yield made
        for name in ("maxmemory", "maxmemory-policy"):
            made.config_set(name, before[name])
        made.config_set("appendonly", "no")
        made.config_set("save", "")


@pytest.fixture
def asked(redis, client) -> Callable[..., Told]:
    """Return what runs the command on the Redis."""

    def run(*arguments: str, **environment: str) -> Told:
        return doctor(*UNHURRIED, *arguments, PERISCOPE_REDIS_URL=redis.url, **environment)

    return run


PARTS = ("redis.policy", "redis.persistence", "redis.memory", "redis.clock")


def test_without_a_redis_that_is_off():
    """And so is what it is needed for."""
    found = doctor()
    assert found.status_of("redis.reached") == "off"
    assert found.status_of("breakers.shared") == "off"
    assert [found.all(part) for part in PARTS] == [[]] * 4


def test_a_redis_that_is_reached_is_ok(asked, client):
    """With its version and how long it took."""
    found = asked()
    reached = found.one("redis.reached")
    assert reached["status"] == "ok"
    assert client.info("server")["redis_version"] in reached["message"]
    assert "ms" in reached["message"]
    assert [len(found.all(part)) for part in PARTS] == [1] * 4


def test_a_valkey_is_one_as_well(tmp_path):
    """It speaks the same."""
    with RedisServer("valkey", tmp_path / "valkey") as server:
        found = doctor(*UNHURRIED, PERISCOPE_REDIS_URL=server.url)
    assert found.status_of("redis.reached") == "ok"


def test_a_redis_on_a_socket_is_reached(tmp_path):
    """By the URL that the settings take."""
    path = tmp_path / "redis" / "socket"
    with RedisServer("redis", tmp_path / "redis", unixsocket=str(path)):
        found = doctor(*UNHURRIED, PERISCOPE_REDIS_URL=f"unix://{path}")
    assert found.status_of("redis.reached") == "ok"


def test_nothing_is_written_to_a_redis(asked, client):
    """No key comes, goes or changes."""
    client.mset({f"key {number}": number for number in range(5)})
    before = {key: client.dump(key) for key in client.scan_iter()}
    asked()
    assert client.dbsize() == 5
    assert {key: client.dump(key) for key in client.scan_iter()} == before


def broken_redis(found: Told, *words: str) -> None:
    """Fail unless the Redis is broken for one of these words, and nothing more is told of it."""
    assert found.status_of("redis.reached") == "broken"
    text = found.text("redis.reached")
    assert any(word in text for word in words), text
    assert [found.all(part) for part in PARTS] == [[]] * 4


def test_where_the_redis_is_not_reached_breakers_are_off():
    """Nothing can be told of them."""
    with refusing() as nobody:
        found = doctor(PERISCOPE_REDIS_URL=nobody.replace("http:", "redis:"))
    assert found.status_of("breakers.shared") == "off"


def test_a_redis_that_refuses_connections_is_broken():
    """By its address."""
    with refusing() as nobody:
        address = nobody.removeprefix("http://")
        found = doctor(PERISCOPE_REDIS_URL=f"redis://{address}/0")
    broken_redis(found, "refused", "nothing listens")
    assert address in found.text("redis.reached")


def test_a_redis_whose_name_is_not_known_is_broken():
    """By that name; where no name server answers, that it took too long."""
    found = doctor(*SOON, PERISCOPE_REDIS_URL="redis://nobody.invalid:6379")
    broken_redis(found, "name", "resol", "dns", "time", "within")


@pytest.mark.parametrize("given", ["", ":wrong-one@", "nobody:wrong-one@"])
def test_a_wrong_password_is_broken(redis, client, given):
    """Also none where one is needed; what was tried is not told."""
    client.config_set("requirepass", SECRET)
    try:
        found = doctor(*UNHURRIED, PERISCOPE_REDIS_URL=f"redis://{given}127.0.0.1:{redis.port}/0")
    finally:
        client.config_set("requirepass", "")
    broken_redis(found, "password")
    assert "wrong-one" not in str(found)


def test_a_right_password_is_ok_and_not_told(redis, client):
    """Neither in findings nor elsewhere."""
    client.config_set("requirepass", SECRET)
    try:
        url = f"redis://:{SECRET}@127.0.0.1:{redis.port}/0"
        done = command("--json", *UNHURRIED, PERISCOPE_REDIS_URL=url)
    finally:
        client.config_set("requirepass", "")
    found = told_in(done.stdout, done.returncode, strict=False)
    assert found.status_of("redis.reached") == "ok"
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "payload",
    [
        http_answer(400, b"<html>"),
        UNSAFE * 5000,
        b"",
        b"-ERR " + UNSAFE.replace(b"\r\n", b"") * 5000 + b"\r\n",
        b"$100000000\r\nxyz",
        b"*1000000\r\n" * 100,
        b"+PONG\r\n" * 50,
        b":7\r\n" * 50,
        b"*0\r\n" * 50,
        b"%1\r\n+a\r\n+b\r\n" * 50,
    ],
    ids=[
        *("http", "garbage", "nothing", "error", "bulk", "nested", "pong", "number", "array"),
        "map",
    ],
)
def test_what_is_no_redis_is_broken(payload, uncovered):
    """Whatever it answers, one line tells of it."""
    with serving(saying(payload)) as port:
        found = doctor_apart(*SOON, PERISCOPE_REDIS_URL=f"redis://127.0.0.1:{port}")
    broken_redis(found, "")
    assert found.stderr == ""


def test_a_redis_that_repeats_the_password_reveals_none():
    """As one in front of the real one may."""
    with serving(saying(b"-WRONGPASS " + ECHO + b"\r\n")) as port:
        done = command("--json", PERISCOPE_REDIS_URL=f"redis://:{SECRET}@127.0.0.1:{port}")
    broken_redis(told_in(done.stdout, done.returncode, strict=False), "")
    assert SECRET not in done.stdout + done.stderr


def test_tls_to_a_redis_without_it_is_broken(redis, client):
    """By that word; or it answers nothing, as it takes what comes for an unfinished command."""
    found = doctor(*SOON, PERISCOPE_REDIS_URL=redis.url.replace("redis:", "rediss:"))
    broken_redis(found, "tls", "ssl", "secure", "time")


def test_a_redis_that_answers_nothing_is_broken(redis, client, uncovered):
    """After --timeout; and the command ends."""
    redis.pause()
    try:
        found = doctor_apart(*SOON, PERISCOPE_REDIS_URL=redis.url)
    finally:
        redis.resume()
    broken_redis(found, "time", "within", "no answer", "0.5")
    assert found.stderr == ""


@pytest.mark.parametrize("beginning", [b"", b"+", b"$1000000000\r\n"], ids=["", "line", "bulk"])
@pytest.mark.parametrize("way", [dripping, flooding])
def test_a_redis_that_never_ends_its_answer_is_broken(way, beginning, uncovered):
    """A byte now and then, or without end, holds nothing up."""
    with serving(way(beginning)) as port:
        found = doctor_apart(*SOON, PERISCOPE_REDIS_URL=f"redis://127.0.0.1:{port}")
    broken_redis(found, "")
    assert found.stderr == ""


def test_a_replica_is_broken(tmp_path, redis, client):
    """It takes no writes."""
    with RedisServer("redis", tmp_path / "replica") as replica, replica.client as to_replica:
        to_replica.replicaof("127.0.0.1", str(redis.port))
        found = doctor(*UNHURRIED, PERISCOPE_REDIS_URL=replica.url)
    assert found.status_of("redis.reached") == "broken"
    assert "replica" in found.text("redis.reached") or "read-only" in found.text("redis.reached")


@pytest.mark.parametrize(
    ("policy", "limit", "status"),
    [
        ("noeviction", 1 << 30, "ok"),
        ("noeviction", 0, "ok"),
        ("allkeys-lru", 0, "ok"),
        ("allkeys-lru", 1 << 30, "warning"),
        ("volatile-ttl", 1 << 30, "warning"),
    ],
)
def test_a_policy_that_may_remove_letters_is_warned_of(asked, client, policy, limit, status):
    """Where it has a limit at all; the policy is named."""
    client.config_set("maxmemory", limit)
    client.config_set("maxmemory-policy", policy)
    found = asked()
    assert found.status_of("redis.policy") == status
    if status == "warning":
        assert policy in found.one("redis.policy")["message"]
        assert "noeviction" in found.one("redis.policy")["remedy"]


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [("save", "", "warning"), ("save", "3600 1", "ok"), ("appendonly", "yes", "ok")],
)
def test_a_redis_that_keeps_nothing_is_warned_of(asked, client, name, value, status):
    """A restart would lose what is in it; a file of either kind is enough."""
    client.config_set(name, value)
    assert asked().status_of("redis.persistence") == status


@pytest.mark.parametrize(
    ("share", "status"), [(None, "ok"), (0.5, "ok"), (0.9, "warning"), (1.5, "warning")], ids=str
)
def test_a_redis_that_is_nearly_full_is_warned_of(asked, client, share, status):
    """From four fifths of its limit, also above it."""
    used = client.info("memory")["used_memory"]
    client.config_set("maxmemory", 0 if share is None else int(used / share))
    assert asked().status_of("redis.memory") == status


SHIFTED = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <sys/time.h>
#include <time.h>
#define REAL(name) dlsym(RTLD_NEXT, name)

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    int (*real)(struct timeval *, void *) = REAL("gettimeofday");
    int answer = real(at, zone);
    at->tv_sec += SHIFT;
    return answer;
}

int clock_gettime(clockid_t clock, struct timespec *at) {
    int (*real)(clockid_t, struct timespec *) = REAL("clock_gettime");
    int answer = real(clock, at);
    if (clock == CLOCK_REALTIME) at->tv_sec += SHIFT;
    return answer;
}

time_t time(time_t *at) {
    time_t (*real)(time_t *) = REAL("time");
    time_t now = real(NULL) + SHIFT;
    if (at) *at = now;
    return now;
}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="puts a library before the C library")
@pytest.mark.parametrize(("shift", "status"), [(600, "warning"), (-600, "warning"), (0, "ok")])
def test_clocks_that_differ_are_warned_of(tmp_path, monkeypatch, shift, status):
    """In both directions."""
    source, library = tmp_path / "shifted.c", tmp_path / "shifted.so"
    source.write_text(SHIFTED)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-DSHIFT={shift}", "-o", str(library), str(source), "-ldl"],
        check=True,
    )
    with monkeypatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        server = RedisServer("redis", tmp_path / "redis").start()
    try:
        found = doctor(*UNHURRIED, PERISCOPE_REDIS_URL=server.url)
    finally:
        server.kill()
    assert found.status_of("redis.clock") == status


@pytest.mark.parametrize("missing", ["config", "info", "time", "script", "eval", "hello", "client"])
def test_a_redis_that_allows_little_is_told_of(redis, client, asked, missing):
    """As those that are rented do; whatever cannot be asked, nothing is raised."""
    client.execute_command("ACL", "SETUSER", "default", f"-{missing}")
    try:
        found = asked()
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+@all")
    assert len(found.all("redis.reached")) == 1


# --- breakers ------------------------------------------------------------------------------------


def record(redis: RedisServer, name: str, state: Any) -> None:
    link = RedisLink(redis.url, 30.0)
    open_for, openings = (60.0, 1) if state == "open" else (0.0, 0)
    verdict = Verdict(state, "consecutive_failures", open_for, openings)
    Records(link).change(name, verdict, None, anyway=True)
    link.close()


def test_breakers_that_are_shared_are_counted(asked, redis):
    """How many have a record, and how many of these are open; that is how it should be."""
    for number in range(7):
        record(redis, f"{number}.example", "open" if number < 3 else "closed")
    shared = asked().one("breakers.shared")
    assert shared["status"] == "ok"
    assert "7" in shared["message"]
    assert "3" in shared["message"]


def test_where_no_breaker_has_a_record_that_is_ok(asked):
    """None has opened."""
    assert asked().status_of("breakers.shared") == "ok"


@pytest.mark.parametrize("state", ["forced_open", "disabled", "observe"])
def test_a_breaker_that_was_set_by_hand_is_warned_of(asked, redis, state):
    """By name: somebody may have forgotten it."""
    record(redis, "a.example", "closed")
    record(redis, "b.example", state)
    found = asked()
    assert found.status_of("breakers.shared") == "warning"
    assert "b.example" in found.text("breakers.shared")
    assert "a.example" not in found.text("breakers.shared")


def test_of_many_that_were_set_by_hand_some_are_named(asked, redis):
    """The line stays short."""
    for number in range(60):
        record(redis, f"{number}.a-rather-long-name-of-a-dependency.example", "disabled")
    found = asked()
    assert found.status_of("breakers.shared") == "warning"
    assert "dependency.example" in found.text("breakers.shared")
    assert "more" in found.text("breakers.shared") or "60" in found.text("breakers.shared")


def test_breakers_that_are_not_shared_are_off(asked, redis):
    """Whatever is in the Redis."""
    record(redis, "a.example", "forced_open")
    found = asked(PERISCOPE_BREAKER_SHARING="false")
    assert found.status_of("breakers.shared") == "off"
    assert found.status_of("redis.reached") == "ok"


def test_what_anybody_wrote_about_breakers_only_gives_lines(asked, redis, client):
    """Names that act on terminals, records that are none."""
    names = ["evil" + HOSTILE.replace("\ud800", ""), b"\xff\xfe", "", "x" * 9999]
    client.zadd(INDEX, dict.fromkeys(names, 1e15))
    record(redis, "evil.example", "forced_open")
    record(redis, "harmed.example", "disabled")
    client.hset(record_key("harmed.example"), "generation", UNSAFE)
    client.set(record_key("no hash"), "x")
    client.zadd(INDEX, {"no hash": 1e15})
    found = asked()
    assert found.status_of("breakers.shared") == "warning"
    assert "evil.example" in found.text("breakers.shared")


def test_an_index_that_is_none_does_no_harm(asked, client):
    """Anything may be at its key."""
    client.set(INDEX, "x")
    assert len(asked().all("breakers.shared")) == 1


# --- GPUs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return compile_stub(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def gpus(library, uncovered) -> Callable[..., Told]:
    """Return what runs the command on two GPUs, after calls of `stub_*` functions."""

    def run(*calls: str, gauges: str = "gpu", arguments: tuple[str, ...] = UNHURRIED) -> Told:
        stub = [f"stub.stub_{call}" for call in calls]
        before = "\n".join(["import ctypes", "stub = ctypes.CDLL('libnvidia-ml.so.1')", *stub])
        return doctor_apart(
            *arguments, before=before, LD_LIBRARY_PATH=str(library), PERISCOPE_GAUGES=gauges
        )

    return run


def answer(function: str, device: int, code: int) -> str:
    return f"answer(b'{function}', {device}, {code})"


@pytest.mark.parametrize("gauges", ["gpu", "host", ""])
def test_each_device_is_told_of(gpus, gauges):
    """Name, model, driver, temperature and memory of each, whether they are wanted or not."""
    first, second = gpus(gauges=gauges).all("gpu.devices")
    for one, name, degrees in ((first, "GPU 0", "37"), (second, "GPU 1", "57")):
        assert one["status"] == "ok"
        for word in (name, "NVIDIA H100 80GB HBM3", "580.159.04", degrees):
            assert word in one["message"], one


def test_a_gpu_that_is_slowed_down_is_warned_of(gpus):
    """By its name; the other is well."""
    first, second = gpus("reasons(0, ctypes.c_ulonglong(0x40))").all("gpu.devices")
    assert (first["status"], second["status"]) == ("warning", "ok")
    assert "GPU 0" in first["message"]


def test_a_gpu_that_is_about_to_fail_is_told_of(gpus):
    """Here one whose bad memory could not be replaced."""
    first, second = gpus("remapped(1, 0, 1)").all("gpu.devices")
    assert first["status"] == "ok"
    assert second["status"] in ("warning", "broken")
    assert "GPU 1" in second["message"]


@pytest.mark.parametrize(
    "function",
    ["nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetRemappedRows", "nvmlDeviceGetHandleByIndex_v2"],
)
def test_a_gpu_that_is_lost_is_told_of(gpus, function):
    """The other is looked at all the same."""
    found = gpus(answer(function, 0, 15))
    statuses = [one["status"] for one in found.all("gpu.devices")]
    assert "ok" in statuses
    assert {"warning", "broken"} & set(statuses)


@pytest.mark.parametrize(("gauges", "status"), [("gpu", "broken"), ("", "off")], ids=["gpu", "no"])
@pytest.mark.parametrize(
    ("code", "words"),
    [(18, "version"), (9, "not loaded"), (4, "may not"), (999, "999")],
    ids=["mismatch", "not loaded", "permission", "unknown"],
)
def test_a_driver_that_does_not_work_is_told_of(gpus, code, words, gauges, status):
    """With the reason and what helps; broken where its figures are wanted."""
    found = gpus(answer("nvmlInitWithFlags", -1, code), gauges=gauges)
    assert found.status_of("gpu.devices") == status
    assert words in found.text("gpu.devices")
    assert found.one("gpu.devices")["remedy"]


@pytest.mark.parametrize(("gauges", "status"), [("gpu", "broken"), ("", "off")], ids=["gpu", "no"])
def test_a_driver_without_devices_is_told_of(gpus, gauges, status):
    """As in a container that was given none."""
    found = gpus("present(0, 0)", "present(1, 0)", gauges=gauges)
    assert found.status_of("gpu.devices") == status
    assert found.one("gpu.devices")["remedy"]


@pytest.mark.parametrize(("gauges", "status"), [("gpu", "broken"), ("", "off")], ids=["gpu", "no"])
@pytest.mark.parametrize(
    "function",
    ["nvmlInitWithFlags", "nvmlSystemGetDriverVersion", "nvmlDeviceGetCurrentClocksEventReasons"],
)
def test_a_driver_that_hangs_is_told_of(gpus, function, gauges, status):
    """After --timeout; and the command ends."""
    found = gpus(f"hang(b'{function}')", gauges=gauges, arguments=SOON)
    assert {one["status"] for one in found.all("gpu.devices")} == {status}
    assert found.stderr == ""


def test_a_driver_that_hangs_at_its_end_holds_nothing_up(gpus):
    """Its devices have been told of by then."""
    found = gpus("hang(b'nvmlShutdown')", arguments=("--timeout", "2"))
    assert [one["status"] for one in found.all("gpu.devices")][:2] == ["ok", "ok"]
    assert found.stderr == ""


def test_parts_of_a_gpu_are_told_of(gpus):
    """They are devices of their own."""
    found = gpus("mig(1)")
    assert len(found.all("gpu.devices")) == 4
    assert "mig" in found.text("gpu.devices")


# --- all of it -----------------------------------------------------------------------------------


def test_nothing_is_left_behind_where_everything_is_configured(
    collector, redis, client, tmp_path, monkeypatch
):
    """No file, no key, no span and no point, with every server there."""
    home = tmp_path / "home"
    (home / "temporary").mkdir(parents=True)
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    before = listing(home)
    found = doctor_apart(
        *UNHURRIED,
        **otlp(collector.http),
        PERISCOPE_REDIS_URL=redis.url,
        PERISCOPE_GAUGES="true",
        PERISCOPE_DEAD_LETTERS="true",
        PERISCOPE_PROMETHEUS="127.0.0.1:0",
        HOME=str(home),
        TMPDIR=str(home / "temporary"),
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert checks_of(found, "broken") in ([], ["gpu.devices"])
    assert listing(home) == before
    assert client.dbsize() == 0
    assert collector.received().spans == collector.received().points == []


def test_it_can_be_interrupted(uncovered):
    """While it waits for a server, without a traceback."""
    asked = threading.Event()

    def hold(connection: socket.socket) -> None:
        connection.recv(65536)
        asked.set()
        while connection.recv(65536):
            pass

    with serving(hold) as port:
        code = "from periscope_otel.cli import app; app()"
        with subprocess.Popen(
            [sys.executable, "-c", code, "doctor", "--timeout", "60"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=clean_environment() | otlp(f"http://127.0.0.1:{port}"),
        ) as process:  # fmt: skip
            assert asked.wait(ENDS_WITHIN)
            process.send_signal(SIGINT)
            _, stderr = process.communicate(timeout=ENDS_WITHIN)
    assert process.returncode not in (0, -SIGABRT)
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr


def test_all_that_is_wrong_is_told_at_once(tmp_path, uncovered):
    """One fault does not hide another, and all that hang end together within their time."""
    (tmp_path / "file").write_text("x")
    with black_hole() as silent:
        address = silent.removeprefix("http://")
        found = doctor_apart(
            *SOON,
            **otlp(silent),
            PERISCOPE_REDIS_URL=f"redis://{address}",
            PERISCOPE_PROMETHEUS=address,
            PERISCOPE_LABEL_LIMIT="many",
            PERISCOPE_DATA_DIR=str(tmp_path / "file"),
        )
    assert set(checks_of(found, "broken")) >= {
        "settings.values",
        "traces.export",
        "metrics.export",
        "metrics.prometheus",
        "data_dir.folder",
        "redis.reached",
    }
    assert found.stderr == ""
