"""The contracts of `@monitored`: shapes, names, values per call, endings."""

from __future__ import annotations

import asyncio
import functools
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.context import get_current
from opentelemetry.trace import SpanKind, StatusCode

import periscope_otel as periscope

if TYPE_CHECKING:
    from collections.abc import Callable

DURATION = "threat.ingest.operation.duration"


def step(awaitable: Any) -> Any:
    """Run an awaitable that never waits, without an event loop; return its result."""
    try:
        awaitable.__await__().send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


# One decorated operation named "work" for each shape: called, it does `body()` and is run to its
# end; what it returned or yielded is returned.


def _run_function(body: Callable[[], Any], **options: Any) -> Any:
    @periscope.monitored("work", **options)
    def work() -> Any:
        return body()

    return work()


def _run_coroutine(body: Callable[[], Any], **options: Any) -> Any:
    @periscope.monitored("work", **options)
    async def work() -> Any:
        return body()

    return step(work())


def _run_generator(body: Callable[[], Any], **options: Any) -> Any:
    @periscope.monitored("work", **options)
    def work() -> Any:
        yield body()

    (value,) = work()
    return value


def _run_async_generator(body: Callable[[], Any], **options: Any) -> Any:
    @periscope.monitored("work", **options)
    async def work() -> Any:
        yield body()

    async def first_and_only() -> Any:
        (value,) = [value async for value in work()]
        return value

    return step(first_and_only())


def _run_block(body: Callable[[], Any]) -> Any:
    with periscope.operation("work"):
        return body()


SHAPES = [_run_function, _run_coroutine, _run_generator, _run_async_generator]
every_shape = pytest.mark.parametrize("run", SHAPES, ids=lambda run: run.__name__[5:])
every_shape_and_block = pytest.mark.parametrize(
    "run", [*SHAPES, _run_block], ids=lambda run: run.__name__[5:]
)


def raising(error: BaseException) -> Callable[[], Any]:
    def body() -> Any:
        raise error

    return body


# --- shapes and names ----------------------------------------------------------------------------


@every_shape
def test_each_shape_is_one_operation(run, captured_telemetry):
    """A call of any shape gives its value and is one span and one count, current in its body."""
    assert run(lambda: periscope.current_operation().name) == "work"
    assert captured_telemetry.operation("work").outcome == "ok"
    assert captured_telemetry.operation("work").span.status.status_code is StatusCode.UNSET
    assert len(captured_telemetry.spans) == 1
    assert captured_telemetry.metric(DURATION, operation_name="work", outcome="ok") == 1


@every_shape
def test_works_without_an_sdk(run):
    """Without any SDK a decorated callable does what it did, errors included."""
    assert run(lambda: 7) == 7
    with pytest.raises(LookupError, match="gone"):
        run(raising(LookupError("gone")))
    assert not periscope.current_operation().name


@periscope.monitored
def bare() -> str:
    return "bare"


class Client:
    @periscope.monitored
    def fetch(self) -> str:
        return "fetched"

    @periscope.monitored()
    async def pull(self) -> str:
        return "pulled"


def test_bare_use_names_by_the_last_two_parts(captured_telemetry):
    """Without a name an operation is called by the last two parts of module and qualified name."""
    bare()
    Client().fetch()
    step(Client().pull())
    assert [one.name for one in captured_telemetry.operations()] == [
        f"{__name__.rpartition('.')[2]}.bare",
        "Client.fetch",
        "Client.pull",
    ]


def test_name_is_positional_or_keyword(captured_telemetry):
    """The name is given as first argument or as `name=`."""
    periscope.monitored("one")(lambda: None)()
    periscope.monitored(name="two")(lambda: None)()
    assert [one.name for one in captured_telemetry.operations()] == ["one", "two"]


def test_name_given_twice_is_refused():
    """Both ways of giving the name at once are a TypeError."""
    with pytest.raises(TypeError, match="name"):
        periscope.monitored("one", name="two")


def test_span_kind_and_attributes(captured_telemetry):
    """The span has the kind and the attributes that were given, and INTERNAL without a kind."""
    periscope.monitored("a", kind=SpanKind.CLIENT, attributes={"peer": "x", "n": 3})(lambda: 0)()
    periscope.monitored("b")(lambda: None)()
    a, b = captured_telemetry.operations()
    assert (a.attributes["peer"], a.attributes["n"]) == ("x", 3)
    assert a.span.kind is SpanKind.CLIENT
    assert b.span.kind is SpanKind.INTERNAL


