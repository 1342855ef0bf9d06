"""The settings and the OpenTelemetry packages, as the environment gives them."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING, Final

from periscope_otel.doctor.finding import bounded, broken, off, ok, warning
from periscope_otel.settings import SETTINGS, read_environment, unknown_variables
from periscope_otel.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from periscope_otel.doctor.finding import Finding

_SELECTORS: Final = (
    ("opentelemetry_distro", "OTEL_PYTHON_DISTRO"),
    ("opentelemetry_configurator", "OTEL_PYTHON_CONFIGURATOR"),
)
_TRUE: Final = "true"


def settings_findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Say which settings are made, which cannot be read, and which are none."""
    _, unreadable = read_environment(environment)
    yield from bounded([
        broken("settings.values", str(error), "correct the variable, or unset it")
        for error in unreadable
    ])  # fmt: skip
    if not unreadable:
        made = [one.variable for one in SETTINGS if environment.get(one.variable, "").strip()]
        told = f"{len(made)} of {len(SETTINGS)} are set"
        yield ok("settings.values", f"{told}: {', '.join(made)}" if made else told)
    yield from bounded([
        warning(
            "settings.unknown",
            f"{variable} is no setting",
            f"did you mean {near}?" if near else "`periscope settings` lists those that there are",
        )
        for variable, near in unknown_variables(environment)
    ])  # fmt: skip


def sdk_findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Say which packages there are, and whether they fit each other."""
    api, sdk = _version_of("opentelemetry-api"), _version_of("opentelemetry-sdk")
    found = (
        f"periscope-otel {__version__}, opentelemetry-sdk {sdk}, "
        f"{platform.python_implementation()} {platform.python_version()} on {sys.platform}"
    )
    if api == sdk:
        yield ok("sdk.versions", found)
    else:
        yield warning(
            "sdk.versions",
            f"{found}, but opentelemetry-api {api}",
            "install the API and the SDK in the same version",
        )
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == _TRUE:
        yield warning(
            "sdk.disabled",
            "OTEL_SDK_DISABLED is true: nothing is recorded or exported",
            "unset OTEL_SDK_DISABLED",
        )
    yield from _rivals(environment)
    if hasattr(os, "register_at_fork"):
        yield ok("sdk.fork", "forked children get a MeterProvider of their own")
    else:
        yield off("sdk.fork", "this platform does not fork")


def _rivals(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Say whether several packages want to set providers under `opentelemetry-instrument`."""
    for group, selector in _SELECTORS:
        names = {one.dist.name for one in entry_points(group=group) if one.dist is not None}
        if len(names) > 1 and not environment.get(selector, "").strip():
            yield warning(
                "sdk.distros",
                f"{', '.join(sorted(names))} each provide an {group}: which one sets the providers "
                "is chance",
                f"say which one by {selector}, or uninstall the others",
            )


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
