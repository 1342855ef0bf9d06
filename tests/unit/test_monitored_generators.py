"""The contracts of `@monitored` on generators: forwarding, context, time, endings."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import inspect
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.context import get_current
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

import periscope_otel as periscope
from periscope_otel.telemetry.current import current, telemetry_on
from periscope_otel.telemetry.worker import worker
from periscope_otel.testing import CapturedTelemetry, capture_telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.sdk.trace import ReadableSpan

DURATION = "threat.ingest.operation.duration"
CONSUMER = "threat.ingest.consumer.duration"


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def where() -> tuple[Any, str]:
    """Return what is current: OpenTelemetry's context, and the operation (also without an SDK)."""
    return get_current(), periscope.current_operation().name


def own_seconds(captured: CapturedTelemetry, name: str) -> float:
    """Return the sum of the durations recorded for an operation."""
    return sum(
        point.sum
        for metric in captured._metrics()
        if metric.name == DURATION
        for point in metric.data.data_points
        if point.attributes["threat.ingest.operation.name"] == name
    )


class LockTaker(SpanProcessor):
    """Takes a lock that is not reentrant, as exporters and instruments of the SDK do."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holder: int | None = None
        self.deadlocks = 0
        self.ended: list[str] = []

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self.lock:
            self.holder = threading.get_ident()
            yield
            self.holder = None

    def on_end(self, span: ReadableSpan) -> None:
        if threading.get_ident() == self.holder:
            self.deadlocks += 1  # a real lock would be waited for forever
            return
        with self.lock:
            self.ended.append(str((span.attributes or {})["threat.ingest.outcome"]))


@pytest.fixture
def lock_taker(monkeypatch: pytest.MonkeyPatch) -> Iterator[LockTaker]:
    """Telemetry whose span processor is a LockTaker."""
    processor = LockTaker()
    tracer_provider = TracerProvider(shutdown_on_exit=False)
    tracer_provider.add_span_processor(processor)
    meter_provider = MeterProvider(shutdown_on_exit=False)
    monkeypatch.setattr(current, "telemetry", telemetry_on(tracer_provider, meter_provider))
    yield processor
    monkeypatch.undo()
    worker.finish_posted(30)
    tracer_provider.shutdown()
    meter_provider.shutdown()


@periscope.monitored("count")
def count(number: int = 3) -> Iterator[int]:
    yield from range(number)


# --- forwarding: the same as the undecorated twin ------------------------------------------------

ACTIONS = ["pass on", "swallow", "replace", "return", "raise", "raise stop", "exit raises"]
STUBBORN = [*ACTIONS, "ignore all"]
THROWN = [ValueError, KeyError, StopIteration, StopAsyncIteration, KeyboardInterrupt, SystemExit]


def scripted(script: list[str], log: list[Any]) -> Iterator[int]:  # noqa: C901
    """Yield once for each action; the action is what happens at that yield."""
    log.append("begun")
    for number, action in enumerate(script):
        try:
            log.append((yield number))
        except GeneratorExit:
            log.append("exit")
            if action == "exit raises":
                raise OSError(number) from None
            if action == "return":
                return number
            if action != "ignore all":
                raise
        except BaseException as error:
            log.append(repr(error))
            if action == "replace":
                raise LookupError(number) from error
            if action == "return":
                return number
            if action not in {"swallow", "ignore all"}:
                raise
        if action == "raise":
            raise LookupError(number)
        if action == "raise stop":
            raise StopIteration(number)  # noqa: PLR1708
    return len(script)


def run_command(generator: Any, command: str, value: Any) -> tuple[Any, ...]:
    """Do one thing to a generator; return all that can be told of how it went."""
    try:
        if command == "close":
            return ("closed", generator.close())
        argument = value(command) if command == "throw" else value
        return ("yielded", getattr(generator, command)(argument))
    except StopIteration as stop:
        return ("stopped", stop.value, type(stop.__cause__))
    except BaseException as error:
        return (repr(error), type(error.__cause__), error.__suppress_context__)


def run_program(generator: Any, program: list[tuple[str, Any]]) -> list[Any]:
    """Run a program and then close until the generator is at its end."""
    before = where()
    results: list[Any] = []
    for command, value in [*program, *[("close", None)] * 12]:
        results.append(run_command(generator, command, value))
        results.append(inspect.getgeneratorstate(generator))
    assert where() == before
    return results


def programs(thrown: list[type[BaseException]]) -> st.SearchStrategy[list[tuple[str, Any]]]:
    command = st.one_of(
        st.tuples(st.just("send"), st.sampled_from([None, None, 1])),
        st.tuples(st.just("throw"), st.sampled_from(thrown)),
        st.just(("close", None)),
    )
    # Mostly something has been yielded before the rest happens.
    return st.lists(command, max_size=8).flatmap(
        lambda rest: st.sampled_from([rest, [("send", None), *rest]])
    )


def assert_like_its_twin(script: list[str], program: list[tuple[str, Any]]) -> None:
    """Run decorated and undecorated, with and without telemetry; compare everything."""
    decorated = periscope.monitored("scripted")(scripted)
    expected_log: list[Any] = []
    expected = run_program(scripted(script, expected_log), program)
    log: list[Any] = []
    assert run_program(decorated(script, log), program) == expected
    assert log == expected_log
    with capture_telemetry() as captured:
        log = []
        assert run_program(decorated(script, log), program) == expected
        assert log == expected_log
        assert len(captured.operations("scripted")) == ("begun" in log)
        assert captured.metric("threat.ingest.operation.active") == 0


@settings(deadline=None)
@given(st.lists(st.sampled_from(ACTIONS), max_size=5), programs(THROWN))
@example(["return"], [("send", None), ("close", None), ("send", None)])
@example(["raise stop"], [("send", None), ("send", None)])
@example([], [("send", 1), ("send", None)])
def test_any_program_goes_as_with_the_twin(script, program):
    """Any sequence of send, throw and close gives what it gives undecorated, step by step."""
    assert_like_its_twin(script, program)


@settings(deadline=None)
@given(st.lists(st.sampled_from(ACTIONS), max_size=5), programs([GeneratorExit, ValueError]))
@example(["return"], [("send", None), ("throw", GeneratorExit)])
def test_a_thrown_generator_exit_goes_as_with_the_twin(script, program):
    """GeneratorExit that is thrown in, rather than by close, reaches the body like any other."""
    assert_like_its_twin(script, program)


@settings(deadline=None)
@given(st.lists(st.sampled_from(STUBBORN), max_size=5), programs([*THROWN, GeneratorExit]))
@example(["ignore all"] * 2, [("send", None), ("close", None), ("send", 1)])
@example(["ignore all"] * 2, [("send", None), ("throw", GeneratorExit), ("send", 1)])
def test_a_body_that_ignores_its_exit_goes_as_with_the_twin(script, program):
    """A body that yields when it is closed is refused and lives on, as it does undecorated."""
    assert_like_its_twin(script, program)


def test_a_thrown_exception_is_the_very_same(captured_telemetry):
    """What the consumer throws arrives in the body as the same object, and leaves as it."""
    seen: list[BaseException] = []

    @periscope.monitored("session")
    def session():
        try:
            yield
        except ValueError as error:
            seen.append(error)
            raise

    generator, error = session(), ValueError("bad")
    next(generator)
    with pytest.raises(ValueError, match="bad") as raised:
        generator.throw(error)
    assert seen == [error]
    assert raised.value is error
    assert captured_telemetry.operation("session").error_type == "ValueError"


def test_a_running_generator_cannot_be_resumed(captured_telemetry):
    """Resuming it from its own body is the same ValueError as undecorated."""

    @periscope.monitored("loop")
    def loop():
        with pytest.raises(ValueError, match="already executing"):
            next(generator)
        yield 1

    generator = loop()
    assert list(generator) == [1]
    assert captured_telemetry.operation("loop").outcome == "ok"


def test_yield_from_gets_the_return_value(captured_telemetry):
    """A decorated generator can be delegated to, nested in another decorated one."""

    @periscope.monitored("inner")
    def inner():
        got = yield 1
        return got

    @periscope.monitored("outer")
    def outer():
        return (yield from inner())

    generator = outer()
    assert next(generator) == 1
    with pytest.raises(StopIteration) as stop:
        generator.send("sent")
    assert stop.value.value == "sent"
    assert captured_telemetry.operation("inner").is_child_of(captured_telemetry.operation("outer"))


@pytest.mark.parametrize("error", [None, KeyError("id")], ids=["ok", "error"])
def test_as_a_context_manager(error, captured_telemetry):
    """`contextlib.contextmanager` over a decorated generator works and sees its exceptions."""

    @contextlib.contextmanager
    @periscope.monitored("session")
    def session():
        yield "connection"

    with contextlib.suppress(KeyError), session() as connection:
        assert connection == "connection"
        if error:
            raise error
    assert captured_telemetry.operation("session").outcome == ("error" if error else "ok")


# --- context -------------------------------------------------------------------------------------


def test_attached_only_while_the_body_runs(captured_telemetry):
    """In the body the operation is current; in the consumer's loop nothing of it is."""
    before = where()

    @periscope.monitored("parse", feed="misp")
    def parse():
        for number in range(3):
            assert periscope.current_operation().name == "parse"
            with periscope.operation("body"):
                yield_to_consumer = number
            yield yield_to_consumer

    for _ in parse():
        assert where() == before
        assert not trace.get_current_span().get_span_context().is_valid
        with periscope.operation("consume"):
            pass
    assert where() == before
    parsed = captured_telemetry.operation("parse")
    assert all(one.is_child_of(parsed) for one in captured_telemetry.operations("body"))
    consumed = captured_telemetry.operations("consume")
    assert [(one.span.parent, one.feed) for one in consumed] == [(None, None)] * 3


