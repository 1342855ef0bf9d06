"""Gauges are called, counted and labelled as the semantic conventions say."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from typing import Any

import pytest
from opentelemetry.metrics import NoOpMeter
from opentelemetry.semconv import _incubating, attributes
from opentelemetry.semconv._incubating import attributes as incubating_attributes
from opentelemetry.semconv._incubating import metrics as incubating_metrics
from opentelemetry.semconv._incubating.attributes import (
    cpu_attributes,
    disk_attributes,
    hw_attributes,
    network_attributes,
    process_attributes,
    system_attributes,
)

from periscope_otel.gauges.gpu import STATES
from periscope_otel.gauges.host import _MODES
from periscope_otel.gauges.observe import GPU, HOST, Figure
from periscope_otel.telemetry import names

OWN = [
    "periscope.host.load",
    "periscope.container.memory.limit",
    "periscope.container.cpu.limit",
    "periscope.gpu.power.limit",
    "periscope.gpu.clock.speed",
    "periscope.gpu.process.memory.usage",
    "periscope.gpu.remapped_rows",
]
OWN_ATTRIBUTES = {"periscope.host.load.period", "periscope.gpu.clock.domain"}


class Recorder(NoOpMeter):
    """Keeps the kind, name and unit of what is made on it."""

    def __init__(self) -> None:
        super().__init__("recorder")
        self.made: list[tuple[str, str, str]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("create_"):
            return super().__getattribute__(name)
        kind = name.removeprefix("create_").removeprefix("observable_")

        def create(name: str, callbacks: Any = None, unit: str = "", description: str = "") -> None:
            self.made.append((kind, name, unit))

        return create


def conventions() -> dict[str, tuple[str, str]]:
    """Return kind and unit of every metric of the conventions' package, by name."""
    recorder = Recorder()
    for found in pkgutil.iter_modules(incubating_metrics.__path__):
        module = importlib.import_module(f"{incubating_metrics.__name__}.{found.name}")
        for name, create in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("create_"):
                wants_callbacks = "callbacks" in inspect.signature(create).parameters
                create(recorder, *([()] if wants_callbacks else []))
    return {name: (kind, unit) for kind, name, unit in recorder.made}


def deprecated_attributes() -> set[str]:
    """Return the attributes that the conventions' package calls deprecated."""
    found = set()
    for one in pkgutil.iter_modules(incubating_attributes.__path__):
        module = importlib.import_module(f"{incubating_attributes.__name__}.{one.name}")
        text = inspect.getsource(module)
        found |= set(re.findall(r'Final = "([^"]+)"\n"""\nDeprecated', text))
    return found


def known_attributes() -> set[str]:
    found = set()
    for package in (attributes, incubating_attributes):
        for one in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{one.name}")
            found |= {value for name, value in vars(module).items() if name.isupper()}
    return found


@pytest.fixture(scope="module")
def tables() -> dict[str, tuple[str, str]]:
    return conventions()


def test_the_tables_are_read(tables):
    """The conventions' tables are found: a few that are known."""
    assert tables["system.cpu.time"] == ("counter", "s")
    assert tables["hw.temperature"] == ("gauge", "Cel")
    assert tables["process.memory.usage"] == ("up_down_counter", "By")
    assert _incubating is not None


@pytest.mark.parametrize("figure", [*HOST, *GPU], ids=lambda one: one.metric.name)
def test_kind_and_unit_are_those_of_the_conventions(tables, figure):
    """Every metric has the kind and unit of the conventions, or is one of those they lack."""
    metric = figure.metric
    if metric.name in OWN:
        assert metric.name not in tables
    else:
        assert tables[metric.name] == (figure.kind, metric.unit)


def test_what_the_conventions_lack_is_all_there():
    """Our own metrics are exactly those of the design, each with its unit."""
    own = {f.metric.name: f.metric.unit for f in (*HOST, *GPU) if f.metric.name in OWN}
    assert sorted(own) == sorted(OWN)
    assert own["periscope.gpu.clock.speed"] == "Hz"
    assert own["periscope.gpu.power.limit"] == "W"


def test_no_metric_is_told_twice():
    """No two figures share a name."""
    told = [figure.metric.name for figure in (*HOST, *GPU)]
    assert len(told) == len(set(told))


def attribute_names() -> list[str]:
    block = inspect.getsource(names).split("CPU_MODE: Final")[1].split("OTHER: Final")[0]
    return re.findall(r'Final = "([^"]+)"|^ = "([^"]+)"', "CPU_MODE: Final" + block, re.MULTILINE)


def test_attributes_are_those_of_the_conventions():
    """Every attribute is one of the conventions that is not deprecated, or ours."""
    told = {one for pair in attribute_names() for one in pair if one}
    assert len(told) > 25
    assert told - known_attributes() == OWN_ATTRIBUTES
    assert told & deprecated_attributes() == set()


def values(enum: Any) -> set[str]:
    return {one.value for one in enum}


def test_values_are_those_of_the_conventions():
    """Modes, states, types and directions are values that the conventions list."""
    assert {mode for mode, _ in _MODES} <= values(cpu_attributes.CpuModeValues)
    assert set(STATES) <= values(hw_attributes.HwStateValues)
    assert {"used", "free", "buffers", "cached"} <= values(
        system_attributes.SystemMemoryStateValues
    )
    assert {"used", "free"} == values(system_attributes.SystemPagingStateValues)
    assert {"used", "free", "reserved"} == values(system_attributes.SystemFilesystemStateValues)
    assert {"minor", "major"} == values(system_attributes.SystemPagingFaultTypeValues)
    assert {"read", "write"} == values(disk_attributes.DiskIoDirectionValues)
    assert {"receive", "transmit"} == values(network_attributes.NetworkIoDirectionValues)
    assert {"voluntary", "involuntary"} == values(process_attributes.ProcessContextSwitchTypeValues)
    # `memory` is one of ours: the conventions allow others.
    assert {"general", "encoder", "decoder"} <= values(hw_attributes.HwGpuTaskValues)


def test_figures_are_tuples_of_the_tables():
    """Host and GPU tables hold figures, which the instruments are made of."""
    assert all(isinstance(one, Figure) for one in (*HOST, *GPU))
