"""The contracts of what comes back from a Redis, which anybody may have written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from periscope_otel.redaction import clean_name
from periscope_otel.resilience.policy import STATES
from periscope_otel.resilience.sharing.records import (
    DamagedRecordError,
    Record,
    _record,
    event_of,
    leases_key,
    new_epoch,
    record_key,
)

NOW = 1_800_000_000_000
SOUND = [
    b"open",
    b"7",
    b"0123456789abcdef",
    b"1800000030000",
    b"auth",
    b"2",
    b"0",
    b"1799999999000",
]
FIELDS = ("state", "generation", "epoch", "until", "reason", "openings", "successes", "since")
TOLD = {
    "name": "a", "from": "closed", "to": "open", "reason": "auth", "at": NOW, "open_for": 1500,
    "epoch": "0123456789abcdef", "generation": 3,
}  # fmt: skip


def test_a_sound_record_is_read():
    """Times are of the Redis; what is left of the open time is in seconds."""
    assert _record(SOUND, NOW) == Record(
        "open", 7, "0123456789abcdef", 30.0, "auth", 2, 0, 1_799_999_999.0, 1.0
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("state", b"broken"),
        ("state", b"\xff"),
        ("generation", b"0"),
        ("generation", b"9" * 17),
        ("generation", b"1.5"),
        ("generation", b"inf"),
        ("epoch", b"0123456789ABCDEF"),
        ("epoch", b""),
        ("until", b"nan"),
        ("until", b"1900000000000"),
        ("reason", b"x" * 101),
        ("openings", b"-1"),
        ("openings", b"1e3"),
        ("successes", b"5000"),
        ("since", b"x"),
        ("since", None),
    ],
)
def test_a_record_with_a_damaged_field_is_damaged(field, value):
    """Whichever field it is."""
    values = list(SOUND)
    values[FIELDS.index(field)] = value
    with pytest.raises(DamagedRecordError):
        _record(values, NOW)


@given(st.lists(st.none() | st.binary(max_size=120), min_size=8, max_size=8))
def test_whatever_is_there_is_a_record_or_damaged(values):
    """Nothing else is raised."""
    try:
        found = _record(values, NOW)
    except DamagedRecordError:
        return
    assert found.state in STATES


def test_a_reason_is_clean_and_short():
    """It is shown in terminals and told to telemetry."""
    values = list(SOUND)
    values[4] = b"\x1b[2J" + b"y" * 80
    assert _record(values, NOW).reason.isprintable()
    assert len(_record(values, NOW).reason) <= 25


def test_an_event_is_read():
    """As it was told."""
    event = event_of(json.dumps(TOLD).encode())
    assert event is not None
    assert (event.name, event.from_state, event.to_state, event.open_for) == (
        "a", "closed", "open", 1.5,
    )  # fmt: skip
    assert event.version == ("0123456789abcdef", 3)


@given(st.binary() | st.text() | st.none() | st.integers())
def test_whatever_is_said_on_the_channel_is_an_event_or_nothing(message):
    """Nothing is raised."""
    assert event_of(message) is None or isinstance(message, bytes)


@given(st.sampled_from(sorted(TOLD)), st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5,
))  # fmt: skip
def test_an_event_with_any_field_is_an_event_or_nothing(field, value):
    """What is out of range makes no event, or is brought into it."""
    event = event_of(json.dumps(TOLD | {field: value}).encode())
    if event is not None:
        assert event.to_state in STATES
        assert event.open_for is None or 0 <= event.open_for <= 2 * 86_400
        assert event.name == clean_name(event.name)


def test_a_huge_message_is_nothing():
    """It is not even parsed."""
    assert event_of(json.dumps(TOLD | {"more": "x" * 5000}).encode()) is None


@given(st.text(max_size=200))
def test_both_keys_of_a_name_have_one_hash_tag(name):
    """What is between the first braces is the whole name, whatever is in it."""
    record, leases = record_key(name), leases_key(name)
    tag = record[1 : record.index("}")]
    assert leases[1 : leases.index("}")] == tag
    assert record == "{" + tag + "}"


@given(st.lists(st.text(max_size=20), unique=True, max_size=10))
def test_names_have_keys_of_their_own(names):
    """No two share one."""
    keys = {key for name in names for key in (record_key(name), leases_key(name))}
    assert len(keys) == 2 * len(names)


def test_epochs_differ():
    """So that a record that was made anew is known as such."""
    assert len({new_epoch() for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("epoch", "generation", "follows"),
    [("a", 1, False), ("a", 2, False), ("a", 3, True), ("b", 1, True)],
)
def test_what_is_news(epoch, generation, follows):
    """A later generation, or any of another epoch."""
    known = Record("open", 2, "a", 0.0, "", 0, 0, 0.0)
    found = known._replace(epoch=epoch, generation=generation)
    assert found.follows(known) == follows
    assert found.follows(None)
