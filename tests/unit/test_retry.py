"""The contracts of retries: what is retried, when, how often, and what the caller gets."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import email.utils
import errno
import functools
import gc
import inspect
import json
import pickle
import random
import statistics
import subprocess
import sys
import threading
import time
import weakref

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from retry_world import Answer, Says, Script, StatusError, World, waits_long

from periscope_otel import guard
from periscope_otel.failure import classify
from periscope_otel.resilience import pausing, retry, retrying
from periscope_otel.resilience.breaker import Breaker
from periscope_otel.resilience.budget import RetryBudget, budget_of
from periscope_otel.resilience.errors import CircuitOpenError
from periscope_otel.resilience.retry import Retry, RetryDetails


@pytest.fixture
def world(monkeypatch):
    """Return a world in which waiting takes no time."""
    world = World()
    world.install(monkeypatch)
    return world


@pytest.fixture(autouse=True)
def retries_go_on():
    yield
    retry.set_active(True)
    retry.resumed()


def in_a_loop(policy, function):
    """Call a function in the attempts of a loop."""
    for attempt in policy:
        with attempt:
            return function()
    raise AssertionError("a loop ends with a value or an exception")


def breaker_in(world, name="urlhaus.abuse.ch", **changes):
    return Breaker(name, clock=world.clock, rng=lambda: 0.5, **changes)


# --- the policy ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"attempts": 0}, ValueError),
        ({"attempts": 1001}, ValueError),
        ({"attempts": 2.0}, TypeError),
        ({"attempts": True}, TypeError),
        ({"attempts": None}, TypeError),
        ({"base": -0.1}, ValueError),
        ({"base": float("nan")}, ValueError),
        ({"base": "1"}, TypeError),
        ({"cap": 0.4}, ValueError),
        ({"cap": float("inf")}, ValueError),
        ({"deadline": -1}, ValueError),
        ({"deadline": "soon"}, TypeError),
        ({"longest_retry_after": -1}, ValueError),
        ({"on": 3}, TypeError),
        ({"on": int}, TypeError),
        ({"on": (ValueError, "x")}, TypeError),
        ({"result": 3}, TypeError),
        ({"on_retry": 3}, TypeError),
        ({"budget": True}, TypeError),
        ({"budget": 0.2}, TypeError),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(setting, error):
    """The message names the setting."""
    with pytest.raises(error, match=next(iter(setting))):
        Retry(**setting)


def test_a_policy_is_a_value():
    """It cannot be changed, is equal by its settings, can be a key, and copies and pickles."""
    policy = Retry(attempts=4, on=(OSError,), budget=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.attempts = 5  # type: ignore[misc]
    assert policy == Retry(attempts=4, on=(OSError,), budget=False)
    assert policy != Retry(attempts=4)
    assert {policy: 1}[copy.deepcopy(policy)] == 1
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert dataclasses.replace(policy, attempts=2).attempts == 2


# --- what is retried -----------------------------------------------------------------------------

RETRIED = [
    ConnectionError("reset"),
    ConnectionRefusedError(),
    TimeoutError(),
    OSError(errno.ENETUNREACH, "no network"),
    ExceptionGroup("both", [TimeoutError(), ConnectionError()]),
    *(StatusError(status) for status in (408, 429, 500, 502, 503, 504)),
]


def invalid():
    """Return an error of a class that cannot be made without arguments."""
    try:
        pydantic.TypeAdapter(int).validate_python("x")
    except pydantic.ValidationError as error:
        return error


NEVER = [
    ValueError("x"),
    TypeError("x"),
    KeyError("x"),
    json.JSONDecodeError("x", "", 0),
    *(StatusError(status) for status in (400, 401, 403, 404, 409, 410, 422, 501)),
    FileNotFoundError(),
    RuntimeError("nobody knows"),
    concurrent.futures.CancelledError(),
    CircuitOpenError("a", retry_after=1.0),
    ExceptionGroup("mixed", [TimeoutError(), ValueError()]),
]


def name_of(error):
    status = getattr(getattr(error, "response", None), "status_code", "")
    return f"{type(error).__name__}{status}"


@pytest.mark.parametrize("error", RETRIED, ids=name_of)
def test_what_may_pass_is_retried(world, error):
    """Broken connections, timeouts, 5xx, 408 and 429."""
    function = Script(error, "done")
    assert Retry()(function)() == "done"
    assert function.calls == 2


@pytest.mark.parametrize("error", NEVER, ids=name_of)
def test_what_fails_alike_is_not_retried(world, error):
    """One attempt, and what it raised."""
    function = Script(error)
    with pytest.raises(type(error)) as raised:
        Retry(attempts=5)(function)()
    assert raised.value is error
    assert function.calls == 1
    assert world.waits == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("on", [None, BaseException, lambda _: True])
def test_what_ends_the_process_is_never_retried(world, kind, on):
    """Whatever is asked for."""
    function = Script(kind())
    with pytest.raises(kind):
        Retry(on=on)(function)()
    assert function.calls == 1


def test_classes_replace_the_default(world):
    """Only they are retried, and their subclasses."""
    policy = Retry(on=(RuntimeError, LookupError))
    assert policy(Script(NotImplementedError(), "done"))() == "done"
    with pytest.raises(ConnectionError):
        policy(Script(ConnectionError(), "done"))()


@pytest.mark.parametrize(
    ("on", "error", "retried"),
    [
        (Exception, ValueError("x"), False),
        (Exception, json.JSONDecodeError("x", "", 0), False),
        (ValueError, ValueError("x"), True),
        (ValueError, json.JSONDecodeError("x", "", 0), True),
        ((Exception, json.JSONDecodeError), json.JSONDecodeError("x", "", 0), True),
        ((Exception, json.JSONDecodeError), ValueError("x"), False),
        (UnicodeDecodeError, UnicodeDecodeError("utf-8", b"", 0, 1, "x"), True),
        (Exception, RuntimeError("x"), True),
        (StatusError, StatusError(404), False),
        (Exception, StatusError(401), False),
        (StatusError, StatusError(429), True),
        (StatusError, StatusError(501), True),
        (CircuitOpenError, CircuitOpenError("a"), False),
        (Exception, concurrent.futures.CancelledError(), False),
        ((), ConnectionError(), False),
        (pydantic.ValidationError, invalid(), True),
        (Exception, invalid(), False),
    ],
)
def test_broad_classes_do_not_retry_what_fails_alike(world, on, error, retried):
    """A wrong value has to be listed as such; other 4xx, rejections, cancellations never are."""
    function = Script(error, "done")
    if retried:
        assert Retry(on=on)(function)() == "done"
    else:
        with pytest.raises(type(error)):
            Retry(on=on)(function)()


def test_a_predicate_decides_and_may_leave_it_to_the_default(world):
    """True and False are its word, also on a wrong value; None is the usual rule."""
    words = {"yes": True, "no": False, "well": None}
    policy = Retry(on=lambda error: words[error.args[0]])
    assert policy(Script(ValueError("yes"), "done"))() == "done"
    assert policy(Script(ConnectionError("well"), "done"))() == "done"
    for error in (ConnectionError("no"), ValueError("well")):
        with pytest.raises(type(error)):
            policy(Script(error, "done"))()


def test_a_predicate_that_raises_is_contained(world):
    """The usual rule holds."""
    policy = Retry(on=lambda error: error.no_such_attribute)
    assert policy(Script(ConnectionError(), "done"))() == "done"
    with pytest.raises(RuntimeError):
        policy(Script(RuntimeError(), "done"))()


def test_an_exception_answers_for_itself(world):
    """Its `periscope_failure` counts, with the wait that it asks for."""
    assert Retry(base=0)(Script(Says(retry_after=7.0), "done"))() == "done"
    assert world.waits == [pytest.approx(7.7)]
    with pytest.raises(Says):
        Retry()(Script(Says(retryable=False), "done"))()


# --- returned values -----------------------------------------------------------------------------


def test_a_returned_value_can_mean_failure(world):
    """The predicate's word makes it a failed attempt; the last value is returned."""
    policy = Retry(result=lambda answer: answer.status_code >= 400)
    assert policy(Script(Answer(503), Answer(200)))().status_code == 200
    function = Script(Answer(503))
    assert policy(function)().status_code == 503
    assert function.calls == 3


