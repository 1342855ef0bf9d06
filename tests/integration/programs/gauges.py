"""Tell gauges on request: each line of standard input is a command in JSON, and so is each answer.

The argument is what goes to `configure()`, in JSON, and under `stub` what the stub of NVML is told
before. Readings are taken every tenth of a second, and what was lost is looked for as soon.
"""

import ctypes
import json
import logging
import os
import sys
import time

import periscope_otel as periscope
from periscope_otel.gauges import get_gpu_stats, get_system_stats, gpu_health, sampler
from periscope_otel.gauges.instrument import _state

LONG, SHORT = 30.0, 2.0


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def stub(function, *arguments):
    plain = [one.encode() if isinstance(one, str) else ctypes.c_longlong(one) for one in arguments]
    return getattr(ctypes.CDLL("libnvidia-ml.so.1"), f"stub_{function}")(*plain)


def readings(count):
    """Wait until so many more readings have been taken of each source that does not hang."""
    wanted = {one: one.readings + count for one in _state.samplers.values()}
    end = time.monotonic() + 30
    while time.monotonic() < end and any(
        one.readings < number for one, number in wanted.items() if one.alive and not one.hangs
    ):
        time.sleep(0.01)
    return [one.readings for one in wanted]


def flush():
    return runtime.flush(30)


def patience(seconds):
    """Take a reading to hang, or to be too old, after that many seconds."""
    sampler.LEAST_PATIENCE = seconds


def host():
    stats = get_system_stats(30)
    return stats and [stats.process.pid, stats.memory.total]


def gpu():
    stats = get_gpu_stats()
    if stats is None:
        return {}, "no reading"
    return {one.identity.id: one.state for one in stats.devices}, stats.problem and stats.problem[0]


def gpu_until(problem):
    """Wait until the problem is this one."""
    end = time.monotonic() + 50
    while gpu()[1] != problem and time.monotonic() < end:
        time.sleep(0.02)
    return gpu()


def logged(text):
    """Wait until a line has this text; returns all lines."""
    end = time.monotonic() + 30
    while not any(text in line for line in lines.lines) and time.monotonic() < end:
        time.sleep(0.02)
    return lines.lines


def logs():
    return lines.lines


def fork(hanging=None):
    """Fork a child that does one operation, waits for its own gauges, and flushes.

    A function of NVML that hangs does so in the child alone.
    """
    pid = os.fork()
    if pid:
        return pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if hanging is not None:
        patience(SHORT)
        stub("hang", hanging)
    periscope.monitored("work")(lambda: None)()
    if hanging is None:
        get_system_stats(30)
        get_gpu_stats(30)
        readings(2)
    else:
        gpu_until("driver_hangs")
    runtime.flush(30)
    os._exit(7)


def close():
    again.close()
    periscope.shutdown()
    return [name for name, one in _state.samplers.items() if one.alive]


lines = Lines()
logging.getLogger("periscope_otel").addHandler(lines)
logging.getLogger("periscope_otel").setLevel(logging.INFO)
patience(LONG)  # a busy machine stops threads for seconds, and that is not to look like a driver
gpu_health.FIRST_RETRY, gpu_health.LAST_RETRY, gpu_health.STEADY = 0.1, 0.4, 0.5
settings = json.loads(sys.argv[1])
if settings.pop("impatient", False):
    patience(SHORT)
for call in settings.pop("stub", ()):
    stub(*call)
runtime = periscope.configure(**settings)
if runtime.settings.gauges:
    # The same gauges once more, at a shorter interval.
    again = periscope.instrument_gauges(
        meter_provider=runtime.meter_provider, gauges=runtime.settings.gauges, interval=0.1
    )
print(runtime.server.port if runtime.server else 0)
commands = {
    one.__name__: one
    for one in (stub, patience, readings, flush, host, gpu, gpu_until, logged, logs, fork, close)
}
for line in sys.stdin:
    name, *arguments = json.loads(line)
    print(json.dumps(commands[name](*arguments)))
