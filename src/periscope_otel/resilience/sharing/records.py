"""The verdicts on breakers as they are in Redis: reading and writing them, and what they mean.

A record holds what all processes have found about a breaker. Every change of it is one Lua script
(in `lua/`) with the server's time, and a new generation; a record that is made anew, such as after
everything in the Redis was removed, has a new epoch. What is read is taken for what anybody may
have written: it is checked, and a damaged record is as good as none.

Keys: `{cb:NAME}` (a hash), `{cb:NAME}:probes` (leases of probes), `cb:names` (which breakers there
are) and the channel `cb:events`. All of them expire a week after the last change, but for states
that an operator has set.
"""

from __future__ import annotations

import json
import re
import secrets
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from periscope_otel.redaction import clean_name
from periscope_otel.resilience.policy import STATES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from periscope_otel.redis_link import RedisLink
    from periscope_otel.resilience.policy import State

INDEX: Final = "cb:names"
"""The key of the names of all breakers that have a record."""
EVENTS: Final = "cb:events"
"""The channel on which changes are told."""
MOST_NAMES: Final = 10_000
"""Names in the index; those that changed longest ago give way."""
STAYING: Final[frozenset[State]] = frozenset({"forced_open", "disabled", "observe"})
"""States that an operator has set: their records do not expire."""

_LUA: Final = ("change", "ask", "settle")
_FIELDS: Final = (
    "state", "generation", "epoch", "until", "reason", "openings", "successes", "since",
)  # fmt: skip
_LONGEST_OPEN: Final = 2 * 86_400.0
_MOST_GENERATIONS: Final = 2**52
_MOST_OPENINGS: Final = 60
_LONGEST_REASON: Final = 25  # characters, of four bytes at most: those that `common.lua` allows
_LONGEST_EVENT: Final = 4096
_EPOCH: Final = re.compile(r"[0-9a-f]{16}")


class Record(NamedTuple):
    """What all processes have found about a breaker."""

    state: State
    generation: int
    """Grows with every change, within an epoch."""
    epoch: str
    """Which record this is; another one where it was lost and made anew."""
    open_for: float
    """Seconds until a probe may pass, where it is open; 0 elsewhere."""
    reason: str
    openings: int
    successes: int
    """Probes that have succeeded since it became half open."""
    changed: float
    """When it changed last, in Unix time of the Redis."""
    age: float = 0.0
    """Seconds for which it had been so when it was read."""

    def follows(self, known: Record | None) -> bool:
        """Whether it is news to somebody who knows of `known`."""
        if known is None or self.epoch != known.epoch:
            return True
        return self.generation > known.generation

    @property
    def version(self) -> tuple[str, int]:
        """Its epoch and generation."""
        return self.epoch, self.generation


class DamagedRecordError(Exception):
    """What is there is no record of a breaker."""


class Verdict(NamedTuple):
    """What is to be written: the state that a breaker is in."""

    state: State
    reason: str
    open_for: float = 0.0
    openings: int = 0


class Changed(NamedTuple):
    """How writing a verdict ended."""

    won: bool
    record: Record
    """The record that there is now: the writer's, or that of whoever was first."""


class Lease(NamedTuple):
    """The answer to the question whether a process may probe."""

    verdict: str
    """`granted`, `denied`, or `none` where calls need none."""
    record: Record
    retry_after: float
    """Seconds after which to ask again."""


class Event(NamedTuple):
    """A change, as it was told."""

    name: str
    from_state: State | None
    """None where there was no record before."""
    to_state: State
    reason: str
    open_for: float | None
    at: float
    """When, in Unix time of the Redis."""
    version: tuple[str, int]
    """The epoch and generation of the record from then on."""


class Records:
    """The records in a Redis. What a Redis that is away raises comes out of every method.

    Args:
        link: The way to it.
    """

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        common = _source("common")
        client = link.client
        self._scripts = {name: client.register_script(common + _source(name)) for name in _LUA}
        self._index = client.register_script(_source("index"))

    def change(
        self, name: str, verdict: Verdict, known: Record | None, *, anyway: bool = False
    ) -> Changed:
        """Write a verdict if nothing newer than what its writer knows is there.

        Args:
            name: The breaker's.
            verdict: What to write.
            known: The record that the verdict was made of; None if none was ever seen.
            anyway: Whether it is written whatever there is.
        """
        answer, record, _ = self._run(
            "change", name, known.epoch if known else "", known.generation if known else 0,
            new_epoch(), verdict.state, clean_name(verdict.reason, _LONGEST_REASON),
            _milliseconds(verdict.open_for), min(verdict.openings, _MOST_OPENINGS), int(anyway),
        )  # fmt: skip
        if answer == "won":
            self._note(name, verdict.state)
        return Changed(answer == "won", _there(record))

    def ask(
        self, name: str, lease: str, verdict: Verdict, epoch: str, *, lasts: float, most: int
    ) -> Lease:
        """Ask for a lease to probe.

        Args:
            name: The breaker's.
            lease: The id of the lease, if it is granted.
            verdict: What the breaker knows, for a record where there is none.
            epoch: The epoch that this would have.
            lasts: Seconds of the lease.
            most: How many there may be at the same time.
        """
        answer, record, more = self._run(
            "ask", name, lease, _milliseconds(lasts), most, epoch,
            clean_name(verdict.reason, _LONGEST_REASON), min(verdict.openings, _MOST_OPENINGS),
        )  # fmt: skip
        found = _there(record)
        if found.epoch == epoch:
            self._note(name, found.state)
        return Lease(answer, found, more / 1000)

    def settle(self, name: str, lease: str, outcome: str, needed: int) -> Record | None:
        """Give a lease back.

        Args:
            name: The breaker's.
            lease: Its id.
            outcome: How the probe ended: `success`, `failure` or `ignored`.
            needed: How many probes have to succeed for the breaker to close.

        Returns:
            The record, where this has closed the breaker.
        """
        answer, record, _ = self._run("settle", name, lease, outcome, needed)
        return record if answer == "closed" else None

    def read(self, names: Sequence[str]) -> list[Record | DamagedRecordError | None]:
        """Return the record of each breaker; None where there is none."""
        with self._link.quiet() as client, client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            for name in names:
                pipeline.hmget(record_key(name), *_FIELDS)
            now, *rows = pipeline.execute(raise_on_error=False)
        return [_readable(row, _moment(now)) for row in rows]

    def names(self, limit: int = MOST_NAMES) -> list[str]:
        """Return the names of breakers that have a record, or had one a while ago; sorted."""
        with self._link.quiet() as client:
            found: Any = client.zrange(INDEX, 0, limit - 1, desc=True)
        names = {clean_name(one.decode(errors="replace")) for one in found}
        return sorted(names - {""})

    def probes(self, names: Sequence[str]) -> list[int]:
        """Return how many probes are out, for each breaker."""
        with self._link.quiet() as client, client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            for name in names:
                pipeline.zrange(leases_key(name), 0, 1000, withscores=True)
            now, *rows = pipeline.execute(raise_on_error=False)
        return [
            0 if isinstance(row, Exception) else sum(until > _moment(now) for _, until in row)
            for row in rows
        ]

    def _note(self, name: str, state: State) -> None:
        with self._link.quiet():
            self._index(keys=[INDEX], args=[name, int(state in STAYING), MOST_NAMES])

    def _run(self, script: str, name: str, *arguments: Any) -> tuple[str, Record | None, int]:
        with self._link.quiet():
            answer, values, now, more = self._scripts[script](
                keys=[record_key(name), leases_key(name)], args=[EVENTS, name, *arguments]
            )
        record = None if not values[0] else _record(values, int(now))
        return answer.decode(), record, int(more)