def test_child_of_where_it_is_first_iterated(captured_telemetry):
    """The generator's operation belongs to the one that iterates it, and inherits its feed."""
    made = count(1)
    with periscope.operation("outer", feed="otx"):
        list(made)
    assert captured_telemetry.operation("count").is_child_of(captured_telemetry.operation("outer"))
    assert captured_telemetry.operation("count").feed == "otx"


def test_what_the_body_made_current_is_so_after_a_yield(captured_telemetry):
    """An operation that the body holds open across a yield is the current one after it too."""

    @periscope.monitored("parse")
    def parse():
        with periscope.operation("page"):
            yield 1
            assert periscope.current_operation().name == "page"
            with periscope.operation("row"):
                yield 2
        assert periscope.current_operation().name == "parse"

    before = where()
    for _ in parse():
        assert where() == before
    page = captured_telemetry.operation("page")
    assert page.is_child_of(captured_telemetry.operation("parse"))
    assert captured_telemetry.operation("row").is_child_of(page)


def test_what_is_current_without_an_sdk():
    """Without an SDK too, the operation that is current is the body's in it, none outside it."""

    @periscope.monitored("parse")
    def parse():
        yield periscope.current_operation().name
        with periscope.operation("page"):
            yield periscope.current_operation().name
            yield periscope.current_operation().name
        yield periscope.current_operation().name

    before = where()
    seen = []
    for name in parse():
        seen.append(name)
        assert where() == before
    assert seen == ["parse", "page", "page", "parse"]
    assert where() == before


