"""The contracts of payloads: what is carried, what is left out, and what is refused."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import copy
import datetime as dt
import enum
import inspect
import json
import pickle
import random
import re
import socket
import subprocess
import sys
import threading
import tracemalloc
import typing
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Optional, TypedDict, Union

import msgspec
import pydantic
import pymisp
import pytest
import stix2
from hypothesis import example, given
from hypothesis import strategies as st

from periscope_otel.dead_letter import CannotReplayError
from periscope_otel.dead_letter.codecs import (
    ARGUMENTS,
    ITEM,
    MSGPACK,
    PLAIN,
    TEXT,
    Encoded,
    bind,
    decode_plain,
    encode_arguments,
    encode_item,
)
from periscope_otel.redaction import names_a_secret

if TYPE_CHECKING:
    from pathlib import NoSuchName  # type: ignore[attr-defined]

NOON = dt.datetime(2026, 3, 1, 12, 30, 15, 123456)  # noqa: DTZ001  (a naive one is meant)
AWARE = NOON.replace(tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30)))
SOME_ID = uuid.UUID("01890a5d-ac96-774b-bcce-b302099a8057")
HIDDEN = "hunter2-correct-horse"
BOUND = 256 * 1024
"""Bytes of the text about what could not be carried: far less than any payload's limit."""


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Kind(enum.StrEnum):
    DOMAIN = "domain"


@dataclass
class Point:
    x: int
    when: dt.datetime | None = None
    tags: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    ends: tuple[Point, Point]
    name: str = "line"


class Row(msgspec.Struct):
    id: uuid.UUID
    score: Decimal = Decimal(0)
    colour: Colour = Colour.RED


class Domain(msgspec.Struct, tag=True):
    name: str


class Address(msgspec.Struct, tag=True, rename="camel"):
    the_octets: tuple[int, int, int, int]


class Listed(msgspec.Struct, array_like=True):
    ids: set[int]


class Found(TypedDict):
    at: dt.date
    rows: list[Row]


class Perhaps(TypedDict, total=False):
    at: dt.datetime


class Pair(NamedTuple):
    left: uuid.UUID
    right: frozenset[int] = frozenset()


class Sighting(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True)

    value: str
    at: dt.datetime
    seen: tuple[int, ...] = ()


class Report(pydantic.BaseModel):
    title: str
    sightings: list[Sighting] = []


class Renamed(pydantic.BaseModel):
    first_seen: dt.date = pydantic.Field(alias="firstSeen")


class Names(pydantic.RootModel[list[str]]):
    pass


def short(value: Any) -> str:
    """Return a name for a case that is the same in each process, where sets have no order."""
    name = getattr(value, "__name__", None)
    name = name if isinstance(name, str) and "[" not in str(value) else str(value)
    name = re.sub(r"typing\.|collections\.abc\.|test_codecs\.| at 0x\w+", "", name)
    return re.sub(r"\{[^{}:]*\}", "{..}", name)[:40]


