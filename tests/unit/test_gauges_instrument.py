"""`instrument_gauges()`: one sampler for the process, instruments made once on each provider."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import periscope_otel as periscope
from periscope_otel import guard
from periscope_otel.gauges import Gauges, get_gpu_stats, get_system_stats, instrument_gauges
from periscope_otel.gauges import instrument as instrument_module
from periscope_otel.gauges import sampler as sampler_module
from periscope_otel.gauges.filesystems import FilesystemReader
from periscope_otel.gauges.instrument import _state
from periscope_otel.gauges.observe import HOST, Figure
from periscope_otel.gauges.sampler import Sampler
from periscope_otel.telemetry import names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Provided:
    """A meter provider with its readers."""

    def __init__(self, readers: int = 1) -> None:
        self.readers = [InMemoryMetricReader() for _ in range(readers)]
        self.provider = MeterProvider(self.readers, shutdown_on_exit=False)

    def points(self, reader: int = 0) -> dict[str, list[Any]]:
        """Collect, and return the data points by metric."""
        data = self.readers[reader].get_metrics_data()
        found: dict[str, list[Any]] = {}
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    found.setdefault(metric.name, []).extend(metric.data.data_points)
        return found


@pytest.fixture(autouse=True)
def filesystems_have_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no filesystem be left out, and told of, since its thread is seldom run."""
    monkeypatch.setattr(_state.sampler_of("filesystems").source, "_answer_wait", 60.0)


@pytest.fixture
def provide() -> Iterator[Callable[..., Provided]]:
    made: list[Provided] = []

    def make(readers: int = 1) -> Provided:
        made.append(Provided(readers))
        return made[-1]

    yield make
    for one in made:
        one.provider.shutdown()


@pytest.fixture
def switch_on() -> Iterator[Callable[..., Gauges]]:
    """Switch gauges on, and off after the test."""
    made: list[Gauges] = []

    def switch(provided: Provided, **more: Any) -> Gauges:
        made.append(
            instrument_gauges(meter_provider=provided.provider, **{"gauges": {"host"}, **more})
        )
        if "gpu" not in made[-1].wanted:
            for source in ("host", "filesystems"):
                assert _state.samplers[source].wait(30) is not None
        return made[-1]

    yield switch
    for one in made:
        one.close()
    assert not _state.users
    _state.asked.clear()
    for sampler in _state.samplers.values():
        assert sampler.stop(30)


@pytest.fixture
def no_sampler() -> Iterator[None]:
    """Let nothing be sampled on for whoever has asked for it once."""
    yield
    _state.asked.clear()
    for sampler in _state.samplers.values():
        assert sampler.stop(30)


