"""The built packages: what a user gets from an index, in an environment with nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SMOKE = """
import periscope_otel as periscope
from periscope_otel.testing import capture_telemetry

@periscope.monitored("fetch", feed="urlhaus")
def fetch():
    periscope.current_operation().ingested(2)

with capture_telemetry() as captured:
    fetch()
assert captured.operation("fetch").items.received == 2
runtime = periscope.configure(prometheus="127.0.0.1:0")
assert periscope.shutdown().complete
print(periscope.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("COV", "COVERAGE", "PYTHON"))
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.mark.timeout(400)
def test_the_wheel_works_in_a_clean_environment(built: Path, tmp_path: Path) -> None:
    """Installed from the wheel alone it imports, records, serves and has its command."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    assert "site-packages" in run(python, "-c", SMOKE, cwd=tmp_path)
    version = run(tmp_path / "env" / "bin" / "periscope", "--version", cwd=tmp_path)
    assert version.startswith("periscope-otel ")


def test_the_wheel_holds_the_package_alone(built: Path) -> None:
    """The wheel has the typed package, its licence and entry points, and no tests or examples."""
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "periscope_otel/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"periscope_otel"}


def test_the_sdist_holds_what_the_tests_need(built: Path) -> None:
    """The sdist has the sources, the tests, the examples and the texts."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "tests/run"} <= names
    assert "examples/data/ics-attack-18.1.json" in names
