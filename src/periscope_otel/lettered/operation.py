"""Operations whose failed payload, or failed items, become dead letters.

A letter is made while the operation settles, so that the span can name it, and written right
after. In a coroutine whoever awaits it writes it, in a thread; everywhere else it is written before
the call returns.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opentelemetry import baggage

from periscope_otel import guard
from periscope_otel.dead_letter.in_use import in_use
from periscope_otel.dead_letter.replaying import REPLAYING
from periscope_otel.dead_letter.threads import in_a_thread, submit
from periscope_otel.lettered.payload import Payload
from periscope_otel.lettered.writing import put, put_contained
from periscope_otel.operation import Operation
from periscope_otel.redaction import clean_name, redact
from periscope_otel.telemetry import names
from periscope_otel.telemetry.letter_counts import letter_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from opentelemetry.util.types import AttributeValue

    from periscope_otel.dead_letter.codecs import Encoded
    from periscope_otel.dead_letter.draft import Cause, Origin
    from periscope_otel.dead_letter.letter import Letter
    from periscope_otel.dead_letter.replaying import Replaying
    from periscope_otel.failure import Failure
    from periscope_otel.lettered.policy import Call, LetterPolicy
    from periscope_otel.resilience.circuit import Permit

MOST_HELD: Final = 1000
"""Failed items that one operation holds until it settles."""
MOST_BYTES_HELD: Final = 8 << 20
"""Bytes that more than one of them may take together."""

_MOST_SPILLS: Final = 4
"""Batches of letters that wait to be written beside a coroutine; then it writes them itself."""

_LONGEST_HEADER: Final = 1000

_ITEM_EVENTS: Final = 8
"""Item letters that the span names; it counts all."""

_FAILED: Final = frozenset({"error", "timeout"})


class _FailedItem(NamedTuple):
    """A failed item, encoded when it failed: it may change until the operation settles."""

    encoded: Encoded
    cause: Cause
    tlp: str | None


class LetteredOperation(Operation):
    """An operation that keeps what fails.

    Args:
        name: The operation's name.
        feed: The feed's name.
        policy: What becomes a letter.
        call: What is called; None for a block.
        bind: Gives the arguments of the call by name; None if they do not fit.
    """

    in_coroutine = False
    """Whether whoever settles it awaits `deliver`."""

    def __init__(
        self,
        name: str,
        feed: str | None,
        policy: LetterPolicy,
        call: Call,
        bind: Callable[[], dict[str, Any] | None],
    ) -> None:
        super().__init__(name, feed)
        self._policy = policy
        self._payload = Payload(call, policy, bind)
        self._closed = False
        self._pid = os.getpid()
        self._letter_id: str | None = None
        self._in_journal = False
        self._was_journalled = False
        self._returned_failure: object = None
        self._holding = threading.RLock()  # a signal handler's item may come while it is held
        self._held: list[_FailedItem] = []
        self._held_bytes = 0
        self._spilt = self._spilt_before = 0
        self._too_many = False
        self._payload_told = False
        self._ready: list[Letter] = []
        self._done_with: list[str] = []
        self._spills: list[Future[None]] = []
        self._replay: Replaying | None = None
        replaying = REPLAYING.get()
        if replaying is not None and (replaying.takes(name) or self._is_tried_again(replaying)):
            self._replay = replaying
            replaying.cause = None
            if feed is None:
                self.feed = replaying.feed

    def _is_tried_again(self, replaying: Replaying) -> bool:
        """Whether a handler calls the operation once more with the payload that it replays."""
        if self.name != replaying.operation:
            return False
        with guard.contained("replay"):
            from periscope_otel.dead_letter.draft import letter_of
            from periscope_otel.dead_letter.store import payload_identity

            again = letter_of(self._origin(), self._payload.encoded(), None, key=replaying.key)
            return payload_identity(again) == replaying.identity
        return False

    # What the user calls.

    @property
    def idempotency_key(self) -> str:
        """The same for each try of the same payload, also when its letter is replayed.

        Of the payload's content unless it was set. Give it to whatever stores the payload, and
        a payload that comes twice is stored once.
        """
        if self._replay is not None:
            return self._replay.key
        return self._payload.key(self.name, self.feed)

    @idempotency_key.setter
    def idempotency_key(self, key: str) -> None:
        self._payload.use_key(key)

    def failed(
        self, item: object = None, error: BaseException | None = None, *, count: int = 1
    ) -> None:
        """Count items that could not be ingested, and keep `item` for a dead letter.

        Args:
            item: The item; it is encoded now, and written when the operation settles. One that
                comes later, or from the child of a fork, is written at once.
            error: Why.
            count: How many items this is about.
        """
        super().failed(item, error, count=count)
        if item is not None and in_use.enabled:
            with guard.contained("dead letter item"):
                self._hold(item, error)

    def fail(self, error: BaseException | str | object) -> None:
        """Mark the operation as failed although nothing is raised; see `Operation.fail`."""
        self._returned_failure = error
        super().fail(error)

    # What the wrappers call.

    @property
    def letters_waiting(self) -> bool:
        """Whether a coroutine has to await `deliver`; not where another thread settles it."""
        return self.in_coroutine and self._has_letters

    @property
    def journal_waiting(self) -> bool:
        """Whether the payload is yet to be written down, before the first attempt."""
        return (
            self._policy.journal
            and not self._was_journalled
            and self._replay is None
            and self._is_ours
        )

    def enter(self) -> None:
        """Make this the current operation; the payload is in the journal before that."""
        if self.journal_waiting and not self.in_coroutine:
            self._was_journalled = True
            with guard.contained("journal"):
                self._write_journal(self._journal_letter())
        super().enter()

    async def write_journal(self) -> None:
        """Write the payload down without holding the event loop up."""
        self._was_journalled = True
        with guard.contained("journal"):
            letter = self._journal_letter()  # here: other tasks may change what it is made of
            await in_a_thread(lambda: self._write_journal(letter))

    def finish(self) -> None:
        """Leave and settle an operation that raised nothing."""
        self.leave()
        self.settle()

    def settle(
        self,
        failure: Failure | None = None,
        error: BaseException | None = None,
        *,
        ended_at: int | None = None,
    ) -> None:
        """End the operation once, and write its letters."""
        super().settle(failure, error, ended_at=ended_at)
        if not self.in_coroutine and self._has_letters:
            self._deliver()

    def begin_again(self, permit: Permit | None) -> None:
        """Begin a further attempt: the items that failed in the one before come again."""
        super().begin_again(permit)
        self._returned_failure = None
        with self._holding:
            self._held, self._held_bytes, self._too_many = [], 0, False
            self._spilt_before = self._spilt

    def settle_later(
        self, failure: Failure | None = None, error: BaseException | None = None
    ) -> None:
        """End the operation in the worker's thread, which writes its letters too."""
        self.in_coroutine = False
        super().settle_later(failure, error)

    def abort(self) -> None:
        """Settle as cancelled, from another thread: the process ends in the middle of it."""
        self.in_coroutine = False
        super().abort()

    async def deliver(self) -> None:
        """Write the letters without holding the event loop up."""
        with guard.contained("dead letter"):
            await in_a_thread(self._deliver)

    # Making letters.

    @property
    def _is_ours(self) -> bool:
        """Whether it began in this process: in the child of a fork it is the parent's."""
        return self._pid == os.getpid()

    @property
    def _has_letters(self) -> bool:
        return bool(self._ready or self._done_with or self._spills) and self._is_ours

    def _closing(self, outcome: str, failure: Failure | None, error: BaseException | None) -> None:
        with guard.contained("dead letter"):
            try:
                self._decide(outcome, failure, self._returned_failure if error is None else error)
            except Exception:
                letter_counts.lost(self._policy.queue, "internal")
                raise

    def _decide(self, outcome: str, failure: Failure | None, error: object) -> None:
        """Make the letters that this end asks for."""
        if not self._is_ours:
            return
        with self._holding:
            self._closed = True
        if self._replay is not None:
            self._close_replay(outcome, failure, error)
        elif not in_use.enabled:
            return
        elif self._becomes_letter(outcome):
            self._close_failed(outcome, failure, error)
        else:
            self._close_succeeded()
        self._held = []
        self._returned_failure = None  # or its traceback would refer to this, and this to it

    def _becomes_letter(self, outcome: str) -> bool:
        if outcome in _FAILED:
            return True
        if outcome == "rejected":
            # Where only a call inside of it was rejected, it may be half done: that is kept.
            return self._policy.rejected or not self.refused
        return outcome == "cancelled" and self._was_journalled

    def _close_failed(self, outcome: str, failure: Failure | None, error: object) -> None:
        failed_items = bool(self._held or self._spilt > self._spilt_before)
        items_alone = self._policy.items and (failed_items or self._payload.is_missing)
        if not items_alone:
            error_type = None if failure is None else failure.error_type
            retry_after = None if failure is None else failure.retry_after
            self._put_payload(self._cause(error_type or outcome, error, retry_after))
        if self._held and not self._payload_told:
            self._put_items()
        if items_alone:
            self._leave_journal()

    def _close_succeeded(self) -> None:
        if self._too_many:
            # More items failed than can be held: the payload has them all.
            self._put_payload(self._cause_of_too_many())
            return
        if self._held:
            self._put_items()
        self._leave_journal()

    def _cause_of_too_many(self) -> Cause:
        last = self._held[-1].cause
        told = f"{self.items.failed} items failed, the last one: {last.message}"
        return last._replace(message=told)

    def _close_replay(self, outcome: str, failure: Failure | None, error: object) -> None:
        """Tell the replay how its letter fared; what has failed in it keeps its letter."""
        replay = self._replay
        if replay is None:
            return
        replay.outcome = outcome
        if outcome not in ("ok", "partial"):
            error_type = None if failure is None else failure.error_type
            retry_after = None if failure is None else failure.retry_after
            replay.cause = self._cause(error_type or outcome, error, retry_after)
            return
        if self._too_many:
            replay.cause = self._cause_of_too_many()
            return
        from periscope_otel.dead_letter.store import payload_identity

        letters = self._item_letters()
        again = [one for one in letters if payload_identity(one) == replay.identity]
        if again:
            replay.cause = self._held[letters.index(again[0])].cause
        self._add([one for one in letters if one not in again])

    def _put_payload(self, cause: Cause) -> None:
        from periscope_otel.dead_letter.draft import letter_of

        letter = letter_of(
            self._origin(), self._payload.encoded(), cause, tlp=self._payload.marking(),
            letter_id=self._id(), key=self._payload.given_key(),
        )  # fmt: skip
        self._payload_told = letter.replayable
        self._add([letter])

    def _put_items(self) -> None:
        letters = self._item_letters()
        self._add(letters)
        with self._holding:
            self._spilt += len(letters)

    def _item_letters(self) -> list[Letter]:
        return self._letters_of(self._held, self._spilt)

    def _letters_of(self, items: Sequence[_FailedItem], first: int) -> list[Letter]:
        from periscope_otel.dead_letter.draft import letter_of

        origin, batch = self._origin(), self._id()
        return [
            letter_of(
                origin, one.encoded, one.cause, tlp=one.tlp,
                batch_id=batch, item_index=first + index,
            )
            for index, one in enumerate(items)
        ]  # fmt: skip

    def _add(self, letters: Sequence[Letter]) -> None:
        """Have letters written once the operation has settled; the span names them."""
        self._ready += letters
        if not letters or not self.span.is_recording():
            return
        for letter in letters[:_ITEM_EVENTS]:
            self.span.add_event(
                names.DEAD_LETTER_EVENT,
                {names.DEAD_LETTER_ID: letter.id, names.DEAD_LETTER_QUEUE: letter.queue},
            )
        attributes: dict[str, AttributeValue] = {
            names.DEAD_LETTER_COUNT: self._spilt + len(self._ready)
        }
        self.span.set_attributes(attributes)

    def _hold(self, item: object, error: BaseException | None) -> None:
        from periscope_otel.dead_letter.codecs import encode_item
        from periscope_otel.dead_letter.tlp import tlp_of
        from periscope_otel.failure import classify

        failure = None if error is None else classify(error)
        cause = self._cause(
            None if failure is None else failure.error_type,
            error,
            None if failure is None else failure.retry_after,
        )
        held = _FailedItem(encode_item(item), cause, tlp_of(item))
        if not self._is_ours:  # nor may its lock be taken, which a thread of the parent may have
            put(self._letters_of([held], 0))
            return
        with self._holding:
            late, first = self._closed, self._spilt
            spilt = [held] if late else self._make_room(len(held.encoded.payload))
            self._spilt += len(spilt)
            if not late:
                self._held.append(held)
        if not spilt or (late and self._payload_told):
            return
        if late or not self._payload_can_stand_for_items():
            self._spill(self._letters_of(spilt, first))

    def _make_room(self, size: int) -> Sequence[_FailedItem]:
        """Return what can no longer be held with one more item; mostly nothing."""
        self._held_bytes += size
        within = len(self._held) < MOST_HELD and self._held_bytes <= MOST_BYTES_HELD
        if within or not self._held:
            return ()
        held, self._held, self._held_bytes = self._held, [], size
        return held

    def _payload_can_stand_for_items(self) -> bool:
        """Whether the payload becomes the letter of all failed items; noted if so."""
        if self._policy.items or self._payload.is_of_a_block:
            return False  # they will be letters in any case
        if self._payload.encoded().not_replayable_because is not None:
            return False
        with self._holding:
            if self._closed:
                return self._payload_told
            self._too_many = True
        return True

    def _spill(self, letters: Sequence[Letter]) -> None:
        """Write letters before the operation has settled, or after."""
        if not self.in_coroutine:
            put(letters)
            return
        if sum(not one.done() for one in self._spills) >= _MOST_SPILLS:
            put(letters)  # it fails faster than the disk takes it
            return
        future = submit(lambda: put_contained(letters))
        if future is not None:
            self._spills.append(future)

    def _cause(self, error_type: str | None, error: object, retry_after: float | None) -> Cause:
        from periscope_otel.dead_letter.draft import cause_of

        return cause_of(self.name, error_type, error, retry_after)

    def _origin(self) -> Origin:
        from periscope_otel.dead_letter.draft import Origin

        carried = {
            name: redact(clean_name(value, _LONGEST_HEADER))
            for name in in_use.usable.headers
            if (value := baggage.get_baggage(name, self.context)) is not None
        }
        return Origin(
            self.name, self.feed, self._policy.queue, self.span.get_span_context(), carried,
            self.attempts,
        )  # fmt: skip

    def _id(self) -> str:
        if self._letter_id is None:
            from periscope_otel.dead_letter.draft import letter_ids

            self._letter_id = letter_ids.new()
        return self._letter_id

    # The journal, and writing.

    def _journal_letter(self) -> Letter | None:
        from periscope_otel.dead_letter.draft import letter_of

        if not in_use.enabled:
            return None
        return letter_of(
            self._origin(), self._payload.encoded(), None, tlp=self._payload.marking(),
            letter_id=self._id(), key=self._payload.given_key(),
        )  # fmt: skip

    def _write_journal(self, letter: Letter | None) -> None:
        if letter is None:
            return
        with guard.contained("journal"):
            box = in_use.box()
            kept = box.journal(letter)
            with self._holding:
                self._in_journal = kept
                late = self._closed
            if late:  # cancelled meanwhile, and settled with a letter of its own
                box.forget([letter.id])

    def _leave_journal(self) -> None:
        if self._in_journal:
            self._done_with.append(self._id())

    def _deliver(self) -> None:
        """Write everything that is ready, and wait for what is on its way."""
        with self._holding:
            letters, self._ready = self._ready, []
            done_with, self._done_with = self._done_with, []
            spills, self._spills = self._spills, []
        for spill in spills:
            spill.exception()
        put_contained(letters, journalled=self._was_journalled)
        if done_with:
            with guard.contained("journal"):
                in_use.box().forget(done_with)
