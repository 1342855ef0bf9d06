"""The shipped configurations: valid, free of deprecated parts, closed to other machines."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import yaml
from apis import get_json
from follow import follow
from servers import CONFIG, FEATURES, Collector, Jaeger, Prometheus, binaries
from waiting import until_equal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Stack

COMPOSE = yaml.safe_load((CONFIG / "compose.yaml").read_text())
COMPLAINT = re.compile(r"\t(warn|error)\t|level=(WARN|ERROR)|deprecat", re.IGNORECASE)
VARIABLE = re.compile(r"\$\{env:(\w+):-([^}]*)\}")


def check(*command: str, **options: Any) -> str:
    """Run a command that has to succeed; returns what it says."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# What the servers themselves say.


def test_the_collector_finds_nothing_wrong(tmp_path: Path) -> None:
    """`otelcol validate` accepts collector.yaml as it is."""
    check(
        binaries()["otelcol"], "validate", "--config", str(CONFIG / "collector.yaml"), cwd=tmp_path
    )


def test_promtool_finds_nothing_wrong() -> None:
    """`promtool check config` accepts prometheus.yaml and its targets."""
    told = check(binaries()["promtool"], "check", "config", str(CONFIG / "prometheus.yaml"))
    assert "SUCCESS" in told


def test_no_server_warns_of_anything(stack: Stack) -> None:
    """With telemetry passing through, no log has a warning, an error or a deprecated part."""
    follow(stack.collector.http, jaeger=stack.jaeger.api.url, prometheus=stack.prometheus.url)
    harmless = ("ui assets not embedded",)  # the user interface is not part of Jaeger's sources
    for server in stack:
        for line in server.log.read_text().splitlines():
            if any(known in line for known in harmless):
                continue
            assert not COMPLAINT.search(line), line


# What they do.


def test_nothing_listens_beyond_this_machine(stack: Stack) -> None:
    """Every port of every server is bound to loopback."""
    for server in stack:
        listening = [
            one.laddr.ip
            for one in psutil.Process(server.pid).net_connections(kind="inet")
            if one.status == psutil.CONN_LISTEN
        ]
        assert listening, server.name
        assert set(listening) == {"127.0.0.1"}, server.name


