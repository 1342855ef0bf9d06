"""Comparing two looks at a machine that others use too, and that may stop a test in between."""

from __future__ import annotations

import time
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

TRIES = 30


def in_a_quiet_moment(test: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Repeat a test until it passes: what is right agrees in most moments, what is wrong in none.

    Args:
        test: Looks anew, each time, at all that it compares.
    """

    @wraps(test)
    def repeated(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        for tried in range(TRIES - 1):
            try:
                return test(*args, **kwargs)
            except AssertionError:
                time.sleep(0.01 * tried)
        return test(*args, **kwargs)

    return repeated
