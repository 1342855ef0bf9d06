"""Python values as msgpack and back, exactly: what msgpack has no type for is put into extensions.

An extension says what a value was. Objects of the user's own classes and of libraries are read as
`Stored` first; `fit` makes them again of the classes that an annotation mentions.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import functools
import ipaddress
import json
import pathlib
import types
import typing
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec

from periscope_otel.dead_letter.errors import CannotReplayError
from periscope_otel.redaction import clean_name, names_a_secret

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_DEEPEST: Final = 64
"""Containers inside of containers; what refers to itself is deeper than that."""

_PLAIN: Final = frozenset({type(None), bool, float, str, bytes})
_WHOLE_NUMBERS: Final = range(-(1 << 63), 1 << 64)
"""What msgpack has integers for."""


class NotCarriedError(Exception):
    """A value cannot be stored so that it comes back; the message says why."""


class Stored(NamedTuple):
    """An object that is not yet made again: what it was, and what it is made of."""

    kind: str
    """`object`, `enum`, or the library that reads its JSON."""
    name: str
    """`module.qualname` of its class."""
    content: Any

    def __hash__(self) -> int:
        return id(self)


# --- to msgpack ----------------------------------------------------------------------------------

# Numbers of the extensions; never used for anything else again.
_STIX2, _PYMISP, _PYDANTIC = 1, 2, 3
_TUPLE, _SET, _FROZENSET, _PAIRS = 10, 11, 12, 13
_UUID, _DECIMAL, _NUMBER, _BYTEARRAY = 20, 21, 22, 23
_DATETIME, _DATE, _TIME, _TIMEDELTA = 30, 31, 32, 33
_PATH, _ADDRESS = 40, 41
_OBJECT, _ENUM = 50, 51

_LIBRARIES: Final[dict[str, tuple[int, Callable[[Any], str]]]] = {
    "stix2.base._STIXBase": (_STIX2, lambda it: str(it.serialize())),
    "pymisp.abstract.AbstractMISP": (_PYMISP, lambda it: str(it.to_json())),
    "pydantic.main.BaseModel": (_PYDANTIC, lambda it: str(it.model_dump_json(by_alias=True))),
}
"""By a base class of the library's objects."""
_LIBRARY_OF: Final = {_STIX2: "stix2", _PYMISP: "pymisp", _PYDANTIC: "pydantic"}
_HIDDEN_IN_JSON: Final = '"**********"'
"""What pydantic writes for its SecretStr: the value itself is not to be had."""

_ENCODE: Final = msgspec.msgpack.Encoder().encode


def encode(
    value: Any, left_out: list[str] | None = None, incomplete: list[str] | None = None
) -> bytes:
    """Return a value as msgpack.

    Args:
        value: Anything that is data.
        left_out: Where entries named like secrets are noted, which are not stored then; None
            stores everything.
        incomplete: Where it is noted why an object cannot be made again without what was left out.

    Raises:
        NotCarriedError: If it, or something in it, is no data.
    """
    return _ENCODE(_Walk(left_out, incomplete).plain(value))


