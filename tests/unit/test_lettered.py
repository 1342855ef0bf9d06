"""The contracts of operations that keep what fails: which letters there are, with what in them."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import baggage, context
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import periscope_otel as periscope
from periscope_otel import guard
from periscope_otel.dead_letter.codecs import decode_plain
from periscope_otel.dead_letter.in_use import in_use
from periscope_otel.dead_letter.loss import lose
from periscope_otel.dead_letter.replaying import REPLAYING, Replaying
from periscope_otel.dead_letter.store import payload_identity
from periscope_otel.failure import Failure
from periscope_otel.lettered.operation import MOST_BYTES_HELD, MOST_HELD
from periscope_otel.telemetry.letter_counts import letter_counts
from periscope_otel.telemetry.worker import worker
from periscope_otel.testing import capture_telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from periscope_otel.dead_letter import Letter

PUTS, LOST = "dead_letter.puts", "dead_letter.lost"


class RefusedError(Exception):
    """The call was rejected, as by an open breaker."""

    periscope_failure = Failure("rejected", "RefusedError", "ignored", retryable=False)


class Box:
    """Takes letters in place of the queue, and notes in which thread."""

    def __init__(self) -> None:
        self.letters: list[Letter] = []
        self.entries: dict[str, Letter] = {}
        self.threads: list[threading.Thread] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.reached = threading.Event()
        self.main_lets_go_on = False

    def put(self, letters, *, journalled=False):
        self._wait()
        self.letters += letters
        if journalled:
            self.forget([one.id for one in letters])
        return "memory"

    async def put_from_coroutine(self, letters, *, journalled=False):
        raise NotImplementedError

    def journal(self, letter):
        self._wait()
        self.entries[letter.id] = letter
        return True

    def forget(self, ids):
        for one in ids:
            self.entries.pop(one, None)

    def _wait(self) -> None:
        self.threads.append(threading.current_thread())
        self.reached.set()
        if self.main_lets_go_on and threading.current_thread() is threading.main_thread():
            self.may_go_on.set()
        assert self.may_go_on.wait(30)


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Box:
    """Return what gets the letters, without telemetry: there is no SDK."""
    box = Box()
    monkeypatch.setattr(in_use, "captured", box)
    return box


def payload_of(letter: Letter) -> Any:
    """Return what a letter holds."""
    return decode_plain(letter.payload())


def payloads(letters: list[Letter]) -> list[Any]:
    return [payload_of(one) for one in letters]


def fail(*_: object) -> Any:
    raise ValueError("no such column: score")


# --- shapes ---------------------------------------------------------------------------------------

# One decorated operation "store" of `(url, score=1)` for each shape; it is run to its end.


def _function(body: Callable[[], Any], **options: Any) -> Callable[..., Any]:
    @periscope.monitored("store", **options)
    def store(url: str, score: int = 1) -> Any:
        return body()

    return store


def _coroutine(body: Callable[[], Any], **options: Any) -> Callable[..., Any]:
    @periscope.monitored("store", **options)
    async def store(url: str, score: int = 1) -> Any:
        return body()

    return lambda *args, **kwargs: asyncio.run(store(*args, **kwargs))


def _generator(body: Callable[[], Any], **options: Any) -> Callable[..., Any]:
    @periscope.monitored("store", **options)
    def store(url: str, score: int = 1) -> Any:
        yield 1
        body()

    return lambda *args, **kwargs: list(store(*args, **kwargs))


def _async_generator(body: Callable[[], Any], **options: Any) -> Callable[..., Any]:
    @periscope.monitored("store", **options)
    async def store(url: str, score: int = 1) -> Any:
        yield 1
        body()

    async def run(*args: Any, **kwargs: Any) -> list[int]:
        return [one async for one in store(*args, **kwargs)]

    return lambda *args, **kwargs: asyncio.run(run(*args, **kwargs))


class Store:
    """Something with methods; it is no data."""

    def __init__(self, body: Callable[[], Any] = fail) -> None:
        self.body = body

    @periscope.monitored("store", dead_letter=True)
    def method(self, url: str, score: int = 1) -> Any:
        return self.body()

    @periscope.monitored("store", dead_letter=True)
    @classmethod
    def class_method(cls, url: str, score: int = 1) -> Any:
        return fail()

    @staticmethod
    @periscope.monitored("store", dead_letter=True)
    def static_method(url: str, score: int = 1) -> Any:
        return fail()


SHAPES = [_function, _coroutine, _generator, _async_generator]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__[1:])


@every_shape
def test_a_call_that_fails_becomes_a_letter_of_its_arguments(shape, captured_telemetry):
    """The caller gets the exception, and the arguments are kept with the reason for it."""
    with pytest.raises(ValueError, match="no such column"):
        shape(fail, feed="urlhaus", dead_letter=True)("https://a.example", score=2)
    (letter,) = captured_telemetry.letters
    assert payload_of(letter) == {"url": "https://a.example", "score": 2}
    assert (letter.operation, letter.feed, letter.queue) == ("store", "urlhaus", "default")
    assert (letter.error_type, letter.error_message) == ("ValueError", "no such column: score")
    assert "fail" in letter.error_stack
    assert letter.replayable
    assert letter.pid == os.getpid()


@every_shape
@pytest.mark.parametrize("journal", [False, True])
def test_a_call_that_succeeds_leaves_nothing_behind(shape, journal, captured_telemetry):
    """Neither a letter nor an entry in the journal, nor anything in the span."""
    shape(lambda: None, dead_letter=True, journal=journal)("a")
    assert (captured_telemetry.letters, captured_telemetry.journal) == ([], [])
    operation = captured_telemetry.operation("store")
    assert not operation.span.events
    assert "dead_letter.count" not in operation.attributes


@every_shape
def test_without_dead_letter_nothing_is_kept(shape, captured_telemetry):
    """An operation keeps what fails only if it was asked to."""
    with pytest.raises(ValueError):
        shape(fail)("a")
    assert captured_telemetry.letters == []


@every_shape
def test_a_failed_call_is_a_letter_without_an_sdk(shape, box):
    """Dead letters need no telemetry, and then carry no trace."""
    with pytest.raises(ValueError):
        shape(fail, dead_letter=True)("a")
    (letter,) = box.letters
    assert (payload_of(letter), letter.traceparent) == ({"url": "a"}, None)


@every_shape
def test_the_payload_is_in_the_journal_while_the_call_runs(shape, box):
    """It is written before the first attempt, and removed when that has succeeded."""
    seen = []
    shape(lambda: seen.extend(box.entries.values()), dead_letter=True, journal=True)("a")
    assert payloads(seen) == [{"url": "a"}]
    assert not box.entries


@every_shape
def test_a_journalled_call_that_fails_has_one_letter(shape, box):
    """Its letter has the id of the entry, which is gone."""
    seen = []

    def body() -> None:
        seen.extend(box.entries)
        fail()

    with pytest.raises(ValueError):
        shape(body, dead_letter=True, journal=True)("a")
    assert ([one.id for one in box.letters], box.entries) == (seen, {})


@pytest.mark.parametrize("call", [Store().method, Store().class_method, Store.static_method])
def test_self_and_cls_are_no_payload(call, captured_telemetry):
    """Of a method only the arguments are kept, and they are replayable."""
    with pytest.raises(ValueError):
        call("a", score=3)
    (letter,) = captured_telemetry.letters
    assert (payload_of(letter), letter.replayable) == ({"url": "a", "score": 3}, True)


def test_a_patched_method_keeps_its_arguments(captured_telemetry, monkeypatch):
    """`monitor_function` takes what `monitored` takes."""

    class Client:
        def push(self, item: str) -> None:
            fail()

    monkeypatch.setattr(inspect.getmodule(fail), "Client", Client, raising=False)
    with (
        periscope.monitor_function(f"{__name__}:Client.push", dead_letter="patched"),
        pytest.raises(ValueError),
    ):
        Client().push("a")
    (letter,) = captured_telemetry.letters
    assert (payload_of(letter), letter.queue) == ({"item": "a"}, "patched")


def test_a_block_that_fails_keeps_its_payload(captured_telemetry):
    """What the block was said to work on is the letter."""
    with pytest.raises(ValueError), periscope.operation("s", dead_letter=True, payload=["a", 1]):
        fail()
    assert payloads(captured_telemetry.letters) == [["a", 1]]


async def test_an_async_block_that_fails_keeps_its_payload(captured_telemetry):
    """It does as a block of `with` does, and has written the letter when it is left."""

    async def block() -> None:
        async with periscope.operation("s", dead_letter=True, payload="a", journal=True):
            assert payloads(captured_telemetry.journal) == ["a"]
            fail()

    with pytest.raises(ValueError):
        await block()
    assert payloads(captured_telemetry.letters) == ["a"]
    assert not captured_telemetry.journal


def test_a_block_without_a_payload_has_a_letter_that_says_so(captured_telemetry):
    """It says why the block failed, and cannot be replayed by mistake."""
    with pytest.raises(ValueError), periscope.operation("s", dead_letter=True):
        fail()
    (letter,) = captured_telemetry.letters
    assert not letter.replayable
    assert "no payload" in letter.not_replayable_because


def test_the_items_of_a_failed_block_without_a_payload_are_kept(captured_telemetry):
    """There is no payload to stand for them."""

    def block() -> None:
        with periscope.operation("s", dead_letter=True) as op:
            op.failed("item", ValueError("bad"))
            fail()

    with pytest.raises(ValueError):
        block()
    assert payloads([one for one in captured_telemetry.letters if one.replayable]) == ["item"]


def test_a_block_with_letters_of_items_alone_makes_no_empty_letter(captured_telemetry):
    """Where it fails without one there is nothing to keep."""
    with pytest.raises(ValueError), periscope.operation("s", dead_letter="items"):
        fail()
    assert captured_telemetry.letters == []


# --- what the letter holds ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dead_letter", "queue"), [(True, "default"), ("misp", "misp"), ("items", "default")]
)
def test_the_queue_is_the_one_that_was_named(dead_letter, queue, captured_telemetry):
    """`True` and `"items"` mean the default queue."""
    with pytest.raises(ValueError):
        _function(fail, dead_letter=dead_letter)("a")
    assert [one.queue for one in captured_telemetry.letters] == [queue]


def test_payload_selects_arguments_by_name(captured_telemetry):
    """A dict by names of parameters is what a replay calls the function with."""
    with pytest.raises(ValueError):
        _function(fail, dead_letter=True, payload=lambda it: {"url": it["url"]})("a", 5)
    (letter,) = captured_telemetry.letters
    assert (payload_of(letter), letter.codec) == ({"url": "a"}, "arguments")


def test_payload_selects_the_first_argument(captured_telemetry):
    """Anything else is one thing, the function's first argument; defaults are bound too."""
    with pytest.raises(ValueError):
        _function(fail, dead_letter=True, payload=lambda it: f"{it['url']}/{it['score']}")("a")
    (letter,) = captured_telemetry.letters
    assert (payload_of(letter), letter.codec) == ("a/1", "item")


