"""Imported by programs that write letters while the machine stops for seconds at any moment.

Where others hold the file for that long a letter is in memory, a payload goes without the journal
and a fork does not wait: all of that is right, and hides what a test looks for.
"""

from importlib import import_module

from periscope_otel.dead_letter import database, journal, queue
from periscope_otel.dead_letter.redis_store import RedisStore

PATIENT = 60.0

queue.BUSY = journal.LONGEST_WAIT = database.FORK_WAIT = PATIENT
import_module("periscope_otel.dead_letter.in_use")._EXIT_WAIT = PATIENT
RedisStore.__init__.__kwdefaults__["timeout"] = PATIENT
