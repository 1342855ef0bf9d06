"""Calls in a process without an SDK; served to call_cost.py."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from harness import Sample, Subject
from hosts import serve

from periscope_otel import monitored

if TYPE_CHECKING:
    from collections.abc import Callable


def empty() -> None:
    """Do nothing."""


def closure(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function in the least that any decorator with an end needs."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        finally:
            pass

    return wrapper


class Feed:
    """Has a monitored method."""

    @monitored("fetch", feed="urlhaus")
    def fetch(self) -> None:
        """Do nothing, monitored."""


def subjects() -> dict[str, Callable[[int], Sample]]:
    """Return the calls, by the names that call_cost.py knows."""
    made = {
        "call without an SDK": Subject(monitored("store", feed="urlhaus")(empty)),
        "method without an SDK": Subject(Feed().fetch),
        "empty closure": Subject(closure(empty)),
    }
    assert "opentelemetry.sdk" not in sys.modules
    return {name: subject.measure for name, subject in made.items()}


if __name__ == "__main__":
    serve(subjects)
