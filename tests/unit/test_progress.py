"""The contracts of the progress bar of `op.track`, on real pseudo-terminals."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
import textwrap
import threading
from typing import NamedTuple

import pytest

from periscope_otel import operation

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Screen(NamedTuple):
    """What a program did on a terminal."""

    status: int
    stdout: str
    raw: str

    @property
    def lines(self) -> list[str]:
        """Every line that was ever drawn, without escape sequences."""
        return [line for line in re.split(r"[\r\n]+", ESCAPE.sub("", self.raw)) if line.strip()]

    def last(self, start: str) -> str:
        """The last line drawn that starts like this."""
        return [line for line in self.lines if line.startswith(start)][-1]


def on_terminal(code: str, columns: int = 80) -> Screen:
    """Run a program whose standard error is a terminal of 24 rows, and read all that it draws."""
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={"TERM": "xterm-256color", "LANG": "C.UTF-8"},
    )
    os.close(terminal)
    drawn: list[bytes] = []

    def read() -> None:
        while True:
            try:
                part = os.read(reader, 65536)
            except OSError:  # Linux: the other end is closed
                return
            if not part:
                return
            drawn.append(part)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        stdout, _ = process.communicate(timeout=60)
    finally:
        process.kill()  # does nothing to one that has ended
        process.communicate()
        thread.join()
        os.close(reader)
    return Screen(process.returncode, stdout.decode(), b"".join(drawn).decode())


def on_pipes(code: str, **streams: int) -> subprocess.CompletedProcess[bytes]:
    """Run a program without any terminal."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.DEVNULL,
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams),
        timeout=60,
        check=False,
        env={"TERM": "xterm-256color"},
    )


ONE_TRACK = """
    from periscope_otel import operation
    with operation("fetch", feed="urlhaus") as op:
        assert sum(op.track(range(1234))) == 1233 * 617
    assert op.items.received == 1234
"""


def test_bar_shows_name_count_rate_elapsed_and_load_time():
    """On a terminal of 80 columns one line shows name, feed, count, rate, elapsed and load time."""
    screen = on_terminal(ONE_TRACK)
    assert screen.status == 0
    line = screen.last("fetch")
    assert "urlhaus" in line
    assert "1234/1234" in line
    assert re.search(r"[\d,]+/s", line)
    assert re.search(r"\d+:\d\d:\d\d", line)
    assert re.search(r"load \d+\.\d s", line)


@pytest.mark.parametrize("columns", [80, 40])
def test_lines_fit_the_terminal(columns):
    """No line is wider than the terminal, so redrawing stays on its line."""
    screen = on_terminal(ONE_TRACK, columns)
    assert screen.status == 0
    assert max(len(line) for line in screen.lines) <= columns


def test_count_is_whole_on_a_narrow_terminal():
    """On 40 columns the name and the whole count are still to be seen."""
    screen = on_terminal(ONE_TRACK, 40)
    assert "1234/1234" in screen.last("fetch")


def test_unknown_total_shows_the_count():
    """Where the total is not known the count is shown all the same; `total=` makes it known."""
    screen = on_terminal(
        """
        from periscope_otel import operation
        with operation("fetch") as op:
            list(op.track(iter(range(77))))
        with operation("store") as op:
            list(op.track(iter(range(77)), total=99))
        """
    )
    assert "77/?" in screen.last("fetch")
    assert "77/99" in screen.last("store")


def test_nested_tracks_have_a_line_each():
    """Two tracks, one in the other, are shown at the same time, each with its own count."""
    screen = on_terminal(
        """
        from periscope_otel import operation
        with operation("fetch") as outer:
            for _ in outer.track([1, 2]):
                with operation("store") as inner:
                    list(inner.track(range(55)))
        assert outer.items.received == 2
        """
    )
    assert screen.status == 0
    assert "2/2" in screen.last("fetch")
    assert "55/55" in screen.last("store")


def test_async_track_shows_the_bar():
    """The bar is shown for async iterables too."""
    screen = on_terminal(
        """
        import asyncio
        from periscope_otel import operation
        async def rows():
            for number in range(31):
                yield number
        async def main():
            async with operation("fetch") as op:
                return [row async for row in op.track(rows(), total=31)]
        assert asyncio.run(main()) == list(range(31))
        """
    )
    assert screen.status == 0
    assert "31/31" in screen.last("fetch")


