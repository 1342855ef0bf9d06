"""Payloads too large for a store: in files that are whole, private, and only of this machine."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import time

import pytest
from processes import clean_environment

from periscope_otel.dead_letter import DamagedLetterError, Letter, PayloadElsewhereError
from periscope_otel.dead_letter.bodies import FOLDER, INLINE, BodyFiles
from periscope_otel.dead_letter.draft import host_name, letter_ids
from periscope_otel.dead_letter.letter import pack
from periscope_otel.dead_letter.queue import DeadLetterQueue

LARGE = os.urandom(5000)  # it does not get smaller


def letter_of(payload: bytes = LARGE, **fields: object) -> Letter:
    about = {"id": letter_ids.new(), "operation": "store", "codec": "item", "host": host_name()}
    return Letter(**about | pack(payload) | fields)


@pytest.fixture
def bodies(tmp_path) -> BodyFiles:
    return BodyFiles(tmp_path / FOLDER, inline=1000)


def test_a_large_payload_comes_back_from_its_file(bodies):
    """The letter names the file, which is for its user alone."""
    letter = bodies.moved_out(letter_of())
    assert letter.body == b""
    assert (letter.size, letter.host) == (len(LARGE), host_name())
    assert bodies.payload_of(letter) == LARGE
    (path,) = bodies.files()
    assert path.name == letter.body_file
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_small_payload_stays_in_its_letter(bodies):
    """Nothing is made on the disk for it."""
    letter = letter_of(b"small")
    assert bodies.moved_out(letter) is letter
    assert bodies.payload_of(letter) == b"small"
    assert not bodies.folder.exists()


def test_the_limit_is_eight_mebibytes_after_compression(tmp_path):
    """What gets smaller than that stays in its letter; one byte more is a file."""
    bodies = BodyFiles(tmp_path / FOLDER)
    assert INLINE == 8 << 20
    at_limit = letter_of(os.urandom(INLINE))
    assert bodies.moved_out(at_limit).body_file is None
    assert bodies.moved_out(letter_of(b"a" * (INLINE * 3))).body_file is None
    above = bodies.moved_out(letter_of(at_limit.body + b"x"))
    assert bodies.payload_of(above) == at_limit.body + b"x"


def test_the_same_payload_is_one_file(bodies):
    """However often it fails; and the file counts as used again."""
    first = bodies.moved_out(letter_of())
    (path,) = bodies.files()
    os.utime(path, (1, 1))
    assert bodies.moved_out(letter_of()).body_file == first.body_file
    assert bodies.files() == [path]
    assert path.stat().st_mtime > time.time() - 3600


def test_a_file_that_was_cut_is_written_anew(bodies):
    """The payload is at hand when the same fails again."""
    bodies.moved_out(letter_of())
    (path,) = bodies.files()
    path.write_bytes(LARGE[:100])
    assert bodies.payload_of(bodies.moved_out(letter_of())) == LARGE


@pytest.mark.parametrize("change", [lambda it: it[:-1], lambda it: it + b"x", lambda it: b""])
def test_a_damaged_file_is_told(change, bodies):
    """It is an error that says so, never a payload that is not what was put in."""
    letter = bodies.moved_out(letter_of())
    (path,) = bodies.files()
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DamagedLetterError, match=letter.id):
        bodies.payload_of(letter)


def test_a_flipped_bit_is_told(bodies):
    """Also in a compressed file."""
    letter = bodies.moved_out(letter_of(bytes(3000) + LARGE))
    (path,) = bodies.files()
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    with pytest.raises(DamagedLetterError):
        bodies.payload_of(letter)


def test_a_file_of_another_machine_is_told(tmp_path, bodies):
    """The error names the machine and the file, so that it can be replayed there."""
    letter = bodies.moved_out(letter_of(host="collector-7"))
    elsewhere = BodyFiles(tmp_path / "other")
    with pytest.raises(PayloadElsewhereError, match=r"host collector-7; replay it there"):
        elsewhere.payload_of(letter)


def test_a_file_that_is_gone_is_told(bodies):
    """On its own machine the error names the folder where it was."""
    letter = bodies.moved_out(letter_of())
    bodies.files()[0].unlink()
    with pytest.raises(PayloadElsewhereError, match="no longer in"):
        bodies.payload_of(letter)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "..",
        "",
        "a" * 63,
        "A" * 64,
        "a" * 64 + "\n",
        "a" * 64 + "/../x",
        "a" * 64 + "\0",
    ],
)
def test_a_letter_cannot_name_any_other_file(name, bodies, tmp_path):
    """A name is a hash and nothing else: letters come from a store that others write to."""
    (tmp_path / "secret").write_bytes(LARGE)
    letter = letter_of(body=b"", body_file=name)
    with pytest.raises(DamagedLetterError, match="names no payload file"):
        bodies.payload_of(letter)


def test_where_no_file_can_be_written_the_payload_stays_in_its_letter(tmp_path, caplog):
    """It is never cut; the log says that it did not get a file."""
    (tmp_path / "file").touch()
    letter = letter_of()
    assert BodyFiles(tmp_path / "file" / FOLDER, inline=10).moved_out(letter) is letter
    assert "stays in its letter" in caplog.text


FULL_DISK = """
import resource, signal, sys
from periscope_otel.dead_letter.bodies import BodyFiles
from periscope_otel.dead_letter.letter import Letter, pack
letter = Letter(id="1", operation="s", codec="item", **pack(open(sys.argv[2], "rb").read()))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
bodies = BodyFiles(sys.argv[1], inline=10)
assert bodies.moved_out(letter) is letter
print([path.name for path in bodies.files()])
"""


def test_a_disk_that_gets_full_leaves_no_part_of_a_file(tmp_path):
    """The payload stays whole in its letter, and the draft is removed."""
    assert resource.RLIMIT_FSIZE is not None
    (tmp_path / "payload").write_bytes(LARGE)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / FOLDER), str(tmp_path / "payload")],
        env={
            name: value
            for name, value in clean_environment().items()
            if not name.startswith("COVERAGE")  # whose own file would not fit either
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_files_that_no_letter_names_are_removed_later(bodies):
    """Not while their letter may still be on its way; drafts of dead processes too."""
    used = bodies.moved_out(letter_of())
    bodies.moved_out(letter_of(LARGE[::-1]))
    (bodies.folder / "draft-of-a-dead-process").touch()
    (bodies.folder / "notes.txt").touch()
    assert bodies.remove_unused({used.body_file}) == 0
    in_two_hours = time.time() + 7200
    assert bodies.remove_unused({used.body_file}, lambda: in_two_hours) == 2
    assert {one.name for one in bodies.folder.iterdir()} == {used.body_file, "notes.txt"}
    assert bodies.payload_of(used) == LARGE


def test_nothing_is_removed_where_nothing_is(tmp_path):
    """A folder that was never made has no files."""
    bodies = BodyFiles(tmp_path / "none")
    assert (bodies.files(), bodies.remove_unused(set())) == ([], 0)


def test_a_queue_moves_large_payloads_out(tmp_path, monkeypatch):
    """And finds them again whatever the working directory is by then."""
    monkeypatch.chdir(tmp_path)
    with DeadLetterQueue("data", largest_inline=1000) as queue:
        letter = letter_of()
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert queue.put([letter]) == "disk"
        stored = queue.store.get(letter.id)
        assert stored.body == b""
        assert queue.bodies.payload_of(stored) == LARGE
    assert len(list((tmp_path / "data" / FOLDER).iterdir())) == 1
