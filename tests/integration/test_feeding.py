"""From a failure in a real process to a letter in a real store."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from patience import be_patient
from processes import PATIENCE, run, running
from redis_servers import RedisServer

import periscope_otel as periscope
from periscope_otel.dead_letter import Filter, StoreError, open_store
from periscope_otel.dead_letter.codecs import decode_plain
from periscope_otel.dead_letter.in_use import in_use, options_of
from periscope_otel.dead_letter.queue import FILE, DeadLetterQueue
from periscope_otel.settings import load
from periscope_otel.telemetry.letter_counts import letter_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WITHIN = 40.0

PLAIN = [
    ("default", "rows", "item 1"),
    ("default", "rows", "item 2"),
    ("default", "store", {"name": "function"}),
    ("urgent", "fetch", {"name": "coroutine"}),
]


def wait_until(holds: Callable[[], object]) -> None:
    """Wait for what another thread or process does."""
    deadline = time.monotonic() + WITHIN
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def letters_of(url: str, queue: str = "default") -> list[Any]:
    with open_store(url) as store:
        return list(store.list(Filter(queue=queue), limit=1000).letters)


def kept_in(url: str) -> list[tuple[str, str, Any]]:
    """Return queue, operation and payload of all letters."""
    found = [*letters_of(url), *letters_of(url, "urgent")]
    told = [(one.queue, one.operation, decode_plain(one.payload())) for one in found]
    return sorted(told, key=str)


def file_in(folder: Path) -> str:
    return f"sqlite:///{folder / FILE}"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine that stops for seconds change nothing."""
    be_patient(monkeypatch)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Return a server that runs."""
    with RedisServer("redis", tmp_path / "redis") as server:
        yield server


# The file as the store.


@pytest.mark.parametrize("end", ["plain", "kill"])
def test_what_fails_is_in_the_file(end, tmp_path):
    """Also where the process is killed as soon as the calls have returned."""
    run("failing", end, str(tmp_path / "data"))
    assert kept_in(file_in(tmp_path / "data")) == PLAIN


def test_coroutines_that_have_returned_left_their_letters(tmp_path):
    """Though threads have written them."""
    run("failing", "kill_coroutine", str(tmp_path / "data"))
    found = Counter(name["name"] for _, _, name in kept_in(file_in(tmp_path / "data")))
    assert found == {str(one): 1 for one in range(20)}


def test_without_configure_letters_are_in_the_users_state_directory(tmp_path):
    """As the XDG specification has it, for the user alone."""
    run("failing", "plain", env={"XDG_STATE_HOME": str(tmp_path / "state")})
    folder = tmp_path / "state" / "periscope-otel"
    assert kept_in(file_in(folder)) == PLAIN
    assert folder.stat().st_mode & 0o777 == 0o700


def test_without_xdg_letters_are_below_the_home_directory(tmp_path):
    """The default of the specification; what is no absolute path is left out."""
    run("failing", "plain", env={"XDG_STATE_HOME": "relative", "HOME": str(tmp_path)})
    assert kept_in(file_in(tmp_path / ".local" / "state" / "periscope-otel")) == PLAIN


def test_forks_beside_threads_that_fail_lose_nothing(tmp_path, uncovered):
    """Each failure of parent and children is one letter."""
    ended = run("failing", "forks", str(tmp_path / "data"))
    assert ended.status == 0, ended.stderr
    with open_store(file_in(tmp_path / "data")) as store:
        assert store.stats().total == int(ended.lines[-1])


def test_failures_in_children_of_multiprocessing_are_letters(tmp_path, uncovered):
    """Forked ones and spawned ones, the latter with the default folder."""
    state = tmp_path / "state"
    ended = run("failing", "children", str(tmp_path / "data"), env={"XDG_STATE_HOME": str(state)})
    assert ended.status == 0, ended.stderr
    forked = kept_in(file_in(tmp_path / "data"))
    spawned = kept_in(file_in(state / "periscope-otel"))
    assert sorted(one["name"] for *_, one in forked) == [f"fork {one}" for one in range(5)]
    assert sorted(one["name"] for *_, one in spawned) == [f"spawn {one}" for one in range(5)]


def test_items_of_a_coroutine_that_was_dropped_are_kept(tmp_path):
    """A finaliser ends it, and the end of the process waits for what that has left to do."""
    run("failing", "dropped", env={"XDG_STATE_HOME": str(tmp_path)})
    assert kept_in(file_in(tmp_path / "periscope-otel")) == [("default", "dropped", "item")]


def told_until(program: Any, wanted: set[str]) -> set[str]:
    """Ask a program for what its reader is told, until all that is wanted is there."""
    deadline = time.monotonic() + WITHIN
    while True:
        told = set(program.line().split())
        if wanted <= told or time.monotonic() > deadline:
            program.tell("end")
            return told
        time.sleep(0.1)
        program.tell()


def test_a_real_reader_is_told_of_letters(tmp_path):
    """How many there are by queue and state, and what was put."""
    with running("failing", "figures", str(tmp_path / "data")) as program:
        wanted = {
            "dead_letter.letters['dead','default']=3",
            "dead_letter.letters['dead','urgent']=1",
            "dead_letter.letters['default','parked']=0",
            "dead_letter.puts['default','disk']=3",
            "dead_letter.puts['disk','urgent']=1",
        }
        told = told_until(program, wanted)
        assert wanted <= told
        assert any(one.startswith("dead_letter.oldest.age['default']=") for one in told)
        assert not any("outbox" in one for one in told)


def test_queues_that_operations_name_are_told_of_from_the_start(tmp_path):
    """A process that has put nothing yet tells how many letters are in them."""
    run("failing", "plain", str(tmp_path / "data"))
    env = {"PERISCOPE_DATA_DIR": str(tmp_path / "data")}
    with running("failing", "figures", str(tmp_path / "data"), env=env) as program:
        wanted = {"dead_letter.letters['dead','urgent']=1"}
        assert wanted <= told_until(program, wanted)


# Redis as the store.


def test_what_fails_is_moved_to_redis(redis, tmp_path):
    """While the program runs."""
    with running("failing", "wait", str(tmp_path / "data"), redis.url) as program:
        assert program.line() == "failed"
        wait_until(lambda: len(kept_in(redis.url)) == len(PLAIN))
        assert kept_in(redis.url) == PLAIN
        program.tell()
        assert program.ended().status == 0


def test_the_end_of_the_process_moves_what_it_can(redis, tmp_path):
    """A program that fails and ends at once leaves its letters in Redis, within its timeout."""
    env = {"PERISCOPE_SHUTDOWN_TIMEOUT": "40"}
    began = time.monotonic()
    ended = run("failing", "plain", str(tmp_path / "data"), redis.url, env=env)
    assert ended.status == 0
    assert ended.at - began < 40
    assert kept_in(redis.url) == PLAIN


def test_without_configure_the_end_of_the_process_does_it_too(redis, tmp_path):
    """By the environment alone."""
    run("failing", "plain", env={"XDG_STATE_HOME": str(tmp_path), "PERISCOPE_REDIS_URL": redis.url})
    assert kept_in(redis.url) == PLAIN


def test_the_end_moves_letters_that_nobody_expected_at_configure(redis, tmp_path):
    """The order in which parts were set up does not matter."""
    env = {"PERISCOPE_SHUTDOWN_TIMEOUT": "40"}
    run("failing", "late", str(tmp_path / "data"), redis.url, env=env)
    assert len(letters_of(redis.url, "late")) == 1


def test_the_end_of_the_process_is_not_held_up_by_redis(redis, tmp_path):
    """What a server that hangs does not take stays in the outbox, and arrives later."""
    redis.pause()
    env = {"PERISCOPE_SHUTDOWN_TIMEOUT": "1"}
    began = time.monotonic()
    ended = run("failing", "plain", str(tmp_path / "data"), redis.url, env=env)
    assert ended.status == 0
    assert ended.at - began < 0.75 * PATIENCE  # one answer of that server is waited for longer
    redis.resume()
    with DeadLetterQueue(tmp_path / "data", redis_url=redis.url) as queue:
        queue.start()
        wait_until(lambda: kept_in(redis.url) == PLAIN)


def test_the_outbox_is_told_of_while_redis_is_away(tmp_path):
    """Its figures matter most then."""
    nobody = "redis://127.0.0.1:1/0"
    with running("failing", "figures", str(tmp_path / "data"), nobody) as program:
        wanted = {"periscope.outbox.letters[]=4", "dead_letter.puts['default','disk']=3"}
        told = told_until(program, wanted)
        assert wanted <= told
        assert any(one.startswith("periscope.outbox.oldest.age[]=") for one in told)


def test_letters_survive_kill_9_on_their_way(redis, tmp_path):
    """The next process that opens the folder moves them on."""
    redis.pause()
    run("failing", "kill", str(tmp_path / "data"), redis.url)
    redis.resume()
    with DeadLetterQueue(tmp_path / "data", redis_url=redis.url) as queue:
        queue.start()
        wait_until(lambda: kept_in(redis.url) == PLAIN)


# What configure() refuses, and what it does not.


@pytest.fixture
def shut_down() -> Iterator[None]:
    """Undo what `configure` did."""
    yield
    periscope.shutdown(5)


def test_a_folder_that_cannot_be_made_is_an_error(shut_down):
    """Said at `configure()`, by name; also to the user who may do anything."""
    with pytest.raises(StoreError, match="/proc/letters"):
        periscope.configure(data_dir="/proc/letters")


def test_a_folder_whose_parent_is_missing_is_an_error(shut_down, tmp_path):
    """A mistake, or a volume that is not mounted, is not made good by making folders."""
    with pytest.raises(StoreError, match="there is no folder"):
        periscope.configure(data_dir=str(tmp_path / "not" / "mounted"))
    assert not (tmp_path / "not").exists()


def test_a_file_in_the_place_of_the_folder_is_an_error(shut_down, tmp_path):
    """It is left alone."""
    (tmp_path / "data").write_text("mine")
    with pytest.raises(StoreError, match="cannot use"):
        periscope.configure(data_dir=str(tmp_path / "data"))
    assert (tmp_path / "data").read_text() == "mine"


def test_a_password_of_redis_is_in_no_error(shut_down, tmp_path):
    """Where the URL cannot be used."""
    with pytest.raises(Exception, match=r".") as caught:
        periscope.configure(data_dir=str(tmp_path), redis_url="redis://u:hunter2@host:x/0")
    assert "hunter2" not in str(caught.value)


def test_without_a_home_directory_nothing_else_is_refused(shut_down, monkeypatch):
    """Who keeps no dead letters needs none; who does is told what to give."""
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", _no_home)
    monkeypatch.setattr(in_use, "wanted", False)
    periscope.shutdown(5)
    with pytest.raises(StoreError, match="data_dir="):
        periscope.configure(dead_letters=True)


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


# While the folder cannot be opened.


def fail(item: object = "item") -> None:
    with periscope.operation("s", dead_letter=True) as op:
        op.failed(item)


@pytest.fixture
def missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder that cannot be used yet; `in_use` wants to have its letters there."""
    monkeypatch.setattr("periscope_otel.dead_letter.in_use._TRY_AGAIN", 1.0)
    folder = tmp_path / "volume" / "data"
    with letter_counts.set_aside():
        in_use.configure(options_of(load({"data_dir": str(folder)}, {})))
        yield folder
        in_use.configure(None)
        # Who tries it again now and then notices that at its next try: not in another test.
        for thread in threading.enumerate():
            if thread.name == "periscope-dead-letter-folder":
                thread.join(WITHIN)
        in_use.configure(None)


