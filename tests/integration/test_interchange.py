"""Exports and imports: whatever is in a letter, and whatever is in a file."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import be_patient
from processes import clean_environment

from periscope_otel.dead_letter import DamagedLetterError, Filter, Letter, open_store
from periscope_otel.dead_letter.bodies import FOLDER, BodyFiles
from periscope_otel.dead_letter.draft import host_name
from periscope_otel.dead_letter.errors import RefusedError
from periscope_otel.dead_letter.interchange import (
    DamagedLine,
    append_lines,
    export_letters,
    export_to,
    from_line,
    import_letters,
    to_line,
)

pytest.register_assert_rewrite("store_conformance")

from store_conformance import (  # noqa: E402  (its assertions are rewritten first)
    EVERY,
    a_letter,
    everything,
    ids_of,
    some,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from redis_servers import RedisServer

    from periscope_otel.dead_letter import Store

# However slowly a busy machine gives and tries the examples.
AT_LEISURE = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | ANY_TEXT
    | st.binary(max_size=30)
    | st.builds(msgspec.msgpack.Ext, st.integers(0, 100), st.binary(max_size=9)),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(ANY_TEXT | st.integers(0, 9), inner, max_size=3)
    | st.dictionaries(st.sampled_from(["base64", "msgpack"]), inner, max_size=2),
    max_leaves=8,
)  # fmt: skip
ANY_LETTER = st.builds(
    lambda payload, fields, unknown: a_letter(payload, **fields).changed(
        schema=7 if unknown else 1, unknown=unknown
    ),
    st.binary(max_size=6000),
    st.fixed_dictionaries(
        {},
        optional={
            "operation": ANY_TEXT,
            "feed": ANY_TEXT | st.none(),
            "key": ANY_TEXT,
            "error_message": ANY_TEXT,
            "error_stack": ANY_TEXT,
            "attempts": st.integers(1, 9),
            "replays": st.integers(0, 4),
            "last_failed_at": st.floats(0, 2e9),
            "not_before": st.floats(allow_nan=False),
            "headers": st.dictionaries(ANY_TEXT, ANY_TEXT, max_size=2),
            "item_index": st.integers(0, 9) | st.none(),
            "tlp": st.sampled_from(["TLP:RED", None]),
            "replayable": st.booleans(),
            "state": st.sampled_from(["dead", "queued", "parked"]),
        },
    ),
    st.dictionaries(
        ANY_TEXT.filter(lambda name: name not in Letter.__struct_fields__), ANY_VALUE, max_size=3
    ),
)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine that stops for seconds change nothing."""
    be_patient(monkeypatch)


@contextmanager
def empty_store(kind: str, redis: RedisServer) -> Iterator[Store]:
    if kind == "redis":
        with redis.client as client:
            client.flushall()
        with open_store(redis.url) as store:
            yield store
    else:
        with (
            tempfile.TemporaryDirectory() as folder,
            open_store(f"sqlite:///{folder}/letters.db") as store,
        ):
            yield store


@pytest.fixture(params=["sqlite", "redis"])
def store(request, redis) -> Iterator[Store]:
    with empty_store(request.param, redis) as opened:
        yield opened


def content(letter: Letter) -> bytes:
    """Return a letter without what a store keeps track of; as bytes, since NaN equals nothing."""
    return letter.changed(state="dead", revision=0).encode()


def exported(store: Store, **more: Any) -> bytes:
    file = io.BytesIO()
    export_letters(store, EVERY, file, **more)
    return file.getvalue()


def imported(store: Store, lines: bytes, **more: Any):
    return import_letters(store, io.BytesIO(lines), **more)


# --- lines ----------------------------------------------------------------------------------------


@AT_LEISURE
@given(ANY_LETTER)
def test_a_line_is_its_letter(letter):
    """A letter of this version or a newer one is the same after it was a line, to the byte."""
    line = to_line(letter)
    assert line.isascii()
    assert line.count(b"\n") == 1
    assert from_line(line).encode() == letter.encode()


