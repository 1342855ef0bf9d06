"""What a running program tells of itself, by `Runtime.examine()` and to `periscope doctor`."""

from __future__ import annotations

import http.client
import json
import re
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from doctoring import (
    HOSTILE,
    ORDER,
    UNHURRIED,
    Told,
    doctor,
    doctor_apart,
    keeps_the_contract,
    listing,
    text,
)
from nvml import compile_stub, ends_well
from otlp import black_hole, refusing
from processes import otlp, running

from periscope_otel.dead_letter.queue import FILE, DeadLetterQueue

pytest.register_assert_rewrite("store_conformance")

from store_conformance import some  # noqa: E402  (its assertions are rewritten first)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from processes import Program

SECRET = "geheim-4711-Qx9"
WITHIN = 60.0
ANY_PORT = "127.0.0.1:0"
QUIET = {"exit_report": "never"}


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    """Keep the letters of others out."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


class Examined:
    """The program `doctor`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.port = int(program.line())

    def ask(self, *command: object) -> Any:
        """Have it do something, and return its answer."""
        self.program.tell(json.dumps(command))
        return json.loads(self.program.line())

    def inside(self, *arguments: object, how: str = "examine") -> Told:
        """Have it examine itself."""
        return Told(keeps_the_contract(self.ask(how, *arguments)))

    def outside(self, *arguments: str, **environment: str) -> Told:
        """Ask its page."""
        where = f"127.0.0.1:{self.port}"
        return doctor("--program", where, *UNHURRIED, *arguments, **environment)

    def until(self, holds: Callable[[Told], bool], *arguments: object) -> Told:
        """Have it examine itself until something holds."""
        end = time.monotonic() + WITHIN
        while not holds(told := self.inside(*arguments)):
            assert time.monotonic() < end, told.problems()
        return told


@contextmanager
def program(
    kind: str = "built", env: dict[str, str] | None = None, **settings: object
) -> Iterator[Examined]:
    """Run a program with providers of a kind."""
    with running("doctor", kind, json.dumps({**QUIET, **settings}), env=env) as started:
        yield Examined(started)
        ends_well(started)


@contextmanager
def taking(status: int) -> Iterator[str]:
    """Run a server that answers every export with a status; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- where it is told ----------------------------------------------------------------------------


def test_a_program_that_is_well_says_so(collector):
    """All its checks are told by itself and by its page, and none has anything to complain of."""
    with program(env=otlp(collector.http), prometheus=ANY_PORT) as one:
        one.ask("work", ["fetch", "store"])
        inside, outside = one.inside(), one.outside()
    told = {found["check"] for found in inside.findings}
    assert told >= {check for check in ORDER if check.startswith("program.")} - {
        "program.sampler", "program.duplicates",
    }  # fmt: skip
    for found in (inside, outside):
        assert [one for one in found.problems() if one["check"].startswith("program.")] == []
    assert {one["check"] for one in outside.findings if one["check"].startswith("program.")} == {
        check for check in told if check.startswith("program.")
    }
    assert outside.status_of("metrics.prometheus") == "ok"


def test_what_a_program_tells_comes_last(collector):
    """After what is found outside of it."""
    with program(env=otlp(collector.http), prometheus=ANY_PORT) as one:
        inside, outside = one.inside(), one.outside()
    assert inside.in_order(), [found["check"] for found in inside.findings]
    assert outside.in_order(), [found["check"] for found in outside.findings]


def test_without_a_program_nothing_is_told_of_one():
    """The command is no program itself."""
    assert [one for one in doctor().findings if one["check"].startswith("program.")] == []


def test_a_program_is_examined_with_its_own_settings(tmp_path):
    """Which may be given to `configure()` alone."""
    with refusing() as nobody:
        redis = nobody.replace("http:", "redis:")
        with program(redis_url=redis, data_dir=str(tmp_path / "own"), otlp_endpoint=nobody) as one:
            found = one.inside()
    assert found.status_of("redis.reached") == "broken"
    assert str(tmp_path / "own") in found.one("data_dir.folder")["message"]
    assert found.status_of("traces.export") == "broken"
    assert nobody.removeprefix("http://") in found.one("traces.export")["message"]


def test_a_program_that_does_not_run_is_no_error():
    """It is said, whatever it is called; the rest is examined."""
    with refusing() as nobody:
        found = doctor("--program", nobody.removeprefix("http://"))
    assert found.status_of("metrics.prometheus") in ("off", "broken")
    assert found.status_of("sdk.versions") == "ok"


def test_a_program_is_examined_within_its_time(uncovered):
    """Servers that hang hold neither it nor its end up."""
    with black_hole() as silent:
        env = otlp(silent, OTEL_EXPORTER_OTLP_TIMEOUT="600")
        redis = silent.replace("http:", "redis:")
        with program(env=env, redis_url=redis, shutdown_timeout=0.1) as one:
            found = one.inside(0.5)
    assert found.status_of("traces.export") in ("broken", "warning")
    assert found.status_of("redis.reached") == "broken"


def test_the_child_of_a_fork_examines_itself(collector):
    """Whatever its parent's threads were doing."""
    with program(env=otlp(collector.http), data_dir=None, prometheus=ANY_PORT) as one:
        one.ask("work", ["fetch"])
        found = one.inside(20.0, how="examine_in_child")
    assert found.status_of("traces.export") == "ok"
    assert found.all("program.traces")


