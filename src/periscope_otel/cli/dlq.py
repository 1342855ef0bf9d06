"""`periscope dlq`: looking at dead letters, and having them tried again, moved or removed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from periscope_otel.cli import letter_options as options
from periscope_otel.cli import letter_view as view
from periscope_otel.cli.letter_store import (
    EXIT_CODES,
    NOT_DONE,
    Commands,
    named,
    opened,
    say,
    whole_id,
    write_json,
)
from periscope_otel.dead_letter.interchange import pages
from periscope_otel.dead_letter.letter import STATES
from periscope_otel.dead_letter.store import LONGEST_PAGE, Filter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.text import Text

    from periscope_otel.dead_letter.letter import Letter, State
    from periscope_otel.dead_letter.store import Stats, Store

app = typer.Typer(
    cls=Commands,
    help="Dead letters: payloads that failed. List them, see why, replay, move or remove them.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
)

NOT_CLAIMED: Final[tuple[State, ...]] = ("dead", "queued", "parked")


# --- looking -------------------------------------------------------------------------------------


@app.command("list", epilog=EXIT_CODES)
def list_letters(
    *,
    store: options.StoreUrl = None,
    queue: options.Queue = "default",
    state: options.States = None,
    feed: options.Feed = None,
    operation: options.OperationName = None,
    fingerprint: options.Fingerprint = None,
    error_type: options.ErrorType = None,
    since: options.Since = None,
    until: options.Until = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, max=LONGEST_PAGE, help="How many at most.")
    ] = 20,
    cursor: Annotated[
        str | None, typer.Option("--cursor", help="Go on where a list has ended.")
    ] = None,
    newest_first: Annotated[
        bool, typer.Option("--newest-first/--oldest-first", help="In which order.")
    ] = True,
    no_defang: options.NoDefang = False,
    json: options.AsJson = False,
) -> None:
    """List dead letters: id, state, age, attempts and failed replays, size, and what failed."""
    where = options.filter_of(
        queue, state, STATES, feed=feed, operation=operation, fingerprint=fingerprint,
        error_type=error_type, since=since, until=until,
    )  # fmt: skip
    if cursor is not None and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise options.mistake(f"{cursor!r} is no cursor of a list", "--cursor")
    found: list[Letter] = []
    following: str | None = None
    with opened(store) as (letters, *_):
        for page in pages(letters, where, cursor=cursor, limit=limit, newest_first=newest_first):
            found += [letter.changed(body=b"") for letter in page.letters]
            following = page.cursor
    if json:
        write_json({"letters": [view.summary_of(one) for one in found], "cursor": following})
        return
    if found:
        _print(view.list_lines(found, _width(), defang=not no_defang, clock=time.time))
    else:
        say("no letters")
    if following is not None:
        say(f"there may be more: the same with --cursor {following}")


@app.command(epilog=EXIT_CODES)
def show(
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="At least 8 characters of it.")],
    *,
    store: options.StoreUrl = None,
    queue: options.Queue = "default",
    no_defang: options.NoDefang = False,
    json: options.AsJson = False,
) -> None:
    """Show why a letter is here: its error, where it comes from, and its payload's beginning."""
    from periscope_otel.settings import load

    jaeger = load({}).jaeger_url
    with opened(store) as (letters, bodies, _):
        whole = whole_id(letters, letter_id, options.queue_option(queue))
        letter = None if whole is None else letters.get(whole, queue)
        if letter is None:
            raise typer.Exit(NOT_DONE)
        preview = view.preview_of(letter, bodies)
    if json:
        write_json(view.details_of(letter, preview, jaeger))
    else:
        _print(view.detail_lines(letter, preview, jaeger, defang=not no_defang, clock=time.time))


