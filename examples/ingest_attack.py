"""Ingest a STIX 2.1 bundle into SQLite, and account for every object in it.

    python examples/ingest_attack.py                     # MITRE ATT&CK for ICS, kept in memory
    python examples/ingest_attack.py my-bundle.json --database intel.db
    python examples/ingest_attack.py --otlp http://localhost:4318 --serve

fetch -> parse -> convert -> store are monitored operations inside one more, `ingest`, which keeps
the account: each object that was received ends as ingested, skipped for a reason, or failed.
"""

from __future__ import annotations

import argparse
import re
import sqlite3
import sys
import threading
from collections import defaultdict
from contextlib import closing, suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import periscope_otel as periscope
from periscope_otel.monitor.summary import RunSummary

if TYPE_CHECKING:
    from collections.abc import Callable

BUNDLE = Path(__file__).parent / "data" / "ics-attack-18.1.json"
BATCH = 200  # objects converted and stored together: one transaction, one span each


class BadBundleError(ValueError):
    """What was fetched is no STIX 2.1 bundle; the message says why."""


class InvalidObjectError(ValueError):
    """One object of a bundle breaks a rule of the standard."""


TYPE = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
IDENTIFIER = re.compile(r"[a-z][a-z0-9-]*--[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")

# Observables are not versioned: no created, modified and revoked, and spec_version is optional.
# Metadata is objects on how to handle, translate, extend or list others: no intelligence.
OBSERVABLES = set(
    """artifact autonomous-system directory domain-name email-addr email-message file ipv4-addr
    ipv6-addr mac-addr mutex network-traffic process software url user-account
    windows-registry-key x509-certificate""".split()  # noqa: SIM905  (a list would take a page)
)
METADATA = ("marking-definition", "language-content", "extension-definition", "x-mitre-collection")


def matches(pattern: re.Pattern[str], value: object) -> bool:
    """Say whether a value is a text of this form."""
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def moment(value: Any) -> datetime | None:
    """Return the time that a STIX timestamp means; None if it is none."""
    try:
        return datetime.fromisoformat(value) if matches(TIMESTAMP, value) else None
    except ValueError:  # such as February 30th
        return None


def has_time(obj: dict[str, Any], name: str, *unless: str) -> bool:
    """Say whether an object has a timestamp, or is of a type that needs none."""
    return obj["type"] in OBSERVABLES or obj["type"] in unless or moment(obj.get(name)) is not None


def in_order(obj: dict[str, Any]) -> bool:
    """Say whether an object was not modified before it was created."""
    created, modified = moment(obj.get("created")), moment(obj.get("modified"))
    return created is None or modified is None or created <= modified


def refers(obj: dict[str, Any], kind: str, *names: str) -> bool:
    """Say whether an object of this type has these references."""
    return obj["type"] != kind or all(matches(IDENTIFIER, obj.get(name)) for name in names)


# What must hold, in order: the section of the standard, what is wrong otherwise, and the check.
RULES: tuple[tuple[str, str, Callable[[Any], object]], ...] = (
    ("3.2", "is no JSON object", lambda obj: isinstance(obj, dict)),
    ("3.1", "has no valid type", lambda obj: matches(TYPE, obj.get("type"))),
    ("2.9", "has no id of the form type--UUID", lambda obj: matches(IDENTIFIER, obj.get("id"))),
    ("2.9", "has another type in its id", lambda obj: obj["id"].split("--")[0] == obj["type"]),
    ("3.2", "is not of spec_version 2.1",
     lambda obj: obj.get("spec_version", "2.1" if obj["type"] in OBSERVABLES else None) == "2.1"),
    ("2.16", "has no valid created", lambda obj: has_time(obj, "created")),
    ("2.16", "has no valid modified", lambda obj: has_time(obj, "modified", "marking-definition")),
    ("3.6.1", "was modified before it was created", in_order),
    ("5.1", "is a relationship of no type",
     lambda obj: obj["type"] != "relationship" or obj.get("relationship_type")),
    ("5.1", "does not say what it relates (source_ref, target_ref)",
     lambda obj: refers(obj, "relationship", "source_ref", "target_ref")),
    ("5.2", "does not say what was sighted (sighting_of_ref)",
     lambda obj: refers(obj, "sighting", "sighting_of_ref")),
)  # fmt: skip


class Record(msgspec.Struct):
    """What is kept of an object. msgspec checks the types while it converts (section 3.2)."""

    id: str
    type: str
    modified: str = ""
    name: str | None = None
    value: str | None = None  # what most observables have for a name
    pattern: str | None = None
    aliases: list[str] = []
    x_mitre_aliases: list[str] = []
    external_references: list[dict[str, Any]] = []
    kill_chain_phases: list[dict[str, str]] = []
    relationship_type: str | None = None
    source_ref: str | None = None
    target_ref: str | None = None

    @property
    def version(self) -> str:
        """The time of modification in one fixed form, so that text compares as time does."""
        modified = moment(self.modified)
        return "" if modified is None else modified.isoformat(timespec="microseconds")