def test_several_threads_may_examine_at_once(collector):
    """Each gets all findings."""
    with program(env=otlp(collector.http)) as one:
        wanted = len(one.inside().findings)
        assert one.ask("examine_at_once", 4) == [wanted] * 4


def test_examining_disturbs_no_other_thread(collector):
    """What the application computes meanwhile goes on as ever."""
    with program(env=otlp(collector.http)) as one:
        assert one.ask("examine_while_busy", 4) == []


def test_examining_changes_no_count(collector, tmp_path):
    """No span, no point and no letter more than before, and no log line."""
    data_dir = tmp_path / "letters"
    with program(env=otlp(collector.http), data_dir=str(data_dir)) as one:
        one.ask("work", ["fetch"])
        before = one.ask("exported")
        sent = len(collector.received().spans)
        one.inside()
        after = one.ask("exported")
        logs = one.ask("logs")
    assert [(signal, failed) for signal, _, failed in after] == [
        (signal, failed) for signal, _, failed in before
    ]
    assert [count for signal, count, _ in after if signal == "spans"] == [1]
    assert sent == 1
    assert logs == []


def test_examining_makes_no_spans_with_other_instrumentations(collector, redis):
    """What it asks over HTTP and of a Redis is not the application's doing."""
    with redis.client as client:
        client.flushall()
    with program(
        env=otlp(collector.http), redis_url=redis.url, breaker_sharing=False, dead_letters=False
    ) as one:
        one.ask("instrument")
        one.inside()
        one.ask("work", ["fetch"])
    assert set(collector.received().names()) == {"fetch"}


# --- its page ------------------------------------------------------------------------------------


def get(host: str, port: int, path: str, come_from: str | None = None) -> tuple[int, bytes]:
    source = None if come_from is None else (come_from, 0)
    connection = http.client.HTTPConnection(host, port, timeout=30, source_address=source)
    try:
        connection.request(
            "GET", path, headers={"X-Forwarded-For": "127.0.0.1", "Host": "localhost"}
        )
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def own_addresses() -> list[str]:
    """Return this machine's addresses that are not the loopback's."""
    return [
        one.address
        for many in psutil.net_if_addrs().values()
        for one in many
        if one.family is socket.AF_INET and not one.address.startswith("127.")
    ]


