"""The public API keeps its types under mypy --strict and pyright."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "tests" / "typing" / "api.py"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "checker",
    [
        ["mypy", "--strict", "--warn-unused-ignores", "--enable-error-code", "redundant-expr"],
        ["pyright", "--warnings", "--pythonpath", sys.executable],
    ],
    ids=["mypy", "pyright"],
)
def test_the_api_is_typed(checker):
    """Every claim of tests/typing/api.py holds: exact types kept, wrong uses refused."""
    done = subprocess.run(
        [sys.executable, "-m", *checker, str(API)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
