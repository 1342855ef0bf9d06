"""The letter: what failed, why, and all that is needed to try it again.

A letter is written once, encoded as a msgpack map, and kept whole: its payload is never cut. What
changes in its life (state, revision, the error of a later attempt) is the store's to keep track of.
Fields that a newer version has added are carried along, so an older one may move its letters.
"""

from __future__ import annotations

import hashlib
import zlib
from operator import attrgetter
from typing import Any, Final, Literal

import msgspec

from periscope_otel.dead_letter.errors import DamagedLetterError

SCHEMA: Final = 1
"""Of the encoded form; a greater number has fields that this version does not know."""

State = Literal["pending", "dead", "queued", "claimed", "parked"]
"""Where a letter stands: `pending` on its way to the store, `dead` until somebody wants a replay,
`queued` for one, `claimed` by a replayer, `parked` where replaying it has failed too often."""

STATES: Final[tuple[State, ...]] = ("pending", "dead", "queued", "claimed", "parked")

COMPRESSED_FROM: Final = 4096
"""Bytes of payload from which it is compressed."""

LONGEST_PAYLOAD: Final = 1 << 30
"""Bytes that a payload may have when it is unpacked; a guard against bombs."""

_TEXT: Final = 4096
_ZLIB: Final = "zlib"


class Letter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One failed payload.

    Example:
        >>> letter = Letter(id=ids.new(), operation="store", codec="arguments", **pack(body))
        >>> Letter.decode(letter.encode()) == letter
        True
    """

    id: str
    """A UUID of version 7, made before the span of the failed operation ended."""
    operation: str
    """The name of the registered operation that a replay runs; never an import path."""
    codec: str
    """How the payload is encoded; see `codecs`."""
    schema: int = SCHEMA
    queue: str = "default"
    feed: str | None = None
    key: str = ""
    """The idempotency key: of the content, or the caller's own."""

    # The payload.
    body: bytes = b""
    """As it is stored; empty where it is in a file."""
    compression: str = ""
    """`zlib` or nothing."""
    content_type: str = "application/msgpack"
    size: int = 0
    """Bytes of the payload, unpacked."""
    sha256: bytes = b""
    """Of the payload, unpacked."""
    body_file: str | None = None
    """The name of the file beside the store of `host` that holds a payload too large for it."""
    replayable: bool = True
    not_replayable_because: str | None = None
    headers: dict[str, str] = {}
    """What the caller wants to travel along; by name from an allow-list."""

    # Why it is here.
    error_type: str | None = None
    error_message: str = ""
    error_stack: str = ""
    fingerprint: str = ""
    """The same for all letters that failed for the same cause."""
    attempts: int = 1
    """Calls made before the payload was given up."""
    first_failed_at: float = 0.0
    """Unix time in seconds, as all times here."""
    last_failed_at: float = 0.0
    not_before: float = 0.0
    """A replay before that time would be refused: what Retry-After said."""

    # Where it comes from.
    traceparent: str | None = None
    """Of the failed operation's span (W3C Trace Context)."""
    tracestate: str | None = None
    host: str = ""
    pid: int = 0
    versions: str = ""
    tlp: str | None = None
    """The Traffic Light Protocol marking of the payload, as in `TLP:AMBER`."""
    batch_id: str | None = None
    """What the item letters of one operation have in common."""
    item_index: int | None = None

    # What the store keeps track of; not what counts in the encoded form.
    state: State = "pending"
    revision: int = 0
    """Grows with every change; a replayer whose letter has another one by now is too late."""
    replays: int = 0
    """Replays that failed."""

    unknown: dict[str, Any] = {}
    """Fields of a newer schema, as they came."""

    def encode(self) -> bytes:
        """Return the letter as a msgpack map."""
        if not self.unknown:
            return _ENCODER.encode(self)
        known = msgspec.structs.asdict(self)
        known.pop("unknown")
        return _ENCODER.encode({**self.unknown, **known})

    @classmethod
    def decode(cls, blob: bytes) -> Letter:
        """Return the letter that was encoded.

        Raises:
            DamagedLetterError: If it is none.
        """
        try:
            letter = _DECODER.decode(blob)
            if letter.schema > SCHEMA or letter.unknown:
                letter = _with_unknown_fields(letter, blob)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise DamagedLetterError(f"{len(blob)} bytes are no letter: {error}") from None
        return letter

    def payload(self) -> bytes:
        """Return the payload, unpacked and checked.

        Raises:
            DamagedLetterError: If it is not what was put in.
        """
        return self.unpack(self.body)

    def unpack(self, body: bytes) -> bytes:
        """Return the payload in a body from this letter's file, unpacked and checked.

        Raises:
            DamagedLetterError: If it is not what was put in.
        """
        payload = _inflate(body, self.size) if self.compression == _ZLIB else body
        if len(payload) != self.size or hashlib.sha256(payload).digest() != self.sha256:
            raise DamagedLetterError(f"the payload of letter {self.id} is damaged")
        return payload

    def latest(self) -> bytes:
        """Return what a further failure of the same payload changes, encoded for `with_latest`."""
        return _ENCODER.encode(_latest_of(self))

    def with_latest(self, blob: bytes) -> Letter:
        """Return the letter as its latest failure left it.

        Raises:
            DamagedLetterError: If that cannot be read.
        """
        try:
            latest = _LATEST_DECODER.decode(blob)
        except (msgspec.MsgspecError, ValueError) as error:
            raise DamagedLetterError(f"the latest failure of {self.id}: {error}") from None
        return self.changed(**msgspec.structs.asdict(latest))

    def changed(self, **fields: Any) -> Letter:
        """Return a copy with other values."""
        return msgspec.structs.replace(self, **fields)


