"""The contracts of `periscope doctor` as a command: what it prints, and how it ends."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import TYPE_CHECKING

import pytest
from doctoring import (
    ENDS_WITHIN,
    STATUSES,
    Told,
    command,
    counted,
    doctor,
    doctor_apart,
    listing,
    squeezed,
    text,
)
from processes import clean_environment
from rich.cells import cell_len
from typer.testing import CliRunner

from periscope_otel.cli import app
from periscope_otel.dead_letter.queue import DeadLetterQueue

pytest.register_assert_rewrite("store_conformance")

from store_conformance import some  # noqa: E402  (its assertions are rewritten first)

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "geheim-4711-Qx9"
NO_WARNINGS = {
    "OTEL_TRACES_EXPORTER": "console",
    "OTEL_METRICS_EXPORTER": "console",
    "PERISCOPE_DEAD_LETTER_FILE_LIMIT": str(1 << 20),
}
"""Nothing to warn of, on a disk that is not full."""
WARNED = {**NO_WARNINGS, "PERISCOPE_LABEL_LIMITS": "7"}
BROKEN = {**NO_WARNINGS, "PERISCOPE_LABEL_LIMIT": "many"}
PATIENTLY = ("--timeout", "30")
"""For a process of its own, where nothing is asked that would use it up."""
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """Return the folder in which a command could leave something behind."""
    place = tmp_path / "home"
    for name, variable in (("state", "XDG_STATE_HOME"), ("temporary", "TMPDIR"), ("", "HOME")):
        (place / name).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(variable, str(place / name))
    # Servers have as long as the option says, and what asks them all the time that it needs.
    module = importlib.import_module("periscope_otel.doctor.examine")
    monkeypatch.setattr(module, "_MORE", 300.0)
    return place


LONG, WIDE = "a-long-name-" * 15, "数据目录" * 15


def many_problems(tmp_path: Path, folder: str = WIDE) -> dict[str, str]:
    """Return an environment with findings of all kinds, with long names and wide characters."""
    return {
        "PERISCOPE_LABEL_LIMIT": "many",
        "PERISCOPE_" + "A_LONG_NAME_" * 12: "1",
        "PERISCOPE_DATA_DIR": str(tmp_path / folder),
        "PERISCOPE_REDIS_URL": f"redis://:{SECRET}@127.0.0.1:1",
        "OTEL_TRACES_EXPORTER": "no_such_exporter_" * 5,
    }


# --- JSON ----------------------------------------------------------------------------------------


def test_json_is_one_line_of_ascii(tmp_path):
    """Whatever is in the findings; nothing else is on standard output."""
    found = doctor(**many_problems(tmp_path))
    assert {one["status"] for one in found.findings} == set(STATUSES)
    assert WIDE in found.one("data_dir.folder")["message"]


def test_json_tells_what_the_library_finds():
    """The same findings, in the same order."""
    from periscope_otel.doctor import examine

    with pytest.MonkeyPatch.context() as patch:
        for name in tuple(os.environ):
            if name.startswith(("PERISCOPE_", "OTEL_")):
                patch.delenv(name)
        found = [(one.check, one.status) for one in examine().findings]
    assert [(one["check"], one["status"]) for one in doctor().findings] == found


# --- how it ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "relaxed", "strict"),
    [(NO_WARNINGS, 0, 0), (WARNED, 0, 1), (BROKEN, 1, 1)],
    ids=["well", "warned", "broken"],
)
@pytest.mark.parametrize("form", ["json", "text"])
def test_the_exit_status_says_how_it_is(environment, relaxed, strict, form):
    """1 if something is broken; with --strict also if something is warned of."""
    arguments = ["doctor"] + ["--json"] * (form == "json")
    clean = {name: None for name in os.environ if name.startswith(("PERISCOPE_", "OTEL_"))}
    for options, status in (([], relaxed), (["--strict"], strict)):
        result = CliRunner().invoke(app, [*arguments, *options], env={**clean, **environment})
        assert result.exit_code == status, result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("--timeout", "0"),
        ("--timeout", "0.05"),
        ("--timeout", "60.5"),
        ("--timeout", "-1"),
        ("--timeout", "nan"),
        ("--timeout", "inf"),
        ("--timeout", "soon"),
        ("--timeout",),
        ("--program", "no-port"),
        ("--program", "127.0.0.1:port"),
        ("--program", "127.0.0.1:99999"),
        ("--program", "http://127.0.0.1:9464"),
        ("--program", f"bob:{SECRET}@127.0.0.1:9464"),
        ("--program",),
        ("--no-such-option",),
        ("extra",),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_a_mistake_in_the_command_line_ends_with_2(arguments, form):
    """It is said on standard error, without a traceback and without a password."""
    result = CliRunner().invoke(app, ["doctor", *form, *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr
    assert "Traceback" not in result.output
    assert SECRET not in result.output


@pytest.mark.parametrize("timeout", ["0.1", "60", "2.5"])
def test_a_timeout_within_its_bounds_is_taken(timeout):
    """Both ends included."""
    assert doctor("--timeout", timeout, **NO_WARNINGS).status == 0


def test_it_is_among_the_commands():
    """With its own help."""
    assert "doctor" in CliRunner().invoke(app, ["--help"]).stdout
    helped = CliRunner().invoke(app, ["doctor", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert helped.exit_code == 0
    for option in ("--program", "--timeout", "--strict", "--json"):
        assert option in helped.stdout


# --- what people read ----------------------------------------------------------------------------


def told_as_text(printed: str, found: Told) -> None:
    """Fail unless all findings are told in a text, each with its remedy, and counted."""
    whole = squeezed(printed)
    lines = printed.splitlines()
    for one in found.findings:
        begins = [
            line for line in lines if one["check"] in line.split() and one["status"] in line.split()
        ]
        assert begins, f"{one['status']} {one['check']} is not in\n{printed}"
        if " ms" in one["message"] or one["check"] in ("data_dir.space", "host.figures"):
            continue  # other figures the next time
        assert squeezed(one["message"]) in whole, one
        if one["remedy"]:
            assert squeezed(f"-> {one['remedy']}") in whole, one
    remedies = [line for line in lines if line.strip().startswith("-> ")]
    assert len(remedies) == sum(one["remedy"] is not None for one in found.findings)
    counts = dict.fromkeys(STATUSES, 0)
    for one in found.findings:
        counts[one["status"]] += 1
    assert counted(printed) == counts


@pytest.mark.parametrize("columns", ["40", "80", "200"])
@pytest.mark.parametrize("folder", [LONG, WIDE], ids=["long", "wide"])
def test_lines_are_as_wide_as_the_terminal(tmp_path, columns, folder):
    """Nothing is cut off, and no line is wider, also where names are long or characters wide."""
    environment = many_problems(tmp_path, folder)
    printed = text(**environment, COLUMNS=columns)
    assert max(map(cell_len, printed.splitlines())) <= int(columns), printed
    told_as_text(printed, doctor(**environment))


def test_without_a_terminal_lines_are_of_80_columns(tmp_path):
    """And some are longer than those of a narrow one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        done = command(**many_problems(tmp_path, LONG))
    assert 60 < max(map(cell_len, done.stdout.splitlines())) <= 80


