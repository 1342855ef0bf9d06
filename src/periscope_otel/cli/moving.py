"""`periscope dlq export`, `import` and `sweep`: files of letters, and what is said of them."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import typer

from periscope_otel.cli.letter_options import mistake
from periscope_otel.cli.letter_store import NOT_DONE, Place, say, write_json
from periscope_otel.cli.plain import line
from periscope_otel.dead_letter.errors import DeadLetterError
from periscope_otel.dead_letter.interchange import (
    ImportReport,
    export_letters,
    export_to,
    import_letters,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from periscope_otel.dead_letter.letter import Letter
    from periscope_otel.dead_letter.retention import Swept
    from periscope_otel.dead_letter.store import Filter

_MOST_TOLD = 20


def export(
    place: Place, where: Filter, limit: int | None, output: str, *, force: bool, as_json: bool
) -> None:
    """Write letters to a file or to standard output.

    Args:
        place: Where they are.
        where: Which.
        limit: How many at most.
        output: A file, or `-`.
        force: Whether a file that is there is replaced.
        as_json: Whether what is said of a file is for programs.
    """
    left_behind: list[Letter] = []

    def write_to(file: IO[bytes]) -> int:
        return export_letters(
            place.store,
            where,
            file,
            bodies=place.bodies,
            limit=limit,
            on_left_behind=lambda letter: left_behind.append(letter.changed(body=b"")),
        )

    if output == "-":
        written = write_to(_standard_output())
        sys.stdout.flush()
    else:
        written = _to_file(output, write_to, force=force)
    for letter in left_behind[:_MOST_TOLD]:
        say(f"{letter.id}: its payload is not in the export, but in a file of {letter.host}")
    if as_json and output != "-":
        write_json({"exported": written, "file": output, "payloads_left_behind": len(left_behind)})
    else:
        say(f"{written} exported")


def _standard_output() -> Any:
    if sys.stdout is None:  # closed before the start
        raise DeadLetterError("standard output is closed")
    sys.stdout.flush()
    return sys.stdout.buffer


def _to_file(output: str, write_to: Any, *, force: bool) -> int:
    try:
        return export_to(output, write_to, force=force)
    except FileExistsError as error:
        hint = "; --force replaces it" if Path(output).is_file() else ""
        raise mistake(f"{output}: {error.strerror}{hint}", "--output") from None
    except (OSError, ValueError) as error:
        raise mistake(f"cannot write {output}: {_why(error)}", "--output") from None


@contextmanager
def source(name: str) -> Iterator[IO[bytes]]:
    """Open a file to import from, or standard input."""
    if name == "-":
        if sys.stdin is None:
            raise DeadLetterError("standard input is closed")
        yield sys.stdin.buffer
        return
    try:
        file = Path(name).open("rb")  # noqa: SIM115  (closed below, where errors are others)
        file.peek(1)
    except (OSError, ValueError) as error:
        raise mistake(f"cannot read {name}: {_why(error)}", "FILE") from None
    with file:
        yield file


def import_from(file: IO[bytes], place: Place, queue: str | None, *, as_json: bool) -> None:
    """Import letters and say what became of them.

    Args:
        file: To read from.
        place: Where they go.
        queue: The queue that all of them go to, if it is not each one's own.
        as_json: Whether the result is for programs.
    """
    report = import_letters(place.store, file, bodies=place.bodies, queue=queue)
    if as_json:
        write_json(_as_json(report))
    else:
        for number, why in report.lines[:_MOST_TOLD]:
            say(f"line {number}: {why}")
        typer.echo(
            f"{report.stored} imported, {report.known} there already, {report.merged} taken in by "
            f"letters of the same payload, {report.damaged} lines damaged"
        )
    if report.damaged:
        raise typer.Exit(NOT_DONE)


def _as_json(report: ImportReport) -> dict[str, Any]:
    lines = [{"line": number, "why": line(why)} for number, why in report.lines]
    return asdict(report) | {"lines": lines}


def say_swept(swept: Swept, *, as_json: bool) -> None:
    """Say what a sweep has removed, or would."""
    if as_json:
        write_json(asdict(swept) | {"letters": swept.letters})
        return
    reasons = f"{swept.by_age} too old, {swept.by_number} too many, {swept.by_size} too large"
    if swept.dry_run:
        typer.echo(f"{swept.letters} letters would be removed ({reasons}); add --yes")
    else:
        typer.echo(
            f"{swept.letters} letters removed ({reasons}), {swept.archived} archived, "
            f"{swept.payload_files} payload files removed"
        )
    if swept.kept:
        say(f"{swept.kept} stay: their payloads are in files of other hosts or too large")


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
