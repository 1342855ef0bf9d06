"""The Traffic Light Protocol marking of a payload, found without knowing its library.

STIX marks by `object_marking_refs` (STIX 2.1, section 7.2.1.4; TLP 2.0 by definitions of its own),
MISP by tags `tlp:…`, others by a field `tlp`. What is marked in several ways has the strictest of
them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Final

_STRICTEST_FIRST: Final = ("RED", "AMBER+STRICT", "AMBER", "GREEN", "CLEAR")
_SAME: Final = {"WHITE": "CLEAR"}
"""What TLP 1.0 called it."""

_STIX_MARKINGS: Final = {
    # TLP 1.0, in the STIX 2.1 specification.
    "marking-definition--613f2e26-407d-48c7-9eca-b8e91df99dc9": "CLEAR",
    "marking-definition--34098fce-860f-48ae-8e50-ebd3cc5e41da": "GREEN",
    "marking-definition--f88d31f6-486f-44da-b317-01333bde0b82": "AMBER",
    "marking-definition--5e57c739-391a-4eb3-b6be-7d15ca92d5ed": "RED",
    # TLP 2.0, in the OASIS extension definition for it.
    "marking-definition--94868c89-83c2-464b-929b-a1a8aa3c8487": "CLEAR",
    "marking-definition--bab4a63c-aed9-4cf5-a766-dfca5abac2bb": "GREEN",
    "marking-definition--55d920b0-5e8b-4f79-9ee9-91f868d9b421": "AMBER",
    "marking-definition--939a9414-2ddd-4d32-a0cd-375ea402b003": "AMBER+STRICT",
    "marking-definition--e828b379-4e03-4974-9ac4-e53a884c97c1": "RED",
}
_NAMED: Final = re.compile(
    r"\s*(?:tlp\s*[:_ -]\s*)?(red|amber\+strict|amber|green|clear|white)\s*", re.IGNORECASE
)
_TAG: Final = re.compile(r"tlp:(.+)", re.IGNORECASE)

_DEEPEST: Final = 4
_WIDEST: Final = 500
_MOST_LOOKED_AT: Final = 2000
"""Values that are looked at: a marking is near the top of what it marks."""


def tlp_of(value: object) -> str | None:
    """Return the strictest marking of a payload, as `TLP:AMBER`; None if it has none.

    Example:
        >>> tlp_of({"type": "indicator", "tlp": "amber"})
        'TLP:AMBER'
    """
    try:
        found = set(_markings(value))
    except Exception:  # noqa: BLE001  (foreign objects may raise anything)
        return None
    strictest = next((one for one in _STRICTEST_FIRST if one in found), None)
    return None if strictest is None else f"TLP:{strictest}"


def _markings(value: object) -> Iterator[str]:
    waiting: list[tuple[object, int]] = [(value, 0)]
    looked_at = 0
    while waiting and looked_at < _MOST_LOOKED_AT:
        one, depth = waiting.pop()
        looked_at += 1
        fields = _fields_of(one)
        if fields is not None:
            yield from _marked_by(fields)
        if depth < _DEEPEST:
            waiting += [(it, depth + 1) for it in _inside(one, fields) if _may_hold(it)]


def _inside(value: object, fields: Mapping[str, Any] | None) -> Iterator[object]:
    if fields is not None:
        return islice(fields.values(), _WIDEST)
    return islice(value, _WIDEST) if isinstance(value, (list, tuple)) else iter(())


def _may_hold(value: object) -> bool:
    return value is not None and not isinstance(value, (str, bytes, int, float, bool))


def _fields_of(value: object) -> Mapping[str, Any] | None:
    """Return a mapping's entries, or an object's attributes."""
    if isinstance(value, Mapping):
        return value
    cls = type(value)
    # Of named tuples, of msgspec, and of classes with slots, such as those of attrs.
    for listed in ("_fields", "__struct_fields__", "__slots__"):
        names = getattr(cls, listed, None)
        if isinstance(names, (list, tuple)) and names:
            slots = {name: getattr(value, name, None) for name in names if isinstance(name, str)}
            return {**getattr(value, "__dict__", {}), **slots}
    if isinstance(value, (list, tuple, set, frozenset)) or value is None:
        return None
    return getattr(value, "__dict__", None)


def _marked_by(fields: Mapping[str, Any]) -> Iterator[str]:
    for reference in _texts(fields.get("object_marking_refs")):
        if marking := _STIX_MARKINGS.get(reference):
            yield marking
    if isinstance(named := fields.get("tlp"), str) and (found := _NAMED.fullmatch(named)):
        yield _named(found[1])
    for name in ("Tag", "tags", "Tags"):
        for tag in _texts(fields.get(name)):
            if found := _TAG.fullmatch(tag):
                yield _named(found[1])


def _texts(values: object) -> Iterator[str]:
    """Give the texts of a list; of an object in it, its name or id."""
    if isinstance(values, (list, tuple)):
        for one in islice(values, 200):
            fields = _fields_of(one)
            text = one if fields is None else fields.get("name", fields.get("id"))
            if text is not None:
                yield str(text)


def _named(text: str) -> str:
    name = text.strip().upper()
    return _SAME.get(name, name)
