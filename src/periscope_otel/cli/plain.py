"""Text for terminals: nothing in it acts, and no indicator in it can be clicked."""

from __future__ import annotations

import ipaddress
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from periscope_otel.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Callable

# What `str.isprintable` allows though it is not to be seen: fillers and variation selectors.
_UNSEEN: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)

_DOT: Final = r"[.\u3002\uff0e\uff61]"
"""A dot, and what browsers take for one (UTS 46)."""
_URL: Final = re.compile(r"\b(h)tt(ps?)(?=:/|:\\|%3a)|\bf(t)p(s?)(?=:/|:\\|%3a)", re.IGNORECASE)
# Whole runs at once, so that no part of a long one is looked at again.
_DOTTED: Final = re.compile(rf"(?<![\w-])[\w-]++(?:{_DOT}[\w-]++)++")
_TOP_LEVEL: Final = re.compile(r"xn--[a-z0-9-]+|[^\W\d_]{2,63}", re.IGNORECASE)
_IPV4: Final = re.compile(rf"(?<![\d.])\d{{1,3}}(?:{_DOT}\d{{1,3}}){{3}}(?!{_DOT}?\d)")
_IPV6: Final = re.compile(r"(?<![\w:.])(?:[0-9a-f]{0,4}:){2,7}[0-9a-f.:]*[0-9a-f:]", re.IGNORECASE)
_MAIL: Final = re.compile(r"(?<=[^\s@])@(?=[\w-]+\[|\[?[\w.:\[\]-]+\])")
_NO_DOMAIN: Final = frozenset(
    [
        "csv",
        "dll",
        "doc",
        "docx",
        "exe",
        "gz",
        "html",
        "json",
        "log",
        "pdf",
        "txt",
        "xls",
        "xlsx",
        "xml",
    ]
)
"""Ends of file names that are no top-level domains."""

_SIZES: Final = ("B", "kB", "MB", "GB", "TB")


def visible(text: str, keep: str = "") -> str:
    r"""Return text in which everything that is not to be seen, or acts, is written out.

    Args:
        text: Any.
        keep: Characters that stay, such as line ends.

    Example:
        >>> visible("\x1b[2Jfeeds\n")
        '\\x1b[2Jfeeds\\n'
    """
    if not text.isprintable():
        text = "".join(
            one if one.isprintable() or one in keep else one.encode("unicode_escape").decode()
            for one in text
        )
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def line(text: object, limit: int = 300) -> str:
    """Return text as one bounded line without secrets."""
    return redact(visible(str(text)[: 2 * limit + 200]), limit)


def lines(text: str, limit: int = 16_000) -> str:
    """Return text of several lines, bounded and without secrets."""
    return redact(visible(text[: 2 * limit], keep="\n"), limit)


def defanged(text: str, *, code: bool = False) -> str:
    """Return text whose indicators are written so that nothing makes a link of them.

    Args:
        text: Any.
        code: Whether dotted names are mostly those of code, and stay where they may be.

    Example:
        >>> defanged("http://evil.example/a from 192.0.2.1, bob@evil.example")
        'hxxp://evil[.]example/a from 192[.]0[.]2[.]1, bob[@]evil[.]example'
    """
    text = _DOTTED.sub(_host_in_code if code else _host, text)
    text = _IPV4.sub(lambda found: re.sub(_DOT, "[.]", found[0]), text)
    text = _IPV6.sub(_ipv6, text)
    text = _URL.sub(_scheme, text)
    return _MAIL.sub("[@]", text)


def _scheme(found: re.Match[str]) -> str:
    if found[1]:
        return f"{found[1]}{'xx' if found[1] == 'h' else 'XX'}{found[2]}"
    return f"fx{found[0][2:]}"


def _host(found: re.Match[str]) -> str:
    labels = re.split(_DOT, found[0])
    if labels[-1].lower() in _NO_DOMAIN and not _is_in_url(found):
        return found[0]
    is_domain = any(map(_TOP_LEVEL.fullmatch, labels[1:]))
    return "[.]".join(labels) if is_domain else found[0]


def _host_in_code(found: re.Match[str]) -> str:
    last = found[0].rpartition(".")[2]
    is_name = last in ("py", "pyx", "so") or not last.islower()
    return found[0] if is_name and not _is_in_url(found) else _host(found)


def _is_in_url(found: re.Match[str]) -> bool:
    before = found.string[max(0, found.start() - 3) : found.start()]
    return before.endswith(("//", "@", "\\\\", "2F", "2f"))


def _ipv6(found: re.Match[str]) -> str:
    try:
        ipaddress.IPv6Address(found[0])
    except ValueError:
        return found[0]
    return found[0].replace(":", "[:]").replace(".", "[.]")


def moment(when: float) -> str:
    """Return Unix time as ISO 8601 in UTC; nothing for what is no time."""
    try:
        return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return ""


def age(when: float, clock: Callable[[], float] = time.time) -> str:
    """Return how long ago something was, as in `3h`."""
    seconds = clock() - when
    if not seconds < 1e12:  # true for NaN too
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


def size(number: float) -> str:
    """Return a number of bytes for people, as in `1.2kB`."""
    unit = 0
    while number >= 1000 and unit < len(_SIZES) - 1:
        number, unit = number / 1000, unit + 1
    digits = 1 if unit and number < 100 else 0
    return f"{number:.{digits}f}{_SIZES[unit]}"
