"""The contracts of a letter's encoded form, of its payload, and of the names that it is given."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import random
import subprocess
import sys
import threading
import tracemalloc
import uuid
import zlib
from datetime import UTC, datetime
from itertools import pairwise

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from periscope_otel.dead_letter import DamagedLetterError, Letter
from periscope_otel.dead_letter.identity import LetterIds, content_key, fingerprint
from periscope_otel.dead_letter.letter import (
    COMPRESSED_FROM,
    LONGEST_PAYLOAD,
    SCHEMA,
    STATES,
    pack,
)

ID = "01890a5d-ac96-774b-bcce-b302099a8057"
MILLISECOND = 1_000_000
NOON = 1_760_000_000_000 * MILLISECOND
"""Unix nanoseconds, on a whole millisecond."""
RAISED_AT = "def {name}():\n    raise {error}\n"

TEXT = st.text(max_size=30)
TIMES = st.floats(min_value=0, max_value=4e9)
FEW = st.integers(min_value=0, max_value=2**40)
PAYLOADS = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda piece, times: piece * times, st.binary(max_size=9), st.integers(0, 2000)),
    st.builds(lambda size: random.Random(size).randbytes(size), st.integers(4000, 9000)),
)
ERRORS = {
    "error_type": st.none() | TEXT,
    "error_message": TEXT,
    "error_stack": TEXT,
    "fingerprint": TEXT,
    "last_failed_at": TIMES,
    "not_before": TIMES,
    "traceparent": st.none() | TEXT,
    "tracestate": st.none() | TEXT,
}
"""What a further failure of the same payload changes."""
FIELDS = ERRORS | {
    "queue": TEXT,
    "feed": st.none() | TEXT,
    "key": TEXT,
    "content_type": TEXT,
    "body_file": st.none() | TEXT,
    "replayable": st.booleans(),
    "not_replayable_because": st.none() | TEXT,
    "headers": st.dictionaries(TEXT, TEXT, max_size=3),
    "attempts": FEW,
    "first_failed_at": TIMES,
    "host": TEXT,
    "pid": FEW,
    "versions": TEXT,
    "tlp": st.none() | TEXT,
    "batch_id": st.none() | TEXT,
    "item_index": st.none() | FEW,
    "state": st.sampled_from(STATES),
    "revision": FEW,
    "replays": FEW,
}
NEEDED = {"id": st.uuids().map(str), "operation": TEXT, "codec": TEXT}
LETTERS = st.builds(
    lambda payload, fields: Letter(**fields, **pack(payload)),
    PAYLOADS,
    st.fixed_dictionaries(NEEDED, optional=FIELDS),
)
LATER = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(min_value=-(2**63), max_value=2**64 - 1),
        st.floats(allow_nan=False),
        TEXT,
        st.binary(max_size=30),
        # A time that a clock change repeats equals none of another zone (PEP 495).
        st.datetimes(timezones=st.timezones())
        .filter(lambda it: it.year > 2)
        .map(lambda it: it.astimezone(UTC)),
        st.builds(msgspec.msgpack.Ext, st.integers(0, 127), st.binary(max_size=9)),
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXT | st.integers(-9, 9) | st.binary(max_size=3), inner, max_size=3)
    ),
    max_leaves=9,
)
"""Values that a newer version may have thought of."""
NEWER = st.dictionaries(st.text(max_size=9).map(lambda it: f"newer_{it}"), LATER, max_size=4)


def a_letter(payload: bytes = b"payload", **fields: object) -> Letter:
    return Letter(**({"id": ID, "operation": "store", "codec": "item"} | pack(payload) | fields))


def as_map(letter: Letter) -> dict:
    return msgspec.msgpack.decode(letter.encode())


def is_letter_or_damaged(blob: bytes) -> Letter | None:
    """Return what was decoded; None if it was refused in the one right way."""
    try:
        letter = Letter.decode(blob)
    except DamagedLetterError:
        return None
    assert isinstance(letter, Letter)
    return letter


# --- encode and decode ---------------------------------------------------------------------------


@given(LETTERS)
def test_letter_comes_back_as_it_was(letter):
    """Whatever is in its fields, a letter that was encoded is decoded as it was."""
    again = Letter.decode(letter.encode())
    assert again == letter
    assert again.payload() == letter.payload()
    assert again.encode() == Letter.decode(again.encode()).encode()


@given(LETTERS)
def test_letter_is_a_map_with_its_schema(letter):
    """The encoded form is a msgpack map by field; the schema, 1 if it is not said, is our own."""
    raw = msgspec.msgpack.decode(letter.encode())
    assert raw["id"] == letter.id
    assert raw.get("schema", 1) == letter.schema == SCHEMA == 1


@given(LETTERS, NEWER, st.integers(2, 99))
def test_fields_of_a_newer_schema_survive(letter, newer, schema):
    """What a newer version has added is there again, value for value, after a round trip here."""
    written = as_map(letter) | newer | {"schema": schema}
    read = Letter.decode(msgspec.msgpack.encode(written))
    assert read.unknown == newer
    again = msgspec.msgpack.decode(read.encode())
    assert {name: again.get(name, "gone") for name in newer} == newer
    assert Letter.decode(read.encode()) == read == letter.changed(schema=schema, unknown=newer)


@pytest.mark.parametrize(
    "value",
    [
        {"a": {1: "int key", -1: None}},
        {b"bytes key": [b"\x00\xff"]},
        {None: 1, True: 2, 1.5: 3},
        [2**64 - 1, -(2**63), 1e300],
        datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        [{"at": datetime(2026, 1, 2, tzinfo=UTC)}],
        msgspec.msgpack.Ext(7, b"x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_newer_field_of_any_type_survives(value):
    """A newer field may be of any type that msgpack has, and comes back as that."""
    written = as_map(a_letter()) | {"schema": 2, "newer": value}
    again = Letter.decode(Letter.decode(msgspec.msgpack.encode(written)).encode())
    assert again.unknown == {"newer": value}
    assert msgspec.msgpack.encode(again.unknown) == msgspec.msgpack.encode({"newer": value})


@given(LETTERS, LETTERS, NEWER)
def test_changes_keep_the_fields_of_a_newer_schema(letter, failure, newer):
    """A changed letter, also one with a later failure, still has the fields of a newer schema."""
    written = as_map(letter) | newer | {"schema": 2}
    read = Letter.decode(msgspec.msgpack.encode(written))
    changed = read.changed(state="parked", revision=7).with_latest(failure.latest())
    assert Letter.decode(changed.encode()) == changed
    again = msgspec.msgpack.decode(changed.encode())
    assert {name: again.get(name) for name in newer} == newer
    assert (again["schema"], again["state"], again["revision"]) == (2, "parked", 7)


def test_newer_field_never_stands_for_an_older_one():
    """A letter with a made-up map of newer fields keeps its own id, operation and payload."""
    letter = a_letter(unknown={"id": "other", "operation": "other", "body": b"other"}, schema=2)
    again = Letter.decode(letter.encode())
    assert (again.id, again.operation, again.payload()) == (ID, "store", b"payload")


@given(LETTERS, st.fixed_dictionaries({}, optional=FIELDS))
def test_changed_letter_differs_in_what_was_changed(letter, fields):
    """`changed` returns a copy with other values and leaves the letter itself alone."""
    before = letter.encode()
    assert letter.changed(**fields) == Letter(**(msgspec.structs.asdict(letter) | fields))
    assert letter.encode() == before


@given(LETTERS, LETTERS)
def test_latest_failure_replaces_the_error_alone(letter, failure):
    """A letter takes in the error of a later failure, and keeps all else."""
    merged = letter.with_latest(failure.latest())
    assert merged == letter.changed(**{name: getattr(failure, name) for name in ERRORS})


def test_letter_cannot_be_changed():
    """A letter is frozen."""
    with pytest.raises(AttributeError):
        a_letter().state = "dead"


# --- damage --------------------------------------------------------------------------------------


@functools.cache
def victim() -> Letter:
    """Return a letter with something in each field, and with fields of a newer schema."""
    letter = a_letter(
        b"indicator" * 600,
        feed="urlhaus",
        key="k" * 32,
        headers={"etag": "x"},
        error_type="ConnectTimeout",
        error_message="timed out",
        error_stack="File x",
        fingerprint="5f0c1a9be3d24c77",
        attempts=3,
        first_failed_at=1.5,
        last_failed_at=2.5,
        not_before=3.5,
        traceparent="00-1-2-01",
        host="host",
        pid=7,
        tlp="TLP:AMBER",
        batch_id="b",
        item_index=4,
        state="dead",
        revision=5,
        replays=6,
    )
    newer = as_map(letter) | {"schema": 2, "newer": {"a": [1, {"b": b"\x00"}]}}
    return Letter.decode(msgspec.msgpack.encode(newer))


def test_every_truncated_letter_is_refused():
    """A blob that ends too soon, wherever that is, is damaged."""
    blob = victim().encode()
    assert [n for n in range(len(blob)) if is_letter_or_damaged(blob[:n]) is not None] == []


def test_letter_with_something_behind_it_is_refused():
    """A blob that goes on after the letter is damaged."""
    for more in (b"\x00", b"\xc0", victim().encode()):
        with pytest.raises(DamagedLetterError):
            Letter.decode(victim().encode() + more)


def test_no_flipped_bit_does_worse_than_damage():
    """With any one bit flipped a letter is damaged or reads as a letter, never another error.

    And if it can still be read, then its payload is the one that was put in, or is damaged.
    """
    blob = bytearray(victim().encode())
    payload = victim().payload()
    others = 0
    for place, bit in itertools.product(range(len(blob)), range(8)):
        blob[place] ^= 1 << bit
        letter = is_letter_or_damaged(bytes(blob))
        blob[place] ^= 1 << bit
        if letter is None:
            continue
        letter.encode()
        try:
            others += letter.payload() != payload
        except DamagedLetterError:
            continue
    assert others == 0


def test_ten_thousand_fuzzed_blobs():
    """Of 10,000 fuzzed blobs each is a letter or damaged, and so is its payload."""
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    blob = victim().encode()
    for number in range(10_000):
        fuzzed = bytearray(blob if number % 4 else chance.randbytes(chance.randrange(300)))
        for _ in range(chance.randrange(1, 9)):
            start = chance.randrange(len(fuzzed) + 1)
            end = start + chance.choice((0, 0, 1, 1, 2, 40))
            fuzzed[start:end] = chance.randbytes(chance.choice((0, 1, 1, 2, 9)))
        try:
            letter = is_letter_or_damaged(bytes(fuzzed))
            if letter is not None:
                letter.encode()
                letter.payload()
        except DamagedLetterError:
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {number}: {bytes(fuzzed).hex()}") from error


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\xc0",
        b"\x01",
        b"\x80",
        b"\x90",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000 + b"\xc0",
        b"\x81\xa1x" * 100_000 + b"\xc0",
        msgspec.msgpack.encode({}),
        msgspec.msgpack.encode([ID, "store", "item"]),
        msgspec.msgpack.encode({"id": ID, "operation": "store"}),
        msgspec.msgpack.encode({"id": ID, "operation": None, "codec": "item"}),
        msgspec.msgpack.encode({1: ID, b"operation": "store", "codec": "item"}),
        msgspec.json.encode({"id": ID, "operation": "store", "codec": "item"}),
        b"\x83\xa2id\xa1\xff\xa9operation\xa1x\xa5codec\xa1x",
        pytest.param(b"\xd7\xff" + b"\xff" * 8, id="time"),
    ],
    ids=lambda blob: blob[:6].hex(),
)
def test_what_is_no_letter_is_damaged(blob):
    """Whatever else it may be, what is not a letter's map is damaged."""
    with pytest.raises(DamagedLetterError):
        Letter.decode(blob)