def test_given_attributes_do_not_replace_the_operations_own(captured_telemetry):
    """An attribute of the user's under one of our names does not falsify the operation."""
    forged = {"threat.ingest.outcome": "error", "threat.ingest.operation.name": "forged"}
    periscope.monitored("real", attributes=forged)(lambda: None)()
    assert captured_telemetry.operation("real").outcome == "ok"


def test_unset_attributes_are_left_out(captured_telemetry):
    """What is not known, such as the feed or the error type, is no attribute at all."""
    periscope.monitored("plain")(lambda: None)()
    assert set(captured_telemetry.operation("plain").attributes) == {
        "threat.ingest.operation.name",
        "threat.ingest.outcome",
    }
    (labels,) = captured_telemetry.label_sets(DURATION)
    assert set(labels) == {"threat.ingest.operation.name", "threat.ingest.outcome"}


def test_two_functions_under_one_name_warn_once(caplog):
    """A second function under a name is warned about, a third is not again."""
    with caplog.at_level(logging.WARNING):
        kept = [
            periscope.monitored("twice.given")(function)
            for function in (Client.__init__, raising, step)
        ]
    assert len(kept) == 3
    assert len([line for line in caplog.messages if "twice.given" in line]) == 1


# --- values per call -----------------------------------------------------------------------------


@every_shape
def test_values_are_worked_out_for_each_call(run, captured_telemetry):
    """Feed, breaker and name may be callables, asked anew at each call of any shape."""
    feeds = iter(["urlhaus", "threatfox"])
    for _ in range(2):
        run(lambda: None, feed=lambda _args: next(feeds), breaker=lambda _args: "abuse.ch")
    assert [one.feed for one in captured_telemetry.operations("work")] == ["urlhaus", "threatfox"]
    assert {one.attributes["circuit_breaker.name"] for one in captured_telemetry.operations()} == {
        "abuse.ch"
    }
    assert captured_telemetry.metric(DURATION, feed_name="threatfox") == 1


def test_callables_get_the_bound_arguments(captured_telemetry):
    """The callables get every parameter by name: defaults, extras and `self` included."""
    seen: list[dict[str, Any]] = []

    class Taxii:
        @periscope.monitored(name=lambda args: seen.append(args) or "pull")
        def pull(self, url, /, limit=50, *more, since=None, **extra):
            return url

    taxii = Taxii()
    taxii.pull("u")
    taxii.pull("u", 1, 2, 3, since=4, other=5)
    assert [one.name for one in captured_telemetry.operations()] == ["pull", "pull"]
    assert seen[0] == {
        "self": taxii, "url": "u", "limit": 50, "more": (), "since": None, "extra": {}
    }  # fmt: skip
    assert seen[1] == {
        "self": taxii, "url": "u", "limit": 1, "more": (2, 3), "since": 4, "extra": {"other": 5}
    }  # fmt: skip


def test_callables_get_cls_of_a_class_method(captured_telemetry):
    """In a class method, in either decorator order, the bound arguments hold the class itself."""

    class Feed:
        title = "base"

        @periscope.monitored("a", feed=lambda args: args["cls"].title)
        @classmethod
        def a(cls):
            pass

        @classmethod
        @periscope.monitored("b", feed=lambda args: args["cls"].title)
        def b(cls):
            pass

    class Urlhaus(Feed):
        title = "urlhaus"

    Urlhaus.a()
    Urlhaus().b()
    assert [one.feed for one in captured_telemetry.operations()] == ["urlhaus", "urlhaus"]


def test_changing_the_bound_arguments_changes_nothing(captured_telemetry):
    """A callable that empties what it gets does not change what the function gets."""
    keep = periscope.monitored("keep", feed=lambda args: args.clear())(lambda a, b=2: (a, b))
    assert keep(1) == (1, 2)
    assert captured_telemetry.operation("keep").feed is None


@pytest.mark.parametrize("what", ["name", "feed", "breaker"])
def test_a_callable_that_raises_does_not_break_the_call(what, captured_telemetry, caplog):
    """An error in such a callable is logged; the call goes on and is recorded."""
    fetch = periscope.monitored(**{what: lambda args: args["nothing"]})(lambda: "value")
    assert fetch() == "value"
    assert len(captured_telemetry.operations()) == 1
    assert any(what in line for line in caplog.messages)


def test_arguments_that_do_not_fit_raise_what_the_function_raises(captured_telemetry):
    """A call with wrong arguments raises the function's own TypeError and asks no callable."""

    def fetch(url):
        return url

    decorated = periscope.monitored("fetch", feed=lambda _args: pytest.fail("asked"))(fetch)
    with pytest.raises(TypeError) as expected:
        fetch()
    with pytest.raises(TypeError) as actual:
        decorated()
    assert str(actual.value) == str(expected.value)
    assert captured_telemetry.operation("fetch").error_type == "TypeError"


