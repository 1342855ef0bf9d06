"""The GPU reader with a backend of another make: what it asks of one, and how it looks again."""

from __future__ import annotations

import logging

import pytest
from gpu_world import (
    GONE,
    LOST,
    SAYS_NOTHING,
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
    GpuReader,
    GpuUnavailableError,
    RefusedGpu,
)
from periscope_otel.gauges.gpu_health import FIRST_RETRY, LAST_RETRY, STEADY


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "periscope_otel")
    return caplog


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


# Lost devices.


def test_a_lost_gpu_is_not_touched_before_its_retry(clock):
    """Neither a reading nor the look at what has changed touches a GPU that is lost."""
    kept, lost = Device("card0"), Device("card1")
    backend = Backend(kept, lost)
    reader = GpuReader(backend, clock)
    reader.read(slow=True)
    lost.error = LOST
    reader.read(slow=True)
    before = len(lost.asked)
    for _ in range(3):
        reader.read(slow=True)
    assert len(lost.asked) == before
    assert backend.not_to_touch[-3:] == [{"card1"}] * 3


def test_one_silent_gpu_is_lost_alone(clock):
    """A GPU that answers nothing is failed; the others are told in every reading."""
    silent = Device("card0")
    reader = GpuReader(Backend(silent, Device("card1")), clock)
    silent.error = SAYS_NOTHING
    for _ in range(720):
        assert states(reader) == {"card0": FAILED, "card1": OK}
        clock.now += 5
    assert reason(reader) == "silent"


def test_where_all_are_silent_the_driver_is_gone(clock, lines):
    """Where no GPU answers all are failed, and the problem is the driver's, in one line."""
    devices = [Device("card0"), Device("card1")]
    reader = GpuReader(Backend(*devices), clock)
    for one in devices:
        one.error = SAYS_NOTHING
    for _ in range(3):
        assert states(reader) == {"card0": FAILED, "card1": FAILED}
        assert reason(reader) == "silent_driver"
        clock.now += FIRST_RETRY
    assert [line.split(":")[0] for line in lines.messages] == ["no GPU figures"]


def test_an_unexpected_error_of_one_device_is_its_own(clock):
    """Whatever a device raises, the others are told."""
    broken = Device("card0")
    reader = GpuReader(Backend(broken, Device("card1")), clock)
    broken.error = RuntimeError("it is broken")
    assert states(reader) == {"card0": FAILED, "card1": OK}
    assert "RuntimeError: it is broken" in reader.read(slow=False).problem.message


@pytest.mark.parametrize(
    "error", [GpuUnavailableError(GONE), RuntimeError("it is broken")], ids=["driver", "other"]
)
def test_known_gpus_stay_failed_while_the_driver_does_not_open(clock, error):
    """On a machine whose only GPU is lost, `failed` is told for as long as that lasts."""
    device = Device("card0")
    backend = Backend(device)
    reader = GpuReader(backend, clock)
    reader.read(slow=False)
    device.error, backend.error = LOST, error
    for _ in range(720):
        assert states(reader) == {"card0": FAILED}
        clock.now += 5
    device.error = backend.error = None
    clock.now += LAST_RETRY
    assert states(reader) == {"card0": OK}


def test_gpus_that_were_never_seen_are_not_told(clock):
    """Where the driver never opened there is a problem, and no device."""
    backend = Backend(Device("card0"))
    backend.error = GpuUnavailableError(GONE)
    reader = GpuReader(backend, clock)
    assert states(reader) == {}
    assert reason(reader) == "gone"


def test_any_error_of_open_backs_off(clock, lines):
    """An error of the backend that nobody foresaw is a problem like others, and no busy loop."""
    backend = Backend(Device("card0"))
    backend.error = ValueError("what is this")
    reader = GpuReader(backend, clock)
    assert pauses(opens(reader, backend, clock, 100)) == [5, 10, 20, 40]
    (line,) = lines.messages
    assert line.startswith("no GPU figures: ValueError: what is this (unexpected_error). What ")


# Refused devices.


def test_a_gpu_that_cannot_be_opened_is_told(clock, lines):
    """A GPU that is refused at the start gets one line and a problem, and is looked for again."""
    backend = Backend(Device("card0"))
    backend.refused = [RefusedGpu("CARD1", None, GONE)]
    reader = GpuReader(backend, clock)
    assert pauses(opens(reader, backend, clock, 80))[:4] == [5, 10, 20, 40]
    stats = reader.read(slow=False)
    assert [one.identity.id for one in stats.devices] == ["card0"]
    assert stats.problem == GONE._replace(message="no figures of CARD1: it is gone")
    assert lines.messages == ["no figures of CARD1: it is gone (gone). What helps: bring it back"]
    backend.refused, backend.devices = [], [*backend.devices, Device("card1")]
    clock.now += LAST_RETRY
    assert states(reader) == {"card0": OK, "card1": OK}
    assert reason(reader) is None
    clock.now += STEADY
    reader.read(slow=False)
    assert lines.messages[1:] == ["figures of CARD1 (card1) are back"]