def through(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what a function returns when it is called with its arguments out of a payload."""
    before = function(*args, **kwargs)
    encoded = encode_arguments(function, args, kwargs)
    assert encoded.not_replayable_because is None
    assert (encoded.codec, encoded.content_type) == (ARGUMENTS, MSGPACK)
    assert encoded.left_out == ()
    assert isinstance(encoded.payload, bytes)
    args, kwargs = bind(function, encoded.payload, encoded.codec)
    after = function(*args, **kwargs)
    assert (type(after), repr(function(*args, **kwargs))) == (type(after), repr(after))
    assert type(after) is type(before)
    return after


def annotated(hint: Any) -> Callable[..., Any]:
    """Return a function of one parameter with an annotation, which returns what it is given."""

    def same(value):
        return value

    same.__annotations__ = {"value": hint}
    return same


def plain(value):
    return value


def refused(encoded: Encoded) -> str:
    """Return the text of what could not be carried, after all that holds for any such."""
    assert encoded.codec == TEXT
    assert encoded.content_type == PLAIN
    assert encoded.not_replayable_because
    assert len(encoded.not_replayable_because) < 2000
    assert len(encoded.payload) <= BOUND
    with pytest.raises(CannotReplayError):
        bind(plain, encoded.payload, encoded.codec)
    return encoded.payload.decode()


# --- plain data ----------------------------------------------------------------------------------

SIMPLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(2**63), max_value=2**64 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=20),
)
PLAIN_DATA = st.recursive(
    SIMPLE,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.integers(0, 99).map(str), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(PLAIN_DATA)
def test_plain_data_comes_back_without_annotations(value):
    """None, booleans, numbers, text, lists and dictionaries need no annotation."""
    assert through(plain, value) == value
    assert decode_plain(encode_item(value).payload) == value


@given(st.dictionaries(st.integers() | st.text(), PLAIN_DATA) | st.lists(PLAIN_DATA))
def test_encoding_leaves_the_arguments_alone(value):
    """What is encoded is not changed by it."""
    before = copy.deepcopy(value)
    encode_arguments(plain, (value,), {})
    encode_item(value)
    assert value == before


def everything(  # noqa: PLR0917
    a: tuple[int, str],
    b: set[uuid.UUID],
    c: frozenset[str],
    d: dt.datetime,
    e: dt.date,
    f: Decimal,
    g: Colour,
    h: bytes,
    i: Point,
    j: Row,
    k: Found,
    m: Pair,
    n: dt.timedelta,
    o: dt.time,
) -> tuple[Any, ...]:
    return a, b, c, d, e, f, g, h, i, j, k, m, n, o


POINTS = st.builds(
    Point, st.integers(-99, 99), st.none() | st.datetimes(), st.sets(st.text(max_size=3))
)
ROWS = st.builds(
    Row,
    st.uuids(),
    st.decimals(allow_nan=False, allow_infinity=False, places=3),
    st.sampled_from(Colour),
)
ZONES = st.integers(-1439, 1439).map(lambda it: dt.timezone(dt.timedelta(minutes=it)))
TIMES = st.datetimes() | st.datetimes(
    dt.datetime(1, 1, 3),  # noqa: DTZ001
    dt.datetime(9999, 12, 29),  # noqa: DTZ001
    timezones=ZONES,
)
EVERYTHING = st.tuples(
    st.tuples(st.integers(0, 9), st.text(max_size=3)),
    st.sets(st.uuids(), max_size=3),
    st.frozensets(st.text(max_size=3), max_size=3),
    TIMES,
    st.dates(),
    st.decimals(allow_nan=False),
    st.sampled_from(Colour),
    st.binary(max_size=20),
    POINTS,
    ROWS,
    st.fixed_dictionaries({"at": st.dates(), "rows": st.lists(ROWS, max_size=2)}),
    st.builds(Pair, st.uuids(), st.frozensets(st.integers(0, 9), max_size=3)),
    st.timedeltas(dt.timedelta(days=-9999), dt.timedelta(days=9999)),
    st.times(),
)


@given(EVERYTHING)
def test_annotated_arguments_come_back_as_they_were(values):
    """Tuples, sets, UUIDs, times, Decimals, Enums, bytes and records come back by annotation."""
    after = through(everything, *values)
    assert after == values
    assert [type(one) for one in after] == [type(one) for one in values]
    assert through(everything, **dict(zip("abcdefghijkmno", values, strict=True))) == values


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, -5),
        (float, 2.5),
        (bool, True),
        (str, "x"),
        (bytes, b"\x00\xff"),
        (bytearray, bytearray(b"\x00\xff")),
        (None, None),
        (Any, {"a": [1]}),
        (object, {"a": [1]}),
        (list, [1, "a"]),
        (dict, {"a": 1}),
        (tuple, (1, "a")),
        (set, {1, 2}),
        (frozenset, frozenset("ab")),
        (tuple[int, ...], (1, 2, 3)),
        (tuple[uuid.UUID, Colour], (SOME_ID, Colour.GREEN)),
        (set[tuple[int, int]], {(1, 2), (3, 4)}),
        (frozenset[dt.date], frozenset([NOON.date()])),
        (dict[str, set[uuid.UUID]], {"a": {SOME_ID}}),
        (dict[int, str], {1: "a", -2: "b"}),
        (dict[uuid.UUID, int], {SOME_ID: 1}),
        (dict[dt.date, list[Decimal]], {NOON.date(): [Decimal("1.50")]}),
        (dict[Colour, int], {Colour.RED: 1}),
        (list[dict[str, tuple[Point, ...]]], [{"a": (Point(1), Point(2, NOON, {"x"}))}]),
        (dt.datetime, NOON),
        (dt.datetime, AWARE),
        (dt.datetime, dt.datetime(1, 1, 1)),  # noqa: DTZ001
        (dt.datetime, dt.datetime.max.replace(tzinfo=dt.UTC)),
        (list[dt.datetime], [NOON, NOON]),
        (dt.date, NOON.date()),
        (dt.time, NOON.time()),
        (dt.timedelta, dt.timedelta(days=3, microseconds=7)),
        (Decimal, Decimal("1E-30")),
        (uuid.UUID, SOME_ID),
        (Level, Level.HIGH),
        (Kind, Kind.DOMAIN),
        (list[Colour], [Colour.RED, Colour.GREEN]),
        (Line, Line(ends=(Point(1), Point(2)), name="n")),
        (list[Line], [Line(ends=(Point(1), Point(2, AWARE)))]),
        (Row, Row(SOME_ID, Decimal("1.5"), Colour.GREEN)),
        (Domain, Domain("a.example")),
        (Address, Address((1, 2, 3, 4))),
        (Listed, Listed({1, 2})),
        (Domain | Address, Address((1, 2, 3, 4))),
        (list[Domain | Address], [Address((1, 2, 3, 4)), Domain("a.example")]),
        (Perhaps, {}),
        (Perhaps, {"at": NOON}),
        (list[Pair], [Pair(SOME_ID, frozenset([1]))]),
        (Optional[Point], None),  # noqa: UP045
        (Optional[Point], Point(1)),  # noqa: UP045
        (Union[int, str], "5"),  # noqa: UP007
        (int | str, 5),
        (dt.datetime | None, AWARE),
        (set[str] | None, {"a"}),
        (Literal["a", "b"], "a"),
        (typing.Annotated[int, "what it is"], 5),
        (typing.NewType("Name", str), "a"),
    ],
    ids=short,
)
def test_value_comes_back_as_its_annotation_says(hint, value):
    """With an annotation a value comes back equal and of the same type, however it is nested."""
    after = through(annotated(hint), value)
    assert after == value
    assert type(after) is type(value)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Sequence[str], ["a"]),
        (Sequence, ["a"]),
        (Iterable[str], ["a"]),
        (Iterable, ["a"]),
        (collections.abc.Collection[int], [1]),
        (Mapping[str, int], {"a": 1}),
        (typing.MutableMapping, {"a": 1}),
        (Optional[Iterable[str]], ["a"]),  # noqa: UP045
        (list["Unknown"], [1]),  # type: ignore[name-defined]  # noqa: F821
        ("NoSuchName", [1]),
        (typing.TypeVar("T"), {"a": 1}),
        (Callable[[], int] | str, "name"),
    ],
    ids=short,
)
def test_plain_data_comes_back_under_any_annotation(hint, value):
    """Plain data comes back under abstract annotations, and under those that cannot be read."""
    assert through(annotated(hint), value) == value


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (str | uuid.UUID, SOME_ID),
        (set[int] | tuple[int, ...], {1}),
        (dt.date | dt.datetime, NOON.date()),
        (Row | Point, Row(SOME_ID)),
        (Domain | Listed, Listed({1})),
        (bytes | Decimal, Decimal(1)),
        (type[int] | set[int], {1}),
    ],
    ids=short,
)
def test_union_that_cannot_be_told_apart_is_right_or_refused(hint, value):
    """Where a payload does not tell which type of a union it was, it is never taken for another."""
    encoded = encode_arguments(annotated(hint), (value,), {})
    assert encoded.not_replayable_because is None
    try:
        (after,), _ = bind(annotated(hint), encoded.payload, encoded.codec)
    except CannotReplayError:
        return
    assert (type(after), after) == (type(value), value)


def partly(one: NoSuchName, other: set[int], third: uuid.UUID | None = None) -> tuple:
    return one, other, third


def test_annotation_that_cannot_be_read_spares_the_others():
    """An annotation that only type checkers can read does not keep the others from being used."""
    assert through(partly, "a", {1, 2}, SOME_ID) == ("a", {1, 2}, SOME_ID)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, 10**60], ids=short)
def test_number_beyond_64_bits_is_carried_or_refused(value):
    """A number too large for msgpack comes back as it is, or is refused with a reason."""
    encoded = encode_arguments(annotated(int), (value,), {})
    if encoded.not_replayable_because is None:
        assert bind(annotated(int), encoded.payload, encoded.codec) == ((value,), {})
    else:
        assert str(value)[:20] in refused(encoded)


@pytest.mark.parametrize("value", ["\ud800", ["a\udcff"], {"\udcff": 1}], ids=ascii)
def test_text_that_is_no_unicode_is_refused(value):
    """Text with half a surrogate pair, as odd file names have it, is refused with a reason."""
    refused(encode_arguments(plain, (value,), {}))
    refused(encode_item(value))


@given(EVERYTHING)
def test_item_is_a_payload(values):
    """An item is encoded like an argument, and can be looked at without annotations."""
    encoded = encode_item(list(values))
    assert (encoded.codec, encoded.content_type) == (ITEM, MSGPACK)
    assert encoded.not_replayable_because is None
    seen = decode_plain(encoded.payload)
    assert (seen[0], seen[7]) == (values[0], values[7])


def test_item_is_handed_to_its_handler():
    """An item goes to the handler's first parameter, by its annotation."""

    def store(row: Row, retries: int = 3) -> None:
        """Store a row."""

    store.__annotations__ = {"row": Row, "retries": int}
    encoded = encode_item(Row(SOME_ID))
    assert bind(store, encoded.payload, encoded.codec) == ((Row(SOME_ID),), {})


# --- parameters ----------------------------------------------------------------------------------


def mixed(a: int, /, b: uuid.UUID, *more: dt.date, c: set[int], d: str = "d", **rest: Decimal):
    return a, b, more, c, d, rest


@given(
    st.lists(st.dates(), max_size=3),
    st.sets(st.integers(0, 9), max_size=3),
    st.dictionaries(st.sampled_from(["a", "x", "more", "rest", "y"]), st.just(Decimal("1.5"))),
)
def test_every_kind_of_parameter(more, c, rest):
    """Positional-only, plain, star, keyword-only and double-star arguments find their places."""
    assert through(mixed, 1, SOME_ID, *more, c=c, **rest) == (
        *(1, SOME_ID, tuple(more), c),
        *("d", rest),
    )


def test_positional_only_name_may_be_a_keyword_too():
    """A keyword that is called like a positional-only parameter stays what it is."""

    def both(a: int, /, **rest: int) -> tuple[int, dict[str, int]]:
        return a, rest

    assert through(both, 1, a=2, rest=3) == (1, {"a": 2, "rest": 3})


def test_keywords_may_be_called_like_receivers():
    """A double-star keyword is payload whatever it is called."""

    def keywords(**rest: int) -> dict[str, int]:
        return rest

    assert through(keywords, args=1, kwargs=2, codec=3) == {"args": 1, "kwargs": 2, "codec": 3}


def test_star_arguments_without_annotations():
    """Star arguments need no annotation."""

    def stars(*args, **kwargs):
        return args, kwargs

    assert through(stars) == ((), {})
    assert through(stars, 1, [2], x={"a": 3}) == ((1, [2]), {"x": {"a": 3}})


def test_defaults_are_left_to_the_handler():
    """What was left to its default is not stored: the handler's own default holds at replay."""

    def before(a, b=1, *, c="old"):
        return a, b, c

    def now(a, b=2, *, c="new"):
        return a, b, c

    encoded = encode_arguments(before, ("x",), {})
    assert b"old" not in encoded.payload
    args, kwargs = bind(now, encoded.payload, encoded.codec)
    assert now(*args, **kwargs) == ("x", 2, "new")
    encoded = encode_arguments(before, ("x",), {"c": "given"})
    args, kwargs = bind(now, encoded.payload, encoded.codec)
    assert now(*args, **kwargs) == ("x", 2, "given")


def test_defaults_between_given_arguments():
    """A default that is left out before an argument that is given does not shift it."""

    def three(a=1, b=2, /, c=3, d=4):
        return a, b, c, d

    assert through(three, 9, d=8) == (9, 2, 3, 8)
    assert through(three, d=8) == (1, 2, 3, 8)
    assert through(three) == (1, 2, 3, 4)


class Client:
    """Something with methods."""

    def fetch(self, url: str, ids: set[int]) -> tuple:
        return url, ids

    @classmethod
    def make(cls, url: str, ids: set[int]) -> tuple:
        return url, ids

    @staticmethod
    def plain(url: str, ids: set[int]) -> tuple:
        return url, ids


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (Client.fetch, (Client(), "u", {1})),
        (Client().fetch, ("u", {1})),
        (Client.make, ("u", {1})),
        (Client.make.__func__, (Client, "u", {1})),
        (Client.plain, ("u", {1})),
    ],
    ids=["function", "method", "classmethod", "its function", "staticmethod"],
)
def test_receivers_are_no_payload(function, args):
    """`self` and `cls` are left out, so that a bound handler takes the payload."""
    encoded = encode_arguments(function, args, {})
    assert encoded.not_replayable_because is None
    assert encoded.left_out == ()
    assert decode_plain(encoded.payload).keys() == {"url", "ids"}
    for handler in (Client().fetch, Client.make, Client.plain):
        args, kwargs = bind(handler, encoded.payload, encoded.codec)
        assert handler(*args, **kwargs) == ("u", {1})


