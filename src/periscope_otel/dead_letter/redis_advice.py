"""What in a Redis's own configuration endangers dead letters."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any


class Advice(NamedTuple):
    """One thing that endangers letters."""

    subject: str
    """`policy` or `persistence`."""
    danger: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.danger}: {self.remedy}"


def advice_on(told: Mapping[Any, Any]) -> Iterator[Advice]:
    """Say what endangers letters, by what INFO and CONFIG GET save tell.

    Args:
        told: The answers, as far as there are any: a user may not be allowed to ask.
    """
    policy = told.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield Advice(
            "policy",
            f"Redis removes keys when its memory is full (maxmemory-policy is {policy}), and with "
            "them dead letters",
            "set `maxmemory-policy noeviction`",
        )
    save = told.get("save", told.get(b"save"))  # a client that decodes nothing tells bytes
    if told.get("aof_enabled", 1) == 0 and save in ("", b""):
        yield Advice(
            "persistence",
            "Redis keeps nothing on disk (neither AOF nor RDB), so a restart loses all dead "
            "letters",
            "set `appendonly yes`",
        )
    elif told.get("aof_enabled", 1) == 0 and save is None:
        yield Advice(
            "persistence",
            "Redis has no append-only file, and does not say whether it takes snapshots (RDB); "
            "without them a restart loses all dead letters",
            "set `appendonly yes`",
        )
