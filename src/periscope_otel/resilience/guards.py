"""Which breakers guard the code that runs: a call counts once on each, however often it is guarded.

A guard is a monitored operation or the permit of a `with breaker` block. It is in force until it
has settled: a task that outlives it is no longer part of its call.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from opentelemetry.context import create_key, get_current

if TYPE_CHECKING:
    from opentelemetry.context import Context


class Guard(Protocol):
    """What guards a call: an operation or a permit."""

    @property
    def breaker(self) -> Any:
        """The breaker that it guards with."""

    @property
    def outcome(self) -> str | None:
        """How it ended; None while it is in force."""


GUARDED: Final[ContextVar[tuple[Guard, ...]]] = ContextVar("periscope-guards", default=())
"""The guards around what runs now, outermost first; some may have settled."""

GUARDED_KEY: Final = create_key("periscope-guarded")
"""Where an OpenTelemetry context has them too: it goes to threads where the variable does not."""


def guarding(context: Context | None = None) -> tuple[str, ...]:
    """Return the names of the breakers that guard what runs now.

    Args:
        context: An OpenTelemetry context; the current one by default.
    """
    context = get_current() if context is None else context
    guards = GUARDED.get() + cast("tuple[Guard, ...]", context.get(GUARDED_KEY, ()))
    if not guards:
        return ()
    return tuple(one.breaker.name for one in guards if one.outcome is None)
