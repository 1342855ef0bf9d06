"""Where the servers come from: PATH if what is there fits, else what was built; or why not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parent / "build.sh"
TOOLS = ("bash", "sh", "dirname", "sed", "sort", "head", "grep", "cut", "cat", "git", "tail")
"""What the script itself needs; a PATH of its own keeps the system's servers and its Go out."""


def put(folder: Path, name: str, says: str) -> str:
    """Put a server on a PATH of its own that only knows its version and components."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


def listed(folder: Path, *options: str) -> tuple[int, dict[str, str], str]:
    """Run build.sh with a PATH and an empty cache; returns its exit code, servers and complaint."""
    tools = folder / "tools"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(shutil.which(tool) or "")
    path = f"{folder}:{tools}"
    done = subprocess.run(
        ["bash", str(BUILD), *options],
        env={"PATH": path, "HOME": str(folder), "PERISCOPE_STACK_CACHE": str(folder / "cache")},
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


def test_a_folder_on_path_may_have_a_space(tmp_path: Path) -> None:
    """Names of folders are taken as they are."""
    spaced = tmp_path / "my servers"
    spaced.mkdir()
    path = put(spaced, "prometheus", "prometheus, version 3.12.0")
    assert listed(spaced, "--list", "prometheus")[:2] == (0, {"prometheus": path})


def test_only_the_servers_that_are_named_count(tmp_path: Path) -> None:
    """What is not asked for is not missing."""
    path = put(tmp_path, "jaeger", '{"gitVersion":"v2.1.0"}')
    assert listed(tmp_path, "--list", "jaeger") == (0, {"jaeger": path}, "")


def test_without_go_it_says_what_is_needed(tmp_path: Path) -> None:
    """Nothing is built, the exit code is 69, and one line says which Go would do."""
    code, servers, complaint = listed(tmp_path)
    assert (code, servers) == (69, {})
    assert "need Go 1." in complaint
    assert complaint.count("\n") == 1
