"""Calls in a process without an SDK; served to call_cost.py."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from harness import Subject
from hosts import serve

from periscope_otel import monitored


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


if __name__ == "__main__":
    subjects = {
        "call without an SDK": Subject(monitored("store", feed="urlhaus")(empty)),
        "method without an SDK": Subject(Feed().fetch),
        "empty closure": Subject(closure(empty)),
    }
    assert "opentelemetry.sdk" not in sys.modules
    serve({name: subject.measure for name, subject in subjects.items()})