def test_a_returned_retry_after_is_kept_to(world):
    """As that of an exception."""
    Retry(base=0, result=lambda it: it.status_code == 429)(Script(Answer(429, 10), Answer(200)))()
    assert world.waits == [pytest.approx(11.0)]


def test_a_returned_404_is_not_retried(world):
    """The status says that it would be one again."""
    function = Script(Answer(404))
    assert Retry(result=lambda it: it.status_code >= 400)(function)().status_code == 404
    assert function.calls == 1


def test_any_other_value_that_means_failure_is_retried(world):
    """Such as an answer that is not ready."""
    assert Retry(result=lambda rows: not rows)(Script([], [], [1]))() == [1]
    assert Retry(result=lambda text: text != "done" and "not yet")(Script("", "done"))() == "done"


def test_an_exception_may_be_the_predicates_word(world):
    """It is judged as if it had been raised."""
    function = Script("bad")
    assert Retry(result=lambda _: ValueError("bad"))(function)() == "bad"
    assert function.calls == 1
    function = Script("bad")
    assert Retry(result=lambda _: TimeoutError())(function)() == "bad"
    assert function.calls == 3


def test_a_result_predicate_that_raises_means_success(world):
    """It is contained, and the value returned."""
    function = Script("value")
    assert Retry(result=lambda value: value.no_such_attribute)(function)() == "value"
    assert function.calls == 1


