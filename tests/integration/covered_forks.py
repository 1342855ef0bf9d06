"""Nobody waits for ever for a lock of coverage's: no child of a fork, and no thread for itself.

Its tracer takes that lock whenever code of one more file begins to run: in a child that is forked
while another thread has it, and in a finaliser or signal handler that comes while it is taken. What
a handler waits for in another thread is another matter: tests with random signals are programs of
their own, without coverage. Imported before all of the plugin, so that what the plugin does in such
a child comes afterwards.
"""

from __future__ import annotations

import os
import threading

from coverage import Coverage


def _renew_the_lock() -> None:
    running = Coverage.current()
    collector = getattr(running, "_collector", None)
    if getattr(collector, "data_lock", None) is not None:
        collector.data_lock = threading.RLock()


_renew_the_lock()
os.register_at_fork(after_in_child=_renew_the_lock)