class Bundle(msgspec.Struct):
    """The container of STIX objects (section 8)."""

    type: str
    id: str
    spec_version: str = "2.1"  # bundles have it in STIX 2.0 only
    objects: list[Any] = []  # Any: one broken object must not refuse the others


@periscope.monitored("fetch")
def fetch(path: Path) -> bytes:
    """Read the bundle; with a TAXII client in its place nothing else changes."""
    return path.read_bytes()


@periscope.monitored("parse")
def parse(data: bytes) -> Bundle:
    """Return the bundle, or say what keeps the bytes from being one."""
    try:
        bundle = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=Bundle)
    except (msgspec.DecodeError, RecursionError) as error:
        why = error if data.strip() else "it is empty"
        raise BadBundleError(f"this is no STIX bundle: {why}") from None
    if bundle.type != "bundle" or not bundle.id.startswith("bundle--"):
        raise BadBundleError(f"this is no STIX bundle: its type is {bundle.type!a:.60}")
    if bundle.spec_version != "2.1":
        raise BadBundleError(f"this bundle is STIX {bundle.spec_version!a:.20}, not 2.1")
    if not bundle.objects:
        raise BadBundleError("the bundle holds no objects")
    return bundle


class Ingest:
    """One run over one bundle."""

    def __init__(self, database: str) -> None:
        self.database = sqlite3.connect(database)
        try:
            self.database.execute(SCHEMA)
        except sqlite3.Error:
            self.database.close()
            raise
        self.seen: set[tuple[str, str]] = set()
        self.rejected: defaultdict[str, list[str]] = defaultdict(list)

    def ingest(self, path: Path, feed: str) -> None:
        """Ingest a bundle, in one operation that keeps the account of its objects."""
        # The feed's name is known before anything is fetched, so a pull that fails is counted
        # under it too. The operations called from here inherit it.
        with periscope.operation("ingest", feed=feed) as account:
            bundle = parse(fetch(path))
            account.set_attribute("stix.bundle.id", bundle.id)
            # Identities that made objects are metadata; others, such as victims, are not.
            creators = {
                str(obj.get("created_by_ref")) for obj in bundle.objects if type(obj) is dict
            }
            # track() counts what is received, and draws a progress bar on a terminal.
            stream = account.track(bundle.objects)
            while objects := list(islice(stream, BATCH)):
                records, withdrawn = self.convert(objects, creators, account)
                self.store(records, withdrawn, account)

    # An account belongs to one operation, so the enclosing one's is handed in: inside convert and
    # store, `periscope.current_operation()` is the convert or store itself.

    @periscope.monitored("convert")
    def convert(
        self, objects: list[Any], creators: set[str], account: periscope.Operation
    ) -> tuple[list[Record], list[Record]]:
        """Return the objects to keep, and those to withdraw since they are no longer valid."""
        records, withdrawn = [], []
        for obj in objects:
            try:
                record = self.check(obj)
            except InvalidObjectError as error:
                account.failed(obj, error)
                continue
            reason = reason_to_skip(obj, creators)
            if (record.id, record.version) in self.seen:
                account.skipped(reason="duplicate")
            elif reason is None:
                records.append(record)
                account.converted()
            else:
                account.skipped(reason=reason)
                if reason in ("revoked", "deprecated"):
                    withdrawn.append(record)
            self.seen.add((record.id, record.version))
        return records, withdrawn

    def check(self, obj: Any) -> Record:
        """Return the object as a record, or raise what is wrong with it."""
        try:
            for section, otherwise, holds in RULES:
                if not holds(obj):
                    raise InvalidObjectError(f"{otherwise} (STIX 2.1, section {section})")
            return msgspec.convert(obj, Record)
        except ValueError as error:  # a rule's, or msgspec's about a property of the wrong type
            name = ascii(obj.get("id"))[:60] if isinstance(obj, dict) else f"{obj!a:.60}"
            self.rejected[str(error)].append(name)
            raise InvalidObjectError(f"{name}: {error}") from None

    @periscope.monitored("store")
    def store(
        self, records: list[Record], withdrawn: list[Record], account: periscope.Operation
    ) -> None:
        """Write new and newer objects in one transaction."""
        marks = ",".join("?" * len(records))
        query = f"SELECT id, version FROM objects WHERE id IN ({marks})"  # noqa: S608  (only marks)
        fresh = []
        with self.database:
            stored = dict(self.database.execute(query, [record.id for record in records]))
            for record in records:
                old = stored.get(record.id)
                if old is None or record.version > old:
                    fresh.append(record)
                    stored[record.id] = record.version
                else:
                    account.skipped(reason="older_version" if old > record.version else "unchanged")
            self.database.executemany(UPSERT, map(row, fresh))
            self.database.executemany(WITHDRAW, [(one.id, one.version) for one in withdrawn])
        # Counted when the transaction is through: had it failed, they would be unaccounted for.
        account.ingested(len(fresh))

    def print_result(self) -> None:
        """Say what was refused, and what is stored now."""
        print()
        for reason, found in islice(self.rejected.items(), 10):
            print(f"  Failed: {len(found):,} x {reason}; first: {found[0]}")
        objects, relationships, loose = self.database.execute(COUNTS).fetchone()
        # Loose ends are no failure: what they lead to may be had from elsewhere (section 3.3).
        told = f"relationships {relationships:,} ({loose or 0:,} lead to objects not stored)"
        print(f"  Stored: objects {objects:,}, {told}")


