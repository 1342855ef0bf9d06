"""Registered operations by name: what runs under a name, so that a payload can be replayed.

A stored payload names an operation, never an import path; only what registered itself here runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from periscope_otel import guard

_Function = TypeVar("_Function", bound=Callable[..., Any])

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


class Handler(NamedTuple):
    """What a payload is handed to."""

    function: Callable[..., Any]
    explicit: bool
    """Whether it was registered for replays, rather than monitored."""


_handlers: dict[tuple[str, bool], Callable[..., Any]] = {}


def replay_handler(name: str, *, items: bool = False) -> Callable[[_Function], _Function]:
    """Register a function for the replay of an operation's dead letters.

    Where the monitored function itself cannot be called with a payload: a method, whose object
    nobody has any more; a generator; one that takes a secret, which no letter holds.

    Args:
        name: The operation's name.
        items: For letters of single items, handed over as its first argument.

    Returns:
        A decorator that gives the function back as it is.

    Example:
        >>> @replay_handler("fetch")
        ... def fetch_again(url): return client.fetch(url, api_key=read_key())
    """

    def decorate(function: _Function) -> _Function:
        _handlers[name, items] = function
        return function

    return decorate


def handler_of(name: str, *, item: bool) -> Handler | None:
    """Return what replays an operation's letters: one registered for it, else what is monitored.

    Args:
        name: The operation's name.
        item: Whether for a single item.
    """
    explicit = _handlers.get((name, item))
    if explicit is not None:
        return Handler(explicit, explicit=True)
    monitored = registered(name)
    return None if monitored is None else Handler(monitored, explicit=False)
