"""The payload of a call: what it is, how it is marked and what it is known by."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

from periscope_otel import guard

if TYPE_CHECKING:
    from collections.abc import Callable

    from periscope_otel.dead_letter.codecs import Encoded
    from periscope_otel.lettered.policy import Call, LetterPolicy

_NOTHING: Final = object()


class Payload:
    """What a dead letter of a call would hold; worked out when it is first needed.

    Args:
        call: What is called.
        policy: Says what of it is kept, and what it is known by.
        bind: Gives the arguments of the call by name; None if they do not fit.
    """

    def __init__(
        self, call: Call, policy: LetterPolicy, bind: Callable[[], dict[str, Any] | None]
    ) -> None:
        self._call = call
        self._policy = policy
        self._bind = bind
        self._encoded: Encoded | None = None
        self._selected: object = _NOTHING
        self._key: str | None = None
        self._key_asked_for = False

    @property
    def is_missing(self) -> bool:
        """Whether it is that of a block that was not told what it works on."""
        return self.is_of_a_block and self._policy.payload is None

    @property
    def is_of_a_block(self) -> bool:
        """Whether no function is called."""
        return self._call.function is None

    def encoded(self) -> Encoded:
        """Return it as bytes: worked out once, so that a journal and a letter hold the same."""
        if self._encoded is None:
            self._encoded = self._encode()
        return self._encoded

    def _encode(self) -> Encoded:
        from periscope_otel.dead_letter.codecs import encode_arguments, encode_selected

        function, args, kwargs = self._call
        if self.is_missing:
            nothing = encode_selected(None, None)
            return nothing._replace(not_replayable_because="no payload was given")
        selected = self._selection()
        if selected is not _NOTHING:
            return encode_selected(selected, function)
        if function is None:
            return encode_selected(None, None)
        return encode_arguments(function, args, kwargs)

    def _selection(self) -> object:
        """Return what `payload=` selects; `_NOTHING` without one, or if it raises."""
        select = self._policy.payload
        if select is not None and self._selected is _NOTHING:
            try:
                self._selected = select(self._bind() or {})
            except Exception as error:  # noqa: BLE001  (nothing is lost: all arguments are kept)
                guard.warn("payload", "payload= raised %s", type(error).__name__)
        return self._selected

    def marking(self) -> str | None:
        """Return its TLP marking."""
        from periscope_otel.dead_letter.tlp import tlp_of

        selected = self._selection()
        if selected is not _NOTHING:
            return tlp_of(selected)
        bound = self._bind() or {}
        return tlp_of([one for name, one in bound.items() if name not in ("self", "cls")])

    def use_key(self, key: str) -> None:
        """Have it known by what the user says."""
        # Half a character in it would keep the letter from being written.
        self._key = str(key).encode(errors="replace").decode()

    def given_key(self) -> str | None:
        """Return what was set as the key, or else what the caller's `idempotency_key=` says."""
        if self._key is None and not self._key_asked_for:
            self._key_asked_for = True  # once: it may say something else the next time
            key = self._own_key()
            if key is not None:
                self.use_key(key)
        return self._key

    def key(self, operation: str, feed: str | None) -> str:
        """Return what it is known by: of its content, unless a key was given."""
        given = self.given_key()
        if given:
            return given
        from periscope_otel.dead_letter.identity import content_key

        content = hashlib.sha256(self.encoded().payload).digest()
        self._key = key = content_key(operation, feed, content)
        return key

    def _own_key(self) -> str | None:
        """Return what the caller's `idempotency_key=` says."""
        if self._policy.key is None:
            return None
        try:
            key = self._policy.key(self._bind() or {})
        except Exception as error:  # noqa: BLE001  (the user's callable must not break the call)
            guard.warn("idempotency_key", "idempotency_key= raised %s", type(error).__name__)
            return None
        return None if key is None else str(key)