@pytest.fixture
def settle(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have nothing be read by itself; what is returned waits until all has been read that is due.

    Otherwise a second reading, due a second after the first, may come at any moment.
    """
    taken: dict[Any, list[threading.Event]] = {}

    def wait_for_somebody(wake: Any, _seconds: float) -> None:
        for mark in taken.pop(wake, ()):
            mark.set()
        woken_by = [wake.get()]
        while not wake.empty():
            woken_by.append(wake.get())
        taken[wake] = [mark for mark in woken_by if mark is not None]

    monkeypatch.setattr(sampler_module, "_wait", wait_for_somebody)

    def settled() -> None:
        for source in ("host", "filesystems"):
            mark = threading.Event()
            _state.samplers[source]._turn.wake.put(mark)
            assert mark.wait(30)  # it was taken, read for, and there is nothing more to do

    return settled


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(6000):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it did not come to be")


def test_host_figures_are_collected(provide, switch_on):
    """After `instrument_gauges` a collect has the host's figures, under one scope."""
    provided = provide()
    switch_on(provided)
    points = provided.points()
    assert points["system.memory.limit"][0].value > 0
    assert points["process.thread.count"][0].value >= 1
    data = provided.readers[0].get_metrics_data()
    scopes = {
        s.scope.name: s.scope.schema_url for r in data.resource_metrics for s in r.scope_metrics
    }
    assert scopes == {names.SCOPE: names.SCHEMA_URL}


def test_three_readers_cost_one_reading(provide, switch_on, settle):
    """However many providers and readers collect, the host is read no more often."""
    several = [provide(3), provide(1)]
    for one in several:
        switch_on(one, interval=3600.0)
    settle()
    before = _state.samplers["host"].readings
    for _ in range(10):
        for one in several:
            for reader in range(len(one.readers)):
                assert one.points(reader)["system.memory.limit"]
    assert _state.samplers["host"].readings == before


def test_switching_on_twice_tells_once(provide, switch_on, caplog):
    """On one provider instruments are made once; figures are told until all are closed."""
    provided = provide()
    first, second = switch_on(provided), switch_on(provided)
    assert len(provided.points()["system.memory.limit"]) == 1
    assert caplog.messages == []
    first.close()
    first.close()
    assert "system.memory.limit" in provided.points()
    second.close()
    assert provided.points() == {}
    switch_on(provided)
    assert len(provided.points()["system.memory.limit"]) == 1
    assert caplog.messages == []


def test_the_last_that_is_closed_ends_the_thread(provide, switch_on):
    """Closing the last gauges ends the sampler's thread; the next begin with a new one."""
    provided = provide()
    gauges = switch_on(provided)
    thread = _state.samplers["host"]._turn.thread
    gauges.close()
    thread.join(30)
    assert not thread.is_alive()
    switch_on(provided)
    assert _state.samplers["host"].alive


def test_each_cpu_is_told_where_asked_for(provide, switch_on):
    """With `per_cpu` each CPU is a series, by its number from 0, in place of them all."""
    provided = provide()
    switch_on(provided)
    switch_on(provided, gauges={"per_cpu"})  # read at once, also where the others were read before

    def numbers() -> set[Any]:
        points = provided.points()["system.cpu.time"]
        return {one.attributes.get("cpu.logical_number") for one in points}

    wait_until(lambda: None not in numbers())
    assert numbers() == set(range(os.cpu_count()))
    points = provided.points()["system.cpu.time"]
    assert {one.attributes["cpu.mode"] for one in points} >= {"user", "system", "idle"}


def test_series_are_bounded(provide, switch_on):
    """All host figures together are a hundred series or so, not thousands."""
    provided = provide()
    switch_on(provided)
    assert sum(len(one) for one in provided.points().values()) < 400


@pytest.mark.parametrize("wanted", ["cpu", {"host", "disk"}, 5, object()])
def test_what_there_is_not_is_an_error(wanted, provide):
    """Gauges that there are not are a ValueError, and nothing is switched on."""
    with pytest.raises(ValueError, match="gauges="):
        instrument_gauges(meter_provider=provide().provider, gauges=wanted)
    assert not _state.users


@pytest.mark.parametrize("interval", [0, 0.05, -1, float("nan"), 1e9])
def test_an_interval_must_fit(interval, provide):
    """An interval below a tenth of a second, or none at all, is a ValueError."""
    with pytest.raises(ValueError, match="interval="):
        instrument_gauges(meter_provider=provide().provider, interval=interval)
    assert not _state.users


def test_the_shortest_interval_counts(provide, switch_on):
    """With several intervals the shortest one counts for all, as long as somebody wants it."""
    provided = provide()
    get_system_stats(0.0)
    _long, short, _between = (switch_on(provided, interval=seconds) for seconds in (60, 20, 40))
    assert _state.samplers["host"].interval == 20
    short.close()
    assert _state.samplers["host"].interval == 40


def test_what_nobody_wants_any_more_is_not_read(provide, switch_on):
    """GPUs are let go of once the last who wanted them is closed, though the host is read on."""
    provided = provide()
    switch_on(provided)
    gpu = switch_on(provided, gauges={"gpu"})
    assert _state.samplers["gpu"].wait(30) is not None
    gpu.close()
    assert _state.samplers["gpu"].stop(30)
    assert not _state.samplers["gpu"].alive
    assert _state.samplers["host"].alive


def test_each_provider_has_the_cpus_as_it_wants_them(provide, switch_on):
    """One that wants each CPU takes the total away from nobody, and its end ends them."""
    total, each = provide(), provide()
    switch_on(total, interval=3600.0)  # lest a reading be too old after a while
    gauges = switch_on(each, gauges={"per_cpu"}, interval=3600.0)

    def numbers(provided: Provided) -> set[Any]:
        points = provided.points().get("system.cpu.time", [])
        return {one.attributes.get("cpu.logical_number") for one in points}

    wait_until(lambda: 0 in numbers(each))
    assert numbers(total) == {None}
    gauges.close()
    assert numbers(total) == {None}
    assert numbers(each) == set()


def test_a_provider_that_refuses_an_instrument_leaves_nothing(provide, switch_on):
    """What it raises is raised; nothing is sampled, and a second try makes what is missing."""
    provided = provide()
    refusals = [OSError("full")]

    class Refusing:
        """A provider whose meter refuses a gauge once; it cannot be hashed."""

        __hash__ = None  # type: ignore[assignment]

        def get_meter(self, *names: Any, **more: Any) -> Any:
            meter = provided.provider.get_meter(*names, **more)
            create = meter.create_observable_gauge

            def create_or_refuse(*arguments: Any) -> Any:
                if refusals:
                    raise refusals.pop()
                return create(*arguments)

            meter.create_observable_gauge = create_or_refuse
            return meter

    provider: Any = Refusing()
    with pytest.raises(OSError, match="full"):
        instrument_gauges(meter_provider=provider, gauges={"host"})
    assert not _state.users
    handle = instrument_gauges(meter_provider=provider, gauges={"host"})
    assert _state.samplers["host"].wait(30) is not None
    assert set(provided.points()) >= {"system.cpu.time", "system.uptime", "periscope.host.load"}
    handle.close()
    _state._of_unkeyable.clear()


def test_where_the_sdk_is_disabled_nothing_is_read(monkeypatch):
    """What would be told goes nowhere."""
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    provider = MeterProvider(shutdown_on_exit=False)
    handle = instrument_gauges(meter_provider=provider)
    assert not handle.wanted
    assert not _state.users
    handle.close()
    provider.shutdown()


def test_a_closed_handle_silences_nobody_else_on_that_provider():
    """Whether it was given, or is the global one, or was so later."""
    done = python(
        """
        from opentelemetry import metrics
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from periscope_otel.gauges import get_system_stats, instrument_gauges
        on_global = instrument_gauges(gauges={"host"})
        on_proxy = instrument_gauges(meter_provider=metrics.get_meter_provider(), gauges={"host"})
        reader = InMemoryMetricReader()
        provider = MeterProvider([reader])
        given = instrument_gauges(meter_provider=provider, gauges={"host"})
        metrics.set_meter_provider(provider)
        get_system_stats(30)

        def told():
            data = reader.get_metrics_data()
            return data is not None and bool(data.resource_metrics)

        for handle in (given, on_proxy):
            assert told()
            handle.close()
        assert told()
        on_global.close()
        assert not told()
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signals by a timer")
def test_a_signal_handler_may_ask_for_stats_and_close():
    """None of the locks is one that the interrupted code could hold against the handler."""
    done = python(
        """
        import signal
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from periscope_otel.gauges import get_system_stats, instrument_gauges
        from periscope_otel.gauges.instrument import _state
        provider, calls, goes_on = MeterProvider([InMemoryMetricReader()]), 0, True

        def use():
            get_system_stats(0.0)
            instrument_gauges(meter_provider=provider, gauges={"host"}).close()

        def handle(_number, _frame):
            global calls
            calls += 1
            use()
            # Only now, lest one that takes longer be interrupted by itself without an end. And not
            # by the last one, which may come when all is over.
            if goes_on:
                signal.setitimer(signal.ITIMER_REAL, 0.002)

        # The SDK's own lock, under which instruments are made, is one that no handler may want.
        use()
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        while calls < 200:
            use()
        goes_on = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert not _state.users
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_slow_provider_holds_up_nobody_else(provide, switch_on):
    """While it makes a meter, stats are read and other gauges are closed."""
    provided = provide()
    entered, free = threading.Event(), threading.Event()

    class Slow:
        def get_meter(self, *names: Any, **more: Any) -> Any:
            entered.set()
            assert free.wait(60)
            return provided.provider.get_meter(*names, **more)

    made: list[Gauges] = []

    def work() -> None:
        made.append(instrument_gauges(meter_provider=Slow(), gauges={"host"}))  # type: ignore[arg-type]

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(30)
    switch_on(provide()).close()
    assert get_system_stats(30) is not None
    assert not made
    free.set()
    thread.join(30)
    made[0].close()


def test_a_figure_that_fails_costs_no_other(provide, switch_on, monkeypatch):
    """A callback that fails is contained, and all other figures are collected."""
    guard.set_strict(False)

    def fail(_stats: Any) -> Any:
        raise KeyError("modes")

    broken = [Figure(HOST[0].metric, HOST[0].kind, fail), *HOST[1:]]
    monkeypatch.setitem(instrument_module._FIGURES, "host", tuple(broken))
    provided = provide()
    switch_on(provided)
    points = provided.points()
    assert "system.cpu.time" not in points
    assert "system.memory.limit" in points
    assert guard.counts() == {"observing system.cpu.time": 1}


def test_stale_figures_are_absent(provide, switch_on, settle, monkeypatch):
    """What was read more than three intervals ago is not told as if it were now."""
    provided = provide()
    switch_on(provided, interval=3600.0)
    settle()
    assert provided.points()
    now = time.monotonic()
    for sampler in _state.samplers.values():
        monkeypatch.setattr(sampler, "_clock", lambda: now + 3 * 3600 + 10)
    assert provided.points() == {}


def test_a_filesystem_that_does_not_answer_costs_no_host_figure(provide, switch_on, monkeypatch):
    """While one keeps its thread waiting, the host and the other filesystems are told."""
    asked, back, real = threading.Event(), threading.Event(), os.statvfs

    def statvfs(point: Any) -> Any:
        if point == "/":
            asked.set()
            assert back.wait(60)
        return real(point)

    monkeypatch.setattr(os, "statvfs", statvfs)
    provided = provide()
    source = FilesystemReader(answer_wait=0.05)
    monkeypatch.setitem(_state.samplers, "filesystems", Sampler(source))
    try:
        switch_on(provided)
        assert asked.wait(30)
        wait_until(lambda: _state.latest("filesystems") is not None)
        points = provided.points()
        assert points["system.memory.limit"]
        told = {
            one.attributes["system.filesystem.mountpoint"]
            for one in points.get("system.filesystem.usage", ())
        }
        assert "/" not in told
    finally:
        back.set()
        assert _state.samplers["filesystems"].stop(30)
    look = source._hung["/"]
    wait_until(lambda: look.asks is None)


def test_where_there_are_no_host_figures_they_are_off(provide, monkeypatch, caplog):
    """On Windows host gauges are off, and one line says for what platforms they are."""
    monkeypatch.setattr(instrument_module, "SUPPORTED", False)
    provided = provide()
    gauges = instrument_gauges(meter_provider=provided.provider, gauges={"host", "per_cpu"})
    assert gauges.wanted == frozenset()
    assert provided.points() == {}
    assert get_system_stats() is None
    assert len(caplog.messages) == 1
    assert "not for Windows" in caplog.messages[0]
    gauges.close()


@pytest.fixture
def contrib() -> Iterator[Any]:
    """OpenTelemetry's own system-metrics instrumentation."""
    module = pytest.importorskip("opentelemetry.instrumentation.system_metrics")
    instrumentor = module.SystemMetricsInstrumentor(config={"process.thread.count": None})
    yield instrumentor
    if instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.uninstrument()
    module.SystemMetricsInstrumentor._instance = None


def test_contribs_own_instrumentation_keeps_the_host_off(provide, switch_on, contrib, caplog):
    """While OpenTelemetry's own instrumentation tells the host, ours does not, and says so once."""
    caplog.set_level(logging.WARNING, "periscope_otel")
    theirs, ours = provide(), provide()
    switch_on(ours)
    assert "system.memory.limit" in ours.points()
    contrib.instrument(meter_provider=theirs.provider)
    for _ in range(3):
        assert ours.points() == {}
    assert [line for line in caplog.messages if "host gauges stay off" in line] == caplog.messages
    assert len(caplog.messages) == 1
    assert get_system_stats() is not None
    contrib.uninstrument()
    assert "system.memory.limit" in ours.points()


@pytest.mark.usefixtures("no_sampler")
def test_stats_without_gauges():
    """The stats are there for whoever asks, without any metric, and are typed."""
    stats = get_system_stats(30)
    assert stats.process.pid == os.getpid()
    assert "/" in {one.mountpoint for one in stats.filesystems}
    assert stats.memory.total >= stats.memory.used > 0
    gpu = get_gpu_stats(30)
    assert gpu.devices or gpu.problem.remedy


@pytest.mark.usefixtures("no_sampler")
def test_sampling_for_whoever_asked_ends(monkeypatch):
    """A while after the last question; and it begins again with the next."""
    assert get_system_stats(30) is not None
    sampler = _state.samplers["host"]
    thread = sampler._turn.thread
    sampler.wake()
    assert get_system_stats(30) is not None
    assert thread.is_alive()
    monkeypatch.setattr(instrument_module, "IDLE", 0.0)
    sampler.wake()
    thread.join(30)
    assert not thread.is_alive()
    monkeypatch.undo()
    assert get_system_stats(30) is not None


class Hanging:
    """A source that does not come back until it is let go."""

    name = "gpu"

    def __init__(self) -> None:
        self.free = threading.Event()

    def read(self, slow: bool) -> None:
        self.free.wait(60)

    def left_behind(self) -> None: ...

    def close(self) -> None: ...

    def after_fork(self) -> None: ...


@pytest.mark.usefixtures("no_sampler")
def test_stats_that_do_not_come_are_none(monkeypatch):
    """Asking for stats waits no longer than it was told to."""
    waits: list[float] = []
    passed = SimpleNamespace(monotonic=lambda: sum(waits), sleep=waits.append)
    monkeypatch.setattr(sampler_module, "time", passed)
    source = Hanging()
    sampler = Sampler(source)
    monkeypatch.setitem(_state.samplers, "gpu", sampler)
    try:
        assert get_gpu_stats(0.0) is None
        assert waits == []
        assert get_gpu_stats(0.355) is None
        assert sum(waits) == pytest.approx(0.355)
    finally:
        source.free.set()
        assert sampler.stop(30)


def test_the_public_name_is_the_function():
    """`periscope.instrument_gauges` is the function of the gauges' room."""
    assert periscope.instrument_gauges is instrument_gauges


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "", **env},
    )


