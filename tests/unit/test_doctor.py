"""What `examine()` finds without a server: settings, packages, exporters, folder and host."""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
from typing import TYPE_CHECKING, Any

import psutil
import pynvml
import pytest
from doctoring import (
    ALWAYS,
    HOSTILE,
    STATUSES,
    Told,
    checks_of,
    is_a_line,
    listing,
    told_by,
)
from opentelemetry.sdk.version import __version__ as sdk_version

from periscope_otel import __version__
from periscope_otel.dead_letter.queue import FILE, DeadLetterQueue
from periscope_otel.doctor import Diagnosis, Finding, examine
from periscope_otel.settings import load

pytest.register_assert_rewrite("store_conformance")

from store_conformance import some  # noqa: E402  (its assertions are rewritten first)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20
SECRET = "geheim-4711-Qx9"
DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, VERSION_MISMATCH = 9, 12, 18
UNPRINTABLE = "\x1b[2J\x1b]0;title\x07\r\n\u202e\u200b\x9b31m\udcff"
"""As far as a variable can have it."""


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch, tmp_path) -> None:
    for name in tuple(os.environ):
        if name.startswith(("PERISCOPE_", "OTEL_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path))
    # Servers that are not there have a second, and what asks them all the time that it needs.
    monkeypatch.setattr(sys.modules["periscope_otel.doctor.examine"], "_MORE", 300.0)


@pytest.fixture
def told(monkeypatch) -> Callable[..., Told]:
    """Return what examines this process with variables of the environment."""

    def look(**variables: str) -> Told:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return told_by(examine(timeout=1.0))

    return look


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a data directory that is as it has to be."""
    made = tmp_path / "letters"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def letters(folder) -> Path:
    """Return the file of a queue that has been closed, with three letters."""
    with DeadLetterQueue(folder) as queue:
        assert queue.put(some(3)) == "disk"
    return folder / FILE


# --- what is returned ----------------------------------------------------------------------------


def test_where_nothing_is_set_nothing_is_broken(told):
    """A machine that a program could run on as it is needs no repair."""
    found = told()
    assert checks_of(found, "broken") == []
    assert {one["check"] for one in found.findings} >= set(ALWAYS)


def test_checks_are_told_in_their_order(told, folder):
    """What a program needs first comes first, however long each takes."""
    found = told(
        PERISCOPE_LABEL_LIMIT="many",
        PERISCOPE_LABEL_LIMITS="1",
        PERISCOPE_DATA_DIR=str(folder),
        PERISCOPE_PROMETHEUS="127.0.0.1:1",
        PERISCOPE_REDIS_URL="redis://127.0.0.1:1",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1",
        OTEL_SDK_DISABLED="true",
    )
    assert found.in_order(), [one["check"] for one in found.findings]


def test_a_diagnosis_sorts_its_findings():
    """`broken` and `warnings` are those of that status in their order; `ok`: none is broken."""
    findings = tuple(
        Finding(f"check.{number}", status, "as it is", "do something")
        for number, status in enumerate(STATUSES * 2)
    )
    diagnosis = Diagnosis(findings)
    assert diagnosis.findings == findings
    assert diagnosis.broken == (findings[3], findings[7])
    assert diagnosis.warnings == (findings[2], findings[6])
    assert not diagnosis.ok
    assert Diagnosis(findings[:3]).ok
    assert Diagnosis(()).ok


def test_a_remedy_is_optional():
    """What is well needs none."""
    assert Finding("redis.reached", "off", "no Redis is configured").remedy is None


def test_settings_that_are_given_count(tmp_path, monkeypatch):
    """Instead of those of the environment."""
    monkeypatch.setenv("PERISCOPE_DATA_DIR", str(tmp_path / "other" / "place"))
    given = load({"data_dir": tmp_path / "given"}, {})
    found = told_by(examine(given, timeout=1.0))
    assert found.one("data_dir.folder")["status"] == "ok"
    assert str(tmp_path / "given") in found.one("data_dir.folder")["message"]


def test_the_environment_is_left_as_it_was(told):
    """Also the variables that cannot be read."""
    os.environ["PERISCOPE_LABEL_LIMIT"] = "many"
    try:
        before = dict(os.environ)
        told()
        assert dict(os.environ) == before
    finally:
        del os.environ["PERISCOPE_LABEL_LIMIT"]


# --- settings ------------------------------------------------------------------------------------


def test_variables_that_are_set_are_named(told):
    """All that count, and no others."""
    found = told(PERISCOPE_LABEL_LIMIT="77", PERISCOPE_SERVICE_NAME="feeds", UNRELATED="x")
    values = found.one("settings.values")
    assert values["status"] == "ok"
    assert "PERISCOPE_LABEL_LIMIT" in values["message"]
    assert "PERISCOPE_SERVICE_NAME" in values["message"]
    assert "UNRELATED" not in values["message"]


def test_each_variable_that_cannot_be_read_is_broken(told):
    """By name, with what would fit; one finding each."""
    found = told(
        PERISCOPE_LABEL_LIMIT="many", PERISCOPE_SHUTDOWN_TIMEOUT="nan", PERISCOPE_GAUGES="disk"
    )
    broken = [one for one in found.all("settings.values") if one["status"] == "broken"]
    assert len(broken) == 3
    for variable in ("PERISCOPE_LABEL_LIMIT", "PERISCOPE_SHUTDOWN_TIMEOUT", "PERISCOPE_GAUGES"):
        (one,) = (one for one in broken if variable in one["message"])
        assert one["remedy"]
    assert "whole number" in found.text("settings.values")


def test_variables_beside_one_that_cannot_be_read_are_used(told, folder):
    """And the default in the place of that one."""
    found = told(PERISCOPE_DATA_DIR=str(folder), PERISCOPE_DEAD_LETTER_FILE_LIMIT="lots")
    assert checks_of(found, "broken") == ["settings.values"]
    assert str(folder) in found.one("data_dir.folder")["message"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PERISCOPE_REDIS_URL", f"http://:{SECRET}@localhost"),
        ("PERISCOPE_REDIS_URL", f"//user:{SECRET}@localhost"),
        ("PERISCOPE_OTLP_ENDPOINT", f"ftp://bob:{SECRET}@collector.example:4318"),
        ("PERISCOPE_OTLP_ENDPOINT", f"http://bob:{SECRET}@collector.example:port"),
        ("PERISCOPE_JAEGER_URL", f"bob:{SECRET}@jaeger.example"),
        ("PERISCOPE_PROMETHEUS", f"bob:{SECRET}@127.0.0.1:9464"),
    ],
    ids=["scheme", "no scheme", "ftp", "port", "no url", "address"],
)
def test_a_value_that_cannot_be_read_tells_no_password(told, variable, value):
    """The variable is named all the same."""
    found = told(**{variable: value})
    assert checks_of(found, "broken")[0] == "settings.values"
    assert variable.lower() in found.text("settings.values")
    assert SECRET not in str(found)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("PERISCOPE_LABEL_LIMITS", "PERISCOPE_LABEL_LIMIT"),
        ("PERISCOPE_REDISURL", "PERISCOPE_REDIS_URL"),
        ("PERISCOPE_DATADIR", "PERISCOPE_DATA_DIR"),
    ],
)
def test_a_variable_that_is_no_setting_is_warned_of(told, wrong, right):
    """With the name that may have been meant."""
    found = told(**{wrong: "1"})
    unknown = found.one("settings.unknown")
    assert unknown["status"] == "warning"
    assert wrong in unknown["message"]
    assert right in f"{unknown['message']} {unknown['remedy']}".split(wrong)[-1]


def test_each_variable_that_is_no_setting_is_warned_of(told):
    """Also one that is like none there is; one finding each."""
    found = told(PERISCOPE_LABEL_LIMITS="1", PERISCOPE_ZZZZ="2")
    assert [one["status"] for one in found.all("settings.unknown")] == ["warning"] * 2
    assert "periscope_zzzz" in found.text("settings.unknown")


def test_variables_that_are_settings_are_not_warned_of(told):
    """Nor is an empty one broken: it is not set."""
    found = told(PERISCOPE_LABEL_LIMIT="7", PERISCOPE_REDIS_URL="", PERISCOPE_GAUGES=" ")
    assert found.is_well("settings.unknown")
    assert found.status_of("settings.values") == "ok"


@pytest.mark.parametrize(
    "variables",
    [
        {"PERISCOPE_LABEL_LIMIT": UNPRINTABLE},
        {"PERISCOPE_LABEL_LIMIT": "9" * 100_000},
        {"PERISCOPE_SERVICE_NAME": UNPRINTABLE * 100},
        {"PERISCOPE_DATA_DIR": f"/tmp/{UNPRINTABLE}/x"},
        {"PERISCOPE_DATA_DIR": "/tmp/" + "x" * 100_000},
        {"PERISCOPE_REDIS_URL": f"redis://{UNPRINTABLE}"},
        {"PERISCOPE_OTLP_ENDPOINT": f"http://{UNPRINTABLE}:1"},
        {"PERISCOPE_PROMETHEUS": f"{UNPRINTABLE}:1"},
        {f"PERISCOPE_{UNPRINTABLE}": UNPRINTABLE},
        {"PERISCOPE_" + "X" * 10_000: "1"},
        {"OTEL_TRACES_EXPORTER": UNPRINTABLE},
        {"OTEL_TRACES_EXPORTER": "x" * 100_000},
        {"OTEL_METRICS_EXPORTER": UNPRINTABLE},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:1/{UNPRINTABLE}"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "not a url"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://["},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:99999"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_HEADERS": "x\n="},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "y"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "soon"},
        {"OTEL_BSP_MAX_QUEUE_SIZE": "many"},
        {"OTEL_PYTHON_DISTRO": UNPRINTABLE},
        {"XDG_STATE_HOME": UNPRINTABLE},
        {"XDG_STATE_HOME": f"/tmp/{UNPRINTABLE}"},
    ],
    ids=lambda variables: "-".join(
        f"{name[:40].encode('ascii', 'ignore').decode().strip()}-{len(value)}"
        for name, value in variables.items()
    ).encode("unicode_escape").decode(),
)  # fmt: skip
def test_whatever_is_in_variables_only_lines_come_out(told, variables):
    """Each finding is one printable line of bounded length, and nothing is raised."""
    assert told(**variables).findings


# --- packages ------------------------------------------------------------------------------------


def distribution(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    """Install the metadata of a distribution into a folder."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """Return a folder in which Python looks for packages first."""
    place = tmp_path / "packages"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))
    return place


def test_versions_are_told(told):
    """Of the package, of the SDK and of Python."""
    versions = told().one("sdk.versions")
    assert versions["status"] == "ok"
    for version in (__version__, sdk_version, platform.python_version()):
        assert version in versions["message"]


def test_an_api_and_an_sdk_of_different_versions_are_warned_of(told, packages):
    """With both versions."""
    distribution(packages, "opentelemetry-api", "1.9.9")
    found = told()
    assert found.status_of("sdk.versions") == "warning"
    assert "1.9.9" in found.text("sdk.versions")
    assert sdk_version in found.text("sdk.versions")


@pytest.mark.parametrize("value", ["true", "TRUE", " true "])
def test_an_sdk_that_is_switched_off_is_warned_of(told, value):
    """By the variable that does it."""
    found = told(OTEL_SDK_DISABLED=value)
    assert found.status_of("sdk.disabled") == "warning"
    assert "otel_sdk_disabled" in found.text("sdk.disabled")


@pytest.mark.parametrize("value", [None, "", "false", "yes"])
def test_an_sdk_that_is_not_switched_off_is_not_warned_of(told, value):
    """Only `true` does it, by the specification."""
    assert told(**({} if value is None else {"OTEL_SDK_DISABLED": value})).is_well("sdk.disabled")


GROUPS = {"distro": "OTEL_PYTHON_DISTRO", "configurator": "OTEL_PYTHON_CONFIGURATOR"}


def several(packages: Path, group: str) -> None:
    for name in ("vendor-a", "vendor-b"):
        distribution(packages, name, "1.0", f"[opentelemetry_{group}]\n{name}_of = {group}:Made\n")


@pytest.mark.parametrize("group", GROUPS)
def test_several_distros_are_warned_of(told, packages, group):
    """Each by its name, with the variable that chooses one."""
    several(packages, group)
    found = told()
    assert [one["status"] for one in found.all("sdk.distros")] == ["warning"]
    for word in ("vendor-a", "vendor-b", GROUPS[group].lower()):
        assert word in found.text("sdk.distros")


@pytest.mark.parametrize("group", GROUPS)
def test_several_distros_of_which_one_is_chosen_are_fine(told, packages, group):
    """The variable says which counts."""
    several(packages, group)
    assert told(**{GROUPS[group]: "vendor-a_of"}).is_well("sdk.distros")


def test_one_distribution_with_a_distro_and_a_configurator_is_fine(told, packages):
    """They are made for each other."""
    points = "[opentelemetry_distro]\na = a:Distro\n\n[opentelemetry_configurator]\na = a:Conf\n"
    distribution(packages, "vendor-a", "1.0", points)
    assert told().is_well("sdk.distros")


def test_fork_is_told_of(told):
    """Where there is one."""
    assert told().status_of("sdk.fork") == "ok"


def test_a_platform_without_fork_needs_no_hooks(told, monkeypatch):
    """That is no fault."""
    monkeypatch.delattr(os, "fork")
    monkeypatch.delattr(os, "register_at_fork")
    assert told().status_of("sdk.fork") == "off"


# --- exporters that need no server ---------------------------------------------------------------


def test_without_exporters_nothing_goes_anywhere(told):
    """Both signals are off, and that is warned of."""
    found = told()
    assert found.status_of("traces.export") == "off"
    assert found.status_of("metrics.export") == "off"
    assert found.status_of("export.anywhere") == "warning"


@pytest.mark.parametrize("signal", ["traces", "metrics"])
def test_one_signal_that_goes_somewhere_is_enough(told, signal, capfd):
    """An exporter without a network is ok, and is not tried."""
    found = told(**{f"OTEL_{signal.upper()}_EXPORTER": "console"})
    assert found.status_of(f"{signal}.export") == "ok"
    assert "console" in found.text(f"{signal}.export")
    assert found.is_well("export.anywhere")
    assert capfd.readouterr().out == ""


def test_exporters_that_are_none_are_off(told):
    """`none` is a choice, and the warning stays."""
    found = told(OTEL_TRACES_EXPORTER="none", OTEL_METRICS_EXPORTER="none")
    assert found.status_of("traces.export") == "off"
    assert found.status_of("export.anywhere") == "warning"


def test_each_destination_has_a_finding(told, packages):
    """In the order of the variable."""
    points = "[opentelemetry_traces_exporter]\nquiet = quiet_exporter:Quiet\n"
    distribution(packages, "quiet-exporter", "1.0", points)
    (packages / "quiet_exporter.py").write_text("class Quiet:\n    pass\n")
    try:
        found = told(OTEL_TRACES_EXPORTER="quiet,console").all("traces.export")
    finally:
        sys.modules.pop("quiet_exporter", None)
    assert [one["status"] for one in found] == ["ok", "ok"]
    assert "quiet" in found[0]["message"]
    assert "console" in found[1]["message"]


def test_one_exporter_that_is_not_installed_does_not_hide_behind_another(told):
    """A program would not start with them."""
    found = told(OTEL_TRACES_EXPORTER="console,no-such-one")
    (broken,) = (one for one in found.all("traces.export") if one["status"] == "broken")
    assert "no-such-one" in broken["message"]


@pytest.mark.parametrize("signal", ["traces", "metrics"])
def test_an_exporter_that_is_not_installed_is_broken(told, signal):
    """By its name; the other signal is looked at all the same."""
    other = {"traces": "metrics", "metrics": "traces"}[signal]
    found = told(
        **{
            f"OTEL_{signal.upper()}_EXPORTER": "zipkinx",
            f"OTEL_{other.upper()}_EXPORTER": "console",
        }
    )
    assert found.status_of(f"{signal}.export") == "broken"
    assert "zipkinx" in found.text(f"{signal}.export")
    assert found.status_of(f"{other}.export") == "ok"


def test_an_exporter_whose_making_raises_is_broken(told, packages):
    """Whatever it raises: it is another's code, and its text may be anything."""
    points = "[opentelemetry_traces_exporter]\nbad = bad_exporter:bad\n"
    distribution(packages, "bad-exporter", "1.0", points)
    code = f"def bad():\n    raise RuntimeError({HOSTILE!r} * 10_000)\n"
    (packages / "bad_exporter.py").write_text(code)
    try:
        assert told(OTEL_TRACES_EXPORTER="bad").status_of("traces.export") == "broken"
    finally:
        sys.modules.pop("bad_exporter", None)


def test_a_metrics_exporter_that_cannot_be_imported_is_broken(told, packages):
    """As one that is installed in part."""
    points = "[opentelemetry_metrics_exporter]\nhalf = no_such_module_of_it:Half\n"
    distribution(packages, "half-exporter", "1.0", points)
    assert told(OTEL_METRICS_EXPORTER="half").status_of("metrics.export") == "broken"


# --- the data directory --------------------------------------------------------------------------


def test_a_folder_that_is_private_is_ok(told, folder):
    """With its path."""
    found = told(PERISCOPE_DATA_DIR=str(folder))
    assert found.status_of("data_dir.folder") == "ok"
    assert str(folder) in found.one("data_dir.folder")["message"]


def test_a_folder_that_is_not_there_yet_is_ok(told, tmp_path):
    """It will be made at first use, not now."""
    wanted = tmp_path / "later"
    found = told(PERISCOPE_DATA_DIR=str(wanted))
    assert found.status_of("data_dir.folder") == "ok"
    assert str(wanted) in found.one("data_dir.folder")["message"]
    assert found.status_of("data_dir.file") == "off"
    assert not wanted.exists()


def test_the_default_folder_is_ok_with_all_above_it_missing(told, tmp_path):
    """A new user's home has no state directory yet."""
    found = told()
    assert found.status_of("data_dir.folder") == "ok"
    assert str(tmp_path / "state") in found.one("data_dir.folder")["message"]
    assert not (tmp_path / "state").exists()


def test_a_folder_whose_parent_is_missing_is_broken(told, tmp_path):
    """A program would refuse it: a mistake, or a volume that is not mounted."""
    found = told(PERISCOPE_DATA_DIR=str(tmp_path / "no" / "such"))
    assert found.status_of("data_dir.folder") == "broken"
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("where", ["itself", "parent"])
def test_a_file_in_the_place_of_the_folder_is_broken(told, tmp_path, where):
    """Also in the place of its parent."""
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" if where == "itself" else tmp_path / "file" / "letters"
    assert told(PERISCOPE_DATA_DIR=str(path)).status_of("data_dir.folder") == "broken"


@pytest.mark.parametrize("place", ["/proc", "/proc/letters"], ids=["there", "to be made"])
@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_broken(told, place):
    """Not even by root."""
    assert told(PERISCOPE_DATA_DIR=place).status_of("data_dir.folder") == "broken"


def test_a_link_to_nowhere_is_broken(told, tmp_path):
    """It is there, and no folder can be made in its place."""
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "away")
    found = told(PERISCOPE_DATA_DIR=str(tmp_path / "link"))
    assert found.status_of("data_dir.folder") == "broken"


@pytest.mark.parametrize("there", [True, False], ids=["there", "to be made"])
def test_a_network_file_system_is_broken(told, tmp_path, folder, monkeypatch, there):
    """Its kind is named."""
    kind = psutil._ntuples.sdiskpart("server:/x", os.path.realpath(tmp_path), "nfs4", "rw")
    monkeypatch.setattr(psutil, "disk_partitions", lambda all=False: [kind])  # noqa: A006
    found = told(PERISCOPE_DATA_DIR=str(folder if there else tmp_path / "new"))
    assert found.status_of("data_dir.folder") == "broken"
    assert "nfs4" in found.text("data_dir.folder")


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o777], ids=oct)
def test_a_folder_that_others_may_read_is_warned_of(told, folder, mode):
    """And left as it is."""
    folder.chmod(mode)
    found = told(PERISCOPE_DATA_DIR=str(folder))
    assert found.status_of("data_dir.folder") == "warning"
    assert "chmod" in found.text("data_dir.folder")
    assert folder.stat().st_mode & 0o777 == mode


