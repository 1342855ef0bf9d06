"""Where the telemetry went: what the end of a process says in one line."""

from __future__ import annotations

from typing import NamedTuple


class SignalReport(NamedTuple):
    """One signal on its way to one destination."""

    signal: str
    """`spans` or `metric points`."""
    destination: str
    exported: int
    failed: int
    dropped: int
    waiting: int
    """Not yet sent when the time was up."""

    @property
    def lost(self) -> int:
        """How many did not get out."""
        return self.failed + self.dropped + self.waiting


class ExportReport(NamedTuple):
    """All signals of a process."""

    signals: tuple[SignalReport, ...]
    in_time: bool
    """Whether everything was dealt with before the time was up."""

    @property
    def complete(self) -> bool:
        """Whether nothing was lost."""
        return self.in_time and not any(signal.lost for signal in self.signals)

    def line(self) -> str:
        """Return the report in one line."""
        if not self.signals and not self.in_time:
            return "periscope-otel: the application's own providers were not flushed in time"
        if not self.signals:
            return "periscope-otel: no exporter is configured; nothing was exported"
        exported = ", ".join(
            f"{one.exported} {one.signal} to {one.destination}" for one in self.signals
        )
        lost = [_loss(one) for one in self.signals if one.lost]
        if not lost and not self.in_time:
            lost = ["some metrics"]
        told = f"NOT exported: {'; '.join(lost)}" if lost else "nothing was left"
        return f"periscope-otel: exported {exported}; {told}"


def _loss(signal: SignalReport) -> str:
    causes = (
        (signal.failed, "refused or unanswered"),
        (signal.dropped, "dropped by a full queue"),
        (signal.waiting, "still waiting when the time was up"),
    )
    told = ", ".join(f"{count} {cause}" for count, cause in causes if count)
    return f"{signal.lost} {signal.signal} ({told})"
