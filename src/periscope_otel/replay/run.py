"""Replays of many letters: claims, leases, threads, and what became of each."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opentelemetry.trace import Status, StatusCode

from periscope_otel import guard
from periscope_otel.dead_letter.bodies import FOLDER, BodyFiles
from periscope_otel.dead_letter.draft import fields_of, host_name, letter_ids
from periscope_otel.dead_letter.errors import (
    CannotReplayError,
    DamagedLetterError,
    DeadLetterError,
    PayloadElsewhereError,
    StoreError,
)
from periscope_otel.dead_letter.in_use import in_use
from periscope_otel.dead_letter.replaying import Replaying
from periscope_otel.dead_letter.store import (
    MOST_REPLAYS,
    Filter,
    new_owner,
    open_store,
    payload_identity,
)
from periscope_otel.progress import open_bar
from periscope_otel.registry import handler_of
from periscope_otel.replay.trial import event_loop, is_item, prepared, span_of, tried
from periscope_otel.telemetry import names
from periscope_otel.telemetry.letter_counts import letter_counts

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from periscope_otel.dead_letter.draft import Cause
    from periscope_otel.dead_letter.letter import Letter
    from periscope_otel.dead_letter.store import Claim, Store

LEASE: Final = 60.0
"""Seconds for which a letter is this replayer's alone; renewed as long as its handler runs."""

