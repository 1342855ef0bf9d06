"""Label sets and their bound: which operation and feed a figure is counted under.

An instrument may have only so many label sets. Beyond the limit values become `other`, the most
specific first: the error type or skip reason, then the feed, then the operation. The SDK has a
limit of its own (2,000 sets), but what it collects beyond it loses every label.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from periscope_otel import guard
from periscope_otel.telemetry import names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableMapping

LABEL_LIMIT = 1500
"""Label sets an instrument may have before values become `other`."""

_RESERVE = 400
"""Label sets beyond the limit, kept free for those in which a value has become `other`."""


class Series:
    """One operation and feed: the part that all their label sets share."""

    __slots__ = ("feed", "last_item", "last_success", "operation")

    def __init__(self, operation: str, feed: str | None) -> None:
        self.operation = operation
        self.feed = feed
        self.last_success = 0.0
        self.last_item = 0.0

    def attributes(self) -> dict[str, str]:
        """Return the labels of this series; an unknown feed is left out."""
        if self.feed is None:
            return {names.OPERATION_NAME: self.operation}
        return {names.OPERATION_NAME: self.operation, names.FEED_NAME: self.feed}


LabelSet: TypeAlias = tuple[Series, str, str | None]
"""A series, an outcome, and the error type or skip reason: the labels of one point."""

_Key = TypeVar("_Key")


class LabelSets:
    """The label sets of one process, admitted within their limit.

    Args:
        limit: Label sets an instrument may have before values become `other`; 1 to 1,500.
    """

    def __init__(self, limit: int = LABEL_LIMIT) -> None:
        self.limit = limit
        self.by_name: dict[tuple[str, str | None], Series] = {}
        self._lock = threading.Lock()

    def series(self, operation: str, feed: str | None) -> Series:
        """Return the series of an operation and feed, a new one while there is room."""
        return self.by_name.get((operation, feed)) or self._new_series(operation, feed)

    def admit(self, table: MutableMapping[LabelSet, int], labels: LabelSet) -> LabelSet:
        """Return the label set that `labels` is counted under in `table`, and enter it there.

        Args:
            table: The label sets that the instrument has, each with its count.
            labels: The label set that is wanted.
        """
        if labels in table:
            return labels
        with self._lock:
            admitted = self._first_with_room(table, self._label_fallbacks(labels))
            table.setdefault(admitted, 0)
        self._warn_when_other(admitted == labels)
        return admitted

    def _new_series(self, operation: str, feed: str | None) -> Series:
        with self._lock:
            key = self._first_with_room(self.by_name, _name_fallbacks(operation, feed))
            series = self._enter(key)
        self._warn_when_other(key == (operation, feed))
        return series

    def _label_fallbacks(self, labels: LabelSet) -> Iterator[LabelSet]:
        series, outcome, detail = labels
        yield labels
        detail = None if detail is None else names.OTHER
        yield series, outcome, detail
        key = self._first_with_room(self.by_name, _name_fallbacks(series.operation, names.OTHER))
        yield self._enter(key), outcome, detail
        yield self._enter((names.OTHER, names.OTHER)), outcome, detail

    def _enter(self, key: tuple[str, str | None]) -> Series:
        return self.by_name.get(key) or self.by_name.setdefault(key, Series(*key))

    def _first_with_room(self, table: Mapping[_Key, object], wanted: Iterator[_Key]) -> _Key:
        """Return the first of `wanted` that is known or fits, else the last."""
        key = next(wanted)
        room = self.limit
        while key not in table and len(table) >= room:
            following = next(wanted, None)
            if following is None:
                break
            key = following
            room = min(room + _RESERVE // 2, self.limit + _RESERVE)
        return key

    def _warn_when_other(self, admitted: bool) -> None:
        if not admitted:
            guard.warn(
                "label limit",
                "more than %d label sets: further error types, skip reasons and feeds are counted "
                "as %r (spans keep their own); is an operation or feed named after an item?",
                self.limit,
                names.OTHER,
            )


def _name_fallbacks(operation: str, feed: str | None) -> Iterator[tuple[str, str | None]]:
    yield operation, feed
    yield operation, names.OTHER
    yield names.OTHER, names.OTHER