def test_a_payload_callable_that_raises_loses_nothing(captured_telemetry, caplog):
    """All arguments are kept, and the log says which callable it was, not what it said."""
    with pytest.raises(ValueError):
        _function(fail, dead_letter=True, payload=lambda it: {}[it["url"]])("s3cret")
    assert payloads(captured_telemetry.letters) == [{"url": "s3cret"}]
    assert "payload= raised KeyError" in caplog.text
    assert "s3cret" not in caplog.text


def test_what_cannot_be_carried_becomes_a_text(captured_telemetry):
    """It is marked as not replayable, with the reason, and the call fails as it would."""
    with pytest.raises(ValueError):
        _function(fail, dead_letter=True)(threading.Lock())
    (letter,) = captured_telemetry.letters
    assert (letter.replayable, letter.codec) == (False, "text")
    assert "lock" in letter.payload().decode()
    assert letter.not_replayable_because


def test_arguments_that_do_not_fit_are_told_by_the_call(captured_telemetry):
    """The user's TypeError comes through, and what was given is kept as a text."""
    with pytest.raises(TypeError, match="nonsense"):
        _function(fail, dead_letter=True, payload=lambda it: it["url"])(nonsense=1)
    (letter,) = captured_telemetry.letters
    assert letter.error_type == "TypeError"


SECRET = "hunter2-5uperS3cret"


