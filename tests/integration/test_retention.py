"""Sweeps: what is old goes when somebody asks for it, and is in the archive before."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from patience import be_patient
from processes import clean_environment

from periscope_otel.dead_letter import DeadLetterError, Filter, open_store
from periscope_otel.dead_letter.bodies import FOLDER, BodyFiles
from periscope_otel.dead_letter.draft import host_name
from periscope_otel.dead_letter.interchange import from_line, import_letters
from periscope_otel.dead_letter.queue import DeadLetterQueue
from periscope_otel.dead_letter.retention import DAY, Swept, remove_unused_files, sweep

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
    from pathlib import Path

    from periscope_otel.dead_letter import Letter, Store

NOW = 2_000_000_000.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine that stops for seconds change nothing."""
    be_patient(monkeypatch)


@pytest.fixture(params=["sqlite", "redis"])
def store(request, redis, tmp_path) -> Iterator[Store]:
    if request.param == "redis":
        with redis.client as client:
            client.flushall()
        with open_store(redis.url) as opened:
            yield opened
    else:
        with open_store(f"sqlite:///{tmp_path}/dead-letters.db") as opened:
            yield opened


def clock() -> float:
    return NOW


def aged(days: float, count: int = 1, **fields) -> list[Letter]:
    return some(count, last_failed_at=NOW - days * DAY, **fields)


def lines_of(path: Path) -> list[Letter]:
    return [from_line(line) for line in path.read_bytes().splitlines()]


def test_what_is_old_goes(store):
    """Letters that failed last before the limit are removed, the others stay."""
    store.put([*aged(31, 3), *(young := aged(29, 2))])
    assert sweep(store, clock=clock) == Swept(by_age=3, dry_run=False)
    assert ids_of(everything(store)) == ids_of(young)