def test_method_needs_a_bound_handler():
    """A payload is refused for a function that wants its receiver."""
    encoded = encode_arguments(Client.fetch, (Client(), "u", {1}), {})
    with pytest.raises(CannotReplayError):
        bind(Client.fetch, encoded.payload, encoded.codec)


def test_partial_and_callable_objects_are_functions_too():
    """A `functools.partial` and an object with `__call__` take payloads as functions do."""

    class Handler:
        def __call__(self, url: str, ids: tuple[int, ...]) -> tuple:
            return url, ids

    Handler.__call__.__annotations__ = {"url": str, "ids": tuple[int, ...]}
    assert through(Handler(), "u", (1, 2)) == ("u", (1, 2))
    assert through(partial(mixed, 7), SOME_ID, c={1})[:4] == (7, SOME_ID, (), {1})


def test_async_functions_and_generators_are_functions_too():
    """Arguments of coroutine functions and of generators are encoded, and nothing is run."""

    async def fetch(url: str) -> None:
        raise AssertionError

    def read(url: str) -> Iterable[str]:
        yield url
        raise AssertionError

    for function in (fetch, read):
        encoded = encode_arguments(function, ("u",), {})
        assert bind(function, encoded.payload, encoded.codec) == (("u",), {})


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (plain, (), {}),
        (plain, (1, 2), {}),
        (plain, (1,), {"value": 2}),
        (plain, (), {"other": 2}),
        (max, (1, 2), {}),
        (dict.update, ({}, {"a": 1}), {}),
        (type, ("x",), {}),
        (7, ("x",), {}),
        (None, (), {"x": 1}),
    ],
    ids=short,
)
def test_call_that_does_not_fit_its_function_is_refused_or_carried(function, args, kwargs):
    """Arguments that do not fit, or of what has no signature, never raise."""
    encoded = encode_arguments(function, args, kwargs)
    if encoded.not_replayable_because is not None:
        refused(encoded)


# --- objects of libraries ------------------------------------------------------------------------

INDICATOR = stix2.Indicator(
    id="indicator--01890a5d-ac96-474b-bcce-b302099a8057",
    name="bad",
    pattern="[domain-name:value = 'auth-paypal-login.example']",
    pattern_type="stix",
    valid_from="2026-01-01T00:00:00.123456Z",
    confidence=80,
    object_marking_refs=[stix2.TLP_AMBER],
    external_references=[{"source_name": "x", "url": "https://x.example/"}],
)
STIX = {
    "indicator": INDICATOR,
    "bundle": stix2.Bundle(INDICATOR, stix2.Malware(name="m", is_family=True)),
    "relationship": stix2.Relationship(INDICATOR, "indicates", stix2.Malware(is_family=False)),
    "observable": stix2.DomainName(value="a.example"),
    "observed": stix2.ObservedData(
        first_observed="2026-01-01T00:00:00Z",
        last_observed="2026-01-01T00:00:00Z",
        number_observed=1,
        object_refs=["domain-name--01890a5d-ac96-474b-bcce-b302099a8057"],
    ),
    "marking": stix2.TLP_AMBER,
    "custom property": stix2.Indicator(
        pattern="[a:b = 'c']", pattern_type="stix", allow_custom=True, x_misp_score=5
    ),
    "version 2.0": stix2.v20.Indicator(pattern="[a:b = 'c']", labels=["malicious-activity"]),
}
IN_SHAPES = {
    "alone": lambda it: it,
    "list": lambda it: [it, it],
    "dict": lambda it: {"a": it},
    "nested": lambda it: [{"a": [it], "b": 1}],
}


