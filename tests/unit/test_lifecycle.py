from __future__ import annotations

import os
import queue
import signal
import threading
import time

import pytest

from periscope_otel.telemetry import lifecycle
from periscope_otel.telemetry.lifecycle import ExitHooks, FlushThread, flush_all


class Kills:
    """Stands for `os.kill` and `signal.pthread_kill`: a test must outlive what it tests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: queue.SimpleQueue[int] = queue.SimpleQueue()
        monkeypatch.setattr(lifecycle.os, "kill", lambda _pid, number: self.sent.put(number))
        # The signal that is to wake the main thread finds no handler where it comes late.
        monkeypatch.setattr(lifecycle.signal, "pthread_kill", lambda _thread, _number: None)


@pytest.fixture
def kills(monkeypatch):
    return Kills(monkeypatch)


@pytest.fixture
def hooks():
    """Installed hooks with the words that `at_end` was called with, removed again."""
    words: queue.SimpleQueue[str] = queue.SimpleQueue()
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    made = ExitHooks(words.put)
    made.words = words
    made.install()
    yield made
    made.remove()
    signal.signal(signal.SIGTERM, before)


def test_sigterm_ends_by_its_thread_and_is_sent_again(hooks, kills):
    """SIGTERM calls `at_end` in another thread, which then sends it with its default action."""
    signal.raise_signal(signal.SIGTERM)
    assert hooks.words.get(timeout=30) == "SIGTERM"
    assert kills.sent.get(timeout=30) == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_another_signal_is_none_of_its_business(hooks):
    """A byte of another signal in the pipe calls nothing."""
    os.write(hooks._pipe[1], bytes([signal.SIGUSR1]))
    hooks.remove()
    assert hooks.words.empty()


def test_removed_hooks_leave_the_default_action(hooks):
    """After `remove` SIGTERM has its default action again, and no wake-up descriptor is left."""
    hooks.remove()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


def test_a_later_handler_of_the_application_is_left_alone(hooks):
    """A handler that the application installed afterwards stays when the hooks are removed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hooks.remove()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_off_the_main_thread_no_handler_is_installed():
    """Hooks that another thread installs leave signals alone."""
    before = signal.getsignal(signal.SIGTERM)
    made = ExitHooks(lambda _word: None)
    thread = threading.Thread(target=made.install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    made.remove()


def test_in_a_child_the_inherited_handler_only_ends_it(hooks, kills, monkeypatch):
    """In a forked child that has no thread for it the inherited handler just sends it again."""
    monkeypatch.setattr(hooks, "_pid", -1)
    hooks._on_sigterm(signal.SIGTERM, None)
    assert kills.sent.get(timeout=30) == signal.SIGTERM
    assert hooks.words.empty()
    monkeypatch.undo()


def test_a_wake_up_descriptor_of_the_application_is_kept():
    """Where the application listens for signals by a descriptor, that stays."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert signal.set_wakeup_fd(writer) == -1
    made = ExitHooks(lambda _word: None)
    made.install()
    made.remove()
    assert signal.set_wakeup_fd(-1) == writer
    signal.signal(signal.SIGTERM, before)
    os.close(reader)
    os.close(writer)


def test_flushing_is_done_together_and_in_time():
    """All flush at once; one that hangs costs no more than the deadline and is told."""
    done, hang = threading.Event(), threading.Event()
    quick, slow = FlushThread("quick", done.set), FlushThread("slow", hang.wait)
    assert not flush_all([slow, quick], time.monotonic() + 0.2)
    assert done.wait(30)  # though the one before it hangs
    hang.set()
    assert flush_all([quick], time.monotonic() + 30)
    quick.stop()
    slow.stop()