def _with_secret_argument() -> None:
    @periscope.monitored("fetch", dead_letter=True, journal=True)
    def fetch(url: str, *, api_key: str) -> None:
        fail()

    fetch("a", api_key=SECRET)


def _with_secret_inside() -> None:
    @periscope.monitored("fetch", dead_letter=True)
    def fetch(options: dict[str, Any]) -> None:
        fail()

    fetch({"url": "a", "auth": {"password": SECRET}})


def _with_secret_among_keywords() -> None:
    @periscope.monitored("fetch", dead_letter=True)
    def fetch(url: str, **options: Any) -> None:
        fail()

    fetch("a", token=SECRET)


def _with_secret_in_a_text() -> None:
    @periscope.monitored("fetch", dead_letter=True)
    def fetch(url: str, connection: object, api_key: str) -> None:
        fail()

    fetch("a", threading.Lock(), SECRET)


def _with_secret_in_the_message() -> None:
    @periscope.monitored("fetch", dead_letter=True)
    def fetch(url: str) -> None:
        raise ValueError(f"401 for https://a.example/?api_key={SECRET}")

    fetch("a")


def _with_secret_in_an_items_error() -> None:
    with periscope.operation("fetch", dead_letter=True) as op:
        op.failed("a", ValueError(f"Authorization: Bearer {SECRET}"))
    fail()


@pytest.mark.parametrize(
    "call",
    [
        _with_secret_argument,
        _with_secret_inside,
        _with_secret_among_keywords,
        _with_secret_in_a_text,
        _with_secret_in_the_message,
        _with_secret_in_an_items_error,
    ],
    ids=lambda call: call.__name__[1:],
)
def test_secrets_are_not_stored(call, captured_telemetry, caplog):
    """What is named like one is in no letter, wherever it was, and in no log line."""
    with pytest.raises(ValueError):
        call()
    (letter,) = captured_telemetry.letters
    assert SECRET.encode() not in letter.changed(body=letter.payload()).encode()
    assert SECRET not in caplog.text


def test_the_payload_is_marked_by_what_is_in_it(captured_telemetry):
    """The letter has the strictest TLP marking of the arguments, and not that of `self`."""

    class Client:
        def __init__(self) -> None:
            self.tlp = "red"

        @periscope.monitored("push", dead_letter=True)
        def push(self, item: dict[str, str]) -> None:
            fail()

    with pytest.raises(ValueError):
        Client().push({"tlp": "amber"})
    assert [one.tlp for one in captured_telemetry.letters] == ["TLP:AMBER"]


def test_baggage_that_is_allowed_travels_along(captured_telemetry, monkeypatch):
    """By name, bounded and without secrets; other entries do not."""
    options = in_use.options._replace(headers=("tenant", "note"))
    monkeypatch.setattr(in_use, "_options", options)
    carried = baggage.set_baggage("tenant", "acme")
    carried = baggage.set_baggage("other", "x", carried)
    carried = baggage.set_baggage("note", f"token={SECRET} \ud800" + "y" * 5000, carried)
    token = context.attach(carried)
    try:
        with pytest.raises(ValueError):
            _function(fail, dead_letter=True)("a")
    finally:
        context.detach(token)
    (letter,) = captured_telemetry.letters
    assert (letter.headers["tenant"], set(letter.headers)) == ("acme", {"tenant", "note"})
    assert SECRET not in letter.headers["note"]
    assert len(letter.headers["note"]) <= 1024
    letter.encode()


# --- the idempotency key --------------------------------------------------------------------------


def _keys_of(captured, **options: Any) -> tuple[str, str]:
    """Return the key that the call saw, and the one of its letter."""
    seen = []

    def body() -> None:
        seen.append(periscope.current_operation().idempotency_key)
        fail()

    with pytest.raises(ValueError):
        _function(body, dead_letter=True, **options)("a")
    return seen[-1], captured.letters[-1].key


def test_the_key_is_the_same_on_each_try_and_that_of_the_letter(captured_telemetry):
    """By default it is made of operation, feed and content."""
    first, second = _keys_of(captured_telemetry), _keys_of(captured_telemetry)
    assert len({*first, *second}) == 1
    assert first[0] not in _keys_of(captured_telemetry, feed="other")


@pytest.mark.parametrize("journal", [False, True])
def test_the_callers_own_key_is_used(journal, captured_telemetry):
    """What `idempotency_key=` says is the key, of whatever type it is."""
    own = _keys_of(captured_telemetry, idempotency_key=lambda it: (it["url"], 1), journal=journal)
    assert own == ("('a', 1)", "('a', 1)")


def test_the_callers_key_is_asked_for_once(captured_telemetry):
    """One that says something else each time is still the same for one call and its letter."""
    answers = iter("abc")
    seen, stored = _keys_of(
        captured_telemetry, idempotency_key=lambda _: next(answers), journal=True
    )
    assert seen == stored == "a"


def test_a_key_callable_that_raises_leaves_the_key_of_the_content(captured_telemetry):
    """The call goes on, with the key that it would have without the callable."""
    plain = _keys_of(captured_telemetry)
    assert _keys_of(captured_telemetry, idempotency_key=lambda it: it["nothing"]) == plain


def test_a_key_can_be_set_while_the_call_runs(captured_telemetry):
    """It is the letter's key then, as a text that can be written."""

    @periscope.monitored("store", dead_letter=True)
    def store(url: str) -> None:
        operation = periscope.current_operation()
        operation.idempotency_key = f"{url}\ud800"
        assert operation.idempotency_key == "a?"
        fail()

    with pytest.raises(ValueError):
        store("a")
    assert [one.key for one in captured_telemetry.letters] == ["a?"]


def test_a_key_can_be_set_where_there_are_no_dead_letters(captured_telemetry):
    """The same code runs with and without them, and outside of any operation."""
    with periscope.operation("store") as op:
        assert op.idempotency_key is None
        op.idempotency_key = "mine"
        assert op.idempotency_key == "mine"
    periscope.current_operation().idempotency_key = "nowhere"
    assert periscope.current_operation().idempotency_key is None


