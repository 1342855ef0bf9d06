"""Letters in Redis or Valkey: one store for the processes of many machines.

Every change is one Lua script (in `lua/`), so it happens as a whole or not at all; time is the
server's. All keys of a queue share a hash tag and so a cluster's node. Nothing is trimmed, and
nothing is found by scanning keys. Works on Redis 7.0 and newer and on Valkey.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from importlib.resources import files
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from periscope_otel.dead_letter.errors import RefusedError, StoreError, StoreFullError
from periscope_otel.dead_letter.letter import Letter
from periscope_otel.dead_letter.store import (
    LONGEST_PAGE,
    PAGE,
    Claim,
    Filter,
    Page,
    Put,
    Stats,
    among,
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
    more_attempts: int
    replays: int
    leases: int
    owner: str
    until: float
    seq: int
    size: int
    failed_at: float
    feed: str
    operation: str
    error_type: str
    fingerprint: str
    same: str
    stream_id: str
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

    def put(self, letters: Sequence[Letter]) -> list[Put]:
        """Store letters, those of a queue all or none; see `Store`."""
        answers: dict[int, Put] = {}
        for queue in dict.fromkeys(letter.queue for letter in letters):
            own = [place for place, letter in enumerate(letters) if letter.queue == queue]
            given = chain.from_iterable(_as_arguments(letters[place]) for place in own)
            found = self._run("put", queue, *given)
            answers |= {place: one.decode() for place, one in zip(own, found, strict=True)}
        return [answers[place] for place in range(len(letters))]

    def get(self, letter_id: str, queue: str = "default") -> Letter | None:
        """Return a letter by its id; see `Store`."""
        found = self._run("get", queue, letter_id)
        return _letter(found[0]) if found else None

    def missing(self, ids: Sequence[str], queue: str = "default") -> Sequence[str]:
        """Return those ids of which nothing is known; see `Store`."""
        missing: list[str] = []
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
        if not where.states:
            return Page([], None)
        if where.ids is not None:
            return self._list_of_ids(where, cursor, limit, newest_first=newest_first)
        found: list[Letter] = []
        after = "" if cursor is None else str(_sequence(cursor))
        while True:
            rows, last = self._run(
                "list", where.queue, _index(where), int(newest_first), after,
                limit - len(found), _LOOKED_AT, _pack(_wanted(where)),
            )  # fmt: skip
            found += readable(rows, _letter)
            after = last.decode()
            if not after or len(found) == limit:
                return Page(found, after or None)

    def _list_of_ids(
        self, where: Filter, cursor: str | None, limit: int, *, newest_first: bool
    ) -> Page:
        rows = sorted(self._rows_of(where), key=_sequence_of, reverse=newest_first)
        if cursor is not None:
            last = _sequence(cursor)
            rows = [row for row in rows if (_sequence_of(row) < last) == newest_first
                    and _sequence_of(row) != last]  # fmt: skip
        matching = [row for row in rows if _matches(row, where)]
        more = len(matching) > limit
        page = matching[:limit]
        return Page(readable(page, _letter), str(_sequence_of(page[-1])) if more else None)

    def _rows_of(self, where: Filter) -> Sequence[Any]:
        """Return what there is of the letters whose ids a filter names."""
        ids = list(dict.fromkeys(where.ids or ()))
        rows: list[Any] = []
        for start in range(0, len(ids), _LOOKED_AT):
            rows += self._run("get", where.queue, *ids[start : start + _LOOKED_AT])
        return rows

    def stats(self, queue: str = "default") -> Stats:
        """Return how many letters there are; see `Store`."""
        with self._talking() as client:
            pipeline = client.pipeline(transaction=False)
            pipeline.hgetall(self._key(queue, "totals"))
            pipeline.zrange(self._key(queue, "age"), 0, 0, withscores=True)
            totals, oldest = pipeline.execute()
        size = int(totals.pop(b"size", 0))
        by: tuple[dict[Any, int], ...] = ({}, {}, {})
        for about, letters in totals.items():
            for counts, facet in zip(by, _unpack(about[1:]), strict=True):
                if facet:
                    counts[facet] = counts.get(facet, 0) + int(letters)
        states, feeds, fingerprints = map(_most, by)
        return Stats(states, feeds, fingerprints, oldest[0][1] if oldest else None, size)

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
            return []
        if where == Filter(queue=where.queue, states=("queued",)):
            return self._claim(where.queue, owner, lease, limit, ())
        self._claim(where.queue, owner, lease, 0, ("",))  # what others have held for too long
        claims: list[Claim] = []
        for ids in self._pages(among(where, ("dead", "queued"))):
            claims += self._claim(where.queue, owner, lease, limit - len(claims), ids)
            if len(claims) == limit:
                break
        return claims

    def _claim(
        self, queue: str, owner: str, lease: float, limit: int, ids: Sequence[str]
    ) -> Sequence[Claim]:
        until, rows = self._run("claim", queue, owner, lease, limit, *ids)
        return [Claim(letter, owner, float(until)) for letter in readable(rows, _letter)]

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
                repr(failed.last_failed_at), max(0, failed.attempts - claim.letter.attempts),
            )
        )  # fmt: skip

    def release(self, claim: Claim) -> bool:
        """Give a letter back that was not tried; see `Store`."""
        return bool(self._settle(claim, "released"))

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
        if not where.states:
            return
        if where.ids is not None:
            rows = sorted(self._rows_of(where), key=_sequence_of)
            ids = [row[0].decode() for row in rows if _matches(row, where)]
            for start in range(0, len(ids), _CHANGED):
                yield ids[start : start + _CHANGED]
            return
        after = ""
        while True:
            rows, last = self._run(
                "list", where.queue, _index(where), 0, after, _CHANGED, _LOOKED_AT,
                _pack(_wanted(where)),
            )  # fmt: skip
            if rows:
                yield [row[0].decode() for row in rows]
            after = last.decode()
            if not after:
                return

    def _run(self, name: str, queue: str, *arguments: Any) -> Any:
        with self._talking():
            return self._scripts[name](keys=[self._key(queue, "")], args=arguments)

    def _key(self, queue: str, name: str) -> str:
        return f"{self._prefix}:{{{queue}}}:{name}"

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
        repr(letter.last_failed_at if math.isfinite(letter.last_failed_at) else 0.0),
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
        attempts=letter.attempts + x.more_attempts,
        replays=x.replays,
    )


def _changing(packed: bytes) -> _Changing:
    return _Changing(*_unpack(packed))


def _sequence_of(row: Sequence[bytes]) -> int:
    return _changing(row[2]).seq


def _matches(row: Sequence[bytes], where: Filter) -> bool:
    x = _changing(row[2])
    wanted = _wanted(where)
    since, until = wanted.pop("since", None), wanted.pop("until", None)
    return (
        x.state in wanted.pop("states")
        and all(getattr(x, name) == value for name, value in wanted.items())
        and (since is None or x.failed_at >= since)
        and (until is None or x.failed_at < until)
    )


def _index(where: Filter) -> str:
    """Return the index that holds the fewest letters besides those that are meant."""
    if where.fingerprint is not None:
        return f"f:{where.fingerprint}"
    if len(where.states) == 1:
        return f"s:{where.states[0]}"
    return f"d:{where.feed}" if where.feed else "all"


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
