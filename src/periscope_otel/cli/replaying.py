"""`periscope dlq replay`: the user's operations, and what became of each letter."""

from __future__ import annotations

import importlib
import sys
import threading
import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import typer

from periscope_otel.cli.letter_options import mistake
from periscope_otel.cli.letter_store import NOT_DONE, Place, named, say, write_json
from periscope_otel.cli.plain import defanged, line
from periscope_otel.replay import Replayed, ReplayReport
from periscope_otel.replay import replay as replay_letters

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from periscope_otel.dead_letter.letter import State
    from periscope_otel.dead_letter.store import Filter

REPLAYED: Final[tuple[State, ...]] = ("dead", "queued")
"""The states of letters that are replayed."""

_MOST_LEFT_TOLD: Final = 20
_MOST_IN_JSON: Final = 1000


class How(NamedTuple):
    """How letters are replayed; see `replay`."""

    limit: int | None
    rate: float | None
    concurrency: int
    dry_run: bool


def run(
    place: Place,
    where: Filter,
    ids: Sequence[str] | None,
    how: How,
    apps: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Replay letters, and say what became of them.

    Args:
        place: Where they are.
        where: Which.
        ids: Those alone, if any are given.
        how: How.
        apps: What is imported first.
        as_json: Whether the result is for programs.
    """
    if bad := [state for state in where.states if state not in REPLAYED]:
        raise mistake(f"letters that are {bad[0]} are not replayed", "--state")
    # What the user's own code prints is no part of the result.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        for app in apps:
            load_app(app)
        chosen = named(place.store, ids, where.queue, where.states)
        told = _Told(as_json=as_json)
        report = replay_letters(
            place.store,
            where if chosen.ids is None else replace(where, ids=chosen.ids),
            folder=place.bodies.folder,
            on_replayed=told.add,
            **how._asdict(),
        )
    if as_json:
        write_json(_as_json(report, told, chosen.missing, how))
    else:
        typer.echo(_summary(report, how))
    _hint(report, apps)
    not_done = report.failed or report.lost_claim or report.stopped or report.left
    if chosen.missing or (not_done and not how.dry_run):
        raise typer.Exit(NOT_DONE)


class _Told:
    """What became of letters, as it is told: those that succeeded are only counted."""

    def __init__(self, *, as_json: bool) -> None:
        self.letters: list[dict[str, Any]] = []
        self.not_listed = 0
        self._as_json = as_json
        self._left: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, replayed: Replayed) -> None:
        """Tell of one letter."""
        if replayed.outcome == "succeeded":
            return
        with self._lock:
            if self._as_json:
                self._list(replayed)
            else:
                self._say(replayed)

    def _list(self, replayed: Replayed) -> None:
        if len(self.letters) == _MOST_IN_JSON:
            self.not_listed += 1
            return
        about = {"outcome": replayed.outcome, "detail": line(replayed.detail, 1000)}
        self.letters.append({"id": replayed.letter.id, **about})

    def _say(self, replayed: Replayed) -> None:
        if replayed.outcome == "left":
            self._left[replayed.outcome] += 1
            if self._left[replayed.outcome] > _MOST_LEFT_TOLD:
                return
        detail = f": {defanged(line(replayed.detail))}" if replayed.detail else ""
        what = replayed.outcome.replace("_", " ")
        typer.echo(f"{line(replayed.letter.id)}  {what}{detail}")


def _as_json(report: ReplayReport, told: _Told, missing: int, how: How) -> dict[str, Any]:
    counts = asdict(report) | {"left": {line(why): n for why, n in report.left.items()}}
    counts["stopped"] = None if report.stopped is None else line(report.stopped)
    return counts | {
        "dry_run": how.dry_run,
        "not_found": missing,
        "letters": told.letters,
        "letters_not_listed": told.not_listed,
    }


def _summary(report: ReplayReport, how: How) -> str:
    if how.dry_run:
        parts = [f"{report.would_replay} would be replayed"]
    else:
        parts = [f"{report.succeeded} succeeded", f"{report.failed} failed"]
        if report.parked:
            parts[-1] += f" ({report.parked} of them too often: parked)"
        if report.lost_claim:
            parts.append(f"{report.lost_claim} taken over by another replayer")
    parts += [f"{number} left: {line(why)}" for why, number in report.left.most_common(10)]
    if report.stopped is not None:
        parts.append(f"stopped early: {line(report.stopped)}")
    return "; ".join(parts)


def _hint(report: ReplayReport, apps: Sequence[str]) -> None:
    if not any(why.endswith("is registered") for why in report.left):
        return
    if apps:
        say("the modules named by --app do not define these operations")
    else:
        say("name the module that defines these operations: --app MODULE")


# --- the user's modules --------------------------------------------------------------------------


def load_app(app: str) -> None:
    """Import a module that the user has named, whose operations register themselves.

    The current folder is searched, too. The attribute is looked up and not called; it is for those
    who name their application in the same way elsewhere.

    Args:
        app: `module` or `module:attribute`, with dots as in Python.
    """
    name, colon, attribute = app.partition(":")
    parts = name.split(".") + (attribute.split(".") if colon else [])
    if not all(part.isidentifier() for part in parts):
        raise mistake(f"{app!r} is neither module nor module:attribute", "--app")
    with _current_folder_first():
        try:
            found: Any = importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  (a module may even try to exit)
            raise mistake(f"cannot import {name}: {_why(error)}", "--app") from None
    for part in attribute.split(".") if colon else ():
        if not hasattr(found, part):
            raise mistake(f"{name} has no {attribute}", "--app")
        found = getattr(found, part)


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Have modules found in the current folder; it stays there for what is imported later."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    yield


def _why(error: BaseException) -> str:
    """Return an error and the line of the user's that raised it."""
    why = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if "importlib" not in one.filename and one.filename != __file__]
    return f"{why} ({own[-1].filename}, line {own[-1].lineno})" if own else why