class _Walk:
    """Turns one value, and all that is in it, into msgpack's own types and extensions."""

    def __init__(self, left_out: list[str] | None, incomplete: list[str] | None = None) -> None:
        self._left_out = left_out
        self._incomplete = [] if incomplete is None else incomplete
        self._path: list[str] = []

    def plain(self, value: Any, name: str = "") -> Any:
        """Return a value that can be encoded; `name` is what its container calls it."""
        kind = type(value)
        if kind in _PLAIN or (kind is int and value in _WHOLE_NUMBERS):
            return value
        if len(self._path) > _DEEPEST:
            raise NotCarriedError("it is nested too deep, or refers to itself")
        self._path.append(name)
        try:
            way = next((way for wanted, way in _WAYS if isinstance(value, wanted)), _Walk._object)
            return way(self, value)
        finally:
            self._path.pop()

    def _enum(self, value: enum.Enum) -> Any:
        return _ext(_ENUM, _ENCODE((_name_of(type(value)), self.plain(value.value))))

    def _dict(self, value: dict[Any, Any]) -> Any:
        kept = {key: one for key, one in value.items() if not self._leaves_out(key)}
        if all(type(key) is str for key in kept):
            return {key: self.plain(one, key) for key, one in kept.items()}
        return _ext(
            _PAIRS, _ENCODE([[self.plain(key), self.plain(one)] for key, one in kept.items()])
        )

    def _list(self, value: list[Any]) -> Any:
        return [self.plain(one) for one in value]

    def _tuple(self, value: tuple[Any, ...]) -> Any:
        if hasattr(value, "_fields"):
            return self._object(value)
        return _ext(_TUPLE, _ENCODE([self.plain(one) for one in value]))

    def _set(self, value: set[Any] | frozenset[Any]) -> Any:
        # In a fixed order, so that equal sets are equal payloads in every process.
        members = sorted(_ENCODE(self.plain(one)) for one in value)
        code = _FROZENSET if isinstance(value, frozenset) else _SET
        return _ext(code, _ENCODE([msgspec.Raw(one) for one in members]))

    def _object(self, value: Any) -> Any:
        """Return an object of a class of the user's, or of a library."""
        cls = type(value)
        if "<locals>" in cls.__qualname__:
            raise NotCarriedError(f"{cls.__qualname__} is a class inside of a function")
        for base in cls.__mro__:
            library = _LIBRARIES.get(_name_of(base))
            if library is not None:
                return self._json(value, *library)
        names = _fields_of(cls)
        if names is None:
            raise NotCarriedError(f"{_name_of(cls)} is no data")
        kept = [name for name in names if not self._leaves_out(name)]
        for name in set(names) - set(kept) - _defaults_of(cls).keys():
            self._incomplete.append(f"{cls.__qualname__}.{name} was not stored, and has no default")
        fields = {name: self.plain(getattr(value, name), name) for name in kept}
        return _ext(_OBJECT, _ENCODE((_name_of(cls), fields)))

    def _json(self, value: Any, code: int, to_json: Callable[[Any], str]) -> msgspec.msgpack.Ext:
        """Return an object of a library as its JSON, without what is named like a secret."""
        text = to_json(value)
        cls = type(value)
        known = len(self._left_out or ())
        if self._left_out is not None:
            aliases = _secret_aliases(cls) if code == _PYDANTIC else frozenset()
            content = self._without_secrets(json.loads(text), aliases)
            if len(self._left_out) > known:
                text = json.dumps(content)
        if _HIDDEN_IN_JSON in text:
            raise NotCarriedError(f"a {cls.__name__} holds a secret")
        if len(self._left_out or ()) > known:
            try:
                _make(Stored(_LIBRARY_OF[code], _name_of(cls), text), {cls})
            except Exception:  # noqa: BLE001  (a library refuses in its own way)
                named = ", ".join((self._left_out or [])[known:])
                self._incomplete.append(f"a {cls.__name__} cannot be made without {named}")
        return _ext(code, _ENCODE((_name_of(cls), text)))

    def _without_secrets(self, content: Any, aliases: frozenset[str]) -> Any:
        if isinstance(content, list):
            return [self._without_secrets(one, aliases) for one in content]
        if not isinstance(content, dict):
            return content
        kept: dict[str, Any] = {}
        for name, one in content.items():
            if self._leaves_out(name, always=name in aliases):
                continue
            self._path.append(name)
            kept[name] = self._without_secrets(one, aliases)
            self._path.pop()
        return kept

    def _leaves_out(self, name: object, *, always: bool = False) -> bool:
        if self._left_out is None or not isinstance(name, str):
            return False
        if not always and not names_a_secret(name):
            return False
        self._left_out.append(clean_name(".".join([*filter(None, self._path), name])))
        return True


_Way: TypeAlias = Callable[[_Walk, Any], Any]


def _text(code: int, write: Callable[[Any], str] = str) -> _Way:
    return lambda _walk, value: _ext(code, write(value))