def test_a_block_has_the_key_that_it_was_given(captured_telemetry):
    """`idempotency_key=` of a block is a text."""

    def block() -> None:
        with periscope.operation("s", dead_letter=True, payload=1, idempotency_key="mine") as op:
            assert op.idempotency_key == "mine"
            fail()

    with pytest.raises(ValueError):
        block()
    assert [one.key for one in captured_telemetry.letters] == ["mine"]


def test_items_have_keys_of_their_own(captured_telemetry):
    """The key of the call is not that of each of its items."""
    with periscope.operation("s", dead_letter=True, payload=1, idempotency_key="mine") as op:
        op.failed("a")
        op.failed("b")
    keys = {one.key for one in captured_telemetry.letters}
    assert len(keys) == 2
    assert "mine" not in keys


# --- failed items ---------------------------------------------------------------------------------


def test_each_failed_item_of_a_call_that_succeeds_is_a_letter(captured_telemetry):
    """With its own reason, the batch that it was in and its place there."""
    with periscope.operation("s", feed="misp", dead_letter="items-of-misp") as op:
        op.received(3)
        op.ingested(1)
        op.failed({"uuid": "1"}, ValueError("bad"))
        op.failed({"uuid": "2"})
    first, second = captured_telemetry.letters
    assert payloads([first, second]) == [{"uuid": "1"}, {"uuid": "2"}]
    assert (first.error_type, first.error_message) == ("ValueError", "bad")
    assert second.error_type is None
    assert first.batch_id == second.batch_id
    assert (first.item_index, second.item_index) == (0, 1)
    assert {one.queue for one in (first, second)} == {"items-of-misp"}


def test_an_item_that_has_none_is_only_counted(captured_telemetry):
    """`failed` without an item makes no letter."""
    with periscope.operation("s", dead_letter=True) as op:
        op.failed(error=ValueError("bad"))
        op.failed(count=3)
    assert captured_telemetry.letters == []
    assert captured_telemetry.operation("s").items.failed == 4


def test_where_the_call_fails_its_payload_stands_for_the_items(captured_telemetry):
    """One letter, of the arguments."""

    def body() -> None:
        periscope.current_operation().failed("item", ValueError("bad"))
        fail()

    with pytest.raises(ValueError):
        _function(body, dead_letter=True)("a")
    assert payloads(captured_telemetry.letters) == [{"url": "a"}]


def test_where_only_items_are_wanted_the_call_may_fail_too(captured_telemetry):
    """`"items"` keeps the items, whatever the call does."""

    def body() -> None:
        periscope.current_operation().failed("item", ValueError("bad"))
        fail()

    with pytest.raises(ValueError):
        _function(body, dead_letter="items", journal=True)("a")
    assert payloads(captured_telemetry.letters) == ["item"]
    assert not captured_telemetry.journal


def test_a_payload_that_cannot_be_replayed_stands_for_no_item(captured_telemetry):
    """Both are kept where the arguments are only a text."""

    def body() -> None:
        periscope.current_operation().failed("item", ValueError("bad"))
        fail()

    with pytest.raises(ValueError):
        _function(body, dead_letter=True)(threading.Lock())
    text, item = captured_telemetry.letters
    assert (text.replayable, payload_of(item)) == (False, "item")


def test_an_item_is_kept_as_it_was_when_it_failed(captured_telemetry):
    """What is done to it afterwards is not in the letter, nor in its marking."""
    item = {"value": "a.example", "tlp": "green"}
    with periscope.operation("s", dead_letter=True) as op:
        op.failed(item)
        item.update(value="b.example", tlp="red")
    (letter,) = captured_telemetry.letters
    assert (payload_of(letter)["value"], letter.tlp) == ("a.example", "TLP:GREEN")


def test_failed_items_are_not_kept_alive(captured_telemetry):
    """What is held until the end is the item's bytes."""

    class Item(dict):
        pass

    with periscope.operation("s", dead_letter=True) as op:
        item = Item(a=1)
        before = len(gc.get_referrers(item))
        op.failed(item)
        assert len(gc.get_referrers(item)) == before


def test_more_items_than_are_held_are_all_kept(captured_telemetry):
    """A block writes them as they come, and each has a number of its own."""
    many = 2 * MOST_HELD + 5
    with periscope.operation("s", dead_letter=True) as op:
        for number in range(many):
            op.failed(number)
        assert len(captured_telemetry.letters) == 2 * MOST_HELD
    assert payloads(captured_telemetry.letters) == list(range(many))
    assert [one.item_index for one in captured_telemetry.letters] == list(range(many))
    assert captured_telemetry.operation("s").attributes["dead_letter.count"] == many


def test_large_items_are_not_all_held(captured_telemetry):
    """What is held is bounded in bytes too; nothing of it is left out."""
    size = MOST_BYTES_HELD // 2
    with periscope.operation("s", dead_letter=True) as op:
        for number in range(4):
            op.failed(bytes([number]) * size)
        assert len(captured_telemetry.letters) >= 2
    assert [one[0] for one in payloads(captured_telemetry.letters)] == [0, 1, 2, 3]


def test_one_item_larger_than_the_bound_is_a_letter(captured_telemetry):
    """A single item is kept whatever its size, and the payload does not stand for it."""

    def body() -> None:
        periscope.current_operation().failed(b"x" * (MOST_BYTES_HELD + 1))

    _function(body, dead_letter=True)("a")
    assert [one.size for one in captured_telemetry.letters] == [MOST_BYTES_HELD + 1 + 5]


def _fail_items(count: int) -> None:
    for number in range(count):
        periscope.current_operation().failed(number, ValueError(f"bad {number}"))


@pytest.mark.parametrize("shape", [_function, _coroutine])
def test_the_payload_stands_for_more_items_than_are_held(shape, captured_telemetry):
    """One letter with the arguments replaces thousands, and says how many items failed."""
    shape(lambda: _fail_items(MOST_HELD + 1), dead_letter=True)("a")
    (letter,) = captured_telemetry.letters
    assert payload_of(letter) == {"url": "a"}
    assert f"{MOST_HELD + 1} items failed" in letter.error_message
    assert letter.error_type == "ValueError"