def reason_to_skip(obj: dict[str, Any], creators: set[str]) -> str | None:
    """Return why a valid object is left out: one of a few words, since it becomes a label."""
    if obj.get("revoked") is True:
        return "revoked"
    if obj.get("x_mitre_deprecated") is True:
        return "deprecated"
    return "metadata" if obj["type"] in METADATA or obj["id"] in creators else None


SCHEMA = """CREATE TABLE IF NOT EXISTS objects (
    id TEXT PRIMARY KEY, version TEXT, type TEXT, name TEXT, pattern TEXT, aliases TEXT,
    external_ids TEXT, kill_chain_phases TEXT, source TEXT, relation TEXT, target TEXT)"""
UPSERT = "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
WITHDRAW = "DELETE FROM objects WHERE id = ? AND version <= ?"
COUNTS = """SELECT count(*), count(relation), sum(relation IS NOT NULL AND NOT (
    source IN (SELECT id FROM objects) AND target IN (SELECT id FROM objects))) FROM objects"""


def row(one: Record) -> tuple[str | None, ...]:
    """Return a record as a row; lists become JSON, a relationship is an edge."""
    external = [found["external_id"] for found in one.external_references if "external_id" in found]
    lists = (one.aliases or one.x_mitre_aliases, external, one.kill_chain_phases)
    texts = (msgspec.json.encode(entries).decode() for entries in lists)
    edge = (one.source_ref, one.relationship_type, one.target_ref)
    return (one.id, one.version, one.type, one.name or one.value, one.pattern, *texts, *edge)


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Ingest a STIX 2.1 bundle into SQLite.")
    parser.add_argument("bundle", type=Path, nargs="?", default=BUNDLE, help="a bundle file")
    parser.add_argument("--database", default=":memory:", metavar="FILE", help="where to keep it")
    parser.add_argument("--feed", help="the feed's name; by default from the file's name")
    parser.add_argument("--otlp", metavar="ENDPOINT", help="ship telemetry to this Collector")
    parser.add_argument("--serve", nargs="?", const="127.0.0.1:9464", metavar="ADDRESS",
                        help="serve Prometheus until Ctrl-C; by default on %(const)s")  # fmt: skip
    return parser.parse_args()


def complain(message: object) -> int:
    """Say in one line why nothing was done; return the exit code."""
    print(f"ingest_attack: {message}", file=sys.stderr)
    return 2


def main() -> int:
    """Run the command; return the exit code."""
    options = read_arguments()
    try:
        run = Ingest(options.database)
    except sqlite3.Error as error:
        return complain(f"cannot use the database {options.database!r}: {error}")
    with closing(run.database):
        return run_job(run, options)


def run_job(run: Ingest, options: argparse.Namespace) -> int:
    """Ingest the bundle, say what became of it, and serve if asked to; return the exit code."""
    feed = options.feed or re.sub(r"-\d[\d.]*$", "", options.bundle.stem)  # without the version
    status = 0
    try:
        runtime = periscope.configure(
            service_name="ingest-attack", otlp_endpoint=options.otlp, prometheus=options.serve
        )
    except OSError as error:
        return complain(f"cannot serve on {options.serve}: {error.strerror}")
    except ValueError as error:  # an option or a variable of the environment; it says which
        return complain(error)
    summary = RunSummary(runtime)
    try:
        with summary:
            run.ingest(options.bundle, feed)
    except BadBundleError as error:
        return complain(f"cannot ingest {str(options.bundle)!r}: {error}")
    except OSError as error:
        return complain(f"cannot read {str(options.bundle)!r}: {error.strerror}")
    except sqlite3.Error as error:  # no return: the summary shows what is unaccounted for
        status = complain(f"cannot store in {options.database!r}: {error}")
    except KeyboardInterrupt:
        status = 130  # what a shell expects of a program that Ctrl-C ended
    serving = runtime.server is not None and status == 0
    # Both send what is still queued; while metrics are served, the runtime has to stay up.
    runtime.flush() if serving else runtime.shutdown()
    summary.print()
    run.print_result()
    if serving:
        print("\n  Serving until Ctrl-C.", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    return status


if __name__ == "__main__":
    sys.exit(main())
