"""What the integration tests share: a running collector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from otlp import Receiver, receiver

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def collector() -> Iterator[Receiver]:
    """Return a receiver of OTLP over gRPC and HTTP that keeps what it gets."""
    with receiver() as running:
        yield running