def test_the_page_answers_this_machine_alone():
    """Others may read metrics and no more, whatever they say of themselves."""
    addresses = own_addresses()
    if not addresses:
        pytest.skip("this machine has no address but the loopback's")
    with program(prometheus="0.0.0.0:0") as one:
        assert get("127.0.0.1", one.port, "/doctor")[0] == 200
        assert get(addresses[0], one.port, "/doctor")[0] == 200
        assert get("127.0.0.1", one.port, "/metrics", addresses[0])[0] == 200
        for path in ("/doctor", "/doctor?x", "//doctor", "/doctor/", "/%64octor"):
            # An address that is not the one that was asked is another machine's, for all it knows.
            status, body = get("127.0.0.1", one.port, path, addresses[0])
            assert status in (403, 404), path
            assert b"program." not in body


def test_the_page_answers_this_machine_on_all_its_loopbacks():
    """By IPv6, and by IPv4 where it listens on both."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with program(prometheus="[::]:0") as one:
        assert get("::1", one.port, "/doctor")[0] == 200
        assert get("127.0.0.1", one.port, "/doctor")[0] == 200
        found = doctor("--program", f"[::1]:{one.port}", *UNHURRIED)
    assert found.status_of("metrics.prometheus") == "ok"
    assert found.all("program.traces")


def test_the_page_tells_no_secret(redis):
    """Whatever the program was given."""
    env = otlp(
        "http://bob:hunter2Qx9@127.0.0.1:1", OTEL_EXPORTER_OTLP_HEADERS=f"authorization={SECRET}"
    )
    url = f"redis://:{SECRET}@127.0.0.1:{redis.port}/0"
    with program(env=env, prometheus=ANY_PORT, redis_url=url, shutdown_timeout=0.5) as one:
        _, page = get("127.0.0.1", one.port, "/doctor")
        inside = str(one.inside().findings)
    for told in (page.decode(), inside):
        assert SECRET not in told
        assert "hunter2Qx9" not in told


@contextmanager
def pretending(page: bytes) -> Iterator[int]:
    """Run a server that answers like a program of ours, with other content; gives the port."""

    class Handler(BaseHTTPRequestHandler):
        server_version = "periscope-otel"
        sys_version = ""

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                return  # the reader has had enough

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def genuine() -> dict[str, Any]:
    """Return the page of a real program."""
    with program(prometheus=ANY_PORT) as one:
        return json.loads(get("127.0.0.1", one.port, "/doctor")[1])


def a_finding(**fields: object) -> dict[str, object]:
    found = {"check": "program.traces", "status": "warning", "message": "m", "remedy": "r"}
    return {**found, **fields}


@pytest.mark.parametrize(
    "findings",
    [
        [a_finding(message=HOSTILE * 100, remedy=HOSTILE * 100)],
        [a_finding(message="x" * 500_000, remedy="x" * 100_000)],
        [a_finding(message="", remedy="")],
        [a_finding(remedy=None)],
        [a_finding(status="broken", remedy=7)],
        [a_finding(status="terrible"), a_finding(status=["ok"]), a_finding(status={})],
        [a_finding(check="program." + HOSTILE), a_finding(check="program.nothing")],
        [a_finding(check="redis.reached", status="ok"), a_finding(check=7)],
        [a_finding()] * 10_000,
        [7, None, [], {}, "x"],
        {"program.traces": "ok"},
        None,
    ],
    ids=[
        *("hostile", "long", "empty", "no remedy", "number", "status", "check", "other check"),
        *("many", "no findings", "mapping", "null"),
    ],
)
@pytest.mark.parametrize("form", ["json", "text"])
def test_whatever_a_page_tells_only_findings_come_out(genuine, findings, form):
    """Printable, bounded, each with what helps, and only of what a program can tell."""
    page = {**genuine, "findings": findings}
    with pretending(json.dumps(page).encode()) as port:
        arguments = ["--program", f"127.0.0.1:{port}"]
        if form == "json":
            found = doctor(*arguments)
            assert found.status_of("redis.reached") == "off"
            assert len(found.findings) < 300
        else:
            printed = text(*arguments)
            assert all(line.isprintable() for line in printed.split("\n"))


@pytest.mark.parametrize(
    "page",
    [
        b"[" * 100_000,
        b'{"findings": ' + b"[" * 100_000,
        b"\xff\xfe{}",
        b"{}",
        b"null",
        b"7",
        b'{"findings": 1e999999}',
        b"{" + b" " * (3 << 20) + b"}",
    ],
    ids=["deep", "deep findings", "bytes", "empty", "null", "number", "huge number", "long"],
)
def test_a_page_that_is_none_is_broken(page):
    """Another program has the port."""
    with pretending(page) as port:
        found = doctor("--program", f"127.0.0.1:{port}")
    assert found.status_of("metrics.prometheus") == "broken"


# --- providers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "word"),
    [("built", "configure"), ("given", "given|application"), ("global", "global|application")],
)
def test_it_is_told_whose_providers_are_used(collector, kind, word):
    """Those that `configure()` built, or the application's."""
    with program(kind, env=otlp(collector.http)) as one:
        found = one.inside()
    for check in ("program.traces", "program.metrics"):
        told = found.one(check)
        assert told["status"] == "ok"
        assert any(one in told["message"] for one in word.split("|")), told
        if kind != "built":
            assert "has built" not in told["message"]


