"""The contracts of the registry: operations by name, so that a payload can be replayed."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

import pytest

from periscope_otel import monitored
from periscope_otel.registry import register, registered

if TYPE_CHECKING:
    import types


def function(qualname: str, module: str = "app.feeds") -> types.FunctionType:
    def stand_in() -> None: ...

    stand_in.__qualname__, stand_in.__module__ = qualname, module
    return stand_in


def test_registered_function_is_found():
    """What was registered under a name is found by it; an unknown name is None."""
    one = function("fetch")
    register("test.found", one)
    assert registered("test.found") is one
    assert registered("test.unknown") is None


def test_decorated_function_is_registered_as_decorated():
    """`@monitored` registers the wrapper: what is replayed is monitored again."""

    @monitored("test.decorated")
    def fetch() -> int:
        return 3

    assert registered("test.decorated") is fetch


def test_last_registered_counts_and_two_functions_warn_once(caplog):
    """Two functions under one name are warned about once, naming both; the last one counts."""
    first, second = function("fetch"), function("pull")
    with caplog.at_level(logging.WARNING, "periscope_otel"):
        register("test.twice", first)
        register("test.twice", second)
        register("test.twice", first)
        register("test.twice", second)
    assert registered("test.twice") is second
    (record,) = caplog.records
    for part in ("test.twice", "app.feeds.fetch", "app.feeds.pull"):
        assert part in record.getMessage()


def test_function_defined_anew_is_no_second_one(caplog):
    """A function of the same module and name, as after a reload, replaces without a warning."""
    first, second = function("fetch"), function("fetch")
    register("test.reloaded", first)
    register("test.reloaded", second)
    assert registered("test.reloaded") is second
    assert caplog.records == []


def test_same_function_twice_is_no_second_one(caplog):
    """Registering the same function again says nothing."""
    one = function("fetch")
    register("test.same", one)
    register("test.same", one)
    assert caplog.records == []


def test_registry_keeps_no_function_alive():
    """A function that nobody else holds goes, and its name with it."""
    one = function("fetch")
    register("test.gone", one)
    del one
    gc.collect()
    assert registered("test.gone") is None


@pytest.mark.parametrize("name", ["", "os.system", "[bold]", "a\nb", "\ud800"])
def test_any_text_is_a_name_and_never_an_import(name):
    """A name is only looked up: one that reads like an import path imports nothing."""
    assert registered(name) is None
    one = function("fetch")
    register(name, one)
    assert registered(name) is one


def test_callables_without_names_can_be_registered():
    """A callable object without a qualified name, such as a partial, can be registered twice."""

    class Feed:
        def __call__(self) -> None: ...

    first, second = Feed(), Feed()
    register("test.callable", first)
    register("test.callable", second)
    assert registered("test.callable") is second
