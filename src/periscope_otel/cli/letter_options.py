"""The options that the commands about dead letters share, and what their values mean."""

from __future__ import annotations

import enum
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from periscope_otel.cli.plain import line
from periscope_otel.dead_letter.letter import STATES
from periscope_otel.dead_letter.names import queue_name
from periscope_otel.dead_letter.store import Filter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from periscope_otel.dead_letter.letter import State

_AGE: Final = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


class StateName(enum.StrEnum):
    """The states that a letter in a store may have."""

    DEAD = "dead"
    QUEUED = "queued"
    CLAIMED = "claimed"
    PARKED = "parked"


StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="sqlite:///file.db, redis://…, rediss://… or unix://…; by default what the settings "
        "say (PERISCOPE_REDIS_URL, PERISCOPE_DATA_DIR).",
    ),
]
Queue = Annotated[str, typer.Option("--queue", metavar="NAME", help="Letters of this queue.")]
States = Annotated[
    list[StateName] | None,
    typer.Option("--state", help="Letters in this state; may be given several times."),
]
Feed = Annotated[str | None, typer.Option("--feed", help="Letters of this feed.")]
OperationName = Annotated[str | None, typer.Option("--operation", help="Of this operation.")]
Fingerprint = Annotated[
    str | None, typer.Option("--fingerprint", help="That failed for the same cause; see `stats`.")
]
ErrorType = Annotated[str | None, typer.Option("--error-type", help="With this error type.")]
Since = Annotated[
    str | None,
    typer.Option(
        "--since",
        metavar="TIME",
        help="Failed last at this time or later: ISO 8601 (UTC unless it says otherwise), or an "
        "age such as 2h or 7d.",
    ),
]
Until = Annotated[
    str | None, typer.Option("--until", metavar="TIME", help="Failed last before this time.")
]
Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="ID", help="Ids, or at least 8 characters of each.", show_default=False),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="How many at most.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
NoDefang = Annotated[
    bool,
    typer.Option("--no-defang", help="Show indicators as they are: links become clickable."),
]
DryRun = Annotated[
    bool,
    typer.Option("--yes/--dry-run", help="Do it. By default it is only said what would be done."),
]


def mistake(message: str, option: str | None = None) -> Exception:
    """Return the error of a wrong command line; ends with exit code 2."""
    return typer.BadParameter(line(message), param_hint=option)


def filter_of(
    queue: str,
    states: Sequence[StateName] | None,
    default: tuple[State, ...],
    *,
    feed: str | None = None,
    operation: str | None = None,
    fingerprint: str | None = None,
    error_type: str | None = None,
    since: str | None = None,
    until: str | None = None,
) -> Filter:
    """Return the filter that the options of a command line say."""
    wanted: tuple[State, ...] = tuple(one for one in STATES if one in (states or ()))
    return Filter(
        queue=queue_option(queue),
        states=wanted or default,
        feed=feed,
        operation=operation,
        fingerprint=fingerprint,
        error_type=error_type,
        since=None if since is None else moment_option(since, "--since"),
        until=None if until is None else moment_option(until, "--until"),
    )


def queue_option(queue: str) -> str:
    """Return the name of a queue from the command line."""
    try:
        return queue_name(queue)
    except ValueError as error:
        raise mistake(str(error), "--queue") from None


def moment_option(text: str, option: str, clock: Callable[[], float] = time.time) -> float:
    """Return Unix time from ISO 8601 (UTC unless it says otherwise) or from an age."""
    seconds = _seconds(text)
    if seconds is not None:
        return clock() - seconds
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError:
        raise mistake(
            f"{text!r} is neither a time such as 2026-01-31T12:00Z nor an age such as 2h or 7d",
            option,
        ) from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def age_option(text: str, option: str) -> float:
    """Return the seconds of an age such as `7d` or `1d12h`."""
    seconds = _seconds(text)
    if seconds is None:
        raise mistake(f"{text!r} is no age such as 2h, 7d or 1d12h", option)
    return seconds


def _seconds(text: str) -> float | None:
    written = text.strip().lower()
    parts = _AGE.findall(written[:100])
    if not parts or "".join(number + unit for number, unit in parts) != written:
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts)