def test_without_providers_that_is_said():
    """Nothing is exported."""
    with program() as one:
        found = one.inside()
    assert found.status_of("program.traces") in ("off", "ok")
    assert found.is_well("program.double")


@pytest.mark.parametrize("kind", ["built", "global", "given and global"])
def test_one_provider_of_each_kind_is_well(collector, kind):
    """Also a given one that is the global one."""
    with program(kind, env=otlp(collector.http)) as one:
        assert one.inside().is_well("program.double")


def test_providers_that_are_not_the_global_ones_are_warned_of():
    """What other libraries record goes elsewhere; each kind is named."""
    with program("others") as one:
        found = one.inside()
    assert {one["status"] for one in found.all("program.double")} == {"warning"}
    assert "tracerprovider" in found.text("program.double")
    assert "meterprovider" in found.text("program.double")


def test_providers_beside_those_in_use_are_warned_of(collector):
    """As where two packages each make their own."""
    with program(env=otlp(collector.http)) as one:
        assert one.inside().is_well("program.double")
        one.ask("more_providers")
        found = one.inside()
    assert {one["status"] for one in found.all("program.double")} == {"warning"}
    assert "tracerprovider" in found.text("program.double")
    assert "meterprovider" in found.text("program.double")


def test_a_destination_that_gets_everything_twice_is_warned_of(collector):
    """Spans and metrics, by its address."""
    with program("twice", env={"ENDPOINT": collector.http}) as one:
        found = one.inside()
    assert {one["status"] for one in found.all("program.duplicates")} == {"warning"}
    assert collector.http.removeprefix("http://") in found.text("program.duplicates")
    assert "v1/traces" in found.text("program.duplicates")
    assert "v1/metrics" in found.text("program.duplicates")


def test_two_exporters_of_a_provider_that_was_built_are_warned_of(collector):
    """As OTEL_TRACES_EXPORTER=otlp,otlp makes them."""
    env = otlp(collector.http, OTEL_TRACES_EXPORTER="otlp,otlp")
    with program(env=env) as one:
        assert one.inside().status_of("program.duplicates") == "warning"


def test_two_destinations_are_well(collector):
    """They may be meant."""
    with program("two places", env={"ENDPOINT": collector.http}) as one:
        assert one.inside().is_well("program.duplicates")


