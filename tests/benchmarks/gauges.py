"""What host and GPU gauges cost.

Reading and callbacks
    Our reading of the host and this process plus one round of all callbacks, divided by one
    collect of OpenTelemetry's own system-metrics instrumentation, which reads in its callbacks:
    with the same figures, and with its defaults. Both in one process, interleaved. The SDK's part
    of a collect, which is the same for both, is in the peer's figure and not in ours; with it in
    both, "collected".
Callbacks
    One round of all our host callbacks, without the SDK.
Sampler
    CPU of a process that only samples the host, at the default interval, as a share of one core.
Readers
    Readings that are taken while three readers collect, divided by those with one.
GPU (only with --gpu, on a machine that has one)
    One reading of the fast beat, divided by one `nvidia-smi --query-gpu` process, by wall time;
    and what each call costs.

Not measured: macOS, hundreds of devices, MIG.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from harness import Report, Rounds, here, interleave, ratio, spread
from hosts import Host

if TYPE_CHECKING:
    from harness import Measure, Sample

_ALONE = """
import json, sys, time
from periscope_otel.gauges.host import HostReader
from periscope_otel.gauges.sampler import Sampler
sampler = Sampler(HostReader())
sampler.start()
time.sleep(2)
wall, cpu = time.perf_counter(), time.process_time()
time.sleep(float(sys.argv[1]))
print(json.dumps([(time.process_time() - cpu) / (time.perf_counter() - wall), sampler.readings]))
"""

SMI = [
    "nvidia-smi",
    "--query-gpu=utilization.gpu,memory.used,memory.total,temperature.gpu,power.draw",
    "--format=csv,noheader,nounits",
]

CALLS: dict[str, tuple[object, ...]] = {
    "nvmlDeviceGetUtilizationRates": (),
    "nvmlDeviceGetMemoryInfo": (0x02000028,),
    "nvmlDeviceGetTemperatureV": (0,),
    "nvmlDeviceGetPowerUsage": (),
    "nvmlDeviceGetEnforcedPowerLimit": (),
    "nvmlDeviceGetClockInfo": (1,),
    "nvmlDeviceGetTotalEccErrors": (0, 0),
    "nvmlDeviceGetRemappedRows": (),
    "nvmlDeviceGetCurrentClocksEventReasons": (),
    "nvmlDeviceGetComputeRunningProcesses": (),
    "nvmlDeviceGetEncoderUtilization": (),
    "nvmlDeviceGetDecoderUtilization": (),
    "nvmlDeviceGetTotalEnergyConsumption": (),
    "nvmlDeviceGetFieldValues": ((197, 198),),
    "nvmlDeviceGetMigMode": (),
}


def host_measures(report: Report, rounds: int, calls: int) -> None:
    """Compare host figures with the peer's."""
    from environments import interpreter

    path = os.pathsep.join([str(here().parents[1] / "src"), str(here())])
    names = (
        "ours",
        "ours, collected",
        "our reading",
        "our slow reading",
        "our callbacks",
        "our collect",
        "peer, same figures",
        "peer, its default",
    )
    with Host(
        here() / "gauges_host.py",
        python=interpreter("system-metrics"),
        environment={"PYTHONPATH": path},
    ) as host:
        taken = interleave({name: host.subject(name) for name in names}, rounds, calls)
    report.measures += [
        ratio("reading + callbacks ÷ peer, same figures", taken, "ours", "peer, same figures",
              "process", 0.1),
        ratio("reading + callbacks ÷ peer, its default", taken, "ours", "peer, its default",
              "process"),
        ratio("reading, collected ÷ peer, same figures", taken, "ours, collected",
              "peer, same figures", "process"),
        ratio("reading, collected ÷ peer, its default", taken, "ours, collected",
              "peer, its default", "process"),
        milliseconds("host callbacks", taken, "our callbacks", 0.3),
        milliseconds("host collect by the SDK", taken, "our collect"),
        milliseconds("host reading", taken, "our reading"),
        milliseconds("host reading, slow beat", taken, "our slow reading"),
    ]  # fmt: skip
    report.indicate(taken)


def milliseconds(what: str, rounds: Rounds, name: str, target: float | None = None) -> Measure:
    """Return one subject's CPU time."""
    return spread(what, [one["thread"] * 1e3 for one in rounds[name]], target, " ms")