# --- waits ---------------------------------------------------------------------------------------


def test_waits_double_up_to_the_cap(world):
    """base * 2^n at most."""
    with pytest.raises(ConnectionError):
        Retry(attempts=9, deadline=None, budget=False)(Script(ConnectionError()))()
    assert world.waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_the_jitter_is_full_also_at_the_cap(world, monkeypatch):
    """At the cap waits are spread from nothing to all of it."""
    monkeypatch.setattr(retrying, "_random", random.Random(1).random)
    with pytest.raises(ConnectionError):
        Retry(attempts=1000, base=30.0, deadline=None, budget=False)(Script(ConnectionError()))()
    assert len(world.waits) == 999
    assert min(world.waits) < 0.5
    assert max(world.waits) > 29.5
    assert statistics.mean(world.waits) == pytest.approx(15, rel=0.05)
    assert statistics.stdev(world.waits) == pytest.approx(30 / 12**0.5, rel=0.05)


IN_A_WORLD = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)


@IN_A_WORLD
@given(
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20),
    base=st.floats(0, 60),
    more=st.floats(0, 600),
    deadline=st.none() | st.floats(0, 600),
    asked=st.lists(st.none() | st.floats(0, 90), min_size=1, max_size=20),
    lasting=st.floats(0, 10),
)
def test_waits_keep_their_bounds(  # noqa: PLR0917  (hypothesis gives them by name)
    world, monkeypatch, draws, base, more, deadline, asked, lasting
):
    """Back-off within its bounds, Retry-After waited in full, no attempt after the deadline."""
    numbers = iter(draws * 200)
    monkeypatch.setattr(retrying, "_random", lambda: next(numbers))
    policy = Retry(
        attempts=20, base=base, cap=base + more, deadline=deadline, longest_retry_after=60.0,
        budget=False,
    )  # fmt: skip
    world.now = 0.0
    began: list[float] = []
    ended: list[float] = []

    def function():
        began.append(world.now)
        world.now += lasting
        ended.append(world.now)
        raise Says(retry_after=asked[(len(began) - 1) % len(asked)])

    with pytest.raises(Says):
        policy(function)()
    if deadline is not None:
        assert began[-1] <= deadline + 1e-6
    for number, (end, begin) in enumerate(zip(ended, began[1:], strict=False)):
        least = asked[number % len(asked)] or 0.0
        most = max(min(policy.cap, base * 2**number), least + max(base, least * 0.1))
        assert least <= 60.0
        assert least - 1e-6 <= begin - end <= (most if least else policy.cap) + 1e-6


def test_retry_after_is_a_lower_bound_with_a_little_jitter(world):
    """A tenth of it more, or the base where that is more."""
    for draw, wait in ((0.0, 20.0), (0.5, 21.0), (1.0, 22.0)):
        world.draw = draw
        world.waits.clear()
        Retry()(Script(StatusError(429, 20), "done"))()
        assert world.waits == [pytest.approx(wait)]


def test_retry_after_may_be_a_date(world, monkeypatch):
    """An HTTP date is a wait from now on."""
    monkeypatch.setattr("periscope_otel.failure._now", lambda: 1_000_000.0)
    world.draw = 0.0
    date = email.utils.formatdate(1_000_030.0, usegmt=True)
    Retry()(Script(StatusError(503, date), "done"))()
    assert world.waits == [pytest.approx(30.0)]


@pytest.mark.parametrize(("policy", "asked"), [(Retry(), 61), (Retry(deadline=20.0), 21)])
def test_who_wants_to_be_left_alone_for_longer_is(world, policy, asked):
    """A Retry-After beyond what is waited ends the call at once: asking earlier is rude."""
    function = Script(StatusError(429, asked), "done")
    with pytest.raises(StatusError):
        policy(function)()
    assert function.calls == 1
    assert world.waits == []


def test_a_retry_after_that_just_fits_is_not_made_too_long_by_jitter(world):
    """The last attempt begins at the deadline."""
    Retry(deadline=20.0)(Script(StatusError(429, 20), "done"))()
    assert world.waits == [20.0]


def test_the_deadline_counts_from_the_first_attempts_begin(world):
    """Also the time that attempts take."""

    def slow():
        world.now += 50.0
        raise TimeoutError

    with pytest.raises(TimeoutError):
        Retry(attempts=10)(slow)()
    assert world.now == pytest.approx(50 * 3 + 0.5 + 1.0)


# --- why there is no further attempt -------------------------------------------------------------


def why(policy, failure, world, *, breaker=None, before=0.0, error=None):
    """Return why a call that has failed once is not made again."""
    started = policy.start("host")
    world.now += before
    retrying = policy.begin(started, "host", breaker=breaker)
    assert retrying.after(failure, error) is None
    return retrying.why