@pytest.mark.parametrize("shape", [_function, _coroutine])
@pytest.mark.parametrize(
    ("options", "argument"), [({"dead_letter": "items"}, "a"), ({"dead_letter": True}, iter("a"))]
)
def test_items_that_no_payload_stands_for_are_all_kept(
    shape, options, argument, captured_telemetry
):
    """Neither where only items are wanted, nor where the arguments cannot be stored."""
    shape(lambda: _fail_items(2 * MOST_HELD + 1), **options)(argument)
    found = captured_telemetry.letters
    assert payloads(found) == list(range(2 * MOST_HELD + 1))


def test_items_that_threads_fail_are_all_kept(captured_telemetry):
    """Each exactly once, with a number of its own."""
    many, threads = 700, 8
    with periscope.operation("s", dead_letter=True) as op, ThreadPoolExecutor(threads) as pool:
        for thread in range(threads):
            pool.submit(lambda t=thread: [op.failed((t, one)) for one in range(many)])
    found = captured_telemetry.letters
    assert Counter(payloads(found)) == Counter((t, i) for t in range(threads) for i in range(many))
    assert sorted(one.item_index for one in found) == list(range(many * threads))


def test_items_of_a_thread_that_outlives_the_operation_are_kept(captured_telemetry):
    """One that fails after the end is written at once."""
    with periscope.operation("s", dead_letter=True) as op:
        op.failed("in time")
    op.failed("late")
    assert payloads(captured_telemetry.letters) == ["in time", "late"]
    assert len({one.batch_id for one in captured_telemetry.letters}) == 1
    assert [one.item_index for one in captured_telemetry.letters] == [0, 1]


def test_a_late_item_of_a_call_whose_payload_was_kept_is_no_letter(captured_telemetry):
    """The payload has it."""
    operations = []

    def body() -> None:
        operations.append(periscope.current_operation())
        fail()

    with pytest.raises(ValueError):
        _function(body, dead_letter=True)("a")
    operations[0].failed("late")
    assert payloads(captured_telemetry.letters) == [{"url": "a"}]


def test_items_that_fail_while_the_operation_settles_are_kept_once(captured_telemetry):
    """Whatever the moment at which a thread and the end meet."""
    for _ in range(50):
        barrier = threading.Barrier(2)
        with periscope.operation("s", dead_letter=True) as op:

            def go_on(op=op, barrier=barrier) -> None:
                barrier.wait()
                for number in range(20):
                    op.failed(number)

            thread = threading.Thread(target=go_on)
            thread.start()
            barrier.wait()
        thread.join()
    assert Counter(payloads(captured_telemetry.letters)) == dict.fromkeys(range(20), 50)


def test_items_that_cannot_be_carried_become_texts(captured_telemetry):
    """The others are not affected."""

    class Raises:
        def __repr__(self) -> str:
            raise RuntimeError("no repr")

        __getattribute__ = None

    with periscope.operation("s", dead_letter=True) as op:
        op.failed(threading.Lock())
        op.failed(Raises())
        op.failed("good")
    assert [one.replayable for one in captured_telemetry.letters] == [False, False, True]


# --- ends -----------------------------------------------------------------------------------------


def test_a_failure_that_was_returned_is_a_letter(captured_telemetry):
    """`op.fail` with an exception tells its type and message."""

    def body() -> None:
        periscope.current_operation().fail(TimeoutError("too slow"))

    _function(body, dead_letter=True)("a")
    (letter,) = captured_telemetry.letters
    assert (letter.error_type, letter.error_message) == ("TimeoutError", "too slow")


@pytest.mark.parametrize("shape", [_function, _coroutine])
def test_a_result_that_means_failure_is_a_letter(shape, captured_telemetry):
    """The predicate's text is the reason, and the caller gets the result."""
    call = shape(lambda: "no", dead_letter=True, result=lambda it: f"answer was {it}")
    assert call("a") == "no"
    assert [one.error_message for one in captured_telemetry.letters] == ["answer was no"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, asyncio.CancelledError])
def test_a_call_that_is_interrupted_is_no_letter(kind, captured_telemetry):
    """It did not fail; but the items that had failed by then are kept."""

    def body() -> None:
        periscope.current_operation().failed("item")
        raise kind

    with pytest.raises(kind):
        _function(body, dead_letter=True)("a")
    assert payloads(captured_telemetry.letters) == ["item"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, asyncio.CancelledError])
def test_a_journalled_call_that_is_interrupted_is_a_letter(kind, captured_telemetry):
    """It has not succeeded, and its payload was promised not to be lost."""

    def body() -> None:
        raise kind

    with pytest.raises(kind):
        _function(body, dead_letter=True, journal=True)("a")
    assert [(payload_of(one), one.error_type) for one in captured_telemetry.letters] == [
        ({"url": "a"}, "cancelled")
    ]
    assert not captured_telemetry.journal


def test_a_call_that_asks_to_exit_with_success_is_no_letter(captured_telemetry):
    """`sys.exit()` in an operation is a good end."""

    def body() -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        _function(body, dead_letter=True, journal=True)("a")
    assert (captured_telemetry.letters, captured_telemetry.journal) == ([], [])


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 0), ({"dead_letter_rejected": True}, 1), ({"journal": True}, 0)],
)
def test_rejected_calls_are_letters_if_that_was_asked_for(options, kept, captured_telemetry):
    """A call that was not made fails no payload, unless that is asked for; no journal keeps it."""
    breaker = periscope.Breaker("rejecting")
    breaker.force_open()
    with pytest.raises(periscope.CircuitOpenError):
        _function(list, dead_letter=True, breaker=breaker, **options)("a")
    assert [one.error_type for one in captured_telemetry.letters] == ["CircuitOpenError"] * kept
    assert not captured_telemetry.journal


@pytest.mark.parametrize("options", [{}, {"dead_letter_rejected": True}, {"journal": True}])
def test_a_call_in_which_another_was_rejected_is_a_letter(options, captured_telemetry):
    """A call that was made and met a rejection half-way may be half done: its payload is kept."""

    def body() -> None:
        raise RefusedError

    with pytest.raises(RefusedError):
        _function(body, dead_letter=True, **options)("a")
    assert [one.error_type for one in captured_telemetry.letters] == ["RefusedError"]
    assert not captured_telemetry.journal


def _rows(count: int = 3, **options: Any) -> Callable[..., Any]:
    @periscope.monitored("rows", dead_letter=True, **options)
    def rows(url: str) -> Iterator[int]:
        for number in range(count):
            periscope.current_operation().failed(number)
            yield number

    return rows


