"""Read GPUs when told to: lines of standard input are commands in JSON, and so are the answers."""

import ctypes
import json
import logging
import os
import sys

import pynvml

from periscope_otel import guard
from periscope_otel.gauges.gpu import GpuReader
from periscope_otel.gauges.nvml import NvmlBackend


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def stub(function, *arguments):
    plain = [one.encode() if isinstance(one, str) else ctypes.c_longlong(one) for one in arguments]
    return getattr(ctypes.CDLL("libnvidia-ml.so.1"), f"stub_{function}")(*plain)


def lack(function):
    """Take a function out of pynvml, as in an older one."""
    delattr(pynvml, function)


def break_(function):
    """Make a function of pynvml fail as no function should."""

    def broken(*arguments):
        raise RuntimeError("it is broken")

    setattr(pynvml, function, broken)


def wait(seconds):
    clock.now += seconds


def read(slow):
    stats = reader.read(slow)
    logs, lines.lines = lines.lines, []
    return {
        "devices": {
            one.identity.id: {**one._asdict(), "identity": one.identity._asdict()}
            for one in stats.devices
        },
        "problem": stats.problem and stats.problem._asdict(),
        "logs": logs,
    }


def fork():
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        reader.after_fork()
        os.write(into, json.dumps(read(True)).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as answer:
        told = json.load(answer)
    os.waitpid(pid, 0)
    return told


def unsupported():
    return {one.identity.id: sorted(one.unsupported) for one in reader._devices}


guard.set_strict(True)
clock, lines = Clock(), Lines()
logging.getLogger("periscope_otel").addHandler(lines)
logging.getLogger("periscope_otel").setLevel(logging.INFO)
reader = GpuReader(NvmlBackend(clock), clock)
commands = {one.__name__: one for one in (stub, lack, break_, wait, read, fork, unsupported)}
for line in sys.stdin:
    name, *arguments = json.loads(line)
    print(json.dumps(commands[name](*arguments)))
