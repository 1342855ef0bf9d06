"""What every store of dead letters can do, and how one is opened.

A store keeps letters under their ids until somebody removes them: nothing is trimmed. Each change
of a letter raises its revision, and a change that expects another revision is refused, so that two
who work on the same letter cannot both win.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import re
import uuid
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote

from periscope_otel import guard
from periscope_otel.dead_letter.errors import DamagedLetterError, RefusedError, StoreError
from periscope_otel.dead_letter.names import queue_name
from periscope_otel.redaction import clean_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType
    from typing import Self

    from periscope_otel.dead_letter.letter import Letter, State

Row = TypeVar("Row")
"""A letter as a store has it."""

_QUEUE_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")

MOST_REPLAYS = 5
"""Failed replays after which a letter is parked."""

MOST_LEASES = 3
"""Leases that ran out, after which a letter is parked: whoever replays it dies of it."""

REMEMBERED = 3600.0
"""Seconds for which a removed letter is known by its id."""

PAGE = 100
"""Letters of a page, unless asked for another number."""

LONGEST_PAGE = 1000

Put = Literal["stored", "merged", "known"]
"""What became of a letter that was put: it is new; one with the same idempotency key and payload is
there already and has taken its failure in; or it has been there before, by its id."""


@dataclass(frozen=True)
class Filter:
    """Which letters are meant; what is None does not matter, and "" means those that have none.

    Example:
        >>> Filter(feed="urlhaus", error_type="ConnectTimeout", states=("dead",))
        Filter(...)
    """

    queue: str = "default"
    states: tuple[State, ...] = ("dead",)
    ids: tuple[str, ...] | None = None
    feed: str | None = None
    operation: str | None = None
    fingerprint: str | None = None
    error_type: str | None = None
    since: float | None = None
    """Failed last at this Unix time or later."""
    until: float | None = None
    """Failed last before this Unix time."""


class Page(NamedTuple):
    """Some letters of a list, and where the next ones are."""

    letters: list[Letter]
    cursor: str | None
    """For the next page; None behind the last."""


@dataclass(frozen=True)
class Stats:
    """How many letters there are; from counts that are kept, whatever the number."""

    by_state: dict[State, int] = field(default_factory=dict)
    by_feed: dict[str, int] = field(default_factory=dict)
    """Without those that have none."""
    by_fingerprint: dict[str, int] = field(default_factory=dict)
    """The most frequent ones."""
    oldest: float | None = None
    """When the dead letter failed last that did so longest ago; Unix time."""
    size: int = 0
    """Bytes of all letters."""

    @property
    def total(self) -> int:
        """All letters, whatever their state."""
        return sum(self.by_state.values())


class Claim(NamedTuple):
    """A letter that is somebody's to replay until the lease runs out."""

    letter: Letter
    owner: str
    until: float
    """Unix time of the store's clock."""