@pytest.mark.parametrize(
    "newer",
    [
        b"\x91" * 100_000 + b"\xc0",
        b"\xdd\xff\xff\xff\xff",
        b"\x81\x80\x01",
        b"\x81\x90\x01",
        b"\x81\xc0\x01",
        b"\x81\xc2\x01",
        b"\xd7\xff" + b"\xff" * 8,
        b"\xa1\xff",
        b"\xc1",
    ],
    ids=lambda newer: newer[:3].hex(),
)
@pytest.mark.parametrize("key", [b"\xa1n", b"\x01", b"\xc0", b"\xa1\xff", b"\x80", b"\x90"])
def test_damaged_newer_fields_are_damage(newer, key):
    """Newer fields that are nested without end, cut or no msgpack are damage, or are carried."""
    fields = b"\xa2id\xa1i\xa9operation\xa1o\xa5codec\xa1c\xa6schema\x02"
    letter = is_letter_or_damaged(b"\x85" + fields + key + newer)
    if letter is not None:
        assert Letter.decode(letter.encode()) == letter


@given(st.binary(max_size=60))
@example(b"\x91" * 100_000)
@example(msgspec.msgpack.encode(["x"] * 8))
@example(b"\x98\xa1\xff")
def test_damaged_latest_failure_is_damage(blob):
    """What is no latest failure is damaged, and nothing else."""
    with contextlib.suppress(DamagedLetterError):
        assert isinstance(a_letter().with_latest(blob), Letter)


