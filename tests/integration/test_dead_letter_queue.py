"""The dead-letter queue of a process: what is put is kept, and what cannot be kept is told."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
from patience import be_patient
from processes import clean_environment
from redis_servers import RedisServer

from periscope_otel import guard
from periscope_otel.dead_letter import (
    StoreError,
    database,
    forwarder,
    journal,
    open_store,
)
from periscope_otel.dead_letter.journal import Journal
from periscope_otel.dead_letter.memory import MOST
from periscope_otel.dead_letter.queue import BUSY, FILE, DeadLetterQueue
from periscope_otel.dead_letter.sqlite_store import SQLiteStore

pytest.register_assert_rewrite("store_conformance")

from store_conformance import (  # noqa: E402  (its assertions are rewritten first)
    a_letter,
    everything,
    ids_of,
    some,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WITHIN = 30.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine that stops for seconds change nothing."""
    be_patient(monkeypatch)


def wait_until(holds) -> None:
    """Wait for what a background thread does."""
    deadline = time.monotonic() + WITHIN
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def held_by_another(folder: Path) -> Iterator[None]:
    """Have another connection write to the file for a block."""
    other = sqlite3.connect(folder / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.execute("ROLLBACK")
    other.close()


# Without a Redis.


def test_without_a_redis_the_file_is_the_store(tmp_path):
    """What is put can be read from the file at once, and by others."""
    letters = some(3)
    with DeadLetterQueue(tmp_path) as queue:
        assert queue.put(letters) == "disk"
        assert ids_of(everything(queue.store)) == ids_of(letters)
        with open_store(f"sqlite:///{tmp_path / FILE}") as other:
            assert ids_of(everything(other)) == ids_of(letters)


def test_nothing_is_put_where_there_is_nothing(tmp_path):
    """An empty put writes nothing."""
    with DeadLetterQueue(tmp_path) as queue:
        assert queue.put([]) == "disk"
        assert queue.store.stats().total == 0


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path):
    """It is said when the queue is made, not when the first letter is put."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot use"):
        DeadLetterQueue(tmp_path / "file" / "below")


def test_a_letter_survives_kill_9_once_put_has_returned(tmp_path):
    """The process that put it may die in the next instant."""
    program = (
        "import os, sys; sys.path[:0] = sys.argv[2:];"
        "from store_conformance import some;"
        "from periscope_otel.dead_letter.queue import DeadLetterQueue;"
        "queue = DeadLetterQueue(sys.argv[1]); queue.put(some(3)); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), os.path.dirname(__file__)],  # noqa: PTH120
        env=clean_environment(),
        check=False,
    )
    assert done.returncode == -9
    with open_store(f"sqlite:///{tmp_path / FILE}") as store:
        assert store.stats().total == 3


def test_a_file_that_is_opened_again_stays_whole(tmp_path):
    """A second store on the file in this process takes no lock away that keeps others in order."""
    look = (
        "import sys; from periscope_otel.dead_letter import open_store;"
        "store = open_store(sys.argv[1], busy=60); print(store.stats().total); store.close()"
    )
    url = f"sqlite:///{tmp_path / FILE}"
    with DeadLetterQueue(tmp_path) as queue:
        for number in range(1, 6):
            queue.put(some(1))
            open_store(url).close()
            done = subprocess.run(
                [sys.executable, "-c", look, url],
                env=clean_environment(), capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert int(done.stdout) == number


def test_everything_in_memory_is_written_out_at_the_end(tmp_path):
    """More than a batch in memory reaches a file that is free again."""
    queue = DeadLetterQueue(tmp_path)
    with held_by_another(tmp_path):
        queue.put(some(300))
    queue.close()
    assert (queue.lost, queue.store.stats().total) == (0, 300)


def test_half_a_character_does_not_keep_a_letter_from_being_written(tmp_path):
    """Half a character in a text is replaced, rather than the letter lost."""
    with DeadLetterQueue(tmp_path) as queue:
        good = a_letter()
        assert queue.put([a_letter(host="\ud800"), good]) == "disk"
        hosts = {one.id: one.host for one in everything(queue.store)}
        assert (queue.lost, sorted(hosts.values())) == (0, sorted(["?", good.host]))


class OwnTime(threading.local):
    """The time of a thread, which passes while it sleeps and not while the machine stops."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        self.now += seconds