def test_terminal_is_left_as_it_was():
    """After the bar, also after an exception, the cursor is shown again and the line is ended."""
    screen = on_terminal(
        """
        from periscope_otel import operation
        try:
            with operation("fetch") as op:
                for item in op.track(range(10)):
                    if item == 5:
                        raise ValueError
        except ValueError:
            pass
        """
    )
    assert screen.status == 0
    assert "6/10" in screen.last("fetch")
    assert screen.raw.rfind("\x1b[?25h") > screen.raw.rfind("\x1b[?25l")
    assert ESCAPE.sub("", screen.raw).endswith("\n")


def test_standard_output_stays_the_programs_own():
    """While the bar is shown, what the program prints on standard output arrives unchanged."""
    screen = on_terminal(
        """
        from periscope_otel import operation
        with operation("fetch") as op:
            for item in op.track(range(5)):
                print("row [bold]", item)
        """
    )
    assert screen.status == 0, screen.raw[-500:]
    assert screen.stdout == "".join(f"row [bold] {number}\n" for number in range(5))


def test_without_a_terminal_nothing_is_written():
    """Without a terminal not a byte is written, and Rich is not even loaded."""
    done = on_pipes(ONE_TRACK + "    import sys; assert 'rich' not in sys.modules\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_terminal_on_standard_output_alone_shows_nothing():
    """The bar is for standard error: a terminal on standard output alone stays empty."""
    reader, terminal = pty.openpty()
    done = on_pipes(ONE_TRACK, stdout=terminal)
    os.set_blocking(reader, False)
    with pytest.raises(BlockingIOError):
        os.read(reader, 1)
    os.close(terminal)
    os.close(reader)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("stream", ["none", "closed"])
def test_without_standard_error_items_are_counted(
    monkeypatch, captured_telemetry, stream, tmp_path
):
    """Where standard error is missing or closed, tracking counts and is no error of ours."""
    missing = None
    if stream == "closed":
        missing = (tmp_path / "stderr").open("w")
        missing.close()
    monkeypatch.setattr(sys, "stderr", missing)
    with operation("fetch") as op:
        assert list(op.track([1, 2, 3])) == [1, 2, 3]
        op.ingested(3)
    monkeypatch.undo()
    assert captured_telemetry.operation("fetch").items.received == 3


@pytest.mark.parametrize(
    "name",
    [
        "[bold]fetch",
        "[/bold] [link=http://x]fetch[/link]",
        "\x1b[2J\x1b[31mfetch\x1b]0;title\x07",
        "fetch\r\n\x00line",
        "{task.fields} %s {0}",
        "\\[fetch\\",
        ":warning: fetch",
        "\u202efetch\ud800",
        "x" * 10_000,
    ],
    ids=[
        "markup",
        "unbalanced",
        "escapes",
        "lines",
        "formats",
        "backslash",
        "emoji",
        "bidi",
        "long",
    ],
)
def test_hostile_names_do_no_harm(name):
    """Markup, escapes and line ends in a name are shown as text or left out; the bar goes on."""
    screen = on_terminal(
        f"""
        from periscope_otel import guard, operation
        guard.set_strict(True)
        with operation({name!r}, feed={name!r}) as op:
            list(op.track(range(42)))
        assert op.items.received == 42
        """,
        120,
    )
    assert screen.status == 0, screen.raw[-500:]
    assert all(len(line) <= 120 for line in screen.lines)
    assert "42/42" in screen.lines[-1]
    for harm in ("\x1b[2J", "\x1b]0;", "\x07", "\x00", "\u202e"):
        assert harm not in screen.raw
    if "[bold]" in name:
        assert screen.lines[-1].startswith("[bold]fetch")
    if ":warning:" in name:
        assert screen.lines[-1].startswith(":warning:")


def test_finished_tracks_do_not_pile_up():
    """After a hundred tracks inside of one, the display is still no taller than the terminal."""
    screen = on_terminal(
        """
        from periscope_otel import operation
        with operation("fetch") as outer:
            for _ in outer.track(range(100)):
                with operation("store") as inner:
                    list(inner.track([1]))
        """
    )
    assert screen.status == 0
    assert "100/100" in screen.last("fetch")
    assert screen.raw[screen.raw.rindex("\x1b[2K") :].count("\n") <= 24


def test_many_threads_share_the_terminal():
    """Tracks of several threads at once all count exactly and disturb nothing."""
    screen = on_terminal(
        """
        import sys, threading
        from periscope_otel import guard, operation
        guard.set_strict(True)
        sys.setswitchinterval(1e-6)
        counted = []
        start = threading.Barrier(8)
        def work(number):
            start.wait()
            for turn in range(20):
                with operation(f"fetch{number}") as op:
                    for _ in op.track(range(5)):
                        pass
                counted.append(op.items.received)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counted == [5] * 160, counted
        """
    )
    assert screen.status == 0, screen.raw[-500:]
    assert "Traceback" not in screen.raw