def test_colour_is_not_needed(tmp_path):
    """Where there is no terminal nothing acts on one."""
    printed = text(**many_problems(tmp_path))
    assert all(line.isprintable() for line in printed.split("\n"))


def test_on_a_terminal_its_width_counts(tmp_path):
    """What colours there are can be left out."""
    environment = clean_environment() | many_problems(tmp_path, LONG)
    environment["TERM"] = "xterm-256color"
    environment.pop("COLUMNS", None)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 57, 0, 0))
    code = "from periscope_otel.cli import app; app()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "doctor"], stdin=theirs, stdout=theirs, stderr=theirs,
        env=environment,
    ) as process:  # fmt: skip
        os.close(theirs)
        printed = b""
        try:
            while block := os.read(ours, 65536):
                printed += block
        except OSError:
            pass  # the terminal was closed at its other end
        assert process.wait(ENDS_WITHIN) == 1
    os.close(ours)
    plain = ESCAPES.sub("", printed.decode().replace("\r\n", "\n"))
    assert all(line.isprintable() for line in plain.split("\n")), plain
    assert max(map(cell_len, plain.splitlines())) <= 57
    assert counted(plain)["broken"] >= 2


@pytest.mark.parametrize("columns", ["", "0", "1", "7", "-3", "abc", "9" * 30])
def test_a_width_that_is_none_does_no_harm(columns):
    """Everything is told all the same."""
    assert counted(text(COLUMNS=columns, **NO_WARNINGS))["ok"] > 3