# --- the payload ---------------------------------------------------------------------------------


@given(PAYLOADS)
@example(b"")
@example(b"a" * COMPRESSED_FROM)
def test_payload_comes_back_as_it_was(payload):
    """What was packed is unpacked, with its true size and digest in the letter."""
    letter = a_letter(payload)
    assert letter.payload() == payload == letter.unpack(letter.body)
    assert letter.size == len(payload)
    assert letter.sha256 == hashlib.sha256(payload).digest()


@given(PAYLOADS)
def test_payload_never_grows(payload):
    """Packing never makes a payload longer, however little there is to gain."""
    assert len(a_letter(payload).body) <= len(payload)


def test_payload_is_compressed_from_4_kib():
    """A payload of 4 KiB that can be compressed is; one byte less stays as it is."""
    small, large = a_letter(b"a" * 4095), a_letter(b"a" * 4096)
    assert (small.compression, small.body) == ("", b"a" * 4095)
    assert large.compression == "zlib"
    assert len(large.body) < 100
    assert zlib.decompress(large.body) == b"a" * 4096


def bomb(size: int) -> bytes:
    """Return what unpacks to many zeros."""
    packer = zlib.compressobj(9)
    piece = b"\x00" * (1 << 20)
    return b"".join(packer.compress(piece) for _ in range(size >> 20)) + packer.flush()