@pytest.mark.parametrize("shape", IN_SHAPES)
@pytest.mark.parametrize("name", STIX)
def test_stix_objects_come_back_without_annotations(name, shape):
    """Objects of stix2 come back as what they were, alone and inside of lists and dictionaries."""
    value = IN_SHAPES[shape](STIX[name])
    after = through(plain, value)
    assert type(after) is type(value)
    while isinstance(value, list) or type(value) is dict:
        key = 0 if isinstance(value, list) else "a"
        value, after = value[key], after[key]
    assert type(after) is type(value)
    assert json.loads(after.serialize()) == json.loads(value.serialize())
    assert after == value


@pytest.mark.parametrize(
    ("hint", "shape"),
    [
        (stix2.Indicator, "alone"),
        (Optional[stix2.Indicator], "alone"),  # noqa: UP045
        (stix2.Indicator | stix2.Malware, "alone"),
        (Any, "alone"),
        (object, "alone"),
        (list, "list"),
        (list[Any], "list"),
        (list[stix2.Indicator], "list"),
        (Sequence[stix2.Indicator], "list"),
        (Iterable[stix2.Indicator | stix2.Malware], "list"),
        (dict, "dict"),
        (dict[str, stix2.Indicator], "dict"),
        (dict[str, stix2.Indicator | None], "dict"),
        (Mapping[str, Any], "dict"),
        (list[dict[str, Any]], "nested"),
    ],
    ids=short,
)
def test_stix_objects_come_back_with_annotations(hint, shape):
    """An annotation, of the class or of anything else that fits, does not change stix2 objects."""
    value = IN_SHAPES[shape](INDICATOR)
    assert through(annotated(hint), value) == value


def test_stix_object_of_another_class_is_refused():
    """A stix2 object that is not what the handler wants is refused."""
    encoded = encode_arguments(plain, (INDICATOR,), {})
    with pytest.raises(CannotReplayError):
        bind(annotated(stix2.Malware), encoded.payload, encoded.codec)


SIGHTING = Sighting(value="a.example", at=AWARE, seen=(1, 2))


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Sighting, SIGHTING),
        (Optional[Sighting], SIGHTING),  # noqa: UP045
        (Sighting | None, None),
        (Report, Report(title="t", sightings=[SIGHTING])),
        (Names, Names(["a", "b"])),
        (Renamed, Renamed(firstSeen=NOON.date())),
        (list[Sighting], [SIGHTING, SIGHTING]),
        (Sequence[Sighting], [SIGHTING]),
        (Iterable[Sighting], [SIGHTING]),
        (tuple[Sighting, int], (SIGHTING, 1)),
        (set[Sighting], {SIGHTING}),
        (dict[str, Sighting], {"a": SIGHTING}),
        (dict[str, list[Sighting]], {"a": [SIGHTING]}),
        (Report | Sighting, SIGHTING),
        (list[Report | Sighting], [SIGHTING, Report(title="t")]),
        (Sighting | str, SIGHTING),
        (Sighting | str, "a.example"),
    ],
    ids=short,
)
def test_pydantic_objects_come_back_with_annotations(hint, value):
    """Objects of pydantic come back by their annotation, wherever they are."""
    assert through(annotated(hint), value) == value


@pytest.mark.parametrize("shape", IN_SHAPES)
def test_pydantic_object_without_annotation_is_refused(shape):
    """A pydantic object's JSON does not say its class: without an annotation it is refused."""
    encoded = encode_arguments(plain, (IN_SHAPES[shape](SIGHTING),), {})
    with pytest.raises(CannotReplayError):
        bind(plain, encoded.payload, encoded.codec)
    decode_plain(encoded.payload)


@dataclass
class Holder:
    row: Row
    sighting: Sighting
    indicator: stix2.Indicator


def test_objects_inside_of_records():
    """Objects of libraries come back inside of dataclasses that annotate them."""
    value = Holder(Row(SOME_ID), SIGHTING, INDICATOR)
    assert through(annotated(Holder), value) == value
    assert through(annotated(list[Holder]), [value]) == [value]


def misp_event() -> pymisp.MISPEvent:
    event = pymisp.MISPEvent()
    event.info = "bad things"
    event.distribution = 1
    event.published = False
    event.add_attribute("domain", "auth-paypal-login.example", comment="c")
    event.add_tag("tlp:amber")
    thing = event.add_object(pymisp.MISPObject("file"))
    thing.add_attribute("filename", value="a.exe")
    return event


def misp_attribute() -> pymisp.MISPAttribute:
    attribute = pymisp.MISPAttribute()
    attribute.from_dict(type="domain", value="a.example", to_ids=True)
    return attribute


def misp_tag() -> pymisp.MISPTag:
    tag = pymisp.MISPTag()
    tag.from_dict(name="tlp:red", colour="#ff0000")
    return tag


MISP = {"event": misp_event, "attribute": misp_attribute, "tag": misp_tag}


def same_misp(one: Any, other: Any) -> bool:
    return type(one) is type(other) and json.loads(one.to_json()) == json.loads(other.to_json())


@pytest.mark.parametrize("name", MISP)
def test_misp_objects_come_back_with_annotations(name):
    """Objects of PyMISP come back by their annotation, alone and in lists and dictionaries."""
    value = MISP[name]()
    hint = type(value)
    assert same_misp(through(annotated(hint), value), value)
    assert same_misp(through(annotated(hint | None), value), value)
    first, second = through(annotated(list[hint]), [value, value])
    assert same_misp(first, value)
    assert same_misp(second, value)
    assert same_misp(through(annotated(dict[str, hint]), {"a": value})["a"], value)


@pytest.mark.parametrize("shape", IN_SHAPES)
@pytest.mark.parametrize("name", MISP)
def test_misp_objects_without_annotations_are_right_or_refused(name, shape):
    """Without an annotation a PyMISP object is what it was, or is refused; never another thing."""
    value = MISP[name]()
    encoded = encode_arguments(plain, (IN_SHAPES[shape](value),), {})
    assert encoded.not_replayable_because is None
    decode_plain(encoded.payload)
    try:
        (after,), _ = bind(plain, encoded.payload, encoded.codec)
    except CannotReplayError:
        return
    while isinstance(after, list) or type(after) is dict:
        after = after[0 if isinstance(after, list) else "a"]
    assert same_misp(after, value)


class Unshowable(pydantic.BaseModel):
    value: bytes


class Explosive(pydantic.BaseModel):
    value: str

    @pydantic.field_serializer("value")
    def never(self, value: str) -> str:
        raise RuntimeError(value)


@pytest.mark.parametrize("value", [Unshowable(value=b"\xff\xfe"), Explosive(value="x")], ids=short)
@pytest.mark.parametrize("shape", IN_SHAPES)
def test_library_object_without_json_is_refused(value, shape):
    """An object that its library cannot make JSON of is refused with a reason."""
    refused(encode_arguments(plain, (IN_SHAPES[shape](value),), {}))
    refused(encode_item(IN_SHAPES[shape](value)))


class Derived(Sighting):
    more: str


@dataclass
class Point3(Point):
    z: int = 0


@pytest.mark.parametrize("value", [Point3(1, z=2), [Point3(1, z=2)]], ids=short)
def test_derived_record_loses_nothing_silently(value):
    """A record of a class derived from the annotated one comes back whole, or is refused."""
    function = annotated(list[Point] if isinstance(value, list) else Point)
    encoded = encode_arguments(function, (value,), {})
    try:
        (after,), _ = bind(function, encoded.payload, encoded.codec)
    except CannotReplayError:
        return
    assert after == value


