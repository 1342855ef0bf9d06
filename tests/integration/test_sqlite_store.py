"""The SQLite store: all contracts of a store, and those of its file."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from patience import be_patient

from periscope_otel.dead_letter import (
    AsyncStore,
    DeadLetterError,
    Filter,
    Store,
    StoreError,
    database,
    open_store,
)
from periscope_otel.dead_letter.database import Database, refuse_networked
from periscope_otel.dead_letter.letter import STATES
from periscope_otel.dead_letter.sqlite_store import SQLiteStore
from periscope_otel.dead_letter.store import copy, new_owner

pytest.register_assert_rewrite("store_conformance")

from store_conformance import (  # noqa: E402  (its assertions are rewritten first)
    EVERY,
    LEASE,
    QUEUED,
    StoreConformance,
    a_letter,
    everything,
    ids_of,
    in_threads,
    queued,
    same_but_for_life,
    some,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
NOBODY = 65534


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine that stops for seconds change nothing."""
    be_patient(monkeypatch)


@dataclass
class Clock:
    """Unix time that a test moves."""

    now: float = 1_760_000_000.0

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    """Return a clock that stands."""
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a file that is not there yet."""
    return tmp_path / "folder" / "letters.db"


@pytest.fixture
def store(path: Path, clock: Clock) -> Iterator[SQLiteStore]:
    """Return an empty store whose time is the clock's."""
    with SQLiteStore(path, clock=lambda: clock.now) as opened:
        yield opened


class TestSQLiteStore(StoreConformance):
    """The contracts of any store, kept by the SQLite store."""


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Do without the rights of root for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """Return a folder that is nobody's, with a way to it that is open to all."""
    folder = Path(tempfile.mkdtemp(prefix="periscope-test-"))
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program that can import what the tests share."""
    program = f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{code}"
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its children can be ended with it
    )


def finish(program: subprocess.Popen[str]) -> Any:
    """Return what a program wrote as its last line, in JSON."""
    try:
        output, errors = program.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        output, errors = program.communicate()
        raise AssertionError(f"it hung: {output}{errors}") from None
    assert (program.returncode, errors) == (0, "")
    return json.loads(output.splitlines()[-1])


def is_whole(path: Path) -> bool:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0, 0o22, 0o77], ids=oct)
def test_file_and_folder_are_private(path, mask):
    """The file, those beside it, and the folder made for it are for their user alone."""
    with umask(mask), SQLiteStore(path) as store:
        store.put(some(3))
        assert mode_of(path.parent) == 0o700
        assert {mode_of(one) for one in path.parent.iterdir()} == {0o600}
        assert path.is_file()


def test_folders_above_are_made(tmp_path):
    """Folders that are missing above the file are made, its own for its user alone."""
    deep = tmp_path / "a" / "b" / "letters.db"
    with SQLiteStore(deep):
        assert mode_of(deep.parent) == 0o700


def test_existing_folder_is_left_as_it_is(tmp_path):
    """A folder that is there already keeps its mode; the file in it is private all the same."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o755)
    with umask(0), SQLiteStore(folder / "letters.db"):
        assert mode_of(folder) == 0o755
        assert {mode_of(one) for one in folder.iterdir()} == {0o600}


def test_read_only_folder_is_an_error(public_folder):
    """A folder that cannot be written to is a StoreError that names it."""
    public_folder.chmod(0o555)
    with as_nobody(), pytest.raises(StoreError, match=public_folder.name):
        SQLiteStore(public_folder / "letters.db")
    with as_nobody(), pytest.raises(StoreError, match=public_folder.name):
        SQLiteStore(public_folder / "new" / "letters.db")


def test_read_only_file_is_an_error(public_folder):
    """A file that cannot be written to is a StoreError that names it, at once or when writing."""
    path = public_folder / "letters.db"
    with as_nobody():
        with SQLiteStore(path) as store:
            store.put(some(1))
        path.chmod(0o444)
        with pytest.raises(StoreError, match=r"letters\.db"), SQLiteStore(path) as store:
            store.put(some(1))


