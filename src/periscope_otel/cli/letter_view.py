"""What people and programs get to see of dead letters: lists, single ones, and figures."""

from __future__ import annotations

import json
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from rich.pretty import pretty_repr
from rich.text import Text

from periscope_otel.cli import plain
from periscope_otel.dead_letter.codecs import ARGUMENTS, TEXT, decode_plain
from periscope_otel.dead_letter.draft import host_name
from periscope_otel.dead_letter.errors import CannotReplayError
from periscope_otel.dead_letter.interchange import file_of
from periscope_otel.dead_letter.values import Stored
from periscope_otel.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console

    from periscope_otel.dead_letter.bodies import BodyFiles
    from periscope_otel.dead_letter.letter import Letter
    from periscope_otel.dead_letter.store import Stats

DECODED: Final = 256 * 1024
"""Bytes of a payload up to which it is decoded for a preview; of a larger one the beginning is
shown as it is."""

_SHOWN_RAW: Final = 1024
_DEEPEST: Final = 6
_MOST_LINES: Final = 60
_LONGEST_LINE: Final = 400
_MOST_STACK_LINES: Final = 60
_WIDE: Final = 120
"""Columns from which a letter of a list is one line."""
_NO_TERMINAL: Final = 200
"""Columns where nobody has said how many there are."""
_MOST_FACETS: Final = 10
_WRITTEN_AS_IN_PYTHON: Final = (str, bytes, bytearray, int, float, set, frozenset, type(None))
_COLORS: Final = {"dead": "red", "queued": "cyan", "claimed": "blue", "parked": "yellow"}


# --- lists ---------------------------------------------------------------------------------------


def width_of(console: Console, columns: str | None) -> int:
    """Return how wide a line may be."""
    known = console.is_terminal or (columns or "").isdigit()
    return max(40, console.width) if known else _NO_TERMINAL


def list_lines(
    letters: list[Letter], width: int, *, defang: bool, clock: Callable[[], float]
) -> Iterator[Text]:
    """Give the lines of a list: ids are never cut, so that they can be copied."""
    wide = width >= _WIDE
    head = f"{'id':<36}  {'state':<7}  {'age':>5}  {'tries':>6}  {'size':>6}"
    about = "operation · feed · error"
    yield Text(f"{head}  {about}" if wide else head, "bold")
    if not wide:
        yield Text(f"  {about}", "bold")
    for letter in letters:
        first = Text()
        first.append(f"{plain.line(letter.id):<36}")
        first.append(f"  {letter.state:<7}", _COLORS.get(letter.state, ""))
        tries = f"{letter.attempts}/{letter.replays}"
        age = plain.age(letter.last_failed_at, clock)
        first.append(f"  {age:>5}  {tries:>6}  {plain.size(letter.size):>6}")
        rest = Text(_about(letter, defang=defang))
        if wide:
            rest.truncate(max(20, width - first.cell_len - 2), overflow="ellipsis")
            yield first.append("  ").append(rest)
        else:
            rest.truncate(width - 2, overflow="ellipsis")
            yield first
            yield Text("  ").append(rest)


def _about(letter: Letter, *, defang: bool) -> str:
    error = plain.line(letter.error_type or "-", 60)
    message = plain.line(letter.error_message, 300)
    if message:
        error += f": {plain.defanged(message) if defang else message}"
    return " · ".join((plain.line(letter.operation, 60), plain.line(letter.feed or "-", 60), error))


def summary_of(letter: Letter) -> dict[str, Any]:
    """Return what a list tells programs about a letter."""
    return {
        "id": letter.id,
        "queue": letter.queue,
        "state": letter.state,
        "operation": letter.operation,
        "feed": letter.feed,
        "error_type": letter.error_type,
        "error_message": redact(letter.error_message, 1024),
        "fingerprint": letter.fingerprint,
        "attempts": letter.attempts,
        "replays": letter.replays,
        "replayable": letter.replayable,
        "size": letter.size,
        "first_failed_at": plain.moment(letter.first_failed_at) or None,
        "last_failed_at": plain.moment(letter.last_failed_at) or None,
        "not_before": _moment_or_none(letter.not_before),
    }