def test_derived_object_loses_nothing_silently():
    """An object of a class derived from the annotated one comes back whole, or is refused."""
    value = Derived(value="v", at=AWARE, more="m")
    encoded = encode_arguments(annotated(Sighting), (value,), {})
    try:
        (after,), _ = bind(annotated(Sighting), encoded.payload, encoded.codec)
    except CannotReplayError:
        return
    assert after == value


class Guarded(pydantic.BaseModel):
    value: pydantic.SecretStr


def test_masked_secret_is_not_taken_for_the_secret():
    """A value that a model masks in its JSON does not come back as its mask."""
    encoded = encode_arguments(annotated(Guarded), (Guarded(value=HIDDEN),), {})
    try:
        (after,), _ = bind(annotated(Guarded), encoded.payload, encoded.codec)
    except CannotReplayError:
        return
    assert set(after.value.get_secret_value()) != {"*"}


NOTHING_IMPORTED = """
import sys
from dataclasses import dataclass
from periscope_otel.dead_letter import codecs

@dataclass
class Point:
    x: int

def function(a: Point, *b: set, **c):
    return a, b, c

class Other:
    pass

function.__annotations__["a"] = Point
encoded = codecs.encode_arguments(function, (Point(1), {2}), {"x": [b"3"]})
codecs.bind(function, encoded.payload, encoded.codec)
codecs.decode_plain(encoded.payload)
codecs.encode_item({"a": object()})
codecs.encode_arguments(function, (Other(), lambda: 0), {})
for code in (1, 2, 3):
    body = b"\\xc7\\x06" + bytes([code]) + b"\\x92\\xa1x\\xa2{}"
    codecs.decode_plain(body)
print([name for name in ("stix2", "pymisp", "pydantic") if name in sys.modules])
"""


def test_encoding_imports_no_library():
    """Encoding anything, binding plain data and looking at any payload imports no library."""
    command = [sys.executable, "-c", NOTHING_IMPORTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# --- secrets -------------------------------------------------------------------------------------


def with_secrets(url, api_key=None, *, password="default", headers=None, **options):
    return url, api_key, password, headers, options


def test_secret_parameters_are_left_out():
    """Arguments named like secrets are not stored, and the payload says which they are."""
    encoded = encode_arguments(
        with_secrets, ("u", HIDDEN), {"password": HIDDEN, "auth_token": HIDDEN, "limit": 5}
    )
    assert HIDDEN.encode() not in encoded.payload
    assert "api_key" in encoded.left_out
    assert len(encoded.left_out) == 3
    assert all(any(name in one for one in encoded.left_out) for name in ("password", "auth_token"))
    args, kwargs = bind(with_secrets, encoded.payload, encoded.codec)
    assert with_secrets(*args, **kwargs) == ("u", None, "default", None, {"limit": 5})


def test_secret_before_other_arguments_does_not_shift_them():
    """A secret that is left out from the middle leaves the arguments after it where they are."""

    def call(url, token="mine", limit=0, *more):
        return url, token, limit, more

    encoded = encode_arguments(call, ("u", HIDDEN, 5), {})
    args, kwargs = bind(call, encoded.payload, encoded.codec)
    assert call(*args, **kwargs) == ("u", "mine", 5, ())
    encoded = encode_arguments(call, ("u", HIDDEN, 5, 6, 7), {})
    assert HIDDEN.encode() not in encoded.payload
    try:
        args, kwargs = bind(call, encoded.payload, encoded.codec)
    except CannotReplayError:
        return
    assert call(*args, **kwargs) == ("u", "mine", 5, (6, 7))


def test_secret_that_the_handler_needs_is_missed():
    """A handler that needs an argument which was not stored is told which."""

    def call(url, api_key):
        return url, api_key

    encoded = encode_arguments(call, ("u", HIDDEN), {})
    assert encoded.not_replayable_because is None
    with pytest.raises(CannotReplayError, match="api_key"):
        bind(call, encoded.payload, encoded.codec)
    handler = partial(call, api_key="mine")
    args, kwargs = bind(handler, encoded.payload, encoded.codec)
    assert handler(*args, **kwargs) == ("u", "mine")


SECRETS = {
    "dict": lambda: {"headers": {"Authorization": HIDDEN, "Accept": "x"}},
    "deep": lambda: {"a": {"b": {"c": {"password": HIDDEN, "user": "x"}}}},
    "list": lambda: [{"token": HIDDEN, "Accept": "x"}],
    "tuple": lambda: ({"token": HIDDEN, "Accept": "x"},),
    "tuples": lambda: {"a": ([{"api-key": HIDDEN}],)},
    "ordered": lambda: collections.OrderedDict(Authorization=HIDDEN, Accept="x"),
    "default": lambda: collections.defaultdict(str, {"cookie": HIDDEN}),
    "whole value": lambda: {"credentials": {"user": "u", "value": HIDDEN}, "a": 1},
    "deeper": lambda: nested(40, {"password": HIDDEN}),
    "too deep": lambda: nested(200, {"password": HIDDEN}),
}


def nested(depth: int, value: object) -> object:
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_inside_of_dictionaries_are_left_out(name):
    """Entries named like secrets are left out of dictionaries, wherever these are."""
    value = SECRETS[name]()
    before = copy.deepcopy(value)
    encoded = encode_arguments(plain, (value,), {})
    assert HIDDEN.encode() not in encoded.payload
    assert HIDDEN not in (encoded.not_replayable_because or "")
    assert value == before
    if name != "too deep":
        assert encoded.not_replayable_because is None
        assert len(encoded.left_out) == 1
        assert HIDDEN not in encoded.left_out[0]


def test_left_out_entries_are_named():
    """What is left out of a dictionary is named by the parameter and the keys that lead to it."""
    encoded = encode_arguments(plain, ({"headers": {"Authorization": HIDDEN}},), {})
    (one,) = encoded.left_out
    assert [word for word in ("value", "headers", "Authorization") if word not in one] == []
    assert decode_plain(encoded.payload) == {"value": {"headers": {}}}


@pytest.mark.parametrize("others", [object(), threading.Lock()], ids=["object", "lock"])
def test_secrets_are_left_out_of_the_text_too(others):
    """Where arguments become a text, secrets among them are not in it."""
    encoded = encode_arguments(
        with_secrets,
        (others, HIDDEN),
        {"password": HIDDEN, "headers": {"Authorization": HIDDEN}, "x": [{"token": HIDDEN}]},
    )
    text = refused(encoded)
    assert HIDDEN not in text
    assert HIDDEN not in encoded.not_replayable_because


def test_credentials_in_the_text_are_redacted():
    """The text about what cannot be carried is redacted like all that is for reading."""

    class Shown:
        def __repr__(self) -> str:
            return f"<Client url='https://user:{HIDDEN}@a.example' api_key='{HIDDEN}'>"

    assert HIDDEN not in refused(encode_arguments(plain, (Shown(),), {}))
    assert HIDDEN not in refused(encode_item([Shown()]))


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "apikey", "API_KEY", "Api-Key", "X-API-Key", "x.api.key", "api_keys"),
        *("password", "passwords", "PASSWORD", "db_password", "smtp.password", "passwd", "pwd"),
        *("passphrase", "secret", "secrets", "client_secret", "client-secret", "secret_key"),
        *("token", "tokens", "access_token", "refresh-token", "auth_token", "bearer_token"),
        *("private_key", "access_key", "authorization", "Authorization", "Proxy-Authorization"),
        *("cookie", "cookies", "Set-Cookie", "session_id", "credentials", "credential", "jwt"),
        *("misp_key", "otx_key", "auth", "MISP_KEY", "misp-key", "apiToken", "accessToken"),
    ],
)
def test_name_of_a_secret(name):
    """These are names of secrets, in any case and with any separator between their words."""
    assert names_a_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "url", "feed", "key", "keys", "name", "value", "indicator", "indicators", "id"),
        *("primary_key", "foreign_key", "public_key", "sort_key", "cache_key", "primary_keys"),
        *("tokenizer", "tokenized", "passive", "passed", "compass", "author", "authors", "monkey"),
        *("author_name", "pattern", "sha256", "hashes", "keyword", "keywords", "passenger"),
        *("secretary", "cookiecutter", "page", "limit", "since", "headers", "session", "s"),
        *("auth-paypal-login.example", "password-reset.example", "token_count", "key_id"),
    ],
)
def test_name_of_no_secret(name):
    """These are not names of secrets."""
    assert not names_a_secret(name)


