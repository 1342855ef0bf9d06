"""What `import periscope_otel` costs beside OpenTelemetry's own API.

`import periscope_otel` divided by `import opentelemetry.trace, opentelemetry.metrics`, each in a
fresh interpreter of every round, bytecode cached. The clock runs inside the interpreter, around
the import alone: CPU time (which has the target) and wall time. A round is one import each.
`--calls` has no meaning here.

Not measured: the first import after an installation, when bytecode is compiled and disks are cold.
"""

from __future__ import annotations

import json
import subprocess
import sys

from harness import Sample, arguments, interleave, ratio, start_report

OURS, API = "periscope_otel", "opentelemetry.trace, opentelemetry.metrics"

_TIMED = """
import time
wall, cpu = time.perf_counter(), time.process_time()
import {modules}
print([time.process_time() - cpu, time.perf_counter() - wall])
"""


def import_once(modules: str) -> Sample:
    """Import in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", _TIMED.format(modules=modules)],
        check=True,
        capture_output=True,
        text=True,
    )
    cpu, wall = json.loads(done.stdout)
    return {"thread": cpu, "process": cpu, "wall": wall}


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__, rounds=40, calls=1)
    report = start_report(__doc__, options)
    rounds = interleave(
        {name: lambda _calls, name=name: import_once(name) for name in (OURS, API)},
        options.rounds,
        1,
    )
    report.measures = [
        ratio("import ÷ import of the API, CPU", rounds, OURS, API, "process", 1.5),
        ratio("import ÷ import of the API, wall", rounds, OURS, API, "wall"),
    ]
    report.indicate(rounds)
    report.publish(options.json)


if __name__ == "__main__":
    main()
