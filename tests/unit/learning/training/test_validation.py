"""Which windows a policy is judged by."""

import numpy as np

from pointsman_core.resources import Admission
from pointsman_learning.training.validation import Validation, ValidationOptions

SMALL = {
    "workloads": ("poisson",),
    "loads": (0.5, 0.9),
    "limits": ("x1",),
    "seeds": 2,
    "requests": 20,
}


def test_both_admissions_count_alike():
    both = Validation.of(ValidationOptions(**SMALL))
    admissions = [one.snapshot.admission for one in both.scenarios]
    assert admissions == [Admission.REJECT] * 4 + [Admission.BEST_EFFORT] * 4
    base = both.baseline()
    rows = both.rows(base, base)
    assert [row.name for row in rows] == [
        *("poisson 0.5 x1", "poisson 0.9 x1"),
        *("poisson 0.5 x1 best effort", "poisson 0.9 x1 best effort"),
        *("all", "poisson, all"),
    ]
    assert rows[4].windows == 8
    assert np.isclose(rows[4].base, np.mean([row.base for row in rows[:4]]))


def test_windows_with_rejection_are_the_same_whether_others_are_judged_or_not():
    both = Validation.of(ValidationOptions(**SMALL))
    one = Validation.of(ValidationOptions(**SMALL, reject=(True,)))
    for ours, theirs in zip(both.scenarios[:4], one.scenarios, strict=True):
        assert (ours.arrival_s == theirs.arrival_s).all()
        assert ours.prompt.tolist() == theirs.prompt.tolist()
    seeds = [scenario.seed for scenario in both.scenarios]
    assert len(set(seeds)) == 8