_PAGE: Final = 100
_REASONS: Final = {
    CannotReplayError: "does not fit its operation",
    DamagedLetterError: "damaged",
    PayloadElsewhereError: "payload elsewhere",
}
_SETTLE_AGAIN: Final = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds between tries to tell the store how a replay ended."""


class Replayed(NamedTuple):
    """What became of one letter."""

    letter: Letter
    outcome: str
    """`succeeded`, `failed`, `parked` (failed too often), `left` or `lost_claim`."""
    detail: str = ""
    """Why it failed, or was left."""
    reason: str = ""
    """The same in a few words, one of a few."""


@dataclass
class ReplayReport:
    """What became of all letters of a replay."""

    succeeded: int = 0
    failed: int = 0
    parked: int = 0
    """Of those that failed, those that have now failed too often."""
    lost_claim: int = 0
    """Letters that another replayer took over, or whose end could not be told to the store."""
    left: Counter[str] = field(default_factory=Counter)
    """Letters that were not tried, by the reason."""
    would_replay: int = 0
    """In a dry run: letters that would be tried."""
    stopped: str | None = None
    """Why it ended before all letters were tried."""

    @property
    def tried(self) -> int:
        """Letters whose handler ran."""
        return self.succeeded + self.failed + self.lost_claim

    def add(self, replayed: Replayed) -> None:
        """Count one more letter."""
        if replayed.outcome == "left":
            self.left[replayed.reason or replayed.detail] += 1
        elif replayed.outcome == "parked":
            self.failed += 1
            self.parked += 1
        else:
            setattr(self, replayed.outcome, getattr(self, replayed.outcome) + 1)


def replay(
    store: Store | str,
    where: Filter | None = None,
    *,
    limit: int | None = None,
    rate: float | None = None,
    concurrency: int = 1,
    dry_run: bool = False,
    lease: float = LEASE,
    folder: str | Path | None = None,
    on_replayed: Callable[[Replayed], object] | None = None,
) -> ReplayReport:
    """Replay dead letters, each once, in the order in which they came.

    Args:
        store: Where they are: a store, or its URL.
        where: Which; by default all of the default queue that are dead or queued.
        limit: How many at most are tried; all by default.
        rate: Letters a second at most; no limit by default.
        concurrency: Handlers that run at the same time, each in a thread; those that are
            coroutines share one event loop.
        dry_run: Try none, only say what would be tried.
        lease: Seconds after which another replayer may take a letter over if this one dies.
        folder: Where large payloads are; by default beside the store's file, for a Redis in the
            folder of dead letters of this process.
        on_replayed: Called with what became of each letter, in the threads of the handlers.

    Returns:
        How many ended how. Letters are left where no operation of their name is registered, where
        their payload cannot be replayed or is on another machine, and where it is too early
        (`not_before`).

    Raises:
        StoreError: If the store cannot be used.
        ValueError: If `concurrency`, `rate`, `limit` or `lease` is not greater than 0.

    Example:
        >>> replay("sqlite:///dead-letters.db", Filter(feed="urlhaus"), limit=100).succeeded
        12
    """
    for what, value in (
        ("concurrency", concurrency), ("rate", rate), ("limit", limit), ("lease", lease)
    ):  # fmt: skip
        if value is not None and not value > 0:
            raise ValueError(f"{what}={value}: it has to be greater than 0")
    opened = open_store(store) if isinstance(store, str) else store
    try:
        run = _Run(opened, where or Filter(states=("dead", "queued")), lease, folder, on_replayed)
        return run.rehearse(limit) if dry_run else run.all(limit, rate, concurrency)
    finally:
        if isinstance(store, str):
            opened.close()


class _Run:
    """One replay of many letters."""

    def __init__(
        self,
        store: Store,
        where: Filter,
        lease: float,
        folder: str | Path | None,
        on_replayed: Callable[[Replayed], object] | None,
    ) -> None:
        self._store = store
        self._where = where
        self._lease = lease
        self._owner = new_owner()
        self._bodies = BodyFiles(_folder_of(store) if folder is None else folder)
        self._on_replayed = on_replayed
        self._report = ReplayReport()
        self._lock = threading.Lock()
        self._drawing = threading.Lock()  # a terminal may hold up whoever writes to it
        self._stop = threading.Event()
        self._finished = threading.Event()
        self._working = 0
        self._idle = threading.Event()
        self._held: dict[str, Claim] = {}

    def rehearse(self, limit: int | None) -> ReplayReport:
        """Count what would be tried."""
        for letter in self._letters():
            if limit is not None and self._report.would_replay >= limit:
                break
            if (why := self._why_not(letter)) is None:
                self._report.would_replay += 1
            else:
                self._tell(Replayed(letter, "left", why))
        return self._report

    def all(self, limit: int | None, rate: float | None, concurrency: int) -> ReplayReport:
        """Try them."""
        self._reclaim()
        bar = open_bar("replay", limit)
        work = _Work(self._wanted(limit), rate, self._stop)
        renewing = threading.Thread(target=self._renew, name="periscope-renew", daemon=True)
        renewing.start()
        errors: list[BaseException] = []
        try:
            with event_loop() as loop:
                try:
                    for _ in range(concurrency):
                        self._start(lambda: self._work_off(work, loop, bar), errors)
                    self._wait()
                except BaseException:
                    self._stop.set()  # what runs is let finish
                    self._wait()
                    raise
        finally:
            self._finished.set()
            renewing.join()
            bar.close()
        if errors:
            raise errors[0]
        return self._report

    def _start(self, work_off: Callable[[], None], errors: list[BaseException]) -> None:
        """Start a thread; `_wait` waits for all of them.

        Each counts itself: where its start is interrupted nobody else can tell whether it runs.
        """
        known = threading.Event()

        def run() -> None:
            goes_on = self._begin_one()
            known.set()
            if not goes_on:
                return
            try:
                work_off()
            except BaseException as error:  # noqa: BLE001  (raised again in the caller's thread)
                errors.append(error)
                self._stop.set()
            finally:
                self._end_one()

        threading.Thread(target=run, name="periscope-replay", daemon=True).start()
        known.wait()

    def _begin_one(self) -> bool:
        """Count a thread that begins; False if it is to do nothing, since all was stopped."""
        with self._lock:
            if self._stop.is_set():
                return False
            self._working += 1
            self._idle.clear()
        return True

    def _end_one(self) -> None:
        with self._lock:
            self._working -= 1
            if not self._working:
                self._idle.set()

    def _wait(self) -> None:
        """Wait until no thread works any more.

        They are not joined: before Python 3.13 a join that is interrupted takes the thread for one
        that has ended.
        """
        while self._is_working():
            self._idle.wait(0.2)  # now and then, to be interrupted

    def _is_working(self) -> bool:
        with self._lock:  # what begins at this moment has counted itself, or has been stopped
            return self._working > 0

    def _work_off(self, work: _Work, loop: asyncio.AbstractEventLoop, bar: Any) -> None:
        while (letter := work.next()) is not None:
            began = time.perf_counter()
            replayed = self._one(letter, loop)
            if replayed is not None:
                self._tell(replayed)
                with self._drawing:
                    bar.loaded(time.perf_counter() - began)

    # Which letters.

    def _letters(self) -> Iterator[Letter]:
        """Give all letters that are meant, in the order in which they came.

        Those that come meanwhile are for the next replay: a handler that leaves a letter each time
        would have it go on for ever.
        """
        cursor = None
        where = self._where
        began = letter_ids.new()
        newest = [one.id for one in self._store.list(where, limit=1, newest_first=True).letters]
        while True:
            page = self._store.list(where, cursor=cursor, limit=_PAGE)
            for letter in page.letters:
                if letter.id > began and letter.host == host_name():
                    return
                yield letter
                if letter.id in newest:
                    return
            cursor = page.cursor
            if cursor is None or self._stop.is_set():
                return

    def _reclaim(self) -> None:
        """Have leases that ran out end: their letters would not be found otherwise."""
        nothing = Filter(queue=self._where.queue, ids=("",))
        self._store.claim(self._owner, self._lease, 1, nothing)

    def _wanted(self, limit: int | None) -> Iterator[Letter]:
        tried = 0
        for letter in self._letters():
            if limit is not None and tried >= limit:
                return
            why = self._why_not(letter)
            if why is None:
                tried += 1
                yield letter
            else:
                self._tell(Replayed(letter, "left", why))

    def _why_not(self, letter: Letter) -> str | None:
        """Return why a letter is not tried now; None if it is."""
        if not letter.replayable:
            return "not replayable"
        if handler_of(letter.operation, item=is_item(letter)) is None:
            return f"no operation {letter.operation} is registered"
        if letter.not_before > time.time() and self._where.ids is None:
            return "not yet"
        if letter.state not in ("dead", "queued"):
            return f"is {letter.state}"
        return None

    # One letter.

    def _one(self, letter: Letter, loop: asyncio.AbstractEventLoop) -> Replayed | None:
        only = Filter(queue=letter.queue, states=("dead", "queued"), ids=(letter.id,))
        claims = self._store.claim(self._owner, self._lease, 1, only)
        if not claims:
            return None  # somebody else has it by now
        claim = claims[0]
        with self._lock:
            self._held[letter.id] = claim
        try:
            return self._claimed(claim, loop)
        finally:
            with self._lock:
                self._held.pop(letter.id, None)

    def _claimed(self, claim: Claim, loop: asyncio.AbstractEventLoop) -> Replayed:
        letter = claim.letter
        try:
            handler, args, kwargs = prepared(letter, self._bodies)
        except DeadLetterError as error:
            self._settled(letter.id, self._store.release)
            return Replayed(letter, "left", str(error), _REASONS.get(type(error), "unfit"))
        replaying = Replaying(
            letter.id, letter.operation, letter.feed, letter.key, payload_identity(letter)
        )
        with span_of(letter) as span:
            outcome, cause = tried(handler, args, kwargs, replaying, loop)
            if outcome in ("rejected", "cancelled"):
                return self._given_back(letter, outcome, cause)
            replayed = self._ended(letter, cause)
            span.set_attribute(names.DEAD_LETTER_OUTCOME, replayed.outcome)
            if cause is not None:
                span.set_status(Status(StatusCode.ERROR, f"{cause.error_type}: {cause.message}"))
        return replayed

    def _given_back(self, letter: Letter, outcome: str, cause: Cause | None) -> Replayed:
        """Stop early: what the letter is for does not want to be called now."""
        self._settled(letter.id, self._store.release)
        why = outcome if cause is None else f"{outcome}: {cause.message}"
        self._report.stopped = self._report.stopped or f"{letter.operation} was {why}"
        self._stop.set()
        return Replayed(letter, "left", outcome)

    def _ended(self, letter: Letter, cause: Cause | None) -> Replayed:
        """Settle a claim; after a failure the letter has the new error."""
        if cause is None:
            held = self._settled(letter.id, self._store.settle, lambda now: now is None)
            return Replayed(letter, "succeeded" if held else "lost_claim")
        failed = letter.changed(attempts=letter.attempts + 1, **fields_of(cause, time.time()))
        detail = f"{cause.error_type}: {cause.message}"
        held = self._settled(
            letter.id,
            lambda claim: self._store.settle(claim, failed),
            lambda now: now is not None and now.last_failed_at == failed.last_failed_at,
        )
        if not held:
            return Replayed(letter, "lost_claim", detail)
        parked = letter.replays + 1 >= MOST_REPLAYS
        return Replayed(letter, "parked" if parked else "failed", detail)

    def _settled(
        self,
        letter_id: str,
        settle: Callable[[Claim], bool],
        is_done: Callable[[Letter | None], bool] = lambda _: False,
    ) -> bool:
        """End a claim, also if the store is away for a moment.

        Args:
            letter_id: Whose.
            settle: Tells the store.
            is_done: Whether a letter, as the store has it now, is as `settle` leaves it: a store
                may have done what it could not answer.

        Returns:
            Whether the claim still held.
        """
        asked_before = False
        for wait in (*_SETTLE_AGAIN, None):
            with self._lock:
                claim = self._held[letter_id]
            letter = claim.letter
            try:
                return settle(claim) or (
                    asked_before and is_done(self._store.get(letter_id, letter.queue))
                )
            except StoreError as error:
                asked_before = True
                guard.warn("replay", "a replay's end could not be told to the store: %s", error)
                if wait is None or time.time() + wait > claim.until:
                    return False
                time.sleep(wait)
        return False

    def _renew(self) -> None:
        """Hold the claims of running handlers, as long as they run."""
        while not self._finished.wait(self._lease / 3):
            for claim in self._claims():
                with guard.contained("replay lease"), suppress(StoreError):
                    renewed = self._store.renew(claim, self._lease)
                    with self._lock:
                        if renewed is not None and claim.letter.id in self._held:
                            self._held[claim.letter.id] = renewed

    def _claims(self) -> list[Claim]:
        with self._lock:
            return list(self._held.values())

    def _tell(self, replayed: Replayed) -> None:
        with self._lock:
            self._report.add(replayed)
        if replayed.outcome != "left":
            letter_counts.replayed(replayed.letter.queue, replayed.outcome)
        if self._on_replayed is not None:
            self._on_replayed(replayed)


class _Work:
    """Hands letters to the threads, no faster than they are wanted.

    Args:
        letters: All there are.
        rate: Letters a second at most.
        stop: Set when no more are to be handed out.
    """

    def __init__(
        self, letters: Iterator[Letter], rate: float | None, stop: threading.Event
    ) -> None:
        self._letters = letters
        self._pause = 0.0 if rate is None else 1.0 / rate
        self._stop = stop
        self._lock = threading.Lock()
        self._next_at = time.monotonic()

    def next(self) -> Letter | None:
        """Return the next letter, when it is its turn; None when there is none left."""
        with self._lock:
            if self._stop.is_set():
                return None
            letter = next(self._letters, None)
            if letter is None:
                return None
            now = time.monotonic()
            due = max(now, self._next_at)
            self._next_at = due + self._pause
        return None if self._stop.wait(due - now) else letter


def _folder_of(store: Store) -> Path:
    """Return where the payloads are that were too large for a store."""
    database = getattr(store, "database", None)
    base = in_use.options.folder if database is None else database.path.parent
    return Path(base) / FOLDER
