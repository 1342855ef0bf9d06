"""The contracts of `@monitored`: what it decorates looks, copies and travels as before."""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import copy
import functools
import inspect
import multiprocessing
import pickle
import typing
from dataclasses import dataclass

import pytest

import periscope_otel as periscope


def plain(url: str, /, limit: int = 50, *more: int, since: float | None = None) -> list[str]:
    """Fetch a list."""
    return [url, str(limit), str(more), str(since)]


async def coroutine(url: str, *, limit: int = 5) -> str:
    """Fetch one."""
    return url * limit


def generator(count: int) -> typing.Iterator[int]:
    """Count up."""
    yield from range(count)


async def async_generator(count: int) -> typing.AsyncIterator[int]:
    """Count up, slowly."""
    for number in range(count):
        yield number


ORIGINALS = [plain, coroutine, generator, async_generator]
every_original = pytest.mark.parametrize("original", ORIGINALS, ids=lambda f: f.__name__)
every_use = pytest.mark.parametrize(
    "decorate",
    [periscope.monitored, periscope.monitored("named", feed="urlhaus")],
    ids=["bare", "named"],
)


@periscope.monitored("module.double")
def double(number: int) -> int:
    return 2 * number


@periscope.monitored("module.halve")
def halve(number: int) -> float:
    raise ValueError(f"cannot halve {number}")


@periscope.monitored("module.adouble")
async def adouble(number: int) -> int:
    return 2 * number


@periscope.monitored("module.numbers")
def numbers(count: int) -> typing.Iterator[int]:
    yield from range(count)


@periscope.monitored("module.anumbers")
async def anumbers(count: int) -> typing.AsyncIterator[int]:
    for number in range(count):
        yield number


class Client:
    """One of every kind of method; `o_` marks @monitored outside, `i_` inside."""

    title = "client"

    @periscope.monitored("method")
    def method(self, text: str) -> str:
        """Tell."""
        return f"{self.title} {text}"

    @periscope.monitored("amethod")
    async def amethod(self, text: str) -> str:
        return f"{self.title} {text}"

    @periscope.monitored("gmethod")
    def gmethod(self, text: str) -> typing.Iterator[str]:
        yield f"{self.title} {text}"

    @periscope.monitored("o_class")
    @classmethod
    def o_class(cls, text: str) -> str:
        """Tell of the class."""
        return f"{cls.title} {text}"

    @classmethod
    @periscope.monitored("i_class")
    def i_class(cls, text: str) -> str:
        """Tell of the class."""
        return f"{cls.title} {text}"

    @periscope.monitored("o_static")
    @staticmethod
    def o_static(text: str) -> str:
        """Tell of nobody."""
        return f"static {text}"

    @staticmethod
    @periscope.monitored("i_static")
    def i_static(text: str) -> str:
        """Tell of nobody."""
        return f"static {text}"

    @property
    @periscope.monitored("prop")
    def prop(self) -> str:
        return f"{self.title} prop"


class Urlhaus(Client):
    title = "urlhaus"

    @periscope.monitored("method.sub")
    def method(self, text: str) -> str:
        return f"sub {super().method(text)}"

    @periscope.monitored("o_class.sub")
    @classmethod
    def o_class(cls, text: str) -> str:
        return f"sub {super().o_class(text)}"


METHODS = ["method", "amethod", "gmethod", "o_class", "i_class", "o_static", "i_static"]


# --- looks ---------------------------------------------------------------------------------------


@every_use
@every_original
def test_looks_like_the_original(original, decorate):
    """Names, module, documentation, annotations and signature are the original's."""
    decorated = decorate(original)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        assert getattr(decorated, attribute) == getattr(original, attribute)
    assert inspect.signature(decorated) == inspect.signature(original)
    assert typing.get_type_hints(decorated) == typing.get_type_hints(original)
    assert inspect.unwrap(decorated) is original
    assert inspect.getsource(decorated) == inspect.getsource(original)


@pytest.mark.parametrize(
    "question",
    [
        inspect.isfunction,
        inspect.iscoroutinefunction,
        inspect.isgeneratorfunction,
        inspect.isasyncgenfunction,
    ],
    ids=lambda question: question.__name__,
)
@every_use
@every_original
def test_is_of_the_same_shape(original, question, decorate):
    """The questions of `inspect` are answered as for the original."""
    assert question(decorate(original)) is question(original)


@pytest.mark.parametrize("question", ["iscoroutine", "isgenerator", "isasyncgen"])
@every_original
def test_calls_give_objects_of_the_same_shape(original, question):
    """A call gives a coroutine, a generator or an async generator where the original does."""
    made = [function("3") for function in (original, periscope.monitored(original))]
    answers = [getattr(inspect, question)(one) for one in made]
    names = [(type(one), getattr(one, "__qualname__", None)) for one in made]
    for one in made:
        if inspect.iscoroutine(one):
            one.close()
    assert answers[0] is answers[1]
    assert names[0] == names[1]