@app.command(epilog=EXIT_CODES)
def stats(
    *,
    store: options.StoreUrl = None,
    queue: options.Queue = "default",
    no_defang: options.NoDefang = False,
    json: options.AsJson = False,
) -> None:
    """Count letters by state, feed and cause; with the age of the oldest, and bytes."""
    with opened(store) as (letters, *_):
        figures = letters.stats(options.queue_option(queue))
        examples = _examples(letters, figures, queue)
        url = letters.url
    waiting = _waiting_in_outbox() if store is None else None
    if json:
        write_json(view.stats_json(figures, queue, examples, url, waiting))
        return
    _print(
        view.stats_lines(figures, queue, examples, _width(), defang=not no_defang, clock=time.time)
    )
    if waiting:
        say(f"{waiting} more are still in this machine's outbox, on their way to the Redis")


_EXAMPLES: Final = 10


def _examples(store: Store, figures: Stats, queue: str) -> dict[str, Letter | None]:
    """Return the latest letter of each of the most frequent causes."""
    found: dict[str, Letter | None] = {}
    for fingerprint in list(figures.by_fingerprint)[:_EXAMPLES]:
        where = Filter(queue=queue, states=STATES, fingerprint=fingerprint)
        page = store.list(where, limit=1, newest_first=True)
        found[fingerprint] = page.letters[0] if page.letters else None
    return found


def _waiting_in_outbox() -> int | None:
    """Return how many letters of this machine have not reached their Redis; None without one."""
    from periscope_otel.dead_letter.errors import StoreError
    from periscope_otel.dead_letter.in_use import in_use
    from periscope_otel.dead_letter.outbox import Outbox
    from periscope_otel.dead_letter.queue import FILE

    path = in_use.options.folder / FILE
    if in_use.options.redis_url is None or not path.is_file():
        return None
    try:
        outbox = Outbox(path)
        try:
            return outbox.waiting().letters
        finally:
            outbox.close()
    except StoreError:
        return None


# --- having them tried again ---------------------------------------------------------------------


@app.command(epilog=EXIT_CODES)
def replay(
    ids: options.Ids = None,
    *,
    store: options.StoreUrl = None,
    queue: options.Queue = "default",
    state: options.States = None,
    feed: options.Feed = None,
    operation: options.OperationName = None,
    fingerprint: options.Fingerprint = None,
    error_type: options.ErrorType = None,
    since: options.Since = None,
    until: options.Until = None,
    limit: options.Limit = None,
    rate: Annotated[float | None, typer.Option("--rate", help="Letters a second at most.")] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, max=256, help="Handlers that run at a time.")
    ] = 1,
    apps: Annotated[
        list[str] | None,
        typer.Option(
            "--app",
            metavar="MODULE[:ATTRIBUTE]",
            help="Import this module, whose operations the letters are for; looked for in the "
            "current folder, too. May be given several times.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try none, only say what would be tried.")
    ] = False,
    json: options.AsJson = False,
) -> None:
    """Replay letters that are dead or queued through the operations that they are for."""
    from periscope_otel.cli import replaying

    where = options.filter_of(
        queue, state, replaying.REPLAYED, feed=feed, operation=operation, fingerprint=fingerprint,
        error_type=error_type, since=since, until=until,
    )  # fmt: skip
    if rate is not None and not 0 < rate < float("inf"):
        raise options.mistake("it has to be greater than 0", "--rate")
    how = replaying.How(limit, rate, concurrency, dry_run)
    with opened(store) as place:
        replaying.run(place, where, ids, how, apps or (), as_json=json)


@app.command(epilog=EXIT_CODES)
def requeue(
    ids: options.Ids = None,
    *,
    store: options.StoreUrl = None,
    queue: options.Queue = "default",
    feed: options.Feed = None,
    operation: options.OperationName = None,
    fingerprint: options.Fingerprint = None,
    error_type: options.ErrorType = None,
    since: options.Since = None,
    until: options.Until = None,
    limit: options.Limit = None,
    json: options.AsJson = False,
) -> None:
    """Queue dead letters for a replayer that runs elsewhere."""
    where = options.filter_of(
        queue, None, ("dead",), feed=feed, operation=operation, fingerprint=fingerprint,
        error_type=error_type, since=since, until=until,
    )  # fmt: skip
    with opened(store) as (letters, *_):
        chosen = named(letters, ids, queue, where.states)
        done = letters.requeue(_among(where, chosen.ids), limit)
    _say_how_many(done, "requeued", chosen.missing, as_json=json)


