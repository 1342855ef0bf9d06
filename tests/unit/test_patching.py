"""The contracts of `monitor_function`: monitoring code that one does not own, reversibly."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest

import periscope_otel as periscope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SOURCE = '''
import abc

def fetch(url, limit=1):
    """Fetch."""
    return url * limit

def fail():
    raise LookupError("gone")

async def afetch(url):
    return url

def rows(count):
    yield from range(count)
    return "done"

async def arows(count):
    for one in range(count):
        got = yield one

class Client:
    title = "client"

    def get(self, text):
        return f"{self.title} {text}"

    async def aget(self, text):
        return f"{self.title} {text}"

    def rows(self):
        yield self.title

    @classmethod
    def of(cls, text):
        return f"{cls.title} {text}"

    @staticmethod
    def plain(text):
        return text

    @property
    def prop(self):
        return 1

    number = 3

    class Inner:
        def get(self):
            return "inner"

class Sub(Client):
    title = "sub"

client = Client()
bound = client.get
'''

_numbers = itertools.count()


@pytest.fixture
def vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of somebody else's, new for each test and not yet imported."""
    name = f"vendor{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def monitor() -> Iterator[Callable[..., Any]]:
    """`monitor_function`, undone after the test."""
    patches = []

    def monitor(target: str, **options: Any) -> Any:
        patches.append(periscope.monitor_function(target, **options))
        return patches[-1]

    yield monitor
    for patch in patches:
        patch.undo()


# Each gives what the call gives, run to its end; the path of its target is the key.


async def _await(awaitable: Any) -> Any:
    return await awaitable


async def _all(iterator: Any) -> list[Any]:
    return [one async for one in iterator]


CALLS: dict[str, Callable[[Any], Any]] = {
    "fetch": lambda module: module.fetch("u", limit=2),
    "afetch": lambda module: _await(module.afetch("u")),
    "rows": lambda module: list(module.rows(3)),
    "arows": lambda module: _all(module.arows(3)),
    "bound": lambda module: module.bound("x"),
    "Client.get": lambda module: module.Client().get("x"),
    "Client.aget": lambda module: _await(module.Client().aget("x")),
    "Client.rows": lambda module: list(module.Client().rows()),
    "Client.of": lambda module: (module.Client.of("x"), module.Client().of("x")),
    "Client.plain": lambda module: (module.Client.plain("x"), module.Client().plain("x")),
    "Client.Inner.get": lambda module: module.Client.Inner().get(),
    "client.get": lambda module: module.client.get("x"),
}


