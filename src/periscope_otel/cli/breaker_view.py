"""How breakers look in a terminal and in JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from rich.text import Text

from periscope_otel.cli import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from periscope_otel.resilience.policy import State
    from periscope_otel.resilience.sharing.records import Event, Record

WORST_FIRST: Final[tuple[State, ...]] = (
    "forced_open", "open", "half_open", "observe", "disabled", "closed",
)  # fmt: skip
_COLORS: Final = {"forced_open": "red", "open": "red", "half_open": "yellow"}
_HEAD: Final = ("state", "left", "times", "out", "ago", "reason")
_WIDTHS: Final = (11, 4, 5, 3, 4, 20)
_FIGURES: Final = sum(_WIDTHS) + 2 * (len(_WIDTHS) - 1)


class Row(NamedTuple):
    """A breaker, as all processes have found it."""

    name: str
    record: Record
    probes: int
    """Probes that are out."""


def by_badness(row: Row) -> tuple[int, str]:
    """Return what rows are sorted by: the worst state first, and then by name."""
    return WORST_FIRST.index(row.record.state), row.name


def list_lines(rows: list[Row], width: int, clock: Callable[[], float]) -> Iterator[Text]:
    """Give the lines of a list; names are never cut, so that they can be copied.

    Args:
        rows: The breakers.
        width: Columns; where a name and its figures do not fit into one line, they stand in two.
        clock: Unix time.
    """
    names = [plain.line(row.name) for row in rows]
    longest = max([len("name"), *(Text(name).cell_len for name in names)])
    one_line = longest + 2 + _FIGURES <= width
    head = "  ".join(f"{text:<{size}}" for text, size in zip(_HEAD, _WIDTHS, strict=True)).rstrip()
    if one_line:
        yield Text(f"{'name':<{longest}}  {head}", "bold")
    else:
        yield Text("name", "bold")
        yield Text(f"  {head}", "bold")
    for name, row in zip(names, rows, strict=True):
        figures = _figures(row, clock)
        if one_line:
            padded = Text(name + " " * (longest - Text(name).cell_len + 2))
            yield padded.append(figures)
        else:
            yield Text(name)
            yield Text("  ").append(figures)


def _figures(row: Row, clock: Callable[[], float]) -> Text:
    record = row.record
    left = _left(record) or "-"
    out = str(row.probes) if record.state == "half_open" else "-"
    ago = plain.age(record.changed, clock)
    reason = plain.line(record.reason, 40) or "-"
    found = Text()
    found.append(f"{record.state:<11}", _COLORS.get(record.state, ""))
    return found.append(f"  {left:<4}  {record.openings:<5}  {out:<3}  {ago:<4}  {reason}")


def detail_lines(row: Row, clock: Callable[[], float]) -> Iterator[Text]:
    """Give the lines that tell all about one breaker."""
    record = row.record
    told = {
        "name": plain.line(row.name),
        "state": record.state,
        "reason": plain.line(record.reason, 40),
        "left": _left(record),
        "opened": f"{record.openings} times in a row" if record.openings else "",
        "probes": f"{row.probes} out, {record.successes} succeeded"
        if record.state == "half_open"
        else "",
        "changed": f"{plain.moment(record.changed)} ({plain.age(record.changed, clock)} ago)",
        "record": f"generation {record.generation} of {plain.line(record.epoch, 16)}",
    }
    for name, value in told.items():
        if value:
            yield Text(f"{name:<9}{value}")


def set_lines(name: str, state: State, before: State | None) -> Iterator[Text]:
    """Give the line that tells what a breaker was set to."""
    was = f" (was {before})" if before is not None else ""
    yield Text(f"{plain.line(name)}: {state}{was}")


def as_json(row: Row) -> dict[str, Any]:
    """Return what is told to programs about a breaker."""
    record = row.record
    return {
        "name": row.name,
        "state": record.state,
        "reason": record.reason or None,
        "open_for": round(record.open_for, 3) if record.state == "open" else None,
        "openings": record.openings,
        "probes": row.probes,
        "successes": record.successes,
        "changed": plain.moment(record.changed) or None,
        "generation": record.generation,
        "epoch": record.epoch,
    }


def event_line(event: Event) -> str:
    """Return the line that tells of a change."""
    why = [plain.line(event.reason, 40)] if event.reason else []
    if event.open_for is not None:
        why.append(f"for {_span(event.open_for)}")
    change = f"{event.from_state or 'new'} -> {event.to_state}"
    because = f" ({', '.join(why)})" if why else ""
    return f"{plain.moment(event.at)}  {plain.line(event.name)}  {change}{because}"


def event_json(event: Event) -> dict[str, Any]:
    """Return what is told to programs about a change."""
    return {
        "at": plain.moment(event.at) or None,
        "name": event.name,
        "from": event.from_state,
        "to": event.to_state,
        "reason": event.reason or None,
        "open_for": None if event.open_for is None else round(event.open_for, 3),
    }


def _left(record: Record) -> str:
    return _span(record.open_for) if record.state == "open" else ""


def _span(seconds: float) -> str:
    return plain.age(-seconds, lambda: 0.0)
