"""Kill 200 workers with `journal=True`, and see that every payload is ingested or a letter.

Once with the file as the only store, once with a Redis and once with a Valkey. Exits with 1 where a
payload is lost. The integration tests do a few of these kills each time.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from harness import environment, here

sys.path.insert(0, str(here().parent / "integration"))

from processes import run
from redis_servers import RedisServer

PATIENCE = 900.0


def kills(kind: str, count: int, at_once: int, seed: str) -> dict[str, object]:
    """Return what was counted with one kind of store."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        url = "-"
        if kind != "sqlite":
            url = stack.enter_context(RedisServer(kind, Path(folder) / kind)).url
        ended = run("kill_letters", folder, url, seed, str(count), str(at_once), timeout=PATIENCE)
        if ended.status:
            raise SystemExit(ended.stderr)
        told = [one for one in ended.stderr.splitlines() if "periscope-otel: " not in one]
        return {"store": kind, "seed": seed, **json.loads(ended.lines[-1]), "told": len(told)}


def main() -> None:
    """Kill, count, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="of each kind; default 200")
    parser.add_argument("--at-once", type=int, default=4, help="workers; default 4")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    options = parser.parse_args()
    found = [
        kills(kind, options.kills, options.at_once, secrets.token_hex(4))
        for kind in ("sqlite", "redis", "valkey")
    ]
    for one in found:
        print(json.dumps(one, indent=2))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"title": "Kills", "environment": environment(), "kills": found}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    wrong = ("lost", "never ingested", "under two keys")
    sys.exit(any(one[what] for one in found for what in wrong))


if __name__ == "__main__":
    main()