@AT_LEISURE
@given(st.binary(max_size=300))
def test_any_line_is_a_letter_or_a_clear_error(line):
    """What is no letter raises a DamagedLetterError and nothing else."""
    with pytest.raises(DamagedLetterError):
        from_line(line)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)


@AT_LEISURE
@given(st.sampled_from(Letter.__struct_fields__), JSON)
def test_a_line_with_a_wrong_field_is_a_letter_or_a_clear_error(name, value):
    """A field of any other value gives a letter or a DamagedLetterError."""
    fields = json.loads(to_line(a_letter())) | {name: value}
    with suppress(DamagedLetterError):
        assert isinstance(from_line(json.dumps(fields).encode()), Letter)


@pytest.mark.parametrize(
    "line",
    [
        b"[]", b"null", b"{}", b"{", b"\xff", b"[" * 100_000, b'{"id":' * 10_000,
        b'{"id":"x","operation":"o","codec":"c","pid":' + b"9" * 5000 + b"}",
        b'{"id":"x","operation":"o","codec":"c","queue":"{evil}"}',
        b'{"id":"../../x","operation":"o","codec":"c"}',
        b'{"id":"x","operation":"\\ud800","codec":"c"}',
        b'{"id":"x","operation":"o","codec":"c","body":{"base64":"!"}}',
    ],
)  # fmt: skip
def test_damaged_lines_are_clear_errors(line):
    """Lines that are cut, nested without end or hold what no letter may hold are refused."""
    with pytest.raises(DamagedLetterError):
        from_line(line)


