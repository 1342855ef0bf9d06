"""The main job on real and on broken bundles: what becomes of each object and each file."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from main_job import REAL, account, reasons, run

if TYPE_CHECKING:
    from pathlib import Path

MADE = "2024-01-01T00:00:00.000Z"


def new_object(kind: str = "malware", **properties: Any) -> dict[str, Any]:
    made = {
        "type": kind,
        "id": f"{kind}--{uuid.uuid4()}",
        "spec_version": "2.1",
        "created": MADE,
        "modified": MADE,
        "name": "An object",
        **properties,
    }
    return {name: value for name, value in made.items() if value is not None}


def write_bundle(path: Path, *objects: Any) -> Path:
    bundle = {"type": "bundle", "id": f"bundle--{uuid.uuid4()}", "objects": objects}
    path.write_text(json.dumps(bundle))
    return path


@pytest.fixture(scope="module")
def real_objects() -> list[dict[str, Any]]:
    return json.loads(REAL.read_bytes())["objects"]


@pytest.fixture(scope="module")
def real_run():
    return run()


# The real bundle.


def test_every_object_of_the_real_bundle_is_accounted_for(real_run, real_objects):
    """All 1,826 objects end as ingested or skipped, and the summary's equation holds."""
    skipped = sum(expected_reason(one) is not None for one in real_objects)
    assert len(real_objects) == 1826
    assert account(real_run.stdout) == (1826, 1826 - skipped, skipped, 0, 0)
    assert (real_run.returncode, real_run.stderr) == (0, "")


def test_objects_are_skipped_for_the_reasons_that_the_data_has(real_run, real_objects):
    """Revoked and deprecated objects and metadata are skipped, each counted as what it is."""
    expected = Counter(map(expected_reason, real_objects))
    del expected[None]
    assert reasons(real_run.stdout) == expected == {"revoked": 2, "deprecated": 37, "metadata": 3}


def expected_reason(one: dict[str, Any]) -> str | None:
    if one.get("revoked"):
        return "revoked"
    if one.get("x_mitre_deprecated"):
        return "deprecated"
    about_others = one["type"] in ("marking-definition", "x-mitre-collection", "identity")
    return "metadata" if about_others else None


def test_what_is_stored_is_what_the_bundle_holds(tmp_path, real_objects):
    """The database holds each ingested object once, with its names and its edges."""
    run("--database", tmp_path / "intel.db")
    with sqlite3.connect(tmp_path / "intel.db") as database:
        stored = {row[0]: row for row in database.execute("SELECT * FROM objects")}
    database.close()
    kept = [one for one in real_objects if expected_reason(one) is None]
    assert stored.keys() == {one["id"] for one in kept}
    for one in kept:
        row = stored[one["id"]]
        assert row[2:4] == (one["type"], one.get("name"))
        assert row[8:] == tuple(
            one.get(name) for name in ("source_ref", "relationship_type", "target_ref")
        )
        references = one.get("external_references", [])
        assert json.loads(row[6]) == [
            found["external_id"] for found in references if "external_id" in found
        ]


def test_a_second_run_changes_nothing(tmp_path):
    """What is stored already is skipped as unchanged, and nothing is ingested twice."""
    first, second = (run("--database", tmp_path / "intel.db") for _ in range(2))
    assert account(second.stdout) == (1826, 0, 1826, 0, 0)
    assert reasons(second.stdout)["unchanged"] == account(first.stdout)[1]


# Versions.


def test_a_newer_version_replaces_and_an_older_one_does_not(tmp_path):
    """The most recent version of an object is the one that is stored, whatever comes first."""
    old = new_object(name="old", modified="2024-01-02T00:00:00.5Z")
    new = {**old, "name": "new", "modified": "2024-01-02T00:00:00.75Z"}
    bundle = write_bundle(tmp_path / "versions.json", old, new, {**old, "modified": MADE})
    output = run(bundle, "--database", tmp_path / "intel.db").stdout
    assert account(output) == (3, 2, 1, 0, 0)
    assert reasons(output) == {"older_version": 1}
    database = sqlite3.connect(tmp_path / "intel.db")
    assert database.execute("SELECT name FROM objects").fetchall() == [("new",)]
    database.close()