@pytest.mark.parametrize("name", ["", ".", "folder", "file/letters.db", "x" * 300, "a\0b"])
def test_path_that_cannot_be_a_file_is_an_error(tmp_path, name):
    """A path that is a folder, is below a file, or cannot be at all is a StoreError."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError):
        SQLiteStore(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    "kind",
    [
        *("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "fuse.glusterfs", "fuse.rclone"),
        *("fuse.gcsfuse", "beegfs", "gpfs", "afs"),
    ],
)
def test_network_file_system_is_refused(path, monkeypatch, kind):
    """A file on a file system of another machine is refused, and no file is made."""
    monkeypatch.setattr(database, "_file_system_of", lambda _: kind)
    with pytest.raises(StoreError, match=kind):
        SQLiteStore(path)
    assert not path.exists()
    with pytest.raises(StoreError, match=kind):
        refuse_networked(path.parent)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "apfs", ""])
def test_local_file_system_is_taken(path, monkeypatch, kind):
    """A file on a local file system, or on one that is not known, is taken."""
    monkeypatch.setattr(database, "_file_system_of", lambda _: kind)
    with SQLiteStore(path) as store:
        assert store.put(some(1)) == ["stored"]


def test_folder_here_is_local(tmp_path):
    """The file system of a real folder can be told, and is local."""
    refuse_networked(tmp_path)


def test_letters_outlive_the_store(path, clock):
    """What was put, and what became of it, is there when the file is opened again."""
    letters = some(4)
    with SQLiteStore(path, clock=lambda: clock.now) as store:
        store.put(letters)
        store.requeue(Filter(ids=(letters[1].id, letters[2].id)))
        (claim,) = store.claim("one", LEASE)
        before = everything(store), store.stats()
    with SQLiteStore(path, clock=lambda: clock.now) as store:
        assert (everything(store), store.stats()) == before
        assert store.put(letters) == ["known"] * 4
        assert store.settle(claim)
    with SQLiteStore(path, clock=lambda: clock.now) as store:
        assert store.put([letters[1]]) == ["known"]
        clock.advance(LEASE + 1)
        assert ids_of(store.claim("two", LEASE, 9)) == [letters[2].id]


def test_two_stores_on_one_file(path, clock, store):
    """What one store on a file does is seen by another at once."""
    with SQLiteStore(path, clock=lambda: clock.now) as other:
        letters = queued(store, 3)
        assert ids_of(everything(other, QUEUED)) == ids_of(letters)
        (claim,) = other.claim("other", LEASE)
        assert len(store.claim("this", LEASE, 9)) == 2
        assert other.settle(claim)
        assert store.stats() == other.stats()
        assert store.get(claim.letter.id) is None


def test_closing_twice_is_harmless(path):
    """A store may be closed twice, and its file may then be opened again or removed."""
    store = SQLiteStore(path)
    store.put(some(1))
    store.close()
    store.close()
    shutil.rmtree(path.parent)
    with SQLiteStore(path) as again:
        assert again.stats().total == 0


def test_threads_leave_no_connections_behind(store):
    """However many threads come and go, the open files do not pile up."""
    store.put(some(2))
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(100):
        in_threads(1, lambda _: everything(store))
    assert len(list(Path("/dev/fd").iterdir())) < before + 30


def test_letters_are_put_as_a_part_of_a_transaction(store):
    """What is put within a transaction is there when that ends well, and not when it is undone."""
    letters = some(3)

    def undone() -> None:
        with store.database.writing() as writing:
            assert store.put_within(writing, letters) == ["stored"] * 3
            raise KeyError

    with pytest.raises(KeyError):
        undone()
    assert store.stats().total == 0
    with store.database.writing() as writing:
        assert store.put_within(writing, [*letters, letters[0]]) == [*["stored"] * 3, "known"]
    assert ids_of(everything(store)) == ids_of(letters)


def test_a_file_of_a_newer_version_is_left_alone(path):
    """Who finds tables of a newer schema says so and changes nothing."""
    with SQLiteStore(path) as store:
        assert store.database.read("PRAGMA user_version") == [(1,)]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version=2")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="newer version"):
        SQLiteStore(path)
    assert path.read_bytes() == before


# --- others at the same file ---------------------------------------------------------------------


def test_busy_file_is_an_error_in_time(path):
    """While another holds the file for longer than `busy`, a put fails; a read does not."""
    with SQLiteStore(path, busy=0.05) as store:
        letter = a_letter()
        store.put([letter])
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError):
                store.put(some(1))
            assert ids_of(everything(store)) == [letter.id]
            other.execute("ROLLBACK")
        assert store.put(some(1)) == ["stored"]
        assert store.stats().total == 2


def test_long_list_holds_no_writer_up(path):
    """While somebody reads, letters can be put."""
    with SQLiteStore(path, busy=0.05) as store:
        store.put(some(3))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN")
            assert other.execute("SELECT count(*) FROM letters").fetchone() == (3,)
            assert store.put(some(2)) == ["stored"] * 2
            assert other.execute("SELECT count(*) FROM letters").fetchone() == (3,)
        assert store.stats().total == 5


WORKER = """
import json
from store_conformance import LEASE, ids_of, some
from periscope_otel.dead_letter import Filter
from periscope_otel.dead_letter.sqlite_store import SQLiteStore
with SQLiteStore(sys.argv[1], busy=60) as store:
    answers, done = [], []
    for _ in range(40):
        letters = some(3)
        answers += store.put(letters)
        assert store.requeue(Filter(ids=tuple(ids_of(letters)))) == 3
        for claim in store.claim(sys.argv[2], LEASE, 2):
            assert store.settle(claim)
            done.append(claim.letter.id)
    print(json.dumps([answers, done]))
