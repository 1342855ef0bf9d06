"""Fork many children while three threads record; say what each process did and how it ended.

Arguments: how many children, how many at once. A child does a few operations and ends in one of
four ways. Lines: `did PID COUNT`, `ended PID STATUS`, `hung PID`.
"""

import os
import signal
import sys
import threading
import time
import urllib.request

import periscope_otel as periscope

HANG = 40.0
"""Seconds after which a child is taken to hang."""


@periscope.monitored("work", feed="urlhaus")
def work():
    periscope.current_operation().received(2)
    periscope.current_operation().ingested(2)


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def record(stop, done, number):
    while not stop.is_set():
        work()
        done[number] += 1
        time.sleep(0.002)


def scrape(stop, port):
    while not stop.is_set():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            page.read()


def reap(children):
    """Wait for the end of the oldest child; one that hangs is killed, with its stacks written."""
    pid, started = children.pop(0)
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            say("ended", pid, os.waitstatus_to_exitcode(status))
            return
        if time.monotonic() > started + HANG:
            say("hung", pid)
            os.kill(pid, signal.SIGABRT)  # faulthandler writes the stacks
            os.waitpid(pid, 0)
            return
        time.sleep(0.002)


def fork_all():
    """Fork children and wait for them; returns its number in each child, None in the parent."""
    children = []
    for number in range(count):
        if len(children) == at_once:
            reap(children)
        pid = os.fork()
        if pid == 0:
            return number
        children.append((pid, time.monotonic()))
    while children:
        reap(children)
    return None


count, at_once = map(int, sys.argv[1:])
prometheus = "127.0.0.1:0" if os.environ.get("PROMETHEUS") else None
runtime = periscope.configure(prometheus=prometheus)
stop, done = threading.Event(), [0, 0, 0]
threads = [threading.Thread(target=record, args=(stop, done, one), daemon=True) for one in range(3)]
if prometheus:
    threads.append(threading.Thread(target=scrape, args=(stop, runtime.server.port), daemon=True))
for thread in threads:
    thread.start()
child = fork_all()
if child is None:
    stop.set()
    for thread in threads:
        thread.join()
    say("did", os.getpid(), sum(done))
else:
    for _ in range(child % 5):
        work()
    say("did", os.getpid(), child % 5)
    if child % 4 == 0:
        sys.exit(3)
    if child % 4 == 1:
        periscope.shutdown()
        os._exit(3)
    if child % 4 == 2:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()