def test_the_end_counts_what_there_is():
    """Also where nothing is wrong."""
    counts = counted(text(**NO_WARNINGS))
    assert counts["broken"] == counts["warning"] == 0
    assert counts["ok"] > 3


def test_a_terminal_without_the_characters_gets_what_it_can(tmp_path):
    """Escaped, not an error."""
    environment = many_problems(tmp_path)
    done = command(**environment, PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert done.stderr == ""
    assert counted(done.stdout)["broken"] >= 2


# --- what it leaves alone ------------------------------------------------------------------------


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_a_reader_that_has_gone_is_no_error(tmp_path, form):
    """Nothing is said of it, and it ends."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-c", "from periscope_otel.cli import app; app()", "doctor", *form],
            stdout=closed, stderr=subprocess.PIPE, text=True, check=False, timeout=ENDS_WITHIN,
            env=clean_environment() | many_problems(tmp_path),
        )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode in (0, 1)


def test_faults_are_told_on_standard_output_alone(tmp_path):
    """No log line and no traceback is on standard error."""
    done = command("--json", **many_problems(tmp_path))
    assert done.stderr == ""
    assert json.loads(done.stdout)["ok"] is False


@pytest.mark.parametrize(
    ("form", "redis"),
    [((), {}), (("--json",), {"PERISCOPE_REDIS_URL": "redis://127.0.0.1:1"})],
    ids=["without a Redis", "with one"],
)
def test_nothing_is_left_behind(home, form, redis, monkeypatch):
    """No file and no folder, neither where letters go nor where anybody else writes."""
    monkeypatch.chdir(home)
    (home / "letters").mkdir(mode=0o700)
    before = listing(home)
    for data_dir in (None, home / "letters", home / "new"):
        given = {} if data_dir is None else {"PERISCOPE_DATA_DIR": str(data_dir)}
        done = command(*form, *PATIENTLY, **given, **redis, PYTHONDONTWRITEBYTECODE="1")
        assert done.returncode == (1 if redis else 0), done.stdout
        assert listing(home) == before


def test_letters_that_are_there_stay_as_they_are(home):
    """Byte for byte, with no file beside them."""
    with DeadLetterQueue(home / "letters") as queue:
        queue.put(some(3))
    before = listing(home)
    found = doctor_apart(*PATIENTLY, PERISCOPE_DATA_DIR=str(home / "letters"))
    assert found.status_of("data_dir.file") == "ok"
    assert listing(home) == before


@pytest.mark.parametrize(
    "environment",
    [
        {"PERISCOPE_REDIS_URL": f"redis://:{SECRET}@127.0.0.1:1/0"},
        {"PERISCOPE_REDIS_URL": f"redis://user:{SECRET}@127.0.0.1:1/0"},
        {"PERISCOPE_REDIS_URL": f"redis://127.0.0.1:1/0?password={SECRET}"},
        {"PERISCOPE_REDIS_URL": f"redis://:{SECRET}@127.0.0.1:port"},
        {"PERISCOPE_REDIS_URL": f"redis://:{SECRET}@127.0.0.1:1/0?no_such_option=1"},
        {"PERISCOPE_REDIS_URL": f"unix://:{SECRET}@/no/such/socket"},
        {"PERISCOPE_OTLP_ENDPOINT": f"http://bob:{SECRET}@127.0.0.1:1"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://bob:{SECRET}@127.0.0.1:1"},
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://bob:{SECRET}@127.0.0.1:1",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        },
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer {SECRET},x-tenant={SECRET}",
        },
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
            "OTEL_EXPORTER_OTLP_HEADERS": f"this is no header {SECRET}",
        },
    ],
    ids=[
        *("password", "user", "query", "bad port", "bad option", "socket"),
        *("setting", "endpoint", "grpc endpoint", "headers", "bad headers"),
    ],
)
def test_secrets_are_not_told(environment):
    """Neither in findings nor on standard error."""
    done = command("--json", "--timeout", "1", **environment)
    assert done.returncode == 1, done.stdout
    assert SECRET not in done.stdout
    assert SECRET not in squeezed(text("--timeout", "1", **environment))
    assert SECRET not in done.stderr
    assert "Traceback" not in done.stderr
