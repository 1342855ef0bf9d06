"""Which permit belongs to which `with breaker` block.

One breaker is in many blocks at once, and the end of a block says only which breaker it was. Blocks
of generators end in any order, and in another thread or task than they began in, if they are
collected or closed there. What stays the same is the frame that the block stands in.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, TypeVar

from periscope_otel.resilience.guards import GUARDED, Guard

if TYPE_CHECKING:
    from types import FrameType

    from periscope_otel.resilience.circuit import Circuit, Permit

G = TypeVar("G", bound=Guard)

_LOOSE: Final = 0
"""The frame of what an `ExitStack` has entered: its own frames tell nothing."""

_entered: Final[ContextVar[tuple[Permit, ...]]] = ContextVar("periscope-permits", default=())
"""The permits of the blocks that this context is in, outermost first."""

_by_frame: Final[dict[int, list[Permit]]] = {}
"""The permits of all blocks by the frames that they stand in, outermost first."""


def entered(permit: Permit, *, depth: int) -> Permit:
    """Take note of a block that begins.

    Args:
        permit: Its permit.
        depth: How many calls above the caller the block stands.
    """
    permit.frame = frame = _frame_id(depth)
    permits = _by_frame.get(frame)
    if permits is None:
        permits = _by_frame.setdefault(frame, [])
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
    permit = _block_in(_frame_id(depth), breaker)
    if permit is None:
        return None
    _forget(permit)
    _entered.set(_without(_entered.get(), permit))
    GUARDED.set(_without(GUARDED.get(), permit))
    return permit


def _frame_id(depth: int) -> int:
    frame: FrameType = sys._getframe(depth + 2)
    # The same until the frame has ended: it holds its frame object itself.
    return _LOOSE if frame.f_globals.get("__name__") == "contextlib" else id(frame)


def _block_in(frame: int, breaker: Circuit) -> Permit | None:
    """Return the permit of the innermost block of this breaker that stands in the frame."""
    permits = _by_frame.get(frame, ())
    if permits and frame != _LOOSE and permits[-1].breaker is breaker:  # mostly
        return permits[-1]
    here = _entered.get()
    permits = [one for one in permits if one.breaker is breaker]
    permits = (
        [one for one in permits if one in here]
        or permits
        or [one for one in here if one.breaker is breaker]  # entered by a frame that is gone
        or _the_only_one(breaker)
    )
    return permits[-1] if permits else None


def _the_only_one(breaker: Circuit) -> list[Permit]:
    every = [one for permits in list(_by_frame.values()) for one in permits]
    found = [one for one in every if one.breaker is breaker and one.outcome is None]
    return found if len(found) == 1 else []


def _forget(permit: Permit) -> None:
    permits = _by_frame.get(permit.frame, [])
    if permit in permits:
        permits.remove(permit)
    if not permits and permit.frame != _LOOSE:  # whose list threads share
        _by_frame.pop(permit.frame, None)


def _with(guards: tuple[G, ...], entered: G) -> tuple[G, ...]:
    """Return them with one more, and without those that have ended in other contexts."""
    if not guards:
        return (entered,)
    return (*[one for one in guards if one.outcome is None], entered)


def _without(guards: tuple[G, ...], ended: G) -> tuple[G, ...]:
    if not guards or guards[-1] is ended:  # mostly
        return guards[:-1]
    return tuple([one for one in guards if one is not ended])