class Store(Protocol):
    """Keeps letters. Every method raises StoreError where the store cannot be used.

    One that is well, but does not take what it is given, raises a RefusedError, which is one, too.
    """

    url: str
    """Where it is, without secrets."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        """Close it."""
        ...

    def put(self, letters: Sequence[Letter], *, revive: bool = False) -> list[Put]:
        """Store letters, all or none; putting one twice stores it once.

        A letter with the payload of one that is there (see `payload_identity`) is taken in by it:
        its attempts are added, and its error is the letter's unless that failed later. One whose
        twin is claimed is stored; the twin takes it in when its claim ends without success.

        Args:
            letters: Of any queues.
            revive: Store also those that were removed a moment ago, as an import does.

        Returns:
            What became of each.
        """
        ...

    def get(self, letter_id: str, queue: str = "default") -> Letter | None:
        """Return a letter by its id; None if there is none."""
        ...

    def missing(self, ids: Sequence[str], queue: str = "default") -> Sequence[str]:
        """Return those ids of which the store knows nothing: neither there nor removed lately."""
        ...

    def list(
        self,
        where: Filter,
        *,
        cursor: str | None = None,
        limit: int = PAGE,
        newest_first: bool = False,
    ) -> Page:
        """Return a page of letters in the order in which they came.

        Args:
            where: Which.
            cursor: Of the page before; None for the first.
            limit: Letters of a page; at most 1,000.
            newest_first: The other way round.
        """
        ...

    def stats(self, queue: str = "default") -> Stats:
        """Return how many letters there are."""
        ...

    def requeue(self, where: Filter, limit: int | None = None) -> int:
        """Queue dead letters for the next replayer, whatever states are asked for.

        Args:
            where: Which.
            limit: How many at most; all by default.

        Returns:
            How many were queued.
        """
        ...

    def claim(
        self, owner: str, lease: float, limit: int = 1, where: Filter | None = None
    ) -> Sequence[Claim]:
        """Take letters to replay, in the order in which they came, whenever they were queued.

        A letter whose lease has run out, or that is released, is again what it was before: dead
        or queued. One whose `not_before` is still to come is left, unless it is asked for by id.

        Args:
            owner: Who takes them; one text for each replayer.
            lease: Seconds after which another may take them.
            limit: How many at most.
            where: Which, of those that are dead or queued; by default all that are queued.
        """
        ...

    def renew(self, claim: Claim, lease: float) -> Claim | None:
        """Hold a claim for longer; None if it is somebody else's by now."""
        ...

    def settle(self, claim: Claim, failed: Letter | None = None) -> bool:
        """End a claim.

        Args:
            claim: What was claimed.
            failed: The letter with its new error and its attempts so far if the replay failed: it
                is dead again, or parked after five. None if it succeeded: the letter is removed,
                and does not come back.

        Returns:
            Whether the claim still held; if not, nothing was changed.
        """
        ...

    def release(self, claim: Claim) -> bool:
        """Give a letter back that was not tried; returns whether the claim still held."""
        ...

    def park(self, where: Filter) -> int:
        """Take letters out of every replay until they are unparked; returns how many."""
        ...

    def unpark(self, where: Filter) -> int:
        """Make parked letters dead again, with no failed replays, whatever states are asked for.

        Returns:
            How many.
        """
        ...

    def purge(self, where: Filter, *, dry_run: bool = True) -> int:
        """Remove letters for good; by default only count those that would be.

        Returns:
            How many.
        """
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


def open_store(url: str, **options: Any) -> Store:
    """Open a store of dead letters.

    Args:
        url: `sqlite:///relative.db` or `sqlite:////absolute.db`; `redis://`, `rediss://` or
            `unix://` as redis-py takes them.
        options: Of the kind of store; see there.

    Raises:
        StoreError: If the URL is of no such kind, or the store cannot be opened.

    Example:
        >>> with open_store("sqlite:///dead-letters.db") as store:
        ...     store.stats().total
        0
    """
    scheme, separator, _ = url.partition("://")
    scheme = scheme.lower() if separator else ""
    if scheme == "sqlite":
        from periscope_otel.dead_letter.sqlite_store import SQLiteStore

        path = unquote(url.removeprefix("sqlite:///"))
        if not url.startswith("sqlite:///") or not path:
            raise StoreError("a SQLite store is sqlite:///file.db or sqlite:////absolute/file.db")
        return SQLiteStore(path, **options)
    if scheme in ("redis", "rediss", "unix"):
        from periscope_otel.dead_letter.redis_store import RedisStore

        return RedisStore(url, **options)
    known = "sqlite, redis, rediss, unix"
    raise StoreError(f"a store's URL begins with one of {known}, not {clean_name(scheme, 40)!r}")