def test_it_says_why_it_gives_up(world):
    """In one word, each."""
    failure = classify(ConnectionError())
    assert why(Retry(attempts=1), failure, world) == "attempts"
    assert why(Retry(deadline=5.0), failure, world, before=5.0) == "deadline"
    assert why(Retry(budget=RetryBudget(0, 0)), failure, world) == "budget"
    assert why(Retry(), classify(ValueError()), world) == "not_retryable"
    assert why(Retry(), classify(StatusError(429, 61)), world) == "retry_after"
    breaker = breaker_in(world)
    breaker.force_open()
    assert why(Retry(), failure, world, breaker=breaker) == "breaker"
    retry.set_active(False)
    assert why(Retry(), failure, world) == "inactive"
    retry.set_active(True)
    retry.shutting_down()
    assert why(Retry(), failure, world) == "shutting_down"


def test_a_call_that_is_given_up_takes_nothing_from_the_budget(world):
    """Only retries that are made do."""
    budget = RetryBudget(0, 0.1)
    failure = classify(ConnectionError())
    breaker = breaker_in(world)
    breaker.force_open()
    for policy in (Retry(attempts=1, budget=budget), Retry(deadline=0.0, budget=budget)):
        why(policy, failure, world)
    why(Retry(budget=budget), failure, world, breaker=breaker)
    assert budget.balance == pytest.approx(1.0)


# --- the budget ----------------------------------------------------------------------------------


def test_without_budget_the_call_fails_at_once_with_its_own_error(world):
    """No waiting for a token."""
    function = Script(error := ConnectionError())
    with pytest.raises(ConnectionError) as raised:
        Retry(budget=RetryBudget(0, 0))(function)()
    assert raised.value is error
    assert (function.calls, world.waits) == (1, [])


def test_an_outage_is_not_made_three_times_worse(world):
    """Where every call fails, retries are a fifth of the calls and one a second."""
    function = Script(ConnectionError())
    retried = Retry(base=0)(function)
    for _ in range(1000):
        world.now += 0.01
        with pytest.raises(ConnectionError):
            retried()
    assert 1000 + 200 <= function.calls <= 1000 + 200 + 2 * 10 + 1


def test_callers_of_one_dependency_share_its_budget(world):
    """By name, where the policy has none of its own."""
    budget = budget_of("host")
    one, other = Retry(), Retry(attempts=5)
    for policy in (one, other):
        policy.start("host")
    assert budget.balance == pytest.approx(10.4)
    retrying = one.begin(0.0, "host")
    retrying.after(classify(ConnectionError()))
    assert budget.balance == pytest.approx(9.4)
    assert Retry(budget=False).start("host") == world.now
    assert budget.balance == pytest.approx(9.4)


def test_functions_do_not_share_a_budget(world):
    """A dependency that is down takes no retries from another."""
    policy = Retry(base=0)

    def down():
        raise ConnectionError

    flaky = Script(*[ConnectionError(), "done"] * 3)

    def well():
        return flaky()

    failing = policy(down)
    for _ in range(20):
        with pytest.raises(ConnectionError):
            failing()
    assert policy(well)() == "done"


# --- breakers ------------------------------------------------------------------------------------


def attempts_under(breaker, policy, function):
    """Call as a wrapper does that gives each attempt a permit; returns why it ended, or a value."""
    permit = breaker.acquire()
    started = policy.start(breaker.name)
    retrying = None
    while True:
        try:
            value = function()
        except Exception as error:
            failure = breaker.failure_of(error)
            permit.settle(failure)
            retrying = retrying or policy.begin(started, breaker.name, breaker=breaker)
            wait = retrying.after(failure, error)
        else:
            permit.settle()
            return value
        if wait is None or not retrying.again(wait):
            return retrying.why, retrying.conclude
        permit = retrying.permit


def test_each_attempt_takes_and_settles_a_permit(world):
    """The breaker sees three calls."""
    breaker = breaker_in(world)
    function = Script(ConnectionError(), ConnectionError(), "done")
    assert attempts_under(breaker, Retry(), function) == "done"
    assert breaker.view().outcomes == {"success": 1, "failure": 2, "ignored": 0}
    assert breaker.view().in_flight == 0


def test_a_retry_waits_until_the_breaker_lets_it_pass_and_is_its_probe(world):
    """Where that fits its deadline."""
    world.draw = 0.0
    breaker = breaker_in(world, consecutive_failures=1, successes=1)
    assert attempts_under(breaker, Retry(), Script(ConnectionError(), "done")) == "done"
    assert world.waits == [30.0]
    assert breaker.state == "closed"


def test_a_breaker_held_by_retry_after_is_waited_for_once(world):
    """The peer's wait and the breaker's are the same one."""
    breaker = breaker_in(world)
    assert attempts_under(breaker, Retry(), Script(StatusError(503, 20), "done")) == "done"
    assert world.waits == [22.0]
    assert breaker.view().rejections == 0