def test_a_changed_payload_is_found():
    """A line whose payload is not what its letter says is refused."""
    for payload in (b"x" * 100, os.urandom(6000), b"".join(b"%d" % n for n in range(9000))):
        fields = json.loads(to_line(a_letter(payload)))
        body = bytearray(base64.b64decode(fields["body"]["base64"]))
        body[len(body) // 2] ^= 1
        fields["body"] = {"base64": base64.b64encode(body).decode()}
        with pytest.raises(DamagedLetterError):
            from_line(json.dumps(fields).encode())


def test_a_bomb_is_not_unpacked():
    """A payload that unpacks to more than its letter says is refused at once."""
    letter = a_letter(bytes(200 << 20)).changed(size=10)
    with pytest.raises(DamagedLetterError, match="payload is damaged"):
        from_line(to_line(letter))


# --- stores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
@settings(AT_LEISURE, max_examples=30)
@given(letters=st.lists(ANY_LETTER, max_size=5, unique_by=lambda letter: letter.sha256))
def test_an_import_of_an_export_is_the_store(redis, kind, letters):
    """Letters come out of another store as they were in the first, in state and replays, too."""
    with empty_store(kind, redis) as first:
        first.put(letters)
        before = everything(first)
        lines = exported(first)
    for other in ("sqlite", "redis"):
        with empty_store(other, redis) as second:
            assert imported(second, lines).stored == len(letters)
            after = everything(second)
            assert [content(one) for one in after] == [content(one) for one in before]
            assert [(one.state, one.replays) for one in after] == [
                (one.state, one.replays) for one in before
            ]


def test_an_import_may_be_repeated(store):
    """What is there already by its id stays as it is."""
    store.put(some(3))
    lines = exported(store)
    report = imported(store, lines * 2)
    assert (report.stored, report.known, report.merged) == (0, 6, 0)
    assert store.stats().total == 3


def test_an_import_brings_back_what_was_purged(store):
    """Letters that were removed a moment ago are there again after an import."""
    letters = some(3)
    store.put(letters)
    lines = exported(store)
    assert store.purge(EVERY, dry_run=False) == 3
    assert imported(store, lines).stored == 3
    assert ids_of(everything(store)) == ids_of(letters)


def test_a_claimed_letter_is_dead_after_an_import(store):
    """A letter that somebody was replaying is exported, and is dead where it is imported."""
    store.put(some(1, state="queued"))
    assert store.claim("somebody", 60)
    lines = exported(store)
    store.purge(EVERY, dry_run=False)
    assert imported(store, lines).stored == 1
    assert store.stats().by_state == {"dead": 1}


def test_damaged_lines_do_not_stop_the_others(store):
    """Each damaged line is reported with its number; all others are imported."""
    good = [to_line(letter) for letter in some(5)]
    lines = [good[0], b"garbage\n", good[1], b"\n", good[2][:50] + b"\n", good[3], b"x" * 9000]
    report = imported(store, b"".join(lines), longest_line=5000)
    assert report.stored == 3
    assert [line.number for line in report.lines] == [2, 5, 7]
    assert "longer than 5000" in report.lines[-1].why
    assert report.damaged == 3


def test_a_letter_that_the_store_refuses_holds_no_other_up(store, monkeypatch):
    """A refused letter is told with its line, and its batch is stored without it."""
    letters = some(5)
    put = type(store).put

    def refusing(self, given, **how):
        if letters[2].id in ids_of(given):
            raise RefusedError("too large")
        return put(self, given, **how)

    monkeypatch.setattr(type(store), "put", refusing)
    report = imported(store, b"".join(map(to_line, letters)))
    assert (report.stored, report.lines) == (4, [DamagedLine(3, "too large")])


def test_a_report_of_damaged_lines_is_bounded(store):
    """All damaged lines are counted, and the first hundred are told."""
    report = imported(store, b"garbage\n" * 1000)
    assert (report.damaged, len(report.lines)) == (1000, 100)


def test_letters_can_be_put_into_another_queue(store):
    """An import may put all letters into one queue."""
    lines = b"".join(to_line(letter) for letter in some(2, queue="one"))
    assert imported(store, lines, queue="two").stored == 2
    assert store.stats("two").total == 2


def test_an_export_leaves_out_what_is_not_meant(store):
    """A filter and a limit hold for exports, too."""
    store.put([*some(5, feed="otx"), *some(2)])
    file = io.BytesIO()
    assert export_letters(store, Filter(feed="otx"), file, limit=3) == 3
    assert {json.loads(line)["feed"] for line in file.getvalue().splitlines()} == {"otx"}


# --- payloads in files ----------------------------------------------------------------------------


def test_a_payload_in_a_file_travels_along(store, tmp_path):
    """A large payload is in the line, and in a file of the machine that imports it."""
    here, there = (BodyFiles(tmp_path / name / FOLDER, inline=100) for name in ("here", "there"))
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    payload = os.urandom(5000)
    letter = here.moved_out(a_letter(payload).changed(host="elsewhere"))
    store.put([letter])
    lines = exported(store, bodies=here)
    store.purge(EVERY, dry_run=False)
    assert imported(store, lines, bodies=there).stored == 1
    (found,) = everything(store)
    assert (found.body_file, found.host) == (letter.body_file, host_name())
    assert there.payload_of(found) == payload
    (file,) = there.files()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_payload_of_another_machine_is_left_behind_and_told(store, tmp_path):
    """A letter whose payload is not here is exported as it is, and the caller hears of it."""
    letter = a_letter(b"").changed(body_file="a" * 64, host="elsewhere")
    store.put([letter])
    left: list[Letter] = []
    lines = exported(store, bodies=BodyFiles(tmp_path), on_left_behind=left.append)
    assert ids_of(left) == [letter.id]
    assert from_line(lines).body_file == letter.body_file


def test_a_file_name_leads_nowhere_else(store, tmp_path):
    """A letter that names a file outside of the folder does not get it into an export."""
    (tmp_path / "secret").write_text("q8Zk2Lw9Xv4Tn7Rb")
    store.put([a_letter(b"").changed(body_file="../secret")])
    assert b"q8Zk2Lw9" not in exported(store, bodies=BodyFiles(tmp_path / FOLDER))


# --- files ----------------------------------------------------------------------------------------


def test_an_export_to_a_file_is_private_and_replaces_nothing(tmp_path):
    """A file is readable by its user alone; one that is there stays unless that is forced."""
    path = tmp_path / "letters.jsonl"

    def write(text: bytes):
        return lambda file: file.write(text)

    assert export_to(path, write(b"one")) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        export_to(path, write(b"two"))
    with pytest.raises(FileExistsError):
        export_to(tmp_path, write(b"two"), force=True)
    assert path.read_bytes() == b"one"
    export_to(path, write(b"two"), force=True)
    assert path.read_bytes() == b"two"
    assert [one.name for one in tmp_path.iterdir()] == ["letters.jsonl"]


def test_an_export_that_fails_leaves_nothing(tmp_path):
    """A file is there only if it is complete."""
    path = tmp_path / "letters.jsonl"
    path.write_bytes(b"before")

    def fail(file) -> int:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        export_to(path, fail, force=True)
    assert path.read_bytes() == b"before"
    assert [one.name for one in tmp_path.iterdir()] == ["letters.jsonl"]


def test_a_file_system_without_hard_links_takes_an_export(tmp_path, monkeypatch):
    """Where a file cannot have two names it is moved into its place, and replaces nothing."""

    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    path = tmp_path / "letters.jsonl"
    assert export_to(path, lambda file: file.write(b"one")) == 3
    with pytest.raises(FileExistsError):
        export_to(path, lambda file: file.write(b"two"))
    assert [one.name for one in tmp_path.iterdir()] == ["letters.jsonl"]


def test_a_payload_that_is_too_large_to_travel_stays_in_its_file(store, tmp_path, monkeypatch):
    """A file above the limit is not read into an export; the letter names it as before."""
    bodies = BodyFiles(tmp_path / FOLDER, inline=1)
    letter = bodies.moved_out(a_letter(os.urandom(500)))
    store.put([letter])
    monkeypatch.setattr("periscope_otel.dead_letter.interchange.LARGEST_CARRIED", 499)
    left: list[Letter] = []
    line = exported(store, bodies=bodies, on_left_behind=left.append)
    assert from_line(line).body_file == letter.body_file
    assert ids_of(left) == [letter.id]


def test_a_killed_export_leaves_the_file_that_was_there(tmp_path):
    """`kill -9` in the middle of an export changes nothing of a file of that name."""
    path = tmp_path / "letters.jsonl"
    path.write_bytes(b"before")
    code = (
        "import os, signal, sys\n"
        "from periscope_otel.dead_letter.interchange import export_to\n"
        "def half(file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "export_to(sys.argv[1], half, force=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, path], env=clean_environment(), check=False)
    assert ended.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"before"


def test_a_line_that_was_cut_does_not_spoil_the_next(tmp_path):
    """Lines that are appended to a file whose last line is unfinished are lines of their own."""
    path = tmp_path / "archive.jsonl"
    one, other = some(2)
    append_lines(path, [to_line(one)[:40]])
    append_lines(path, [to_line(other)])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with path.open("rb") as file, open_store(f"sqlite:///{tmp_path}/x.db") as store:
        report = import_letters(store, file)
    assert (report.stored, report.damaged) == (1, 1)


def test_lines_that_do_not_fit_are_taken_back(tmp_path, uncovered):
    """A disk that is full in the middle of a line leaves the file as it was."""
    path = Path(tmp_path / "archive.jsonl")
    append_lines(path, [b"one\n"])
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from periscope_otel.dead_letter.interchange import append_lines\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: append_lines(Path(sys.argv[1]), [b'two\\n', b'x' * 5000 + b'\\n'])\n"
        "except OSError as error: print(error.strerror)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, path],
        env=clean_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.stdout == "File too large\n", ended.stderr
    assert path.read_bytes() == b"one\n"