_ADDRESS_KINDS: Final = (
    ipaddress.IPv4Address, ipaddress.IPv6Address, ipaddress.IPv4Network,
    ipaddress.IPv6Network, ipaddress.IPv4Interface, ipaddress.IPv6Interface,
)  # fmt: skip
_WAYS: Final[tuple[tuple[type | tuple[type, ...], _Way], ...]] = (
    (enum.Enum, _Walk._enum),  # first: members of an IntEnum are integers, too
    (dict, _Walk._dict),
    (list, _Walk._list),
    (tuple, _Walk._tuple),
    ((set, frozenset), _Walk._set),
    (bool, lambda _, value: bool(value)),
    (int, lambda _, value: _whole_number(int(value))),
    (str, lambda _, value: str(value)),
    (float, lambda _, value: float(value)),
    (bytearray, lambda _, value: _ext(_BYTEARRAY, bytes(value))),
    (bytes, lambda _, value: bytes(value)),
    (uuid.UUID, _text(_UUID)),
    (decimal.Decimal, _text(_DECIMAL)),
    (dt.datetime, _text(_DATETIME, dt.datetime.isoformat)),  # before the date that it is
    (dt.date, _text(_DATE, dt.date.isoformat)),
    (dt.time, _text(_TIME, dt.time.isoformat)),
    (dt.timedelta, _text(_TIMEDELTA, lambda it: f"{it.days},{it.seconds},{it.microseconds}")),
    (pathlib.PurePath, _text(_PATH)),
    (_ADDRESS_KINDS, _text(_ADDRESS, lambda it: f"{type(it).__name__} {it}")),
)
"""How a value is carried, by the first of these types that it is of."""


def _whole_number(value: int) -> int | msgspec.msgpack.Ext:
    return value if value in _WHOLE_NUMBERS else _ext(_NUMBER, str(value))


def _secret_aliases(cls: Any) -> frozenset[str]:
    """Return what the JSON of a pydantic model, and of those in it, calls fields of secrets."""
    models = {cls, *(one for one in _classes_in(cls) if hasattr(one, "model_fields"))}
    aliases: set[str] = set()
    for model in models:
        for name, about in model.model_fields.items():
            if names_a_secret(name):
                aliases |= {
                    one for one in (about.serialization_alias, about.alias) if isinstance(one, str)
                }
    return frozenset(aliases)


def _fields_of(cls: Any) -> Sequence[str] | None:
    """Return the names of the fields of a class that is made of fields; None for others."""
    if dataclasses.is_dataclass(cls):
        return [one.name for one in dataclasses.fields(cls)]
    for listed in ("__struct_fields__", "_fields"):  # of msgspec, and of named tuples
        if hasattr(cls, listed):
            return tuple(getattr(cls, listed))
    if hasattr(cls, "__attrs_attrs__"):
        return [one.name for one in cls.__attrs_attrs__]
    return None


def _defaults_of(cls: Any) -> dict[str, Callable[[], Any]]:
    """Return what makes the defaults of a class's fields, for those that have one."""
    if dataclasses.is_dataclass(cls):
        made: dict[str, Callable[[], Any]] = {}
        for one in dataclasses.fields(cls):
            if one.default is not dataclasses.MISSING:
                made[one.name] = functools.partial(_same, one.default)
            elif one.default_factory is not dataclasses.MISSING:
                made[one.name] = one.default_factory
        return made
    # Of the others only the names count: their own constructors know the defaults.
    if hasattr(cls, "__struct_fields__"):
        return {one.name: _none for one in msgspec.structs.fields(cls) if not one.required}
    if hasattr(cls, "_field_defaults"):
        return dict.fromkeys(cls._field_defaults, _none)
    attributes = getattr(cls, "__attrs_attrs__", ())
    return {one.name: _none for one in attributes if type(one.default).__name__ != "_Nothing"}


def _same(value: Any) -> Any:
    return value


def _none() -> None:
    return None


def _ext(code: int, content: str | bytes) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, content.encode() if isinstance(content, str) else content)


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# --- from msgpack --------------------------------------------------------------------------------


def decode(payload: bytes) -> Any:
    """Return what was encoded; objects of classes as `Stored`.

    Raises:
        CannotReplayError: If it is no such thing.
    """
    try:
        return _DECODE(payload)
    except Exception as error:  # noqa: BLE001  (each reader of an extension has its own)
        raise CannotReplayError(f"the payload cannot be read: {clean_name(error)}") from None