"""


def test_processes_share_a_file(path):
    """Two processes put, claim and settle on one file: all is stored, each is replayed once."""
    with SQLiteStore(path) as store:
        programs = [start(WORKER, path, owner) for owner in ("one", "two")]
        ended = [finish(program) for program in programs]
        done = [letter_id for _, ids in ended for letter_id in ids]
        assert all(answers == ["stored"] * 120 for answers, _ in ended)
        assert len(done) == len(set(done)) == 160
        assert store.stats().by_state == {"queued": 80}
        left = everything(store)
        assert {one.id for one in left}.isdisjoint(done)
    assert is_whole(path)


FORK = """
import json, os, threading
from store_conformance import EVERY, everything, ids_of, some
from periscope_otel.dead_letter import database
from periscope_otel.dead_letter.sqlite_store import SQLiteStore
database.FORK_WAIT = 60.0  # a busy machine may need long for a transaction
store = SQLiteStore(sys.argv[1], busy=60)
store.put(some(1))
everything(store)
stop, put = threading.Event(), []
def work():
    while not stop.is_set():
        letters = some(2)
        assert store.put(letters) == ["stored"] * 2
        put.extend(ids_of(letters))
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
children = []
for number in range(12):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        letters = some(3)
        assert store.put(letters) == ["stored"] * 3
        assert set(ids_of(letters)) <= set(ids_of(everything(store)))
        assert store.requeue(EVERY, limit=1) == 1
        if number % 3:
            store.close()
        os.write(write, json.dumps(ids_of(letters)).encode())
        os.close(write)
        if number % 2:
            os._exit(0)
        stop.set()
        sys.exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        children += json.loads(pipe.read())
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
assert store.put(some(1)) == ["stored"]
print(json.dumps([children, put, sorted(ids_of(everything(store)))]))
"""


@pytest.mark.usefixtures("uncovered")
def test_fork_in_the_middle(path):
    """Children forked while threads put can use the store, and neither side loses a letter."""
    children, put, listed = finish(start(FORK, path))
    assert len(children) == 36
    assert set(children) | set(put) < set(listed)
    assert len(listed) == len(children) + len(put) + 2
    assert is_whole(path)


FORKED_LOCK = """
import json, os
from store_conformance import some
from periscope_otel.dead_letter.sqlite_store import SQLiteStore
store = SQLiteStore(sys.argv[1], busy=0.05)
store.put(some(1))
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
child = os.fork()
if child == 0:
    store.close()
    os._exit(0)
os.waitpid(child, 0)
print(json.dumps([store.put(some(1)), store.stats().total]))
"""


@pytest.mark.usefixtures("uncovered")
def test_child_that_ends_takes_nothing_away(path):
    """A child that ends, or that closes the store, leaves the parent's store working."""
    assert finish(start(FORKED_LOCK, path)) == [["stored"], 2]


KILLED = """
from store_conformance import some
from periscope_otel.dead_letter.sqlite_store import SQLiteStore
store = SQLiteStore(sys.argv[1], busy=60)
for batch in range(1_000_000):
    store.put(some(20, batch_id=str(batch), host=sys.argv[2]))
    print(batch, flush=True)
"""


def test_killed_in_the_middle_of_a_put(path):
    """Of a process that is killed each batch is there whole or not at all, and all it was told."""
    chance = random.Random()
    seed = chance.randrange(2**32)
    chance.seed(seed)
    told: dict[str, int] = {}
    for number in range(12):
        program = start(KILLED, path, number)
        lines = [program.stdout.readline() for _ in range(chance.randrange(1, 40))]
        program.kill()
        lines += program.stdout  # not by `communicate`, which leaves out what was read ahead
        errors = program.stderr.read()
        assert (program.wait(60), errors) == (-9, "")
        program.stdout.close()
        program.stderr.close()
        told[str(number)] = int([line for line in lines if line.endswith("\n")][-1])
    with SQLiteStore(path) as store:
        batches: dict[tuple[str, int], int] = {}
        for one in everything(store, limit=1000):
            one.payload()
            batch = (one.host, int(one.batch_id))
            batches[batch] = batches.get(batch, 0) + 1
        assert set(batches.values()) == {20}, seed
        for number, last in told.items():
            there = {batch for host, batch in batches if host == number}
            assert set(range(last + 1)) <= there <= set(range(last + 2)), (seed, number)
        assert store.stats().total == sum(batches.values())
    assert is_whole(path)


FULL = """
import json, resource
from store_conformance import everything, some
from periscope_otel.dead_letter import StoreError
from periscope_otel.dead_letter.sqlite_store import SQLiteStore
import random
store = SQLiteStore(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
put, error = 0, None
for number in range(1000):
    try:
        put += len(store.put(some(3, headers={"x": random.Random(number).randbytes(4000).hex()})))
    except StoreError as failure:
        error = str(failure)
        break
listed = len(everything(store))
print(json.dumps([put, listed, store.stats().total, error]))
"""