@pytest.mark.parametrize("piece", ["a", "key_", "api_", "-", ".", " ", "s", "password"])
def test_name_of_any_length(piece):
    """A very long name is answered at once."""
    assert names_a_secret(piece * 100_000) in (True, False)


@given(st.text())
def test_any_name(name):
    """Any text may be asked about."""
    assert names_a_secret(name) in (True, False)


# --- what cannot be carried ----------------------------------------------------------------------


class Rude:
    """Something that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


class Ruder:
    """Something that hides even what it is."""

    @property
    def __class__(self) -> type:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        return 7  # type: ignore[return-value]

    def __getattribute__(self, name: str) -> object:
        raise RuntimeError(name)


class Lying:
    """Something that says that it is of a library."""

    def serialize(self) -> str:
        raise RuntimeError("no")

    to_json = model_dump_json = serialize


Lying.__module__, Lying.__qualname__ = "stix2.base", "_STIXBase"


class Huge:
    """Something that is very long when it is shown."""

    def __repr__(self) -> str:
        return "é" * 5_000_000


class Wild:
    """Something that is shown with control characters and half a surrogate pair."""

    def __repr__(self) -> str:
        return "a\x1b[31m\udcff\u202eb\x00"


def endless_list() -> list:
    one: list = []
    one.append(one)
    return one


def endless_dict() -> dict:
    one: dict = {}
    one["a"] = [one]
    return one


def deep_list(depth: int) -> list:
    one: list = []
    for _ in range(depth):
        one = [one]
    return one


UNCARRIED: dict[str, Callable[[], Any]] = {
    "lambda": lambda: lambda: 0,
    "class": lambda: Rude,
    "module": lambda: json,
    "object": object,
    "lock": threading.Lock,
    "generator": lambda: (n for n in range(3)),
    "iterator": lambda: iter([1]),
    "map": lambda: map(int, "12"),
    "exception": lambda: ValueError("x"),
    "loop": asyncio.Event,
    "repr raises": Rude,
    "all raises": Ruder,
    "lies": Lying,
    "huge repr": Huge,
    "wild repr": Wild,
    "list in itself": endless_list,
    "dict in itself": endless_dict,
    "very deep list": lambda: deep_list(50_000),
    "very deep dict": lambda: nested(50_000, 1),
    "deeper than msgpack": lambda: deep_list(1500),
    "complex": lambda: 1j,
    "range": lambda: range(3),
    "ellipsis": lambda: ...,
}


@pytest.mark.parametrize("shape", ["alone", "list", "dict", "key"])
@pytest.mark.parametrize("name", UNCARRIED)
def test_what_cannot_be_carried_becomes_a_bounded_text(name, shape):
    """What cannot be carried is a bounded text with a reason, and nothing is raised."""
    value = UNCARRIED[name]()
    value = {1j: value} if shape == "key" else IN_SHAPES[shape](value)
    for encoded in (
        encode_arguments(plain, (value,), {}),
        encode_arguments(annotated(list[int]), (), {"value": value}),
        encode_item(value),
    ):
        assert refused(encoded)


def test_open_files_and_sockets_become_a_text(tmp_path):
    """An open file and a socket are not read, and are named in the text."""
    file = tmp_path / "feed.csv"
    file.write_text("a,b")
    with file.open() as opened, socket.socket() as plug:
        for value in (opened, plug):
            text = refused(encode_arguments(plain, (value,), {}))
            assert "value" in text
        assert "feed.csv" in refused(encode_arguments(plain, (opened,), {}))
        assert opened.read() == "a,b"


def test_iterators_are_not_consumed():
    """A generator argument still has everything to give after it was encoded."""
    numbers = (n for n in range(3))
    refused(encode_arguments(plain, (numbers,), {}))
    refused(encode_item(numbers))
    assert list(numbers) == [0, 1, 2]


def test_text_says_what_the_rest_was():
    """Beside what cannot be carried the text tells what the other arguments were."""

    def call(url, source, rows):
        return url, source, rows

    encoded = encode_arguments(call, ("https://feed.example/x", object(), [1, 2]), {})
    text = refused(encoded)
    assert "https://feed.example/x" in text
    assert "object" in encoded.not_replayable_because


def test_text_takes_little_memory_for_large_data():
    """The text about something large is made without a copy of it all."""
    rows = [{"row": "x" * 1000} for _ in range(2000)]
    value = [object(), *rows]
    tracemalloc.start()
    try:
        refused(encode_item(value))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


ANYTHING = st.recursive(
    st.one_of(
        SIMPLE,
        st.text(),
        st.integers(),
        st.binary(max_size=9),
        st.datetimes(timezones=st.none() | st.timezones()),
        st.complex_numbers(),
        st.fractions(),
        st.ip_addresses(),
        st.decimals(),
        st.functions(),
        st.sampled_from([Rude, Ruder, Lying, Wild]).flatmap(st.builds),
        st.sampled_from([int, ..., NotImplemented, INDICATOR]),
        st.characters(categories=["Cs"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(
            st.one_of(SIMPLE, st.binary(max_size=3), st.tuples(SIMPLE), st.characters()),
            inner,
            max_size=3,
        ),
        st.builds(Point, inner, inner),
        st.builds(Domain, inner),
        st.builds(collections.deque, st.lists(inner, max_size=3)),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=9,
)


@given(ANYTHING)
def test_encoding_never_raises(value):
    """Whatever the arguments are, encoding returns a payload or a text with a reason."""
    for encoded in (
        encode_arguments(plain, (value,), {}),
        encode_arguments(mixed, (1, value, value), {"c": value, "x": value}),
        encode_item(value),
    ):
        if encoded.not_replayable_because is not None:
            refused(encoded)
        else:
            decode_plain(encoded.payload)


# --- what cannot be handed over ------------------------------------------------------------------


class Angry(msgspec.Struct):
    x: int

    def __post_init__(self) -> None:
        raise KeyError(self.x)


@dataclass
class Angrier:
    x: int

    def __post_init__(self) -> None:
        raise RuntimeError(self.x)


class Angriest(pydantic.BaseModel):
    x: int

    @pydantic.field_validator("x")
    @classmethod
    def never(cls, value: int) -> int:
        raise RuntimeError(value)


def one_of_each(a: int, b: Point, *c: uuid.UUID, d: set[Row] | None = None, **e: Sighting) -> None:
    """Want a little of everything."""


HANDLERS: list[Callable[..., Any]] = [
    plain,
    everything,
    mixed,
    one_of_each,
    with_secrets,
    annotated(stix2.Indicator),
    annotated(Sighting),
    annotated(pymisp.MISPEvent),
    annotated(list[Sighting | Report]),
    annotated(Angry),
    annotated(Angrier),
    annotated(Angriest),
    annotated(Callable[[], int]),
    annotated(type),
    annotated(socket.socket),
    Client.fetch,
    Client().fetch,
]


def fits_or_cannot(function: Callable[..., Any], payload: bytes, codec: str = ARGUMENTS) -> bool:
    """Bind a payload: what comes back can be called with, or there is the one right error."""
    try:
        args, kwargs = bind(function, payload, codec)
    except CannotReplayError as error:
        message = str(error)
    else:
        inspect.signature(function).bind(*args, **kwargs)
        return True
    assert 0 < len(message) < 4000
    return False


def ext(code: int, body: bytes, name: bytes = b"value") -> bytes:
    """Return a map of one argument that is a msgpack extension."""
    head = b"\xc9" + len(body).to_bytes(4, "big") + bytes([code])
    return b"\x81" + bytes([0xA0 + len(name)]) + name + head + body


HOSTILE = {
    "nothing": b"",
    "none": b"\xc0",
    "number": b"\x07",
    "list": b"\x90",
    "int keys": b"\x81\x01\x02",
    "no utf-8": b"\x81\xa1\xff\x01",
    "no utf-8 value": b"\x81\xa5value\xa1\xff",
    "cut": b"\x82\xa5value\x01",
    "more": b"\x81\xa5value\x01\x01",
    "long": b"\xdf\xff\xff\xff\xff",
    "deep": b"\x81\xa5value" + b"\x91" * 100_000 + b"\xc0",
    "deep keys": b"\x81\xa5value" + b"\x81" * 100_000,
    "list as key": b"\x81\xa5value\x81\x90\x01",
    "bad time": b"\x81\xa5value\xd7\xff" + b"\xff" * 8,
    "bad time 2": b"\x81\xa5value\xc7\x0c\xff" + b"\xff" * 12,
    "unknown ext": ext(99, b"{}"),
    "negative ext": ext(0x85, b"{}"),
    "ext 0": ext(0, b"x"),
    "json": b'{"value": 1}',
    "pickle": pickle.dumps({"value": 1}),
} | {
    f"ext {code} {number}": ext(code, body)
    for code in (1, 2, 3)
    for number, body in enumerate(
        [
            b"",
            b"\xff",
            b"null",
            b"7",
            b"[]",
            b"{}",
            b'"x"',
            b'{"type": "indicator"}',
            b'{"type": 7}',
            b'{"type": "x-unknown", "id": "x"}',
            b'{"type": "bundle", "objects": [7]}',
            b'{"type": "bundle", "id": "bundle--x", "objects": [{"type": []}]}',
            b'{"type": "indicator", "spec_version": "9.9"}',
            b'{"Event": 7}',
            b'{"Event": {"Attribute": 7}}',
            b'{"Event": {"Attribute": [{"type": 7, "value": {}}]}}',
            b'{"info": [], "Attribute": [null]}',
            b'{"x": "y"}',
            b'{"x": 1}',
            b'{"value": 1, "at": 2}',
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"1" * 5000,
        ]
    )
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_payload_cannot_be_replayed(name):
    """A payload that is damaged, or made to do harm, is refused by every handler, or harmless."""
    for function in HANDLERS:
        for codec in (ARGUMENTS, ITEM, TEXT, "pickle", ""):
            fits_or_cannot(function, HOSTILE[name], codec)
    with contextlib.suppress(CannotReplayError):
        decode_plain(HOSTILE[name])


@pytest.mark.parametrize("codec", ["", "pickle", "ARGUMENTS", "json", "zlib", TEXT])
def test_other_codecs_cannot_be_replayed(codec):
    """A payload of an unknown codec, or a text, is refused."""
    encoded = encode_arguments(plain, (1,), {})
    assert fits_or_cannot(plain, encoded.payload)
    assert not fits_or_cannot(plain, encoded.payload, codec)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (plain, {}),
        (plain, {"other": 1}),
        (plain, {"value": 1, "other": 2}),
        (annotated(int), {"value": "x"}),
        (annotated(int), {"value": None}),
        (annotated(str), {"value": 7}),
        (annotated(uuid.UUID), {"value": "x"}),
        (annotated(Colour), {"value": "blue"}),
        (annotated(dt.date), {"value": "2026-99-99"}),
        (annotated(tuple[int, int]), {"value": [1]}),
        (annotated(Point), {"value": {}}),
        (annotated(Point), {"value": {"x": "y"}}),
        (annotated(set[str]), {"value": [{}]}),
        (annotated(Literal["a"]), {"value": "b"}),
        (annotated(Angry), {"value": {"x": 1}}),
        (annotated(Angrier), {"value": {"x": 1}}),
        (mixed, {"a": 1, "b": str(SOME_ID), "c": [1], "more": 7}),
        (mixed, {"a": 1, "b": str(SOME_ID), "c": [1], "more": ["x"]}),
        (mixed, {"a": 1, "b": str(SOME_ID), "c": [1], "rest": [1]}),
        (mixed, {"a": 1, "b": str(SOME_ID), "c": [1], "rest": {"b": "1.5"}}),
        (mixed, {"a": 1, "b": str(SOME_ID), "c": [1], "rest": {"c": "1.5"}}),
        (mixed, {"a": 1, "b": str(SOME_ID), "c": [1], "rest": {1: "1.5"}}),
        (mixed, {"a": 1, "b": str(SOME_ID)}),
        (Client.fetch, {"url": "u", "ids": [1]}),
        (Client.fetch, {"self": 1, "url": "u", "ids": 7}),
    ],
    ids=short,
)
def test_arguments_that_do_not_fit_are_refused(function, arguments):
    """Missing, unexpected and wrong arguments are refused before the handler is called."""
    assert not fits_or_cannot(function, msgspec.msgpack.encode(arguments))


@pytest.mark.parametrize("function", [max, dict.update, type, 7, None], ids=short)
def test_handler_without_a_signature_is_refused(function):
    """What has no signature, or is no function, cannot be a handler."""
    for codec in (ARGUMENTS, ITEM):
        assert not fits_or_cannot(function, encode_item({"value": 1}).payload, codec)


@pytest.mark.parametrize(
    "function",
    [mixed, Client.fetch, lambda: None, Client().fetch],
    ids=["mixed", "method", "none", "bound"],
)
def test_item_that_is_not_all_a_handler_needs_is_refused(function):
    """An item is refused by a handler that takes none, or that needs more than it."""
    assert not fits_or_cannot(function, encode_item(7).payload, ITEM)


def test_refusal_names_the_argument():
    """Why arguments do not fit is told by the parameter's name."""
    payload = msgspec.msgpack.encode({"a": 1, "b": "x", "c": [1]})
    with pytest.raises(CannotReplayError, match=r"\bb\b"):
        bind(mixed, payload, ARGUMENTS)
    with pytest.raises(CannotReplayError, match="value"):
        bind(plain, msgspec.msgpack.encode({}), ARGUMENTS)


