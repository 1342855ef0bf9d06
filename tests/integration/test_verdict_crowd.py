"""Many callers and one Redis before a dependency that fails: what reaches it, and what not."""

from __future__ import annotations

import json
import math
import random
import socketserver
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pytest
from processes import running
from redis_servers import NoServerError, RedisServer

from periscope_otel.failure import Failure
from periscope_otel.redis_link import RedisLink
from periscope_otel.resilience.breaker import Breaker
from periscope_otel.resilience.policy import DEFAULT_POLICY
from periscope_otel.resilience.sharing.records import EVENTS, event_of, record_key
from periscope_otel.resilience.sharing.verdicts import SharedVerdicts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from processes import Program

PROCESSES = 8
NAME = "feed.example"
WITHIN = 120.0
RUNS = 6.0
FAILED = Failure("error", "ConnectionError", "failure", retryable=True)


class Dependency:
    """Counts the connections to it; each gets `+`, or is closed without a word where it fails."""

    def __init__(self) -> None:
        self.requests: list[float] = []
        self.fails = True
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                outer.requests.append(time.monotonic())
                if not outer.fails:
                    self.request.sendall(b"+")

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 64

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def since(self, when: float) -> int:
        """Return how many requests have come since then."""
        return sum(one > when for one in self.requests)


class Crowd:
    """Processes that call the dependency."""

    def __init__(self, programs: list[Program]) -> None:
        self._programs = programs

    def tell_all(self) -> None:
        """Have all of them go on to what comes next: calling, and then the end."""
        for one in self._programs:
            one.tell()

    def reports(self, state: str = "") -> list[Report]:
        """End all of them, each once its breaker is in a state; returns what they tell."""
        for one in self._programs:
            one.tell(state)
        found = [Report(**json.loads(one.line())) for one in self._programs]
        for one in self._programs:
            assert one.ended().status == 0
        return found


class Report(NamedTuple):
    """What a process tells at its end."""

    steps: list[Any]
    errors: list[str]
    calls: int
    longest: float
    state: str
    closed: bool
    internal_errors: dict[str, int]

    @property
    def states(self) -> list[tuple[str, str]]:
        """The steps of its breaker."""
        return [(before, after) for _, before, after, _ in self.steps]


@pytest.fixture
def server(tmp_path) -> Iterator[RedisServer]:
    try:
        made = RedisServer("redis", tmp_path / "redis")
    except NoServerError as error:
        pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture
def dependency() -> Iterator[Dependency]:
    with Dependency() as made:
        yield made


@contextmanager
def crowd(
    server: RedisServer, dependency: Dependency, open_time: float, how: str = ""
) -> Iterator[Crowd]:
    """Give processes that are ready to call; `patient` ones do so alone only if it has to be."""
    arguments = server.url, str(dependency.port), NAME, str(open_time), how
    with ExitStack() as stack:
        programs = [
            stack.enter_context(running("verdict_crowd", *arguments)) for _ in range(PROCESSES)
        ]
        for one in programs:
            assert one.line() == "ready"
        yield Crowd(programs)


def until(happened: Callable[[], object]) -> float:
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < WITHIN, "it has not happened"
        time.sleep(0.01)
    return time.monotonic() - began


def state(server: RedisServer) -> bytes | None:
    with server.client as client:
        return client.hget(record_key(NAME), "state")


@contextmanager
def probing_told(server: RedisServer) -> Iterator[list[float]]:
    """Collect when it became half open, for a block."""
    times: list[float] = []
    with server.client as client, client.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe(EVENTS)
        ended = threading.Event()

        def read() -> None:
            while True:
                last = ended.is_set()
                message = pubsub.get_message(timeout=0.05)
                if message is None and last:
                    return
                event = event_of(message["data"]) if message else None
                if event is not None and event.to_state == "half_open":
                    times.append(event.at)

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield times
        finally:
            ended.set()
            thread.join()


def times_open(open_time: float, seconds: float) -> float:
    """Return how many open times, each twice as long as the one before, fit into some seconds."""
    return math.log2(seconds / (open_time * (1 - DEFAULT_POLICY.jitter)) + 1)


def test_while_it_is_open_only_probes_reach_the_dependency(server, dependency, capsys):
    """Of eight processes' calls it gets the probes, and those in flight as one of them opened."""
    with crowd(server, dependency, 0.5, "patient") as processes, probing_told(server) as probing:
        began = time.monotonic()
        processes.tell_all()
        time.sleep(RUNS)
        until(lambda: probing)
        reports = processes.reports()
        took = time.monotonic() - began
    opened = min(step[0] for one in reports for step in one.steps)
    heard = max(one.steps[0][0] for one in reports)
    after = dependency.since(opened)
    after_all_heard = dependency.since(heard)
    with capsys.disabled():
        print(
            f"\n{PROCESSES} processes, {len(dependency.requests)} requests: "
            f"{len(dependency.requests) - after} until one opened, {after} in the "
            f"{took:.0f} s after it, of which {len(probing)} were probes; the last process heard "
            f"of it after {(heard - opened) * 1000:.1f} ms; longest allow() "
            f"{max(one.longest for one in reports) * 1000:.1f} ms"
        )
    assert 1 <= len(probing) <= 1 + times_open(0.5, took)
    # Until a process has heard of it, it opens by itself after five failures.
    assert len(dependency.requests) - after_all_heard <= 5 * PROCESSES
    assert after_all_heard <= len(probing) + PROCESSES
    assert all(one.errors == [] and one.closed and one.internal_errors == {} for one in reports)


