"""Starting somebody else's async generator from inside of a wrapper of our own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable


def first_step(inner: AsyncGenerator[Any, Any], sent: None = None) -> Awaitable[Any]:
    """Start the user's async generator without telling the event loop of it.

    A loop closes each generator that it knows, at its own end or when one is garbage. It shall
    know the wrapper alone, which closes the user's: two closes at once are an error.
    """
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, _left_to_the_wrapper)
    try:
        return inner.asend(sent)
    finally:
        sys.set_asyncgen_hooks(*hooks)


def _left_to_the_wrapper(_inner: AsyncGenerator[Any, Any]) -> None:
    """Do nothing where an event loop would close a generator that is garbage."""