def _from_ext(code: int, data: memoryview) -> Any:
    content = bytes(data)
    if code in _FROM_TEXT:
        return _FROM_TEXT[code](content.decode())
    if code in _LIBRARY_OF or code in (_OBJECT, _ENUM):
        name, inner = _DECODE(content)
        kind = _LIBRARY_OF.get(code) or ("enum" if code == _ENUM else "object")
        if not isinstance(name, str) or (code == _OBJECT and not isinstance(inner, dict)):
            raise ValueError(f"no {kind}")
        return Stored(kind, name, inner)
    if code == _BYTEARRAY:
        return bytearray(content)
    if code == _PAIRS:
        return dict(_DECODE(content))
    if code in _FROM_MEMBERS:
        return _FROM_MEMBERS[code](_DECODE(content))
    raise ValueError(f"the extension {code} is not known")


def _address(text: str) -> Any:
    kind, _, written = text.partition(" ")
    return _ADDRESSES[kind](written)


def _timedelta(text: str) -> dt.timedelta:
    days, seconds, microseconds = map(int, text.split(","))
    return dt.timedelta(days, seconds, microseconds)


_ADDRESSES: Final[dict[str, Callable[[str], Any]]] = {one.__name__: one for one in _ADDRESS_KINDS}
_FROM_TEXT: Final[dict[int, Callable[[str], Any]]] = {
    _UUID: uuid.UUID,
    _DECIMAL: decimal.Decimal,
    _NUMBER: int,
    _DATETIME: dt.datetime.fromisoformat,
    _DATE: dt.date.fromisoformat,
    _TIME: dt.time.fromisoformat,
    _TIMEDELTA: _timedelta,
    _PATH: pathlib.Path,
    _ADDRESS: _address,
}
_FROM_MEMBERS: Final[dict[int, Callable[[Any], Any]]] = {
    _TUPLE: tuple,
    _SET: set,
    _FROZENSET: frozenset,
}
_DECODE: Final = msgspec.msgpack.Decoder(ext_hook=_from_ext).decode


# --- to the handler's classes --------------------------------------------------------------------


def fit(value: Any, hint: Any, name: str) -> Any:
    """Return a decoded value as a handler wants it.

    Args:
        value: What `decode` returned.
        hint: The annotation of the parameter; `Any` without one.
        name: Of the parameter, for the message.

    Raises:
        CannotReplayError: If it cannot be made into that.
    """
    try:
        made, has_objects = _made(value, _classes_in(hint))
        if has_objects:
            return _checked(made, hint, name)
        return _converted(made, hint)
    except CannotReplayError:
        raise
    except Exception as error:  # noqa: BLE001  (classes of the user's may refuse in any way)
        why = clean_name(f"{type(error).__name__}: {error}")
        raise CannotReplayError(f"the argument {name} does not fit: {why}") from None


def _converted(value: Any, hint: Any) -> Any:
    """Return plain data as what its annotation says, which may have changed since."""
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError:
        raise
    except TypeError:  # an annotation that msgspec knows nothing about
        return value


def _checked(value: Any, hint: Any, name: str) -> Any:
    wanted = tuple(dict if typing.is_typeddict(one) else one for one in _members_of(hint))
    try:
        fits = not wanted or isinstance(value, wanted)
    except TypeError:  # an annotation that is no class, such as a type variable
        return value
    if not fits:
        shown = " | ".join(getattr(one, "__qualname__", str(one)) for one in wanted)
        raise CannotReplayError(f"the argument {name} is a {type(value).__qualname__}, not {shown}")
    return value


def _made(value: Any, known: set[type]) -> tuple[Any, bool]:
    """Return a value with its objects made again, and whether there were any."""
    if isinstance(value, Stored):
        return _make(value, known), True
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [_made(one, known) for one in value]
        if any(has for _, has in parts):
            return type(value)(one for one, _ in parts), True
    elif isinstance(value, dict):
        pairs = [(_made(key, known), _made(one, known)) for key, one in value.items()]
        if any(key[1] or one[1] for key, one in pairs):
            return {key[0]: one[0] for key, one in pairs}, True
    return value, False


