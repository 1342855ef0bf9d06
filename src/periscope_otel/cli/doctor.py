"""`periscope doctor`: what is found and what is not, with the reason and the remedy."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from periscope_otel.cli.letter_options import AsJson, mistake
from periscope_otel.cli.letter_store import NOT_DONE, write_json
from periscope_otel.settings import without_credentials

if TYPE_CHECKING:
    from collections.abc import Iterator

    from periscope_otel.doctor import Diagnosis, Finding

EXIT_CODES: Final = (
    "Exit codes: 0 nothing is broken; 1 something is (with --strict also what is warned of); "
    "2 a mistake in the command line."
)
_COLORS: Final = {"broken": "red", "warning": "yellow", "ok": "green", "off": "dim"}
_STATUS: Final = 9
_CHECK: Final = 19
_NARROW: Final = 60
_LEAST, _NO_TERMINAL = 40, 80


def doctor(
    *,
    program: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A running program's Prometheus address: it tells what is found inside of it. By "
            "default what the settings say (PERISCOPE_PROMETHEUS).",
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(min=0.1, max=60.0, metavar="SECONDS", help="For each server to answer."),
    ] = 3.0,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as broken.")] = False,
    json: AsJson = False,
) -> None:
    """Say what is found and what is not, with the reason and the remedy; change nothing.

    Settings, OpenTelemetry packages, Collector, dead letters, Redis, breakers, host and GPUs.
    """
    _silence()
    from periscope_otel.doctor import examine

    try:
        diagnosis = examine(program=program, timeout=timeout)
    except ValueError:
        shown = without_credentials(program)
        raise mistake(f"{shown} is no address such as 127.0.0.1:9464", "--program") from None
    try:
        if json:
            write_json(diagnosis.as_json())
        else:
            _print(diagnosis)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # the reader has seen enough
    except OSError as error:  # a disk that is full
        typer.echo(f"periscope: {error.strerror}", err=True)
        raise typer.Exit(NOT_DONE) from None
    if diagnosis.broken or (strict and diagnosis.warnings):
        raise typer.Exit(NOT_DONE)


def _silence() -> None:
    """Let nobody else write: what exporters and drivers log is told as findings."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.getLogger().addHandler(logging.NullHandler())
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not have all characters
        sys.stdout.reconfigure(errors="backslashreplace")


def _print(diagnosis: Diagnosis) -> None:
    known = Console()
    has_width = known.is_terminal or os.environ.get("COLUMNS", "").isdigit()
    width = max(_LEAST, known.width) if has_width else _NO_TERMINAL
    console = Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)
    for finding in diagnosis.findings:
        for one in _lines(console, finding):
            console.print(one, soft_wrap=True)
    console.print(_summary(diagnosis), soft_wrap=True)


def _lines(console: Console, finding: Finding) -> Iterator[Text]:
    """Give a finding's lines, and its remedy's."""
    status = Text(f"{finding.status:<{_STATUS}}", _COLORS[finding.status])
    head = status.append(f"{finding.check:<{_CHECK}} ", "default")
    if console.width >= _NARROW:
        indent = len(head)
        yield from _wrapped(console, finding.message, head, indent)
    else:
        indent = 2
        head.rstrip()
        yield head
        yield from _wrapped(console, finding.message, Text(" " * indent), indent)
    if finding.remedy is not None:
        yield from _wrapped(console, finding.remedy, Text(f"{' ' * indent}-> "), indent + 3)


def _wrapped(console: Console, text: str, first: Text, indent: int) -> Iterator[Text]:
    """Give a text in lines that fit, in cells: wide characters take two."""
    before = first
    for one in Text(text).wrap(console, console.width - indent):
        one.rstrip()
        yield before + one
        before = Text(" " * indent)


def _summary(diagnosis: Diagnosis) -> str:
    counts = Counter(one.status for one in diagnosis.findings)
    warnings = "1 warning" if counts["warning"] == 1 else f"{counts['warning']} warnings"
    return f"{counts['broken']} broken, {warnings}, {counts['ok']} ok, {counts['off']} off"
