"""`monitor_function`: monitoring code that one does not own, reversibly.

The attribute is replaced by a wrapt `FunctionWrapper`, which binds like whatever it replaces
(function, method, class or static method, built-in); it calls the same closure that `@monitored`
would have made.
"""

from __future__ import annotations

import copy
import sys
import threading
from typing import TYPE_CHECKING, Any, Self

import wrapt
from opentelemetry.trace import SpanKind

from periscope_otel import guard
from periscope_otel.call_site import call_site
from periscope_otel.lettered import policy_of
from periscope_otel.monitored import default_name, refuse_what_is_no_function, wrap
from periscope_otel.registry import register

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType, TracebackType

    from opentelemetry.util.types import AttributeValue

    from periscope_otel.call_site import PerCall, ResultPredicate
    from periscope_otel.resilience.breaker import Breaker
    from periscope_otel.resilience.retry import Retry


class _MonitoredBoundFunction(wrapt.BoundFunctionWrapper[..., Any]):
    """A monitored method of an instance; pickles and copies like the method it stands for."""

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return getattr, (self.__self__, self.__name__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return getattr(copy.deepcopy(self.__self__, memo), self.__name__)


class _MonitoredFunction(wrapt.FunctionWrapper[..., Any]):
    """A monitored function; pickles by name and copies as itself, like the one it stands for."""

    __bound_function_wrapper__ = _MonitoredBoundFunction

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return str(self.__qualname__)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return self


class Patch:
    """One monitored function of somebody else's; a context manager that undoes itself."""

    def __init__(
        self,
        target: str,
        name: str | PerCall | None,
        result: ResultPredicate | None,
        fixed: dict[str, Any],
    ) -> None:
        self.target = target
        self.module_name, _, self._path = target.partition(":")
        if not self.module_name or not self._path:
            raise ValueError(f'{target!r} is no target: write it as "package.module:Class.method"')
        self.name = name
        self.result = result
        self.fixed = fixed
        self.active = True
        self.applied = False
        """Whether the module has been imported and the function replaced."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def undo(self) -> None:
        """Put the original back; what others have put around it since stays, without effect."""
        with _lock:
            self.active = False
            _patches.pop(self.target, None)
            if not self.applied:
                return
            self.applied = False
            if vars(self._owner).get(self._attribute) is not self._wrapper:
                return  # patched again by somebody else: theirs stays, ours inside it is inactive
            if self._inherited:
                delattr(self._owner, self._attribute)
            else:
                setattr(self._owner, self._attribute, self._original)

    def apply(self, module: ModuleType) -> None:
        """Replace the function in its module.

        Raises:
            AttributeError: If the module has no such function.
            TypeError: If what it has there is no function.
        """
        if not self.active or self.applied:
            return
        try:
            owner, attribute, original = wrapt.resolve_path(module, self._path)
        except AttributeError as error:
            raise AttributeError(f"{self.target}: {error}") from None
        self._owner, self._attribute, self._original = owner, attribute, original
        self._inherited = attribute not in vars(owner)
        self._wrapper = self._make_wrapper(original)
        setattr(owner, attribute, self._wrapper)
        self.applied = True

    def _make_wrapper(self, original: Any) -> Any:
        function = getattr(original, "__func__", original)
        refuse_what_is_no_function(function)
        name = self.name or default_name(function)
        closure = wrap(function, call_site(name, function=function, **self.fixed), self.result)

        def call(
            _wrapped: Callable[..., Any],
            instance: Any,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
        ) -> Any:
            return (
                closure(*args, **kwargs) if instance is None else closure(instance, *args, **kwargs)
            )

        wrapper = _MonitoredFunction(original, call, enabled=lambda: self.active)
        if isinstance(name, str):
            register(name, wrapper)
        return wrapper


def monitor_function(
    target: str,
    *,
    name: str | PerCall | None = None,
    feed: str | PerCall | None = None,
    breaker: str | Breaker | PerCall | None = None,
    retry: Retry | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, AttributeValue] | None = None,
    result: ResultPredicate | None = None,
    dead_letter: bool | str = False,
    payload: PerCall | None = None,
    idempotency_key: PerCall | None = None,
    journal: bool = False,
    dead_letter_rejected: bool = False,
) -> Patch:
    """Monitor a function of a module that one does not own, as `@monitored` would.

    It is replaced at once if its module is imported, else when the module is. Doing it twice has
    the effect of doing it once. References taken before (`from module import function`) are not
    reached.

    Args:
        target: `"package.module:function"` or `"package.module:Class.method"`.
        name: As for `monitored`; by default the last two parts of module and qualified name.
        feed: As for `monitored`, as are the others.
        breaker: As for `monitored`: the breaker of what is called, or its name.
        retry: When to call again.
        kind: The spans' kind.
        attributes: Further attributes of the spans.
        result: Says of a returned value whether it means failure.
        dead_letter: As for `monitored`, as are the others.
        payload: What to keep of a call that failed.
        idempotency_key: What it is known by.
        journal: Whether it is written down before the call.
        dead_letter_rejected: Whether to keep what an open breaker rejects.

    Returns:
        The patch; its `undo()` puts the original back.

    Raises:
        ValueError: If the target is not written as above.
        AttributeError: If the imported module has no such function.
        TypeError: If what it has there is no function.

    Example:
        >>> patch = monitor_function("taxii2client.v21:Collection.get_objects", feed="taxii")
        >>> patch.undo()
    """
    letters = policy_of(
        dead_letter, payload, idempotency_key, journal=journal, rejected=dead_letter_rejected
    )
    fixed: dict[str, Any] = {"feed": feed, "breaker": breaker, "retry": retry, "kind": kind}
    fixed |= {"attributes": attributes, "letters": letters}
    with _lock:
        known = _patches.get(target)
        if known is not None:
            if (known.name, known.result, known.fixed) != (name, result, fixed):
                guard.warn(
                    f"patch {target}",
                    "monitor_function(%r) was called before with other arguments; they stay. "
                    "Call undo() first to change them",
                    target,
                )
            return known
        patch = Patch(target, name, result, fixed)
        module = sys.modules.get(patch.module_name)
        if module is not None:
            patch.apply(module)
        _patches[target] = patch
    if module is None:
        wrapt.register_post_import_hook(_contained_apply(patch), patch.module_name)
    return patch


_lock = threading.RLock()
_patches: dict[str, Patch] = {}


def _contained_apply(patch: Patch) -> Callable[[ModuleType], None]:
    """Return the import hook: an error of ours must not break the user's import."""

    def apply(module: ModuleType) -> None:
        try:
            patch.apply(module)
        except (AttributeError, TypeError) as error:
            _patches.pop(patch.target, None)  # so that it can be tried again
            guard.warn(f"patch {patch.target}", "monitor_function(%r): %s", patch.target, error)

    return apply