def _moment_or_none(when: float) -> str | None:
    return (plain.moment(when) or None) if when > 0 else None


# --- one letter ----------------------------------------------------------------------------------


class Preview(NamedTuple):
    """The beginning of a payload, for reading."""

    text: str
    note: str
    """What is not shown, and why; empty if all of it is."""


def details_of(letter: Letter, preview: Preview, jaeger: str | None) -> dict[str, Any]:
    """Return what `show` tells programs about a letter."""
    trace_id, span_id = _trace_of(letter)
    return summary_of(letter) | {
        "error_stack": redact(letter.error_stack, 16_000),
        "idempotency_key": letter.key,
        "batch_id": letter.batch_id,
        "item_index": letter.item_index,
        "trace_id": trace_id,
        "span_id": span_id,
        "trace_url": _trace_url(trace_id, jaeger),
        "host": letter.host,
        "pid": letter.pid,
        "versions": letter.versions,
        "tlp": letter.tlp,
        "headers": {name: redact(value, 1024) for name, value in letter.headers.items()},
        "not_replayable_because": letter.not_replayable_because,
        "revision": letter.revision,
        "schema": letter.schema,
        "newer_fields": sorted(map(str, letter.unknown)),
        "codec": letter.codec,
        "content_type": letter.content_type,
        "sha256": letter.sha256.hex(),
        "payload_file": letter.body_file,
        "payload": preview.text,
        "payload_note": preview.note or None,
    }


def detail_lines(
    letter: Letter,
    preview: Preview,
    jaeger: str | None,
    *,
    defang: bool,
    clock: Callable[[], float],
) -> Iterator[Text]:
    """Give the lines of `show`."""
    yield Text(plain.line(letter.id), "bold")
    for label, value in _facts(letter, jaeger, clock, defang=defang):
        if value:
            yield Text(f"  {label:<15}", "dim").append(value, "default not dim")
    if letter.error_stack:
        yield Text("stack", "bold")
        stack = plain.lines(letter.error_stack)
        shown = plain.defanged(stack, code=True) if defang else stack
        yield from _indented(shown, _MOST_STACK_LINES)
    what = "arguments" if letter.codec == ARGUMENTS else plain.line(letter.codec, 40)
    yield Text(f"payload ({what}, {plain.size(letter.size)})", "bold")
    yield from _indented(plain.defanged(preview.text) if defang else preview.text, _MOST_LINES + 5)
    if preview.note:
        yield Text(f"  {plain.line(preview.note)}", "italic")


def _facts(
    letter: Letter, jaeger: str | None, clock: Callable[[], float], *, defang: bool
) -> Iterator[tuple[str, str]]:
    message = plain.line(letter.error_message, 2000)
    yield "state", f"{letter.state}, revision {letter.revision}"
    yield "queue", plain.line(letter.queue)
    yield "operation", plain.line(letter.operation)
    yield "feed", plain.line(letter.feed or "")
    yield "error", plain.line(letter.error_type or "")
    yield "message", plain.defanged(message) if defang else message
    yield "fingerprint", plain.line(letter.fingerprint)
    yield "attempts", f"{letter.attempts}, and {letter.replays} failed replays"
    for label, when in (
        ("first failed", letter.first_failed_at),
        ("last failed", letter.last_failed_at),
    ):
        yield label, f"{plain.moment(when)} ({plain.age(when, clock)} ago)"
    if letter.not_before > 0:
        yield "not before", plain.moment(letter.not_before)
    if not letter.replayable:
        because = plain.line(letter.not_replayable_because or "")
        yield "not replayable", because or "it was not said why"
    trace_id, _ = _trace_of(letter)
    yield "trace", trace_id or ""
    yield "jaeger", _trace_url(trace_id, jaeger) or ""
    yield "key", plain.line(letter.key)
    if letter.batch_id is not None or letter.item_index is not None:
        yield "batch", f"{plain.line(letter.batch_id or '-')}, item {letter.item_index}"
    yield "tlp", plain.line(letter.tlp or "")
    yield "host", f"{plain.line(letter.host)}, process {letter.pid}"
    yield "versions", plain.line(letter.versions)
    for name, value in list(letter.headers.items())[:20]:
        yield "header", plain.line(f"{name}={value}")
    if letter.unknown:
        yield "newer fields", plain.line(", ".join(map(str, letter.unknown)))