def test_file_that_cannot_grow_is_an_error(path):
    """Where the file can grow no more a put fails whole, and what was put is still served."""
    put, listed, total, error = finish(start(FULL, path))
    assert error
    assert put == listed == total > 0
    with SQLiteStore(path) as store:
        assert store.put(some(1)) == ["stored"]
        assert len(everything(store)) == put + 1


# --- damage --------------------------------------------------------------------------------------


def filled(path: Path, count: int = 60) -> list[str]:
    with SQLiteStore(path) as store:
        letters = some(count, error_stack="x" * 500)
        store.put(letters)
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    return ids_of(letters)


def use(path: Path) -> int:
    """Do everything with a file; return how many errors of the right kind there were."""
    errors = 0
    try:
        store = SQLiteStore(path)
    except StoreError:
        return 1
    with contextlib.closing(store):
        for call in (
            lambda: everything(store),
            store.stats,
            lambda: store.put(some(3)),
            lambda: store.requeue(EVERY),
            lambda: store.claim("one", LEASE, 9),
            lambda: store.get("x"),
            lambda: store.purge(EVERY, dry_run=False),
        ):
            try:
                call()
            except DeadLetterError as error:
                errors += bool(str(error))
    return errors


@pytest.mark.parametrize(
    "content",
    [
        b"not a database at all\n" * 500,
        random.Random(1).randbytes(20_000),
        b"SQLite format 3\x00",
        b"SQLite format 3\x00" + random.Random(2).randbytes(20_000),
    ],
    ids=["text", "random", "header", "header and random"],
)
def test_garbage_is_an_error(path, content):
    """A file that is no database is a StoreError that names it, and is left as it is."""
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"letters\.db"), SQLiteStore(path) as store:
        store.put(some(1))
    assert path.read_bytes() == content


def test_other_database_is_left_alone(path):
    """A database with a table of another shape is an error, and never a sqlite3 one."""
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE letters (a, b)")
        connection.commit()
    assert use(path) > 0


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_truncated_file_is_an_error(path, share, caplog):
    """A file that was cut gives StoreErrors, or warnings for its letters, and nothing else."""
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert use(path) > 0 or "damaged" in caplog.text


def test_truncated_log_loses_the_last_letters_alone(path, tmp_path):
    """A write-ahead log that was cut anywhere loses its last transactions, no more."""
    copied = tmp_path / "copy"
    with SQLiteStore(path) as store:
        letters = some(30)
        for letter in letters:
            store.put([letter])
        shutil.copytree(path.parent, copied)
    log = copied / "letters.db-wal"
    size = log.stat().st_size
    counts = []
    for share in (1.0, 0.8, 0.6, 0.5, 0.3):
        target = tmp_path / f"cut-{share}"
        shutil.copytree(copied, target)
        with (target / "letters.db-wal").open("rb+") as file:
            file.truncate(int(size * share))
        with SQLiteStore(target / "letters.db") as store:
            listed = ids_of(everything(store))
            assert listed == ids_of(letters)[: len(listed)]
            assert store.stats().total == len(listed)
            counts.append(len(listed))
    assert counts[0] == 30
    assert counts == sorted(counts, reverse=True)


def test_damaged_schema_is_an_error(path):
    """A file whose schema is no longer text is a StoreError like any other damage."""
    filled(path)
    whole = path.read_bytes()
    name, statement = rb"(table)letters(letters.{1,2})", rb"CREATE TABLE"
    damaged, count = re.subn(
        name + statement, b"\\1l\xd4tters\\2CREATE TABEL", whole, flags=re.DOTALL
    )
    assert count == 1
    path.write_bytes(damaged)
    assert use(path) > 0


def test_flipped_bits_give_the_right_errors_alone(path):
    """Whatever bits of the file are flipped, there are errors of dead letters and no others."""
    filled(path)
    whole = path.read_bytes()
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    for number in range(60):
        flipped = bytearray(whole)
        for _ in range(chance.choice((1, 1, 10, 200))):
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        for beside in path.parent.iterdir():
            beside.unlink()
        path.write_bytes(flipped)
        try:
            use(path)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {number}") from error