# --- nesting -------------------------------------------------------------------------------------


@every_shape
def test_nested_operations_are_children_and_inherit_the_feed(run, captured_telemetry):
    """An operation inside another is its child span and has its feed, unless it names its own."""

    def body():
        with periscope.operation("inner"), periscope.operation("own", feed="misp"):
            pass

    run(body, feed="urlhaus")
    work, inner, own = map(captured_telemetry.operation, ("work", "inner", "own"))
    assert (work.feed, inner.feed, own.feed) == ("urlhaus", "urlhaus", "misp")
    assert inner.is_child_of(work)
    assert own.is_child_of(inner)
    assert captured_telemetry.metric(DURATION, operation_name="inner", feed_name="urlhaus") == 1


def test_a_feed_callable_that_gives_none_inherits(captured_telemetry):
    """A callable that knows no feed leaves the enclosing operation's."""
    inner = periscope.monitored("inner", feed=lambda args: args["feed"])(lambda feed: None)
    with periscope.operation("outer", feed="urlhaus"):
        inner(None)
    assert captured_telemetry.operation("inner").feed == "urlhaus"


async def test_the_operation_crosses_tasks(captured_telemetry):
    """A task begun inside an operation has it as its enclosing one."""
    child = periscope.monitored("child")(asyncio.sleep)

    @periscope.monitored("parent", feed="otx")
    async def parent():
        await asyncio.gather(*(child(0) for _ in range(3)))

    await parent()
    operation = captured_telemetry.operation("parent")
    children = captured_telemetry.operations("child")
    assert len(children) == 3
    assert all(one.is_child_of(operation) and one.feed == "otx" for one in children)


# --- result= -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "outcome", "error_type"),
    [
        (False, "ok", None),
        (None, "ok", None),
        ("quota used up", "error", "_OTHER"),
        (ValueError("bad"), "error", "ValueError"),
        (TimeoutError(), "timeout", "TimeoutError"),
    ],
)
@pytest.mark.parametrize("run", [_run_function, _run_coroutine], ids=["function", "coroutine"])
def test_result_decides_of_the_returned_value(
    run, verdict, outcome, error_type, captured_telemetry
):
    """What `result=` answers of a returned value decides; the value itself is returned."""
    value = object()
    asked: list[object] = []
    assert run(lambda: value, result=lambda it: asked.append(it) or verdict) is value
    assert asked == [value]
    assert captured_telemetry.operation("work").outcome == outcome
    assert captured_telemetry.operation("work").error_type == error_type


def test_result_true_looks_at_a_response(captured_telemetry):
    """A plain true answer about an HTTP response makes its status the error type."""
    fetch = periscope.monitored("fetch", result=lambda r: not r.ok)(
        lambda: SimpleNamespace(ok=False, status_code=503, headers={})
    )
    fetch()
    assert captured_telemetry.operation("fetch").outcome == "error"
    assert captured_telemetry.operation("fetch").error_type == "503"
    assert captured_telemetry.metric(DURATION, error_type="503") == 1


def test_result_judges_what_a_generator_returns(captured_telemetry):
    """For a generator the value it returns at its end is judged."""

    @periscope.monitored("parse", result=lambda errors: errors > 0)
    def parse():
        yield 1
        return 3

    assert list(parse()) == [1]
    assert captured_telemetry.operation("parse").outcome == "error"


def test_a_result_that_raises_does_not_break_the_call(captured_telemetry, caplog):
    """An error in the predicate is logged, and the call counts as it ended."""
    fetch = periscope.monitored("fetch", result=lambda value: value.nothing)(lambda: 1)
    assert fetch() == 1
    assert captured_telemetry.operation("fetch").outcome == "ok"
    assert any("result=" in line for line in caplog.messages)


# --- what is refused -----------------------------------------------------------------------------


class _Stored:
    @property
    def score(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (_Stored, "not classes.*_Stored"),
        (type, "not classes"),
        (classmethod(_Stored), "not classes"),
        (_Stored.score, "@property"),
        (functools.cached_property(lambda self: 1), "property"),
        (5, "not 5"),
        (_Stored(), "not <"),
    ],
    ids=["class", "metaclass", "classmethod of class", "property", "cached", "number", "object"],
)
@pytest.mark.parametrize("decorate", [periscope.monitored, periscope.monitored("x")])
def test_what_is_no_function_is_refused(target, message, decorate):
    """A class, a property or something not callable is a TypeError that says what to do."""
    with pytest.raises(TypeError, match=message):
        decorate(target)