def _indented(text: str, most: int) -> Iterator[Text]:
    lines = text.splitlines()
    for one in lines[:most]:
        shown = one if len(one) <= _LONGEST_LINE else f"{one[:_LONGEST_LINE]}…"
        yield Text(f"  {shown}")
    if len(lines) > most:
        yield Text(f"  … {len(lines) - most} more lines", "italic")


def _trace_of(letter: Letter) -> tuple[str | None, str | None]:
    """Return trace id and span id of a `traceparent` (W3C Trace Context, section 3.2)."""
    parts = (letter.traceparent or "").split("-")
    fits = [len(part) for part in parts] == [2, 32, 16, 2]
    if not fits or not all(one in "0123456789abcdef" for part in parts for one in part):
        return None, None
    return parts[1], parts[2]


def _trace_url(trace_id: str | None, jaeger: str | None) -> str | None:
    if trace_id is None or jaeger is None:
        return None
    return redact(f"{jaeger.rstrip('/')}/trace/{trace_id}")


# --- payloads ------------------------------------------------------------------------------------


def preview_of(letter: Letter, bodies: BodyFiles) -> Preview:
    """Return the beginning of a letter's payload; never more of it is unpacked than is shown."""
    path = file_of(letter, bodies)
    if letter.body_file is not None and path is None:
        return Preview("", _where_it_is(letter, bodies))
    try:
        beginning = _unpacked(letter, path)
        return _beginning_of(letter, beginning)
    except OSError as error:
        return Preview("", f"the payload's file cannot be read: {error.strerror}")
    except zlib.error as error:
        return Preview("", f"the payload is damaged: {error}")
    except CannotReplayError as error:
        return Preview("", f"it cannot be read: {error}")


def _beginning_of(letter: Letter, beginning: bytes) -> Preview:
    if letter.codec == TEXT:
        return _cut(beginning.decode(errors="replace"), letter.size)
    if max(len(beginning), letter.size) > DECODED:
        return _as_it_is(letter, beginning)
    return _cut(_pretty(letter, decode_plain(beginning)), None)


def _where_it_is(letter: Letter, bodies: BodyFiles) -> str:
    here = letter.host == host_name()
    where = f"is no longer in {bodies.folder}" if here else "is on that host"
    name = plain.line(letter.body_file or "", 80)
    return f"the payload is the file {name} of {letter.host}, and {where}"


def _as_it_is(letter: Letter, beginning: bytes) -> Preview:
    shown = plain.visible(beginning[:_SHOWN_RAW].decode(errors="replace"), keep="\n")
    left = max(letter.size, len(beginning)) - _SHOWN_RAW
    return Preview(
        redact(shown, 4 * _SHOWN_RAW),
        f"the beginning, as it is stored; {plain.size(left)} more (`export` gives all of it)",
    )


def _unpacked(letter: Letter, path: Path | None) -> bytes:
    """Return the payload, or its beginning if it is a large one."""
    most = DECODED + 1
    body = letter.body
    if path is not None:
        with path.open("rb") as file:
            body = file.read(most)
    return zlib.decompressobj().decompress(body, most) if letter.compression else body[:most]


def _pretty(letter: Letter, value: Any) -> str:
    value = _readable(value)
    if letter.codec == ARGUMENTS and isinstance(value, dict):
        return "\n".join(
            f"{plain.visible(str(name))} = {_written(one)}" for name, one in value.items()
        )
    return _written(value)


