"""Run every benchmark and write the results down.

Each script's JSON goes into `results/`, and all of them into the table `results/RESULTS.md`.
`--quick` runs a tenth of everything, to see that it works; its figures are not for showing.
`--only SCRIPT` runs one again, and takes the others from their files. `stack` needs the servers of
tests/stack, `dead_letters` a redis-server.

Not run by it, since they are no ratios of costs: `kill_letters.py` (what kills lose),
`put_in_faults.py` (what a put costs while something happens to Redis) and `feed_simulation.py`
(what breakers make of failing feeds).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from harness import Measure, here

if TYPE_CHECKING:
    from pathlib import Path

SCRIPTS = (
    "call_cost", "peers", "memory", "import_cost", "black_hole", "stack", "dead_letters",
    "resilience", "gauges",
)  # fmt: skip
QUICK = {
    "memory": ["--rounds", "1", "--calls", "100000"],
    "gauges": ["--rounds", "3", "--seconds", "6"],
    "stack": ["--rounds", "1", "--seconds", "1"],
    "dead_letters": ["--rounds", "2", "--many", "10000"],
}
RESULTS = here() / "results"


def file_of(script: str) -> Path:
    """Return where a script's result is kept."""
    return RESULTS / f"{script}.json"


def run(script: str, quick: bool) -> None:
    """Run a script, and keep what it finds."""
    extra = QUICK.get(script, ["--rounds", "6"]) if quick else []
    command = [sys.executable, str(here() / f"{script}.py"), "--json", str(file_of(script))]
    subprocess.run([*command, *extra], check=True)


def table(found: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Benchmark results",
        "",
        "Written by `all.py`: medians and quartiles of ratios of the same round; see each script.",
        "",
        "| measure | target | measured, median [quartiles] | met? |",
        "|---|---|---|---|",
    ]
    for one in found:
        for measure in one["measures"]:
            measure.pop("met")
            lines.append(f"| {' | '.join(Measure(**measure).row())} |")
    environment = ", ".join(f"{name} {value}" for name, value in found[0]["environment"].items())
    rounds = ", ".join(f"{s} {one['settings']}" for s, one in zip(SCRIPTS, found, strict=True))
    return "\n".join([*lines, "", f"{environment}.", "", f"Settings: {rounds}.", ""])


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth, to see that it works")
    parser.add_argument("--only", choices=SCRIPTS, action="append", help="run this one again")
    options = parser.parse_args()
    for script in options.only or SCRIPTS:
        run(script, options.quick)
    found = [json.loads(file_of(script).read_text()) for script in SCRIPTS]
    (RESULTS / "RESULTS.md").write_text(table(found))


if __name__ == "__main__":
    main()
