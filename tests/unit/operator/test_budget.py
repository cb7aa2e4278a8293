"""How many Events an object may cause."""

from pointsman_operator.budget import EventBudget


def spend(budget, key, times, *, now):
    return sum(budget.spend(key, now=now) for _ in range(times))


def test_a_burst_and_then_one_at_a_time():
    budget = EventBudget(burst=3, refill_s=10.0)
    assert spend(budget, "a", 5, now=0.0) == 3
    assert spend(budget, "a", 5, now=9.0) == 0
    assert spend(budget, "a", 5, now=10.0) == 1
    assert spend(budget, "a", 5, now=10_000.0) == 3


def test_objects_do_not_share_it():
    budget = EventBudget(burst=1)
    assert spend(budget, "a", 2, now=0.0) == 1
    assert spend(budget, "b", 2, now=0.0) == 1


def test_quiet_objects_are_forgotten():
    budget = EventBudget(burst=2, refill_s=10.0)
    spend(budget, "a", 1, now=0.0)
    spend(budget, "b", 2, now=0.0)
    budget.forget(now=10.0)
    assert list(budget._spent) == ["b"]
    assert spend(budget, "b", 2, now=10.0) == 1
