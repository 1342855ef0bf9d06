"""A sampler that lets breakers see the client spans of traces that are not sampled.

What a root sampler drops never reaches a span processor. Recorded without being sampled, a span
does: exporters leave it out, and what is sent downstream says that it is not sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    DEFAULT_OFF,
    DEFAULT_ON,
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import SpanKind, get_current_span

from periscope_otel import guard
from periscope_otel.resilience.awaiting import open_spans

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from opentelemetry.context import Context
    from opentelemetry.trace import Link, TraceState
    from opentelemetry.util.types import Attributes

_DEEPEST: Final = 8
_WRAPPED: Final = (
    "_root", "_remote_parent_sampled", "_remote_parent_not_sampled", "_local_parent_sampled",
    "_local_parent_not_sampled",
)  # fmt: skip
_BY_NAME: Final = {
    "always_on": ALWAYS_ON,
    "always_off": ALWAYS_OFF,
    "parentbased_always_on": DEFAULT_ON,
    "parentbased_always_off": DEFAULT_OFF,
}
_ADVICE: Final = "build the provider with RecordOnlySampler(...) as the outermost sampler"
_NO_CLIENTS: Final = (
    "RecordOnlySampler records no client spans of unsampled traces: kinds= has no CLIENT"
)
_LOSES_ATTRIBUTES: Final = (
    "AlwaysRecordSampler loses the attributes that spans of unsampled traces begin with, and with "
    "them the names of dependencies: " + _ADVICE
)
_INSIDE: Final = (
    "{} is inside {}, which drops what is beneath an unsampled span, and all spans under an "
    "unsampled remote parent: " + _ADVICE
)
_DROPS: Final = (
    "breakers see no client spans of unsampled traces; a given provider's sampler cannot be "
    "wrapped: " + _ADVICE
)


class RecordOnlySampler(Sampler):
    """Records spans of interest that another sampler drops, without sampling them.

    It has to be the outermost sampler. Spans beneath a client span that a breaker watches are
    recorded too, so that the call is counted once however it is nested.

    Args:
        root: Decides what is sampled; the SDK's default, `parentbased_always_on`, by default.
        kinds: The kinds of span that are of interest.
        names: Names of further spans that are.

    Example:
        >>> sampler = RecordOnlySampler(ParentBased(TraceIdRatioBased(0.1)))
        >>> provider = TracerProvider(sampler=sampler)
    """

    def __init__(
        self,
        root: Sampler | None = None,
        *,
        kinds: Iterable[SpanKind] = (SpanKind.CLIENT,),
        names: Iterable[str] | None = None,
    ) -> None:
        self._root = DEFAULT_ON if root is None else root
        self._kinds = frozenset(kinds)
        self._names = frozenset(names or ())

    def should_sample(  # noqa: PLR0917 - as the SDK calls it
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Decide as the root does, but record what it would drop and is of interest."""
        # As the SDK's tracer calls a sampler: some have other parameter names, or no seventh.
        given = (parent_context, trace_id, name, kind, attributes, links)
        root = self._root.should_sample
        result = root(*given) if trace_state is None else root(*given, trace_state)
        wanted = kind in self._kinds or name in self._names
        if result.decision is not Decision.DROP or not (wanted or _is_beneath(parent_context)):
            return result
        # The SDK's samplers forget the attributes of what they drop.
        kept = {**(attributes or {}), **(result.attributes or {})}
        return SamplingResult(Decision.RECORD_ONLY, kept, result.trace_state)

    def get_description(self) -> str:
        """Return its name and that of the root."""
        return f"RecordOnlySampler{{{self._root.get_description()}}}"

    def records(self, kind: SpanKind) -> bool:
        """Return whether every span of a kind is recorded."""
        return kind in self._kinds


def _is_beneath(parent_context: Context | None) -> bool:
    """Whether a span begins beneath a client span that is watched."""
    if not open_spans:
        return False
    parent = get_current_span(parent_context).get_span_context()
    return parent.span_id in open_spans and not parent.is_remote


# Where samplers are named in the environment or in a file.


def sampler_from_environment(argument: str | float | None = None) -> RecordOnlySampler:
    """Return the sampler that `OTEL_TRACES_SAMPLER=periscope_record_only` stands for.

    Args:
        argument: `OTEL_TRACES_SAMPLER_ARG`: the share of traces that are sampled, from 0 to 1, or
            the name of a root such as `always_off`; nothing for `parentbased_always_on`.

    Example:
        >>> sampler_from_environment("0.1").get_description()
        'RecordOnlySampler{ParentBased{root:TraceIdRatioBased{0.1},...}}'
    """
    return RecordOnlySampler(_root_of(argument))


