"""Real servers for tests: Collector, Jaeger, Prometheus and toxiproxy, each a process of its own.

They run with the shipped configurations, on free loopback ports given by the environment, and keep
what they write in a folder of the test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil
from apis import Jaeger as JaegerAPI
from apis import Prometheus as PrometheusAPI
from ports import LOCALHOST, free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "collector-config"
START_WITHIN = 60.0
STOP_WITHIN = 20.0
FEATURES = (
    "exemplar-storage",
    "created-timestamp-zero-ingestion",
    "promql-extended-range-selectors",
)
"""Of Prometheus, which takes them by a flag alone."""


class NoServersError(Exception):
    """The servers are not there and cannot be built here; says what to do."""


@cache
def binaries() -> dict[str, str]:
    """Return the path of each server by name.

    Raises:
        NoServersError: If one is missing.
    """
    found = subprocess.run(
        ["bash", str(HERE / "build.sh"), "--list"], capture_output=True, text=True, check=False
    )
    if found.returncode != 0:
        raise NoServersError(found.stderr.strip())
    return dict(line.split("\t") for line in found.stdout.splitlines())


class Server:
    """One server process: started, asked whether it is well, stopped or killed, started again.

    Args:
        name: As `build.sh` calls it.
        folder: Where it may write; its log is there.
    """

    name: str
    arguments: list[str]
    health: str
    """The URL that answers 200 once it is ready."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.environment: dict[str, str] = {}
        self.log = folder / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Start it, and wait until it is ready."""
        assert self._process is None, f"{self.name} is running"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [binaries()[self.name], *self.arguments],
                env={**os.environ, **self.environment},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> None:
        """Let it end in order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it by `kill -9`."""
        self._end(signal.SIGKILL)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._running.pid

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used since it was started."""
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system

    def memory(self) -> int:
        """Return its resident memory in bytes."""
        return psutil.Process(self.pid).memory_info().rss

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"{self.name} is not running"
        return self._process

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_WITHIN
        while not _answers(self.health):
            if self._running.poll() is not None:
                raise AssertionError(f"{self.name} ended:\n{self._last_words()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name} is not ready:\n{self._last_words()}")
            time.sleep(0.02)

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"{self.name} did not end:\n{self._last_words()}") from None
        finally:
            self._process = None

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


class Jaeger(Server):
    """Jaeger with `collector-config/jaeger.yaml`."""

    name = "jaeger"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        grpc, http, query, query_grpc, health, metrics = free_ports(6)
        self.arguments = ["--config", str(CONFIG / "jaeger.yaml")]
        self.environment = {
            "JAEGER_OTLP_GRPC": f"{LOCALHOST}:{grpc}",
            "JAEGER_OTLP_HTTP": f"{LOCALHOST}:{http}",
            "JAEGER_QUERY_HTTP": f"{LOCALHOST}:{query}",
            "JAEGER_QUERY_GRPC": f"{LOCALHOST}:{query_grpc}",
            "JAEGER_HEALTH": f"{LOCALHOST}:{health}",
            "JAEGER_METRICS_PORT": str(metrics),
            "OTEL_TRACES_SAMPLER": "always_off",
        }
        self.health = f"http://{LOCALHOST}:{health}/status"
        self.otlp = f"{LOCALHOST}:{grpc}"
        self.metrics_address = f"{LOCALHOST}:{metrics}"
        self.api = JaegerAPI(f"http://{LOCALHOST}:{query}")


