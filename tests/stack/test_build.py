"""Where the servers come from: PATH if what is there fits, else what was built; or why not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parent / "build.sh"
TOOLS = "/usr/bin:/bin"
"""Where bash's helpers are; a Go of the system's may be there too."""


def put(folder: Path, name: str, says: str) -> str:
    """Put a server on a PATH of its own that only knows its version and components."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


def listed(folder: Path, *options: str) -> tuple[int, dict[str, str], str]:
    """Run build.sh with a PATH and an empty cache; returns its exit code, servers and complaint."""
    done = subprocess.run(
        ["bash", str(BUILD), *options],
        env={
            "PATH": f"{folder}:{TOOLS}",
            "HOME": str(folder),
            "PERISCOPE_STACK_CACHE": str(folder),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, dict(line.split("\t") for line in done.stdout.splitlines()), done.stderr


@pytest.mark.parametrize(
    ("name", "says", "fits"),
    [
        ("prometheus", "prometheus, version 3.11.0 (branch: HEAD)", True),
        ("prometheus", "prometheus, version 2.42.0+ds (branch: debian/sid)", False),
        ("prometheus", "prometheus, version 3.9.1", False),
        ("jaeger", '{"gitVersion":"v2.19.0"}', True),
        ("jaeger", '{"gitVersion":"v1.62.0"}', False),
        ("otelcol", "otelcol version 0.160.1 with file_storage", True),
        ("otelcol", "otelcol version 0.160.1, the core alone", False),
        ("otelcol", "otelcol version 0.143.0 with file_storage", False),
        ("otelcol", "no version", False),
    ],
)
def test_a_server_on_path_is_used_if_it_fits(
    tmp_path: Path, name: str, says: str, fits: bool
) -> None:
    """It has to be new enough for the configurations, and hold what they name."""
    path = put(tmp_path, name, says)
    code, servers, complaint = listed(tmp_path, "--list")
    assert servers == ({name: path} if fits else {})
    assert code == 69
    assert "missing: " in complaint


def test_a_collector_with_the_contrib_components_goes_by_its_own_name(tmp_path: Path) -> None:
    """`otelcol-contrib` is a Collector as well."""
    path = put(tmp_path, "otelcol-contrib", "otelcol-contrib version 0.159.0 with file_storage")
    assert listed(tmp_path, "--list")[1] == {"otelcol": path}


def test_without_go_it_says_what_is_needed(tmp_path: Path) -> None:
    """Nothing is built, the exit code is 69, and one line says which Go would do."""
    if os.access("/usr/bin/go", os.X_OK):
        put(tmp_path, "go", "go version")  # an old one says no more than that
    code, servers, complaint = listed(tmp_path)
    assert (code, servers) == (69, {})
    assert "need Go 1." in complaint
    assert complaint.count("\n") == 1
