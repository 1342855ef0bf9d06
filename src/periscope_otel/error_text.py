"""An exception as text: its message and where it came from, bounded and without secrets."""

from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final

from periscope_otel.redaction import clean_name, redact

# Frames at either end, exceptions of a chain, members of a group, length of a line.
_HEAD, _TAIL, _CHAIN, _SHOWN, _LINE = 5, 15, 4, 3, 300
_CUT: Final = "… earlier lines left out …\n"


def message_of(error: BaseException, limit: int = 1024) -> str:
    """Return the exception's message: secrets out, bounded, whatever its `__str__` does.

    Args:
        error: The exception.
        limit: The most characters to return.

    Returns:
        The message, or a note in angle brackets if it cannot be had.

    Example:
        >>> message_of(ValueError("no such column: score"))
        'no such column: score'
    """
    try:
        text = str.__str__(str(error))  # str() may return a subclass's instance, this does not
    except Exception:  # noqa: BLE001 - it raises, recurses or returns no string
        text = "<unreadable message>"
    try:
        return redact(text, limit)
    except Exception:  # noqa: BLE001 - unredacted text is never let out
        return ""


def stack_text(error: BaseException, limit: int = 4096, *, message: str | None = None) -> str:
    r"""Return a bounded text of where an exception came from; never raises.

    Causes come first, the innermost call last: at most 20 frames an exception and 4 exceptions of
    a chain. There are no source lines (nothing is read from disk), no values of variables and no
    frames of this package. Where the limit bites, the oldest lines go.

    Args:
        error: The exception; its traceback may be missing.
        limit: The most characters to return.
        message: What `message_of` says of the exception, where that is known already.

    Returns:
        Lines `file:line in qualname`, ending with `Type: message`.

    Example:
        >>> stack_text(error)
        '/app/feeds.py:12 in pull\n/app/feeds.py:40 in parse\nValueError: no such column: score'
    """
    try:
        lines = _stack_lines(error, max(min(1024, limit // 4), 1), message)
        return _tail("\n".join(lines), limit)
    except Exception:  # noqa: BLE001 - hostile code, or no stack left
        return "Exception"[: max(limit, 0)]


def type_name(error: BaseException) -> str:
    """Return the short name of an exception's class."""
    return plain_name(type(error).__name__)


def plain_name(name: str) -> str:
    """Return a class's name fit for a label: made up at run time, it may be anything."""
    plain = type(name) is str and len(name) <= 200 and name.isascii() and name.isidentifier()
    return name if plain else clean_name(name)


def peek(foreign: object, name: str) -> Any:
    """Read an attribute of an object that is not ours; None if there is none or it raises."""
    try:
        return getattr(foreign, name, None)
    except Exception:  # noqa: BLE001 - no more: a Ctrl-C that comes just now must pass
        return None


def _stack_lines(error: BaseException, message_limit: int, message: str | None) -> Iterator[str]:
    for link, link_to_next in reversed(_chain(error)):
        yield from _frame_lines(peek(link, "__traceback__"))
        members = link.exceptions if isinstance(link, BaseExceptionGroup) else ()
        for number, member in enumerate(members[:_SHOWN], start=1):
            yield f"member {number} of {len(members)}: {_last_line(member, 200)}"
        known = message if link is error else None
        yield _last_line(link, message_limit, known) + link_to_next


def _chain(error: BaseException) -> list[tuple[BaseException, str]]:
    """Return the exception and its causes, each with the words that lead on from it."""
    chain = [(error, "")]
    seen = {id(error)}
    while len(chain) < _CHAIN:
        before, words = peek(error, "__cause__"), "\n… which caused:"
        if before is None and not peek(error, "__suppress_context__"):
            before, words = peek(error, "__context__"), "\n… and while that was handled:"
        if not isinstance(before, BaseException) or id(before) in seen:
            break
        error = before
        seen.add(id(error))
        chain.append((error, words))
    return chain


def _frame_lines(traceback: object) -> Iterator[str]:
    head: list[TracebackType] = []
    tail: deque[TracebackType] = deque(maxlen=_TAIL)
    count = 0
    while isinstance(traceback, TracebackType):
        if not str(traceback.tb_frame.f_globals.get("__name__")).startswith("periscope_otel."):
            count += 1
            (head if count <= _HEAD else tail).append(traceback)
        traceback = traceback.tb_next
    yield from map(_frame_line, head)
    if left_out := count - len(head) - len(tail):
        yield f"… {left_out} frames left out …"
    yield from map(_frame_line, tail)


def _frame_line(traceback: TracebackType) -> str:
    code = traceback.tb_frame.f_code
    line = f"{code.co_filename}:{traceback.tb_lineno} in {code.co_qualname}"
    return line if len(line) <= _LINE and line.isprintable() else clean_name(line, _LINE)


def _last_line(error: BaseException, message_limit: int, message: str | None = None) -> str:
    if message is None or len(message) > message_limit:
        message = message_of(error, message_limit)
    return f"{type_name(error)}: {message}" if message else type_name(error)


def _tail(text: str, limit: int) -> str:
    """Keep whole lines from the end: the exception itself and the calls nearest to it."""
    if len(text) <= limit or limit <= 0:
        return text[: max(limit, 0)]
    mark = _CUT if limit >= 100 else ""
    kept = text[len(mark) - limit :]
    return mark + kept[kept.find("\n") + 1 :]
