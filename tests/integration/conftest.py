"""What the integration tests share: a running collector, and a Redis for those that need one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from otlp import Receiver, receiver
from redis_servers import NoServerError, RedisServer

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def collector() -> Iterator[Receiver]:
    """Return a receiver of OTLP over gRPC and HTTP that keeps what it gets."""
    with receiver() as running:
        yield running


@pytest.fixture(scope="module")
def redis(tmp_path_factory) -> Iterator[RedisServer]:
    """Return a Redis that the tests of a module share; each has to empty it."""
    try:
        with RedisServer("redis", tmp_path_factory.mktemp("redis")) as running:
            yield running
    except NoServerError as error:
        pytest.skip(str(error))