def test_a_file_held_by_others_is_waited_for_shortly(tmp_path, monkeypatch):
    """After a quarter of a second the letter is in memory, and in the file when that is free."""
    own = OwnTime()
    monkeypatch.setattr(database, "time", own)
    with DeadLetterQueue(tmp_path) as queue:
        with held_by_another(tmp_path):
            began = own.now
            assert queue.put(some(1)) == "memory"
            assert BUSY <= own.now - began < 2 * BUSY
            assert queue.in_memory == 1
        wait_until(lambda: not queue.in_memory)  # a moment after the file has it
        assert (queue.store.stats().total, queue.lost) == (1, 0)


@contextmanager
def held_for_a_while(folder: Path) -> Iterator[None]:
    """Have another connection write to the file, for longer than a letter waits.

    A machine that stops may make that any time longer.
    """
    other = sqlite3.connect(folder / FILE, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    let_go = threading.Timer(3 * BUSY, lambda: other.execute("ROLLBACK"))
    let_go.start()
    yield
    let_go.join()
    other.close()


def test_a_file_that_others_write_to_can_be_opened(tmp_path):
    """That it is busy is no reason to refuse it, as what cannot be used at all is."""
    DeadLetterQueue(tmp_path).close()
    with held_for_a_while(tmp_path), DeadLetterQueue(tmp_path) as queue:
        assert queue.put(some(1)) == "disk"


def test_a_payload_waits_longer_for_the_journal_than_a_letter_for_the_file(tmp_path, monkeypatch):
    """What is about to be worked on is written down though others hold the file for a while."""
    assert journal.LONGEST_WAIT > 3 * BUSY
    monkeypatch.setattr(journal, "LONGEST_WAIT", WITHIN)  # for as long as it is held
    with DeadLetterQueue(tmp_path) as queue, held_for_a_while(tmp_path):
        assert queue.journal(a_letter())


def open_below(folder: Path) -> list[str]:
    """Return which files of a folder this process has open, each as often as it is open.

    Others come and go with what other tests have left.
    """
    found: list[str] = []
    for descriptor in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with suppress(OSError):  # it was closed meanwhile
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
    return sorted(one for one in found if one.startswith(str(folder)))


def test_a_journal_that_cannot_be_adopted_yet_keeps_no_file_open(tmp_path):
    """What a dead process left is looked at again and again, with the same descriptors."""
    program = (
        "import os, sys; sys.path[:0] = sys.argv[2:];"
        "from store_conformance import a_letter;"
        "from periscope_otel.dead_letter.queue import DeadLetterQueue;"
        "queue = DeadLetterQueue(sys.argv[1]); queue.journal(a_letter()); os.kill(os.getpid(), 9)"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), os.path.dirname(__file__)],  # noqa: PTH120
        env=clean_environment(),
        check=False,
    )
    with SQLiteStore(tmp_path / FILE, busy=0.01) as store:
        left = Journal(store)
        with held_by_another(tmp_path):
            for _ in range(3):
                with pytest.raises(StoreError):
                    left.adopt()
            before = open_below(tmp_path)
            assert before
            for _ in range(5):
                with pytest.raises(StoreError):
                    left.adopt()
            assert open_below(tmp_path) == before
        assert len(left.adopt()) == 1
        (letter,) = everything(store)
        assert letter.error_type == "abandoned"


