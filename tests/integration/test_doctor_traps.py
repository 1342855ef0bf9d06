"""What would send whoever reads a diagnosis the wrong way, or tell him what he must not know."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import pytest
from doctoring import UNHURRIED, doctor, doctor_apart
from processes import clean_environment
from redis_servers import RedisServer

from periscope_otel.dead_letter.contents import contents
from periscope_otel.dead_letter.queue import FILE, DeadLetterQueue

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECRET = "S3cretPassw0rd"
NOWHERE = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    "variables",
    [
        {"PERISCOPE_REDIS_URL": f"redis://:{SECRET}/xyz@localhost:6379/0"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://user:{SECRET}/xyz@localhost:4318"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://user:{SECRET}#xyz@localhost:4318"},
        {"PERISCOPE_OTLP_ENDPOINT": f"http://user:{SECRET}?xyz@localhost:4318"},
        {
            "HTTP_PROXY": f"http://bob:{SECRET}/xyz@127.0.0.1:80",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.example:4318",
        },
    ],
    ids=["redis", "slash", "hash", "setting", "proxy"],
)
def test_no_part_of_a_password_that_breaks_a_url_is_told(variables):
    """Parsers repeat what they cannot read."""
    found = doctor(**{"PERISCOPE_DATA_DIR": "/tmp/periscope-none", **variables})
    assert SECRET not in str(found.findings)
    assert found.status == 1


def test_a_redis_that_refuses_questions_is_not_called_safe(tmp_path):
    """Whether letters are kept cannot be told then."""
    with RedisServer("redis", tmp_path / "redis") as server, server.client as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.execute_command(
            "ACL", "SETUSER", "feeds", "on", ">pw4711", "~*", "+@all", "-info", "-config"
        )
        url = f"redis://feeds:pw4711@127.0.0.1:{server.port}/0"
        found = doctor(*UNHURRIED, PERISCOPE_REDIS_URL=url)
    assert found.status_of("redis.reached") == "ok"
    assert found.status_of("redis.policy") == found.status_of("redis.persistence") == "warning"
    assert "acl" in found.text("redis.policy")


@pytest.mark.parametrize("name", ["otlp_proto_http", "otlp_proto_grpc"])
def test_the_other_names_of_otlp_exporters_are_tried_too(name):
    """They go over the network like the short one."""
    found = doctor(OTEL_TRACES_EXPORTER=name, OTEL_EXPORTER_OTLP_ENDPOINT=NOWHERE)
    assert found.status_of("traces.export") == "broken"
    assert "nothing listens" in found.text("traces.export")


def test_a_dead_proxy_is_not_blamed_on_the_collector():
    """It is the proxy that refuses the connection."""
    found = doctor(HTTP_PROXY=NOWHERE, OTEL_EXPORTER_OTLP_ENDPOINT="http://collector.example:4318")
    assert "proxy" in found.text("traces.export")
    assert "start a collector" not in found.text("traces.export")


def test_an_endpoint_without_a_scheme_is_told_what_it_lacks():
    """As gRPC's own tools would have it."""
    found = doctor(
        OTEL_EXPORTER_OTLP_ENDPOINT="localhost:4317", OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf"
    )
    assert "http://" in found.text("traces.export")


@pytest.fixture
def refusing() -> Iterator[str]:
    """A server that answers 401 to whatever is sent."""

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_both_signals_are_told_why_they_are_refused(refusing):
    """In a process that has imported nothing yet."""
    found = doctor_apart(*UNHURRIED, OTEL_EXPORTER_OTLP_ENDPOINT=refusing)
    for signal_ in ("traces", "metrics"):
        assert "credentials" in found.text(f"{signal_}.export")


def test_a_folder_that_is_relative_to_one_that_is_gone_is_a_finding(tmp_path):
    """It has no absolute path."""
    gone = tmp_path / "gone"
    code = "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1])"
    gone.mkdir()
    found = doctor_apart(
        before=code.replace("sys.argv[1]", repr(str(gone))), PERISCOPE_DATA_DIR="x"
    )
    assert "periscope_data_dir" in found.text("settings.values")


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """A file of dead letters that was closed well."""
    with DeadLetterQueue(tmp_path / "letters"):
        return tmp_path / "letters"


def test_a_file_that_another_process_has_locked_is_not_called_damaged(letters):
    """Nobody is told to move it away."""
    holder = sqlite3.connect(letters / FILE)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    found = doctor(PERISCOPE_DATA_DIR=str(letters))
    holder.close()
    assert found.status_of("data_dir.file") == "broken"
    assert "look again" in found.text("data_dir.file")
    assert "recover" not in found.text("data_dir.file")


def test_another_users_file_is_left_alone(letters, monkeypatch):
    """Whoever looks leaves no file of his own beside it, and is told who may look."""
    monkeypatch.setattr(os, "geteuid", lambda: 65_534)
    before = sorted(letters.iterdir())
    found = doctor(PERISCOPE_DATA_DIR=str(letters))
    assert found.status_of("data_dir.file") == "warning"
    assert "another user" in found.text("data_dir.file")
    assert sorted(letters.iterdir()) == before


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_look_at_letters_lets_no_fork_come_between(letters):
    """A child would inherit SQLite's own locks taken."""
    looking, done = threading.Event(), threading.Event()

    def look() -> None:
        while not done.is_set():
            contents(letters / FILE)
            looking.set()

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert looking.wait(60)
    children = [_child_that_reads(letters / FILE) for _ in range(30)]
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    done.set()
    for thread in threads:
        thread.join()
    assert ended == [0] * 30


def _child_that_reads(file: Path) -> int:
    child = os.fork()
    if child:
        return child
    signal.alarm(120)
    try:
        connection = sqlite3.connect(file, timeout=60)
        connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        os._exit(0)
    finally:
        os._exit(1)


PROGRAM = """
import logging, sys
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, InMemoryLogRecordExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
import periscope_otel as periscope

class Filtering(SpanProcessor):
    def __init__(self, behind):
        self.behind = behind

logging.disable(logging.CRITICAL)
place = "http://127.0.0.1:1"
tracers = TracerProvider()
tracers.add_span_processor(Filtering(BatchSpanProcessor(OTLPSpanExporter(place))))
points = PeriodicExportingMetricReader(OTLPMetricExporter(place), 3_600_000)
trace.set_tracer_provider(tracers)
metrics.set_meter_provider(MeterProvider([points]))
logs = LoggerProvider()
logs.add_log_record_processor(BatchLogRecordProcessor(InMemoryLogRecordExporter()))
found = periscope.configure(exit_report="never").examine(timeout=3.0).findings
for one in found:
    if one.check in ("program.double", "program.duplicates", "export.anywhere"):
        print(one.check, one.status)
sys.stdout.flush()
import os
os._exit(0)
"""


def test_a_program_with_exporters_of_its_own_is_not_warned_of_them(tmp_path):
    """Both signals to one address, logs besides, a processor behind another: all that is well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=clean_environment() | {"XDG_STATE_HOME": str(tmp_path)},
    )
    assert done.stdout.splitlines() == ["program.double ok", "program.duplicates ok"], done.stderr
