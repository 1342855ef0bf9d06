"""What is made of NVML's numbers, and of the ids by which it lists processes."""

from __future__ import annotations

import os
import sys

import pytest

from periscope_otel.gauges.gpu import NOT_INSTALLED, GpuUnavailableError
from periscope_otel.gauges.nvml import DeviceNames, NvmlBackend
from periscope_otel.gauges.nvml_device import PcieCounters, count, namespaced_pids, own_pids


def test_without_pynvml_there_is_a_reason(monkeypatch):
    """Where the package is not installed that is said, and is no fault."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    backend = NvmlBackend()
    with pytest.raises(GpuUnavailableError, match="pynvml is not installed") as caught:
        backend.open()
    assert caught.value.problem.reason in NOT_INSTALLED
    backend.after_fork()


@pytest.mark.parametrize("value", [0, 1, 2**32 - 2, 2**32, 2**63 - 1])
def test_numbers_are_told(value):
    """Whatever fits into a signed number of 64 bits is a figure."""
    assert count(value) == value


@pytest.mark.parametrize(
    ("value", "bits"), [(None, 64), (-1, 64), (2**63, 64), (2**64 - 1, 64), (2**32 - 1, 32)]
)
def test_what_stands_for_no_number(value, bits):
    """NVML's ways to say that there is none, and what no exporter can send, are no figures."""
    assert count(value, bits) is None


def test_counters_never_decrease():
    """A counter that begins again goes on from where it was; each direction by itself."""
    counters = PcieCounters()
    assert counters.add(transmit=10, receive=5) == {"transmit": 10, "receive": 5}
    assert counters.add(transmit=3, receive=None) == {"transmit": 13}
    assert counters.add(transmit=4, receive=6) == {"transmit": 14, "receive": 6}
    assert counters.add(transmit=1, receive=6) == {"transmit": 15, "receive": 6}
    assert counters.add(transmit=None, receive=None) is None


def test_pids_of_this_process():
    """A process knows itself by its own id, in the child of a fork by the child's."""
    assert os.getpid() in own_pids(os.getpid())


def test_pids_of_all_namespaces_in_sight():
    """A process that is seen from outside its namespace has an id in each."""
    status = "Name:\tpython\nPid:\t4711\nNSpid:\t4711\t12\t1\nThreads:\t1\n"
    assert namespaced_pids(status) == [4711, 12, 1]
    assert namespaced_pids("Name:\tpython\n") == []


def test_a_gpu_keeps_its_name():
    """A GPU keeps its first name wherever it is counted, and no other one gets that."""
    names = DeviceNames()
    assert [names.of_gpu("a", 0), names.of_gpu("b", 1)] == ["GPU 0", "GPU 1"]
    assert names.of_gpu("b", 0) == "GPU 1"
    assert names.of_gpu("c", 1) == "GPU 2"


def test_a_part_takes_over_a_name():
    """A part that was made in another one's place has its name: there are no more than places."""
    names = DeviceNames()
    for number in range(1000):
        assert names.of_part(f"part {number}", "GPU 0 MIG 0") == "GPU 0 MIG 0"
    assert names.of_part("part 999", "GPU 0 MIG 3") == "GPU 0 MIG 0"
    assert len(names._parts) == 1
