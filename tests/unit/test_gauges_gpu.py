"""The GPU reader with a backend of another make: what it asks of one, and how it looks again."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from periscope_otel.gauges.gpu import (
    FAILED,
    OK,
    FoundGpus,
    GpuLostError,
    GpuReader,
    GpuSilentError,
    GpuUnavailableError,
    RefusedGpu,
)
from periscope_otel.gauges.gpu_health import FIRST_RETRY, LAST_RETRY, SAY_AGAIN, STEADY
from periscope_otel.gauges.stats import GpuDeviceStats, GpuIdentity, GpuProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

GONE = GpuProblem("gone", "it is gone", "bring it back")
SILENT = GpuProblem("silent", "it says nothing", "talk to it")
DRIVER_SILENT = GpuProblem("silent_driver", "nothing is said", "talk to it")
LOST = GpuLostError(GONE)
SAYS_NOTHING = GpuSilentError(SILENT, DRIVER_SILENT)


class Device:
    """A GPU that answers until it has something to raise."""

    def __init__(self, name: str, parent: str | None = None) -> None:
        self.identity = GpuIdentity(id=name, name=name.upper(), vendor="AMD", parent=parent)
        self.error: Exception | None = None
        self.meanwhile: Callable[[], None] = bool
        self.asked: list[bool] = []

    def read(self, *, slow: bool) -> GpuDeviceStats:
        self.asked.append(slow)
        self.meanwhile()
        if self.error is not None:
            raise self.error
        return GpuDeviceStats(self.identity, state=OK, temperature=40.0)


class Backend:
    """A driver with these devices, until there is something to raise."""

    def __init__(self, *devices: Device) -> None:
        self.devices = list(devices)
        self.refused: list[RefusedGpu] = []
        self.error: Exception | None = None
        self.calls: list[str] = []
        self.other = False
        self.not_to_touch: list[set[str]] = []
        self.meanwhile: Callable[[], None] = bool

    def open(self) -> FoundGpus:
        self.calls.append("open")
        self.other = False
        self.meanwhile()
        if self.error is not None:
            raise self.error
        return FoundGpus(list(self.devices), list(self.refused))

    def changed(self, lost: Collection[str]) -> bool:
        self.not_to_touch.append(set(lost))
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


@pytest.fixture(autouse=True)
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "periscope_otel")
    return caplog


def states(reader: GpuReader, *, slow: bool = False) -> dict[str, Any]:
    return {one.identity.id: one.state for one in reader.read(slow).devices}


def reason(reader: GpuReader) -> str | None:
    problem = reader.read(slow=False).problem
    return None if problem is None else problem.reason


def opens(reader: GpuReader, backend: Backend, clock: Clock, seconds: int) -> list[int]:
    """Read every second, and return the seconds in which the backend was opened."""
    found = []
    for second in range(seconds):
        before = backend.calls.count("open")
        reader.read(slow=False)
        if backend.calls.count("open") > before:
            found.append(second)
        clock.now += 1
    return found


def pauses(moments: list[int]) -> list[int]:
    return [later - earlier for earlier, later in pairwise(moments)]


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