@app.command(epilog=EXIT_CODES)
def park(
    ids: options.Ids = None,
    *,
    store: options.StoreUrl = None,
    queue: options.Queue = "default",
    state: options.States = None,
    feed: options.Feed = None,
    operation: options.OperationName = None,
    fingerprint: options.Fingerprint = None,
    error_type: options.ErrorType = None,
    since: options.Since = None,
    until: options.Until = None,
    json: options.AsJson = False,
) -> None:
    """Take dead and queued letters out of every replay until they are unparked."""
    where = options.filter_of(
        queue, state, ("dead", "queued"), feed=feed, operation=operation, fingerprint=fingerprint,
        error_type=error_type, since=since, until=until,
    )  # fmt: skip
    with opened(store) as (letters, *_):
        chosen = named(letters, ids, queue, where.states)
        done = letters.park(_among(where, chosen.ids))
    _say_how_many(done, "parked", chosen.missing, as_json=json)


@app.command(epilog=EXIT_CODES)
def unpark(
    ids: options.Ids = None,
    *,
    store: options.StoreUrl = None,
    queue: options.Queue = "default",
    feed: options.Feed = None,
    operation: options.OperationName = None,
    fingerprint: options.Fingerprint = None,
    error_type: options.ErrorType = None,
    since: options.Since = None,
    until: options.Until = None,
    json: options.AsJson = False,
) -> None:
    """Make parked letters dead again, with no failed replays."""
    where = options.filter_of(
        queue, None, ("parked",), feed=feed, operation=operation, fingerprint=fingerprint,
        error_type=error_type, since=since, until=until,
    )  # fmt: skip
    with opened(store) as (letters, *_):
        chosen = named(letters, ids, queue, where.states)
        done = letters.unpark(_among(where, chosen.ids))
    _say_how_many(done, "unparked", chosen.missing, as_json=json)


# --- removing and moving -------------------------------------------------------------------------


@app.command(epilog=EXIT_CODES)
def purge(
    ids: options.Ids = None,
    *,
    store: options.StoreUrl = None,
    queue: options.Queue = "default",
    state: options.States = None,
    feed: options.Feed = None,
    operation: options.OperationName = None,
    fingerprint: options.Fingerprint = None,
    error_type: options.ErrorType = None,
    since: options.Since = None,
    until: options.Until = None,
    yes: options.DryRun = False,
    json: options.AsJson = False,
) -> None:
    """Remove letters for good; by default all that are not being replayed, and only with --yes."""
    where = options.filter_of(
        queue, state, NOT_CLAIMED, feed=feed, operation=operation, fingerprint=fingerprint,
        error_type=error_type, since=since, until=until,
    )  # fmt: skip
    with opened(store) as (letters, *_):
        chosen = named(letters, ids, queue, where.states)
        done = letters.purge(_among(where, chosen.ids), dry_run=not yes)
    _say_how_many(done, "purged", chosen.missing, as_json=json, dry_run=not yes)


@app.command(epilog=EXIT_CODES)
def export(
    ids: options.Ids = None,
    *,
    store: options.StoreUrl = None,
    queue: options.Queue = "default",
    state: options.States = None,
    feed: options.Feed = None,
    operation: options.OperationName = None,
    fingerprint: options.Fingerprint = None,
    error_type: options.ErrorType = None,
    since: options.Since = None,
    until: options.Until = None,
    limit: options.Limit = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where to; - is standard output.")
    ] = "-",
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    json: options.AsJson = False,
) -> None:
    """Write letters as JSON Lines, with everything that is in them; they stay where they are."""
    from periscope_otel.cli import moving

    where = options.filter_of(
        queue, state, STATES, feed=feed, operation=operation, fingerprint=fingerprint,
        error_type=error_type, since=since, until=until,
    )  # fmt: skip
    with opened(store) as place:
        chosen = named(place.store, ids, queue, where.states)
        moving.export(place, _among(where, chosen.ids), limit, output, force=force, as_json=json)
    if chosen.missing:
        raise typer.Exit(NOT_DONE)


