"""Letters in Redis or Valkey: one store for the processes of many machines.

Every change is one Lua script (in `lua/`), so nothing comes in between; time is the server's. All
keys of a queue share a hash tag and so a cluster's node. Nothing is trimmed, and nothing is found
by scanning keys. No script looks at or moves more than so many letters and bytes, so that others
get their turn. Works on Redis 7.0 and newer and on Valkey.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from importlib.resources import files
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from periscope_otel.dead_letter.errors import RefusedError, StoreError, StoreFullError
from periscope_otel.dead_letter.letter import Letter
from periscope_otel.dead_letter.redis_advice import advice_on
from periscope_otel.dead_letter.store import (
    LONGEST_PAGE,
    PAGE,
    Claim,
    Filter,
    Page,
    Put,
    Stats,
    among,
    checked_queue,
    finite,
    in_state,
    payload_identity,
    readable,
    resting_state,
)
from periscope_otel.redaction import clean_name
from periscope_otel.redis_link import RedisLink, errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    from periscope_otel.dead_letter.letter import State

_SCRIPTS: Final = ("put", "list", "get", "missing", "change", "claim", "settle")
_LOOKED_AT: Final = 500
"""Letters that one script looks at, so that others get their turn."""
_CHANGED: Final = 100
"""Letters that one script changes."""
_MOST_BYTES: Final = 1 << 20
"""Bytes of the letters that one script returns, unless a single one is larger."""
_UNWELL: Final = frozenset(
    [
        *("BUSY", "UNKILLABLE", "LOADING", "READONLY", "OOM", "MISCONF", "NOREPLICAS", "FAILOVER"),
        *("MASTERDOWN", "CLUSTERDOWN", "CROSSSLOT", "TRYAGAIN", "MOVED", "ASK", "NOSCRIPT"),
        *("NOAUTH", "WRONGPASS", "NOPERM", "DENIED", "EXECABORT"),
    ]
)
"""First words of answers that say nothing about what was asked, and all about the server."""
_MOST_FACETS: Final = 1000

_pack: Final = msgspec.msgpack.Encoder().encode
_unpack: Final = msgspec.msgpack.Decoder().decode


class _Changing(NamedTuple):
    """What changes in the life of a letter; FIELDS in `common.lua`."""

    state: State
    revision: int
    attempts: int
    replays: int
    leases: int
    owner: str
    lease_end: float
    seq: int
    size: int
    failed_at: float
    not_before: float
    feed: str
    operation: str
    error_type: str
    fingerprint: str
    same: str
    before: str


class RedisStore:
    """Letters in a Redis.

    Args:
        url: As redis-py takes it.
        prefix: What all keys begin with.
        timeout: Seconds for a connection, and for an answer.

    Raises:
        StoreError: If the URL cannot be used. Nothing is connected to before the first call.
    """

    def __init__(self, url: str, *, prefix: str = "periscope", timeout: float = 5.0) -> None:
        try:
            self._link = RedisLink(url, timeout)
        except ValueError as error:
            why = "a password needs its special characters as %XX"
            raise StoreError(f"no Redis has such a URL ({type(error).__name__}; {why})") from None
        self.url = self._link.shown
        self._prefix = prefix
        common = _source("common")
        self._scripts = {
            name: self._link.client.register_script(common + _source(name)) for name in _SCRIPTS
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, letters: Sequence[Letter], *, revive: bool = False) -> list[Put]:
        """Store letters, those of a queue in one script; see `Store`."""
        for letter in letters:
            checked_queue(letter.queue)
        answers: dict[int, Put] = {}
        for queue in dict.fromkeys(letter.queue for letter in letters):
            own = [place for place, letter in enumerate(letters) if letter.queue == queue]
            given = chain.from_iterable(_as_arguments(letters[place]) for place in own)
            found = self._run("put", queue, int(revive), *given)
            answers |= {place: one.decode() for place, one in zip(own, found, strict=True)}
        return [answers[place] for place in range(len(letters))]

    def get(self, letter_id: str, queue: str = "default") -> Letter | None:
        """Return a letter by its id; see `Store`."""
        found = self._run("get", queue, 1, letter_id)
        return _letter(found[0]) if found else None

    def missing(self, ids: Sequence[str], queue: str = "default") -> Sequence[str]:
        """Return those ids of which nothing is known; see `Store`."""
        missing: list[str] = []
        checked_queue(queue)
        for start in range(0, len(ids), _LOOKED_AT):
            found = self._run("missing", queue, *ids[start : start + _LOOKED_AT])
            missing += [one.decode() for one in found]
        return missing

    def list(
        self,
        where: Filter,
        *,
        cursor: str | None = None,
        limit: int = PAGE,
        newest_first: bool = False,
    ) -> Page:
        """Return a page of letters; see `Store`."""
        limit = max(1, min(limit, LONGEST_PAGE))
        checked_queue(where.queue)
        if not where.states:
            return Page([], None)
        if where.ids is not None:
            return self._list_of_ids(where, cursor, limit, newest_first=newest_first)
        found: list[Letter] = []
        after = "" if cursor is None else str(_sequence(cursor))
        while True:
            wanted = limit - len(found)
            rows, after = self._look(where, after, wanted, newest_first=newest_first)
            found += readable(rows, _letter)
            if not after or len(found) == limit:
                return Page(found, after or None)

    def _look(
        self,
        where: Filter,
        after: str,
        wanted: int,
        *,
        newest_first: bool = False,
        only_ids: bool = False,
    ) -> tuple[Sequence[Any], str]:
        """Return some letters or ids, and behind which to go on; nothing behind the last."""
        rows, last = self._run(
            "list", where.queue, int(newest_first), after, wanted, _LOOKED_AT, _MOST_BYTES,
            int(only_ids), _pack(_wanted(where)),
        )  # fmt: skip
        return rows, last.decode()

    def _list_of_ids(
        self, where: Filter, cursor: str | None, limit: int, *, newest_first: bool
    ) -> Page:
        found = self._matching(where, newest_first=newest_first)
        if cursor is not None:
            last = _sequence(cursor)
            found = [(letter_id, x) for letter_id, x in found
                     if (x.seq < last if newest_first else x.seq > last)]  # fmt: skip
        page = found[:limit]
        letters: list[Letter] = []
        for ids in _in_batches(page):
            letters += readable(self._run("get", where.queue, 1, *ids), _letter)
        return Page(letters, str(page[-1][1].seq) if len(found) > limit else None)

    def _matching(
        self, where: Filter, *, newest_first: bool = False
    ) -> Sequence[tuple[str, _Changing]]:
        """Return the ids that a filter names of letters that it means, and what changes of them."""
        ids = list(dict.fromkeys(where.ids or ()))
        found: list[tuple[str, _Changing]] = []
        for start in range(0, len(ids), _LOOKED_AT):
            rows = self._run("get", where.queue, 0, *ids[start : start + _LOOKED_AT])
            found += [(row[0].decode(), _changing(row[2])) for row in rows]
        meant = [one for one in found if _matches(one[1], where)]
        return sorted(meant, key=lambda one: one[1].seq, reverse=newest_first)

    def stats(self, queue: str = "default") -> Stats:
        """Return how many letters there are; see `Store`."""
        with self._talking() as client:
            pipeline = client.pipeline(transaction=False)
            pipeline.hgetall(self._key(queue, "totals"))
            pipeline.hgetall(self._key(queue, "feeds"))
            pipeline.zrevrange(self._key(queue, "causes"), 0, _MOST_FACETS - 1, withscores=True)
            pipeline.zrange(self._key(queue, "age"), 0, 0, withscores=True)
            totals, feeds, causes, oldest = pipeline.execute()
        size = int(totals.pop(b"size", 0))
        states: dict[State, int] = {name.decode(): int(n) for name, n in totals.items()}
        by_feed = {name.decode(): int(n) for name, n in feeds.items()}
        by_cause = {name.decode(): int(n) for name, n in causes if name}
        return Stats(states, _most(by_feed), by_cause, oldest[0][1] if oldest else None, size)

    def requeue(self, where: Filter, limit: int | None = None) -> int:
        """Queue letters for the next replayer; see `Store`."""
        return self._change("queued", in_state(where, "dead"), limit)

    def park(self, where: Filter) -> int:
        """Take letters out of every replay; see `Store`."""
        return self._change("parked", among(where, ("dead", "queued")))

    def unpark(self, where: Filter) -> int:
        """Make parked letters dead again; see `Store`."""
        return self._change("dead", in_state(where, "parked"))

    def purge(self, where: Filter, *, dry_run: bool = True) -> int:
        """Remove letters for good; see `Store`."""
        if not dry_run:
            return self._change("gone", where)
        return sum(map(len, self._pages(where)))

    def claim(
        self, owner: str, lease: float, limit: int = 1, where: Filter | None = None
    ) -> Sequence[Claim]:
        """Take letters to replay; see `Store`."""
        where = where or Filter(states=("queued",))
        if limit < 1:
            checked_queue(where.queue)
            return []
        if where == Filter(queue=where.queue, states=("queued",)):
            return self._claim(where.queue, owner, lease, limit, None)
        self._claim(where.queue, owner, lease, 0, None)  # what others have held for too long
        claims: list[Claim] = []
        for ids in self._pages(among(where, ("dead", "queued"))):
            due = where.ids is None
            claims += self._claim(where.queue, owner, lease, limit - len(claims), ids, due=due)
            if len(claims) == limit:
                break
        return claims

    def _claim(
        self,
        queue: str,
        owner: str,
        lease: float,
        limit: int,
        ids: Sequence[str] | None,
        *,
        due: bool = True,
    ) -> Sequence[Claim]:
        """Claim the next letters, or those of some ids; as many calls as their size takes."""
        claims: list[Claim] = []
        while True:
            wanted = min(_CHANGED, limit - len(claims))
            until, rows = self._run(
                "claim", queue, owner, lease, wanted, _MOST_BYTES, int(due), *(ids or ())
            )
            for row in rows:
                claims += self._readable(queue, owner, row, float(until))
            # Letters that are claimed, or have been changed meanwhile, are not claimed again.
            if not rows or len(claims) >= limit:
                return claims

    def _readable(
        self, queue: str, owner: str, row: Sequence[Any], until: float
    ) -> Sequence[Claim]:
        """Return a claim of a letter; a damaged one no replay can end, so it is parked."""
        letters = readable([row], _letter)
        if not letters:
            revision = _changing(row[2]).revision
            self._run("settle", queue, row[0], owner, revision, "damaged")
        return [Claim(letter, owner, until) for letter in letters]

    def renew(self, claim: Claim, lease: float) -> Claim | None:
        """Hold a claim for longer; see `Store`."""
        until = self._settle(claim, "renewed", lease)
        return claim._replace(until=float(until)) if until else None

    def settle(self, claim: Claim, failed: Letter | None = None) -> bool:
        """End a claim; see `Store`."""
        if failed is None:
            return bool(self._settle(claim, "done"))
        return bool(
            self._settle(
                claim, "failed", failed.latest(), failed.error_type or "", failed.fingerprint,
                repr(finite(failed.last_failed_at)), repr(finite(failed.not_before)),
                max(0, failed.attempts - claim.letter.attempts),
            )
        )  # fmt: skip

    def release(self, claim: Claim) -> bool:
        """Give a letter back that was not tried; see `Store`."""
        return bool(self._settle(claim, "released"))

    def advice(self) -> Sequence[str]:
        """Return what should be set otherwise in this Redis so that it keeps letters.

        Where it does not let its configuration be read, what it tells of itself is gone by.

        Returns:
            A sentence for each thing, with its remedy; nothing where all is well.

        Raises:
            StoreError: If it cannot be asked.
        """
        from redis.exceptions import ResponseError

        told: dict[Any, Any] = {}
        with self._talking() as client:
            for section in ("memory", "persistence"):
                with suppress(ResponseError):  # such as for a user who may not ask
                    told |= client.info(section)
            with suppress(ResponseError):
                told |= client.config_get("save")
        return [f"{one}." for one in advice_on(told)]

    def close(self) -> None:
        """Close the connections."""
        self._link.close()

    def _settle(self, claim: Claim, verb: str, *values: Any) -> Any:
        letter = claim.letter
        return self._run(
            "settle", letter.queue, letter.id, claim.owner, letter.revision, verb, *values
        )

    def _change(self, target: str, where: Filter, limit: int | None = None) -> int:
        """Change letters, some at a time; returns how many."""
        changed = 0
        for ids in self._pages(where):
            wanted = ids if limit is None else ids[: limit - changed]
            changed += self._run("change", where.queue, target, _pack(where.states), *wanted)
            if limit is not None and changed >= limit:
                break
        return changed

    def _pages(self, where: Filter) -> Iterator[Sequence[str]]:
        """Give the ids of the letters that a filter means, in pages; they may change meanwhile."""
        checked_queue(where.queue)
        if not where.states:
            return
        if where.ids is not None:
            ids = [letter_id for letter_id, _ in self._matching(where)]
            for start in range(0, len(ids), _CHANGED):
                yield ids[start : start + _CHANGED]
            return
        after = ""
        while True:
            rows, after = self._look(where, after, _CHANGED, only_ids=True)
            if rows:
                yield [one.decode() for one in rows]
            if not after:
                return

    def _run(self, name: str, queue: str, *arguments: Any) -> Any:
        with self._talking():
            return self._scripts[name](keys=[self._key(queue, "")], args=arguments)

    def _key(self, queue: str, name: str) -> str:
        return f"{self._prefix}:{{{checked_queue(queue)}}}:{name}"

    @contextmanager
    def _talking(self) -> Iterator[Any]:
        try:
            with self._link.quiet() as client:
                yield client
        except errors() as error:
            kind = _kind_of(error)
            raise kind(f"{self.url}: {type(error).__name__}: {error}") from error


def _kind_of(error: BaseException) -> type[StoreError]:
    """Return what an error of redis-py means: no memory, an unwell store, or a refused letter."""
    name = type(error).__name__
    if name == "OutOfMemoryError":
        return StoreFullError
    text = str(error)
    about_this = name == "DataError" or (
        name == "ResponseError" and text.split(" ", 1)[0] not in _UNWELL
        and not text.startswith(("unknown command", "max number of clients"))
    )  # fmt: skip
    return RefusedError if about_this else StoreError


def _source(name: str) -> str:
    return (files("periscope_otel.dead_letter") / "lua" / f"{name}.lua").read_text()


def _as_arguments(letter: Letter) -> tuple[Any, ...]:
    """Return a letter as `put.lua` takes it."""
    return (
        letter.id,
        letter.encode(),
        payload_identity(letter),
        letter.feed or "",
        letter.operation,
        letter.error_type or "",
        letter.fingerprint,
        repr(finite(letter.last_failed_at)),
        repr(finite(letter.not_before)),
        letter.attempts,
        letter.latest(),
        resting_state(letter.state),
        letter.replays,
    )


def _letter(row: Sequence[bytes]) -> Letter:
    _id, blob, changing, latest = row
    letter = Letter.decode(blob)
    if latest is not None:
        letter = letter.with_latest(latest)
    x = _changing(changing)
    return letter.changed(
        state=x.state,
        revision=x.revision,
        attempts=x.attempts,
        replays=x.replays,
    )


def _changing(packed: bytes) -> _Changing:
    values = _unpack(packed)
    return _Changing(*values[: len(_Changing._fields)])  # a newer version may have added some


def _in_batches(found: Sequence[tuple[str, _Changing]]) -> Iterator[list[str]]:
    """Give ids of letters, as many at a time as a script returns."""
    batch: list[str] = []
    size = 0
    for letter_id, x in found:
        size += x.size
        if batch and (size > _MOST_BYTES or len(batch) == _CHANGED):
            yield batch
            batch, size = [], x.size
        batch.append(letter_id)
    if batch:
        yield batch


def _matches(x: _Changing, where: Filter) -> bool:
    wanted = _wanted(where)
    since, until = wanted.pop("since", None), wanted.pop("until", None)
    return (
        x.state in wanted.pop("states")
        and all(getattr(x, name) == value for name, value in wanted.items())
        and (since is None or x.failed_at >= since)
        and (until is None or x.failed_at < until)
    )


def _wanted(where: Filter) -> dict[str, Any]:
    facets = {
        name: getattr(where, name)
        for name in ("feed", "operation", "fingerprint", "error_type", "since", "until")
    }
    wanted = {name: value for name, value in facets.items() if value is not None}
    return {"states": where.states, **wanted}


def _most(counts: dict[Any, int]) -> dict[Any, int]:
    return dict(sorted(counts.items(), key=lambda pair: -pair[1])[:_MOST_FACETS])


def _sequence(cursor: str) -> int:
    try:
        return int(cursor)
    except ValueError:
        raise StoreError(f"{clean_name(cursor, 40)!r} is no cursor of this store") from None
