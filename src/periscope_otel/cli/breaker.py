"""`periscope breaker`: the verdicts that processes share through a Redis, and setting them."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from periscope_otel.cli import breaker_view as view
from periscope_otel.cli.letter_options import AsJson, mistake
from periscope_otel.cli.letter_store import (
    NOT_DONE,
    Commands,
    say,
    write,
    write_json,
)
from periscope_otel.cli.letter_view import width_of
from periscope_otel.dead_letter.errors import StoreError
from periscope_otel.redaction import clean_name
from periscope_otel.redis_link import RedisLink, errors
from periscope_otel.resilience.sharing.listening import Listening
from periscope_otel.resilience.sharing.records import (
    MOST_NAMES,
    DamagedRecordError,
    Event,
    Record,
    Records,
    Verdict,
)
from periscope_otel.settings import load

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.text import Text

    from periscope_otel.resilience.policy import State

EXIT_CODES: Final = (
    "Exit codes: 0 done; 1 there is no such breaker; 2 a mistake in the command line or the "
    "settings; 3 the Redis cannot be reached."
)
TIMEOUT: Final = 5.0
"""Seconds for a connection, and for an answer."""
LOOK_AGAIN: Final = 5.0
"""Seconds after which `watch` looks for what it was not told."""
BACK_OFF: Final = (0.2, 5.0)
"""Seconds between attempts to reach a Redis that is away: at first, and at last."""
_READ_AT_ONCE: Final = 500

app = typer.Typer(
    cls=Commands,
    help="Breakers: what processes share about dependencies that fail. List, open, close, watch.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
)

RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis",
        metavar="URL",
        help="redis://…, rediss://… or unix://…; by default what the settings say "
        "(PERISCOPE_REDIS_URL).",
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The breaker's name.")]


# --- looking -------------------------------------------------------------------------------------


@app.command("list", epilog=EXIT_CODES)
def list_breakers(*, redis: RedisUrl = None, json: AsJson = False) -> None:
    """List breakers that have ever opened or were set, the worst first.

    After the name: its state, how long it is still open, how many times in a row it has opened,
    probes that are out, how long ago it changed, and why.
    """
    with _connected(redis) as link:
        rows = sorted(_rows(Records(link)), key=view.by_badness)
    if json:
        write_json({"breakers": [view.as_json(row) for row in rows]})
    elif rows:
        console = _console()
        _print(view.list_lines(rows, width_of(console, os.environ.get("COLUMNS")), time.time))
    else:
        say("no breakers: none has opened in the last week, and none was set")


@app.command(epilog=EXIT_CODES)
def show(name: Name, *, redis: RedisUrl = None, json: AsJson = False) -> None:
    """Show all that processes have found about a breaker."""
    name = _name(name)
    with _connected(redis) as link:
        records = Records(link)
        rows = _rows_of(records, [name])
    if not rows:
        say(f"no breaker {name} has opened in the last week, or was set")
        raise typer.Exit(NOT_DONE)
    if json:
        write_json(view.as_json(rows[0]))
    else:
        _print(view.detail_lines(rows[0], time.time))


@app.command(epilog=EXIT_CODES)
def watch(*, redis: RedisUrl = None, json: AsJson = False) -> None:
    """Print changes as they come, until Ctrl-C."""
    try:
        with _connected(redis) as link:
            _Watch(link, as_json=json).run()
    except KeyboardInterrupt:
        return


# --- setting -------------------------------------------------------------------------------------


@app.command("open", epilog=EXIT_CODES)
def open_breaker(name: Name, *, redis: RedisUrl = None, json: AsJson = False) -> None:
    """Have all processes reject every call, until `close`."""
    _set(name, "forced_open", redis, as_json=json)


@app.command("close", epilog=EXIT_CODES)
def close_breaker(name: Name, *, redis: RedisUrl = None, json: AsJson = False) -> None:
    """Close it in all processes, whatever it was; from then on it judges as usual."""
    _set(name, "closed", redis, as_json=json, make=False)


@app.command(epilog=EXIT_CODES)
def disable(name: Name, *, redis: RedisUrl = None, json: AsJson = False) -> None:
    """Have all processes let every call pass and judge none, until `close`."""
    _set(name, "disabled", redis, as_json=json)


@app.command(epilog=EXIT_CODES)
def observe(name: Name, *, redis: RedisUrl = None, json: AsJson = False) -> None:
    """Have all processes let every call pass, and only say when it would open, until `close`."""
    _set(name, "observe", redis, as_json=json)


def _set(name: str, state: State, redis: str | None, *, as_json: bool, make: bool = True) -> None:
    name = _name(name)
    with _connected(redis) as link:
        records = Records(link)
        (before,) = records.read([name])
        if before is None and not make:
            say(f"no breaker {name} has opened in the last week, or was set")
            raise typer.Exit(NOT_DONE)
        records.change(name, Verdict(state, "manual"), None, anyway=True)
    was = before.state if isinstance(before, Record) else None
    if as_json:
        write_json({"name": name, "state": state, "before": was, "created": before is None})
        return
    if before is None:
        say("no process has told of this breaker: it counts for those that will use the name")
    _print(view.set_lines(name, state, was))


# --- the Redis -----------------------------------------------------------------------------------


@contextmanager
def _connected(url: str | None) -> Iterator[RedisLink]:
    """Give the way to the Redis that is meant, for a block.

    Raises:
        StoreError: If it cannot be reached, or refuses what it is asked.
    """
    given = url or load({}).redis_url
    option = "--redis" if url else "PERISCOPE_REDIS_URL"
    if given is None:
        raise mistake("no Redis is given: use --redis or set PERISCOPE_REDIS_URL", "--redis")
    if not given.lower().startswith(("redis://", "rediss://", "unix://")):
        raise mistake("a Redis is redis://…, rediss://… or unix://…", option)
    try:
        link = RedisLink(given, TIMEOUT)
    except ValueError:
        raise mistake(
            "no Redis has such a URL (a password needs its special characters as %XX)", option
        ) from None
    try:
        yield link
    except errors() as error:
        raise StoreError(f"{link.shown}: {type(error).__name__}: {error}") from error
    finally:
        link.close()


def _rows(records: Records) -> Iterator[view.Row]:
    for names in _batches(records.names()):
        yield from _rows_of(records, names)


def _batches(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), _READ_AT_ONCE):
        yield names[start : start + _READ_AT_ONCE]


def _rows_of(records: Records, names: Sequence[str]) -> list[view.Row]:
    """Return the breakers of these names that there are; of a damaged one it is said so."""
    rows = []
    found = zip(names, records.read(names), records.probes(names), strict=True)
    for name, record, probes in found:
        if isinstance(record, DamagedRecordError):
            say(f"the record of {name} is damaged ({record}): `close` writes it anew")
        elif record is not None:
            rows.append(view.Row(name, record, probes))
    return rows


def _name(given: str) -> str:
    """Return a breaker's name as breakers have it."""
    name = clean_name(given)
    if not name:
        raise mistake(f"{given!r} is no name of a breaker", "NAME")
    return name