def test_what_waits_on_disk_is_private(stack: Stack) -> None:
    """The Collector's queue can be read by its user alone."""
    storage = Path(stack.collector.environment["COLLECTOR_STORAGE"])
    for path in (storage, *storage.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_collectors_own_metrics_are_named_as_the_comments_say(stack: Stack) -> None:
    """The metrics to alert on exist under these very names."""
    stack.prometheus.scrape("collector", stack.collector.metrics_address)
    follow(stack.collector.http)
    for metric in ("otelcol_exporter_queue_size", "otelcol_exporter_sent_spans_total"):
        deadline = time.monotonic() + 90
        while not stack.prometheus.api.query(metric):
            assert time.monotonic() < deadline, metric
            time.sleep(0.1)
    stack.prometheus.forget("collector")


# Their variables.


@pytest.mark.parametrize("name", ["collector.yaml", "jaeger.yaml"])
def test_every_variable_is_in_the_table(name: str) -> None:
    """The comment at the top lists each variable that the file reads, with its default."""
    text = (CONFIG / name).read_text()
    header = text[: text.index("\n\n")]
    read = dict(VARIABLE.findall(text))
    told = dict(re.findall(r"^#   ([A-Z_]{3,})  +(\S+)", header, re.MULTILINE))
    told = {variable: default.removeprefix("./") for variable, default in told.items()}
    assert told == read


# compose.yaml.


def test_images_are_pinned() -> None:
    """Each image has a tag that does not move."""
    for name, service in COMPOSE["services"].items():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", service["image"]), name


def test_ports_are_published_on_this_machine_alone() -> None:
    """No port is reachable from elsewhere."""
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name


def test_what_is_mounted_exists() -> None:
    """Each file that a container gets is in the folder, and is not written to."""
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            source, _, options = volume.partition(":")
            if source.startswith("./"):
                assert (CONFIG / source).is_file()
                assert options.endswith(":ro")
            else:
                assert source in COMPOSE["volumes"]


def test_containers_get_variables_that_the_configurations_read() -> None:
    """Each variable set for a container is one of its configuration's, or of its runtime's."""
    of_runtimes = {"GOMEMLIMIT", "OTEL_TRACES_SAMPLER"}
    for name in ("collector", "jaeger"):
        read = {found[0] for found in VARIABLE.findall((CONFIG / f"{name}.yaml").read_text())}
        assert set(COMPOSE["services"][name]["environment"]) <= read | of_runtimes


def test_prometheus_has_the_same_features_everywhere() -> None:
    """compose.yaml, run.sh, the comment in prometheus.yaml and the tests enable the same."""
    wanted = ",".join(FEATURES)
    for name in ("compose.yaml", "run.sh", "prometheus.yaml"):
        assert wanted in (CONFIG / name).read_text(), name


def test_compose_accepts_its_file() -> None:
    """The file follows the Compose specification; `docker compose`, where it is, agrees."""
    compose = str(CONFIG / "compose.yaml")
    check(
        sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", compose
    )
    if shutil.which("docker") and run_quietly("docker", "compose", "version"):
        check("docker", "compose", "-f", compose, "config", "--quiet")


def run_quietly(*command: str) -> bool:
    """Run a command; returns whether it succeeds."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# run.sh.


def test_run_sh_runs_all_three_until_ctrl_c(tmp_path: Path) -> None:
    """It says where everything is, telemetry passes through, and Ctrl-C leaves nothing behind."""
    jaeger, prometheus = Jaeger(tmp_path / "j"), Prometheus(tmp_path / "p")
    collector = Collector(tmp_path / "c", jaeger.otlp, prometheus.url)
    with running_run_sh(tmp_path, jaeger, prometheus, collector) as (script, told):
        servers = psutil.Process(script.pid).children(recursive=True)
        hops = follow(collector.http, jaeger=jaeger.api.url, prometheus=prometheus.url)
        here = {f"127.0.0.1:{port}" for port in (8888, 18888, 9090, 9464)}
        until_equal(here, lambda: scraped_by(prometheus))
        script.send_signal(signal.SIGINT)
        assert script.wait(90) == 130
    assert [hop.passed for hop in hops] == [True] * 4, hops
    assert all(url in told for url in (collector.http, jaeger.api.url, prometheus.url))
    gone, alive = psutil.wait_procs(servers, timeout=60)
    assert len(gone) >= 3
    assert alive == []


def scraped_by(prometheus: Prometheus) -> set[str]:
    """Return the addresses that a Prometheus scrapes, or tries to."""
    targets = get_json(f"{prometheus.url}/api/v1/targets")["data"]["activeTargets"]
    return {target["discoveredLabels"]["__address__"] for target in targets}


def test_run_sh_needs_only_what_it_runs(tmp_path: Path) -> None:
    """Where a server is missing it says which, starts none and ends."""
    done = subprocess.run(
        ["bash", str(CONFIG / "run.sh"), str(tmp_path)],
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PERISCOPE_STACK_CACHE": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 69
    assert "promtool" not in done.stderr
    assert "jaeger" in done.stderr


@contextmanager
def running_run_sh(
    folder: Path, jaeger: Jaeger, prometheus: Prometheus, collector: Collector
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the script with other ports; gives it and what it says when all is ready."""
    variables = {**jaeger.environment, **collector.environment}
    variables |= {"PROMETHEUS_LISTEN": prometheus.address, "PATH": os.environ["PATH"]}
    script = subprocess.Popen(
        ["bash", str(CONFIG / "run.sh"), str(folder / "data")],
        env={"HOME": str(Path.home()), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        told = ""
        while "Ctrl-C" not in told:
            line = script.stdout.readline()
            assert line, told
            told += line
        yield script, told
    finally:
        with suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
        script.wait()
        script.stdout.close()
