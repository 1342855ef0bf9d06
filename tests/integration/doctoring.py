"""What all tests of `periscope doctor` share: running it, and what holds whatever it finds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from processes import clean_environment
from typer.testing import CliRunner

from periscope_otel.cli import app

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from click.testing import Result

ENDS_WITHIN = 150.0
"""Seconds after which a command is taken to hang; it has a few to do, on a machine that is busy."""
UNHURRIED = ("--timeout", "30")
"""For servers that answer, of which a busy machine may stop any for seconds.

What refuses is tried again for as long as there is time, so this is not for that.
"""
LONGEST = 500
FIELDS = ("check", "status", "message", "remedy")
STATUSES = ("ok", "off", "warning", "broken")
ORDER = (
    *("settings.values", "settings.unknown"),
    *("sdk.versions", "sdk.disabled", "sdk.distros", "sdk.fork"),
    *("traces.export", "metrics.export", "metrics.prometheus", "export.anywhere"),
    *("data_dir.folder", "data_dir.space", "data_dir.file"),
    *("redis.reached", "redis.policy", "redis.persistence", "redis.memory", "redis.clock"),
    *("breakers.shared", "host.figures", "gpu.devices"),
    *("program.traces", "program.metrics", "program.double", "program.duplicates"),
    *("program.sampler", "program.fork", "program.losses", "program.labels", "program.letters"),
    *("program.errors", "program.breakers", "program.gauges"),
)
ALWAYS = (
    *("settings.values", "sdk.versions", "sdk.fork", "traces.export", "metrics.export"),
    *("data_dir.folder", "redis.reached", "breakers.shared", "host.figures", "gpu.devices"),
)
"""Checks of which something is said wherever it runs."""
HOSTILE = "\x1b[2J\x1b]0;title\x07\r\n\x00\u202e\u200b\x9b31m\ud800"


class Told(NamedTuple):
    """What a diagnosis told."""

    findings: list[dict[str, Any]]
    status: int = 0
    stderr: str = ""

    def all(self, check: str) -> list[dict[str, Any]]:
        """Return the findings of a check."""
        return [one for one in self.findings if one["check"] == check]

    def one(self, check: str) -> dict[str, Any]:
        """Return the only finding of a check."""
        found = self.all(check)
        assert len(found) == 1, f"{check}: {found}"
        return found[0]

    def status_of(self, check: str) -> str:
        """Return the status of the only finding of a check."""
        return self.one(check)["status"]

    def is_well(self, check: str) -> bool:
        """Whether nothing is wrong by a check: it says so, or says nothing."""
        return all(one["status"] in ("ok", "off") for one in self.all(check))

    def text(self, check: str) -> str:
        """Return all that is told by a check, in lower case."""
        return " ".join(
            f"{one['message']} {one['remedy'] or ''}" for one in self.all(check)
        ).lower()

    def in_order(self) -> bool:
        """Whether the checks are told in their order."""
        places = [ORDER.index(one["check"]) for one in self.findings]
        return places == sorted(places)

    def problems(self) -> list[dict[str, Any]]:
        """Return what is broken or warned of."""
        return [one for one in self.findings if one["status"] in ("broken", "warning")]


def keeps_the_contract(findings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the findings; fails unless each is what a finding has to be."""
    found = list(findings)
    for one in found:
        assert tuple(one) == FIELDS, one
        assert one["status"] in STATUSES, one
        assert is_a_line(one["message"]), one
        assert one["remedy"] is None or is_a_line(one["remedy"]), one
        assert one["remedy"] or one["status"] in ("ok", "off"), one
        assert is_a_line(one["check"]), one
    return found


def is_a_line(text: object) -> bool:
    """Whether it is one line that can be printed anywhere, and is not too long."""
    return isinstance(text, str) and text.isprintable() and 0 < len(text.strip()) <= LONGEST


def told_by(diagnosis: Any) -> Told:
    """Return what a Diagnosis told, checked."""
    findings = [{name: getattr(one, name) for name in FIELDS} for one in diagnosis.findings]
    told = Told(keeps_the_contract(findings))
    assert [one.check for one in diagnosis.broken] == checks_of(told, "broken")
    assert [one.check for one in diagnosis.warnings] == checks_of(told, "warning")
    assert diagnosis.ok is (not diagnosis.broken)
    return told


def checks_of(told: Told, status: str) -> list[str]:
    """Return the checks that have a status."""
    return [one["check"] for one in told.findings if one["status"] == status]


def told_in(stdout: str, status: int, *, strict: bool, stderr: str = "") -> Told:
    """Return what `--json` told, checked, the exit status included."""
    assert stdout.isascii()
    assert stdout.endswith("\n")
    assert stdout.count("\n") == 1, stdout
    document = json.loads(stdout)
    assert tuple(document) == ("ok", "findings")
    told = Told(keeps_the_contract(document["findings"]), status, stderr)
    broken, warned = checks_of(told, "broken"), checks_of(told, "warning")
    assert document["ok"] is (not broken)
    assert status == (1 if broken or (strict and warned) else 0), (status, told.problems())
    assert "Traceback" not in stderr, stderr
    return told


def doctor(*arguments: str, **environment: str) -> Told:
    """Run `periscope doctor --json` in this process, with nothing set but what is given."""
    result = _invoked("--json", *arguments, **environment)
    strict = "--strict" in arguments
    return told_in(result.stdout, result.exit_code, strict=strict, stderr=result.stderr)


def text(*arguments: str, **environment: str) -> str:
    """Return what `periscope doctor` tells people."""
    result = _invoked(*arguments, **{"TERM": "dumb", **environment})
    assert result.exit_code in (0, 1), result.output
    return result.stdout


def _invoked(*arguments: str, **environment: str) -> Result:
    clean = {name: None for name in os.environ if _steers(name)}
    result = CliRunner().invoke(app, ["doctor", *arguments], env={**clean, **environment})
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(
        result.exception
    )
    return result


def _steers(name: str) -> bool:
    return name.startswith(("PERISCOPE_", "OTEL_")) or name.lower().endswith("_proxy")


def command(
    *arguments: str, before: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `periscope doctor` in a process of its own, to its end.

    Args:
        arguments: Of the command.
        before: Python code to run first in that process.
        environment: What is set.
    """
    code = f"{before}\nfrom periscope_otel.cli import app\napp()"
    return subprocess.run(
        [sys.executable, "-c", code, "doctor", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=ENDS_WITHIN,
        env=clean_environment() | environment,
    )


def doctor_apart(*arguments: str, before: str = "", **environment: str) -> Told:
    """Run `periscope doctor --json` in a process of its own."""
    done = command("--json", *arguments, before=before, **environment)
    strict = "--strict" in arguments
    return told_in(done.stdout, done.returncode, strict=strict, stderr=done.stderr)


def counted(text: str) -> dict[str, int]:
    """Return the counts of the last line of what is told to people."""
    last = text.rstrip("\n").rpartition("\n")[2]
    assert re.fullmatch(r"\d+ [a-z]+(, \d+ [a-z]+)*", last), last
    named = {word.removesuffix("s"): int(number) for number, word in _COUNT.findall(last)}
    assert named.keys() <= set(STATUSES), last
    return {status: named.get(status, 0) for status in STATUSES}


_COUNT = re.compile(r"(\d+) ([a-z]+)")


def squeezed(text: str) -> str:
    """Return a text without blanks and line ends: what wrapping cannot change."""
    return "".join(text.split())


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the mode and content of everything beneath a folder."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in folder.rglob("*")
    }