def sampler_from_file(root: Any = None, **options: Any) -> RecordOnlySampler:
    """Return the sampler that `periscope_record_only` stands for in a configuration file.

    Args:
        root: The sampler that decides what is sampled, as in the environment or as the file has
            samplers: `{"parent_based": {"root": {"trace_id_ratio_based": {"ratio": 0.1}}}}`.
        **options: `kinds` and `names`: lists of kinds of span and of names.

    Example:
        >>> sampler_from_file(root="always_off", kinds=["client", "producer"]).get_description()
        'RecordOnlySampler{AlwaysOffSampler}'
    """
    given: dict[str, Any] = {}
    if (kinds := options.pop("kinds", None)) is not None:
        given["kinds"] = tuple(_kinds_of(kinds))
    if isinstance(names := options.pop("names", None), (list, tuple)):
        given["names"] = [name for name in names if isinstance(name, str)]
    for option in options:
        _warn(option)
    return RecordOnlySampler(_root_of(root), **given)


def _kinds_of(kinds: Any) -> Iterator[SpanKind]:
    for kind in kinds if isinstance(kinds, (list, tuple)) else (kinds,):
        if isinstance(kind, SpanKind):
            yield kind
        elif isinstance(kind, str) and kind.upper() in SpanKind.__members__:
            yield SpanKind[kind.upper()]
        else:
            _warn(kind)


def _root_of(wanted: Any) -> Sampler:
    """Return a root that traces can begin with: what it does not decide the parent does."""
    if wanted is None or (isinstance(wanted, str) and not wanted.strip()):
        return DEFAULT_ON
    found = _sampler_of(wanted)
    if found is None:
        _warn(wanted)
        return DEFAULT_ON
    is_ratio = isinstance(found, TraceIdRatioBased) and not isinstance(wanted, (Sampler, Mapping))
    return ParentBased(found) if is_ratio else found


def _sampler_of(wanted: Any, depth: int = 0) -> Sampler | None:
    """Return the sampler that a name, a share or a part of a file stands for; None if none."""
    if isinstance(wanted, Sampler):
        return wanted
    if isinstance(wanted, str) and wanted.strip().lower() in _BY_NAME:
        return _BY_NAME[wanted.strip().lower()]
    if isinstance(wanted, Mapping):
        return _sampler_of_mapping(wanted, depth) if depth < _DEEPEST else None
    with suppress(ValueError, TypeError, OverflowError):
        return TraceIdRatioBased(float(wanted))
    return None


def _sampler_of_mapping(wanted: Mapping[str, Any], depth: int) -> Sampler | None:
    kind, options = next(iter(wanted.items()), ("", None))
    options = options if isinstance(options, Mapping) else {}
    if kind == "trace_id_ratio_based":
        return _sampler_of(options.get("ratio", 1.0), depth + 1)
    if kind == "parent_based":
        root = options.get("root")
        found = ALWAYS_ON if root is None else _sampler_of(root, depth + 1)
        return None if found is None else ParentBased(found)
    return _BY_NAME.get(kind)


def _warn(value: object) -> None:
    guard.warn(
        "sampler option",
        "sampler periscope_record_only: %.80r is not understood; the default is used in its place",
        value,
    )


# What is wrong with a given one.


def check_sampler(provider: object) -> str | None:
    """Say what keeps breakers from seeing the client spans of a provider.

    A root that drops only what has a parent that is not sampled passes: where traces begin in this
    process, there is none.

    Args:
        provider: A tracer provider; if it is not the SDK's, nothing can be told.

    Returns:
        One line; None where nothing is wrong.

    Example:
        >>> check_sampler(TracerProvider(sampler=ALWAYS_OFF))
        'breakers see no client spans of unsampled traces: ...'
    """
    try:
        return _fault_of(getattr(provider, "sampler", None))
    except Exception:  # noqa: BLE001 - another's sampler, which may be anything
        return None


def _fault_of(sampler: object) -> str | None:
    if isinstance(sampler, RecordOnlySampler):
        return None if sampler.records(SpanKind.CLIENT) else _NO_CLIENTS
    within = [one for one in _all_within(sampler) if one is not sampler]
    may_drop = _may_drop(sampler)
    if _is_always_record(sampler):
        kept = any(isinstance(one, RecordOnlySampler) for one in within)
        return _LOSES_ATTRIBUTES if may_drop and not kept else None
    for one in within:
        if isinstance(one, RecordOnlySampler) or _is_always_record(one):
            return _INSIDE.format(type(one).__name__, type(sampler).__name__)
    return _DROPS if may_drop else None


def _all_within(sampler: object, depth: int = 0) -> Iterator[object]:
    """Yield a sampler and those that it asks."""
    yield sampler
    for attribute in _WRAPPED if depth < _DEEPEST else ():
        inner = getattr(sampler, attribute, None)
        if inner is not None:
            yield from _all_within(inner, depth + 1)


def _is_always_record(sampler: object) -> bool:
    return type(sampler).__name__ == "AlwaysRecordSampler"  # not every SDK has it


def _may_drop(sampler: object) -> bool:
    """Whether a sampler of the SDK's drops traces that begin here; False for strangers."""
    innermost = sampler
    for _ in range(_DEEPEST):
        innermost = getattr(innermost, "_root", innermost)
    if isinstance(innermost, TraceIdRatioBased):
        return innermost.rate < 1.0
    return getattr(innermost, "_decision", None) is Decision.DROP