@pytest.mark.parametrize("journal", [False, True])
def test_a_generator_that_is_closed_early_keeps_only_its_failed_items(journal, captured_telemetry):
    """The consumer had enough: that is no failure."""
    rows = _rows(journal=journal)("a")
    assert next(rows) == 0
    rows.close()
    assert payloads(captured_telemetry.letters) == [0]
    assert not captured_telemetry.journal


@pytest.mark.parametrize("journal", [False, True])
def test_a_generator_that_is_dropped_keeps_only_its_failed_items(journal, captured_telemetry):
    """Its finaliser leaves the writing to another thread."""
    rows = _rows(journal=journal)("a")
    assert next(rows) == 0
    del rows
    gc.collect()
    assert payloads(captured_telemetry.letters) == [0]
    assert not captured_telemetry.journal


def test_a_generator_that_fails_when_closed_is_a_letter(captured_telemetry):
    """An error of its clean-up is one of the operation."""

    @periscope.monitored("rows", dead_letter=True)
    def rows(url: str) -> Iterator[int]:
        try:
            yield 1
        finally:
            fail()

    one = rows("a")
    next(one)
    with pytest.raises(ValueError):
        one.close()
    assert payloads(captured_telemetry.letters) == [{"url": "a"}]


def test_a_generator_that_was_never_begun_is_not_in_the_journal(box):
    """Nothing has been attempted."""
    rows = _rows(journal=True)("a")
    rows.close()
    assert (box.letters, box.entries, box.threads) == ([], {}, [])


def test_nested_operations_have_their_own_letters(captured_telemetry):
    """Each keeps what it was asked to; the feed is inherited."""
    inner = _function(fail, dead_letter="inner")

    with (
        pytest.raises(ValueError),
        periscope.operation("outer", feed="misp", dead_letter=True, payload="all"),
    ):
        inner("a")
    assert [(one.queue, one.feed, payload_of(one)) for one in captured_telemetry.letters] == [
        ("inner", "misp", {"url": "a"}),
        ("default", "misp", "all"),
    ]


# --- telemetry ------------------------------------------------------------------------------------


def test_the_span_names_its_letter(captured_telemetry):
    """By an event with the letter's id, and the letter names the span."""
    with pytest.raises(ValueError):
        _function(fail, dead_letter="misp")("a")
    (letter,) = captured_telemetry.letters
    operation = captured_telemetry.operation("store")
    (event,) = [one for one in operation.span.events if one.name == "dead_letter.put"]
    assert dict(event.attributes) == {"dead_letter.id": letter.id, "dead_letter.queue": "misp"}
    assert operation.attributes["dead_letter.count"] == 1
    about = operation.span.context
    flags = about.trace_flags
    assert flags.sampled
    assert letter.traceparent == f"00-{about.trace_id:032x}-{about.span_id:016x}-{flags:02x}"


def test_the_span_names_only_the_first_letters_of_items(captured_telemetry):
    """It counts all of them."""
    with periscope.operation("s", dead_letter=True) as op:
        for number in range(20):
            op.failed(number)
    operation = captured_telemetry.operation("s")
    named = [one for one in operation.span.events if one.name == "dead_letter.put"]
    assert len(named) == 8
    assert operation.attributes["dead_letter.count"] == 20


def test_a_span_that_is_not_sampled_still_has_its_letter():
    """With its trace, marked as not sampled."""
    with capture_telemetry(sampler=ALWAYS_OFF) as captured:
        with pytest.raises(ValueError):
            _function(fail, dead_letter=True)("a")
        (letter,) = captured.letters
    assert int(letter.traceparent[-2:], 16) & 1 == 0


def test_puts_are_counted(captured_telemetry):
    """By queue and by where the letters went."""
    with periscope.operation("s", dead_letter="misp") as op:
        op.failed(1)
        op.failed(2)
    with pytest.raises(ValueError):
        _function(fail, dead_letter=True)("a")
    assert captured_telemetry.metric(PUTS, queue="misp", outcome="memory") == 2
    assert captured_telemetry.metric(PUTS, queue="default", outcome="memory") == 1
    assert captured_telemetry.metric(LOST) == 0


def test_the_letter_is_made_though_the_span_cannot_be_written_to(captured_telemetry, monkeypatch):
    """A span of somebody else's that raises costs no payload."""
    guard.set_strict(False)

    def body() -> None:
        span = periscope.current_operation().span
        monkeypatch.setattr(span, "set_attributes", fail)
        monkeypatch.setattr(span, "set_attribute", fail)
        raise TimeoutError("too slow")

    with pytest.raises(TimeoutError):
        _function(body, dead_letter=True)("a")
    assert payloads(captured_telemetry.letters) == [{"url": "a"}]


# --- nothing of ours reaches the user -------------------------------------------------------------


class Broken(Box):
    """A box with a bug."""

    def put(self, letters, *, journalled=False):
        raise RuntimeError("a bug")

    def journal(self, letter):
        raise RuntimeError("a bug")

    def forget(self, ids):
        raise RuntimeError("a bug")


@every_shape
@pytest.mark.parametrize("body", [fail, lambda: None], ids=["fails", "succeeds"])
def test_an_error_of_the_plugins_own_is_contained(shape, body, monkeypatch, caplog):
    """The call ends as it would without us; the letter is told as lost."""
    guard.set_strict(False)
    monkeypatch.setattr(in_use, "captured", Broken())
    with letter_counts.set_aside():
        call = shape(body, dead_letter=True, journal=True)
        if body is fail:
            with pytest.raises(ValueError, match="no such column"):
                call("a")
            assert letter_counts.losses() == {("default", "internal"): 1}
            assert "LOST the dead letter" in caplog.text
        else:
            call("a")
            assert letter_counts.losses() == {}


def test_an_item_of_a_broken_box_does_not_break_the_call(monkeypatch):
    """Nor does one that is written before the end."""
    guard.set_strict(False)
    monkeypatch.setattr(in_use, "captured", Broken())
    with letter_counts.set_aside(), periscope.operation("s", dead_letter=True) as op:
        for number in range(MOST_HELD + 1):
            op.failed(number)
    assert op.outcome == "partial"


