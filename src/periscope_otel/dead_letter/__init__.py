"""Dead letters: payloads that failed, kept until somebody has them tried again or removes them.

Example:
    >>> from periscope_otel.dead_letter import open_store
    >>> with open_store("sqlite:///dead-letters.db") as store:
    ...     store.stats().by_state
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from periscope_otel.dead_letter.errors import (
        CannotReplayError,
        DamagedLetterError,
        DeadLetterError,
        PayloadElsewhereError,
        RefusedError,
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
    "RefusedError",
    "Stats",
    "Store",
    "StoreError",
    "StoreFullError",
    "open_store",
]

# Loaded when first used: operations that have no dead letters need neither msgspec nor sqlite3.
_MODULES = dict.fromkeys(__all__, "store") | {"Letter": "letter"}
_MODULES |= {name: "errors" for name in __all__ if name.endswith("Error")}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