@pytest.mark.usefixtures("uncovered")
def test_a_forked_child_shares_by_itself(server):
    """Each child has a thread and connections of its own; parent and children hear each other."""
    with running("verdict_forks", server.url) as program:
        ended = program.ended(WITHIN)
    assert ended.status == 0, ended.stderr
    assert ended.lines == ["all 20 children shared", "the parent shares still"]


def test_without_its_redis_nothing_breaks_and_nothing_flaps(server, dependency, capsys):
    """Killed in mid-run, wiped, and the dependency well again: no error, few steps, all closed."""
    began = time.monotonic()
    with crowd(server, dependency, 1.0) as processes:
        processes.tell_all()
        until(lambda: state(server) == b"open")
        server.kill()
        killed = time.monotonic()
        time.sleep(5.0)
        alone, alone_for = dependency.since(killed), time.monotonic() - killed
        server.start()
        back = until(lambda: state(server) is not None)
        with server.client as client:
            client.flushall()
        wiped = until(lambda: state(server) is not None)
        dependency.fails = False
        recovered = until(lambda: state(server) == b"closed")
        time.sleep(1.5)
        reports = processes.reports("closed")
    took = time.monotonic() - began
    most = max(len(one.steps) for one in reports)
    with capsys.disabled():
        print(
            f"\n{PROCESSES} processes, {alone_for:.0f} s without the Redis: {alone} requests; a "
            f"verdict was there {back:.2f} s after its return and {wiped:.2f} s after a wipe; "
            f"closed {recovered:.2f} s after the dependency was well; at most {most} steps a "
            f"process; longest allow() {max(one.longest for one in reports) * 1000:.1f} ms"
        )
    assert all(one.errors == [] and one.internal_errors == {} for one in reports)
    assert {one.state for one in reports} == {"closed"}
    # One way through closed, open and half open for each open time that there was, and no more.
    assert most <= 6 + 2 * times_open(1.0, took)
    assert all(one.states.count(("half_open", "closed")) <= 2 for one in reports)
    # One call each that is under way, the probes, and five failures where it was not heard of.
    assert alone <= PROCESSES * (1 + times_open(2.0, alone_for) + 1 + 5)


HEALTHY = 0.5
"""Share of the time in which the dependency is well, while everything happens."""


def test_whatever_happens_all_agree_in_the_end(server):
    """Calls, settings by hand, wipes, kills, stalls and lost messages, in any order."""
    chance = random.Random()
    sides = [_side(server.url) for _ in range(4)]
    stopped, well = threading.Event(), threading.Event()

    def call(breaker: Breaker) -> None:
        own = random.Random()
        while not stopped.is_set():
            permit = breaker.allow()
            if permit is not None and own.random() > 0.02:  # some never end
                permit.settle(None if well.is_set() else FAILED)
            if own.random() < 0.002:
                own.choice([breaker.force_open, breaker.disable, *[breaker.reset] * 8])()
            time.sleep(own.random() * 0.004)

    callers = [threading.Thread(target=call, args=(each,)) for _, each in sides for _ in range(2)]
    for one in callers:
        one.start()
    for _ in range(8):
        time.sleep(chance.random() * 0.3)
        (well.set if chance.random() < HEALTHY else well.clear)()
        chance.choice([_wipe, _kill, _stall, _silence])(server)
    stopped.set()
    for one in callers:
        one.join()
    until(lambda: all(verdicts.answers for verdicts, _ in sides))
    until(lambda: _agree_for_a_while(server, [breaker for _, breaker in sides]))
    until(lambda: all(verdicts.answers for verdicts, _ in sides))
    for verdicts, breaker in sides:
        assert verdicts.close(WITHIN)
        breaker.sharing = None


def _side(url: str) -> tuple[SharedVerdicts, Breaker]:
    made: list[Breaker] = []
    verdicts = SharedVerdicts(RedisLink(url), made)
    breaker = Breaker(NAME, open_time=0.05, longest_open=0.2, lease=0.5)
    breaker.sharing = verdicts
    made.append(breaker)
    verdicts.start()
    return verdicts, breaker


def _agree(server: RedisServer, breakers: list[Breaker]) -> bool:
    """Whether all are in the state of the record; between open and half open calls decide."""
    states = [one.state for one in breakers] + [(state(server) or b"closed").decode()]
    return len({"open" if one == "half_open" else one for one in states}) == 1


def _agree_for_a_while(server: RedisServer, breakers: list[Breaker]) -> bool:
    """Whether all agree, and do so still after each has looked again."""
    if not _agree(server, breakers):
        return False
    time.sleep(1.2)
    return _agree(server, breakers)


def _wipe(server: RedisServer) -> None:
    with server.client as client:
        client.flushall()


def _kill(server: RedisServer) -> None:
    server.kill()
    time.sleep(0.3)
    server.start()


def _stall(server: RedisServer) -> None:
    server.pause()
    time.sleep(0.8)
    server.resume()


def _silence(server: RedisServer) -> None:
    with server.client as client:
        client.client_kill_filter(_type="pubsub")
