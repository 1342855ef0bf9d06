"""`op.track(items)`: counting what comes in, with a progress bar where somebody is looking.

The bar is drawn on standard error if that is a terminal, from the loop that consumes the items
(there is no thread), at most ten times a second.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from periscope_otel import guard

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator

    from rich.progress import Progress, TaskID

_Item = TypeVar("_Item")

_REDRAW_INTERVAL = 0.1
_LONGEST_NAME = 26
_MOST_ENDED = 5
"""Tracks that have ended and stay on the screen while others go on."""

_WIDTH_FOR_A_BAR = 80


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
    """One line of the process's display: count, rate, time elapsed, and time spent loading."""

    def __init__(self, name: str, total: int | None) -> None:
        self._display = _join_display()
        self._task: TaskID = self._display.add_task(name, total=total, loading=0.0)
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
            _leave_display()

    def _draw(self) -> None:
        with guard.contained("progress"):
            self._display.update(
                self._task, completed=self._count, loading=self._loading, refresh=True
            )


def _bar_for(operation: _Receiver, items: Any, total: int | None) -> _NoBar:
    with guard.contained("progress"):
        if total is None and hasattr(items, "__len__"):
            total = len(items)
    name = operation.name if operation.feed is None else f"{operation.name} ({operation.feed})"
    return open_bar(name, total)


def open_bar(name: str, total: int | None) -> _NoBar:
    """Return a bar on standard error; one that shows nothing where that is no terminal.

    Args:
        name: What it says before the figures.
        total: How many there will be, if that is known.
    """
    if not _somebody_looks():
        return _NoBar()
    try:
        return _Bar(name, total)
    except Exception as error:  # noqa: BLE001  (a strange terminal)
        guard.report("progress", error)
        return _NoBar()


def _somebody_looks() -> bool:
    """Whether standard error is a terminal; it may also be closed or missing."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:
        return False


# A terminal has room for one display, which has a line for each track that goes on.
_lock = threading.Lock()
_shared: Progress | None = None
_users = 0


def _join_display() -> Progress:
    global _shared, _users
    with _lock:
        if _shared is None:
            _shared = _new_display()
            _shared.start()
        _users += 1
        return _shared


def _leave_display() -> None:
    global _shared, _users
    with _lock:
        _users -= 1
        if _users == 0 and _shared is not None:
            _shared.stop()
            _shared = None
        elif _shared is not None:
            ended = [task.id for task in _shared.tasks if task.stop_time is not None]
            for task_id in ended[:-_MOST_ENDED]:
                _shared.remove_task(task_id)


def _new_display() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn
    from rich.text import Text

    class Figures(ProgressColumn):
        """Everything in one text, so that a narrow terminal cuts the end and not each part."""

        def render(self, task: Any) -> Text:
            total = "?" if task.total is None else f"{task.total:.0f}"
            elapsed = task.finished_time or task.elapsed or 0.0
            rate = task.completed / elapsed if elapsed else 0.0
            name = task.description
            if len(name) > _LONGEST_NAME:
                name = f"{name[: _LONGEST_NAME - 1]}…"
            return Text(
                f"{name} {task.completed:.0f}/{total} {rate:,.0f}/s "
                f"{_clock(elapsed)} load {task.fields['loading']:.1f} s",
                no_wrap=True,
                overflow="ellipsis",
            )

    console = Console(stderr=True)
    columns: list[ProgressColumn] = [Figures()]
    if console.width >= _WIDTH_FOR_A_BAR:
        columns.append(BarColumn(bar_width=16))
    return Progress(
        *columns,
        console=console,
        auto_refresh=False,
        # What the program prints goes above the bar, but only if it goes to the same terminal.
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
