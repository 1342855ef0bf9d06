"""Children of this process's forks do not wait for a lock of coverage's that a thread had then.

Its tracer takes that lock whenever code of one more file begins to run. Imported before all of the
plugin, so that what the plugin does in such a child comes afterwards.
"""

from __future__ import annotations

import os
import threading

from coverage import Coverage


def _renew_the_lock() -> None:
    running = Coverage.current()
    collector = getattr(running, "_collector", None)
    if getattr(collector, "data_lock", None) is not None:
        collector.data_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_the_lock)
