"""How breakers treat threat-intelligence feeds that fail: ours and four others, simulated.

Four feeds (an hourly one, a TAXII poll every 5 minutes, a blocklist every minute, enrichment with
20 calls a second in bursts) go through the same days under each breaker: feed_traces.py says what
happens, feed_simulation_host.py how each breaker is set up and how it is told the simulated time.
Nothing waits, nothing is random from run to run; the figures are exact counts and not medians.

Writes `results/feed_simulation.json` and the tables `results/FEED_SIMULATION.md`.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from environments import interpreter
from feed_traces import FEEDS, KINDS
from harness import environment, here
from hosts import Host

PEERS = ("pybreaker", "circuitbreaker", "purgatory", "aiobreaker")
SUBJECTS = {
    "ours, default": ("ours", ""),
    "ours, slow_threshold": ("ours", "slow_threshold"),
    "ours, slow_threshold, longest_open=60": ("ours", "short"),
    **{peer: (peer, "") for peer in PEERS},
    **{f"{peer}, 404s excluded": (peer, "excludes") for peer in PEERS},
}
COLUMNS = {
    "dead_sent": "dead: refused",
    "until_open": "dead: s until open",
    "among_404s_sent": "dead among 404s: refused",
    "flapping_sent": "flapping: refused",
    "hanging_sent": "hanging: sent",
    "dead_hanging_sent": "dead, then hanging: sent",
    "wrongly_closed": "closed by a cancelled probe",
    "wrongly_opened": "opened by cancellations",
    "until_found_well": "s until recovery is found, at most",
    "refused_when_well": "rejected while well",
    "held_sent": "sent during a Retry-After",
    "revoked_sent": "sent with a revoked key",
}
NOTES = """
Every row is one simulated run of the same trace; lower is better in every column.

- *dead*: connections are refused. *dead among 404s*: every third answer is a 404 of a cache, or
  data that cannot be read. *flapping*: down and up by turns, six times. Of these three the refused
  requests are counted. *hanging*: calls are accepted and never answered, and an outer timeout
  cancels them. *dead, then hanging*: refused for a third of the time.
- *closed by a cancelled probe*: the breaker took a cancelled call to the hanging dependency for a
  success, and closed. *opened by cancellations*: the dependency was well, and callers gave up.
- *s until recovery is found*: from the moment when the dependency is back after one of those five
  to the first answer, the longest of the five. *rejected while well*: what being open for longer,
  or being opened wrongly, costs.
- *sent during a Retry-After*: after the answer 429 that said how long to wait; no caller here looks
  at that header itself. *sent with a revoked key*: all answered 401.
- Trouble lasts each time {outages}. Between, all is well for as long, and an hour at least.
- The peers have their defaults: five failures in a row open them, for 30 s (circuitbreaker,
  purgatory) or 60 s (pybreaker, aiobreaker). *404s excluded* is each one's way to exclude errors.
- `slow_threshold` is {slow}.
"""


def simulate() -> dict[str, dict[str, dict[str, Any]]]:
    """Run every subject over every feed; returns figures by feed and subject."""
    path = os.pathsep.join([str(here().parents[1] / "src"), str(here())])
    script, found = here() / "feed_simulation_host.py", {feed.name: {} for feed in FEEDS}
    python = interpreter("breakers")
    ours = Host(script, "ours", environment={"PYTHONPATH": path})
    peers = Host(script, *PEERS, python=python, environment={"PYTHONPATH": str(here())})
    with ours, peers:
        for feed in FEEDS:
            for name, (make, variant) in SUBJECTS.items():
                host = ours if make == "ours" else peers
                found[feed.name][name] = host.ask(f"{make}|{variant}|{feed.name}", 1)
    return found


def tables(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the figures as Markdown."""
    outages = ", ".join(f"{feed.outage / 3600:.2g} h ({feed.name})" for feed in FEEDS)
    slow = ", ".join(f"{feed.slow:g} s ({feed.name})" for feed in FEEDS)
    lines = ["# Breakers under failing feeds, simulated", "", "Written by `feed_simulation.py`."]
    lines.append(NOTES.format(outages=outages, slow=slow))
    for feed, rows in found.items():
        lines += [f"## {feed}", "", f"| | {' | '.join(COLUMNS.values())} |"]
        lines.append("|---" * (len(COLUMNS) + 1) + "|")
        for name, figures in rows.items():
            cells = " | ".join(_shown(figures[column]) for column in COLUMNS)
            lines.append(f"| {name} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def _shown(figure: float | None) -> str:
    return "never" if figure is None else f"{figure:,.0f}" if figure >= 10 else f"{figure:.2g}"


def main() -> None:
    """Simulate, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    found = simulate()
    text = tables(found)
    print(text)
    peers = (here() / "peers" / "requirements-breakers.txt").read_text().split()
    about = {"title": __doc__.splitlines()[0], "environment": environment(), "peers": peers}
    results = here() / "results"
    as_json = json.dumps({**about, "kinds": KINDS, "feeds": found}, indent=2)
    (results / "feed_simulation.json").write_text(as_json + "\n")
    (results / "FEED_SIMULATION.md").write_text(text)


if __name__ == "__main__":
    main()