class _Watch:
    """Prints changes; what was missed while the Redis was away, it finds out afterwards."""

    def __init__(self, link: RedisLink, *, as_json: bool) -> None:
        self._link = link
        self._records = Records(link)
        self._listening = Listening(link)
        self._as_json = as_json
        self._seen: dict[str, Record | Event] = {}

    def run(self) -> None:
        """Go on until Ctrl-C.

        Raises:
            RedisError: If the Redis cannot be reached at the beginning.
        """
        self._listening.begin()
        self._seen.update(self._snapshot())
        say("watching; Ctrl-C ends it")
        back_off = BACK_OFF[0]
        while True:
            try:
                self._follow()
            except errors():
                self._listening.end()
                if back_off == BACK_OFF[0]:
                    say(f"{self._link.shown} does not answer; still watching")
                time.sleep(back_off)
                back_off = min(2 * back_off, BACK_OFF[1])
            else:
                back_off = BACK_OFF[0]

    def _follow(self) -> None:
        """Print what is told for a while, and then what was not."""
        if not self._listening.begin():  # it may not be allowed to
            time.sleep(BACK_OFF[0])
        until = time.monotonic() + LOOK_AGAIN
        while self._listening.socket is not None and (left := until - time.monotonic()) > 0:
            self._listening.wait(left)
            for event in self._listening.events():
                self._print_if_new(event)
        now = self._snapshot()
        if len(self._seen) > 2 * MOST_NAMES:  # of those that others have made up
            self._seen = {name: self._seen[name] for name in now if name in self._seen}
        for name, record in now.items():
            before = self._seen.get(name)
            self._print_if_new(_event_of(name, before, record))

    def _print_if_new(self, event: Event) -> None:
        seen = self._seen.get(event.name)
        if seen is not None and not _is_newer(event.version, seen.version):
            return
        self._seen[event.name] = event
        if self._as_json:
            write_json(view.event_json(event))
        else:
            write(view.event_line(event))

    def _snapshot(self) -> dict[str, Record]:
        found: dict[str, Record] = {}
        for names in _batches(self._records.names()):
            pairs = zip(names, self._records.read(names), strict=True)
            found |= {name: record for name, record in pairs if isinstance(record, Record)}
        return found


def _event_of(name: str, before: Record | Event | None, record: Record) -> Event:
    """Return the change that a record tells of that nobody has told of."""
    known = before.to_state if isinstance(before, Event) else before.state if before else None
    open_for = record.open_for if record.state == "open" else None
    return Event(name, known, record.state, record.reason, open_for, record.changed, record.version)


def _is_newer(version: tuple[str, int], seen: tuple[str, int]) -> bool:
    return version[0] != seen[0] or version[1] > seen[1]


# --- printing ------------------------------------------------------------------------------------


def _print(lines: Iterable[Text]) -> None:
    console = _console()
    for one in lines:
        console.print(one, soft_wrap=True)


def _console() -> Any:
    from rich.console import Console

    return Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