def test_interleaved_generators_do_not_mix(captured_telemetry):
    """Two generators consumed in turn are siblings, each current in its own body alone."""

    @periscope.monitored("feed")
    def feed(name):
        for _ in range(2):
            periscope.current_operation().set_attribute("seen", name)
            yield name

    for pair in zip(feed("a"), feed("b"), strict=True):
        assert pair == ("a", "b")
    assert {one.attributes["seen"] for one in captured_telemetry.operations("feed")} == {"a", "b"}
    assert [one.span.parent for one in captured_telemetry.operations("feed")] == [None, None]


def test_steps_in_different_contexts_and_threads(captured_telemetry, caplog):
    """Each step may run in another context or thread: nothing leaks there, nothing is logged."""
    generator = count(3)
    contexts = [contextvars.copy_context() for _ in range(2)]
    assert [context.run(next, generator) for context in contexts] == [0, 1]
    assert all(not context.run(periscope.current_operation).name for context in contexts)
    thread = threading.Thread(target=lambda: list(generator))
    thread.start()
    thread.join()
    assert captured_telemetry.operation("count").outcome == "ok"
    assert caplog.messages == []


# --- never iterated, dropped, closed -------------------------------------------------------------


@pytest.mark.parametrize("end", ["drop", "close", "throw"])
def test_never_iterated_leaves_nothing(end, captured_telemetry):
    """A generator that is never iterated leaves no span, no count and no context."""
    before = where()
    generator = count()
    if end == "close":
        generator.close()
    elif end == "throw":
        with pytest.raises(KeyError):
            generator.throw(KeyError())
    del generator
    assert where() == before
    assert captured_telemetry.spans == []
    assert captured_telemetry.metric(DURATION) == 0
    assert captured_telemetry.metric("threat.ingest.operation.active") == 0


def drop_last_reference(make: Callable[[], Any]) -> None:
    next(make())


def drop_in_a_cycle(make: Callable[[], Any]) -> None:
    # The collector finalises by age: a collection between the next two lines would let it finalise
    # the body before the generator that runs it, which no wrapper can prevent.
    gc.disable()
    generator = make()
    next(generator)
    cycle = [generator]
    cycle.append(cycle)
    del generator, cycle
    gc.collect()
    gc.enable()


def drop_by_break(make: Callable[[], Any]) -> None:
    for _ in make():
        break


def drop_by_exception(make: Callable[[], Any]) -> None:
    with contextlib.suppress(KeyError):
        for _ in make():
            raise KeyError


def close_early(make: Callable[[], Any]) -> None:
    generator = make()
    next(generator)
    generator.close()
    generator.close()