def test_without_dead_letters_the_folder_is_off(told, tmp_path):
    """Wherever it would be."""
    (tmp_path / "file").write_text("x")
    found = told(PERISCOPE_DEAD_LETTERS="false", PERISCOPE_DATA_DIR=str(tmp_path / "file"))
    assert found.status_of("data_dir.folder") == "off"
    assert checks_of(found, "broken") == []


@pytest.fixture
def free(monkeypatch) -> Callable[[int], None]:
    """Return what makes a disk that has so many bytes free."""
    real = os.statvfs

    def only(free: int) -> None:
        def statvfs(path: Any) -> os.statvfs_result:
            told = list(real(path))
            size = told[1] = 4096
            told[0] = size
            told[2], told[3], told[4] = 1 << 30, free // size, free // size
            return os.statvfs_result(told)

        monkeypatch.setattr(os, "statvfs", statvfs)

    return only


@pytest.mark.parametrize("there", [True, False], ids=["there", "to be made"])
@pytest.mark.parametrize(
    ("bytes_free", "limit", "status"),
    [
        (4096 * MIB, 1024 * MIB, "ok"),
        (512 * MIB, 1024 * MIB, "warning"),
        (512 * MIB, 256 * MIB, "ok"),
        (17 * MIB, 2 * MIB, "ok"),
        (15 * MIB, 2 * MIB, "broken"),
        (0, 1024 * MIB, "broken"),
    ],
)
def test_the_space_that_is_left_is_judged(  # noqa: PLR0917
    told, folder, tmp_path, free, bytes_free, limit, status, there
):
    """By what the file may still grow to; below 16 MiB nothing works."""
    free(bytes_free)
    found = told(
        PERISCOPE_DATA_DIR=str(folder if there else tmp_path / "new"),
        PERISCOPE_DEAD_LETTER_FILE_LIMIT=str(limit),
    )
    assert found.status_of("data_dir.space") == status


