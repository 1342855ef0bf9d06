"""Subjects that live in processes of their own, each perhaps in an environment of its own.

A host is started once and stays; it measures a round when asked, so hosts take turns in random
order like subjects of one process do. What is asked and answered are lines of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    from harness import Sample


class Host:
    """A process that measures subjects when asked.

    Args:
        script: What it runs; it must end up in `serve`.
        arguments: The script's arguments.
        python: The interpreter; this one by default.
        environment: Environment variables to add.
    """

    def __init__(
        self,
        script: Path,
        *arguments: str,
        python: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [str(python or sys.executable), str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.stdin.close()
        self._process.wait()

    def subject(self, name: str) -> Callable[[int], Sample]:
        """Return what measures one of the host's subjects."""
        return lambda calls: self.ask(name, calls)

    def ask(self, name: str, calls: int) -> Sample:
        """Have the host measure a subject, and wait for the answer."""
        print(json.dumps([name, calls]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the host of {name!r} ended: {self._process.args}")
        return json.loads(answer)


def serve(make: Callable[[], Mapping[str, Callable[[int], Sample]]]) -> None:
    """Make subjects, and measure what standard input asks for until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    subjects = make()
    for line in sys.stdin:
        name, calls = json.loads(line)
        print(json.dumps(subjects[name](calls)), file=answers, flush=True)