class Prometheus(Server):
    """Prometheus with `collector-config/prometheus.yaml`, which scrapes only what it is told to."""

    name = "prometheus"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (port,) = free_ports(1)
        self.address = f"{LOCALHOST}:{port}"
        self.url = f"http://{self.address}"
        # Its targets are beside its configuration, so it gets a folder with a link to that.
        self._targets = folder / "targets"
        self._targets.mkdir(exist_ok=True)
        config = folder / "prometheus.yaml"
        config.unlink(missing_ok=True)
        config.symlink_to(CONFIG / "prometheus.yaml")
        self.arguments = [
            f"--config.file={config}",
            f"--web.listen-address={self.address}",
            f"--storage.tsdb.path={folder / 'data'}",
            "--web.enable-otlp-receiver",
            f"--enable-feature={','.join(FEATURES)}",
        ]
        self.health = f"{self.url}/-/ready"
        self.api = PrometheusAPI(self.url)

    def scrape(self, job: str, address: str) -> None:
        """Have an endpoint scraped each second from now on."""
        written = self._targets / f"{job}.yaml"
        written.write_text(
            f"- targets: ['{address}']\n"
            f"  labels: {{job: '{job}', __scrape_interval__: 1s, __scrape_timeout__: 1s}}\n"
        )

    def forget(self, job: str) -> None:
        """Have it scraped no more."""
        (self._targets / f"{job}.yaml").unlink()


class Collector(Server):
    """The Collector with `collector-config/collector.yaml`, between programs and two servers.

    Args:
        jaeger: `host:port` of Jaeger's OTLP over gRPC.
        prometheus: URL of Prometheus.
        more: Further variables of the configuration.
    """

    name = "otelcol"

    def __init__(self, folder: Path, jaeger: str, prometheus: str, **more: str) -> None:
        super().__init__(folder)
        grpc, http, health, metrics = free_ports(4)
        self.arguments = ["--config", str(CONFIG / "collector.yaml")]
        self.environment = {
            "COLLECTOR_OTLP_GRPC": f"{LOCALHOST}:{grpc}",
            "COLLECTOR_OTLP_HTTP": f"{LOCALHOST}:{http}",
            "COLLECTOR_HEALTH": f"{LOCALHOST}:{health}",
            "COLLECTOR_METRICS_PORT": str(metrics),
            "COLLECTOR_STORAGE": str(folder / "storage"),
            "JAEGER_OTLP": jaeger,
            "PROMETHEUS_OTLP": f"{prometheus}/api/v1/otlp",
            **more,
        }
        self.health = f"http://{LOCALHOST}:{health}/"
        self.grpc = f"http://{LOCALHOST}:{grpc}"
        self.http = f"http://{LOCALHOST}:{http}"
        self.metrics_address = f"{LOCALHOST}:{metrics}"

    def endpoint(self, protocol: str) -> str:
        """Return the URL for `grpc` or `http/protobuf`."""
        return self.grpc if protocol == "grpc" else self.http


class Toxiproxy(Server):
    """toxiproxy: lines between two processes that can be cut, slowed and broken."""

    name = "toxiproxy-server"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (port,) = free_ports(1)
        self.arguments = ["-host", LOCALHOST, "-port", str(port)]
        self._url = f"http://{LOCALHOST}:{port}"
        self.health = f"{self._url}/version"

    def add(self, name: str, upstream: str) -> str:
        """Lay a line to a `host:port`; returns the `host:port` where it begins."""
        listen = f"{LOCALHOST}:{free_ports(1)[0]}"
        self._ask("POST", "/proxies", name=name, listen=listen, upstream=upstream, enabled=True)
        return listen

    @contextmanager
    def down(self, name: str) -> Iterator[None]:
        """Cut a line for a block; connections through it are refused."""
        self._ask("POST", f"/proxies/{name}", enabled=False)
        yield
        self._ask("POST", f"/proxies/{name}", enabled=True)

    @contextmanager
    def toxic(self, name: str, kind: str, **attributes: int) -> Iterator[None]:
        """Spoil a line for a block, in one of toxiproxy's ways."""
        self._ask("POST", f"/proxies/{name}/toxics", name=kind, type=kind, attributes=attributes)
        yield
        self._ask("DELETE", f"/proxies/{name}/toxics/{kind}")

    def _ask(self, method: str, path: str, **body: object) -> None:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self._url + path, data, method=method)
        with urllib.request.urlopen(request, timeout=10):
            pass


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False