@pytest.mark.parametrize("how", ["opens for longer", "is forced open"])
def test_where_the_breaker_rejects_for_too_long_the_call_ends_at_once(world, how):
    """With its own error, never with CircuitOpenError in its place."""
    breaker = breaker_in(world, consecutive_failures=1)
    error = ConnectionError()

    def function():
        if how == "is forced open":
            breaker.force_open()
        raise error

    reason, conclude = attempts_under(breaker, Retry(deadline=20.0), function)
    assert reason == "breaker"
    with pytest.raises(ConnectionError) as raised:
        conclude()
    assert raised.value is error
    assert world.waits == []


def test_it_waits_on_where_somebody_elses_probe_is_out(world):
    """Such a wait is no attempt, and takes nothing from the budget."""
    world.draw = 0.0
    breaker = breaker_in(world, consecutive_failures=1, successes=1)
    budget = RetryBudget(0, 0.1)
    script = Script(ConnectionError(), "done")
    probe = None

    def sleep(seconds, before=world.sleep):
        nonlocal probe
        before(seconds)
        if probe is None:
            probe = breaker.acquire()  # another thread is first
        elif len(world.waits) == 4:
            probe.settle()

    pausing._sleep = sleep
    assert attempts_under(breaker, Retry(attempts=2, budget=budget), script) == "done"
    assert world.waits == [30.0, 1.0, 1.0, 1.0]


def test_it_does_not_wait_beyond_its_deadline_for_somebody_elses_probe(world):
    """It ends with its own error."""
    world.draw = 0.0
    breaker = breaker_in(world, consecutive_failures=1)
    held = []

    def sleep(seconds, before=world.sleep):
        before(seconds)
        if not held:
            held.append(breaker.acquire())

    pausing._sleep = sleep
    reason, conclude = attempts_under(breaker, Retry(deadline=33.5), Script(ConnectionError()))
    assert reason == "breaker"
    assert world.waits == [30.0, 1.0, 1.0, 1.0]
    with pytest.raises(ConnectionError):
        conclude()


def test_a_breaker_that_is_forced_open_during_a_wait_ends_the_call(world):
    """At the end of that wait."""
    breaker = breaker_in(world)

    def sleep(seconds, before=world.sleep):
        before(seconds)
        breaker.force_open()

    pausing._sleep = sleep
    reason, _ = attempts_under(breaker, Retry(), Script(ConnectionError()))
    assert reason == "breaker"


def test_a_breaker_inside_a_retry_is_waited_for(world):
    """Its rejection of a later attempt is no attempt, and does not hide the error."""
    world.draw = 0.0
    breaker = breaker_in(world, consecutive_failures=1, successes=1)
    script = Script(ConnectionError(), "done")
    details = []
    for attempt in Retry(attempts=2, on_retry=details.append):
        with attempt, breaker:
            value = script()
    assert value == "done"
    assert world.waits == [30.0]
    assert [one.attempt for one in details] == [1]


def test_a_rejection_inside_does_not_replace_the_error(world):
    """The call ends with what the attempt before it raised, untouched."""
    world.draw = 0.0
    breaker = breaker_in(world, consecutive_failures=1)
    error = ConnectionError()

    @Retry(deadline=20.0)
    def function():
        with breaker:
            raise error

    with pytest.raises(ConnectionError) as raised:
        function()
    assert raised.value is error
    assert error.__context__ is None
    breaker.reset()
    with pytest.raises(ConnectionError):
        in_a_loop(Retry(deadline=20.0), function)


def test_a_breaker_inside_that_goes_on_rejecting_is_asked_ever_more_rarely(world):
    """What the function does before it comes to the breaker is not done every second."""
    world.draw = 0.0
    rejection = CircuitOpenError("other", "half_open", retry_after=1.0)
    script = Script(ConnectionError(), rejection)
    with pytest.raises(ConnectionError):
        Retry(base=0)(script)()
    assert world.waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert script.calls == 9


def test_a_breaker_inside_that_nobody_can_tell_of_is_not_waited_for(world):
    """One that is forced open."""
    script = Script(ConnectionError(), CircuitOpenError("a", "forced_open"), "done")
    with pytest.raises(ConnectionError):
        Retry(base=0)(script)()
    assert script.calls == 2


def test_a_first_attempt_that_is_rejected_is_not_retried(world):
    """The caller gets the CircuitOpenError."""
    breaker = breaker_in(world)
    breaker.force_open()
    with pytest.raises(CircuitOpenError):
        Retry()(breaker.guard(Script("done")))()
    assert world.waits == []


# --- functions of every shape --------------------------------------------------------------------


@Retry(attempts=4)
def documented(url: str, *, limit: int = 5) -> list[str]:
    """Say so."""
    return [url] * limit