def record_key(name: str) -> str:
    """Return the key of a breaker's record; its name is the hash tag, whatever is in it."""
    tag = name.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")
    return f"{{cb:{tag}}}"


def leases_key(name: str) -> str:
    """Return the key of a breaker's leases, in the same slot as its record."""
    return f"{record_key(name)}:probes"


def new_epoch() -> str:
    """Return the epoch of a record that is made now."""
    return secrets.token_hex(8)


def event_of(message: object) -> Event | None:
    """Return the change that a message on the channel tells of; None if it tells of none."""
    if not isinstance(message, bytes) or len(message) > _LONGEST_EVENT:
        return None
    try:
        told = json.loads(message)
        name, before, after = clean_name(told["name"]), told.get("from"), told["to"]
        open_for = told.get("open_for")
        open_for = None if open_for is None else min(float(open_for) / 1000, _LONGEST_OPEN)
        at = min(max(float(told.get("at", 0)) / 1000, 0.0), 2.0**40)
        reason = clean_name(told.get("reason", ""), _LONGEST_REASON)
        version = clean_name(told["epoch"], 16), int(told["generation"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    if not name or after not in STATES or not at >= 0 or not (open_for or 0) >= 0:  # NaN too
        return None
    return Event(name, before if before in STATES else None, after, reason, open_for, at, version)


def _moment(answer: Any) -> int:
    """Return the milliseconds of what TIME has answered."""
    if isinstance(answer, Exception):
        raise answer
    seconds, micros = answer
    return int(seconds) * 1000 + int(micros) // 1000


def _readable(row: Any, now: int) -> Record | DamagedRecordError | None:
    from redis.exceptions import ResponseError

    if isinstance(row, ResponseError) and str(row).startswith("WRONGTYPE"):
        return DamagedRecordError("it is no hash")
    if isinstance(row, Exception):
        raise row
    if not any(value is not None for value in row):
        return None
    try:
        return _record(row, now)
    except DamagedRecordError as error:
        return error


def _there(record: Record | None) -> Record:
    if record is None:
        raise DamagedRecordError("a script has returned no record")
    return record


def _record(values: Sequence[bytes | None], now: int) -> Record:
    """Return the record that fields hold.

    Raises:
        DamagedRecordError: If they do not.
    """
    if None in values or any(value is not None and len(value) > 100 for value in values):
        raise DamagedRecordError("fields are missing or too long")
    try:
        state, generation, epoch, until, reason, openings, successes, changed = (
            cast("bytes", value).decode() for value in values
        )
        numbers = [int(text) for text in (generation, until, openings, successes, changed)]
    except ValueError:
        raise DamagedRecordError("fields are no text or no number") from None
    open_for = max(0.0, (numbers[1] - now) / 1000) if state == "open" else 0.0
    since = min(max(numbers[4], 0), 2**50)
    sound = (
        state in STATES
        and _EPOCH.fullmatch(epoch)
        and 1 <= numbers[0] <= _MOST_GENERATIONS
        and open_for <= _LONGEST_OPEN
        and 0 <= numbers[2] <= 1000
        and 0 <= numbers[3] <= 1000
    )
    if not sound:
        raise DamagedRecordError("fields are out of range")
    return Record(
        cast("State", state), numbers[0], epoch, open_for, clean_name(reason, _LONGEST_REASON),
        min(numbers[2], _MOST_OPENINGS), numbers[3], since / 1000,
        max(0.0, (now - since) / 1000),
    )  # fmt: skip


def _milliseconds(seconds: float) -> int:
    return round(max(0.0, min(seconds, 86_400.0)) * 1000)


def _source(name: str) -> str:
    return (files("periscope_otel.resilience.sharing") / "lua" / f"{name}.lua").read_text()