def test_settings_that_cannot_be_read_do_not_break_the_call(captured_telemetry, monkeypatch):
    """Without `configure()` a variable with a mistake is told of and left out."""
    monkeypatch.setattr(in_use, "_options", None)
    monkeypatch.setenv("PERISCOPE_DEAD_LETTER_INLINE_LIMIT", "many")
    monkeypatch.setenv("PERISCOPE_DATA_DIR", "/nowhere/at/all")
    with periscope.operation("s", dead_letter=True) as op:
        op.failed("item")
    assert payloads(captured_telemetry.letters) == ["item"]
    assert str(in_use.usable.folder) == "/nowhere/at/all"
    in_use.configure(None)


def test_dead_letters_can_be_switched_off(monkeypatch, tmp_path):
    """`dead_letters=False` keeps nothing, opens nothing, and calls run as ever."""
    options = in_use.options._replace(enabled=False, data_dir=tmp_path / "data")
    monkeypatch.setattr(in_use, "_options", options)
    with pytest.raises(ValueError):
        _function(fail, dead_letter=True, journal=True)("a")
    with periscope.operation("s", dead_letter=True, payload=1, journal=True) as op:
        op.failed("item")
        assert op.idempotency_key
    assert in_use.opened is None
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"payload": lambda it: it},
        {"idempotency_key": lambda it: it},
        {"journal": True},
        {"dead_letter_rejected": True},
        {"dead_letter": 1},
        {"dead_letter": None},
        {"dead_letter": True, "payload": "url"},
        {"dead_letter": True, "idempotency_key": "url"},
    ],
    ids="-".join,
)
def test_arguments_of_the_wrong_kind_are_refused(options):
    """At the decorator, with a TypeError, and not at the first failure."""
    with pytest.raises(TypeError):
        periscope.monitored("store", **options)


@pytest.mark.parametrize("name", ["", " ", "a b", "a\nb", "{x}", "x" * 500])
def test_names_that_cannot_be_queues_are_refused(name):
    """At the decorator, with a ValueError."""
    with pytest.raises(ValueError):
        periscope.monitored("store", dead_letter=name)
    with pytest.raises(ValueError):
        periscope.operation("store", dead_letter=name)


@pytest.mark.parametrize("hook", [None, fail])
def test_a_letter_is_told_as_lost_whatever_the_log_does(hook, captured_telemetry, monkeypatch):
    """A handler of the application's that raises, and a hook that does, keep nobody from it."""
    with periscope.operation("s", dead_letter=True) as op:
        op.failed("item")
    (letter,) = captured_telemetry.letters
    monkeypatch.setattr("periscope_otel.dead_letter.queue.logger.error", fail)
    lose(letter, "full", "no room", hook)
    assert captured_telemetry.metric(LOST, queue="default", reason="full") == 1


# --- coroutines -----------------------------------------------------------------------------------


async def until(holds: Callable[[], object]) -> None:
    """Let the loop run until something holds that another thread brings about."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


@periscope.monitored("store", dead_letter=True, journal=True)
async def journalled(url: str, *, wait: bool = False) -> None:
    if wait:
        await asyncio.sleep(3600)
    fail()


async def test_a_coroutines_letter_is_written_in_another_thread(box):
    """The loop goes on meanwhile, and the call returns when it is written."""
    box.may_go_on.clear()
    task = asyncio.create_task(_failing("a"))
    await until(box.reached.is_set)
    assert not task.done()
    box.may_go_on.set()
    with pytest.raises(ValueError):
        await task
    assert payloads(box.letters) == [{"url": "a"}]
    assert threading.main_thread() not in box.threads


@periscope.monitored("store", dead_letter=True)
async def _failing(url: str) -> None:
    fail()


async def test_a_loop_whose_threads_are_all_taken_does_not_hold_a_letter_up(box):
    """They may wait for the very coroutine: the letter does not need one of them."""
    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(1)
    loop.set_default_executor(executor)

    def in_thread() -> object:
        return asyncio.run_coroutine_threadsafe(_failing("a"), loop).exception(30)

    assert isinstance(await asyncio.to_thread(in_thread), ValueError)
    assert payloads(box.letters) == [{"url": "a"}]


async def test_a_loop_whose_threads_have_ended_loses_no_letter(box):
    """As at its end, when the last coroutines are cancelled."""
    loop = asyncio.get_running_loop()
    await loop.shutdown_default_executor()
    with pytest.raises(ValueError):
        await _failing("a")
    assert payloads(box.letters) == [{"url": "a"}]


async def test_a_cancellation_does_not_keep_a_letter_from_being_written(box):
    """The task is cancelled, and the letter is there all the same."""
    box.may_go_on.clear()
    task = asyncio.create_task(_failing("a"))
    await until(box.reached.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    box.may_go_on.set()
    await until(lambda: box.letters)
    assert payloads(box.letters) == [{"url": "a"}]


async def _block(url: str) -> None:
    async with periscope.operation("store", dead_letter=True, journal=True, payload={"url": url}):
        fail()


@periscope.monitored("store", dead_letter=True, journal=True)
async def _rows_of(url: str) -> Any:
    yield fail()


async def _drain(url: str) -> None:
    async for _ in _rows_of(url):
        pass


@pytest.mark.parametrize("call", [journalled, _block, _drain], ids=["coroutine", "block", "rows"])
async def test_a_call_that_is_cancelled_before_it_begins_is_one_letter(call, box):
    """While its payload is being written down: neither lost, nor left in the journal."""
    box.may_go_on.clear()
    task = asyncio.create_task(call("a"))
    await until(box.reached.is_set)
    task.cancel()
    await asyncio.sleep(0)
    box.may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not box.entries)
    assert [(payload_of(one), one.error_type) for one in box.letters] == [
        ({"url": "a"}, "cancelled")
    ]


async def test_a_journalled_coroutine_that_is_closed_is_one_letter(captured_telemetry):
    """Closing it from outside awaits nothing."""
    for _ in range(50):
        coroutine = journalled("a", wait=True)
        future = coroutine.send(None)
        future._asyncio_future_blocking = False  # what a task does with what it is handed
        await future
        coroutine.send(None)
        assert captured_telemetry.journal
        coroutine.close()
        worker.finish_posted(30)
        assert not captured_telemetry.journal
    assert [one.error_type for one in captured_telemetry.letters] == ["cancelled"] * 50


async def test_items_that_spill_are_written_when_the_call_returns(box):
    """They are written beside the coroutine, and it waits for them at its end."""

    @periscope.monitored("rows", dead_letter="items")
    async def rows() -> None:
        _fail_items(3 * MOST_HELD)

    await rows()
    assert sorted(payloads(box.letters)) == list(range(3 * MOST_HELD))
    assert threading.main_thread() not in box.threads


async def test_items_that_fail_faster_than_they_are_written_do_not_pile_up(box):
    """After a few batches the coroutine waits for the disk."""
    box.may_go_on.clear()
    box.main_lets_go_on = True

    @periscope.monitored("rows", dead_letter="items")
    async def rows() -> None:
        _fail_items(8 * MOST_HELD)

    await rows()
    assert sorted(payloads(box.letters)) == list(range(8 * MOST_HELD))
    assert threading.main_thread() in box.threads


def test_a_coroutine_without_asyncio_writes_its_letter_at_once(box):
    """Another library's event loop is not known to us."""
    coroutine = _failing("a")
    with pytest.raises(ValueError):
        coroutine.send(None)
    assert payloads(box.letters) == [{"url": "a"}]