@app.command("import", epilog=EXIT_CODES)
def import_letters(
    source: Annotated[str, typer.Argument(metavar="FILE", help="- is standard input.")],
    *,
    store: options.StoreUrl = None,
    queue: Annotated[
        str | None,
        typer.Option("--queue", metavar="NAME", help="Into this queue; else each into its own."),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Put letters of an export into a store; those that are there already stay as they are."""
    from periscope_otel.cli import moving

    into = None if queue is None else options.queue_option(queue)
    with moving.source(source) as file, opened(store, make=True) as place:
        moving.import_from(file, place, into, as_json=json)


@app.command(epilog=EXIT_CODES)
def sweep(
    *,
    store: options.StoreUrl = None,
    queue: options.Queue = "default",
    older_than: Annotated[
        str,
        typer.Option(
            "--older-than", metavar="AGE", help="Since their latest failure; `never` for any age."
        ),
    ] = "30d",
    most_letters: Annotated[
        int | None,
        typer.Option("--most-letters", min=0, help="Keep this many; the oldest others go."),
    ] = None,
    most_bytes: Annotated[
        int | None, typer.Option("--most-bytes", min=0, help="Keep this many bytes of letters.")
    ] = None,
    archive: Annotated[
        Path | None,
        typer.Option("--archive", help="Append to this file what is removed, before it is."),
    ] = None,
    payload_queues: Annotated[
        list[str] | None,
        typer.Option(
            "--payload-queue",
            metavar="NAME",
            help="With a Redis: name all queues whose letters may have payload files on this "
            "machine, and files that none of them names are removed, too.",
        ),
    ] = None,
    yes: options.DryRun = False,
    json: options.AsJson = False,
) -> None:
    """Remove dead and parked letters that are old, or more than there should be."""
    from periscope_otel.cli import moving
    from periscope_otel.dead_letter.retention import sweep as sweep_store

    seconds = None if older_than == "never" else options.age_option(older_than, "--older-than")
    with opened(store) as place:
        swept = sweep_store(
            place.store,
            older_than=seconds,
            most_letters=most_letters,
            most_bytes=most_bytes,
            archive=archive,
            dry_run=not yes,
            queue=options.queue_option(queue),
            # Where there is no store, its payloads are not known to be unused either.
            bodies=place.bodies if place.exists else None,
            payload_queues=payload_queues and [options.queue_option(one) for one in payload_queues],
        )
    moving.say_swept(swept, as_json=json)


# --- what they have in common --------------------------------------------------------------------


def _among(where: Filter, ids: tuple[str, ...] | None) -> Filter:
    from dataclasses import replace

    return where if ids is None else replace(where, ids=ids)


def _say_how_many(
    number: int, what: str, missing: int, *, as_json: bool, dry_run: bool | None = None
) -> None:
    """Say how many letters were changed; ends with 1 if some that were named were not."""
    if as_json:
        more = {} if dry_run is None else {"dry_run": dry_run}
        write_json({what: number, "not_found": missing, **more})
    else:
        letters = "1 letter" if number == 1 else f"{number} letters"
        typer.echo(f"{letters} would be {what}; add --yes" if dry_run else f"{letters} {what}")
    if missing:
        raise typer.Exit(NOT_DONE)


def _print(lines: Iterable[Text]) -> None:
    """Print lines as they are: nothing in them is markup, and no terminal width breaks an id."""
    console = _console()
    for one in lines:
        console.print(one, soft_wrap=True)


def _width() -> int:
    return view.width_of(_console(), os.environ.get("COLUMNS"))


def _console() -> Any:
    from rich.console import Console

    return Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