def test_a_dry_run_removes_nothing_and_counts_the_same(store, tmp_path):
    """What a dry run counts is what the sweep then removes; it writes no archive."""
    store.put([*aged(31, 3), *aged(5, 5), *aged(1, 4, state="parked")])
    size = store.stats().size
    how = {"most_letters": 7, "most_bytes": size // 3, "clock": clock}
    archive = tmp_path / "a.jsonl"
    planned = sweep(store, dry_run=True, archive=archive, **how)
    assert store.stats().total == 12
    assert not archive.exists()
    done = sweep(store, archive=archive, **how)
    assert (done.by_age, done.by_number, done.by_size) == (
        planned.by_age,
        planned.by_number,
        planned.by_size,
    )
    assert (done.by_age, done.by_number) == (3, 2)
    assert done.by_size >= 1
    assert store.stats().size <= size // 3
    assert done.archived == done.letters == 12 - store.stats().total


def test_what_waits_or_is_being_replayed_stays(store):
    """Queued and claimed letters are never swept, however old and however many."""
    store.put(aged(99, 3))
    store.requeue(Filter(), 2)
    assert len(store.claim("somebody", 60)) == 1
    swept = sweep(store, most_letters=0, most_bytes=0, clock=clock)
    assert swept.letters == 1
    assert store.stats().by_state == {"queued": 1, "claimed": 1}


def test_the_first_that_came_go_first(store):
    """Where there are too many letters the newest stay."""
    letters = aged(1, 7)
    store.put(letters)
    assert sweep(store, older_than=None, most_letters=3, clock=clock).by_number == 4
    assert ids_of(everything(store)) == ids_of(letters)[4:]


def test_no_limit_removes_nothing(store):
    """Without any limit a sweep finds nothing to remove."""
    store.put(aged(1000, 3))
    assert sweep(store, older_than=None, clock=clock).letters == 0


def test_other_queues_are_left_alone(store):
    """A sweep is of one queue."""
    store.put([*aged(99, 2), *aged(99, 2, queue="other")])
    assert sweep(store, queue="other", clock=clock).letters == 2
    assert store.stats().total == 2


@pytest.mark.parametrize("limit", ["older_than", "most_letters", "most_bytes"])
def test_a_negative_limit_is_an_error(store, limit):
    """A limit below 0 is a mistake, not a way to remove everything."""
    with pytest.raises(ValueError, match=limit):
        sweep(store, **{limit: -1})


def test_many_letters_go_in_chunks(store):
    """More letters than a page holds are all swept, and all archived."""
    store.put(aged(99, 450))
    assert sweep(store, clock=clock).by_age == 450


# --- the archive ----------------------------------------------------------------------------------


def test_what_is_removed_is_in_the_archive(store, tmp_path):
    """The archive holds each swept letter as it was, is private, and can be imported again."""
    letters = aged(99, 5)
    store.put(letters)
    before = everything(store)
    archive = tmp_path / "swept.jsonl"
    swept = sweep(store, archive=archive, clock=clock)
    assert (swept.letters, swept.archived) == (5, 5)
    assert lines_of(archive) == before
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    with archive.open("rb") as file:
        assert import_letters(store, file).stored == 5


def test_an_archive_is_appended_to(store, tmp_path):
    """A second sweep leaves what the first has archived."""
    archive = tmp_path / "swept.jsonl"
    for _ in range(2):
        store.put(aged(99, 2))
        sweep(store, archive=archive, clock=clock)
    assert len(lines_of(archive)) == 4


def test_nothing_is_removed_that_cannot_be_archived(store, tmp_path):
    """An archive that cannot be written is an error, and every letter is still there."""
    store.put(aged(99, 3))
    with pytest.raises(DeadLetterError, match="cannot write the archive"):
        sweep(store, archive=tmp_path / "none" / "swept.jsonl", clock=clock)
    assert store.stats().total == 3


def test_an_archive_comes_before_the_removal(store, tmp_path, monkeypatch):
    """When a chunk is removed, all of it is in the archive, wherever the sweep is interrupted."""
    archive = tmp_path / "swept.jsonl"
    store.put(aged(99, 250))
    purge = type(store).purge
    chunks: list[int] = []

    def interrupted(self, where: Filter, *, dry_run: bool = True) -> int:
        assert set(where.ids) <= set(ids_of(lines_of(archive)))
        chunks.append(len(where.ids))
        if len(chunks) == 2:
            raise KeyboardInterrupt
        return purge(self, where, dry_run=dry_run)

    monkeypatch.setattr(type(store), "purge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(store, archive=archive, clock=clock)
    assert store.stats().total == 250 - chunks[0]
    in_both = ids_of(lines_of(archive)) + ids_of(everything(store))
    assert len(set(in_both)) == 250


@pytest.mark.parametrize("after", [1, 50, 100, 101, 102, 103, 150, 203, 204, 205, 10_000])
def test_a_killed_sweep_loses_nothing(tmp_path, after):
    """`kill -9` at any step of a sweep leaves each letter in the store or the archive."""
    url, archive = f"sqlite:///{tmp_path}/letters.db", tmp_path / "swept.jsonl"
    letters = aged(99, 220)
    with open_store(url) as store:
        store.put(letters)
    code = (
        "import os, signal, sys\n"
        "from periscope_otel.dead_letter.sqlite_store import SQLiteStore\n"
        "from periscope_otel.dead_letter.retention import sweep\n"
        "left = int(sys.argv[3])\n"
        "def dies(call):\n"
        "    def counted(*given, **named):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return call(*given, **named)\n"
        "    return counted\n"
        "os.write, os.fsync = dies(os.write), dies(os.fsync)\n"
        "SQLiteStore.purge = dies(SQLiteStore.purge)\n"
        f"sweep(SQLiteStore(sys.argv[1]), archive=sys.argv[2], clock=lambda: {NOW})\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "letters.db", archive, str(after)],
        env=clean_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    archived = set()
    if archive.exists():
        for line in archive.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                archived.add(from_line(line).id)
    with open_store(url) as store:
        assert archived | set(ids_of(everything(store))) == set(ids_of(letters))


def test_a_letter_that_fails_again_meanwhile_stays(store, monkeypatch):
    """What failed again after it was listed is no longer old, and is not removed."""
    (old,) = aged(99)
    store.put([old])
    purge = type(store).purge

    def purge_late(self, where: Filter, *, dry_run: bool = True) -> int:
        again = a_letter(b"", **{
            name: getattr(old, name)
            for name in ("key", "body", "size", "sha256", "compression", "operation", "codec")
        })  # fmt: skip
        assert store.put([again.changed(last_failed_at=NOW)]) == ["merged"]
        return purge(self, where, dry_run=dry_run)

    monkeypatch.setattr(type(store), "purge", purge_late)
    assert sweep(store, clock=clock).letters == 0
    assert store.stats().total == 1


# --- payload files --------------------------------------------------------------------------------


def with_file(bodies: BodyFiles, days: float, **fields) -> Letter:
    (letter,) = aged(days, **fields)
    moved = bodies.moved_out(letter.changed(host=host_name()))
    assert moved.body_file is not None
    os.utime(bodies.folder / moved.body_file, (NOW - DAY, NOW - DAY))
    return moved


@pytest.fixture
def bodies(tmp_path) -> BodyFiles:
    return BodyFiles(tmp_path / FOLDER, inline=1)


def names_of(bodies: BodyFiles) -> set[str | None]:
    return {path.name for path in bodies.files()}


def test_payload_files_go_with_the_last_letter_that_names_them(store, bodies):
    """Files that no letter of any queue names are removed; the others stay."""
    old, young = with_file(bodies, 99), with_file(bodies, 1)
    other = with_file(bodies, 99, queue="other")
    store.put([old, young, other])
    swept = sweep(store, bodies=bodies, payload_queues=["default", "other"], clock=clock)
    assert (swept.letters, swept.payload_files) == (1, 1)
    assert names_of(bodies) == {young.body_file, other.body_file}


def test_without_the_names_of_all_queues_no_file_of_a_redis_goes(redis, bodies):
    """A Redis does not know its queues, so files stay unless they are all named."""
    with redis.client as client:
        client.flushall()
    with open_store(redis.url) as store:
        store.put([with_file(bodies, 99)])
        assert sweep(store, bodies=bodies, clock=clock).payload_files == 0
    assert len(names_of(bodies)) == 1


def test_a_young_file_stays(store, bodies):
    """A file that was written within the hour may belong to a letter on its way."""
    letter = with_file(bodies, 99)
    os.utime(bodies.folder / str(letter.body_file), (NOW - 60, NOW - 60))
    assert remove_unused_files(store, bodies, ["default"], clock) == 0


def test_what_the_journal_names_stays(tmp_path):
    """The file of a payload that is being worked on is not removed."""
    with DeadLetterQueue(tmp_path, largest_inline=1) as queue:
        letter = with_file(queue.bodies, 99)
        assert queue.journal(letter)
        assert remove_unused_files(queue.store, queue.bodies, None, clock) == 0
        queue.forget([letter.id])
        assert remove_unused_files(queue.store, queue.bodies, None, clock) == 1


def test_what_waits_in_the_outbox_stays(redis, tmp_path):
    """The file of a letter that has not reached its Redis is not removed."""
    with redis.client as client:
        client.flushall()
    from periscope_otel.dead_letter.outbox import Outbox
    from periscope_otel.dead_letter.queue import FILE

    bodies = BodyFiles(tmp_path / FOLDER, inline=1)
    outbox = Outbox(tmp_path / FILE)
    letter = with_file(bodies, 99)
    outbox.put([letter])
    with open_store(redis.url) as store:
        assert remove_unused_files(store, bodies, ["default"], clock) == 0
    outbox.close()


def test_a_payload_in_a_file_is_in_the_archive(store, bodies, tmp_path):
    """The archive holds the payload itself, whose file may then go."""
    letter = with_file(bodies, 99)
    store.put([letter])
    archive = tmp_path / "swept.jsonl"
    swept = sweep(store, archive=archive, bodies=bodies, payload_queues=["default"], clock=clock)
    assert (swept.archived, swept.payload_files) == (1, 1)
    assert len(lines_of(archive)[0].body) == letter.size


def test_a_letter_whose_payload_cannot_be_archived_stays(store, bodies, tmp_path):
    """A letter whose payload is on another machine is kept, and counted."""
    (letter,) = aged(99)
    store.put([letter.changed(body=b"", body_file="a" * 64, host="elsewhere")])
    archive = tmp_path / "swept.jsonl"
    swept = sweep(store, archive=archive, bodies=bodies, most_letters=0, clock=clock)
    assert (swept.letters, swept.kept) == (0, 1)
    assert store.stats().total == 1


def test_a_damaged_letter_keeps_all_files(tmp_path, bodies):
    """As long as a letter cannot be read, no file is removed: it may name one."""
    with open_store(f"sqlite:///{tmp_path}/dead-letters.db") as store:
        store.put(aged(1))
        with_file(bodies, 99)
        with store.database.writing() as writing:
            writing.execute("UPDATE letters SET letter = x'c1'")
        assert remove_unused_files(store, bodies, None, clock) == 0


def test_figures_are_json(store):
    """What a sweep has done can be written down as it is."""
    from dataclasses import asdict

    assert json.loads(json.dumps(asdict(sweep(store, clock=clock))))["dry_run"] is False
    assert everything(store, EVERY) == []