def test_concurrent_coroutines_each_have_their_letter(captured_telemetry):
    """Hundreds at a time."""

    async def all_of_them() -> None:
        await asyncio.gather(*(_failing(str(one)) for one in range(300)), return_exceptions=True)

    asyncio.run(all_of_them())
    found = Counter(one["url"] for one in payloads(captured_telemetry.letters))
    assert found == {str(one): 1 for one in range(300)}


# --- forks ----------------------------------------------------------------------------------------


def in_child(run: Callable[[], object]) -> bytes:
    """Fork, run it in the child, and return what it says."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, repr(run()).encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    said = os.read(reader, 65536)
    os.close(reader)
    return said


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("journal", [False, True])
def test_an_operation_is_its_parents_in_the_child_of_a_fork(journal, box):
    """It ends there too, but neither writes a letter nor takes the payload from the journal."""
    block = periscope.operation("s", dead_letter=True, payload=1, journal=journal)
    block.__enter__()

    def end_it() -> object:
        block.__exit__(ValueError, ValueError("in the child"), None)
        return len(box.letters), len(box.entries)

    assert in_child(end_it) == repr((0, int(journal))).encode()
    block.__exit__(None, None, None)
    assert (box.letters, box.entries) == ([], {})


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_item_that_fails_in_the_child_of_a_fork_is_a_letter(box):
    """At once, and though a thread of the parent had the lock at that moment."""
    with periscope.operation("s", dead_letter=True) as op:
        op.failed("parent's")

        def fail_one() -> object:
            op.failed("child's")
            return payloads(box.letters)

        with op._holding:
            said = []
            thread = threading.Thread(target=lambda: said.append(in_child(fail_one)))
            thread.start()
            thread.join(30)
        assert said == [b'["child\'s"]']
    assert payloads(box.letters) == ["parent's"]


# --- replays --------------------------------------------------------------------------------------


def replayed(letter: Letter | None, call: Callable[[], object]) -> Replaying:
    """Run a call as the replay of a letter."""
    identity = "" if letter is None else payload_identity(letter)
    replay = Replaying("id", "store", None, "the letter's key", identity)
    token = REPLAYING.set(replay)
    try:
        call()
    except ValueError:
        pass
    finally:
        REPLAYING.reset(token)
    return replay


@pytest.mark.parametrize("shape", [_function, _coroutine, _generator])
def test_a_replay_that_fails_tells_why_and_writes_no_second_letter(shape, captured_telemetry):
    """The letter that is replayed is still there; nor is it journalled once more."""
    replay = replayed(None, lambda: shape(fail, dead_letter=True, journal=True)("a"))
    assert replay.cause.error_type == "ValueError"
    assert (captured_telemetry.letters, captured_telemetry.journal) == ([], [])


def test_a_replay_that_succeeds_has_no_cause(captured_telemetry):
    """And sees the key of its letter, whatever it sets."""
    seen = []

    def body() -> None:
        periscope.current_operation().idempotency_key = "another"
        seen.append(periscope.current_operation().idempotency_key)

    assert replayed(None, lambda: _function(body, dead_letter=True)("a")).cause is None
    assert seen == ["the letter's key"]


def test_items_that_fail_in_a_replay_are_letters(captured_telemetry):
    """The letter of the call is done with, those items are not."""

    def body() -> None:
        _fail_items(2)

    assert replayed(None, lambda: _function(body, dead_letter=True)("a")).cause is None
    assert payloads(captured_telemetry.letters) == [0, 1]


def test_an_item_that_fails_again_keeps_its_letter(captured_telemetry):
    """The replayed item is not written a second time."""
    _function(lambda: _fail_items(1), dead_letter="items")("a")
    (letter,) = captured_telemetry.letters
    replay = replayed(letter, lambda: _function(lambda: _fail_items(2), dead_letter=True)("a"))
    assert replay.cause.message == "bad 0"
    assert payloads(captured_telemetry.letters) == [0, 1]


def test_a_replay_with_more_failed_items_than_are_held_has_failed(captured_telemetry):
    """The letter that is replayed stands for them, so it stays."""
    replay = replayed(
        None, lambda: _function(lambda: _fail_items(MOST_HELD + 1), dead_letter=True)("a")
    )
    assert f"{MOST_HELD + 1} items failed" in replay.cause.message
    assert captured_telemetry.letters == []


def test_only_the_operation_of_the_letter_is_replayed(captured_telemetry):
    """Another one within it, also of the same name, keeps what fails as ever."""

    @periscope.monitored("other", dead_letter=True)
    def other(url: str) -> None:
        fail()

    def body() -> None:
        with pytest.raises(ValueError):
            other("o")
        with pytest.raises(ValueError):
            _function(fail, dead_letter=True)("again")

    assert replayed(None, lambda: _function(body, dead_letter=True)("a")).cause is None
    assert payloads(captured_telemetry.letters) == [{"url": "o"}, {"url": "again"}]
