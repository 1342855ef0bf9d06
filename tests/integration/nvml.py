"""A driver library for tests without a GPU: compiled here, and driven through the real pynvml."""

from __future__ import annotations

import json
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processes import running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from processes import Program

SOURCE = Path(__file__).parent / "nvml_stub.c"
FIRST = "GPU-11111111-0000-0000-0000-000000000000"
SECOND = "GPU-22222222-0000-0000-0000-000000000000"
PARTS = [
    "MIG-33333333-0000-0000-0000-000000000000",
    "MIG-44444444-0000-0000-0000-000000000000",
]


def compile_stub(folder: Path, *options: str) -> Path:
    """Compile the stub into `folder`, which goes on LD_LIBRARY_PATH."""
    library = folder / "libnvidia-ml.so.1"
    command = ["gcc", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, *options, "-o", str(library), str(SOURCE)], check=True)
    return folder


class Reader:
    """The program `gpu_reader`: a GpuReader with a clock that stands still until it is moved."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def stub(self, function: str, *arguments: object) -> Any:
        """Call a `stub_*` function of the library."""
        return self._ask("stub", function, *arguments)

    def calls(self, function: str) -> int:
        """Return how often a function of NVML was called."""
        return self.stub("calls", function)

    def lack(self, function: str) -> None:
        """Take a function out of pynvml."""
        self._ask("lack", function)

    def break_(self, function: str) -> None:
        """Make a function of pynvml raise what is no error of NVML."""
        self._ask("break_", function)

    def wait(self, seconds: float) -> None:
        """Move the clock."""
        self._ask("wait", seconds)

    def read(self, *, slow: bool = False) -> dict[str, Any]:
        """Read, and return the stats: `devices` by id, `problem` and the `logs` since."""
        return self._ask("read", slow)

    def fork(self) -> dict[str, Any]:
        """Read in a forked child, and return what it got."""
        return self._ask("fork")

    def unsupported(self) -> dict[str, list[str]]:
        """Return the calls that each device is known not to support."""
        return self._ask("unsupported")

    def _ask(self, *command: object) -> Any:
        self.program.tell(json.dumps(command))
        return json.loads(self.program.line())


@contextmanager
def reader(library: Path | None) -> Iterator[Reader]:
    """Run a reader with the library in that folder, or with none."""
    env = {} if library is None else {"LD_LIBRARY_PATH": str(library)}
    with running("gpu_reader", env=env) as program:
        yield Reader(program)
        ends_well(program)


def ends_well(program: Program) -> None:
    """End a program that reads commands, and see that it ends as it should."""
    program._process.stdin.close()
    ended = program.ended()
    assert ended.status == 0, ended.stderr
