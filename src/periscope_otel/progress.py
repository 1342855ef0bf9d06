"""`op.track(items)`: counting what comes in, with a progress bar where somebody is looking.

The bar is drawn on standard error if that is a terminal, from the loop that consumes the items
(there is no thread), at most ten times a second.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from periscope_otel import guard

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator

    from rich.progress import Progress, TaskID

_Item = TypeVar("_Item")

_REDRAW_INTERVAL = 0.1


class _Receiver(Protocol):
    """What counts the items: an operation."""

    name: str
    feed: str | None

    def received(self, count: int = 1) -> None: ...


def track(
    operation: _Receiver, items: Iterable[_Item], total: int | None = None
) -> Iterator[_Item]:
    """Iterate over `items`, counting each as received when it is handed out."""
    bar = _bar_for(operation, items, total)
    source = iter(items)
    try:
        while True:
            started = time.perf_counter()
            try:
                item = next(source)
            except StopIteration:
                return
            bar.loaded(time.perf_counter() - started)
            operation.received()
            yield item
    finally:
        bar.close()


async def track_async(
    operation: _Receiver, items: AsyncIterable[_Item], total: int | None = None
) -> AsyncIterator[_Item]:
    """Iterate over `items` like `track`, asynchronously."""
    bar = _bar_for(operation, items, total)
    source = aiter(items)
    try:
        while True:
            started = time.perf_counter()
            try:
                item = await anext(source)
            except StopAsyncIteration:
                return
            bar.loaded(time.perf_counter() - started)
            operation.received()
            yield item
    finally:
        bar.close()


class _NoBar:
    """Shows nothing: standard error is not a terminal."""

    def loaded(self, seconds: float) -> None:
        """Take note of one more item and of how long it took to arrive."""

    def close(self) -> None:
        """Leave the last state on the screen."""


class _Bar(_NoBar):
    """One line of the shared progress display: count, rate, time, and time spent loading."""

    def __init__(self, description: str, total: int | None) -> None:
        self._display = _display()
        self._task: TaskID = self._display.add_task(description, total=total, load="0.0 s")
        self._count = 0
        self._loading = 0.0
        self._drawn_at = 0.0

    def loaded(self, seconds: float) -> None:
        self._count += 1
        self._loading += seconds
        now = time.perf_counter()
        if now - self._drawn_at >= _REDRAW_INTERVAL:
            self._drawn_at = now
            self._draw()

    def close(self) -> None:
        self._draw()
        with guard.contained("progress"):
            self._display.stop_task(self._task)
            if all(task.finished or task.stop_time is not None for task in self._display.tasks):
                _forget_display()

    def _draw(self) -> None:
        with guard.contained("progress"):
            self._display.update(
                self._task, completed=self._count, load=f"{self._loading:.1f} s", refresh=True
            )


def _bar_for(operation: _Receiver, items: Any, total: int | None) -> _NoBar:
    try:
        if not sys.stderr.isatty():
            return _NoBar()
        if total is None and hasattr(items, "__len__"):
            total = len(items)
        name = operation.name if operation.feed is None else f"{operation.name} ({operation.feed})"
        return _Bar(name, total)
    except Exception as error:  # noqa: BLE001  (no standard error, a strange terminal)
        guard.report("progress", error)
        return _NoBar()


_shared: Progress | None = None
"""The display of this process: a terminal has room for one, with a line for each task."""


def _display() -> Progress:
    global _shared
    if _shared is None:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.text import Text

        class RateColumn(TextColumn):
            """Items a second."""

            def render(self, task: Any) -> Text:
                elapsed = task.elapsed or 0.0
                rate = task.completed / elapsed if elapsed else 0.0
                return Text(f"{rate:,.0f}/s", style="progress.data.speed")

        _ = escape
        _shared = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            RateColumn(""),
            TimeElapsedColumn(),
            TextColumn("load {task.fields[load]}", markup=False),
            console=Console(stderr=True),
            auto_refresh=False,
        )
        _shared.start()
    return _shared


def _forget_display() -> None:
    global _shared
    display, _shared = _shared, None
    if display is not None:
        display.stop()