@pytest.mark.parametrize("library", ["stix2", "pydantic", "pymisp"])
def test_library_that_is_not_installed_is_named(library, monkeypatch):
    """Where a payload's library is not installed it is refused, and the library is named."""
    value = {"stix2": INDICATOR, "pydantic": SIGHTING, "pymisp": misp_attribute()}[library]
    encoded = encode_arguments(plain, (value,), {})
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CannotReplayError, match=library):
        bind(plain, encoded.payload, encoded.codec)


@given(
    st.sampled_from(HANDLERS),
    st.one_of(
        st.binary(max_size=60),
        st.dictionaries(
            st.sampled_from(["a", "b", "c", "d", "e", "more", "rest", "value", "url", "self"]),
            PLAIN_DATA,
            max_size=6,
        ).map(msgspec.msgpack.encode),
        st.builds(ext, st.integers(0, 5), st.binary(max_size=30)),
        st.builds(
            ext,
            st.integers(1, 3),
            st.dictionaries(
                st.sampled_from(["type", "id", "Event", "info", "value", "at", "x", "objects"]),
                PLAIN_DATA,
                max_size=4,
            ).map(msgspec.json.encode),
        ),
    ),
)
@example(plain, b"\x81\xa5value\xc7\x00\x01")
def test_any_payload_fits_or_is_refused(function, payload):
    """Whatever the bytes, a payload fits its handler or cannot be replayed: no other error."""
    fits_or_cannot(function, payload)
    with contextlib.suppress(CannotReplayError):
        decode_plain(payload)