class LatestFailure(msgspec.Struct, frozen=True, array_like=True):
    """What changes when the payload of a letter fails again; see there."""

    error_type: str | None
    error_message: str
    error_stack: str
    fingerprint: str
    last_failed_at: float
    not_before: float
    traceparent: str | None
    tracestate: str | None


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Letter)
_LATEST_DECODER: Final = msgspec.msgpack.Decoder(LatestFailure)
_latest_of: Final = attrgetter(*LatestFailure.__struct_fields__)
_FIELDS: Final = frozenset(Letter.__struct_fields__)


def pack(payload: bytes) -> dict[str, Any]:
    """Return the fields of a letter that hold a payload.

    Example:
        >>> Letter(id=..., operation="store", codec="arguments", **pack(b"..."))
    """
    body, compression = payload, ""
    if len(payload) >= COMPRESSED_FROM:
        packed = zlib.compress(payload, 1)  # most of the gain at a third of the cost
        if len(packed) < len(payload):
            body, compression = packed, _ZLIB
    return {
        "body": body,
        "compression": compression,
        "size": len(payload),
        "sha256": hashlib.sha256(payload).digest(),
    }


def encodable(letter: Letter) -> Letter:
    """Return a letter with no half character in its texts, which could not be written."""
    try:
        letter.encode()
    except UnicodeEncodeError:
        texts = {
            name: _whole(value)
            for name in letter.__struct_fields__
            if isinstance(value := getattr(letter, name), str)
        }
        headers = {_whole(name): _whole(value) for name, value in letter.headers.items()}
        return letter.changed(**texts, headers=headers)
    return letter


def _whole(text: str) -> str:
    return text.encode(errors="replace").decode()


def _with_unknown_fields(letter: Letter, blob: bytes) -> Letter:
    raw = msgspec.msgpack.decode(blob)
    unknown = {name: value for name, value in raw.items() if name not in _FIELDS}
    return letter.changed(unknown=unknown)


def _inflate(body: bytes, size: int) -> bytes:
    if not 0 <= size <= LONGEST_PAYLOAD:
        raise DamagedLetterError(f"a payload of {size} bytes is too long")
    inflater = zlib.decompressobj()
    try:
        payload = inflater.decompress(body, size + 1)  # one more would not be what was put in
    except zlib.error as error:
        raise DamagedLetterError(f"the payload cannot be unpacked: {error}") from None
    if not inflater.eof:
        raise DamagedLetterError("the payload is longer than its letter says")
    return payload
