"""Dead letters back through the operations that they are for.

Each letter is claimed with a lease, run under a new trace that is linked to the failed one, and
settled. What it runs is an operation that the program has registered under the letter's name, by
`monitored` or by `replay_handler`; nothing is imported because a letter says so. A letter may be
replayed more than once (a replayer that dies after its work, and before it could say so): use
`current_operation().idempotency_key`.

Example:
    >>> from periscope_otel.replay import replay
    >>> replay("sqlite:///dead-letters.db", limit=100).succeeded
    12
"""

from periscope_otel.registry import replay_handler
from periscope_otel.replay.run import Replayed, ReplayReport, replay

__all__ = ["ReplayReport", "Replayed", "replay", "replay_handler"]
