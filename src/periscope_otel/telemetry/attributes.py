"""Names, labels and attribute values that no exporter, terminal or reader stumbles over.

Users put anything into them: a feed's URL with a password, text with half a surrogate pair (one
of which makes the OTLP encoder drop a whole batch), an integer of 70 bits, a list of a million.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from periscope_otel.redaction import clean_name, redact

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue

_TEXT_LIMIT = 1024
_NESTED_TEXT_LIMIT = 256
_MOST_MEMBERS = 64
_MOST_NESTED_MEMBERS = 8
_DEEPEST = 3
_INT64 = 2**63


def clean_label(value: object) -> str:
    """Return a value as a name or label: one bounded, harmless line without secrets.

    An empty result stands for none: an empty label and a missing one are the same to Prometheus.
    """
    name = clean_name(value)
    # Only a URL, a pair or a header can hold a secret; most names hold none of these.
    return redact(name, 200) if any(mark in name for mark in ":=@") else name


def clean_attributes(attributes: Mapping[str, AttributeValue]) -> dict[str, AttributeValue]:
    """Return a user's span attributes with keys and values made harmless."""
    return dict(clean_attribute(key, value) for key, value in attributes.items())


def clean_attribute(key: object, value: object) -> tuple[str, AttributeValue]:
    """Return one span attribute, key and value made harmless and bounded."""
    name = clean_label(key)
    return name, "[redacted]" if _names_a_secret(name) else _clean(value, 0)


def _clean(value: object, depth: int) -> AttributeValue:
    if isinstance(value, str):
        return redact(value, _NESTED_TEXT_LIMIT if depth else _TEXT_LIMIT)
    if value is None or isinstance(value, (bool, int, float)):
        fits = not isinstance(value, int) or -_INT64 <= value < _INT64
        return value if fits else "<number beyond 64 bits>"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    if isinstance(value, (Mapping, Sequence, AbstractSet)):
        return _clean_members(value, depth)
    return redact(clean_name(value, _TEXT_LIMIT))


def _clean_members(
    value: Mapping[object, object] | Sequence[object] | AbstractSet[object], depth: int
) -> AttributeValue:
    if depth >= _DEEPEST:
        return f"<{clean_name(type(value).__name__)}>"
    most = _MOST_NESTED_MEMBERS if depth else _MOST_MEMBERS
    if isinstance(value, Mapping):
        return {
            name: "[redacted]" if _names_a_secret(name) else _clean(member, depth + 1)
            for name, member in ((clean_label(k), v) for k, v in islice(value.items(), most))
        }
    return [_clean(member, depth + 1) for member in islice(value, most)]


@lru_cache(maxsize=256)
def _names_a_secret(name: str) -> bool:
    """Whether `name=value` would lose its value."""
    return redact(f"{name}=q8Zk2Lw9Xv4Tn7Rb") != f"{name}=q8Zk2Lw9Xv4Tn7Rb"
