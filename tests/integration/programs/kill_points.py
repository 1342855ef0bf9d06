"""Run many programs, kill each at a random moment, and say how each ended.

To save the start of an interpreter, each is forked from this one before anything is configured.
It goes back to the top level of the module, so that it ends as any program does. Arguments: the
receiver's URL, the seed, how many programs, how many at once. Writes one JSON line a program.
"""

import contextlib
import json
import os
import random
import select
import signal
import sys
import tempfile
import time

from opentelemetry.exporter.otlp.proto.http import metric_exporter, trace_exporter  # noqa: F401

import periscope_otel as periscope
import periscope_otel.runtime

HANG = 90.0
"""Seconds from the signal on after which a program is taken to hang."""


class Child:
    """One program to be killed."""

    def __init__(self, number, pid, pipe, stderr):
        self.number, self.pid, self.pipe, self.stderr = number, pid, pipe, stderr
        self.rng = random.Random(f"{seed} {number}")
        self.signal = signal.SIGTERM if number % 2 else signal.SIGINT
        self.output = b""
        self.due = None  # when the next signal is due
        self.before = 0  # operations that had ended when it was killed
        self.killed = self.hung = False

    def read(self):
        """Take what it wrote; False at its end."""
        data = os.read(self.pipe, 1 << 16)
        if data and not self.output:
            self.due = time.monotonic() + self.rng.uniform(0, 0.150)
        self.output += data
        return bool(data)

    def act(self, now):
        """Send the signal that is due."""
        if self.due is None or now < self.due:
            return
        if not self.killed:
            with contextlib.suppress(BlockingIOError):
                while data := os.read(self.pipe, 1 << 16):
                    self.output += data
            self.before = self.output.count(b"\n")
            self.killed, self.due = True, now + HANG
            os.kill(self.pid, self.signal)
        else:
            self.hung, self.due = True, None
            os.kill(self.pid, signal.SIGABRT)  # faulthandler writes the stacks

    def report(self):
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.pipe)
        self.stderr.seek(0)
        told = self.stderr.read().decode()
        self.stderr.close()
        fields = {
            "number": self.number,
            "signal": int(self.signal),
            "status": status,
            "before": self.before,
            "ended": self.output.count(b"\n"),
            "hung": self.hung,
            "stderr": told[-4000:],
        }
        print(json.dumps(fields), flush=True)


def fork(number):
    """Start a program; returns None in it."""
    reading, writing = os.pipe()
    stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by report())
    pid = os.fork()
    if pid:
        os.close(writing)
        os.set_blocking(reading, False)
        return Child(number, pid, reading, stderr)
    os.dup2(writing, 1)
    os.dup2(stderr.fileno(), 2)
    return None


def supervise():
    """Run all programs; returns the number of the program in which this returns, else None."""
    waiting, running = list(range(count)), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            child = fork(waiting.pop())
            if child is None:
                return waiting_number(waiting)
            running[child.pipe] = child
        now = time.monotonic()
        for child in running.values():
            child.act(now)
        due = [child.due - now for child in running.values() if child.due is not None]
        ready, _, _ = select.select(list(running), [], [], max(0.0, min(due, default=1.0)))
        for pipe in ready:
            if not running[pipe].read():
                running.pop(pipe).report()
    return None


def waiting_number(waiting):
    return len(waiting)  # numbers are taken from the end of 0, 1, 2, ...


endpoint, seed = sys.argv[1:3]
count, at_once = map(int, sys.argv[3:])
number = supervise()
if number is not None:
    periscope.configure(service_name=f"program-{number}", otlp_endpoint=endpoint)

    @periscope.monitored("work", feed="urlhaus")
    def work(pause):
        periscope.current_operation().received()
        time.sleep(pause)
        periscope.current_operation().ingested()

    done = 0
    while True:
        work(0.001 * (number // 2 % 3))
        done += 1
        os.write(1, b"%d\n" % done)
