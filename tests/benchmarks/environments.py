"""Virtual environments of the peers, made once outside of the checkout.

They lie in the folder that PERISCOPE_BENCH_CACHE names, else in the user's cache folder, under a
name that changes with what is to be installed. `peers/requirements-NAME.txt` is installed as usual
and `peers/no-deps-NAME.txt` without dependencies: packages whose declared ranges conflict with
the OpenTelemetry version that everything is measured on, though their code runs on it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from harness import here


def interpreter(peer: str) -> Path:
    """Return the Python of a peer's environment, made now if need be."""
    wanted = _requirement_files(peer)
    text = sys.version + "".join(file.read_text() for file in wanted)
    home = _cache() / f"{peer}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    python = home / "bin" / "python"
    if not home.is_dir():
        print(f"making the environment of {peer} in {home}", file=sys.stderr)
        try:
            _make(home, python, wanted)
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise
    return python


def _requirement_files(peer: str) -> list[Path]:
    files = [here() / "peers" / f"{kind}-{peer}.txt" for kind in ("requirements", "no-deps")]
    return [file for file in files if file.exists()]


def _cache() -> Path:
    named = os.environ.get("PERISCOPE_BENCH_CACHE")
    if named:
        return Path(named).resolve()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "periscope-otel" / "benchmarks"


def _make(home: Path, python: Path, wanted: list[Path]) -> None:
    venv.create(home, with_pip=True)
    for file in wanted:
        extra = ["--no-deps"] if file.name.startswith("no-deps") else []
        command = [str(python), "-m", "pip", "install", "--quiet", *extra, "--requirement"]
        subprocess.run([*command, str(file)], check=True, stdout=sys.stderr)