def test_an_exporter_in_the_callers_path_is_warned_of(collector):
    """Each span waits for the network."""
    with program("in the path", env={"ENDPOINT": collector.http}) as one:
        found = one.inside()
    assert found.status_of("program.duplicates") == "warning"
    assert "simplespanprocessor" in found.text("program.duplicates")


def test_an_exporter_without_a_network_may_be_in_the_callers_path():
    """As one into memory."""
    with program("in memory") as one:
        assert one.inside().is_well("program.duplicates")


@pytest.mark.parametrize(
    ("kind", "settings", "is_well"),
    [
        ("sampled", {"breaker_spans": True}, False),
        ("sampled", {}, True),
        ("given", {"breaker_spans": True}, True),
    ],
    ids=["sampled and driven", "sampled", "driven"],
)
def test_a_sampler_that_hides_spans_from_breakers_is_warned_of(kind, settings, is_well):
    """Where breakers are driven by spans at all."""
    with program(kind, **settings) as one:
        assert one.inside().is_well("program.sampler") is is_well


@pytest.mark.parametrize("share", ["0.1", "1.0"])
def test_a_sampler_of_a_provider_that_was_built_is_judged(collector, share):
    """Its breakers are driven by default, and see sampled traces alone; unless all are recorded."""
    env = otlp(
        collector.http,
        OTEL_TRACES_SAMPLER="parentbased_traceidratio",
        OTEL_TRACES_SAMPLER_ARG=share,
    )
    with program(env=env) as one:
        assert one.inside().is_well("program.sampler") is (share == "1.0")
    with program(env=env, record_client_spans=True) as one:
        assert one.inside().is_well("program.sampler")


@pytest.mark.parametrize(
    ("kind", "method", "is_well"),
    [
        ("given", "fork", False),
        ("global", "fork", False),
        ("given", "spawn", True),
        ("built", "fork", True),
    ],
)
def test_a_given_meter_provider_and_workers_that_are_forked_are_warned_of(
    uncovered, collector, kind, method, is_well
):
    """Such children hang; those of a provider that was built do not."""
    with program(kind, env=otlp(collector.http)) as one:
        one.ask("start_method", method)
        found = one.inside()
    assert found.is_well("program.fork") is is_well


# --- what goes wrong -----------------------------------------------------------------------------


def test_spans_and_points_that_failed_are_warned_of(collector):
    """With how many; before that all is well."""
    with taking(400) as endpoint, program(env=otlp(endpoint), prometheus=ANY_PORT) as one:
        assert one.inside().status_of("program.losses") == "ok"
        one.ask("spans", 7)
        one.ask("work", ["fetch"])
        found, outside = one.inside(), one.outside()
    for told in (found, outside):
        assert told.status_of("program.losses") == "warning"
        assert re.search(r"\b8\b", told.one("program.losses")["message"])
        assert "spans" in told.text("program.losses")
        assert "metric" in told.text("program.losses")


def test_spans_that_were_dropped_are_warned_of():
    """A queue was full."""
    with black_hole() as silent:
        env = otlp(silent, OTEL_BSP_MAX_QUEUE_SIZE="5", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="5")
        with program(env=env, shutdown_timeout=0.1) as one:
            one.ask("spans", 50)
            found = one.inside(3.0)
    assert found.status_of("program.losses") == "warning"
    assert "dropped" in found.text("program.losses")


@pytest.mark.parametrize(
    ("operations", "status"), [(1, "ok"), (7, "ok"), (8, "warning"), (10, "warning")]
)
def test_label_sets_near_their_limit_are_warned_of(collector, operations, status):
    """From four fifths of it on, with the instrument."""
    with program(env=otlp(collector.http), label_limit=10) as one:
        one.ask("work", [f"operation {number}" for number in range(operations)])
        found = one.inside()
    assert found.status_of("program.labels") == status
    if status == "warning":
        assert "threat.ingest" in found.text("program.labels")


