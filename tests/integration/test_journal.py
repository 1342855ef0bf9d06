"""The contracts of the journal: a payload in work survives its process, once, and nothing else."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from patience import be_patient
from processes import clean_environment, running

from periscope_otel.dead_letter import Filter, open_store
from periscope_otel.dead_letter.codecs import decode_plain, encode_item
from periscope_otel.dead_letter.draft import Cause, Origin, letter_of
from periscope_otel.dead_letter.journal import FOLDER
from periscope_otel.dead_letter.queue import FILE, DeadLetterQueue
from periscope_otel.telemetry.letter_counts import letter_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from processes import Program

    from periscope_otel.dead_letter import Letter

WITHIN = 40.0

CAUSE = Cause("ValueError", "bad", "", "f")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine that stops for seconds change nothing."""
    be_patient(monkeypatch)


def wait_until(holds: Callable[[], object]) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + WITHIN
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def letters_in(folder: Path) -> list[Letter]:
    with open_store(f"sqlite:///{folder / FILE}") as store:
        return store.list(Filter(), limit=1000).letters


def entries_in(folder: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(folder / FILE, timeout=WITHIN)) as connection:
        return connection.execute("SELECT id, owner FROM journal").fetchall()


def an_entry(value: object = 1) -> Letter:
    return letter_of(Origin("store", "urlhaus", "default"), encode_item(value), None)


def look(folder: Path) -> None:
    """Do once, in this process, what the background thread of a queue does."""
    with DeadLetterQueue(folder) as queue:
        queue.round()


def in_another_process(code: str, *args: str) -> subprocess.Popen[str]:
    imports = (
        "import os, sys, signal\n"
        "from periscope_otel.dead_letter.codecs import encode_item\n"
        "from periscope_otel.dead_letter.draft import Origin, letter_of\n"
        "from periscope_otel.dead_letter.queue import DeadLetterQueue\n"
        "queue = DeadLetterQueue(sys.argv[1])\n"
        "def entry(n): return letter_of(Origin('store', None, 'default'), encode_item(n), None)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", imports + code, *args],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )


def leave_entries(folder: Path, count: int) -> None:
    """Have a process enter payloads and die."""
    code = (
        "queue._journal.enter(entry(-1))\n"
        "for n in range(int(sys.argv[2]) - 1): queue._journal.enter(entry(n))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    with in_another_process(code, str(folder), str(count)) as process:
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def stop_between_transactions(program: Program, folder: Path) -> None:
    """Stop a program where it holds the file for nobody else: stopped, it would never end that."""
    deadline = time.monotonic() + WITHIN
    while True:
        program.send(signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(program.pid, os.WUNTRACED)[1])
        with (
            closing(sqlite3.connect(folder / FILE, timeout=0, isolation_level=None)) as connection,
            suppress(sqlite3.OperationalError),
        ):
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            return
        assert time.monotonic() < deadline
        program.send(signal.SIGCONT)
        time.sleep(0.05)


@contextmanager
def held_by_another(folder: Path) -> Iterator[None]:
    """Have another connection write to the file for a block."""
    with closing(sqlite3.connect(folder / FILE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


# Calls of real programs.


@pytest.mark.parametrize(("word", "kept"), [("succeed", []), ("fail", ["ValueError"])])
def test_a_call_that_ends_leaves_no_entry(word, kept, tmp_path):
    """It is in the journal while it runs, and gone when it has succeeded or is a letter."""
    folder = tmp_path / "data"
    with running("in_journal", str(folder), "a") as program:
        assert program.line() == "begun"
        assert len(entries_in(folder)) == 1
        assert letters_in(folder) == []
        program.tell(word)
        assert program.line() == "ended"
        assert entries_in(folder) == []
        assert [one.error_type for one in letters_in(folder)] == kept


def test_a_call_whose_process_is_killed_is_a_letter_at_the_next_start(tmp_path):
    """Abandoned, with its payload, feed and key, as soon as any process opens the folder."""
    folder = tmp_path / "data"
    with running("in_journal", str(folder), "a") as program:
        program.line()
        ((entry, _),) = entries_in(folder)
        program.send(signal.SIGKILL)
        program.ended()
    with running("in_journal", str(folder), "b") as other:
        other.line()
        wait_until(lambda: letters_in(folder))
        (letter,) = letters_in(folder)
        assert (letter.id, letter.error_type) == (entry, "abandoned")
        assert (letter.operation, letter.feed) == ("store", "urlhaus")
        assert decode_plain(letter.payload()) == {"url": "a"}
        assert letter.replayable
        assert letter.fingerprint
        assert str(program.pid) in letter.error_message
        assert len(entries_in(folder)) == 1  # its own


def test_a_call_whose_process_is_killed_is_a_letter_while_others_run(tmp_path):
    """Nobody has to start anew for it to be seen."""
    folder = tmp_path / "data"
    with running("in_journal", str(folder), "b") as other:
        other.line()
        with running("in_journal", str(folder), "a") as program:
            program.line()
            program.send(signal.SIGKILL)
            program.ended()
        wait_until(lambda: letters_in(folder))
        assert [decode_plain(one.payload()) for one in letters_in(folder)] == [{"url": "a"}]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_call_whose_process_lives_stays_in_the_journal(stopped, tmp_path):
    """However long it takes, and also where it is stopped."""
    folder = tmp_path / "data"
    with running("in_journal", str(folder), "a") as program:
        program.line()
        if stopped:
            stop_between_transactions(program, folder)
        look(folder)
        look(folder)
        assert (letters_in(folder), len(entries_in(folder))) == ([], 1)
        program.send(signal.SIGCONT)


def test_a_forked_child_does_not_keep_its_parent_alive(tmp_path, uncovered):
    """Liveness is not inherited: the parent is dead though a child of it lives."""
    folder = tmp_path / "data"
    with running("in_journal", str(folder), "a") as program:
        program.line()
        program.tell("fork")
        assert program.line() == "forked"
        look(folder)
        assert letters_in(folder) == []
        program.send(signal.SIGKILL)
        wait_until(lambda: look(folder) or letters_in(folder))
        assert [one.error_type for one in letters_in(folder)] == ["abandoned"]


# The journal itself.


def test_entries_of_the_same_process_are_not_adopted(tmp_path):
    """Its own locks tell a process nothing, whichever of its queues looks."""
    with DeadLetterQueue(tmp_path) as queue:
        assert queue.journal(an_entry())
        look(tmp_path)
        assert (letters_in(tmp_path), len(entries_in(tmp_path))) == ([], 1)


def test_what_a_closed_queue_left_is_adopted(tmp_path):
    """Whoever opens the folder next makes a letter of it."""
    with DeadLetterQueue(tmp_path) as queue:
        assert queue.journal(an_entry())
    look(tmp_path)
    assert [one.error_type for one in letters_in(tmp_path)] == ["abandoned"]


def test_every_entry_is_adopted_once_by_many(tmp_path):
    """Processes that look at the same time make one letter of each."""
    leave_entries(tmp_path, 150)
    adopters = [in_another_process("queue.round(); queue.close()", str(tmp_path)) for _ in range(4)]
    for one in adopters:
        one.communicate(timeout=60)
        assert one.returncode == 0
    # Who met another at the file for too long has left some for the next look.
    wait_until(lambda: look(tmp_path) or entries_in(tmp_path) == [])
    assert len(letters_in(tmp_path)) == 150


def test_an_entry_whose_letter_is_there_is_no_second_one(tmp_path):
    """As where a process died between the two."""
    leave_entries(tmp_path, 1)
    ((entry, _),) = entries_in(tmp_path)
    with DeadLetterQueue(tmp_path) as queue:
        queue.put([letter_of(Origin("store", None, "default"), encode_item(-1), CAUSE,
                             letter_id=entry)])  # fmt: skip
        queue.round()
    assert [one.id for one in letters_in(tmp_path)] == [entry]
    assert entries_in(tmp_path) == []


def test_a_damaged_entry_stays_and_holds_nothing_up(tmp_path, caplog):
    """The others are adopted, and it is kept for somebody to look at, told of once."""
    leave_entries(tmp_path, 3)
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        first, *_ = connection.execute("SELECT id FROM journal ORDER BY id").fetchone()
        connection.execute("UPDATE journal SET letter = x'00ff' WHERE id = ?", (first,))
        connection.commit()
    look(tmp_path)
    look(tmp_path)
    assert len(letters_in(tmp_path)) == 2
    assert entries_in(tmp_path) == [(first, "unreadable")]
    assert "cannot be read" in caplog.text


def test_lock_files_of_dead_processes_are_removed(tmp_path):
    """With entries or without; that of a process that lives is not."""
    leave_entries(tmp_path, 1)
    (tmp_path / FOLDER / "0123456789abcdef.lock").touch()
    with DeadLetterQueue(tmp_path) as queue:
        queue.journal(an_entry())
        with in_another_process("queue.round()", str(tmp_path)) as other:
            other.communicate(timeout=60)
        # This process's own thread may be the one that is at it.
        wait_until(lambda: len(list((tmp_path / FOLDER).iterdir())) == 1)
        wait_until(lambda: len(entries_in(tmp_path)) == 1)
        queue.forget([entries_in(tmp_path)[0][0]])
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_entries_are_adopted_though_the_lock_files_are_gone(tmp_path):
    """Somebody has cleaned up too much."""
    leave_entries(tmp_path, 2)
    for path in (tmp_path / FOLDER).iterdir():
        path.unlink()
    (tmp_path / FOLDER).rmdir()
    look(tmp_path)
    assert len(letters_in(tmp_path)) == 2


def test_a_journal_that_cannot_be_written_to_stops_no_call(tmp_path, caplog):
    """It is counted and told."""
    with DeadLetterQueue(tmp_path) as queue, letter_counts.set_aside():
        with held_by_another(tmp_path):
            assert not queue.journal(an_entry())
        assert letter_counts.puts() == {("default", "not_journalled"): 1}
        assert queue.journal(an_entry())
    assert "could not be written to the journal" in caplog.text


def test_what_is_done_with_leaves_the_journal_when_the_file_is_free(tmp_path):
    """At the latest when the queue is closed: a call that succeeded is never abandoned."""
    entry = an_entry()
    with DeadLetterQueue(tmp_path) as queue:
        queue.journal(entry)
        with held_by_another(tmp_path):
            queue.forget([entry.id])
            assert entries_in(tmp_path)  # as long as it is held, whatever else looks meanwhile
    assert entries_in(tmp_path) == []
    look(tmp_path)
    assert letters_in(tmp_path) == []


def test_a_large_payload_in_work_is_adopted_whole(tmp_path):
    """Its file is beside the journal."""
    payload: Any = {"objects": ["x" * 10_000]}
    with DeadLetterQueue(tmp_path, largest_inline=10) as queue:
        queue.journal(an_entry(payload))
    with DeadLetterQueue(tmp_path) as queue:
        queue.round()
        (letter,) = letters_in(tmp_path)
        assert decode_plain(queue.bodies.payload_of(letter)) == payload