def drop_elsewhere(make: Callable[[], Any]) -> None:
    box = [make()]
    contextvars.copy_context().run(next, box[0])
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()


DROPS = [drop_last_reference, drop_in_a_cycle, drop_by_break, drop_by_exception]
DROPS += [close_early, drop_elsewhere]
every_drop = pytest.mark.parametrize("drop", DROPS, ids=lambda drop: drop.__name__)


@every_drop
def test_dropped_half_way_is_ok_once(drop, captured_telemetry, caplog):
    """Dropped or closed half-way it settles once, as ok, and its body's clean-up has run."""
    done: list[str] = []

    @periscope.monitored("dropped")
    def dropped():
        try:
            yield from range(3)
        finally:
            done.append(periscope.current_operation().name)

    before = where()
    drop(dropped)
    assert done == ["dropped"]
    assert where() == before
    assert captured_telemetry.operation("dropped").outcome == "ok"
    assert captured_telemetry.operation("dropped").exceptions == []
    assert captured_telemetry.metric(DURATION) == 1
    assert captured_telemetry.metric(DURATION, outcome="ok") == 1
    assert captured_telemetry.metric("threat.ingest.operation.active") == 0
    assert caplog.messages == []


@every_drop
def test_the_finaliser_takes_no_lock_of_the_sdk(drop, lock_taker):
    """Dropped by a thread that is inside the SDK's lock it waits for nothing, and settles later."""
    gc.collect()
    with lock_taker.held():
        drop(count)
        assert lock_taker.ended == []
    assert worker.finish_posted(30)
    assert lock_taker.deadlocks == 0
    assert lock_taker.ended == ["ok"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("drop", [drop_last_reference, drop_in_a_cycle])
def test_an_error_in_the_clean_up_of_a_dropped_one_is_an_error(drop, captured_telemetry):
    """A body that fails while it is finalised has the outcome `error`."""

    @periscope.monitored("parse")
    def parse():
        try:
            yield 1
        finally:
            raise OSError("disk")

    drop(parse)
    assert captured_telemetry.operation("parse").error_type == "OSError"


@pytest.mark.parametrize("end", ["", "import periscope_otel as p; p.configure(); "])
def test_alive_at_the_end_of_the_interpreter(end):
    """A suspended generator that lives until the interpreter ends makes no noise."""
    code = f"""if True:
        import periscope_otel as periscope
        {end}
        @periscope.monitored("count")
        def count():
            try:
                yield 1
            finally:
                print("closed", flush=True)
        generator = count()
        next(generator)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "closed\n")
    assert "Traceback" not in done.stderr
    assert "detach" not in done.stderr


# --- time, errors, memory ------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["exhausted", "closed", "dropped", "raised"])
def test_duration_is_own_time(end):
    """The duration is the body's own time; the consumer's is an attribute of the span."""
    clock = Clock()

    @periscope.monitored("parse")
    def parse():
        for number in range(3):
            clock.advance(1)
            yield number
        clock.advance(0.5)
        if end == "raised":
            raise ValueError("bad")

    with capture_telemetry(clock=clock) as captured:
        generator = parse()
        clock.advance(1000)  # before the first step there is no operation
        for number in range(2 if end in {"closed", "dropped"} else 3):
            assert next(generator) == number
            clock.advance(10)
        if end == "closed":
            generator.close()
        elif end == "dropped":
            del generator
        else:
            with contextlib.suppress(ValueError):
                assert list(generator) == []
        early = end in {"closed", "dropped"}
        assert own_seconds(captured, "parse") == (2 if early else 3.5)
        assert captured.operation("parse").attributes[CONSUMER] == (20 if early else 30)


def test_an_error_in_the_body_is_an_error(captured_telemetry):
    """An exception of the body ends the operation as an error, recorded once."""

    @periscope.monitored("parse")
    def parse():
        yield 1
        raise ValueError("bad")

    generator = parse()
    assert next(generator) == 1
    with pytest.raises(ValueError, match="bad"):
        next(generator)
    assert list(generator) == []
    operation = captured_telemetry.operation("parse")
    assert (operation.outcome, operation.error_type) == ("error", "ValueError")
    assert len(operation.exceptions) == 1


@pytest.mark.parametrize("parse", [count.__wrapped__, count], ids=["undecorated", "decorated"])
def test_an_exception_leaves_no_cycle(parse, captured_telemetry):
    """An exception thrown into a generator is freed with its last reference, without gc."""

    class MarkedError(ValueError):
        pass

    generator = parse()
    next(generator)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(MarkedError):
            generator.throw(MarkedError())
        # By its type: `isinstance` asks proxies, of which some that others made are dead.
        assert not any(type(one) is MarkedError for one in gc.get_objects())
    finally:
        gc.enable()
