"""A payload fails, is kept, looked at, and replayed once the cause is mended.

Run it:

    python examples/dead_letters.py

It uses a folder of its own that is gone afterwards, and no server. With PERISCOPE_REDIS_URL set it
does the same through that Redis, in a queue of its own that it leaves empty.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import periscope_otel as periscope
from periscope_otel.dead_letter import Filter
from periscope_otel.replay import replay

QUEUE = f"example-{uuid.uuid4().hex[:8]}"
"""A name of its own, so that this example touches nobody's letters."""

broken = True
stored: dict[str, list[dict[str, str]]] = {}


@periscope.monitored("store", feed="urlhaus", dead_letter=QUEUE)
def store(rows: list[dict[str, str]]) -> None:
    """Store rows, unless the database is away."""
    if broken:
        raise ConnectionError("the database db.example:5432 refused the connection")
    # The key is the same for each try of the same rows: what comes twice is stored once.
    stored[periscope.current_operation().idempotency_key or ""] = rows


def periscope_dlq(*arguments: str) -> None:
    """Run the command-line tool, as somebody would who looks into a failed feed."""
    print(f"\n$ periscope dlq {' '.join(arguments)}", flush=True)
    command = shutil.which("periscope", path=Path(sys.executable).parent) or "periscope"
    subprocess.run([command, "dlq", *arguments], check=True)  # noqa: S603


def main() -> None:
    """Fail, look, mend, replay."""
    global broken
    with tempfile.TemporaryDirectory() as folder:
        # The command-line tool reads the same variables.
        os.environ["PERISCOPE_DATA_DIR"] = folder
        runtime = periscope.configure(service_name="dead-letters", exit_report="loss")

        for number in range(3):
            try:
                store([{"url": f"http://bad-{number}.example/x", "threat": "malware_download"}])
            except ConnectionError as error:
                print(f"failed: {error}")
        runtime.flush()  # to Redis, if there is one; without it they are where they stay

        letters = runtime.dead_letters.store
        periscope_dlq("list", "--queue", QUEUE)
        first = letters.list(Filter(queue=QUEUE)).letters[0]
        periscope_dlq("show", first.id, "--queue", QUEUE)

        print("\nThe database is back: replay.")
        broken = False
        report = replay(letters, Filter(queue=QUEUE))
        print(f"{report.succeeded} succeeded, {report.failed} failed; stored: {len(stored)}")
        periscope_dlq("stats", "--queue", QUEUE)
        runtime.shutdown()


if __name__ == "__main__":
    main()