def test_the_same_version_twice_in_a_bundle_is_a_duplicate(tmp_path):
    """A repeated object is skipped, and not mistaken for one that was stored before."""
    one = new_object()
    output = run(write_bundle(tmp_path / "twice.json", one, one)).stdout
    assert account(output) == (2, 1, 1, 0, 0)
    assert reasons(output) == {"duplicate": 1}


def test_a_revoked_object_is_withdrawn(tmp_path):
    """An object that was stored goes when a later bundle revokes it."""
    one = new_object()
    revoked = {**one, "modified": "2024-02-01T00:00:00.000Z", "revoked": True}
    run(write_bundle(tmp_path / "1.json", one), "--database", tmp_path / "intel.db")
    result = run(write_bundle(tmp_path / "2.json", revoked), "--database", tmp_path / "intel.db")
    assert reasons(result.stdout) == {"revoked": 1}
    assert "Stored: objects 0" in result.stdout


def test_a_victim_is_intelligence_and_a_producer_is_not(tmp_path):
    """An identity is metadata only where it made one of the objects."""
    producer, victim = new_object("identity"), new_object("identity")
    made = new_object(created_by_ref=producer["id"])
    output = run(write_bundle(tmp_path / "identities.json", producer, victim, made)).stdout
    assert account(output) == (3, 2, 1, 0, 0)


def test_a_relationship_to_an_unknown_object_is_kept(tmp_path):
    """A reference may lead to what the reader does not have: it is stored, and told."""
    loose = new_object(
        "relationship",
        relationship_type="uses",
        source_ref=new_object()["id"],
        target_ref=new_object()["id"],
    )
    result = run(write_bundle(tmp_path / "loose.json", loose))
    assert account(result.stdout) == (1, 1, 0, 0, 0)
    assert "relationships 1 (1 lead to objects not stored)" in result.stdout


# Broken objects.

