"""The contracts of the budget that caps the retries of all callers of a dependency."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from periscope_otel.resilience import budget as budget_module
from periscope_otel.resilience.budget import MOST_BUDGETS, RetryBudget, budget_of, forget_budgets


@pytest.fixture(autouse=True)
def no_budgets_yet():
    forget_budgets()
    yield
    forget_budgets()


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"ratio": -0.1}, ValueError),
        ({"ratio": float("nan")}, ValueError),
        ({"ratio": "0.2"}, TypeError),
        ({"ratio": True}, TypeError),
        ({"per_second": -1}, ValueError),
        ({"per_second": 2e6}, ValueError),
        ({"ttl": 0}, ValueError),
        ({"ttl": float("inf")}, ValueError),
        ({"ttl": None}, TypeError),
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting, error):
    """The message names the setting."""
    with pytest.raises(error, match=next(iter(setting))):
        RetryBudget(**setting)


def test_each_call_deposits_its_share():
    """Five calls at 0.2 are one retry."""
    budget = RetryBudget(ratio=0.2, per_second=0)
    for _ in range(4):
        budget.deposit(0.0)
    assert not budget.withdraw(0.0)
    budget.deposit(0.0)
    assert budget.withdraw(0.0)
    assert not budget.withdraw(0.0)


@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.7, 1 / 3])
def test_shares_add_up_without_rounding_errors(ratio):
    """n / ratio calls are n retries, whatever the ratio looks like in binary."""
    budget = RetryBudget(ratio=ratio, per_second=0)
    for _ in range(round(100 / ratio)):
        budget.deposit(0.0)
    whole = int(ratio * round(100 / ratio) + 1e-9)
    assert [budget.withdraw(0.0) for _ in range(whole + 1)] == [True] * whole + [False]


def test_what_is_seldom_called_has_a_reserve():
    """`per_second * ttl` retries need no calls."""
    budget = RetryBudget(ratio=0, per_second=1, ttl=3)
    assert [budget.withdraw(0.0) for _ in range(4)] == [True, True, True, False]


def test_what_is_older_than_the_ttl_counts_no_longer():
    """Neither calls nor retries."""
    budget = RetryBudget(ratio=1, per_second=0.1, ttl=10)
    budget.deposit(0.0)
    assert budget.withdraw(0.0)
    assert budget.withdraw(0.0)
    assert not budget.withdraw(9.9)
    assert budget.withdraw(11.1)
    assert not budget.withdraw(11.1)


def test_balance_is_what_may_be_withdrawn(monkeypatch):
    """It says how many retries are left."""
    monkeypatch.setattr(budget_module, "_now", lambda: 5.0)
    budget = RetryBudget(ratio=0.5, per_second=1, ttl=2)
    budget.deposit()
    budget.deposit()
    assert budget.balance == pytest.approx(3.0)
    assert budget.withdraw()
    assert budget.balance == pytest.approx(2.0)


@given(
    ratio=st.floats(0, 2),
    per_second=st.floats(0, 5),
    ttl=st.floats(0.1, 60),
    steps=st.lists(st.tuples(st.floats(0, 20), st.integers(0, 5), st.integers(0, 8)), max_size=40),
)
def test_no_window_has_more_retries_than_its_share(ratio, per_second, ttl, steps):
    """At every retry, those of the last ttl are within ratio * calls + per_second * ttl."""
    budget = RetryBudget(ratio=ratio, per_second=per_second, ttl=ttl)
    now, calls, retries = 0.0, [], []
    for passed, deposits, withdrawals in steps:
        now += passed
        for _ in range(deposits):
            budget.deposit(now)
            calls.append(now)
        for _ in range(withdrawals):
            if budget.withdraw(now):
                retries.append(now)
                counted = sum(at > now - 1.1 * ttl - 1e-6 for at in calls)
                made = sum(at > now - ttl for at in retries)
                assert made <= ratio * counted + per_second * ttl + 1e-6


@given(
    ttl=st.floats(0.1, 60),
    gaps=st.lists(st.floats(0, 30), max_size=60),
)
def test_what_it_holds_is_bounded(ttl, gaps):
    """However long it is used, it remembers a fixed number of parts."""
    budget = RetryBudget(ttl=ttl)
    now = 0.0
    for gap in gaps:
        now += gap
        budget.deposit(now)
        assert len(budget._parts) <= 11


def test_a_call_that_began_long_ago_counts_now():
    """A clock value older than the newest does no harm."""
    budget = RetryBudget(ratio=1, per_second=0)
    budget.deposit(100.0)
    budget.deposit(3.0)
    assert [budget.withdraw(100.0) for _ in range(3)] == [True, True, False]


def test_threads_do_not_overdraw():
    """Many threads that withdraw at once get exactly what is there."""
    budget = RetryBudget(ratio=0.5, per_second=0, ttl=3600)
    for _ in range(1000):
        budget.deposit(1.0)
    got: list[bool] = []

    def withdraw():
        got.extend(budget.withdraw(1.0) for _ in range(200))

    threads = [threading.Thread(target=withdraw) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got.count(True) == 500


def test_one_budget_a_dependency():
    """Whoever asks by the same name gets the same, and another name another."""
    assert budget_of("urlhaus.abuse.ch") is budget_of("urlhaus.abuse.ch")
    assert budget_of("urlhaus.abuse.ch") is not budget_of("otx.alienvault.com")


def test_threads_that_ask_at_once_get_the_same():
    """There is never a second budget for a name."""
    barrier = threading.Barrier(8)
    found: list[RetryBudget] = []

    def ask(number):
        barrier.wait()
        found.extend(budget_of(f"host-{n}") for n in range(50))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(one) for one in found}) == 50


def test_only_those_in_use_are_remembered():
    """A name made of an item cannot fill the memory, and drives out no dependency in use."""
    used = budget_of("in use")
    for number in range(MOST_BUDGETS + 50):
        budget_of(f"host-{number}")
        assert budget_of("in use") is used
    assert len(budget_module._by_name) == MOST_BUDGETS


def test_copies_begin_anew():
    """What is spent belongs to one budget: copied and pickled are the settings."""
    budget = RetryBudget(ratio=0.3, per_second=0, ttl=5)
    for again in (copy.copy(budget), copy.deepcopy(budget), pickle.loads(pickle.dumps(budget))):
        assert again is not budget
        assert repr(again) == repr(budget)


def test_the_child_of_a_fork_begins_anew():
    """Also where a thread of the parent holds the locks."""
    code = """
import os, warnings
warnings.simplefilter("ignore")
from periscope_otel.resilience import budget as module
mine, named = module.RetryBudget(ratio=0, per_second=0.1), module.budget_of("a")
assert mine.withdraw() and not mine.withdraw()
mine._lock.acquire(); module._lock.acquire()
if (child := os.fork()) == 0:
    os._exit(0 if mine.withdraw() and module.budget_of("a").withdraw() else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == 0