async def result_of(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


@pytest.mark.parametrize("when", ["at once", "at import"])
@pytest.mark.parametrize("path", CALLS)
async def test_each_shape_is_monitored_and_put_back(
    path, when, vendor, monitor, captured_telemetry
):
    """Every shape is monitored, at once or when its module is imported, and put back by undo."""
    call = CALLS[path]
    if when == "at once":
        importlib.import_module(vendor)
    patch = monitor(f"{vendor}:{path}", name="patched", feed="urlhaus")
    module = importlib.import_module(vendor)
    result = await result_of(call(module))
    count = 2 if path in {"Client.of", "Client.plain"} else 1
    operations = captured_telemetry.operations()
    assert [(one.name, one.feed, one.outcome) for one in operations] == [
        ("patched", "urlhaus", "ok")
    ] * count
    patch.undo()
    assert await result_of(call(module)) == result
    assert len(captured_telemetry.operations()) == count


def test_undo_puts_the_very_original_back(vendor, monitor):
    """After undo the module and its classes hold what they held, to the object."""
    module = importlib.import_module(vendor)
    paths = ["fetch", "rows"]
    attributes = ["get", "of", "plain"]
    before = [vars(module)[path] for path in paths]
    before += [vars(module.Client)[name] for name in attributes]
    patches = [monitor(f"{vendor}:{path}") for path in paths]
    patches += [monitor(f"{vendor}:Client.{name}") for name in attributes]
    for patch in patches:
        patch.undo()
    after = [vars(module)[path] for path in paths]
    after += [vars(module.Client)[name] for name in attributes]
    assert all(one is other for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("target", "call", "expected"),
    [
        ("math:sqrt", lambda: sys.modules["math"].sqrt(4), 2.0),
        ("zlib:crc32", lambda: sys.modules["zlib"].crc32(b"x"), 2363233923),
        ("json:dumps", lambda: sys.modules["json"].dumps([1]), "[1]"),
    ],
    ids=lambda it: it if isinstance(it, str) and ":" in it else "",
)
def test_functions_of_the_standard_library(target, call, expected, monitor, captured_telemetry):
    """Built-in functions and those of the standard library can be monitored."""
    importlib.import_module(target.partition(":")[0])
    monitor(target)
    assert call() == expected
    assert captured_telemetry.operation(target.replace(":", ".")).outcome == "ok"


def test_default_name_and_options(vendor, monitor, captured_telemetry):
    """Name, attributes, per-call values and `result=` work as for `monitored`."""
    module = importlib.import_module(vendor)
    monitor(f"{vendor}:fetch", feed=lambda args: args["url"], result=lambda value: value == "bad")
    monitor(f"{vendor}:Client.get", breaker="vendor.example", attributes={"peer": "vendor"})
    module.fetch("bad")
    module.Client().get("x")
    fetch, get = captured_telemetry.operations()
    assert (fetch.name, fetch.feed, fetch.outcome) == (f"{vendor}.fetch", "bad", "error")
    assert (get.name, get.attributes["peer"]) == ("Client.get", "vendor")
    assert get.attributes["circuit_breaker.name"] == "vendor.example"


def test_an_exception_is_recorded_and_raised(vendor, monitor, captured_telemetry):
    """What the function raises is recorded and reaches the caller."""
    module = importlib.import_module(vendor)
    monitor(f"{vendor}:fail", name="fail")
    with pytest.raises(LookupError, match="gone"):
        module.fail()
    assert captured_telemetry.operation("fail").error_type == "LookupError"


def test_looks_like_the_original(vendor, monitor):
    """A patched function answers the questions of `inspect` as the original did."""
    module = importlib.import_module(vendor)
    originals = {name: getattr(module, name) for name in ("fetch", "afetch", "rows", "arows")}
    questions = [inspect.isfunction, inspect.iscoroutinefunction]
    questions += [inspect.isgeneratorfunction, inspect.isasyncgenfunction]
    for name, original in originals.items():
        monitor(f"{vendor}:{name}")
        patched = getattr(module, name)
        assert patched is not original
        assert [ask(patched) for ask in questions] == [ask(original) for ask in questions]
        assert inspect.signature(patched) == inspect.signature(original)
        assert (patched.__name__, patched.__doc__) == (original.__name__, original.__doc__)


def test_generators_are_forwarded(vendor, monitor, captured_telemetry):
    """A patched generator gives its return value and is ok when it is closed early."""
    module = importlib.import_module(vendor)
    monitor(f"{vendor}:rows", name="rows")
    generator = module.rows(1)
    assert next(generator) == 0
    with pytest.raises(StopIteration) as stop:
        next(generator)
    assert stop.value.value == "done"
    closed = module.rows(2)
    next(closed)
    closed.close()
    assert [one.outcome for one in captured_telemetry.operations("rows")] == ["ok", "ok"]


# --- inherited methods ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["get", "of", "plain"])
def test_an_inherited_method_is_monitored_in_the_subclass_alone(
    name, vendor, monitor, captured_telemetry
):
    """Monitoring a method that a class inherits leaves the base alone; undo leaves no trace."""
    module = importlib.import_module(vendor)
    patch = monitor(f"{vendor}:Sub.{name}", name="sub")
    expected = "x" if name == "plain" else "sub x"
    assert getattr(module.Sub(), name)("x") == expected
    assert getattr(module.Client(), name)("x") == expected.replace("sub", "client")
    assert len(captured_telemetry.operations()) == 1
    patch.undo()
    assert name not in vars(module.Sub)
    assert getattr(module.Sub(), name)("x") == expected
    assert len(captured_telemetry.operations()) == 1


def test_a_base_method_is_monitored_in_subclasses_too(vendor, monitor, captured_telemetry):
    """Monitoring a method of a base class reaches the subclasses that inherit it."""
    module = importlib.import_module(vendor)
    monitor(f"{vendor}:Client.of", name="of")
    assert module.Sub.of("x") == "sub x"
    assert captured_telemetry.operation("of").outcome == "ok"


# --- twice, undone, patched over -----------------------------------------------------------------


@pytest.mark.parametrize("when", ["at once", "at import"])
def test_twice_is_once(when, vendor, monitor, captured_telemetry):
    """Asking twice for the same function monitors it once, and one undo is enough."""
    if when == "at once":
        importlib.import_module(vendor)
    first, second = (monitor(f"{vendor}:fetch", name="fetch") for _ in range(2))
    module = importlib.import_module(vendor)
    module.fetch("u")
    assert len(captured_telemetry.operations()) == 1
    second.undo()
    first.undo()
    module.fetch("u")
    assert len(captured_telemetry.operations()) == 1


def test_undo_is_idempotent_and_can_be_done_again(vendor, monitor, captured_telemetry):
    """A function can be monitored anew after undo; a second undo of the first changes nothing."""
    module = importlib.import_module(vendor)
    first = monitor(f"{vendor}:fetch", name="first")
    first.undo()
    monitor(f"{vendor}:fetch", name="second")
    first.undo()
    module.fetch("u")
    assert [one.name for one in captured_telemetry.operations()] == ["second"]


def test_undone_before_the_import(vendor, monitor, captured_telemetry):
    """What is undone before its module is imported is never monitored, unless asked for anew."""
    monitor(f"{vendor}:fetch", name="first").undo()
    monitor(f"{vendor}:rows", name="rows").undo()
    monitor(f"{vendor}:rows", name="again")
    module = importlib.import_module(vendor)
    module.fetch("u")
    list(module.rows(1))
    assert [one.name for one in captured_telemetry.operations()] == ["again"]


def test_as_a_context_manager(vendor, captured_telemetry):
    """In a `with` statement the function is monitored in the block alone, also if it raises."""
    module = importlib.import_module(vendor)
    original = module.fetch
    target = f"{vendor}:fetch"
    with contextlib.suppress(LookupError), periscope.monitor_function(target, name="fetch"):
        module.fetch("u")
        raise LookupError
    assert module.fetch is original
    assert len(captured_telemetry.operations()) == 1


def test_patched_over_by_somebody_else(vendor, monitor, captured_telemetry):
    """Undo leaves a patch that others put over ours in place, and ours inside it without effect."""
    module = importlib.import_module(vendor)
    patch = monitor(f"{vendor}:fetch", name="fetch")
    ours = module.fetch

    def theirs(*args, **kwargs):
        return f"theirs {ours(*args, **kwargs)}"

    module.fetch = theirs
    assert module.fetch("u") == "theirs u"
    assert len(captured_telemetry.operations()) == 1
    patch.undo()
    assert module.fetch is theirs
    assert module.fetch("u") == "theirs u"
    assert len(captured_telemetry.operations()) == 1


def test_patched_over_and_monitored_again(vendor, monitor, captured_telemetry):
    """After an undo under somebody else's patch the function can be monitored again, once."""
    module = importlib.import_module(vendor)
    patch = monitor(f"{vendor}:fetch", name="first")
    ours = module.fetch
    module.fetch = functools.partial(ours)
    patch.undo()
    monitor(f"{vendor}:fetch", name="second")
    assert module.fetch("u") == "u"
    assert [one.name for one in captured_telemetry.operations()] == ["second"]


def test_two_patches_undone_in_any_order(vendor, monitor, captured_telemetry):
    """Patches of different functions of one module are undone independently."""
    module = importlib.import_module(vendor)
    first, second = monitor(f"{vendor}:fetch", name="a"), monitor(f"{vendor}:rows", name="b")
    first.undo()
    module.fetch("u")
    list(module.rows(1))
    second.undo()
    list(module.rows(1))
    assert [one.name for one in captured_telemetry.operations()] == ["b"]


# --- bad targets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["", "vendor", "vendor:", ":fetch", "vendor.fetch"])
def test_a_target_of_the_wrong_form(target):
    """A target that does not name module and function is a ValueError that shows the form."""
    with pytest.raises(ValueError, match=r"package\.module:Class\.method"):
        periscope.monitor_function(target)


@pytest.mark.parametrize("path", ["nothing", "Nothing.get", "Client.nothing", "fetch.nothing"])
def test_a_missing_attribute_of_an_imported_module(path, vendor, captured_telemetry):
    """What an imported module does not have is an AttributeError that names the target."""
    module = importlib.import_module(vendor)
    for _ in range(2):
        with pytest.raises(AttributeError, match=f"{vendor}:{path}"):
            periscope.monitor_function(f"{vendor}:{path}")
    assert module.fetch("u") == "u"
    assert captured_telemetry.spans == []


@pytest.mark.parametrize("path", ["Client", "Client.number", "Client.prop", "client"])
def test_what_is_no_function_is_refused(path, vendor):
    """A class, a property or a value is a TypeError, and is left as it was."""
    module = importlib.import_module(vendor)
    client, prop = module.Client, vars(module.Client)["prop"]
    with pytest.raises(TypeError):
        periscope.monitor_function(f"{vendor}:{path}")
    assert module.Client is client
    assert vars(client)["prop"] is prop


def test_a_method_of_a_built_in_type_is_refused():
    """A method of a type that Python forbids to change is a TypeError."""
    with pytest.raises(TypeError):
        periscope.monitor_function("builtins:dict.get")
    assert {1: 2}.get(1) == 2


@pytest.mark.parametrize("path", ["nothing", "Client.nothing", "Client", "Client.prop"])
def test_a_bad_target_does_not_break_the_import(path, vendor, monitor, caplog):
    """What cannot be monitored when its module is imported is logged; the import goes on."""
    monitor(f"{vendor}:{path}")
    with caplog.at_level(logging.WARNING):
        module = importlib.import_module(vendor)
    assert module.fetch("u") == "u"
    assert any(f"{vendor}:{path}" in line for line in caplog.messages)


def test_a_module_that_is_never_imported_is_nothing(monitor):
    """A target in a module that does not exist waits, without an error, and can be undone."""
    patch = monitor("vendor_that_does_not_exist:fetch")
    patch.undo()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("vendor_that_does_not_exist")