def damage(path: Path, letter_id: str) -> None:
    """Cut the stored form of a letter."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        cut = connection.execute(
            "UPDATE letters SET letter = substr(letter, 1, 40) WHERE id = ?",
            (letter_id,),
        )
        assert cut.rowcount == 1
        connection.commit()


def test_damaged_letter_is_told(path, store):
    """To get a letter whose bytes are damaged is an error of dead letters that says so."""
    letters = some(3)
    store.put(letters)
    damage(path, letters[1].id)
    with pytest.raises(DeadLetterError):
        store.get(letters[1].id)
    assert store.get(letters[0].id).payload() == letters[0].payload()


@pytest.mark.parametrize("column", ["letter", "attempts"])
def test_column_of_another_type_is_damage(path, store, column):
    """Where a flipped bit has made a column of another type, that letter is told as damaged."""
    (letter,) = letters = some(1)
    store.put(letters)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute("UPDATE sqlite_master SET sql = replace(sql, ') STRICT', ')')")
        connection.execute("PRAGMA writable_schema=RESET")
        connection.execute(f"UPDATE letters SET {column} = 'x'")
        connection.commit()
    with pytest.raises(DeadLetterError):
        store.get(letter.id)
    assert everything(store) == []


@pytest.mark.parametrize("size", [10, 5000])
def test_damaged_letter_is_replaced_by_a_good_one(path, store, size):
    """Where a letter is damaged and its payload fails again, the new letter is in its place."""
    payload = random.Random(1).randbytes(size)
    first = a_letter(b"x" * 10, key="k")
    again = a_letter(b"x" * 10, key="k", attempts=2, headers={"padding": payload.hex()})
    store.put([first, *some(1)])
    damage(path, first.id)
    assert store.put([again]) == ["merged"]
    found = store.get(first.id)
    assert same_but_for_life(again.changed(id=first.id, attempts=3), found)
    assert found.payload() == b"x" * 10
    assert len(everything(store)) == 2
    assert store.purge(EVERY, dry_run=False) == 2
    assert (store.stats().total, store.stats().size) == (0, 0)
    assert store.database.read("SELECT count(*) FROM letter_blobs") == [(0,)]


def test_damaged_letter_does_not_hide_the_rest(path, store):
    """Where one letter is damaged the others are still listed."""
    letters = some(5)
    store.put(letters)
    damage(path, letters[1].id)
    listed = ids_of(everything(store, limit=2))
    assert [one for one in ids_of(letters) if one in listed] == [
        letters[n].id for n in (0, 2, 3, 4)
    ]


def test_damaged_letter_does_not_stop_replays(path, store):
    """Where one letter is damaged the others are still claimed, and none is held by nobody."""
    letters = queued(store, 5)
    damage(path, letters[1].id)
    got: list[str] = []
    for _ in range(10):
        with contextlib.suppress(DeadLetterError):
            for claim in store.claim("one", LEASE, 3):
                got.append(claim.letter.id)
                assert store.settle(claim)
    assert sorted(got) == sorted(letters[n].id for n in (0, 2, 3, 4))


def test_damaged_letter_can_be_purged(path, store):
    """A damaged letter can be counted and purged by its id."""
    letters = some(3)
    store.put(letters)
    damage(path, letters[1].id)
    where = Filter(ids=(letters[1].id,))
    assert store.stats().total == 3
    assert (store.purge(where), store.purge(where, dry_run=False)) == (1, 1)
    assert ids_of(everything(store)) == [letters[0].id, letters[2].id]


# --- opening by URL ------------------------------------------------------------------------------


def test_relative_and_absolute_urls(tmp_path, monkeypatch):
    """Three slashes are for a path from here, four for one from the root."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for url, path in (
        ("sqlite:///letters.db", "letters.db"),
        ("sqlite:///folder/letters.db", "folder/letters.db"),
        (f"sqlite:///{tmp_path}/absolute.db", "absolute.db"),
        ("sqlite:///with%20space%3F.db", "with space?.db"),
    ):
        with open_store(url) as store:
            assert store.put(some(1)) == ["stored"]
            assert (tmp_path / path).is_file()


@pytest.mark.parametrize(
    "name", ["letters.db", "a b.db", "a?b=c.db", "a#b.db", "a%20b.db", "é漢.db", "a'b\".db", ":a:"]
)
def test_url_of_a_store_opens_it_again(tmp_path, monkeypatch, name):
    """A store says where it is by a URL that opens the same file, from any folder."""
    monkeypatch.chdir(tmp_path)
    letter = a_letter()
    with SQLiteStore(name) as store:
        store.put([letter])
        url = store.url
    assert {one.name for one in tmp_path.iterdir()} == {name}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with open_store(url) as again:
        assert ids_of(everything(again)) == [letter.id]
        assert again.url == url


def test_options_are_handed_on(path, clock):
    """Options of the store are taken beside its URL."""
    url = f"sqlite:///{path}"
    with open_store(url, clock=lambda: clock.now, busy=0.1, synchronous="NORMAL") as store:
        queued(store)
        (claim,) = store.claim("one", LEASE)
        assert claim.until == clock.now + LEASE


