"""What an examination says: one finding a check, and all of them together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from periscope_otel.redaction import redact

if TYPE_CHECKING:
    from typing import Any

Status = Literal["ok", "off", "warning", "broken"]
"""`off` is what is not configured, or not there, and was not asked for."""

STATUSES: Final[tuple[Status, ...]] = ("broken", "warning", "ok", "off")
"""From worst to best; what is off is neither."""

_LONGEST: Final = 500
_REPEATED: Final = 20
"""Findings of one check that are told; one names how many more there are."""


class Finding(NamedTuple):
    """What one check has found.

    Example:
        >>> Finding("redis.reached", "off", "not configured").status
        'off'
    """

    check: str
    """Its lasting name, such as `redis.policy`."""
    status: Status
    message: str
    remedy: str | None = None
    """What helps; every warning and everything that is broken has one."""

    def as_json(self) -> dict[str, str | None]:
        """Return it for programs."""
        return self._asdict()


class Diagnosis(NamedTuple):
    """What all checks have found, in their order."""

    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        """What does not work though it was asked for."""
        return self._of("broken")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What works, but not as it should."""
        return self._of("warning")

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not self.broken

    def _of(self, status: Status) -> tuple[Finding, ...]:
        return tuple(one for one in self.findings if one.status == status)

    def as_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return {"ok": self.ok, "findings": [one.as_json() for one in self.findings]}


def ok(check: str, message: str) -> Finding:
    """Return the finding that all is well."""
    return Finding(check, "ok", line(message))


def off(check: str, message: str, remedy: str | None = None) -> Finding:
    """Return the finding that something is not there, and was not asked for."""
    return Finding(check, "off", line(message), None if remedy is None else line(remedy))


def warning(check: str, message: str, remedy: str) -> Finding:
    """Return the finding that something works, but not as it should."""
    return Finding(check, "warning", line(message), line(remedy))


def broken(check: str, message: str, remedy: str) -> Finding:
    """Return the finding that something does not work though it was asked for."""
    return Finding(check, "broken", line(message), line(remedy))


def line(text: str) -> str:
    """Return a text as one bounded, printable line without secrets."""
    plain = " ".join(redact(text[: 8 * _LONGEST], 4 * _LONGEST).split())
    plain = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in plain)
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST - 1]}…"


def said_by(error: BaseException) -> str:
    """Return what an exception is and says."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def bounded(findings: list[Finding]) -> list[Finding]:
    """Return the findings of one check, or the first of too many."""
    if len(findings) <= _REPEATED:
        return findings
    last = findings[_REPEATED - 1]
    more = len(findings) - _REPEATED + 1
    return [*findings[: _REPEATED - 1], last._replace(message=f"and {more} more of this kind")]


def from_json(told: object) -> Finding | None:
    """Return a finding that another process tells; None if it is none.

    Args:
        told: What was read; it may come from anybody.
    """
    if not isinstance(told, dict):
        return None
    check, status, message = told.get("check"), told.get("status"), told.get("message")
    remedy = told.get("remedy")
    if not isinstance(check, str) or status not in STATUSES or not isinstance(message, str):
        return None
    message, remedy = line(message), line(remedy) if isinstance(remedy, str) else ""
    if not message:
        return None
    if not remedy and status in ("warning", "broken"):
        remedy = "look at what that program logs"
    return Finding(line(check)[:60], status, message, remedy or None)