def test_values_that_have_become_other_are_told_of(collector):
    """By that word: figures of theirs are added up."""
    with program(env=otlp(collector.http), label_limit=10) as one:
        one.ask("work", [f"operation {number}" for number in range(30)])
        found = one.inside()
    assert found.status_of("program.labels") == "warning"
    assert "other" in found.text("program.labels")


def test_letters_that_were_lost_are_broken():
    """With how many."""
    with program(prometheus=ANY_PORT) as one:
        assert one.inside().status_of("program.letters") == "ok"
        one.ask("lose_letters", 3)
        found, outside = one.inside(), one.outside()
    for told in (found, outside):
        assert told.status_of("program.letters") == "broken"
        assert "3" in told.one("program.letters")["message"]
    assert outside.status == 1


@pytest.mark.parametrize(("age", "is_well"), [(600.0, False), (10.0, True)])
def test_letters_that_wait_for_too_long_are_warned_of(tmp_path, age, is_well):
    """More than five minutes; the Redis is away."""
    with refusing() as nobody:
        redis = nobody.replace("http:", "redis:")
        with DeadLetterQueue(tmp_path / "letters", redis_url=redis) as queue:
            queue.put(some(2))
        with closing(sqlite3.connect(tmp_path / "letters" / FILE)) as connection, connection:
            connection.execute("UPDATE outbox SET put_at = put_at - ?", (age,))
        with program(redis_url=redis, data_dir=str(tmp_path / "letters")) as one:
            if is_well:
                assert one.inside().is_well("program.letters")
            else:
                found = one.until(lambda told: not told.is_well("program.letters"))
                assert found.status_of("program.letters") == "warning"


def test_errors_that_were_contained_are_warned_of():
    """How many, and where."""
    with program() as one:
        assert one.inside().status_of("program.errors") == "ok"
        one.ask("internal_error")
        one.ask("internal_error")
        found = one.inside()
    assert found.status_of("program.errors") == "warning"
    assert "2" in found.one("program.errors")["message"]
    assert "a place" in found.one("program.errors")["message"]


def test_breakers_that_are_open_are_told_of(collector):
    """By name; that is what they are for."""
    with program(env=otlp(collector.http)) as one:
        assert one.ask("open_breaker", "urlhaus.abuse.ch") == "open"
        found = one.inside()
    assert "urlhaus.abuse.ch" in found.text("program.breakers")


def test_breakers_that_were_set_by_hand_are_warned_of(collector, redis):
    """By name, in a program that has been told so."""
    from periscope_otel.redis_link import RedisLink
    from periscope_otel.resilience.sharing.records import Records, Verdict

    with redis.client as client:
        client.flushall()
    with program(env=otlp(collector.http), redis_url=redis.url, dead_letters=False) as one:
        assert one.inside().is_well("program.breakers")
        one.ask("open_breaker", "urlhaus.abuse.ch")
        link = RedisLink(redis.url, WITHIN)
        Records(link).change(
            "urlhaus.abuse.ch", Verdict("forced_open", "manual"), None, anyway=True
        )
        link.close()
        found = one.until(lambda told: not told.is_well("program.breakers"))
    assert found.status_of("program.breakers") == "warning"
    assert "urlhaus.abuse.ch" in found.text("program.breakers")


# --- gauges --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return compile_stub(tmp_path_factory.mktemp("nvml"))


def test_gauges_that_are_sampled_are_told_of(collector):
    """And that none are, where none are."""
    with program(env=otlp(collector.http), gauges=["host"]) as one:
        found = one.inside()
    assert found.status_of("program.gauges") == "ok"
    assert "host" in found.text("program.gauges")
    with program(env=otlp(collector.http)) as one:
        assert one.inside().status_of("program.gauges") == "off"