@every_original
def test_attributes_of_the_function_are_kept(original):
    """What other decorators have left on a function is there on the decorated one too."""

    @functools.wraps(original)
    def marked(*args, **kwargs):
        return original(*args, **kwargs)

    marked.scope = "ingest"
    assert periscope.monitored(marked).scope == "ingest"


@pytest.mark.parametrize("name", METHODS)
def test_methods_look_like_functions(name):
    """Every kind of method has its own name, qualified name and signature without `self`/`cls`."""
    for owner in (Client(), Urlhaus()):
        method = getattr(owner, name)
        assert method.__name__ == name
        assert list(inspect.signature(method).parameters) == ["text"]
    assert getattr(Client, name).__qualname__ == f"Client.{name}"


def test_class_and_static_methods_stay_such():
    """In the class's dictionary they are classmethod and staticmethod objects in either order."""
    for order in "oi":
        assert type(vars(Client)[f"{order}_class"]) is classmethod
        assert type(vars(Client)[f"{order}_static"]) is staticmethod
        assert getattr(Client, f"{order}_class").__doc__ == "Tell of the class."
        assert getattr(Client, f"{order}_static").__doc__ == "Tell of nobody."


def test_abstract_methods_stay_abstract():
    """An abstract method, decorated in either order, still forbids making the class."""

    class Source(abc.ABC):
        @periscope.monitored("outside")
        @abc.abstractmethod
        def outside(self): ...

        @abc.abstractmethod
        @periscope.monitored("inside")
        def inside(self): ...

    assert Source.__abstractmethods__ == {"outside", "inside"}


# --- calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["method", "o_class", "i_class", "o_static", "i_static"])
def test_methods_are_called_through_instance_and_class(name, captured_telemetry):
    """Every kind of method works through an instance, the class and a subclass, each one span."""
    client, urlhaus = Client(), Urlhaus()
    who = {"method": ("client", "sub urlhaus"), "o_class": ("client", "sub urlhaus")}.get(
        name, ("client", "urlhaus") if "class" in name else ("static", "static")
    )
    results = [getattr(client, name)("x"), getattr(urlhaus, name)("x")]
    assert results == [f"{one} x" for one in who]
    if name == "method":
        assert Client.method(client, text="x") == "client x"
        assert Client.method(urlhaus, "x") == "urlhaus x"
        assert Urlhaus.method(urlhaus, "x") == "sub urlhaus x"
    else:
        assert getattr(Client, name)(text="x") == f"{who[0]} x"
        assert getattr(Urlhaus, name)(text="x") == f"{who[1]} x"
    overridden = 2 if name in {"method", "o_class"} else 0
    calls = 5 if name == "method" else 4
    assert len(captured_telemetry.operations()) == calls + overridden


async def test_coroutine_and_generator_methods(captured_telemetry):
    """Methods that are coroutines or generators are bound and recorded like the others."""
    assert await Urlhaus().amethod("x") == "urlhaus x"
    assert await Client.amethod(Client(), "x") == "client x"
    assert list(Urlhaus().gmethod("x")) == ["urlhaus x"]
    assert [one.name for one in captured_telemetry.operations()] == [
        "amethod",
        "amethod",
        "gmethod",
    ]


def test_a_property_over_a_decorated_function(captured_telemetry):
    """`@property` over `@monitored` reads as any property, each read one span."""
    assert Client().prop == "client prop"
    assert captured_telemetry.operation("prop").outcome == "ok"


async def test_class_and_static_coroutines_and_generators(captured_telemetry):
    """Class and static methods may be coroutines, generators and async generators in any order."""

    class Feed:
        @periscope.monitored("a")
        @classmethod
        async def a(cls):
            return cls

        @staticmethod
        @periscope.monitored("b")
        def b():
            yield 1

        @periscope.monitored("c")
        @staticmethod
        async def c():
            yield 2

    assert await Feed().a() is Feed
    assert list(Feed().b()) == [1]
    assert [one async for one in Feed().c()] == [2]
    assert [one.name for one in captured_telemetry.operations()] == ["a", "b", "c"]


def test_partials(captured_telemetry):
    """A partial can be decorated, named by the function it calls, and is recorded."""
    decorated = periscope.monitored(functools.partial(plain, "u", limit=3))
    assert decorated(since=1.5) == plain("u", limit=3, since=1.5)
    (operation,) = captured_telemetry.operations()
    assert operation.name == f"{__name__.rpartition('.')[2]}.plain"
    assert "limit" in inspect.signature(decorated).parameters


