"""The item ledger: what became of every item that an operation received.

`received = ingested + skipped + failed + unaccounted`. A ledger belongs to one operation and does
not roll up. Where `received` was never called it is inferred from the rest; where more settled
than was received, the excess is reported and nothing is taken back.
"""

from __future__ import annotations

import operator
import threading
from typing import TYPE_CHECKING, NamedTuple

from periscope_otel import guard
from periscope_otel.telemetry.attributes import clean_label

if TYPE_CHECKING:
    from periscope_otel.telemetry.instruments import Instruments
    from periscope_otel.telemetry.series import Series

INGESTED = "ingested"
SKIPPED = "skipped"
FAILED = "failed"
UNACCOUNTED = "unaccounted"

RETRIED = "retried"
"""Why items are skipped that a failed attempt received and did not settle."""

MOST_ITEMS = 10**12
"""Items that one call may count: a larger number is a mistake, and metrics are 64 bits wide."""


class ItemAccount(NamedTuple):
    """How an operation's items add up."""

    received: int = 0
    converted: int = 0
    ingested: int = 0
    skipped: int = 0
    failed: int = 0
    unaccounted: int = 0
    excess: int = 0
    """Items settled beyond those received."""


class ItemLedger:
    """Counts one operation's items; exact when several threads count at once.

    Args:
        instruments: Where the counts go as they come; None without telemetry.
        series: The operation and feed that they are counted under.
    """

    def __init__(self, instruments: Instruments | None, series: Series | None) -> None:
        self._instruments = instruments
        self._series = series
        self._lock = threading.Lock()
        self._closed = False
        self._received: int | None = None
        self._received_before = self._settled_before = 0  # in attempts before this one
        self._converted = 0
        self._settled = {INGESTED: 0, SKIPPED: 0, FAILED: 0, UNACCOUNTED: 0}

    def receive(self, count: int) -> None:
        """Add `count` received items."""
        count = _checked(count, "received")
        with self._lock:
            if not self._closed:
                self._received = (self._received or 0) + count
            late = self._closed
        if late:
            _warn_late("received", count)
        elif self._instruments is not None and self._series is not None:
            self._instruments.count_items(self._series, received=count)

    def convert(self, count: int) -> None:
        """Add `count` converted items; conversion is a step, not an end, so it settles nothing."""
        count = _checked(count, "converted")
        with self._lock:
            if not self._closed:
                self._converted += count
            late = self._closed
        if late:
            _warn_late("converted", count)
        elif self._instruments is not None and self._series is not None:
            self._instruments.count_items(self._series, converted=count)

    def settle(self, outcome: str, count: int, reason: str | None = None) -> None:
        """Add `count` items that ended as `outcome`: ingested, skipped (for a reason) or failed."""
        count = _checked(count, outcome)
        with self._lock:
            if not self._closed:
                self._settled[outcome] += count
            late = self._closed
        if late:
            _warn_late(outcome, count)
        else:
            self._emit_settled(outcome, count, reason)

    def begin_again(self) -> int:
        """Skip the items that a failed attempt has left: the next one receives them again.

        Returns:
            How many items have failed so far.
        """
        with self._lock:
            failed = self._settled[FAILED]
            if self._closed:
                return failed
            inferred, left = self._balance()
            self._settled[SKIPPED] += left
            self._received_before += self._received or 0
            self._settled_before = self._settled_sum()
            self._received = None
        self._emit_received(inferred)
        self._emit_settled(SKIPPED, left, RETRIED)
        return failed

    def close(self) -> ItemAccount:
        """End the account: infer what was received, or count what is unaccounted for.

        Items counted later would be counted twice (they are unaccounted already): they are
        refused with a warning.
        """
        with self._lock:
            if self._closed:
                return self._account()
            self._closed = True
            inferred, unaccounted = self._balance()
            self._settled[UNACCOUNTED] = unaccounted
            account = self._account()
        self._emit_received(inferred)
        self._emit_settled(UNACCOUNTED, unaccounted, None)
        return account

    def _balance(self) -> tuple[int, int]:
        """Return how many items of this attempt were received unsaid, and how many are left."""
        settled = self._settled_sum() - self._settled_before
        inferred = 0
        if self._received is None:
            inferred = self._received = settled
        return inferred, max(0, self._received - settled)

    def account(self) -> ItemAccount:
        """Return how the items add up so far."""
        with self._lock:
            return self._account()

    def _account(self) -> ItemAccount:
        settled = self._settled
        received = self._received_before + (self._received or 0)
        return ItemAccount(
            received=received,
            converted=self._converted,
            ingested=settled[INGESTED],
            skipped=settled[SKIPPED],
            failed=settled[FAILED],
            unaccounted=settled[UNACCOUNTED],
            excess=max(0, self._settled_sum() - received) if self._closed else 0,
        )

    def _settled_sum(self) -> int:
        return sum(self._settled.values())

    def _emit_received(self, count: int) -> None:
        if count and self._instruments is not None and self._series is not None:
            self._instruments.count_items(self._series, received=count)

    def _emit_settled(self, outcome: str, count: int, reason: str | None) -> None:
        if count and self._instruments is not None and self._series is not None:
            reason = None if reason is None else clean_label(reason) or None
            self._instruments.settle_items(self._series, outcome, count, reason)


class _ClosedLedger(ItemLedger):
    """The ledger of operations that settled without one, and of those of a forked child's parent.

    It takes no lock: the child may have inherited any lock taken.
    """

    def receive(self, count: int) -> None:
        _warn_late("received", _checked(count, "received"))

    def convert(self, count: int) -> None:
        _warn_late("converted", _checked(count, "converted"))

    def settle(self, outcome: str, count: int, reason: str | None = None) -> None:  # noqa: ARG002
        _warn_late(outcome, _checked(count, outcome))

    def close(self) -> ItemAccount:
        return ItemAccount()

    account = close


CLOSED_LEDGER = _ClosedLedger(None, None)
"""Refuses what is counted too late or in the wrong process."""


def _checked(count: int, what: str) -> int:
    """Return `count` if it is a number of items, else 0: counting must not break an ingest."""
    try:
        number = operator.index(count)
    except Exception:  # noqa: BLE001  (any object may have been passed)
        number = -1
    if 0 <= number <= MOST_ITEMS:
        return number
    guard.warn(
        "item count",
        "%s(%s): an item count is a whole number from 0 to %d; nothing is counted",
        what,
        type(count).__name__ if number < 0 else "too many",
        MOST_ITEMS,
    )
    return 0


def _warn_late(what: str, count: int) -> None:
    guard.warn(
        "late items",
        "%d items were counted as %s after their operation had settled, or in a forked child of "
        "its process: they are left out. Count inside the operation, in the process that began it",
        count,
        what,
    )
