"""Which permit belongs to which `with breaker` block.

One breaker is in many blocks at once, and the end of a block says only which breaker it was. Blocks
of generators end in any order, and in another thread or task than they began in, if they are
collected or closed there. What stays the same is the frame that the block stands in.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from periscope_otel.resilience.guards import GUARDED, Guard

if TYPE_CHECKING:
    from types import FrameType

    from periscope_otel.resilience.circuit import Circuit, Permit

G = TypeVar("G", bound=Guard)

_Place: TypeAlias = tuple[int, int]
"""A frame and its code, by their ids. The id of a frame is that of another one soon after it has
ended, as where a method has entered the block for its caller; hardly ever of the same code."""

_entered: Final[ContextVar[tuple[Permit, ...]]] = ContextVar("periscope-permits", default=())
"""The permits of the blocks that this context is in, outermost first."""

_by_place: Final[dict[_Place, list[Permit]]] = {}
"""The permits of all blocks by where they stand, outermost first."""


def entered(permit: Permit, *, depth: int) -> Permit:
    """Take note of a block that begins.

    Args:
        permit: Its permit.
        depth: How many calls above the caller the block stands.
    """
    permit.place = place = _place_of(sys._getframe(depth + 1))
    permits = _by_place.get(place)
    if permits is None:
        permits = _by_place.setdefault(place, [])
    permits.append(permit)
    _entered.set(_with(_entered.get(), permit))
    GUARDED.set(_with(GUARDED.get(), permit))
    return permit


def left(breaker: Circuit, *, depth: int) -> Permit | None:
    """Return the permit of a block that ends; None if nobody can tell which it was.

    Args:
        breaker: The breaker that it is a block of.
        depth: How many calls above the caller the block stands.
    """
    frame = sys._getframe(depth + 1)
    permits = _by_place.get(_place_of(frame), ())
    if permits and permits[-1].breaker is breaker:  # mostly
        permit: Permit | None = permits[-1]
    else:
        of_breaker = [one for one in permits if one.breaker is breaker]
        permit = of_breaker[-1] if of_breaker else _entered_elsewhere(frame, breaker)
    if permit is None:
        return None
    _forget(permit)
    _entered.set(_without(_entered.get(), permit))
    GUARDED.set(_without(GUARDED.get(), permit))
    return permit


def _place_of(frame: FrameType) -> _Place:
    return id(frame), id(frame.f_code)


def _entered_elsewhere(frame: FrameType, breaker: Circuit) -> Permit | None:
    """Return the permit of a block that another frame has entered: a method, or an `ExitStack`.

    It is the innermost of this context that does not stand in a frame which still runs; else the
    only one that there is at all.
    """
    running = _places_above(frame)
    here = [one for one in _entered.get() if one.breaker is breaker and one.place not in running]
    if here:
        return here[-1]
    every = [one for permits in list(_by_place.values()) for one in list(permits)]
    found = [
        one
        for one in every
        if one.breaker is breaker and one.outcome is None and one.place not in running
    ]
    return found[0] if len(found) == 1 else None


def _places_above(frame: FrameType) -> set[_Place]:
    places = set()
    above: FrameType | None = frame
    while above is not None:
        places.add(_place_of(above))
        above = above.f_back
    return places


def _forget(permit: Permit) -> None:
    permits = _by_place.get(permit.place, [])
    if permit in permits:
        permits.remove(permit)
    if not permits:
        _by_place.pop(permit.place, None)


def _with(guards: tuple[G, ...], entered: G) -> tuple[G, ...]:
    """Return them with one more, and without those that have ended in other contexts."""
    if not guards:
        return (entered,)
    return (*[one for one in guards if one.outcome is None], entered)


def _without(guards: tuple[G, ...], ended: G) -> tuple[G, ...]:
    if not guards or guards[-1] is ended:  # mostly
        return guards[:-1]
    return tuple([one for one in guards if one is not ended])
