"""What the stack tests share: one running stack, and binaries or the reason why there are none."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
from servers import Collector, Jaeger, NoServersError, Prometheus, binaries

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stack(NamedTuple):
    """A Collector that sends traces to a Jaeger and metrics to a Prometheus."""

    collector: Collector
    jaeger: Jaeger
    prometheus: Prometheus


@pytest.fixture(scope="session")
def servers_exist() -> None:
    """Skip what needs servers where they are missing; under CI=true that is a failure."""
    try:
        binaries()
    except NoServersError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def stack(servers_exist: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Return the running stack that tests share which leave it as it is."""
    folder = tmp_path_factory.mktemp("stack")
    jaeger, prometheus = Jaeger(folder / "jaeger"), Prometheus(folder / "prometheus")
    collector = Collector(folder / "collector", jaeger.otlp, prometheus.url)
    with jaeger, prometheus, collector:
        yield Stack(collector, jaeger, prometheus)