@pytest.mark.parametrize(
    "url",
    [
        *("", " ", "letters.db", "/letters.db", "sqlite", "sqlite:", "sqlite:/", "sqlite://"),
        *("sqlite:///", "sqlite://host/letters.db", "sqlite://letters.db", "sqlite:letters.db"),
        *("http://a.example/", "mysql://a/b", "file:letters.db", "redis", "://", "sqlite:///a\0b"),
        *("postgresql://user:hunter2@a.example/b", "http://[", "redis://host:port/0"),
    ],
)
def test_url_of_no_store_is_an_error(tmp_path, monkeypatch, url):
    """A URL that is of no store is a StoreError, which shows no password, and makes no file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError) as raised:
        open_store(url)
    assert str(raised.value)
    assert "hunter2" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


# --- what is written -----------------------------------------------------------------------------


def test_a_change_of_state_writes_no_payload_anew(path):
    """However large a letter is, to queue, claim and give it back writes some kilobytes."""
    with SQLiteStore(path, checkpoints=False) as store:
        store.put([a_letter(random.Random(1).randbytes(4 << 20))])
        before = Path(f"{path}-wal").stat().st_size
        store.requeue(EVERY)
        (claim,) = store.claim("one", LEASE)
        store.settle(claim, claim.letter.changed(error_message="new"))
        assert Path(f"{path}-wal").stat().st_size < before + 300_000


def plans(store: SQLiteStore, call: Callable[[], object]) -> str:
    """Return how SQLite finds what a call reads or writes."""
    told: list[str] = []
    with store.database.writing() as writing:
        pass
    writing.set_trace_callback(told.append)
    with store.database._borrowed() as reading:
        reading.set_trace_callback(told.append)
    call()
    writing.set_trace_callback(None)
    statements = [one for one in told if " id IN " in one]
    assert statements
    return str([store.database.read(f"EXPLAIN QUERY PLAN {one}") for one in statements])


@pytest.mark.parametrize("name", ["list", "purge", "requeue", "park", "claim"])
def test_ids_are_looked_up(store, name):
    """What names its letters by ids does not look through all others of their state."""
    store.put(some(5))
    where = Filter(ids=("a", "b"), feed="urlhaus", fingerprint="f1", since=1.0)
    calls = {"claim": lambda: store.claim("one", LEASE, 9, where)}
    plan = plans(store, calls.get(name, lambda: getattr(store, name)(where)))
    assert "(id=?" in plan
    assert "letters_by" not in plan.replace("letters_by_lease", "").replace("letters_by_same", "")


def test_counts_cost_the_same_with_any_number_of_causes(store):
    """The most frequent causes are found by an index, and only so many are told."""
    store.put([a_letter(fingerprint=f"f{n}") for n in range(1200)])
    store.put(some(3, fingerprint="f7"))
    causes = store.stats().by_fingerprint
    assert len(causes) == 1000
    assert next(iter(causes.items())) == ("f7", 4)
    plan = store.database.read(
        "EXPLAIN QUERY PLAN SELECT name, letters FROM letter_counts WHERE queue = ? AND "
        "kind = 'cause' AND letters > 0 AND name <> '' ORDER BY letters DESC LIMIT 1000",
        ("default",),
    )
    assert "letter_causes" in str(plan)
    assert "TEMP B-TREE" not in str(plan)


# --- around the store ----------------------------------------------------------------------------


async def test_asyncio_face(path, clock):
    """For coroutines there are the same methods with the same results, to be awaited."""
    async with AsyncStore(SQLiteStore(path, clock=lambda: clock.now)) as store:
        letters = some(3)
        assert await store.put(letters) == ["stored"] * 3
        assert await store.requeue(Filter(), limit=2) == 2
        (claim,) = await store.claim("one", LEASE, limit=1)
        assert await store.settle(claim)
        assert (await store.stats()).by_state == {"queued": 1, "dead": 1}
        page = await store.list(Filter(states=STATES), newest_first=True)
        assert ids_of(page.letters) == [letters[2].id, letters[1].id]
        assert (await store.get(letters[2].id)).id == letters[2].id
        with pytest.raises(StoreError):
            await store.list(EVERY, cursor="no cursor")
        many = await asyncio.gather(*(store.put(some(2)) for _ in range(20)))
        assert sum(map(len, many)) == 40
        with pytest.raises(AttributeError):
            _ = store.no_such_method


async def test_cancelled_claim_is_given_back(path):
    """Where a coroutine is cancelled while it claims, nobody holds what it would have got."""
    async with AsyncStore(SQLiteStore(path, busy=30)) as store:
        queued(store.store, 2)
        with contextlib.closing(
            sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        ) as other:
            other.execute("BEGIN IMMEDIATE")
            claiming = asyncio.ensure_future(store.claim("one", LEASE, 2))
            await asyncio.sleep(0)
            claiming.cancel()
            await asyncio.sleep(0)
            other.execute("ROLLBACK")
        with pytest.raises(asyncio.CancelledError):
            await claiming
        assert (await store.stats()).by_state == {"queued": 2}
        assert len(await store.claim("two", LEASE, 2)) == 2


def test_asyncio_face_has_all_methods():
    """What a store can do, its face for coroutines can, with the same parameters."""
    for name, method in vars(Store).items():
        if name.startswith("_") or not callable(method):
            continue
        face = getattr(AsyncStore, name)
        assert inspect.iscoroutinefunction(face)
        assert inspect.signature(face) == inspect.signature(method)


async def test_asyncio_face_does_not_block_the_loop(path):
    """While a store waits for its file, other coroutines run."""
    async with AsyncStore(SQLiteStore(path, busy=30)) as store:
        await store.put(some(1))
        with contextlib.closing(
            sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        ) as other:
            other.execute("BEGIN IMMEDIATE")
            waiting = asyncio.ensure_future(store.put(some(1)))
            for _ in range(100):
                await asyncio.sleep(0)
            assert not waiting.done()
            other.execute("ROLLBACK")
        assert await waiting == ["stored"]


def test_copy_counts_the_new_ones(path, tmp_path, store):
    """Letters are copied into a store with all that they had; only new ones are counted."""
    letters = [*queued(store, 70), *some(80)]
    store.put(letters[70:])
    store.park(Filter(ids=(letters[100].id,)))
    with SQLiteStore(tmp_path / "other.db") as other:
        assert copy((one for one in everything(store)), other, batch=64) == 150
        blank = {"revision": 0, "state": "dead"}
        assert [one.changed(**blank) for one in everything(other)] == [
            one.changed(**blank) for one in everything(store)
        ]
        assert ids_of(everything(other, Filter(states=("parked",)))) == [letters[100].id]
        assert copy(everything(store), other) == 0
        assert copy([], other) == 0


def test_owners_are_told_apart():
    """No two replayers have the same name."""
    assert len({new_owner() for _ in range(1000)}) == 1000


# --- the database beneath ------------------------------------------------------------------------

TABLE = "CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, x BLOB)"


def test_transaction_is_undone_by_an_error(path):
    """What raises inside of a transaction undoes all of it, and is raised as it is."""
    base = Database(path, TABLE)
    with base.writing() as writing:
        writing.execute("INSERT INTO t VALUES (1, 'a')")

    def fail() -> None:
        with base.writing() as writing:
            writing.execute("INSERT INTO t VALUES (2, 'b')")
            raise KeyError(2)

    with pytest.raises(KeyError):
        fail()
    assert base.read("SELECT n FROM t") == [(1,)]
    with base.writing() as writing:
        writing.execute("INSERT INTO t VALUES (3, 'c')")
    assert base.read("SELECT n FROM t WHERE n > ?", (1,)) == [(3,)]
    base.close()


@pytest.mark.parametrize("opened_as", ["FULL", "NORMAL"])
def test_a_transaction_may_be_safer_or_quicker_than_others(path, opened_as):
    """One transaction is written as it asks for, and the next one again as all others are."""
    numbers = {"NORMAL": 1, "FULL": 2}
    base = Database(path, TABLE, synchronous=opened_as)

    def in_use(durable: bool | None) -> int:
        with base.writing(durable) as writing:
            ((number,),) = writing.execute("PRAGMA synchronous").fetchall()
            return number

    for _ in range(2):
        assert [in_use(None), in_use(True), in_use(False)] == [numbers[opened_as], 2, 1]
        with pytest.raises(KeyError), base.writing(opened_as == "NORMAL"):
            raise KeyError
        assert in_use(None) == numbers[opened_as]
    base.close()


def test_a_thread_that_writes_already_is_told_so(path):
    """What interrupts a transaction and writes too gets a StoreError at once, and harms nothing."""
    base = Database(path, TABLE, busy=60)

    def interrupt(*_: object) -> None:
        with pytest.raises(StoreError, match="already"), base.writing():
            pass
        with pytest.raises(StoreError, match="already"):
            base.close()
        assert base.read("SELECT count(*) FROM t") == [(0,)]

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with base.writing() as writing:
            writing.execute("INSERT INTO t (x) VALUES ('a')")
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    with base.writing() as writing:
        writing.execute("INSERT INTO t (x) VALUES ('b')")
    assert base.read("SELECT x FROM t") == [("a",), ("b",)]
    base.close()


def test_threads_take_turns_at_writing(path):
    """Transactions of threads follow one another; none sees half of another's."""
    base = Database(path, TABLE)
    seen: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            with base.writing() as writing:
                ((count,),) = writing.execute("SELECT count(*) FROM t").fetchall()
                writing.executemany("INSERT INTO t (x) VALUES (?)", [(b"a",), (b"b",)])
            ((count,),) = base.read("SELECT count(*) FROM t")
            seen.append(count)

    in_threads(4, work)
    assert {count % 2 for count in seen} == {0}
    assert base.read("SELECT count(*) FROM t") == [(160,)]
    base.close()


