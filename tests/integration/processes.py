"""User programs that tests run: each a process of its own, so that how it ends is real."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAMS = Path(__file__).parent / "programs"
PATIENCE = 60.0
"""Seconds after which a program that should have answered is taken to hang."""

_LEFT_OUT = ("OTEL_", "PERISCOPE_", "PYTHONWARNINGS")


class Ended(NamedTuple):
    """How a program ended."""

    status: int
    lines: list[str]
    stderr: str
    at: float
    """When it closed its output, on the monotonic clock, which all processes share."""

    @property
    def reports(self) -> list[str]:
        """What the plugin said at the end."""
        return [one for one in self.stderr.splitlines() if one.startswith("periscope-otel: ")]


class Program:
    """A running program whose standard output is read line by line."""

    def __init__(self, script: Path, *args: str, env: dict[str, str] | None = None) -> None:
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by close())
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", str(script), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=clean_environment() | (env or {}),
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._seen: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def line(self, timeout: float = PATIENCE) -> str:
        """Return the next line that it writes."""
        with contextlib.suppress(queue.Empty):
            line = self._lines.get(timeout=timeout)
            if line is not None:
                return line
        raise AssertionError(f"no line came; so far: {self._seen}\n{self._dump()}")

    def tell(self, line: str = "") -> None:
        """Write a line to its standard input."""
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def send(self, number: int) -> float:
        """Send it a signal; returns when, on the monotonic clock."""
        os.kill(self.pid, number)
        return time.monotonic()

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def ended(self, timeout: float = PATIENCE) -> Ended:
        """Wait for its end; a program that hangs fails the test, with its threads' stacks."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the program hangs\n{self._dump()}") from None
        self._reader.join(PATIENCE)
        return Ended(status, list(self._seen), self._read_stderr(), self._ended_at)

    def close(self) -> None:
        """Kill it if it still runs, and close the pipes."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # with whatever children it left
        self._process.wait()
        self._reader.join(5)  # a child that outlives it may hold its output
        self._stderr.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._seen.append(line.rstrip("\n"))
            self._lines.put(line.rstrip("\n"))
        self._ended_at = time.monotonic()
        self._lines.put(None)

    def _read_stderr(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()

    def _dump(self) -> str:
        if self.running:
            # Its children first: it is mostly one of them that it waits for.
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.send_signal(signal.SIGABRT)
                    child.wait(5)
            self._process.send_signal(signal.SIGABRT)  # faulthandler writes all threads' stacks
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._read_stderr()[-8000:]


@contextmanager
def running(script: str | Path, *args: str, env: dict[str, str] | None = None) -> Iterator[Program]:
    """Run a program of `programs/` by name, or a file, for a block."""
    path = PROGRAMS / f"{script}.py" if isinstance(script, str) else script
    program = Program(path, *args, env=env)
    try:
        yield program
    finally:
        program.close()


def run(
    script: str | Path,
    *args: str,
    env: dict[str, str] | None = None,
    timeout: float = PATIENCE,
) -> Ended:
    """Run a program to its end."""
    with running(script, *args, env=env) as program:
        return program.ended(timeout)


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what would steer a program's telemetry.

    What programs write is not buffered: a signal handler cannot write to a buffer that the signal
    found in use, and a forked child would write its parent's buffer once more.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LEFT_OUT) and not name.lower().endswith("_proxy")
    }
    return kept | {"PYTHONUNBUFFERED": "1"}


def otlp(endpoint: str, protocol: str = "http/protobuf", **more: str) -> dict[str, str]:
    """Return the environment that sends OTLP somewhere, and waits at the end until it is there.

    A Collector in the tests' own process is stopped for seconds by a busy machine.
    """
    return otlp_by_default(endpoint, protocol, **{"PERISCOPE_SHUTDOWN_TIMEOUT": "15"} | more)


def otlp_by_default(endpoint: str, protocol: str, **more: str) -> dict[str, str]:
    """Return the environment that sends OTLP somewhere, and has the default bound at the end."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        **more,
    }