def test_a_driver_that_hangs_in_a_program_is_warned_of(collector, library):
    """The sampler has noticed; examining ends all the same."""
    env = otlp(collector.http, LD_LIBRARY_PATH=str(library))
    with program(env=env, gauges=["gpu"]) as one:
        one.ask("faster_gauges", 2.0)
        one.until(lambda told: told.status_of("program.gauges") == "ok")
        one.ask("stub", "hang", "nvmlDeviceGetCurrentClocksEventReasons")
        found = one.until(lambda told: not told.is_well("program.gauges"), 2.0)
        assert found.status_of("program.gauges") == "warning"
        one.ask("stub", "hang", "")


def test_examining_takes_nothing_from_the_sampler(collector, library):
    """It reads the same driver, and lets go of it once."""
    env = otlp(collector.http, LD_LIBRARY_PATH=str(library))
    with program(env=env, gauges=["gpu"]) as one:
        one.ask("faster_gauges", 30.0)
        one.until(lambda told: told.status_of("program.gauges") == "ok")
        for _ in range(3):
            found = one.inside()
            assert [two["status"] for two in found.all("gpu.devices")] == ["ok", "ok"]
        assert found.status_of("program.gauges") == "ok"
        logs = one.ask("logs")
    assert [line for line in logs if "GPU" in line and not line.startswith("INFO")] == []


# --- letters that are in use ---------------------------------------------------------------------

ELSEWHERE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
print(*connection.execute("SELECT count(*) FROM letters").fetchone())
connection.close()
"""


def counted_elsewhere(path: Path) -> int:
    """Return how many letters another process finds, which is then the file's last user for it."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(path)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.parametrize("how", ["inside", "outside"])
def test_the_locks_of_a_program_on_its_letters_stay(tmp_path, how):
    """Else the next process that closes the file would remove its log beneath the program."""
    folder = tmp_path / "letters"
    with program(data_dir=str(folder), prometheus=ANY_PORT) as one:
        one.ask("letters", 3)
        apart = {"PERISCOPE_DATA_DIR": str(folder)}
        found = one.inside() if how == "inside" else doctor_apart(**apart)
        assert found.status_of("data_dir.file") == "ok"
        assert "3" in found.one("data_dir.file")["message"]
        assert counted_elsewhere(folder / FILE) == 3
        assert (folder / f"{FILE}-wal").exists()
        one.ask("letters", 2)
        assert counted_elsewhere(folder / FILE) == 5


def test_letters_that_a_dead_process_left_in_its_log_are_counted(tmp_path):
    """They are kept, and whoever looks makes nothing of them."""
    folder, left = tmp_path / "letters", tmp_path / "left"
    left.mkdir(mode=0o700)
    with DeadLetterQueue(folder) as queue:
        queue.put(some(3))
        with closing(sqlite3.connect(folder / FILE)) as reading:
            reading.execute("BEGIN")
            reading.execute("SELECT count(*) FROM letters").fetchall()  # the log stays as it is
            queue.put(some(2))
            for suffix in ("", "-wal"):
                copy = (folder / f"{FILE}{suffix}").read_bytes()
                (left / f"{FILE}{suffix}").write_bytes(copy)
    before = set(listing(left))
    found = doctor(PERISCOPE_DATA_DIR=str(left))
    assert found.status_of("data_dir.file") == "ok"
    assert "5" in found.one("data_dir.file")["message"]
    assert set(listing(left)) <= before
    assert counted_elsewhere(left / FILE) == 5


@pytest.mark.parametrize("how", ["inside", "outside"])
def test_what_a_program_is_working_on_stays_its_own(tmp_path, how):
    """It is alive, and nobody makes letters of its payloads."""
    folder = tmp_path / "letters"
    with program(data_dir=str(folder)) as one:
        assert one.ask("begin_journalled")
        before = set(listing(folder))
        if how == "inside":
            one.inside()
        else:
            doctor_apart(PERISCOPE_DATA_DIR=str(folder))
        assert set(listing(folder)) == before
        with DeadLetterQueue(folder) as queue:
            queue.round()
            assert queue.store.stats().total == 0
