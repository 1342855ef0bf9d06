"""How a run's summary looks: tables that fit 80 columns, and plain text where no terminal is.

Names come from feeds and files, so all of them are `Text` objects: nothing in them is read as
markup, and what a terminal would act on was removed where they were taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.cells import cell_len
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from periscope_otel.monitor.summary import ItemTotals, total_of
from periscope_otel.redaction import clean_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import ConsoleOptions, RenderableType

    from periscope_otel.monitor.summary import OperationTotals, RunSummary
    from periscope_otel.report import ExportReport

_ROWS = 50
"""Rows of one table; how many more there are is said, and totals are of all."""

_WIDE = 96
"""Columns from which there is room for two blanks between numbers."""

_STYLES = {
    "ok": "green",
    "partial": "yellow",
    "error": "red",
    "timeout": "red",
    "cancelled": "magenta",
    "rejected": "magenta",
}
"""Outcomes in the order in which they are told, each with its colour."""

_NOWHERE = "Telemetry went nowhere: no exporter is configured"


class _Signs(NamedTuple):
    """Characters that not every terminal has."""

    good: str
    bad: str
    dot: str
    micro: str
    none: str


_UNICODE = _Signs("✓", "✗", "·", "µs", "–")  # noqa: RUF001  (an en dash is meant)
_ASCII = _Signs("OK", "!!", "-", "us", "-")


def render(summary: RunSummary, options: ConsoleOptions) -> Iterator[RenderableType]:
    """Return the summary's parts from top to bottom."""
    return _View(summary, options).parts()