def test_a_decorated_function_looks_like_itself():
    """Name, documentation and signature, and it pickles by name."""
    assert documented.__name__ == "documented"
    assert documented.__doc__ == "Say so."
    assert str(inspect.signature(documented)) == "(url: 'str', *, limit: 'int' = 5) -> 'list[str]'"
    assert inspect.isfunction(documented)
    assert pickle.loads(pickle.dumps(documented)) is documented
    assert documented("a", limit=2) == ["a", "a"]


def test_methods_of_every_kind_are_retried(world):
    """In either decorator order."""

    class Client:
        calls = 0

        @Retry(base=0)
        def method(self):
            return self.fetch()

        @Retry(base=0)
        @classmethod
        def outer_class(cls):
            return cls().fetch()

        @classmethod
        @Retry(base=0)
        def inner_class(cls):
            return cls().fetch()

        @Retry(base=0)
        @staticmethod
        def outer_static():
            return Client().fetch()

        @staticmethod
        @Retry(base=0)
        def inner_static():
            return Client().fetch()

        def fetch(self):
            Client.calls += 1
            if Client.calls % 2:
                raise ConnectionError
            return "done"

    client = Client()
    for call in (
        client.method, client.outer_class, Client.inner_class, client.outer_static,
        Client.inner_static, Retry(base=0)(client.fetch),
        Retry(base=0)(functools.partial(Client.fetch, client)),
    ):  # fmt: skip
        assert call() == "done"
    assert Client.calls == 14


@pytest.mark.parametrize("what", [int, 3, None, property(lambda _: 1)])
def test_what_is_no_function_is_refused(what):
    """At decoration."""
    with pytest.raises(TypeError, match="decorates functions"):
        Retry()(what)


def test_the_last_exception_is_raised_as_it_is(world):
    """The last attempt's, with nothing chained to it that was not."""
    errors = [ConnectionError(str(n)) for n in range(3)]
    with pytest.raises(ConnectionError) as raised:
        Retry()(Script(*errors))()
    assert raised.value is errors[2]
    assert raised.value.__context__ is None
    assert raised.value.__cause__ is None
    names = [entry.name for entry in raised.traceback]
    assert names[-2:] == ["retried_function", "__call__"]


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """An exception that lets nothing be set on it."""

    periscope_failure = Says(retryable=True).periscope_failure


def test_an_exception_that_cannot_be_changed_is_raised_too(world):
    """Also where a rejection comes in between."""
    error = FrozenError()
    script = Script(error, CircuitOpenError("a", "forced_open"))
    with pytest.raises(FrozenError) as raised:
        Retry(base=0)(script)()
    assert raised.value is error


def test_an_error_of_our_own_ends_the_call_with_the_users(world, monkeypatch):
    """It is contained, counted, and there is no further attempt."""
    guard.set_strict(False)
    monkeypatch.setattr(retrying, "_random", lambda: 1 / 0)
    function = Script(error := ConnectionError())
    with pytest.raises(ConnectionError) as raised:
        Retry()(function)()
    assert raised.value is error
    assert function.calls == 1
    assert guard.counts() == {"retry": 1}


@pytest.mark.parametrize("ends", ["well", "badly", "with a shutdown"])
def test_nothing_is_kept_alive(world, ends):
    """What the call has used is freed at once, without the garbage collector."""

    class Payload:
        pass

    seen = []

    def function(payload):
        local = Payload()
        seen.append(weakref.ref(local))
        if ends != "well" or len(seen) < 3:
            if ends == "with a shutdown":
                retry.shutting_down()
            raise ConnectionError
        return "done"

    def call():
        try:
            return Retry()(function)(Payload())
        except ConnectionError:
            return "failed"

    gc.collect()
    gc.disable()
    try:
        assert call() == ("done" if ends == "well" else "failed")
        assert [ref() for ref in seen] == [None] * len(seen)
    finally:
        gc.enable()


# --- generators ----------------------------------------------------------------------------------


def test_a_generator_is_retried_until_its_first_item(world):
    """What fails before it has given anything begins anew."""
    script = Script(ConnectionError(), ConnectionError(), "first")

    @Retry()
    def rows():
        """Rows."""
        yield script()
        yield "second"

    assert list(rows()) == ["first", "second"]
    assert script.calls == 3
    assert inspect.isgeneratorfunction(rows)
    assert rows.__doc__ == "Rows."


def test_a_generator_is_not_retried_after_its_first_item(world):
    """Its consumer has that already."""
    calls = []

    @Retry()
    def rows():
        calls.append(1)
        yield 1
        raise ConnectionError

    found = []
    with pytest.raises(ConnectionError):
        found.extend(rows())
    assert calls == [1]


