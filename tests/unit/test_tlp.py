"""The contracts of TLP markings: the strictest is found, wherever the library has put it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import pydantic
import pymisp
import pytest
import stix2

from periscope_otel.dead_letter.tlp import tlp_of

AMBER_1 = "marking-definition--f88d31f6-486f-44da-b317-01333bde0b82"
RED_2 = "marking-definition--e828b379-4e03-4974-9ac4-e53a884c97c1"
STRICT_2 = "marking-definition--939a9414-2ddd-4d32-a0cd-375ea402b003"


class Row(NamedTuple):
    tlp: str


@dataclass(slots=True)
class Slotted:
    tlp: str


class Packed(msgspec.Struct):
    tlp: str


class Model(pydantic.BaseModel):
    tlp: str


class Plain:
    def __init__(self, tlp: str) -> None:
        self.tlp = tlp


@pytest.mark.parametrize(
    ("text", "marking"),
    [
        ("red", "TLP:RED"),
        ("TLP:RED", "TLP:RED"),
        ("tlp: amber+strict", "TLP:AMBER+STRICT"),
        ("Amber", "TLP:AMBER"),
        ("tlp_green", "TLP:GREEN"),
        ("clear", "TLP:CLEAR"),
        ("white", "TLP:CLEAR"),
        ("reddish", None),
        ("", None),
    ],
)
def test_a_field_named_tlp_is_the_marking(text, marking):
    """As TLP 1.0 and 2.0 write it, in any case; nothing else is one."""
    assert tlp_of({"tlp": text}) == marking


@pytest.mark.parametrize("kind", [Row, Slotted, Packed, Plain, lambda tlp: Model(tlp=tlp)])
def test_objects_of_every_kind_are_looked_at(kind):
    """Also those that keep their fields in slots."""
    assert tlp_of([kind("amber")]) == "TLP:AMBER"


@pytest.mark.parametrize(
    ("references", "marking"),
    [([AMBER_1], "TLP:AMBER"), ([AMBER_1, STRICT_2], "TLP:AMBER+STRICT"), ([RED_2], "TLP:RED")],
)
def test_stix_markings_are_known(references, marking):
    """The definitions of TLP 1.0 and 2.0, in what was parsed as JSON."""
    bundle = {"type": "bundle", "objects": [{"object_marking_refs": references}]}
    assert tlp_of(bundle) == marking


def test_objects_of_stix2_are_looked_at():
    """Marked by the library's own constant."""
    indicator = stix2.Indicator(
        pattern="[domain-name:value = 'a.example']",
        pattern_type="stix",
        object_marking_refs=[stix2.TLP_GREEN],
    )
    assert tlp_of(stix2.Bundle(indicator)) == "TLP:GREEN"


def test_objects_of_pymisp_are_looked_at():
    """The strictest tag of an event and its attributes."""
    event = pymisp.MISPEvent()
    event.info = "test"
    event.add_tag("tlp:green")
    event.add_attribute("domain", "a.example").add_tag("tlp:amber+strict")
    assert tlp_of(event) == "TLP:AMBER+STRICT"
    assert tlp_of(event.to_dict()) == "TLP:AMBER+STRICT"


@pytest.mark.parametrize("tags", [["tlp:red"], [{"name": "TLP:RED"}], ("x", "tlp:red")])
@pytest.mark.parametrize("name", ["Tag", "tags", "Tags"])
def test_tags_mark(tags, name):
    """As texts or as objects with a name."""
    assert tlp_of({name: tags}) == "TLP:RED"


def test_what_is_not_marked_has_no_marking():
    """Indicators that mention a colour are none."""
    assert tlp_of({"value": "tlp:red", "tags": ["tlp:ex:chr", "osint"], "n": 1}) is None
    assert tlp_of(None) is None
    assert tlp_of(b"tlp:red") is None


def test_the_strictest_of_all_wins():
    """Whatever the order and the depth."""
    assert tlp_of([{"tlp": "clear"}, {"a": {"tlp": "red"}}, {"tlp": "amber"}]) == "TLP:RED"


class Hostile:
    """Raises at every look."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


def test_hostile_objects_have_no_marking():
    """Nothing that they do gets out."""
    assert tlp_of([Hostile()]) is None


def test_what_refers_to_itself_is_looked_at_once_or_so():
    """The search ends."""
    round_and_round: list[Any] = [{"tlp": "green"}]
    round_and_round += [round_and_round] * 100
    assert tlp_of(round_and_round) == "TLP:GREEN"


def test_huge_payloads_are_looked_at_within_bounds():
    """A list that never ends gives no more than its beginning."""

    class Endless(list):
        looked_at = 0

        def __iter__(self):
            while True:
                Endless.looked_at += 1
                yield {"a": 1}

    assert tlp_of(Endless()) is None
    assert Endless.looked_at < 1000