def _written(value: Any) -> str:
    return pretty_repr(value, max_width=76, max_length=12, max_string=300, max_depth=_DEEPEST)


class _Word:
    """A value that is written as it is for people: a time, an id, an address."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _readable(value: Any, depth: int = 0) -> Any:
    """Return a decoded value with objects of libraries and classes as what they are made of."""
    if depth > _DEEPEST:
        return value
    if isinstance(value, Stored):
        content = value.content
        if isinstance(content, str) and value.kind not in ("object", "enum"):
            with suppress(ValueError, RecursionError):
                content = json.loads(content)
        return {f"<{value.name}>": _readable(content, depth + 1)}
    if isinstance(value, dict):
        return {key: _readable(one, depth + 1) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_readable(one, depth + 1) for one in value)
    return value if isinstance(value, _WRITTEN_AS_IN_PYTHON) else _Word(str(value))


def _cut(text: str, size: int | None) -> Preview:
    """Return the first lines of a payload's text, and how much is left."""
    text = plain.visible(text, keep="\n")
    lines = text.split("\n")
    shown = "\n".join(one[:_LONGEST_LINE] for one in lines[:_MOST_LINES])
    left = len(text) - len(shown)
    redacted = redact(shown, max(1, len(shown)))
    if left <= 0 and (size is None or len(text.encode(errors="replace")) >= size):
        return Preview(redacted, "")
    return Preview(redacted, f"{max(left, 0)} more characters (`export` gives all of it)")


# --- figures -------------------------------------------------------------------------------------


def stats_json(
    stats: Stats, queue: str, examples: dict[str, Letter | None], url: str, waiting: int | None
) -> dict[str, Any]:
    """Return what `stats` tells programs."""
    return {
        "store": url,
        "queue": queue,
        "total": stats.total,
        "size": stats.size,
        "oldest": None if stats.oldest is None else plain.moment(stats.oldest) or None,
        "by_state": dict(stats.by_state),
        "by_feed": dict(stats.by_feed),
        "by_fingerprint": [
            {"fingerprint": one, "letters": number}
            | {
                name: None if letter is None else summary_of(letter)[name]
                for letter in (examples.get(one),)
                for name in ("operation", "error_type", "error_message")
            }
            for one, number in stats.by_fingerprint.items()
        ],
        "waiting_in_outbox": waiting,
    }


def stats_lines(
    stats: Stats,
    queue: str,
    examples: dict[str, Letter | None],
    width: int,
    *,
    defang: bool,
    clock: Callable[[], float],
) -> Iterator[Text]:
    """Give the lines of `stats`."""
    head = f"queue {queue}: {stats.total} letters, {plain.size(stats.size)}"
    if stats.oldest is not None:
        head += f", the oldest dead one failed {plain.age(stats.oldest, clock)} ago"
    yield Text(head, "bold")
    for title, counts in (("state", stats.by_state), ("feed", stats.by_feed)):
        yield from _count_lines(title, counts)
    for number, (one, count) in enumerate(stats.by_fingerprint.items()):
        if number == 0:
            yield Text("by fingerprint", "bold")
        if number == _MOST_FACETS:
            yield _more(len(stats.by_fingerprint))
            return
        letter = examples.get(one)
        about = Text(f"{count:>8}  {plain.line(one)}")
        if letter is not None:
            about.append(f"  {_about(letter, defang=defang)}")
        about.truncate(max(width, len(one) + 12), overflow="ellipsis")
        yield about


def _count_lines(title: str, counts: dict[Any, int]) -> Iterator[Text]:
    if counts:
        yield Text(f"by {title}", "bold")
    for name, count in list(counts.items())[:_MOST_FACETS]:
        yield Text(f"{count:>8}  {plain.line(name)}")
    if len(counts) > _MOST_FACETS:
        yield _more(len(counts))


def _more(number: int) -> Text:
    return Text(f"          … and {number - _MOST_FACETS} more; --json has them", "italic")