def test_what_the_file_has_grown_to_is_not_counted_again(told, letters, free):
    """A file that is nearly at its limit needs little more."""
    with letters.open("ab") as file:
        file.truncate(62 * MIB)
    free(20 * MIB)
    found = told(
        PERISCOPE_DATA_DIR=str(letters.parent), PERISCOPE_DEAD_LETTER_FILE_LIMIT=str(64 * MIB)
    )
    assert found.status_of("data_dir.space") == "ok"


def test_letters_that_wait_are_counted(told, letters):
    """And left alone."""
    before = listing(letters.parent)
    found = told(PERISCOPE_DATA_DIR=str(letters.parent))
    assert found.status_of("data_dir.file") == "ok"
    assert "3" in found.one("data_dir.file")["message"]
    assert listing(letters.parent) == before


def test_letters_on_their_way_to_a_redis_are_counted(told, folder):
    """They wait in the same file."""
    with DeadLetterQueue(folder, redis_url="redis://127.0.0.1:1") as queue:
        queue.put(some(4))
    found = told(PERISCOPE_DATA_DIR=str(folder), PERISCOPE_REDIS_URL="redis://127.0.0.1:1")
    assert found.status_of("data_dir.file") == "ok"
    assert "4" in found.one("data_dir.file")["message"]


