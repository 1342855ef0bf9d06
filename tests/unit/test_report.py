"""The contracts of the export report: one line that says what was exported and what was not."""

from __future__ import annotations

import pytest

from periscope_otel.report import ExportReport, SignalReport

SPANS = SignalReport("spans", "http://collector:4318", 120, 0, 0, 0)
POINTS = SignalReport("metric points", "http://collector:4318", 34, 0, 0, 0)


def test_complete_report():
    """Where everything got out the line says how much, to where, and that nothing was left."""
    report = ExportReport((SPANS, POINTS), in_time=True)
    assert report.complete
    line = report.line()
    assert line.startswith("periscope-otel: ")
    assert "120 spans to http://collector:4318" in line
    assert "34 metric points to http://collector:4318" in line
    assert "nothing was left" in line
    assert "NOT" not in line


@pytest.mark.parametrize(
    ("counts", "lost", "cause"),
    [
        ((1, 7, 0, 0), 7, "7 refused or unanswered"),
        ((1, 0, 8, 0), 8, "8 dropped by a full queue"),
        ((1, 0, 0, 9), 9, "9 still waiting when the time was up"),
    ],
)
def test_each_kind_of_loss_is_told(counts, lost, cause):
    """Every span that did not get out is in the line, with the reason."""
    signal = SignalReport("spans", "here", *counts)
    report = ExportReport((signal, POINTS), in_time=True)
    assert signal.lost == lost
    assert not report.complete
    assert f"NOT exported: {lost} spans ({cause})" in report.line()
    assert "nothing was left" not in report.line()


def test_all_losses_are_told():
    """Several reasons and several destinations are all in the one line."""
    one = SignalReport("spans", "a", 1, 2, 3, 4)
    other = SignalReport("metric points", "b", 0, 5, 0, 0)
    line = ExportReport((one, other), in_time=False).line()
    assert "9 spans" in line
    assert "5 metric points" in line
    for count in (2, 3, 4):
        assert f"{count} " in line
    assert "\n" not in line


def test_time_that_was_up_is_told():
    """A report that was not in time is not complete, also where no count shows a loss."""
    report = ExportReport((SPANS, POINTS), in_time=False)
    assert not report.complete
    assert "NOT exported" in report.line()
    assert "nothing was left" not in report.line()


def test_report_without_exporters():
    """Without an exporter the line says that nothing was exported, and nothing was lost."""
    report = ExportReport((), in_time=True)
    assert report.complete
    assert report.line() == "periscope-otel: no exporter is configured; nothing was exported"


def test_nothing_exported_is_no_loss():
    """Zero of everything is complete."""
    report = ExportReport((SignalReport("spans", "here", 0, 0, 0, 0),), in_time=True)
    assert report.complete
    assert "0 spans to here" in report.line()
