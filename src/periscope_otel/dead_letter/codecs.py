"""Payloads as bytes and back: arguments of calls, and single items.

A payload is msgpack. What msgpack has no type for (tuples, sets, UUIDs, dataclasses …) travels in
extensions that say what it was, so that it comes back as it was; objects of stix2, PyMISP and
pydantic travel as their own JSON. Those libraries are known by the modules of their classes, so
nothing is imported for them before they are read again. Nothing is ever pickled, and no class is
looked up by a name that was stored: an object is made again of a class that the handler's own
annotations name, or of a subclass of it.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
import typing
from collections import OrderedDict, abc
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from periscope_otel.dead_letter.errors import CannotReplayError
from periscope_otel.dead_letter.values import decode, encode, fit, hints_of
from periscope_otel.redaction import clean_name, names_a_secret, redact

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ARGUMENTS: Final = "arguments"
"""A map of the bound arguments of a call, by parameter."""
ITEM: Final = "item"
"""One item."""
TEXT: Final = "text"
"""A bounded text about what could not be carried; for reading, not for replaying."""

MSGPACK: Final = "application/msgpack"
PLAIN: Final = "text/plain; charset=utf-8"

_HIDDEN: Final = "[redacted]"
_LONGEST_TEXT: Final = 64 * 1024
_RECEIVERS: Final = ("self", "cls")
_COLLECTIONS: Final = ("builtins", "collections", "collections.abc", "typing")


class Encoded(NamedTuple):
    """A payload as bytes."""

    payload: bytes
    codec: str
    content_type: str = MSGPACK
    not_replayable_because: str | None = None
    """Why the payload, although it is stored, cannot be handed to its operation."""
    left_out: tuple[str, ...] = ()
    """Parameters named like secrets, which are not stored; the handler supplies them."""


def encode_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Encoded:
    """Return the bound arguments of a call as a payload.

    `self` and `cls` are left out, and so is what is named like a secret, also inside of arguments:
    the handler supplies it. What cannot be carried becomes a text that says so.

    Args:
        function: What was called.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    try:
        bound = dict(_signature_of(function).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return _as_text(_without_secrets(function, args, kwargs), "the arguments do not fit")
    receiver = next(iter(bound), "")
    if receiver in _RECEIVERS:
        del bound[receiver]
    left_out: list[str] = []
    return _encode(bound, ARGUMENTS, left_out)


_signatures: Final[WeakKeyDictionary[Any, inspect.Signature]] = WeakKeyDictionary()


def _signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return a signature, kept as long as its function: to look at one costs more than the rest."""
    try:
        known = _signatures.get(function)
        if known is None:
            known = _signatures[function] = inspect.signature(function)
    except TypeError:  # what cannot be referred to weakly
        return inspect.signature(function)
    return known


def encode_item(item: object) -> Encoded:
    """Return one item as a payload, with all that is in it: it is what was ingested."""
    return _encode(item, ITEM, None)


def encode_selected(value: object, function: Callable[..., Any] | None) -> Encoded:
    """Return what a user has chosen as the payload of a call.

    A dict by names of the function's parameters is its arguments; anything else is what the
    function is to be handed as its first one.

    Args:
        value: What was chosen.
        function: What was called, if anything was.
    """
    if function is not None and isinstance(value, dict) and value:
        try:
            parameters = inspect.signature(function).parameters.keys()
        except (TypeError, ValueError):
            return _encode(value, ITEM, None)
        if value.keys() <= parameters - set(_RECEIVERS):
            return _encode(dict(value), ARGUMENTS, [])
    return _encode(value, ITEM, None)


def _encode(value: object, codec: str, left_out: list[str] | None) -> Encoded:
    incomplete: list[str] = []
    try:
        payload = encode(value, left_out, incomplete)
    except Exception as error:  # noqa: BLE001  (foreign objects may raise anything)
        return _as_text(value, f"{type(error).__name__}: {error}")
    because = clean_name("; ".join(incomplete)) if incomplete else None
    return Encoded(payload, codec, not_replayable_because=because, left_out=tuple(left_out or ()))


def _without_secrets(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Return arguments that do not fit, without those whose names say that they are secrets."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        parameters = ()  # type: ignore[assignment]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [one.name for one in parameters if one.kind in positional]
    return (
        tuple(
            _HIDDEN if place < len(names) and names_a_secret(names[place]) else one
            for place, one in enumerate(args)
        ),
        {name: _HIDDEN if names_a_secret(name) else one for name, one in kwargs.items()},
    )


class _ShortText(reprlib.Repr):
    """Writes down large data without making a copy of it all."""

    def __init__(self) -> None:
        super().__init__()
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 100
        self.maxstring = self.maxother = self.maxlong = 2000


def _as_text(value: object, because: str) -> Encoded:
    try:
        text = _ShortText().repr(value)
    except Exception:  # noqa: BLE001
        text = f"<{type(value).__name__}>"
    shown = redact(text, _LONGEST_TEXT // 4).encode(errors="replace")  # at most 4 bytes a character
    return Encoded(shown, TEXT, PLAIN, not_replayable_because=clean_name(because))


def decode_plain(payload: bytes) -> Any:
    """Return a payload without a handler's annotations, for looking at it.

    Raises:
        CannotReplayError: If it is none.
    """
    return decode(payload)


def bind(
    function: Callable[..., Any], payload: bytes, codec: str, *, many: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments with which a payload is handed to a handler.

    Args:
        function: The handler.
        payload: As it was encoded.
        codec: How.
        many: Whether an item is handed over in a list.

    Raises:
        CannotReplayError: If they do not fit the handler, or one that it needs was not stored.
    """
    if codec == TEXT:
        raise CannotReplayError("only a text about the payload could be stored")
    if codec not in (ARGUMENTS, ITEM):
        raise CannotReplayError(f"the codec {clean_name(codec)} is not known")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise CannotReplayError(f"the handler cannot be looked at: {clean_name(error)}") from None
    value = [decode(payload)] if many and codec == ITEM else decode(payload)
    hints = hints_of(_what_is_annotated(function))
    arranged = (
        _item(signature, value, hints) if codec == ITEM else _arguments(signature, value, hints)
    )
    arguments = inspect.BoundArguments(signature, arranged)
    try:
        signature.bind(*arguments.args, **arguments.kwargs)
    except TypeError as error:
        raise CannotReplayError(f"the handler cannot be called so: {clean_name(error)}") from None
    return arguments.args, arguments.kwargs


def first_is_many(function: Callable[..., Any]) -> bool | None:
    """Return whether a function's first parameter is a collection; None if that is not said."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    first = next((one for one in parameters if one.name not in _RECEIVERS), None)
    if first is None:
        return None
    if first.kind is first.VAR_POSITIONAL:
        return False  # each argument is one item
    hint = hints_of(_what_is_annotated(function)).get(first.name)
    if hint is None or hint is Any:
        return None
    kind = typing.get_origin(hint) or hint
    is_class = isinstance(kind, type) and not issubclass(kind, (str, bytes, abc.Mapping))
    return is_class and issubclass(kind, abc.Iterable) and kind.__module__ in _COLLECTIONS


def _what_is_annotated(function: Any) -> Any:
    """Return the function whose annotations a partial or a callable object goes by."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if inspect.ismethod(function):
        return function.__func__
    return function if inspect.isroutine(function) else type(function).__call__


def _item(
    signature: inspect.Signature, value: Any, hints: Mapping[str, Any]
) -> OrderedDict[str, Any]:
    first = next(iter(signature.parameters), None)
    if first is None:
        raise CannotReplayError("the handler takes no argument, and so no item")
    if first in _RECEIVERS:
        raise CannotReplayError("the handler is a method that belongs to no object")
    fitting = fit(value, hints.get(first, Any), first)
    is_many = signature.parameters[first].kind is inspect.Parameter.VAR_POSITIONAL
    return OrderedDict({first: (fitting,) if is_many else fitting})


def _arguments(
    signature: inspect.Signature, value: Any, hints: Mapping[str, Any]
) -> OrderedDict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise CannotReplayError("the payload holds no arguments")
    if strangers := value.keys() - signature.parameters.keys():
        shown = ", ".join(sorted(map(clean_name, strangers)))
        raise CannotReplayError(f"the handler has no parameter {shown}")
    arranged: OrderedDict[str, Any] = OrderedDict()
    for name, parameter in signature.parameters.items():
        if name in value:
            arranged[name] = _argument(signature, parameter, value[name], hints.get(name, Any))
    return arranged


def _keywords_of(signature: inspect.Signature) -> set[str]:
    """Return the names of the parameters that a keyword would reach."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, one in signature.parameters.items() if one.kind in kinds}


def _argument(
    signature: inspect.Signature, parameter: inspect.Parameter, value: Any, hint: Any
) -> Any:
    name = parameter.name
    if parameter.kind is parameter.VAR_POSITIONAL:
        if not isinstance(value, (tuple, list)):
            raise CannotReplayError(f"the arguments *{name} are none")
        return tuple(fit(one, hint, name) for one in value)
    if parameter.kind is parameter.VAR_KEYWORD:
        if not isinstance(value, dict) or value.keys() & _keywords_of(signature):
            raise CannotReplayError(f"the arguments **{name} are none")
        return {key: fit(one, hint, name) for key, one in value.items()}
    return fit(value, hint, name)
