"""The contracts of `periscope breaker` that need no server."""

from __future__ import annotations

import os

import pytest
from typer.testing import CliRunner

from periscope_otel.cli import app
from periscope_otel.cli import breaker_view as view
from periscope_otel.resilience.policy import STATES
from periscope_otel.resilience.sharing.records import Event, Record

CLEAN = {name: None for name in os.environ if name.startswith("PERISCOPE_")}
NOW = 1_800_000_000.0
ACTS = "\x1b[2J\x1b]0;title\x07\u202e\u200b\r"


def a_row(name: str = "urlhaus.abuse.ch", probes: int = 0, **fields) -> view.Row:
    given = {
        "state": "open", "generation": 3, "epoch": "0123456789abcdef", "open_for": 24.4,
        "reason": "consecutive_failures", "openings": 2, "successes": 0, "changed": NOW - 90,
    }  # fmt: skip
    return view.Row(name, Record(**(given | fields)), probes)


def listed(*rows: view.Row, width: int = 80) -> list[str]:
    return [line.plain.rstrip() for line in view.list_lines(list(rows), width, lambda: NOW)]


def run(*arguments: str, **environment: str):
    result = CliRunner().invoke(app, ["breaker", *arguments], env={**CLEAN, **environment})
    assert result.exception is None or isinstance(result.exception, SystemExit), result
    return result


def test_a_list_has_a_line_for_each():
    """Name, state, seconds left, openings, probes out, last change and reason in 80 columns."""
    half_open = a_row("b.example", 1, state="half_open", open_for=0.0)
    assert listed(a_row("a.example"), half_open) == [
        "name       state        left  times  out  ago   reason",
        "a.example  open         24s   2      -    1m    consecutive_failures",
        "b.example  half_open    -     2      1    1m    consecutive_failures",
    ]


def test_a_list_with_long_names_has_two():
    """No name is cut, and no line of figures is wider than the terminal."""
    name = "a-rather-long-name-of-a-dependency.threat-intelligence.example"
    lines = listed(a_row(name))
    assert lines[2] == name
    assert lines[3] == "  open         24s   2      -    1m    consecutive_failures"
    assert max(map(len, lines)) <= 80


def test_names_act_on_no_terminal():
    """Whatever is in a name or a reason, only text comes out."""
    for lines in (
        view.list_lines([a_row("x" + ACTS, reason="y" + ACTS)], 80, lambda: NOW),
        view.detail_lines(a_row("x" + ACTS, reason="y" + ACTS), lambda: NOW),
        view.set_lines("x" + ACTS, "closed", None),
    ):
        assert all(one.plain.isprintable() for one in lines)
    told = Event("x" + ACTS, None, "open", "y" + ACTS, 1.0, NOW, ("", 1))
    assert view.event_line(told).isprintable()


def test_the_worst_comes_first():
    """Every state has its place; names decide between equals."""
    rows = [a_row(f"{n}.example", state=state) for n, state in enumerate(STATES)]
    rows += [a_row("a.example", state="open")]
    ordered = sorted(rows, key=view.by_badness)
    assert [row.record.state for row in ordered] == [
        "forced_open", "open", "open", "half_open", "observe", "disabled", "closed",
    ]  # fmt: skip
    assert ordered[2].name == "a.example"


def test_details_tell_what_there_is():
    """And nothing of what there is not."""
    lines = [one.plain for one in view.detail_lines(a_row(), lambda: NOW)]
    assert lines == [
        "name     urlhaus.abuse.ch",
        "state    open",
        "reason   consecutive_failures",
        "left     24s",
        "opened   2 times in a row",
        "changed  2027-01-15T07:58:30Z (1m ago)",
        "record   generation 3 of 0123456789abcdef",
    ]


def test_json_has_all_fields():
    """Times are ISO 8601 in UTC, and what does not apply is null."""
    assert view.as_json(a_row(state="closed", open_for=0.0, reason="")) == {
        "name": "urlhaus.abuse.ch", "state": "closed", "reason": None, "open_for": None,
        "openings": 2, "probes": 0, "successes": 0, "changed": "2027-01-15T07:58:30Z",
        "generation": 3, "epoch": "0123456789abcdef",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            Event("a", "closed", "open", "auth", 30.0, NOW, ("", 1)),
            "2027-01-15T08:00:00Z  a  closed -> open (auth, for 30s)",
        ),
        (
            Event("a", None, "disabled", "", None, NOW, ("", 1)),
            "2027-01-15T08:00:00Z  a  new -> disabled",
        ),
    ],
)
def test_a_change_is_one_line(event, line):
    """When, which, from where to where, and why."""
    assert view.event_line(event) == line


@pytest.mark.parametrize(
    "arguments",
    [
        ("list",),
        ("list", "--redis", "http://localhost"),
        ("list", "--redis", "redis://localhost:port"),
        ("open", "\x1b[2J", "--redis", "redis://127.0.0.1:1"),
        ("show", "--redis", "redis://127.0.0.1:1"),
    ],
)
def test_a_mistake_ends_with_2(arguments):
    """And with what is wrong, in a sentence."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["list", "show x", "open x", "close x", "watch"])
def test_a_redis_that_cannot_be_reached_ends_with_3(command):
    """And its password is not told."""
    result = run(*command.split(), "--redis", "redis://:geheim@127.0.0.1:1")
    assert result.exit_code == 3
    assert "geheim" not in result.output
    assert "127.0.0.1:1" in result.output


def test_the_settings_say_which_redis():
    """Where the command line does not."""
    result = run("list", PERISCOPE_REDIS_URL="redis://127.0.0.1:1")
    assert result.exit_code == 3
