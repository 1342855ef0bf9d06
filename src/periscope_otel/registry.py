"""Registered operations by name: what runs under a name, so that a payload can be replayed.

A stored payload names an operation, never an import path; only what registered itself here runs.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from periscope_otel import guard

if TYPE_CHECKING:
    from collections.abc import Callable

_functions: weakref.WeakValueDictionary[str, Callable[..., Any]] = weakref.WeakValueDictionary()


def register(name: str, function: Callable[..., Any]) -> None:
    """Register `function` under an operation's name; the last one registered counts.

    Two different functions under one name are warned about: their figures would be one series,
    and a replay would run the last. A function defined anew (a reloaded module) is no such case.
    """
    known = _functions.get(name)
    if known is not None and _origin(known) != _origin(function):
        guard.warn(
            f"operation name {name}",
            "two functions are monitored under the operation name %r: %s and %s; give one of them "
            "a name of its own",
            name,
            _origin(known),
            _origin(function),
        )
    _functions[name] = function


def registered(name: str) -> Callable[..., Any] | None:
    """Return the function monitored under an operation's name, or None."""
    return _functions.get(name)


def _origin(function: Callable[..., Any]) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(named, '__module__', None)}.{named.__qualname__}"