IDENTIFIER = f"malware--{uuid.uuid4()}"
BROKEN = {
    "no object": ("a text", "3.2"),
    "null": (None, "3.2"),
    "no type": (new_object(type=None), "3.1"),
    "upper case type": (new_object(type="Malware"), "3.1"),
    "no id": (new_object(id=None), "2.9"),
    "id without UUID": (new_object(id="malware--1"), "2.9"),
    "id that is no text": (new_object(id=["malware"]), "2.9"),
    "id of another type": (new_object("tool", id=IDENTIFIER), "2.9"),
    "no version": (new_object(spec_version=None), "3.2"),
    "version 2.0": (new_object(spec_version="2.0"), "3.2"),
    "version true": (new_object(spec_version=True), "3.2"),
    "no creation": (new_object(created=None), "2.16"),
    "local time": (new_object(created="2024-01-01T00:00:00+01:00"), "2.16"),
    "no such day": (new_object(created="2024-02-30T00:00:00Z"), "2.16"),
    "no modification": (new_object(modified=None), "2.16"),
    "modified first": (new_object(modified="2023-01-01T00:00:00Z"), "3.6.1"),
    "untyped relationship": (
        new_object("relationship", source_ref=IDENTIFIER, target_ref=IDENTIFIER),
        "5.1",
    ),
    "half a relationship": (
        new_object("relationship", relationship_type="uses", source_ref=IDENTIFIER),
        "5.1",
    ),
    "empty sighting": (new_object("sighting"), "5.2"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_object_fails_by_the_rule_it_breaks(tmp_path, kind):
    """One object fails with its section of the standard; the others of the bundle go through."""
    broken, section = BROKEN[kind]
    result = run(write_bundle(tmp_path / "broken.json", new_object(), broken))
    assert (result.returncode, result.stderr) == (0, "")
    assert account(result.stdout) == (2, 1, 0, 1, 0)
    assert f"(STIX 2.1, section {section}); first: " in result.stdout
    assert re.search(r"ingest +broken +1 1 partial", result.stdout)


def test_a_property_of_the_wrong_type_fails_with_its_name(tmp_path):
    """A name that is no text does not reach the database."""
    result = run(write_bundle(tmp_path / "typed.json", new_object(name=7)))
    assert account(result.stdout) == (1, 0, 0, 1, 0)
    assert "Expected `str | null`, got `int` - at `$.name`" in result.stdout


def test_observables_need_no_times(tmp_path):
    """An observable has neither times nor, of necessity, a version of the standard."""
    address = {"type": "ipv4-addr", "id": f"ipv4-addr--{uuid.uuid4()}", "value": "192.0.2.7"}
    assert account(run(write_bundle(tmp_path / "sco.json", address)).stdout) == (1, 1, 0, 0, 0)


# Files that hold no bundle.


def unusable(kind: str, folder: Path) -> Path:
    path = folder / "bundle.json"
    contents: dict[str, bytes] = {
        "empty": b"",
        "blank": b" \n",
        "truncated": REAL.read_bytes()[: REAL.stat().st_size // 2],
        "trailing": REAL.read_bytes() + b"]",
        "text": b"not JSON",
        "binary": bytes(range(256)),
        "a list": b"[]",
        "another object": b'{"a": 1}',
        "another type": b'{"type": "report", "id": "report--1"}',
        "a hostile type": b'{"type": "\\u001b[31m[red]\\n\\n", "id": "bundle--1"}',
        "no objects": b'{"type": "bundle", "id": "bundle--1"}',
        "objects in no list": b'{"type": "bundle", "id": "bundle--1", "objects": {}}',
        "STIX 2.0": b'{"type": "bundle", "id": "bundle--1", "spec_version": "2.0"}',
        "too deep": b'{"type": "bundle", "id": "bundle--1", "objects": ' + b"[" * 100_000,
        "half a character": b'{"type": "bundle", "id": "bundle--1", "objects": ["\\ud800"]}',
    }
    if kind == "a directory":
        return folder
    if kind == "below a file":
        path.touch()
        return path / "bundle.json"
    if kind in contents:
        path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize(
    "kind",
    ["missing", "a directory", "below a file", "empty", "blank", "truncated", "trailing", "text",
     "binary", "a list", "another object", "another type", "a hostile type", "no objects",
     "objects in no list", "STIX 2.0", "too deep", "half a character"],
)  # fmt: skip
def test_a_file_without_a_bundle_is_one_line(tmp_path, kind):
    """It ends with exit code 2 and one line on standard error that names the file."""
    path = unusable(kind, tmp_path)
    result = run(path)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"ingest_attack: cannot (read|ingest) '[^\n]+': [^\n]{5,}\n", result.stderr)
    assert str(path) in result.stderr
    assert "\x1b" not in result.stderr


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    """An error of the system is told in the same way; here the file is a socket."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("bundle.json")
        result = run("bundle.json")
    assert result.returncode == 2
    assert re.fullmatch(r"ingest_attack: cannot read 'bundle.json': [^\n]+\n", result.stderr)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--database", REAL], "cannot use the database"),
        (["--database", "/nowhere/intel.db"], "cannot use the database"),
        (["--serve", "here"], "prometheus='here': expected"),
        (["--otlp", "nowhere"], "otlp_endpoint='nowhere': expected"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(options, told):
    """It ends with exit code 2 and one line on standard error that says which option."""
    result = run(*options)
    assert (result.returncode, result.stdout) == (2, "")
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_failing_database_shows_as_unaccounted_objects(tmp_path):
    """What could not be stored is no silent loss: it is in the account, and the exit code is 2."""
    database = sqlite3.connect(tmp_path / "intel.db")
    database.execute("CREATE TABLE objects (id TEXT PRIMARY KEY, version TEXT, relation, source, "
                     "target)")  # fmt: skip
    database.close()
    result = run("--database", tmp_path / "intel.db")
    assert result.returncode == 2
    assert result.stderr.startswith(f"ingest_attack: cannot store in '{tmp_path}/intel.db': ")
    received, ingested, skipped, failed, unaccounted = account(result.stdout)
    assert (received, ingested, failed) == (200, 0, 0)
    assert unaccounted == 200 - skipped > 0