def test_a_known_gpu_that_is_refused_is_failed_for_that_reason(clock):
    """A GPU that was there and is refused is failed, with the reason of its refusal."""
    device = Device("card0")
    backend = Backend(device, Device("card1"))
    reader = GpuReader(backend, clock)
    reader.read(slow=False)
    backend.devices.remove(device)
    backend.refused = [RefusedGpu("CARD0", "card0", GONE)]
    backend.other = True
    assert states(reader, slow=True) == {"card0": FAILED, "card1": OK}
    assert reason(reader) == "gone"


def test_a_gpu_that_is_listed_no_more_is_told(clock, lines):
    """A GPU that falls off the list is failed and gets one line that names it."""
    device = Device("card1")
    backend = Backend(Device("card0"), device)
    reader = GpuReader(backend, clock)
    reader.read(slow=False)
    backend.devices.remove(device)
    backend.other = True
    for _ in range(10):
        assert states(reader, slow=True) == {"card0": OK, "card1": FAILED}
        clock.now += 30
    assert reason(reader) == "gpu_is_missing"
    assert [line.split(":")[0] for line in lines.messages] == ["no figures of CARD1 (card1)"]


# Parts.


def test_parts_that_go_are_not_lost(clock):
    """A part that is not there any more was removed, not lost."""
    backend = Backend(Device("card0"), Device("part", parent="card0"))
    reader = GpuReader(backend, clock)
    reader.read(slow=False)
    backend.devices.pop()
    backend.other = True
    assert set(states(reader)) == {"card0", "part"}
    assert states(reader, slow=True) == {"card0": OK}


@pytest.mark.parametrize("error", [LOST, SAYS_NOTHING], ids=["lost", "silent"])
def test_a_silent_part_has_the_list_read_again(clock, lines, error):
    """A part that does not answer is no fault: it is not told, others are, and it is looked for."""
    part = Device("part", parent="card0")
    backend = Backend(Device("card0"), part, Device("other", parent="card0"))
    reader = GpuReader(backend, clock)
    reader.read(slow=False)
    part.error = error
    found = []
    for second in range(300):
        before = len(backend.calls)
        assert states(reader) == {"card0": OK, "other": OK}
        if len(backend.calls) > before:
            found.append(second)
        clock.now += 1
    assert found[:4] == [5, 15, 35, 75]
    assert reason(reader) is None
    assert lines.messages == []


def test_parts_of_a_lost_gpu_are_not_touched(clock):
    """What is lost or silent takes its parts with it."""
    whole, part = Device("card0"), Device("part", parent="card0")
    reader = GpuReader(Backend(whole, part, Device("card1")), clock)
    reader.read(slow=False)
    for error in (LOST, SAYS_NOTHING):
        whole.error = error
        assert states(reader) == {"card0": FAILED, "card1": OK}
        assert states(reader) == {"card0": FAILED, "card1": OK}
        assert len(part.asked) == 1
        clock.now += LAST_RETRY


# Hanging, and forks.


def told(reader: GpuReader) -> tuple[dict[str, str | None], str]:
    left = reader.left_behind()
    assert all(one.temperature is None for one in left.devices)
    return {one.identity.id: one.state for one in left.devices}, left.problem.message


def test_only_the_device_that_hangs_is_failed(clock):
    """While the reading of a device hangs that one is failed, and those that were; no others."""
    devices = [Device("card0"), Device("card1"), Device("card2")]
    reader = GpuReader(Backend(*devices), clock)
    reader.read(slow=False)
    devices[0].error = LOST
    seen = []
    devices[1].meanwhile = lambda: seen.append(told(reader))
    reader.read(slow=False)
    assert seen == [
        (
            {"card0": FAILED, "card1": FAILED},
            "a call to the GPU driver about CARD1 (card1) does not return",
        )
    ]


def test_a_driver_that_hangs_fails_all(clock):
    """While opening the driver hangs, all GPUs that were ever seen are failed, not their parts."""
    backend = Backend(Device("card0"), Device("part", parent="card0"))
    reader = GpuReader(backend, clock)
    seen = []
    backend.meanwhile = lambda: seen.append(told(reader))
    reader.read(slow=False)
    backend.other = True
    reader.read(slow=True)
    message = "a call to the GPU driver does not return"
    assert seen == [({}, message), ({"card0": FAILED}, message)]


def test_after_a_fork_it_opens_anew(clock):
    """In the child of a fork the backend is told, and opened again without being closed."""
    backend = Backend(Device("card0"))
    reader = GpuReader(backend, clock)
    reader.read(slow=False)
    reader.after_fork()
    assert states(reader) == {"card0": OK}
    assert backend.calls == ["open", "after_fork", "open"]
    assert backend.devices[0].asked == [True, True]


def test_a_child_looks_at_once_and_does_not_repeat_what_was_said(clock, lines):
    """A child does not wait for its parent's next retry, nor log its parent's problem again."""
    backend = Backend(Device("card0"))
    backend.error = GpuUnavailableError(GONE)
    reader = GpuReader(backend, clock)
    reader.read(slow=False)
    reader.after_fork()
    reader.read(slow=False)
    assert backend.calls == ["open", "after_fork", "open"]
    assert len(lines.messages) == 1