def test_checkpoints_can_be_somebody_elses(path):
    """Without checkpoints at commits the log grows until somebody asks for one."""
    base = Database(path, TABLE, checkpoints=False)
    base.checkpoint()
    for _ in range(8):
        with base.writing() as writing:
            writing.execute("INSERT INTO t (x) VALUES (zeroblob(1000000))")
    before = path.stat().st_size
    assert before < 1_000_000
    base.checkpoint()
    assert path.stat().st_size > 8_000_000
    base.close()


def test_checkpoint_beside_a_reader_or_a_writer_is_no_error(path):
    """A checkpoint does what it can while another reads or writes."""
    base = Database(path, TABLE, checkpoints=False, busy=0.05)
    with base.writing() as writing:
        writing.execute("INSERT INTO t (x) VALUES ('a')")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        for begin in ("BEGIN", "BEGIN IMMEDIATE"):
            other.execute(begin)
            other.execute("SELECT * FROM t").fetchall()
            base.checkpoint()
            other.execute("ROLLBACK")
    base.close()


@pytest.mark.usefixtures("uncovered")
def test_inherited_transaction_does_not_hang_a_child(path):
    """A child forked in the middle of a transaction that does not end is told so at once."""
    code = """
import json, os, threading
from periscope_otel.dead_letter import StoreError
from periscope_otel.dead_letter.database import Database
base = Database(sys.argv[1], sys.argv[2], busy=60)
inside, leave = threading.Event(), threading.Event()
def hold():
    with base.writing() as writing:
        writing.execute("INSERT INTO t (x) VALUES ('parent')")
        inside.set()
        leave.wait()
thread = threading.Thread(target=hold)
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    for attempt in (lambda: base.read("SELECT * FROM t"), lambda: base.writing().__enter__()):
        try:
            attempt()
        except StoreError:
            continue
        os._exit(1)
    os._exit(0)
status = os.waitpid(child, 0)[1]
leave.set()
thread.join()
print(json.dumps([status, sorted(x for (x,) in base.read("SELECT x FROM t"))]))
"""
    assert finish(start(code, path, TABLE)) == [0, ["parent"]]