def test_a_generators_conversation_passes_through(world):
    """Sent values, thrown exceptions, the return value and a close."""
    heard = []

    @Retry()
    def talks():
        try:
            heard.append((yield 1))
            try:
                yield 2
            except KeyError as error:
                heard.append(error.args[0])
            yield 3
        finally:
            heard.append("closed")
        return "result"

    generator = talks()
    assert next(generator) == 1
    assert generator.send("sent") == 2
    assert generator.throw(KeyError("thrown")) == 3
    with pytest.raises(StopIteration) as stop:
        next(generator)
    assert stop.value.value == "result"
    assert heard == ["sent", "thrown", "closed"]
    generator = talks()
    next(generator)
    generator.close()
    assert heard[3:] == ["closed"]


@pytest.mark.parametrize("fails", [0, 2])
def test_a_generator_without_items_returns_its_value(world, fails):
    """The end is no failure."""
    script = Script(*[ConnectionError()] * fails, "result")

    @Retry()
    def empty():
        value = script()
        yield from ()
        return value

    def outer():
        return (yield from empty())

    with pytest.raises(StopIteration) as stop:
        next(outer())
    assert stop.value.value == "result"
    assert script.calls == fails + 1


def test_a_generator_runs_when_it_is_asked(world):
    """Not when it is made."""
    script = Script("first")

    @Retry()
    def rows():
        yield script()

    generator = rows()
    assert script.calls == 0
    next(generator)
    assert script.calls == 1


# --- loops ---------------------------------------------------------------------------------------


def test_a_loop_ends_with_the_first_attempt_that_succeeds(world):
    """Attempts are numbered."""
    script = Script(ConnectionError(), ConnectionError(), "done")
    numbers = []
    for attempt in Retry():
        with attempt:
            numbers.append(attempt.number)
            value = script()
    assert value == "done"
    assert numbers == [1, 2, 3]
    assert world.waits == [0.5, 1.0]


def test_a_loop_raises_the_last_exception_as_it_is(world):
    """No error of the retry's own, and nothing chained."""
    errors = [ConnectionError(str(n)) for n in range(3)]
    script = Script(*errors)
    with pytest.raises(ConnectionError) as raised:
        in_a_loop(Retry(), script)
    assert raised.value is errors[2]
    assert raised.value.__context__ is None


def test_a_loop_does_not_swallow_what_is_not_retried(world):
    """It comes out at once."""
    for error in (ValueError(), KeyboardInterrupt()):
        script = Script(error)
        with pytest.raises(type(error)):
            in_a_loop(Retry(), script)
        assert script.calls == 1


def test_a_loop_can_be_left(world):
    """By break and return, and by continue to the end."""

    def fetch():
        for attempt in Retry():
            with attempt:
                return "returned"
        return "not reached"

    assert fetch() == "returned"
    for attempt in Retry():
        with attempt:
            break
    assert attempt.number == 1
    numbers = []
    for attempt in Retry():
        with attempt:
            numbers.append(attempt.number)
            continue
    assert numbers == [1]


def test_an_attempt_that_is_not_entered_is_told_of(world):
    """Otherwise nothing would be retried, or all for ever."""
    with pytest.raises(RuntimeError, match="with attempt"):
        for _attempt in Retry():
            pass


def test_loops_that_share_a_policy_do_not_meet(world):
    """Each has its own state, nested and in threads."""
    policy = Retry(attempts=3, base=0, budget=False)
    seen = []
    for outer in policy:
        with outer:
            for inner in policy:
                with inner:
                    seen.append((outer.number, inner.number))
                    if inner.number < 2 or outer.number < 3:
                        raise ConnectionError
    assert seen == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2)]

    counts: list[int] = []

    def work():
        for attempt in policy:
            with attempt:
                if attempt.number < 3:
                    raise ConnectionError
                counts.append(attempt.number)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [3] * 8


def test_a_loops_budget_is_that_of_the_function_around_it(world):
    """As if that were decorated."""
    for attempt in Retry():
        with attempt:
            pass
    name = f"{__name__}.{test_a_loops_budget_is_that_of_the_function_around_it.__qualname__}"
    assert budget_of(name).balance == pytest.approx(10.2)


# --- hooks and switches --------------------------------------------------------------------------


def test_on_retry_is_told_before_each_wait(world):
    """Of the attempt that failed, why, and how long the wait is."""
    told: list[RetryDetails] = []
    errors = ConnectionError("one"), StatusError(503)

    def function():
        return script()

    script = Script(*errors, "done")
    Retry(on_retry=told.append)(function)()
    assert [(one.attempt, one.wait, one.error) for one in told] == [
        (1, 0.5, errors[0]),
        (2, 1.0, errors[1]),
    ]
    assert told[1].failure.error_type == "503"
    assert told[0].dependency == f"{__name__}.{function.__qualname__}"