def test_a_file_of_others_may_be_read_and_keeps_its_mode(told, letters):
    """Looking at it takes nothing away from anybody."""
    letters.chmod(0o644)
    before = listing(letters.parent)
    assert told(PERISCOPE_DATA_DIR=str(letters.parent)).status_of("data_dir.file") != "broken"
    assert listing(letters.parent) == before


def damaged(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 8192)


def no_database(path: Path) -> None:
    path.write_bytes(b"\x1b[2J" * 1000)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:6000])


def newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=99")
    connection.close()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_another_program(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE accounts (id INTEGER)")
    connection.close()


@pytest.mark.parametrize("harm", [damaged, no_database, cut, newer, a_folder, of_another_program])
def test_a_file_that_cannot_be_read_is_broken(told, letters, harm):
    """Whatever is in its place; it is left for somebody to look at."""
    harm(letters)
    before = listing(letters.parent)
    found = told(PERISCOPE_DATA_DIR=str(letters.parent))
    assert found.status_of("data_dir.file") == "broken"
    assert listing(letters.parent) == before


def test_a_file_of_a_newer_version_says_so(told, letters):
    """What helps is an update."""
    newer(letters)
    assert "newer" in told(PERISCOPE_DATA_DIR=str(letters.parent)).text("data_dir.file")


@pytest.fixture
def writer(letters) -> Iterator[sqlite3.Connection]:
    """Return a connection that is in the middle of writing."""
    connection = sqlite3.connect(letters, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("DELETE FROM letters")
    yield connection
    connection.execute("ROLLBACK")
    connection.close()


def test_a_file_that_is_written_to_is_read(told, letters, writer):
    """Nobody waits for anybody."""
    found = told(PERISCOPE_DATA_DIR=str(letters.parent))
    assert found.status_of("data_dir.file") == "ok"
    assert "3" in found.one("data_dir.file")["message"]


def test_an_empty_file_has_no_letters(told, folder):
    """As one that was just made."""
    (folder / FILE).touch()
    assert told(PERISCOPE_DATA_DIR=str(folder)).status_of("data_dir.file") in ("ok", "off")
    assert (folder / FILE).stat().st_size == 0


def test_a_name_with_half_characters_is_a_line(told, tmp_path):
    """File systems take any bytes."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b[2J\n")
    os.mkdir(path, 0o700)  # noqa: PTH102
    found = told(PERISCOPE_DATA_DIR=path)
    assert found.status_of("data_dir.folder") == "ok"
    assert is_a_line(found.one("data_dir.folder")["message"])


# --- the host and its GPUs -----------------------------------------------------------------------


def test_the_host_is_told_of(told):
    """How many CPUs it has, and its memory."""
    host = told().one("host.figures")
    assert host["status"] == "ok"
    assert str(os.cpu_count()) in host["message"]


@pytest.fixture
def driver(monkeypatch) -> Callable[[int], None]:
    """Return what makes a driver that answers with an error."""

    def answers(code: int) -> None:
        def refuse(*_: object) -> None:
            raise pynvml.NVMLError(code)

        for name in ("nvmlInit", "nvmlInitWithFlags"):
            monkeypatch.setattr(pynvml, name, refuse)

    return answers


@pytest.mark.parametrize("gauges", ["", "host", "gpu"])
def test_a_machine_without_a_driver_has_no_gpu(told, driver, gauges):
    """That is no fault, and it says how to get one."""
    driver(LIBRARY_NOT_FOUND)
    found = told(PERISCOPE_GAUGES=gauges)
    assert found.status_of("gpu.devices") == "off"
    assert found.one("gpu.devices")["remedy"]


@pytest.mark.parametrize("code", [DRIVER_NOT_LOADED, VERSION_MISMATCH, 999], ids=str)
@pytest.mark.parametrize(
    ("gauges", "status"), [("", "off"), ("host", "off"), ("gpu", "broken"), ("true", "broken")]
)
def test_a_driver_that_does_not_work_is_broken_where_it_is_wanted(
    told, driver, code, gauges, status
):
    """With the reason and what helps; elsewhere that is only said."""
    driver(code)
    found = told(PERISCOPE_GAUGES=gauges)
    assert found.status_of("gpu.devices") == status
    assert found.one("gpu.devices")["remedy"]


def test_without_pynvml_there_is_no_gpu(told, monkeypatch):
    """It may have been left out on purpose."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert told().status_of("gpu.devices") == "off"
