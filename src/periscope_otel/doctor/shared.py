"""The Redis that processes share: whether it is there, and whether it keeps what it is given."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from periscope_otel.dead_letter.redis_advice import advice_on
from periscope_otel.doctor.finding import broken, off, ok, warning
from periscope_otel.redis_link import RedisLink, errors
from periscope_otel.resilience.policy import BY_HAND
from periscope_otel.resilience.sharing.records import DamagedRecordError, Records

if TYPE_CHECKING:
    from collections.abc import Iterator

    from periscope_otel.doctor.finding import Finding
    from periscope_otel.settings import Settings

_FULL: Final = 0.8
"""Share of the memory limit from which a warning is due."""
_SKEW: Final = 5.0
"""Seconds by which clocks may differ."""
_NAMED: Final = 5


class _Reason(NamedTuple):
    """A kind of failure: what redis-py raises, or what the message holds."""

    signs: tuple[str, ...]
    message: str
    remedy: str


_SLOW: Final = _Reason(
    ("TimeoutError", "Timeout", "timed out"),
    "it does not answer in time",
    "look whether it is overloaded, or a firewall drops what is sent there",
)
_NO_REDIS: Final = _Reason(
    ("InvalidResponse", "Protocol Error"),
    "what listens there is no Redis",
    "correct the port in PERISCOPE_REDIS_URL",
)
_REASONS: Final = (
    _Reason(
        ("AuthenticationError", "NOAUTH", "WRONGPASS", "NOPERM", "NoPermissionError"),
        "it refuses the user or password",
        "correct the user and password in PERISCOPE_REDIS_URL",
    ),
    _Reason(
        ("refused",),
        "the connection is refused: nothing listens there",
        "start the Redis, or correct PERISCOPE_REDIS_URL",
    ),
    _Reason(
        ("Name or service", "nodename", "getaddrinfo", "name resolution", "No address"),
        "its name cannot be resolved",
        "correct the host in PERISCOPE_REDIS_URL",
    ),
    _Reason(
        ("BusyLoadingError", "LOADING"),
        "it is loading its data",
        "wait until it has loaded; letters stay in the outbox until then",
    ),
    _Reason(
        ("SSL", "certificate"),
        "no secure connection can be made",
        "use redis:// if it has no TLS, rediss:// if it has; ssl_ca_certs= names its CA",
    ),
    _SLOW,
    _NO_REDIS,
)
_OTHER_REASON: Final = _Reason((), "it does not answer as it should", "look at what it logs")


def redis_findings(settings: Settings, timeout: float) -> Iterator[Finding]:
    """Say whether the Redis answers, and whether it keeps what it is given."""
    if settings.redis_url is None:
        yield off(
            "redis.reached",
            "no PERISCOPE_REDIS_URL: dead letters stay on this machine, and each process has "
            "breakers of its own",
        )
        return
    try:
        link = RedisLink(settings.redis_url, timeout)
    except ValueError:  # whose text may have a part of the password in it
        yield broken(
            "redis.reached", "PERISCOPE_REDIS_URL cannot be read as a URL", "correct the variable"
        )
        return
    try:
        yield from _of_redis(link)
    except errors() as error:
        yield _unreached(link, error)
    except Exception:  # noqa: BLE001 - answers that redis-py can make nothing of
        yield broken("redis.reached", f"{link.shown}: {_NO_REDIS.message}", _NO_REDIS.remedy)
    finally:
        link.close()


def late_findings() -> Finding:
    """Return the finding that the Redis neither answers nor hangs up."""
    return broken("redis.reached", "the Redis does not end its answer in time", _SLOW.remedy)


def breaker_findings(settings: Settings, timeout: float) -> Iterator[Finding]:
    """Say how many breakers processes share, and which were set by hand."""
    check = "breakers.shared"
    if settings.redis_url is None or not settings.breaker_sharing:
        yield off(check, "each process has breakers of its own")
        return
    try:
        link = RedisLink(settings.redis_url, timeout)
    except ValueError:
        yield off(check, "the Redis cannot be asked")
        return
    try:
        states = _states(Records(link))
    except Exception:  # noqa: BLE001 - what is wrong with it is said of the Redis
        yield off(check, "the Redis cannot be asked")
        return
    finally:
        link.close()
    by_hand = sorted(name for name, state in states.items() if state in BY_HAND)
    counts = Counter(states.values())
    told = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
    if by_hand:
        named = ", ".join(f"{name} ({states[name]})" for name in by_hand[:_NAMED])
        more = f" and {len(by_hand) - _NAMED} more" if len(by_hand) > _NAMED else ""
        yield warning(
            check,
            f"set by hand: {named}{more}",
            "`periscope breaker close NAME` lets it judge by itself again",
        )
    else:
        yield ok(check, f"{len(states)} have ever opened{f': {told}' if told else ''}")


def _states(records: Records) -> dict[str, str]:
    names = records.names()
    found = zip(names, records.read(names), strict=True)
    return {
        name: "damaged" if isinstance(record, DamagedRecordError) else record.state
        for name, record in found
        if record is not None
    }


def _of_redis(link: RedisLink) -> Iterator[Finding]:
    with link.quiet() as client:
        began = time.monotonic()
        if client.ping() is not True:
            raise TypeError
        took = time.monotonic() - began
        told: dict[Any, Any] = _allowed(client.info) or {}
        may_ask = bool(told)
        told |= _allowed(lambda: client.config_get("save")) or {}
        now = _allowed(client.time)
    version = told.get("valkey_version") or told.get("redis_version") or "of unknown version"
    server = "Valkey" if told.get("valkey_version") else "Redis"
    if told.get("role") in ("slave", "replica"):
        yield broken(
            "redis.reached",
            f"{server} {version} at {link.shown} is a replica, which takes no letters",
            "give the primary's address in PERISCOPE_REDIS_URL",
        )
        return
    yield ok("redis.reached", f"{server} {version} at {link.shown}: {1000 * took:.1f} ms")
    if may_ask:
        yield from _of_keeping(told)
        yield _of_memory(told)
    else:
        yield from _untold()
    if now is not None:
        yield _of_clock(now[0] + now[1] / 1e6 - time.time())


def _untold() -> Iterator[Finding]:
    for subject, question in (
        ("policy", "whether it removes letters when its memory is full"),
        ("persistence", "whether it keeps letters on disk"),
    ):
        yield warning(
            f"redis.{subject}",
            f"this user may not ask for {question} (INFO)",
            "ACL SETUSER … +info +config|get, or ask as another user",
        )


def _of_keeping(told: dict[Any, Any]) -> Iterator[Finding]:
    advice = {one.subject: one for one in advice_on(told)}
    for subject, well in (
        ("policy", "it removes nothing when its memory is full"),
        ("persistence", "what it is given is kept on disk"),
    ):
        one = advice.get(subject)
        if one is not None and subject == "policy" and told.get("maxmemory") == 0:
            one = None  # it is never full
        if one is None:
            yield ok(f"redis.{subject}", well)
        else:
            yield warning(f"redis.{subject}", one.danger, one.remedy)


def _of_memory(told: dict[Any, Any]) -> Finding:
    used, most = told.get("used_memory", 0), told.get("maxmemory", 0)
    shown = f"{used / 1e6:.1f} MB"
    if not most:
        return ok("redis.memory", f"{shown} are used, without a limit")
    share = used / most
    shown = f"{shown} of {most / 1e6:.1f} MB are used"
    if share < _FULL:
        return ok("redis.memory", shown)
    return warning(
        "redis.memory",
        f"{shown}: when it is full, letters wait in the outbox of each machine",
        "replay or purge letters (`periscope dlq stats`), or raise maxmemory",
    )


def _of_clock(ahead: float) -> Finding:
    if abs(ahead) <= _SKEW:
        return ok("redis.clock", "its clock and this machine's agree")
    return warning(
        "redis.clock",
        f"its clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's: "
        "ages and retention of letters are off by as much",
        "keep both clocks by NTP",
    )


def _allowed(ask: Any) -> Any:
    """Return what is answered; None for a user who may not ask."""
    from redis.exceptions import ResponseError

    try:
        return ask()
    except ResponseError:
        return None


def _unreached(link: RedisLink, error: BaseException) -> Finding:
    said = f"{type(error).__name__}: {error}"
    found = (one for one in _REASONS if any(sign in said for sign in one.signs))
    reason = next(found, _OTHER_REASON)
    detail = f" ({said})" if reason is _OTHER_REASON else ""
    return broken("redis.reached", f"{link.shown}: {reason.message}{detail}", reason.remedy)
