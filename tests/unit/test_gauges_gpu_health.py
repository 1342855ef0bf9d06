"""When a GPU or its driver is looked for again, and what the log says of it."""

from __future__ import annotations

import logging

import pytest
from gpu_world import (
    GONE,
    LOST,
    SILENT,
    Backend,
    Clock,
    Device,
    opens,
    pauses,
    reason,
    states,
)

from periscope_otel.gauges.gpu import (
    FAILED,
    OK,
    GpuLostError,
    GpuReader,
    GpuUnavailableError,
)
from periscope_otel.gauges.gpu_health import FIRST_RETRY, LAST_RETRY, SAY_AGAIN, STEADY
from periscope_otel.gauges.stats import GpuProblem


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "periscope_otel")
    return caplog


# Pauses.


def test_pauses_grow_to_their_bound(clock):
    """A driver that is not there is looked for after 5, 10, 20 … seconds, at most 300."""
    backend = Backend()
    backend.error = GpuUnavailableError(GONE)
    found = pauses(opens(GpuReader(backend, clock), backend, clock, 2000))
    assert found[:7] == [5, 10, 20, 40, 80, 160, 300]
    assert set(found[6:]) == {LAST_RETRY}


def test_the_pause_is_short_again_after_it_was_well_for_a_while(clock):
    """A device that was back for a minute is looked for soon when it is lost once more."""
    device = Device("card0")
    reader = GpuReader(Backend(device), clock)
    for _ in range(3):
        device.error = LOST
        assert states(reader) == {"card0": FAILED}
        device.error = None
        assert states(reader) == {"card0": FAILED}
        clock.now += FIRST_RETRY
        assert states(reader) == {"card0": OK}
        clock.now += STEADY
        assert states(reader) == {"card0": OK}


def test_a_pause_grows_once_however_many_devices_there_are(clock):
    """A driver that fails eight devices in one reading is looked for after the first pause."""
    devices = [Device(f"card{number}") for number in range(8)]
    backend = Backend(*devices)
    reader = GpuReader(backend, clock)
    reader.read(slow=False)
    for one in devices:
        one.error = GpuUnavailableError(GONE)
    assert pauses(opens(reader, backend, clock, 50))[:3] == [10, 20]


def test_each_device_has_a_pause_of_its_own(clock):
    """A driver that fails for once is opened again soon, also where a GPU was lost for hours."""
    kept, lost = Device("card0"), Device("card1")
    backend = Backend(kept, lost)
    reader = GpuReader(backend, clock)
    reader.read(slow=False)
    backend.devices.remove(lost)
    backend.other = True
    reader.read(slow=True)
    opens(reader, backend, clock, 7200)
    kept.error = GpuUnavailableError(GONE)
    reader.read(slow=False)
    kept.error = None
    clock.now += FIRST_RETRY
    assert states(reader) == {"card0": OK, "card1": FAILED}


def test_a_healthy_gpu_is_told_in_every_reading_beside_a_lost_one(clock):
    """Looking for a lost GPU costs the others no figure, and is done ever less often."""
    kept, lost = Device("card0"), Device("card1")
    backend = Backend(kept, lost)
    reader = GpuReader(backend, clock)
    lost.error = LOST
    opened = []
    for second in range(3600):
        before = len(backend.calls)
        assert states(reader) == {"card0": OK, "card1": FAILED}
        if len(backend.calls) > before:
            opened.append(second)
        clock.now += 1
    assert pauses(opened)[:6] == [5, 10, 20, 40, 80, 160]
    assert len(opened) < 20


# What is said.


def test_a_problem_of_another_kind_is_told_too(clock, lines):
    """Each reason is one line for as long as it lasts."""
    backend = Backend()
    reader = GpuReader(backend, clock)
    for word in ("one", "one", "two", "two"):
        backend.error = GpuUnavailableError(GpuProblem(word, "it is", "do it"))
        clock.now += LAST_RETRY
        reader.read(slow=False)
    assert len(lines.messages) == 2


def test_each_device_has_a_line_of_its_own(clock, lines):
    """Two GPUs that are lost for one reason are two lines, each naming its GPU."""
    devices = [Device("card0"), Device("card1"), Device("card2")]
    reader = GpuReader(Backend(*devices), clock)
    for one in devices[:2]:
        one.error = LOST
        reader.read(slow=False)
    assert [line.split(":")[0] for line in lines.messages] == [
        "no figures of CARD0 (card0)",
        "no figures of CARD1 (card1)",
    ]


def test_what_lasts_is_one_line(clock, lines):
    """Two GPUs that are lost for different reasons are a line each, however long that lasts."""
    devices = [Device("card0"), Device("card1"), Device("card2")]
    reader = GpuReader(Backend(*devices), clock)
    devices[0].error = LOST
    devices[1].error = GpuLostError(SILENT)
    for _ in range(10 * 720):
        reader.read(slow=False)
        clock.now += 5
    assert len(lines.messages) == 2


def test_what_flaps_is_a_line_an_hour(clock, lines):
    """A GPU that comes and goes is one line an hour, and not said to be back."""
    device = Device("card0")
    reader = GpuReader(Backend(device, Device("card1")), clock)
    for number in range(3 * 720):
        device.error = None if number % 7 else LOST
        reader.read(slow=False)
        clock.now += 5
    assert [line.split(":")[0] for line in lines.messages] == ["no figures of CARD0 (card0)"] * 3


def test_what_was_not_said_while_it_flapped_is_said_if_it_lasts(clock, lines):
    """A loss within the hour after another one is logged when the hour is over, if it lasts."""
    device = Device("card0")
    reader = GpuReader(Backend(device), clock)
    for error in (LOST, None, None, LOST):
        device.error = error
        reader.read(slow=False)
        clock.now += STEADY + FIRST_RETRY
    assert [line.split(":")[0] for line in lines.messages] == [
        "no figures of CARD0 (card0)",
        "figures of CARD0 (card0) are back",
    ]
    for _ in range(int(SAY_AGAIN + LAST_RETRY)):
        reader.read(slow=False)
        clock.now += 1
    assert len(lines.messages) == 3


def test_it_is_back_when_it_was_well_for_a_while(clock, lines):
    """The problem ends with the first answer, and the line that says so comes a minute later."""
    device = Device("card0")
    reader = GpuReader(Backend(device), clock)
    device.error = LOST
    reader.read(slow=False)
    device.error = None
    clock.now += FIRST_RETRY
    assert reason(reader) is None
    for _ in range(11):
        clock.now += 5
        reader.read(slow=False)
    assert len(lines.messages) == 1
    clock.now += 5
    reader.read(slow=False)
    assert lines.messages[1:] == ["figures of CARD0 (card0) are back"]


def test_the_problem_is_that_of_now(clock):
    """When the driver is back and a GPU is not, the problem is that GPU's, by name."""
    first, second = Device("card0"), Device("card1")
    backend = Backend(first, second)
    reader = GpuReader(backend, clock)
    reader.read(slow=False)
    first.error = GpuUnavailableError(GONE)
    assert reason(reader) == "gone"
    first.error = None
    backend.devices.remove(first)
    clock.now += FIRST_RETRY
    problem = reader.read(slow=False).problem
    assert problem.reason == "gpu_is_missing"
    assert problem.message.startswith("no figures of CARD0 (card0): ")