def test_pynvml_is_loaded_where_gpus_are_wanted():
    """pynvml is loaded when GPU gauges are switched on; the SDK itself loads psutil."""
    done = python(
        """
        import sys
        import periscope_otel.gauges
        gauges = periscope_otel.gauges.instrument_gauges(gauges={"host"})
        assert "pynvml" not in sys.modules
        gauges.close()
        gauges = periscope_otel.gauges.instrument_gauges(gauges={"gpu"})
        assert "pynvml" in sys.modules
        gauges.close()
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_provider_that_is_set_later_has_the_gauges():
    """Gauges on the global provider work where that is set afterwards, and are not made twice."""
    done = python(
        """
        from opentelemetry import metrics
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        import periscope_otel as periscope
        from periscope_otel.gauges import get_system_stats
        periscope.instrument_gauges(gauges={"host"})
        reader = InMemoryMetricReader()
        metrics.set_meter_provider(MeterProvider([reader]))
        periscope.instrument_gauges(gauges={"host"})
        get_system_stats(30)
        found = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
        told = [metric.name for metric in found]
        assert told.count("system.memory.limit") == 1, told
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_configure_reads_the_variable():
    """PERISCOPE_GAUGES switches gauges on as the keyword does, and shutdown() switches them off."""
    done = python(
        """
        import periscope_otel as periscope
        from periscope_otel.gauges.instrument import _state
        runtime = periscope.configure(exit_report="never")
        assert runtime.settings.gauges == ("host",)
        sampler = _state.samplers["host"]
        assert (sampler.alive, sampler.interval) == (True, 2.5)
        assert periscope.configure(gauges={"host"}, exit_report="never") is runtime
        periscope.shutdown()
        assert not sampler.alive
        """,
        PERISCOPE_GAUGES="host",
        PERISCOPE_GAUGES_INTERVAL="2.5",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_off_by_default():
    """Without `gauges` nothing is sampled, and the room is not even imported."""
    done = python(
        """
        import sys, threading
        import periscope_otel as periscope
        periscope.configure(exit_report="never")
        assert not {"pynvml", "periscope_otel.gauges"} & set(sys.modules)
        assert not [one for one in threading.enumerate() if one.name == "periscope-host"]
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_end_of_the_interpreter_is_quiet():
    """A process that leaves its gauges open ends as it would without, at once and silently."""
    done = python(
        """
        import periscope_otel as periscope
        from periscope_otel.gauges import get_gpu_stats
        periscope.instrument_gauges()
        get_gpu_stats(30)
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