def test_what_fits_nowhere_is_lost_loudly(tmp_path, caplog):
    """A full file and a full memory: each letter beyond is counted, logged and handed over."""
    handed: list[str] = []
    full = DeadLetterQueue(
        tmp_path, largest_file=1, on_lost=lambda letter, why: handed.append(letter.id)
    )
    letters = some(MOST + 400, host="x" * 1000)
    with caplog.at_level(logging.ERROR, "periscope_otel"):
        answers = [full.put([letter]) for letter in letters]
    assert answers[0] == "disk"
    assert answers[-1] == "lost"
    assert answers.count("memory") >= MOST
    lost = [one.id for one, where in zip(letters, answers, strict=True) if where == "lost"]
    assert handed == lost
    assert full.lost == len(lost) == sum("LOST" in one.getMessage() for one in caplog.records)
    full.close()
    assert full.lost + full.store.stats().total == len(letters)


def test_a_hook_that_raises_loses_no_more(tmp_path):
    """What `on_lost` does wrong is its own."""

    def raising(letter, why):
        raise RuntimeError("the hook")

    queue = DeadLetterQueue(tmp_path, on_lost=raising)
    with held_by_another(tmp_path):
        assert queue.put([a_letter(b"x" * 10)]) == "memory"
        queue.close()
    assert queue.lost == 1


async def test_a_coroutine_puts_without_holding_the_loop_up(tmp_path, monkeypatch):
    """The loop goes on meanwhile, and a cancellation does not interrupt the write."""
    with DeadLetterQueue(tmp_path) as queue:
        write, went_on = queue._write, threading.Event()

        def slowly(letters, **options) -> None:
            assert went_on.wait(WITHIN)
            write(letters, **options)

        monkeypatch.setattr(queue, "_write", slowly)
        with held_by_another(tmp_path):
            putting = asyncio.create_task(queue.put_from_coroutine(some(1)))
            for _ in range(4):
                await asyncio.sleep(0.01)
            assert not putting.done()
            went_on.set()
            assert await putting == "memory"
        cancelled = asyncio.create_task(queue.put_from_coroutine(some(1)))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        wait_until(lambda: queue.store.stats().total == 2)


def test_a_forked_child_puts_its_own(tmp_path):
    """A child can put, and does not repeat what was in its parent's memory."""
    with DeadLetterQueue(tmp_path) as queue:
        queue.put(some(1))
        with held_by_another(tmp_path):
            queue.put(some(1))
            child = os.fork()
            if child == 0:
                os._exit(queue.in_memory)
            assert os.waitpid(child, 0)[1] == 0
        wait_until(lambda: not queue.in_memory)  # writing it may hold the file for long
        child = os.fork()
        if child == 0:
            os._exit(0 if queue.put(some(1)) == "disk" else 1)
        assert os.waitpid(child, 0)[1] == 0
        wait_until(lambda: queue.store.stats().total == 3)


# With a Redis.


