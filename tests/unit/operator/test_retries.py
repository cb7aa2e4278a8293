"""When to try again what failed."""

from pointsman_operator.retries import Retries


def test_each_has_pauses_of_its_own_that_grow_to_a_limit():
    retries, now, pauses = Retries(first_s=1.0, last_s=4.0), 0.0, []
    for _ in range(4):
        retries.tried("a", done=False, now=now)
        assert not retries.due("a", now=now)
        assert retries.due("b", now=now)
        pauses.append(retries.wait_s(now=now))
        now += pauses[-1]
        assert retries.due("a", now=now)
    assert pauses == [1.0, 2.0, 4.0, 4.0]
    retries.tried("a", done=True, now=now)
    assert retries.wait_s(now=now) == float("inf")
    retries.tried("a", done=False, now=now)
    assert retries.wait_s(now=now) == 1.0, "a success is the end of it"


def test_what_nobody_wants_any_more_is_forgotten():
    retries = Retries()
    retries.tried("a", done=False, now=0.0)
    retries.tried("b", done=False, now=1.0)
    retries.keep({"b"})
    assert retries.due("a", now=0.0)
    assert not retries.due("b", now=1.0)
