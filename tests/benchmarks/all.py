"""Run every benchmark and write the results down.

Each script's JSON goes into `results/`, and all of them into the table `results/RESULTS.md`.
`--quick` runs a tenth of everything, to see that it works; its figures are not for showing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from harness import Measure, here

SCRIPTS = ("call_cost", "peers", "memory", "import_cost", "black_hole")
QUICK = {"memory": ["--rounds", "1", "--calls", "100000"]}
RESULTS = here() / "results"


def run(script: str, quick: bool) -> dict[str, Any]:
    """Run a script; returns what it found."""
    file = RESULTS / f"{script}.json"
    extra = QUICK.get(script, ["--rounds", "6"]) if quick else []
    command = [sys.executable, str(here() / f"{script}.py"), "--json", str(file), *extra]
    subprocess.run(command, check=True)
    return json.loads(file.read_text())


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
    options = parser.parse_args()
    found = [run(script, options.quick) for script in SCRIPTS]
    (RESULTS / "RESULTS.md").write_text(table(found))


if __name__ == "__main__":
    main()