class AsyncStore:
    """A store for coroutines: the same methods, run in threads, to be awaited.

    Example:
        >>> stats = await AsyncStore(open_store("sqlite:///dead-letters.db")).stats()
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def url(self) -> str:
        """Where it is, without secrets."""
        return self.store.url

    async def put(self, letters: Sequence[Letter], *, revive: bool = False) -> list[Put]:
        """Store letters; see `Store`."""
        return await asyncio.to_thread(self.store.put, letters, revive=revive)

    async def get(self, letter_id: str, queue: str = "default") -> Letter | None:
        """Return a letter by its id; see `Store`."""
        return await asyncio.to_thread(self.store.get, letter_id, queue)

    async def missing(self, ids: Sequence[str], queue: str = "default") -> Sequence[str]:
        """Return those ids of which nothing is known; see `Store`."""
        return await asyncio.to_thread(self.store.missing, ids, queue)

    async def list(
        self,
        where: Filter,
        *,
        cursor: str | None = None,
        limit: int = PAGE,
        newest_first: bool = False,
    ) -> Page:
        """Return a page of letters; see `Store`."""
        return await asyncio.to_thread(
            self.store.list, where, cursor=cursor, limit=limit, newest_first=newest_first
        )

    async def stats(self, queue: str = "default") -> Stats:
        """Return how many letters there are; see `Store`."""
        return await asyncio.to_thread(self.store.stats, queue)

    async def requeue(self, where: Filter, limit: int | None = None) -> int:
        """Queue dead letters for the next replayer; see `Store`."""
        return await asyncio.to_thread(self.store.requeue, where, limit)

    async def claim(
        self, owner: str, lease: float, limit: int = 1, where: Filter | None = None
    ) -> Sequence[Claim]:
        """Take letters to replay; see `Store`. Where it is cancelled, they are given back."""
        claiming = asyncio.ensure_future(
            asyncio.to_thread(self.store.claim, owner, lease, limit, where)
        )
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # Shielded, too: a thread cannot be cancelled, and what it claims has to come back.
            await asyncio.shield(self._give_back(claiming))
            raise

    async def _give_back(self, claiming: asyncio.Future[Sequence[Claim]]) -> None:
        with contextlib.suppress(StoreError):
            for claim in await claiming:
                await asyncio.to_thread(self.store.release, claim)

    async def renew(self, claim: Claim, lease: float) -> Claim | None:
        """Hold a claim for longer; see `Store`."""
        return await asyncio.to_thread(self.store.renew, claim, lease)

    async def settle(self, claim: Claim, failed: Letter | None = None) -> bool:
        """End a claim; see `Store`."""
        return await asyncio.to_thread(self.store.settle, claim, failed)

    async def release(self, claim: Claim) -> bool:
        """Give a letter back that was not tried; see `Store`."""
        return await asyncio.to_thread(self.store.release, claim)

    async def park(self, where: Filter) -> int:
        """Take letters out of every replay; see `Store`."""
        return await asyncio.to_thread(self.store.park, where)

    async def unpark(self, where: Filter) -> int:
        """Make parked letters dead again; see `Store`."""
        return await asyncio.to_thread(self.store.unpark, where)

    async def purge(self, where: Filter, *, dry_run: bool = True) -> int:
        """Remove letters for good; see `Store`."""
        return await asyncio.to_thread(self.store.purge, where, dry_run=dry_run)

    async def close(self) -> None:
        """Let go of files and connections."""
        await asyncio.to_thread(self.store.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def readable(rows: Iterable[Row], read: Callable[[Row], Letter]) -> list[Letter]:
    """Return the letters that can be read; a damaged one is told of and hides no other."""
    letters: list[Letter] = []
    for row in rows:
        try:
            letters.append(read(row))
        except DamagedLetterError as error:
            guard.warn("damaged letter", "a dead letter cannot be read and is left out: %s", error)
    return letters


def in_state(where: Filter, state: State) -> Filter:
    """Return a filter for one state, whichever it asks for; one that asks for none stays so."""
    return replace(where, states=(state,)) if where.states else where


def among(where: Filter, states: tuple[State, ...]) -> Filter:
    """Return a filter for only those of its states that are in `states`."""
    return replace(where, states=tuple(state for state in where.states if state in states))


def payload_identity(letter: Letter) -> str:
    """Return what two letters share that hold the same payload, under the same idempotency key.

    They have to be for the same operation: a letter for another one is needed for its own replay.
    They have to have the same marking, too: TLP:RED must not hide in a letter that is TLP:CLEAR.
    """
    marked = (letter.key, letter.operation, letter.codec, letter.tlp)
    about = repr(marked).encode(errors="replace")
    return hashlib.sha256(about + letter.sha256).hexdigest()[:32]


def checked_queue(text: str) -> str:
    """Return a queue's name, for stores.

    Raises:
        RefusedError: If it may not be one.
    """
    try:
        return queue_name(text)
    except ValueError as error:
        raise RefusedError(str(error)) from None


def finite(seconds: float) -> float:
    """Return a Unix time that stores can sort by; 0 for one that is none."""
    return seconds if math.isfinite(seconds) else 0.0


def resting_state(state: State) -> State:
    """Return the state in which a letter is put: one on its way, or that somebody had, is dead."""
    return state if state in ("queued", "parked") else "dead"


def new_owner() -> str:
    """Return a name for a replayer that no other has."""
    return uuid.uuid4().hex


def copy(letters: Iterable[Letter], store: Store, batch: int = 64, *, revive: bool = False) -> int:
    """Put letters into a store, some at a time.

    Args:
        letters: Which.
        store: Where to.
        batch: Letters of one put.
        revive: Store also those that were removed a moment ago.

    Returns:
        How many were new.
    """
    stored, waiting = 0, []
    for letter in letters:
        waiting.append(letter)
        if len(waiting) == batch:
            stored += store.put(waiting, revive=revive).count("stored")
            waiting = []
    return stored + (store.put(waiting, revive=revive).count("stored") if waiting else 0)