@pytest.fixture(params=["redis", "valkey"])
def redis(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RedisServer:
    """Return a server that is not running yet."""
    monkeypatch.setattr(forwarder, "LONGEST_WAIT", 1.0)  # by chance it is as long as we wait
    return RedisServer(request.param, tmp_path / "redis")


def test_letters_arrive_when_redis_comes(redis, tmp_path):
    """A put is a local write while there is no Redis; once there is, it has all of them."""
    letters = some(200)
    with DeadLetterQueue(tmp_path / "data", redis_url=redis.url) as queue:
        for letter in letters:
            assert queue.put([letter]) == "disk"
        with redis:
            wait_until(lambda: total_of(redis) == len(letters))
            assert ids_of(everything(queue.store)) == ids_of(letters)


def test_letters_arrive_through_a_redis_that_hangs_and_dies(redis, tmp_path):
    """Neither a server that does not answer nor one that forgets everything loses a letter."""
    letters = some(90)
    with redis, DeadLetterQueue(tmp_path / "data", redis_url=redis.url) as queue:
        queue.put(letters[:30])
        wait_until(lambda: total_of(redis) == 30)
        redis.pause()
        queue.put(letters[30:60])
        redis.kill()
        queue.put(letters[60:])
        redis.start()  # without persistence: it has forgotten the first thirty
        # Ninety, if it was stopped before it could say that it had taken the first thirty.
        wait_until(lambda: total_of(redis) >= 60)
        assert queue.lost == 0


def test_what_was_put_last_is_moved_on_at_the_end(redis, tmp_path):
    """A queue that is closed right after a put has moved the letter to a Redis that is well."""
    with redis:
        for number in range(1, 21):
            with DeadLetterQueue(tmp_path / f"data-{number}", redis_url=redis.url) as queue:
                queue.put(some(1))
            assert total_of(redis) == number


def test_a_full_disk_is_gone_round(redis, tmp_path):
    """With no room in the file letters go from memory straight to Redis."""
    letters = some(300, host="x" * 1000)
    with redis, DeadLetterQueue(
        tmp_path / "data", redis_url=redis.url, largest_file=1
    ) as queue:  # fmt: skip
        for letter in letters:
            assert queue.put([letter]) in ("disk", "memory")
        wait_until(lambda: total_of(redis) == len(letters))
        wait_until(lambda: not queue.in_memory)  # a moment after Redis has taken the last of them
        assert queue.lost == 0


def total_of(redis: RedisServer) -> int:
    """Return how many letters a server has."""
    with open_store(redis.url) as store:
        return store.stats().total


# Whatever interrupts it.


@pytest.mark.parametrize("written", [False, True])
def test_an_interrupted_put_is_kept_and_kept_once(written, tmp_path, monkeypatch):
    """Ctrl-C in the middle of a write gets through, and the letter is in the file in the end."""
    letter = a_letter()
    with DeadLetterQueue(tmp_path) as queue:
        write = queue._write

        def interrupted(letters, **options) -> None:
            monkeypatch.setattr(queue, "_write", write)
            if written:
                write(letters, **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(queue, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            queue.put([letter])
        wait_until(lambda: not queue.in_memory)
        assert ids_of(everything(queue.store)) == [letter.id]
        assert queue.lost == 0


def test_an_error_that_nobody_thought_of_keeps_the_letter(tmp_path, monkeypatch):
    """It is contained and counted, and the letter waits in memory."""
    guard.set_strict(False)
    with DeadLetterQueue(tmp_path) as queue:
        write = queue._write

        def broken(letters, **options) -> None:
            monkeypatch.setattr(queue, "_write", write)
            raise MemoryError

        monkeypatch.setattr(queue, "_write", broken)
        assert queue.put(some(1)) == "memory"
        wait_until(lambda: queue.store.stats().total == 1)
    assert sum(guard.counts().values()) == 1


def test_half_a_character_in_memory_holds_nothing_up(tmp_path):
    """A letter that could not be written as it is does not keep the others in memory."""
    with DeadLetterQueue(tmp_path) as queue:
        with held_by_another(tmp_path):
            assert queue.put([a_letter(key="\udc80"), *some(2)]) == "memory"
        wait_until(lambda: not queue.in_memory)  # a moment after the file has them
        assert (queue.store.stats().total, queue.lost) == (3, 0)


def test_a_letter_that_comes_after_the_end_is_written_or_lost_loudly(tmp_path, caplog):
    """Nobody would empty the memory any more."""
    queue = DeadLetterQueue(tmp_path)
    queue.close()
    assert queue.put(some(1)) == "disk"
    with held_by_another(tmp_path):
        assert queue.put(some(1)) == "lost"
    assert (queue.in_memory, queue.lost) == (0, 1)
    assert "LOST the dead letter" in caplog.text
    queue.close()


def test_a_flush_waits_for_a_round_that_began_after_it(tmp_path, monkeypatch):
    """One that was under way may have missed what is to be flushed."""
    with DeadLetterQueue(tmp_path) as queue:
        under_way, may_end, rounds = threading.Event(), threading.Event(), []

        def one_round() -> bool:
            rounds.append(1)
            under_way.set()
            may_end.wait(WITHIN)
            return False

        monkeypatch.setattr(queue, "round", one_round)
        queue.start()
        under_way.wait(WITHIN)
        queue.start_flush()
        may_end.set()
        assert queue.wait_flushed(WITHIN)
        assert len(rounds) >= 2
