"""How tests of dead letters stand a machine that stops for seconds at any moment.

What is well must not be taken for hung or held by others because it was slow: then a letter would
be in memory, in the outbox or claimed by another, quite rightly, and not where a test looks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from periscope_otel.dead_letter import database, queue
from periscope_otel.dead_letter.database import Database
from periscope_otel.dead_letter.queue import DeadLetterQueue
from periscope_otel.dead_letter.redis_store import RedisStore

if TYPE_CHECKING:
    import pytest

PATIENT: Final = 30.0
"""Seconds that a file, a Redis, a fork or a thread is waited for."""


def be_patient(patch: pytest.MonkeyPatch) -> None:
    """Have all that is not told otherwise, in this process, wait for that long."""
    patch.setattr(DeadLetterQueue.close, "__defaults__", (PATIENT,))
    patch.setattr(queue, "PATIENCE", PATIENT)
    patch.setattr(database, "FORK_WAIT", PATIENT)
    patch.setitem(Database.__init__.__kwdefaults__, "busy", PATIENT)
    patch.setitem(RedisStore.__init__.__kwdefaults__, "timeout", PATIENT)