def sampler_share(seconds: float, times: int) -> Measure:
    """Return the share of a core that sampling takes."""
    shares = []
    for _ in range(times):
        command = [sys.executable, "-c", _ALONE, str(seconds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        shares.append(json.loads(done.stdout)[0] * 100)
    return spread("sampler at its default interval, of one core", shares, 0.05, " %")


def readings(readers: int, seconds: float) -> int:
    """Return how many readings are taken while so many readers collect."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    from periscope_otel.gauges.instrument import _state, instrument_gauges

    collectors = [InMemoryMetricReader() for _ in range(readers)]
    provider = MeterProvider(collectors, shutdown_on_exit=False)
    handle = instrument_gauges(meter_provider=provider, gauges={"host"}, interval=0.1)
    end = time.monotonic() + seconds

    def collect(reader: InMemoryMetricReader) -> None:
        while time.monotonic() < end:
            reader.collect()
            time.sleep(0.05)

    threads = [threading.Thread(target=collect, args=(one,)) for one in collectors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = _state.samplers["host"].readings
    handle.close()
    _state.samplers["host"].readings = 0
    return taken


def gpu_measures(report: Report, rounds: int) -> None:
    """Compare a reading of the GPU with a process of nvidia-smi, and time each call."""
    import pynvml

    from periscope_otel.gauges.gpu import GpuReader
    from periscope_otel.gauges.nvml import NvmlBackend

    reader = GpuReader(NvmlBackend())
    first = reader.read(slow=True)
    if first.problem is not None:
        raise SystemExit(f"no GPU can be read: {first.problem}")
    device = first.devices[0].identity
    report.settings["gpu"] = (
        f"{len(first.devices)} x {device.model}, driver {device.driver_version}"
    )
    taken = interleave(
        {
            "fast beat": lambda _: timed(lambda: reader.read(slow=False), 50),
            "slow beat": lambda _: timed(lambda: reader.read(slow=True), 2),
            "nvidia-smi": lambda _: timed(
                lambda: subprocess.run(SMI, check=True, stdout=subprocess.DEVNULL), 1
            ),
        },
        rounds,
        1,
    )
    report.measures += [
        ratio("GPU, fast beat ÷ nvidia-smi", taken, "fast beat", "nvidia-smi", "wall", 0.005),
        ratio("GPU, slow beat ÷ nvidia-smi", taken, "slow beat", "nvidia-smi", "wall"),
        *(
            spread(f"GPU, {name}", [one["wall"] * 1e3 for one in taken[name]], None, " ms")
            for name in ("fast beat", "slow beat", "nvidia-smi")
        ),
    ]
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    for function, arguments in CALLS.items():
        call = getattr(pynvml, function)
        report.indications.append(f"{function}: {cost(call, handle, arguments)}")


def cost(call: object, handle: object, arguments: tuple[object, ...]) -> str:
    """Return what one call takes."""
    taken = []
    for _ in range(100):
        began = time.perf_counter()
        try:
            call(handle, *arguments)
        except Exception as error:
            return f"{type(error).__name__}"
        taken.append((time.perf_counter() - began) * 1e6)
    taken.sort()
    return f"{statistics.median(taken):,.1f} µs, 99th percentile {taken[98]:,.1f} µs"


def timed(call: object, times: int) -> Sample:
    """Return what one of so many calls takes."""
    wall, process, thread = time.perf_counter(), time.process_time(), time.thread_time()
    for _ in range(times):
        call()
    return {
        "wall": (time.perf_counter() - wall) / times,
        "process": (time.process_time() - process) / times,
        "thread": (time.thread_time() - thread) / times,
    }


def main() -> None:
    """Measure and report."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60, help="to watch the sampler for")
    parser.add_argument("--gpu", action="store_true", help="measure a GPU, and nothing else")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report(
        __doc__.strip().splitlines()[0], {"rounds": options.rounds, "calls": options.calls}
    )
    if options.gpu:
        gpu_measures(report, options.rounds)
    else:
        host_measures(report, options.rounds, options.calls)
        report.measures.append(sampler_share(options.seconds, 3))
        ratios = [readings(3, 3.0) / readings(1, 3.0) for _ in range(3)]
        report.measures.append(spread("readings with three readers ÷ one", ratios, 1.1))
    report.publish(options.json)


if __name__ == "__main__":
    main()