def _make(stored: Stored, known: set[type]) -> Any:
    if stored.kind == "stix2":
        return _stix2_object(stored.content)
    cls = _class_named(stored.name, known)
    if cls is None:
        what = f"a {clean_name(stored.name)}"
        if stored.kind in _LIBRARY_OF.values():
            what += f" of {stored.kind}"
        raise CannotReplayError(f"{what} needs a handler whose annotation names that class")
    if stored.kind == "enum":
        return cls(_made(stored.content, known)[0])
    if stored.kind == "pydantic":
        return cls.model_validate_json(stored.content)  # type: ignore[attr-defined]
    if stored.kind == "pymisp":
        made = cls()
        made.from_json(stored.content)
        return made
    return _object_of(cls, stored.content, known)


def _stix2_object(text: Any) -> Any:
    try:
        import stix2  # type: ignore[import-untyped]
    except ImportError:
        raise CannotReplayError("stix2 is not installed here") from None
    return stix2.parse(text, allow_custom=True)


def _object_of(cls: Any, content: dict[str, Any], known: set[type]) -> Any:
    """Return an object with the fields that it had."""
    wanted = _fields_of(cls)
    defaults = _defaults_of(cls)
    # Fields of secrets are not stored.
    left_out = {one for one in wanted or () if one not in content and names_a_secret(one)}
    if needed := left_out - defaults.keys():
        named = ", ".join(sorted(needed))
        raise CannotReplayError(f"{cls.__qualname__} cannot be made without {named}")
    if wanted is None or set(wanted) - left_out != content.keys():
        different = ", ".join(sorted(set(wanted or ()) ^ content.keys()))
        raise CannotReplayError(f"{cls.__qualname__} has other fields by now: {different}")
    hints = hints_of(cls)
    fields = {name: _field(one, hints.get(name, Any), name, known) for name, one in content.items()}
    if not dataclasses.is_dataclass(cls):
        return cls(**fields)  # a Struct, a named tuple or a class of attrs
    new: Any = object.__new__
    made = new(cls)  # its `__init__` has run once already
    fields |= {name: defaults[name]() for name in left_out}
    for name, one in fields.items():
        object.__setattr__(made, name, one)
    return made


def _field(value: Any, hint: Any, name: str, known: set[type]) -> Any:
    made, has_objects = _made(value, known | _classes_in(hint))
    return _checked(made, hint, name) if has_objects else _converted(made, hint)


def _class_named(name: str, known: set[type]) -> type | None:
    """Return the class of that name among those that are known and their subclasses."""
    waiting, seen = list(known), set(known)
    while waiting:
        cls = waiting.pop()
        if _name_of(cls) == name:
            return cls
        subclasses: list[type] = type.__subclasses__(cls)
        for below in subclasses:
            if below not in seen:
                seen.add(below)
                waiting.append(below)
    return None


def _members_of(hint: Any) -> Iterator[Any]:
    """Give the alternatives of a union; or the hint itself, without its parameters."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for one in typing.get_args(hint):
            yield from _members_of(one)
    elif typing.get_origin(hint) is typing.Annotated:
        yield from _members_of(typing.get_args(hint)[0])
    elif hint is not Any:
        yield typing.get_origin(hint) or hint


def _classes_in(hint: Any, seen: set[type] | None = None) -> set[type]:
    """Return all classes of the user's that an annotation mentions, and those that they do."""
    seen = set() if seen is None else seen
    if isinstance(hint, type) and hint.__module__ != "builtins" and hint not in seen:
        seen.add(hint)
        for of_field in hints_of(hint).values():
            _classes_in(of_field, seen)
    for one in typing.get_args(hint):
        _classes_in(one, seen)
    return seen


def hints_of(owner: Any) -> dict[str, Any]:
    """Return the annotations of a function or class that can be read, by name.

    Those that name what is only imported for type checkers are left out, and the others are not.
    """
    found: dict[str, Any] = {}
    for part in reversed(owner.__mro__) if isinstance(owner, type) else (owner,):
        scope = getattr(part, "__globals__", None)
        if scope is None:
            import sys

            module = sys.modules.get(getattr(part, "__module__", ""))
            scope = {} if module is None else vars(module)
        for name, annotation in getattr(part, "__annotations__", {}).items():
            holder = types.SimpleNamespace(__annotations__={name: annotation})
            try:
                found |= typing.get_type_hints(holder, globalns=scope, include_extras=True)
            except Exception:  # noqa: BLE001, S112
                continue
    return found
