"""Running the examples as a stranger would, and reading what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import processes

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
REAL = EXAMPLES / "data" / "ics-attack-18.1.json"
EQUATION = re.compile(
    r"✓ ([\d,]+) received = ([\d,]+) ingested \+ ([\d,]+) skipped \+ ([\d,]+) failed"
    r" \+ ([\d,]+) unaccounted\n"
)


def environment(**variables: str) -> dict[str, str]:
    kept = processes.clean_environment()
    return {**kept, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8", **variables}


def command(*arguments: object, example: str = "ingest_attack.py") -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / example), *map(str, arguments)]


def run(*arguments: object, example: str = "ingest_attack.py", **variables: str):
    return subprocess.run(
        command(*arguments, example=example),
        env=environment(**variables),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


def account(output: str) -> tuple[int, ...]:
    """Return received, ingested, skipped, failed and unaccounted, as the summary tells them."""
    found = EQUATION.search(output)
    assert found, output
    return tuple(int(number.replace(",", "")) for number in found.groups())


def reasons(output: str) -> dict[str, int]:
    told = re.search(r"Skipped .*\n.*\n(.*)\n", output)
    assert told, output
    return {
        reason: int(count.replace(",", ""))
        for count, reason in re.findall(r"([\d,]+) ([a-z_]+)(?:,|\s|$)", told[1])
    }