def test_on_retry_that_raises_is_contained(world):
    """The call goes on."""

    def hook(details):
        raise RuntimeError("hook")

    assert Retry(on_retry=hook)(Script(ConnectionError(), "done"))() == "done"


@pytest.mark.parametrize(
    "switch", [retry.set_active, Retry.set_active, Retry(attempts=9).set_active]
)
def test_retries_can_be_switched_off_for_tests(world, switch):
    """Then there is exactly one attempt, in every use."""
    switch(False)
    function = Script(ConnectionError())
    with pytest.raises(ConnectionError):
        Retry()(function)()
    with pytest.raises(ConnectionError):
        in_a_loop(Retry(), function)
    assert Retry(result=lambda _: True)(Script("bad"))() == "bad"
    assert (function.calls, world.waits) == (2, [])
    switch(True)
    assert Retry()(Script(ConnectionError(), "done"))() == "done"


# --- the process ends ----------------------------------------------------------------------------


def test_a_shutdown_ends_waits_with_the_last_error():
    """At once, in every thread, and later calls are not retried."""
    errors = []
    waiting = threading.Semaphore(0)

    def work():
        failure, long = waits_long()
        policy = Retry(on_retry=lambda _: waiting.release(), **long)
        try:
            policy(Script(failure))()
        except Says as error:
            errors.append(error is failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert waiting.acquire(timeout=30)
    retry.shutting_down()
    for thread in threads:
        thread.join(60)
    assert errors == [True] * 4
    assert not retry.pause(0.0)
    retry.shutting_down()  # twice is once
    function = Script(ConnectionError())
    with pytest.raises(ConnectionError):
        Retry()(function)()
    assert function.calls == 1


def test_a_shutdown_ends_a_loop_with_its_last_error(world):
    """Out of the `for` statement, and a breaker inside is not waited for either."""
    script = Script(error := ConnectionError())
    with pytest.raises(ConnectionError) as raised:
        in_a_loop(Retry(on_retry=lambda _: retry.shutting_down()), script)
    assert raised.value is error
    assert script.calls == 1
    retry.resumed()

    def function():
        if not world.waits:
            raise error
        retry.shutting_down()
        raise CircuitOpenError("a", retry_after=1.0)

    with pytest.raises(ConnectionError) as raised:
        Retry()(function)()
    assert raised.value is error


def test_a_process_that_goes_on_waits_again(world):
    """After `resumed`, which may come without a shutdown, and twice."""
    retry.resumed()
    retry.shutting_down()
    assert not retry.pause(1.0)
    retry.resumed()
    retry.resumed()
    assert retry.pause(1.0)
    assert world.waits == [1.0]


def test_a_returned_value_is_returned_where_a_shutdown_ends_the_wait(world):
    """What the last attempt came to."""
    policy = Retry(result=lambda _: True, on_retry=lambda _: retry.shutting_down())
    assert policy(Script("bad"))() == "bad"


def test_a_long_wait_is_cut_into_short_sleeps(world, monkeypatch):
    """So that it sees the end of the process soon, also where nobody says so."""
    monkeypatch.setattr(pausing, "LONGEST_SLEEP", 0.5)
    assert retry.pause(1.75)
    assert world.waits == [0.5, 0.5, 0.5, 0.25]


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_thread_that_waits_does_not_hold_the_process_up():
    """It ends with its error soon after the main thread has."""
    started = time.monotonic()
    done = python("""
import threading
from periscope_otel.failure import Failure
from periscope_otel.resilience.retry import Retry
waiting = threading.Event()
class DownError(Exception):
    periscope_failure = Failure("error", "DownError", "failure", retryable=True, retry_after=300.0)
@Retry(deadline=None, longest_retry_after=300.0, on_retry=lambda _: waiting.set())
def fetch():
    raise DownError
def work():
    try:
        fetch()
    except DownError:
        print("ended", flush=True)
threading.Thread(target=work).start()
waiting.wait()
""")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "ended", "")
    assert time.monotonic() - started < 60


@pytest.mark.usefixtures("uncovered")
def test_the_child_of_a_fork_waits_also_where_its_parent_shuts_down():
    """It begins anew."""
    done = python("""
import os, warnings
warnings.simplefilter("ignore")
from periscope_otel.resilience import retry
retry.shutting_down()
if (child := os.fork()) == 0:
    os._exit(0 if retry.pause(0.001) else 1)
assert not retry.pause(0.001)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("uncovered")
def test_a_shutdown_in_a_signal_handler_does_not_hang():
    """Whatever the main thread is in the middle of."""
    done = python("""
import itertools, signal
from periscope_otel.resilience import retry
signal.signal(signal.SIGALRM, lambda *_: retry.shutting_down())
for n in range(300):
    signal.setitimer(signal.ITIMER_REAL, 0.0005 + n * 1e-6)
    while retry.pause(0.00001):
        pass
    retry.resumed()
print("done")
""")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "done", "")
