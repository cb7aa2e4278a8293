from dataclasses import replace

import numpy as np
import pytest

from pointsman_learning.simulator import Availability, Change, Gauges, ScenarioError, check


def array(*values, dtype=np.float64):
    return np.array(values, dtype)


@pytest.fixture
def scenario(lab):
    return lab.scenario((0.0, 10, 5), (1.0, 20, 6), endpoints=2)


def test_a_right_one_passes(scenario):
    check(scenario)
    check(replace(scenario, limit_s=array(np.inf, 1.0), first_token_limit_s=array(np.inf, 1.0)))
    check(replace(scenario, domain=np.array([1, 0]), domains=("a", "b")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"limit_s": array(1.0)},
            "limit_s has the shape (1,), 2 requests on 2 endpoints need (2,)",
        ),
        ({"score": array(1.0, 1.0)}, "score has the shape (2,), 2 requests on 2 endpoints need"),
        ({"first_token_limit_s": array(1.0)}, "first_token_limit_s has the shape (1,)"),
        ({"arrival_s": array(1.0, 0.5)}, "arrival_s[1] must be no earlier than the request before"),
        ({"arrival_s": array(-1.0, 0.5)}, "arrival_s[0] must be a time of at least 0 (got -1.0)"),
        ({"arrival_s": array(0.0, np.nan)}, "arrival_s[1] must be a time of at least 0 (got nan)"),
        ({"arrival_s": array(0.0, np.inf)}, "arrival_s[1] must be a time of at least 0 (got inf)"),
        ({"limit_s": array(0.1, 0.0)}, "limit_s[1] must be a limit above 0 (inf: none) (got 0.0)"),
        ({"limit_s": array(np.nan, 0.1)}, "limit_s[0] must be a limit above 0"),
        ({"first_token_limit_s": array(0.1, -1.0)}, "first_token_limit_s[1] must be a limit above"),
        ({"score": np.full((2, 2), 1.5)}, "score[0, 0] must be from 0 to 1 (got 1.5)"),
        ({"predicted_quality": np.full((2, 2), np.nan)}, "predicted_quality[0, 0] must be from 0"),
        (
            {"predicted_output_tokens": np.array([[1.0, 1.0], [1.0, 0.5]])},
            "predicted_output_tokens[1, 1] must be a finite length of at least 1 (got 0.5)",
        ),
        ({"output_tokens": np.array([[1, 0], [1, 1]])}, "output_tokens[0, 1] must be at least 1"),
        ({"output_tokens": np.ones((2, 2))}, "output_tokens must be whole numbers, not float64"),
        ({"prompt_tokens": np.array([0, 1])}, "prompt_tokens[0] must be at least 1 token (got 0)"),
        (
            {"domain": np.array([0, 2]), "domains": ("a", "b")},
            "domain[1] must be the number of one of the 2 domains (got 2)",
        ),
        ({"prompt": np.zeros(3, np.int64)}, "prompt has the shape (3,), 2 requests on 2 endpoints"),
        ({"detection_s": -0.1}, "detection_s must be at least 0 (got -0.1)"),
        ({"detection_s": np.inf}, "detection_s must be at least 0 (got inf)"),
        ({"gauges": Gauges(period_s=0.0)}, "gauges.period_s must be above 0 (got 0.0)"),
        ({"gauges": Gauges(lag_s=-1.0)}, "gauges.lag_s must be at least 0 (got -1.0)"),
        ({"gauges": Gauges(lag_s=np.nan)}, "gauges.lag_s must be at least 0 (got nan)"),
        (
            {"gauges": Gauges(missing=frozenset({2}))},
            "gauges.missing names endpoint 2, there are 2 (from 0)",
        ),
        (
            {"availability": (Availability(1.0, 5, Change.FAIL),)},
            "availability[0] names endpoint 5, there are 2 (from 0)",
        ),
        (
            {"availability": (Availability(1.0, 0, 9),)},
            "availability[0] has the unknown change 9",
        ),
        (
            {
                "availability": (
                    Availability(2.0, 0, Change.FAIL),
                    Availability(1.0, 0, Change.JOIN),
                )
            },
            "availability[1] at 1.0 s must not be before 2.0 s",
        ),
        (
            {"availability": (Availability(np.nan, 0, Change.FAIL),)},
            "availability[0] at nan s must not be before 0.0 s",
        ),
        (
            {"prompt_tokens": np.array([10, 1020])},
            "request 1 can never run on endpoint 0 (e0 at 10.0.0.1:8000): 1020 prompt tokens and 6"
            " output tokens exceed its KV cache of 1024 tokens (2 such cases)",
        ),
        (
            {"prompt_tokens": np.array([10, 1024])},
            "request 1 fits nowhere: its 1024 prompt tokens exceed every endpoint's context"
            " (at most 1024 tokens)",
        ),
    ],
)
def test_what_is_wrong_is_told(scenario, change, message):
    with pytest.raises(ScenarioError) as told:
        check(replace(scenario, **change))
    assert str(told.value).startswith(message)


def test_a_scenario_needs_requests(lab):
    with pytest.raises(ScenarioError, match="at least one request"):
        check(lab.scenario())


def test_a_snapshot_needs_candidates(lab, build):
    with pytest.raises(ScenarioError, match="the snapshot has no candidates"):
        check(lab.scenario((0.0, 1, 1), snapshot=build.snapshot()))


def test_candidates_need_endpoints_of_their_own(lab, build):
    shared = [build.expert(name, "10.0.0.1:8000") for name in "ab"]
    with pytest.raises(ScenarioError, match=r"two candidates share the address 10.0.0.1:8000"):
        check(lab.scenario((0.0, 1, 1), snapshot=build.snapshot(*shared)))
