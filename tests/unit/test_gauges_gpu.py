"""The GPU reader with a backend of another make: what it asks of one, and how it looks again."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from periscope_otel.gauges.gpu import (
    FAILED,
    FIRST_RETRY,
    LAST_RETRY,
    OK,
    GpuLostError,
    GpuReader,
    GpuUnavailableError,
)
from periscope_otel.gauges.stats import GpuDeviceStats, GpuIdentity, GpuProblem

GONE = GpuProblem("gone", "it is gone", "bring it back")


class Device:
    """A GPU that answers until it has something to raise."""

    def __init__(self, name: str, parent: str | None = None) -> None:
        self.identity = GpuIdentity(id=name, name=name, vendor="AMD", parent=parent)
        self.error: Exception | None = None
        self.asked: list[bool] = []

    def read(self, *, slow: bool) -> GpuDeviceStats:
        self.asked.append(slow)
        if self.error is not None:
            raise self.error
        return GpuDeviceStats(self.identity, state=OK, temperature=40.0)


class Backend:
    """A driver with these devices, until there is a problem."""

    def __init__(self, *devices: Device) -> None:
        self.devices = list(devices)
        self.problem: GpuProblem | None = None
        self.calls: list[str] = []
        self.other = False

    def open(self) -> list[Device]:
        self.calls.append("open")
        self.other = False
        if self.problem is not None:
            raise GpuUnavailableError(self.problem)
        return list(self.devices)

    def changed(self) -> bool:
        return self.other

    def close(self) -> None:
        self.calls.append("close")

    def after_fork(self) -> None:
        self.calls.append("after_fork")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def states(reader: GpuReader, *, slow: bool = False) -> dict[str, Any]:
    return {one.identity.id: one.state for one in reader.read(slow).devices}


def test_a_backend_is_all_it_needs(clock):
    """Any backend with these four calls is read; it is opened once, and closed at the end."""
    backend = Backend(Device("card0"), Device("card1"))
    reader = GpuReader(backend, clock)
    for _ in range(3):
        assert states(reader) == {"card0": OK, "card1": OK}
    assert backend.calls == ["open"]
    assert backend.devices[0].asked == [True, False, False]
    reader.close()
    reader.close()
    assert backend.calls == ["open", "close"]


def test_pauses_grow_to_their_bound(clock):
    """A driver that is not there is looked for after 5, 10, 20 … seconds, at most 300."""
    backend = Backend()
    backend.problem = GONE
    reader = GpuReader(backend, clock)
    looks = []
    for second in range(2000):
        clock.now = float(second)
        before = len(backend.calls)
        reader.read(slow=False)
        if len(backend.calls) > before:
            looks.append(second)
    pauses = [later - earlier for earlier, later in pairwise(looks)]
    assert pauses[:7] == [5, 10, 20, 40, 80, 160, 300]
    assert set(pauses[6:]) == {LAST_RETRY}


def test_the_pause_is_short_again_after_it_was_well(clock):
    """A device that was back for good is looked for soon when it is lost once more."""
    device = Device("card0")
    reader = GpuReader(Backend(device), clock)
    for _ in range(3):
        device.error = GpuLostError(GONE)
        assert states(reader) == {"card0": FAILED}
        device.error = None
        assert states(reader) == {"card0": FAILED}
        clock.now += FIRST_RETRY
        assert states(reader) == {"card0": OK}


def test_a_device_that_flaps_is_looked_for_less_and_less(clock, caplog):
    """A device that is found and lost again with each look is told once, and asked ever less."""
    device = Device("card0")
    backend = Backend(device)
    reader = GpuReader(backend, clock)
    reader.read(slow=False)
    device.error = GpuLostError(GONE)
    for _ in range(1000):
        clock.now += 1.0
        assert states(reader) == {"card0": FAILED}
    assert backend.calls.count("open") <= 10
    assert len(caplog.messages) == 1


def test_a_problem_of_another_kind_is_told_too(clock, caplog):
    """Each reason is one line for as long as it lasts."""
    backend = Backend()
    reader = GpuReader(backend, clock)
    for reason in ("one", "one", "two", "two"):
        backend.problem = GpuProblem(reason, "it is", "do it")
        clock.now += LAST_RETRY
        reader.read(slow=False)
    assert len(caplog.messages) == 2


def test_what_a_hanging_reading_leaves(clock):
    """While a reading hangs every whole device that was seen is failed; its parts are not told."""
    reader = GpuReader(Backend(Device("card0"), Device("part", parent="card0")), clock)
    assert reader.left_behind().devices == ()
    reader.read(slow=False)
    left = reader.left_behind()
    assert [(one.identity.id, one.state, one.temperature) for one in left.devices] == [
        ("card0", FAILED, None)
    ]
    assert left.problem.reason == "driver_hangs"


def test_parts_that_go_are_not_lost(clock):
    """A part that is not there any more was removed, not lost."""
    backend = Backend(Device("card0"), Device("part", parent="card0"))
    reader = GpuReader(backend, clock)
    reader.read(slow=False)
    backend.devices.pop()
    backend.other = True
    assert set(states(reader)) == {"card0", "part"}
    assert states(reader, slow=True) == {"card0": OK}


def test_after_a_fork_it_opens_anew(clock):
    """In the child of a fork the backend is told, and opened again without being closed."""
    backend = Backend(Device("card0"))
    reader = GpuReader(backend, clock)
    reader.read(slow=False)
    reader.after_fork()
    assert states(reader) == {"card0": OK}
    assert backend.calls == ["open", "after_fork", "open"]
    assert backend.devices[0].asked == [True, True]