# --- endings -------------------------------------------------------------------------------------

ENDINGS = [
    (asyncio.CancelledError(), "cancelled", None),
    (GeneratorExit(), "cancelled", None),
    (KeyboardInterrupt(), "cancelled", None),
    (SystemExit(0), "ok", None),
    (SystemExit(), "ok", None),
    (SystemExit(3), "error", "SystemExit"),
    (TimeoutError("slow"), "timeout", "TimeoutError"),
    (ValueError("bad"), "error", "ValueError"),
]


@pytest.mark.parametrize(("error", "outcome", "error_type"), ENDINGS, ids=repr)
@every_shape_and_block
def test_every_ending_has_its_outcome(run, error, outcome, error_type, captured_telemetry):
    """Span and metric say how a call ended, and cancellation is never an error."""
    before = get_current()
    with pytest.raises(type(error)) as raised:
        run(raising(error))
    assert raised.value is error
    assert get_current() == before
    operation = captured_telemetry.operation("work")
    assert (operation.outcome, operation.error_type) == (outcome, error_type)
    failed = error_type is not None
    assert (operation.span.status.status_code is StatusCode.ERROR) == failed
    assert len(operation.exceptions) == failed
    assert captured_telemetry.metric(DURATION) == 1
    assert captured_telemetry.metric(DURATION, outcome=outcome) == 1
    assert captured_telemetry.metric(DURATION, error_type=error_type or "") == failed
    assert captured_telemetry.metric("threat.ingest.operation.active", operation_name="work") == 0


async def test_a_cancelled_task_is_cancelled_and_its_timeout_is_a_timeout(captured_telemetry):
    """Inside `asyncio.timeout` the cancelled operation is `cancelled`, the outer one `timeout`."""

    @periscope.monitored("inner")
    async def inner():
        await asyncio.Event().wait()

    @periscope.monitored("outer")
    async def outer():
        async with asyncio.timeout(0):
            await inner()

    with pytest.raises(TimeoutError):
        await outer()
    assert captured_telemetry.operation("inner").outcome == "cancelled"
    assert captured_telemetry.operation("outer").outcome == "timeout"


def test_an_exception_is_recorded_once_at_the_innermost(captured_telemetry):
    """Through four nested operations an exception is recorded by the innermost alone."""

    def nest(depth: int) -> None:
        with periscope.operation(f"level{depth}"):
            if depth == 4:
                raise ValueError("bad")
            nest(depth + 1)

    with pytest.raises(ValueError, match="bad"):
        nest(1)
    levels = [captured_telemetry.operation(f"level{depth}") for depth in (1, 2, 3, 4)]
    assert [len(one.exceptions) for one in levels] == [0, 0, 0, 1]
    assert {one.outcome for one in levels} == {"error"}
    assert {one.error_type for one in levels} == {"ValueError"}
    assert {one.span.status.status_code for one in levels} == {StatusCode.ERROR}
    (event,) = levels[-1].exceptions
    assert event.attributes["exception.type"] == "ValueError"
    assert event.attributes["exception.message"] == "bad"
    assert "nest" in event.attributes["exception.stacktrace"]


def test_an_exception_is_recorded_once_through_mixed_shapes(captured_telemetry):
    """The same holds where the four levels are a function, a coroutine and both generators."""

    def innermost():
        return _run_function(raising(OSError("disk")))

    with pytest.raises(OSError, match="disk"):
        _run_generator(lambda: _run_async_generator(lambda: _run_coroutine(innermost)))
    operations = captured_telemetry.operations("work")
    assert [len(one.exceptions) for one in operations] == [1, 0, 0, 0]


def test_an_exception_that_replaces_another_is_recorded_too(captured_telemetry):
    """A new exception raised from another is recorded by the operation that raised it."""

    @periscope.monitored("outer")
    def outer():
        try:
            _run_function(raising(KeyError("id")))
        except KeyError as error:
            raise ValueError("not STIX") from error

    with pytest.raises(ValueError, match="STIX"):
        outer()
    types = [
        event.attributes["exception.type"]
        for one in captured_telemetry.operations()
        for event in one.exceptions
    ]
    assert types == ["KeyError", "ValueError"]


def test_an_exception_that_is_handled_leaves_the_outer_operation_ok(captured_telemetry):
    """An operation whose inner one failed is ok if it dealt with the exception."""

    @periscope.monitored("outer")
    def outer():
        with pytest.raises(KeyError):
            _run_function(raising(KeyError()))

    outer()
    assert captured_telemetry.operation("outer").outcome == "ok"
