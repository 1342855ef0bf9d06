"""The `periscope` command."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from periscope_otel.cli import breaker, dlq
from periscope_otel.cli.doctor import EXIT_CODES, doctor
from periscope_otel.settings import SETTINGS, SettingsError, load
from periscope_otel.version import __version__

app = typer.Typer(
    help="OpenTelemetry instrumentation for threat-intelligence ingest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(dlq.app, name="dlq")
app.add_typer(breaker.app, name="breaker")
app.command(epilog=EXIT_CODES)(doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"periscope-otel {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
def settings() -> None:
    """Print every setting: its variable, its value here and what it means."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from periscope_otel.telemetry.attributes import clean_label

    try:
        values = load({})
    except SettingsError as error:
        typer.echo(f"periscope: {error}", err=True)
        raise typer.Exit(2) from None
    table = Table("variable", "value", "from", "meaning")
    for setting, value in zip(SETTINGS, values, strict=True):
        source = "environment" if os.environ.get(setting.variable, "").strip() else "default"
        shown = "" if value is None else clean_label(str(value))
        table.add_row(
            *(Text(cell) for cell in (setting.variable, shown, source, setting.description))
        )
    Console().print(table)
