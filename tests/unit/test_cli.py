"""The contracts of the `periscope` command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from periscope_otel import __version__
from periscope_otel.cli import app
from periscope_otel.settings import SETTINGS

CLEAN = {name: None for name in os.environ if name.startswith("PERISCOPE_")}


def run(*arguments: str, **environment: str):
    return CliRunner().invoke(
        app, arguments, env={**CLEAN, "COLUMNS": "200", "TERM": "dumb", **environment}
    )


def test_version():
    """`periscope --version` prints name and version and exits with 0."""
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"periscope-otel {__version__}\n")


def test_without_a_command_it_shows_help():
    """`periscope` alone shows what there is, and fails as a command line that is not complete."""
    result = run()
    assert "settings" in result.output
    assert result.exit_code in (0, 2)


def test_unknown_command_is_an_error():
    """An unknown command exits with 2."""
    assert run("no-such-command").exit_code == 2


def test_settings_shows_every_setting():
    """`periscope settings` prints each setting's variable and where its value is from."""
    result = run("settings")
    assert result.exit_code == 0
    for setting in SETTINGS:
        assert setting.variable in result.output
    assert "1500" in result.output
    assert "environment" not in result.output


def test_settings_shows_the_environments_values():
    """A value from the environment is shown, and that it comes from there."""
    result = run("settings", PERISCOPE_LABEL_LIMIT="77", PERISCOPE_PROMETHEUS="true")
    assert result.exit_code == 0
    (line,) = [one for one in result.output.splitlines() if "PERISCOPE_LABEL_LIMIT" in one]
    assert "77" in line
    assert "environment" in line
    assert "127.0.0.1:9464" in result.output


def test_settings_with_a_bad_value_is_one_line_and_status_2():
    """A setting that does not fit is one clear line on standard error and exit code 2."""
    result = run("settings", PERISCOPE_LABEL_LIMIT="many")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "PERISCOPE_LABEL_LIMIT='many'" in result.stderr
    assert "whole number" in result.stderr


@pytest.mark.parametrize("value", ["[bold]feeds[/bold]", "[/nope]", "[link=http://x]y", "a\\[b"])
def test_settings_shows_markup_as_text(value):
    """A value that looks like Rich markup is shown as it is."""
    result = run("settings", PERISCOPE_SERVICE_NAME=value)
    assert result.exception is None
    assert value in result.output


def test_settings_shows_no_escape():
    """A value with terminal escapes does nothing to the terminal."""
    result = run("settings", PERISCOPE_SERVICE_NAME="\x1b[2Jfeeds\x1b]0;title\x07")
    assert result.exit_code == 0
    assert "\x1b[2J" not in result.output
    assert "\x07" not in result.output


def test_settings_shows_no_secret():
    """Credentials in an endpoint are not shown; the host is."""
    result = run("settings", PERISCOPE_OTLP_ENDPOINT="http://bob:hunter2Qx9@collector.example:4318")
    assert result.exit_code == 0
    assert "hunter2Qx9" not in result.output
    assert "collector.example" in result.output


def test_command_is_installed():
    """The distribution installs the command under the name `periscope`."""
    code = (
        "from importlib.metadata import entry_points\n"
        "(one,) = entry_points(group='console_scripts', name='periscope')\n"
        "one.load()(['--version'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == f"periscope-otel {__version__}\n", done.stderr