class _View:
    def __init__(self, summary: RunSummary, options: ConsoleOptions) -> None:
        self._summary = summary
        self._ascii = options.ascii_only
        self._signs = _ASCII if self._ascii else _UNICODE
        self._gap = 2 if options.max_width >= _WIDE else 1
        self._first_widths = (0, 0)

    def parts(self) -> Iterator[RenderableType]:
        operations, items = self._summary.operations(), self._summary.items()
        self._align((*operations, *items))
        yield self._headline(operations)
        if operations:
            yield from self._operations(operations)
        if items:
            yield from self._items(items)
            yield from self._equation(total_of(items))
            skipped = [(row, row.reasons) for row in items if row.reasons]
            yield from self._why("Skipped", skipped, "yellow")
        failures = [(row, row.errors) for row in operations if row.errors]
        yield from self._why("Failures", failures, "red")
        yield from self._telemetry(*self._summary.where())

    def _align(self, rows: Sequence[OperationTotals | ItemTotals]) -> None:
        """Let the columns of names be as wide in every table, where the widest has room."""
        names = max((cell_len(row.operation) for row in rows), default=0)
        feeds = max((cell_len(row.feed or "") for row in rows), default=0)
        widths = (max(names, len("Operations")), max(feeds, len("feed")))
        if sum(widths) <= 20 + 10 * self._gap:
            self._first_widths = widths

    def _headline(self, operations: Sequence[OperationTotals]) -> Text:
        calls = sum(row.calls for row in operations)
        dot = f" {self._signs.dot} "
        line = Text("Run summary", style="bold")
        line.append(dot + _counted(calls, "operation"), style="not bold")
        line.append(f" in {self._duration(self._summary.seconds)}", style="not bold")
        if self._summary.running:
            running = f"{dot}{self._summary.running:,} not settled"
            line.append(running, style="not bold yellow")
        return line

    def _operations(self, rows: Sequence[OperationTotals]) -> Iterator[RenderableType]:
        table = self._table("Operations", "feed", "*calls", "outcomes", "*p50", "*p95", "*max")
        for row in rows[:_ROWS]:
            table.add_row(
                self._name(row.operation, "bold"),
                self._name(row.feed),
                f"{row.calls:,}",
                self._outcomes(row.outcomes),
                self._duration(row.latency.quantile(0.5)),
                self._duration(row.latency.quantile(0.95)),
                self._duration(row.latency.longest),
            )
        yield from _block(table)
        yield from self._more(rows)

    def _outcomes(self, outcomes: Mapping[str, int]) -> Text:
        told = [
            (f"{outcomes[one]:,} {one}", style) for one, style in _STYLES.items() if outcomes[one]
        ]
        return Text("\n").join(Text(words, style=style) for words, style in told)

    def _items(self, rows: Sequence[ItemTotals]) -> Iterator[RenderableType]:
        table = self._table(
            "Items", "feed", "*received", "*converted", "*ingested", "*skipped", "*failed",
            "*unaccounted",
        )  # fmt: skip
        for row in rows[:_ROWS]:
            name, feed = self._name(row.operation, "bold"), self._name(row.feed)
            table.add_row(name, feed, *_item_cells(row))
        if len(rows) > 1:
            table.show_footer = True
            total = (Text("total"), Text(""), *_item_cells(total_of(rows)))
            for column, cell in zip(table.columns, total, strict=True):
                column.footer = cell
        yield from _block(table)
        yield from self._more(rows)

    def _equation(self, total: ItemTotals) -> Iterator[RenderableType]:
        right = total.difference == 0
        sign, style = (self._signs.good, "bold green") if right else (self._signs.bad, "bold red")
        line = Text.assemble(
            (f"{sign} ", style),
            f"{total.received:,} received = {total.ingested:,} ingested + {total.skipped:,} skipped"
            f" + {total.failed:,} failed + {total.unaccounted:,} unaccounted",
        )
        if total.difference > 0:
            line.append(f", and {total.difference:,} not settled yet", style)
        elif total.difference < 0:
            line.append(f": {-total.difference:,} more settled than received", style)
        yield from _lines(line)

    def _why(
        self,
        what: str,
        rows: Sequence[tuple[ItemTotals | OperationTotals, Mapping[str, int]]],
        style: str,
    ) -> Iterator[RenderableType]:
        if not rows:
            return
        table = self._table(what, "feed", "why")
        for row, causes in rows[:_ROWS]:
            often_first = sorted(causes.items(), key=lambda cause: (-cause[1], cause[0]))
            told = [
                Text.assemble((f"{count:,} ", style), self._name(cause))
                for cause, count in often_first
            ]
            table.add_row(
                self._name(row.operation, "bold"), self._name(row.feed), Text(", ").join(told)
            )
        yield from _block(table)
        yield from self._more(rows)

    def _more(self, rows: Sequence[object]) -> Iterator[RenderableType]:
        if len(rows) > _ROWS:
            yield Text(f"  and {len(rows) - _ROWS:,} more", style="dim")

    def _telemetry(
        self, report: ExportReport, elsewhere: Sequence[str]
    ) -> Iterator[RenderableType]:
        if report.signals:
            table = self._table(
                "Telemetry", "destination", "*exported", "*failed", "*dropped", "*waiting"
            )
            for one in report.signals:
                lost = (one.failed, one.dropped, one.waiting)
                table.add_row(
                    self._name(one.signal, "bold"),
                    self._name(one.destination),
                    f"{one.exported:,}",
                    *(Text(f"{count:,}", style="bold red" if count else "dim") for count in lost),
                )
            yield from _block(table)
        lines = list(elsewhere) or ([] if report.signals else [_NOWHERE])
        if lines:
            yield from _lines(*(self._name(line) for line in lines))

    def _table(self, *headers: str) -> Table:
        """Return an empty table; a header with a star is that of a column of numbers."""
        columns = [
            Column(header.lstrip("*"), justify="right", no_wrap=True)
            if header.startswith("*")
            else Column(header, overflow="fold")
            for header in headers
        ]
        columns[0].header_style = "bold"
        for column, width in zip(columns[:2], self._first_widths, strict=True):
            column.min_width = width
        return Table(
            *columns,
            box=box.SIMPLE,
            show_edge=False,
            pad_edge=False,
            padding=(0, self._gap - 1, 0, 0),
            header_style="dim",
        )

    def _name(self, name: str | None, style: str = "", *, limit: int = 200) -> Text:
        """Return a name that came from outside, harmless and printable here."""
        if name is None:
            return Text(self._signs.none, style="dim")
        shown = clean_name(name, limit)
        if self._ascii:
            shown = shown.encode("ascii", "backslashreplace").decode()
        return Text(shown, style=style)

    def _duration(self, seconds: float) -> str:
        if seconds < 0.9995e-3:
            return f"{seconds * 1e6:.0f} {self._signs.micro}"
        if seconds < 0.9995:
            return f"{seconds * 1e3:.3g} ms" if seconds < 0.09995 else f"{seconds * 1e3:.0f} ms"
        if seconds < 99.95:
            return f"{seconds:.3g} s"
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _item_cells(row: ItemTotals) -> Iterator[Text]:
    styles: dict[str, Any] = {"skipped": "yellow", "failed": "bold red", "unaccounted": "bold red"}
    for field in ("received", "converted", "ingested", "skipped", "failed", "unaccounted"):
        count = getattr(row, field)
        yield Text(f"{count:,}", style=styles.get(field, "") if count else "dim")


def _block(table: Table) -> Iterator[RenderableType]:
    yield Text()
    yield Padding(table, (0, 0, 0, 2), expand=False)


def _lines(*lines: Text) -> Iterator[RenderableType]:
    """Return lines below an empty one; they wrap by themselves, without blanks at the end."""
    yield Text()
    for line in lines:
        yield Text("  ") + line


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