async def test_partials_of_other_shapes(captured_telemetry):
    """A partial of a coroutine or generator function is recorded to its end, not at creation."""
    assert await periscope.monitored("a")(functools.partial(coroutine, "u", limit=2))() == "uu"
    assert list(periscope.monitored("b")(functools.partial(generator, 3))()) == [0, 1, 2]
    made = periscope.monitored("c")(functools.partial(async_generator, 2))()
    assert [one async for one in made] == [0, 1]
    assert [one.name for one in captured_telemetry.operations()] == ["a", "b", "c"]


@dataclass
class Fetcher:
    """A callable object."""

    limit: int

    def __call__(self, url: str) -> str:
        if not url:
            raise ValueError("no url")
        return url * self.limit


class AsyncFetcher:
    async def __call__(self, url: str) -> str:
        await asyncio.sleep(0)
        raise ValueError(url)


class GeneratorFetcher:
    def __call__(self, url: str) -> typing.Iterator[str]:
        yield url
        raise ValueError(url)


class AsyncGeneratorFetcher:
    async def __call__(self, url: str) -> typing.AsyncIterator[str]:
        yield url
        raise ValueError(url)


def test_callable_objects(captured_telemetry):
    """A callable object is decorated by its `__call__` and named by its class."""
    fetch = periscope.monitored(Fetcher(2))
    assert fetch("u") == "uu"
    with pytest.raises(ValueError, match="no url"):
        fetch("")
    assert [one.outcome for one in captured_telemetry.operations()] == ["ok", "error"]
    assert {one.name for one in captured_telemetry.operations()} == {
        f"{__name__.rpartition('.')[2]}.Fetcher"
    }
    assert list(inspect.signature(fetch).parameters) == ["url"]


@pytest.mark.parametrize(
    "fetcher",
    [AsyncFetcher, GeneratorFetcher, AsyncGeneratorFetcher],
    ids=lambda cls: cls.__name__,
)
async def test_callable_objects_of_other_shapes(fetcher, captured_telemetry):
    """An object whose `__call__` is a coroutine or generator function is recorded to its end."""

    async def use(made: typing.Any) -> None:
        if inspect.isgenerator(made):
            list(made)
        elif inspect.isasyncgen(made):
            [one async for one in made]
        else:
            await made

    with pytest.raises(ValueError, match="u"):
        await use(periscope.monitored("fetch")(fetcher())("u"))
    assert captured_telemetry.operation("fetch").outcome == "error"


def test_methods_of_others(captured_telemetry):
    """A method of a built-in type can be decorated, bound to an object or not."""
    found: list[int] = []
    periscope.monitored(found.append)(3)
    assert found == [3]
    assert periscope.monitored(str.upper)("x") == "X"
    assert periscope.monitored(Fetcher(1).__call__)("u") == "u"
    assert [one.outcome for one in captured_telemetry.operations()] == ["ok"] * 3


# --- copies and pickles --------------------------------------------------------------------------

TRAVELLERS = [double, adouble, numbers, anumbers]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", TRAVELLERS, ids=lambda f: f.__name__)
def test_pickles_by_name(function, protocol):
    """A module-level decorated function pickles, by name, to itself."""
    assert pickle.loads(pickle.dumps(function, protocol)) is function


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("function", TRAVELLERS, ids=lambda f: f.__name__)
def test_copies_are_the_function_itself(function, duplicate):
    """Copy and deep copy give the function itself, as for any function, also inside containers."""
    assert duplicate(function) is function
    assert duplicate({"key": [function]}) == {"key": [function]}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
@pytest.mark.parametrize("name", METHODS)
def test_bound_methods_copy_and_pickle(name, duplicate):
    """Methods of every kind, bound to an instance or the class, survive both."""
    for owner in (Client(), Client):
        method = getattr(owner, name)
        duplicated = duplicate(method)
        assert getattr(duplicated, "__func__", duplicated) is getattr(method, "__func__", method)
        assert type(getattr(duplicated, "__self__", None)) is type(
            getattr(method, "__self__", None)
        )


# --- pools ---------------------------------------------------------------------------------------


def test_thread_pool(captured_telemetry):
    """A thread pool runs decorated functions, and each call is counted."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(double, range(20))) == [2 * number for number in range(20)]
        with pytest.raises(ValueError, match="cannot halve 1"):
            pool.submit(halve, 1).result()
    assert len(captured_telemetry.operations("module.double")) == 20
    assert captured_telemetry.operation("module.halve").outcome == "error"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_process_pool(method, captured_telemetry):
    """A process pool gets decorated functions by name, forked or spawned, and their exceptions."""
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        assert list(pool.map(double, range(3))) == [0, 2, 4]
        assert pool.submit(Client().method, "x").result() == "client x"
        assert pool.submit(Client.o_class, "x").result() == "client x"
        with pytest.raises(ValueError, match="cannot halve 1"):
            pool.submit(halve, 1).result()
    assert captured_telemetry.spans == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_pool(method):
    """`multiprocessing.Pool` does too."""
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(double, range(3)) == [0, 2, 4]
        pool.close()
        pool.join()