def test_letters_wait_for_a_folder_that_comes_later(missing, monkeypatch, caplog):
    """They are written as soon as it can be opened, though no other letter comes."""
    monkeypatch.setattr("periscope_otel.dead_letter.in_use._TRY_AGAIN", 0.05)
    fail(1)
    fail(2)
    assert letter_counts.puts() == {("default", "memory"): 2}
    assert "there is no folder" in caplog.text
    missing.parent.mkdir()
    wait_until(lambda: in_use.opened is not None)
    assert len(letters_of(file_in(missing))) == 2
    assert letter_counts.losses() == {}


def test_letters_that_wait_are_written_at_the_end(missing):
    """If the folder is there by then."""
    fail()
    missing.parent.mkdir()
    in_use.close()
    assert len(letters_of(file_in(missing))) == 1


def test_letters_that_waited_for_nothing_are_lost_loudly(missing, caplog):
    """At the end each is counted and told of."""
    fail()
    in_use.close()
    assert letter_counts.losses() == {("default", "folder"): 1}
    assert "LOST the dead letter" in caplog.text


def test_a_queue_that_was_let_go_of_is_not_opened_again(missing, tmp_path):
    """Who waits for the folder gives up, though another one could be opened by then."""
    fail()
    in_use.configure(options_of(load({"data_dir": str(tmp_path / "other")}, {})))
    for thread in threading.enumerate():
        if thread.name == "periscope-dead-letter-folder":
            thread.join(WITHIN)
    assert in_use.opened is None


def test_only_so_many_letters_wait(missing, monkeypatch):
    """What is more than that is lost at once, and loudly."""
    monkeypatch.setattr("periscope_otel.dead_letter.memory.MOST", 3)
    for _ in range(5):
        fail()
    assert letter_counts.puts() == {("default", "memory"): 3}
    assert letter_counts.losses() == {("default", "folder"): 2}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_letters_that_wait_are_their_parents(missing, uncovered):
    """A forked child neither writes them nor tells of their loss."""
    fail()
    pid = os.fork()
    if pid == 0:
        in_use.close()
        os._exit(len(letter_counts.losses()))
    assert os.waitpid(pid, 0)[1] == 0
    missing.parent.mkdir()
    in_use.close()
    assert len(letters_of(file_in(missing))) == 1