@pytest.mark.parametrize("said", [0, 1, 10, 4096, 1 << 20])
def test_decompression_stops_where_the_letter_says(said):
    """A body that unpacks to more than its letter says is damaged, and takes no memory for it."""
    letter = a_letter(body=bomb(64 << 20), size=said, compression="zlib")
    tracemalloc.start()
    try:
        with pytest.raises(DamagedLetterError):
            letter.payload()
        assert tracemalloc.get_traced_memory()[1] < 3 * said + (1 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("said", [-1, LONGEST_PAYLOAD + 1, 2**62])
def test_sizes_that_no_payload_has_are_damage(said):
    """A letter that says that its payload has less than nothing or above 1 GiB is damaged."""
    with pytest.raises(DamagedLetterError):
        a_letter(body=bomb(1 << 20), size=said, compression="zlib").payload()


def test_no_memory_is_taken_for_what_a_letter_merely_says():
    """A small body takes little memory, however long its letter says that the payload is."""
    letter = a_letter(body=zlib.compress(b"x"), size=LONGEST_PAYLOAD, compression="zlib")
    tracemalloc.start()
    try:
        with pytest.raises(DamagedLetterError):
            letter.payload()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [1, 100, 5000])
def test_damaged_payload_is_detected(size):
    """A body that is cut, longer, empty or has any one bit flipped is damaged."""
    letter = a_letter(random.Random(size).randbytes(size // 2) * 2 or b"x")
    chance = random.Random(size)
    wrong = [letter.body[:-1], letter.body[1:], b""]
    for _ in range(300):
        flipped = bytearray(letter.body)
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        wrong.append(bytes(flipped))
    for body in wrong:
        for call in (letter.changed(body=body).payload, functools.partial(letter.unpack, body)):
            with pytest.raises(DamagedLetterError):
                call()


@pytest.mark.parametrize(
    "fields",
    [
        {"sha256": b""},
        {"sha256": b"\x00" * 32},
        {"size": 6},
        {"compression": "zlib"},
        {"compression": "zstd", "body": b"(\xb5/\xfd"},
        {"compression": "zlib", "body": zlib.compress(b"payload")[:-1]},
        {"compression": "zlib", "body": b""},
    ],
    ids=str,
)
def test_payload_that_its_letter_does_not_describe_is_damaged(fields):
    """A digest, a size or a compression that is not the payload's is damage."""
    with pytest.raises(DamagedLetterError):
        a_letter(b"payload", **fields).payload()


# --- ids -----------------------------------------------------------------------------------------


class Clock:
    """Nanoseconds that a test moves."""

    def __init__(self, now: int = NOON) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def milliseconds(letter_id: str) -> int:
    return uuid.UUID(letter_id).int >> 80


@given(st.integers(min_value=0, max_value=(2**48 - 1) * MILLISECOND))
def test_id_is_a_uuid_of_version_7(now):
    """An id is a UUID of version 7 as text, and its first 48 bits are Unix milliseconds."""
    made = LetterIds(Clock(now)).new()
    parsed = uuid.UUID(made)
    assert str(parsed) == made
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    assert milliseconds(made) == now // MILLISECOND


def test_ids_of_one_millisecond_are_counted():
    """Ids of the same millisecond share their first 48 bits, and the next 12 grow."""
    ids = LetterIds(Clock())
    few = [uuid.UUID(ids.new()).int for _ in range(3)]
    assert {one >> 80 for one in few} == {NOON // MILLISECOND}
    counters = [one >> 64 & 0xFFF for one in few]
    assert all(later - earlier > 0 for earlier, later in pairwise(counters))


def test_ids_beyond_4096_a_millisecond_go_on_growing():
    """Where a millisecond is too short for all ids they still grow, and none is made twice."""
    ids = LetterIds(Clock())
    many = [ids.new() for _ in range(20_000)]
    assert many == sorted(set(many))
    assert {uuid.UUID(one).version for one in many} == {7}
    assert milliseconds(many[-1]) - milliseconds(many[0]) <= 5


@given(st.lists(st.integers(-3_000_000_000, 3_000_000_000), min_size=1, max_size=60))
def test_ids_grow_though_the_clock_goes_back(steps):
    """However the clock jumps, each id is greater than the one before."""
    clock = Clock()
    ids = LetterIds(clock)
    made = []
    for step in steps:
        clock.now += step
        made += [ids.new(), ids.new()]
    assert made == sorted(set(made))


def test_ids_return_to_the_clock_when_it_catches_up():
    """After the clock went back and forward again an id has the clock's milliseconds."""
    clock = Clock()
    ids = LetterIds(clock)
    first = ids.new()
    clock.now -= 3600 * 1000 * MILLISECOND
    assert ids.new() > first
    clock.now = NOON + 5 * MILLISECOND
    assert milliseconds(ids.new()) == clock.now // MILLISECOND


@pytest.mark.parametrize("clock", [None, Clock()], ids=["real clock", "clock that stands"])
def test_ids_of_many_threads_are_unique_and_sorted(clock):
    """Threads that make ids at the same time get different ones, each thread growing ones."""
    ids = LetterIds() if clock is None else LetterIds(clock)
    barrier = threading.Barrier(8)
    made: list[list[str]] = [[] for _ in range(8)]

    def make(mine: list[str]) -> None:
        barrier.wait()
        mine.extend(ids.new() for _ in range(5000))

    threads = [threading.Thread(target=make, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) for mine in made)
    assert len({one for mine in made for one in mine}) == 8 * 5000


INTERRUPTED = """
import json, signal
from periscope_otel.dead_letter.identity import LetterIds
ids, handled = LetterIds(lambda: 1_760_000_000_000_000_000), []
ids.new()
signal.signal(signal.SIGALRM, lambda *_: handled.append(ids.new()))
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
made = []
while len(made) < 20_000 or not handled:
    made.append(ids.new())
signal.setitimer(signal.ITIMER_REAL, 0)
print(json.dumps([made, handled]))
"""


@pytest.mark.usefixtures("uncovered")
def test_ids_made_by_a_signal_handler_are_others():
    """A handler that interrupts who makes an id may make one too, and none is made twice."""
    command = [sys.executable, "-W", "ignore", "-c", INTERRUPTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    made, handled = json.loads(done.stdout)
    assert made == sorted(made)
    stamps = {uuid.UUID(one).int >> 64 for one in (*made, *handled)}
    assert len(stamps) == len(made) + len(handled)


def test_ids_of_two_makers_differ():
    """Makers with the same clock, as two processes have them, make different ids."""
    first, second = LetterIds(Clock()), LetterIds(Clock())
    made = [ids.new() for _ in range(5000) for ids in (first, second)]
    assert len(set(made)) == 10_000


FORK = """
import json, os, threading
from periscope_otel.dead_letter.identity import LetterIds

ids = LetterIds(lambda: 1_760_000_000_000_000_000)
stop = threading.Event()
def make():
    while not stop.is_set():
        ids.new()
thread = threading.Thread(target=make)
thread.start()
children = []
for _ in range(20):
    read, write = os.pipe()
    if os.fork() == 0:
        ids.after_fork()
        os.write(write, json.dumps([ids.new() for _ in range(20)]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        children.append(json.load(pipe))
    os.wait()
stop.set()
thread.join()
print(json.dumps([*children, [ids.new() for _ in range(20)]]))
"""


@pytest.mark.usefixtures("uncovered")
def test_ids_of_forked_children_differ():
    """Children forked while a thread makes ids neither hang nor make an id twice."""
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    made = json.loads(done.stdout)
    assert len({one for mine in made for one in mine}) == 21 * 20
    assert all(mine == sorted(mine) for mine in made)


# --- keys ----------------------------------------------------------------------------------------

KEYED = st.tuples(TEXT, st.none() | TEXT, st.binary(min_size=32, max_size=32))
SOME = b"\x01" * 32


@given(KEYED, KEYED)
@example(("ab", "c", SOME), ("a", "bc", SOME))
@example(("a", "None", SOME), ("a", None, SOME))
@example(("a\0b", None, SOME), ("a", "b", SOME))
@example(("a\0b", "c", SOME), ("a", "b\0c", SOME))
@example(("a\nb", "c", SOME), ("a", "b\nc", SOME))
def test_content_key_tells_contents_apart(one, other):
    """The key is the same for the same operation, feed and payload, and only for these."""
    assert content_key(*one) == content_key(*one)
    same = one[0] == other[0] and (one[1] or None) == (other[1] or None) and one[2] == other[2]
    assert (content_key(*one) == content_key(*other)) == same


def test_content_key_is_text_that_lasts():
    """A key is printable text, the same in each process."""
    key = content_key("store", "urlhaus", SOME)
    assert key.isprintable()
    assert key.isascii()
    assert 16 <= len(key) <= 128
    code = (
        "from periscope_otel.dead_letter.identity import content_key, fingerprint\n"
        "print(content_key('store', 'urlhaus', bytes([1]) * 32), fingerprint('a', 'b', 'c'))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [key, fingerprint("a", "b", "c")]


# --- fingerprints --------------------------------------------------------------------------------


def parse(row: object) -> object:
    return int(row)  # type: ignore[call-overload]


def convert(row: object) -> object:
    return [parse(one) for one in [row]]


def store(row: object) -> object:
    return int(row)  # type: ignore[call-overload]


def deeper(call, row: object, depth: int) -> object:
    return call(row) if depth == 0 else deeper(call, row, depth - 1)


def failure_of(call, *args: object) -> Exception:
    try:
        call(*args)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def code_failure(source: str, name: str, file: str = "feed.py") -> Exception:
    scope: dict = {"__name__": "feed"}
    exec(compile(source, file, "exec"), scope)
    return failure_of(scope[name])


def test_fingerprint_is_one_for_the_same_cause():
    """The same error from the same place has one fingerprint, whatever its message says."""
    prints = {
        fingerprint("store", "ValueError", failure_of(convert, row)) for row in ("x", "y", "12z")
    }
    assert len(prints) == 1
    (one,) = prints
    assert 8 <= len(one) <= 64
    assert one.isalnum()


def test_fingerprint_differs_with_operation_type_and_place():
    """Another operation, type of error, or place that it came from is another cause."""
    error = failure_of(convert, "x")
    prints = [
        fingerprint("store", "ValueError", error),
        fingerprint("fetch", "ValueError", error),
        fingerprint("store", "503", error),
        fingerprint("store", None, error),
        fingerprint("store", "ValueError", failure_of(store, "x")),
        fingerprint("store", "ValueError", failure_of(parse, "x")),
        fingerprint("store", "ValueError", ValueError("x")),
    ]
    assert len(set(prints)) == len(prints)


def test_fingerprint_does_not_look_at_line_numbers():
    """An edit that moves a function up or down its file leaves the fingerprint as it is."""
    source = RAISED_AT.format(name="fetch", error="ValueError('x')")
    one, moved = (code_failure(lines + source, "fetch") for lines in ("", "\n" * 40))
    assert fingerprint("a", "ValueError", one) == fingerprint("a", "ValueError", moved)


def test_fingerprint_looks_at_function_names():
    """Two functions of one file that raise the same are two causes."""
    errors = [
        code_failure(RAISED_AT.format(name=name, error="ValueError('x')"), name)
        for name in ("fetch", "store")
    ]
    assert len({fingerprint("a", "ValueError", error) for error in errors}) == 2


def test_fingerprint_does_not_look_at_far_callers():
    """Who called the code that failed, many calls away, does not change the fingerprint."""
    first = failure_of(deeper, convert, "x", 10)
    second = failure_of(lambda: deeper(convert, "x", 30))
    assert fingerprint("a", "ValueError", first) == fingerprint("a", "ValueError", second)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("row 12 is bad", "row 7 is bad"),
        ("no 01890a5d-ac96-774b-bcce-b302099a8057", "no 01890a5e-0000-7aaa-8bbb-0123456789ab"),
        ("key 'a.example' is missing", "key 'b.example' is missing"),
        ('no "a" in map', 'no "bb" in map'),
        ("object at 0x7f00aa", "object at 0x7f11bb"),
        ("cannot get https://a.example/x?y=1", "cannot get http://b.example/z"),
        ("hash d41d8cd98f00b204e9800998ecf8427e", "hash 9e107d9d372bb6826bd81d3542a419d6"),
    ],
)
def test_fingerprint_leaves_out_what_varies_in_a_message(one, other):
    """Numbers, ids, quoted values and URLs in the message of a returned failure do not count."""
    assert fingerprint("a", "x", one) == fingerprint("a", "x", other)
    assert fingerprint("a", "x", ValueError(one)) == fingerprint("a", "x", ValueError(other))


def test_fingerprint_of_messages_that_say_something_else():
    """Failures that were not raised and say different things are different causes."""
    texts = ["no answer", "bad answer", "row is bad", "key is missing", ""]
    assert len({fingerprint("a", "x", text) for text in texts}) == len(texts)


class HostileError(Exception):
    """An exception that cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


@pytest.mark.parametrize(
    "error",
    [
        HostileError(),
        failure_of(deeper, lambda _: (_ for _ in ()).throw(HostileError()), 1, 2),
        None,
        7,
    ],
    ids=["not raised", "raised", "none", "number"],
)
def test_fingerprint_of_anything(error):
    """Whatever the error is, also one that cannot be shown, it has a fingerprint."""
    assert fingerprint("a", "HostileError", error) == fingerprint("a", "HostileError", error)
    assert fingerprint("a", "HostileError", error) != fingerprint("b", "HostileError", error)


@settings(deadline=None)
@given(st.text(), st.none() | st.text(), st.text())
@example("a", "b", "\ud800")
@example("\ud800", "\ud800", "x")
@example("a", "b", "'" * 100_000)
@example("a", "b", "http://" * 100_000)
def test_fingerprint_of_any_text(operation, error_type, text):
    """Any name and any message, also a very long one, gives a short printable fingerprint."""
    made = fingerprint(operation, error_type, text)
    assert made == fingerprint(operation, error_type, text)
    assert made.isascii()
    assert 8 <= len(made) <= 64