def test_fuzzed_payloads_fit_or_are_refused():
    """Payloads with bytes changed, added and taken away fit their handlers or are refused."""
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    values = (1, Point(2, AWARE), SOME_ID)
    good = [
        (one_of_each, encode_arguments(one_of_each, values, {"x": SIGHTING}).payload),
        (plain, encode_arguments(plain, ([INDICATOR, {"a": 1}],), {}).payload),
        (
            annotated(pymisp.MISPEvent),
            encode_arguments(plain, (misp_event(),), {}).payload,
        ),
        (
            annotated(list[Sighting]),
            encode_arguments(plain, ([SIGHTING],), {}).payload,
        ),
    ]
    for number in range(2000):
        function, payload = good[number % len(good)]
        fuzzed = bytearray(payload)
        for _ in range(chance.randrange(1, 5)):
            start = chance.randrange(len(fuzzed) + 1)
            end = start + chance.choice((0, 1, 1, 2, 20))
            fuzzed[start:end] = chance.randbytes(chance.choice((0, 1, 1, 2, 5)))
        try:
            fits_or_cannot(function, bytes(fuzzed))
        except Exception as error:
            raise AssertionError(f"seed {seed}, {number}: {bytes(fuzzed).hex()}") from error


# --- secrets inside of objects -------------------------------------------------------------------


class Login(pydantic.BaseModel):
    """A model with a secret that it can do without."""

    url: str
    api_key: str = ""
    secret_key: str = pydantic.Field("", alias="k")


class StrictLogin(pydantic.BaseModel):
    """A model with a secret that it needs."""

    login: Login
    password: str


@dataclass
class Account:
    """A dataclass with a secret that it can do without."""

    name: str
    password: str = "none"
    tokens: list[str] = field(default_factory=list)


@dataclass
class StrictAccount:
    """A dataclass with a secret that it needs."""

    password: str


class Connection(msgspec.Struct):
    """A Struct with a secret that it can do without."""

    host: str
    password: str = ""


def take_login(login: Login) -> Login:
    return login


def take_strict_login(login: StrictLogin) -> StrictLogin:
    return login


def take_account(account: Account) -> Account:
    return account


def take_strict_account(account: StrictAccount) -> StrictAccount:
    return account


def take_connection(connection: Connection) -> Connection:
    return connection


@pytest.mark.parametrize(
    ("take", "given", "back"),
    [
        (take_login, Login(url="u", api_key=HIDDEN, k=HIDDEN), Login(url="u")),
        (take_account, Account("n", HIDDEN), Account("n", "none")),
        (take_connection, Connection("h", HIDDEN), Connection("h")),
    ],
    ids=["pydantic", "dataclass", "struct"],
)
def test_secrets_inside_of_objects_are_left_out(take, given, back):
    """Fields named like secrets are not stored, and have their defaults in a replay."""
    encoded = encode_arguments(take, (given,), {})
    assert HIDDEN.encode() not in encoded.payload
    assert encoded.left_out
    assert encoded.not_replayable_because is None
    args, kwargs = bind(take, encoded.payload, encoded.codec)
    assert take(*args, **kwargs) == back


@pytest.mark.parametrize(
    ("take", "given"),
    [
        (take_strict_login, StrictLogin(login=Login(url="u", api_key=HIDDEN), password=HIDDEN)),
        (take_strict_account, StrictAccount(HIDDEN)),
    ],
    ids=["pydantic", "dataclass"],
)
def test_objects_that_need_their_secrets_are_stored_and_not_replayed(take, given):
    """Without a secret that it needs an object cannot be made again, which is said at once."""
    encoded = encode_arguments(take, (given,), {})
    assert encoded.codec == ARGUMENTS
    assert HIDDEN.encode() not in encoded.payload
    assert "password" in encoded.not_replayable_because
    with pytest.raises(CannotReplayError):
        bind(take, encoded.payload, encoded.codec)


def test_secrets_inside_of_library_objects_are_left_out():
    """Objects of stix2 and PyMISP come back without what is named like a secret."""
    account = stix2.UserAccount(user_id="u", credential=HIDDEN)
    event = pymisp.MISPEvent()
    event.from_dict(info="i", api_key=HIDDEN)
    for one in (account, event):
        encoded = encode_arguments(lambda it: it, (one,), {})
        assert HIDDEN.encode() not in encoded.payload
        assert len(encoded.left_out) == 1
        assert encoded.not_replayable_because is None
        assert HIDDEN.encode() in encode_item(one).payload


def test_items_keep_their_secrets():
    """An item is what was ingested: it is stored with all that is in it."""
    for one in (Login(url="u", api_key=HIDDEN), StrictAccount(HIDDEN), Connection("h", HIDDEN)):
        encoded = encode_item(one)
        assert HIDDEN.encode() in encoded.payload
        assert encoded.not_replayable_because is None


def test_arguments_that_do_not_fit_hide_secrets_by_their_place():
    """Where a parameter's name says so, the text about arguments does not show its value."""
    encoded = encode_arguments(with_secrets, ("u", HIDDEN, "more"), {"client_secret": HIDDEN})
    assert encoded.codec == TEXT
    assert HIDDEN.encode() not in encoded.payload
    assert b"'u'" in encoded.payload