@pytest.mark.parametrize("content", [b"root:x:0:0:root:/root:/bin/sh\n" * 300, None])
def test_a_file_of_another_program_is_left_as_it_is(path, content):
    """A file that is no store of letters is refused, with its content and its mode untouched."""
    path.parent.mkdir()
    if content is None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE theirs (x)")
        other.close()
    else:
        path.write_bytes(content)
    path.chmod(0o644)
    before = path.read_bytes()
    with pytest.raises(StoreError):
        SQLiteStore(path)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (before, 0o644)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


FORKED_WHILE_WAITING = """
import json, os, subprocess, threading, time
from periscope_otel.dead_letter import database
from store_conformance import some
from periscope_otel.dead_letter.sqlite_store import SQLiteStore
# What a fork waits at most, and here if it waits at all.
database.FORK_WAIT = 40.0
store = SQLiteStore(sys.argv[1], busy=60)
# Another process has it, since a child inherits what SQLite knows of its parent's own locks.
hold = (
    "import sqlite3, sys; other = sqlite3.connect(sys.argv[1], isolation_level=None);"
    "other.execute('BEGIN IMMEDIATE'); print('held', flush=True); sys.stdin.read()"
)
other = subprocess.Popen(
    [sys.executable, "-c", hold, sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
)
assert other.stdout.readline() == b"held\\n"
thread = threading.Thread(target=lambda: store.put(some(1)))
thread.start()
while not store.database._is_inside:
    time.sleep(0.001)
read, write = os.pipe()
began = time.monotonic()
child = os.fork()
if child == 0:
    os.read(read, 1)
    os._exit(0 if store.put(some(1)) == ["stored"] else 1)
took = time.monotonic() - began
other.kill()
other.wait()
os.write(write, b"x")
status = os.waitpid(child, 0)[1]
thread.join()
print(json.dumps([status, took, store.stats().total]))
"""


@pytest.mark.usefixtures("uncovered")
def test_fork_while_a_thread_waits_for_another_process(path):
    """A child forked while its parent waits for the file can write, and the fork does not wait."""
    status, took, total = finish(start(FORKED_WHILE_WAITING, path))
    assert (status, total) == (0, 2)
    assert took < 30


CLOSED = """
import contextlib, json, threading
from store_conformance import everything, in_threads, some
from periscope_otel.dead_letter import StoreError
from periscope_otel.dead_letter.sqlite_store import SQLiteStore
store = SQLiteStore(sys.argv[1])
store.put(some(50))
answers = []
for _ in range(20):
    started = threading.Event()
    def work(number):
        if number == 0:
            started.wait(30)
            store.close()
            return
        with contextlib.suppress(StoreError):
            for _ in range(20):
                answers.append(len(everything(store, limit=5)))
                started.set()
    in_threads(4, work)
print(json.dumps(sorted(set(answers))))
"""


def test_closing_while_threads_read(path):
    """Closing a store while threads read ends in whole answers or StoreErrors, and nothing else."""
    assert finish(start(CLOSED, path)) == [50]
