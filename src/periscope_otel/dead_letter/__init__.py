"""Dead letters: payloads that failed, kept until somebody has them tried again or removes them.

Example:
    >>> from periscope_otel.dead_letter import open_store
    >>> with open_store("sqlite:///dead-letters.db") as store:
    ...     store.stats().by_state
"""

from periscope_otel.dead_letter.errors import (
    CannotReplayError,
    DamagedLetterError,
    DeadLetterError,
    PayloadElsewhereError,
    StoreError,
    StoreFullError,
)
from periscope_otel.dead_letter.letter import Letter
from periscope_otel.dead_letter.store import (
    AsyncStore,
    Claim,
    Filter,
    Page,
    Stats,
    Store,
    open_store,
)

__all__ = [
    "AsyncStore",
    "CannotReplayError",
    "Claim",
    "DamagedLetterError",
    "DeadLetterError",
    "Filter",
    "Letter",
    "Page",
    "PayloadElsewhereError",
    "Stats",
    "Store",
    "StoreError",
    "StoreFullError",
    "open_store",
]
