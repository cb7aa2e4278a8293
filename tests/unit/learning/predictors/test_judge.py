import numpy as np
import pytest

from pointsman_learning.predictors.judge import (
    bootstrap,
    calibration_error,
    chosen_score,
    judge,
    judge_lengths,
    rank_correlation,
    task_means,
)

SCORES = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])


def test_the_oracle_has_no_regret():
    found = judge("oracle", SCORES, SCORES, best_single=0)
    assert found.chosen.mean == 1.0
    assert found.regret == found.brier == found.calibration_error == 0.0
    assert found.gain.mean == pytest.approx(0.5)
    assert found.rank_correlation == pytest.approx(1.0)


def test_equal_predictions_share_the_choice():
    assert chosen_score(np.zeros((2, 3)), SCORES) == pytest.approx([0.5, 0.5])


def test_a_ranking_alone_has_no_calibration():
    found = judge("random", np.zeros((2, 3)), SCORES, best_single=0, expects=False)
    assert found.brier is None
    assert found.calibration_error is None
    assert found.rank_correlation is None


def test_the_bootstrap_is_seeded_and_holds_the_mean():
    values = np.random.default_rng(0).random(200)
    found = bootstrap(values)
    assert found == bootstrap(values)
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 200**0.5, rel=0.1)


def test_calibration_error_is_the_bias_of_a_biased_prediction():
    rng = np.random.default_rng(0)
    expected = rng.uniform(0.2, 0.7, (20_000, 1))
    actual = (rng.random(expected.shape) < expected).astype(float)
    assert calibration_error(expected, actual) < 0.02
    assert calibration_error(expected + 0.1, actual) == pytest.approx(0.1, abs=0.02)


def test_rank_correlation_leaves_out_prompts_on_which_all_score_alike():
    predicted = np.array([[0.1, 0.2], [0.1, 0.2]])
    assert rank_correlation(predicted, np.array([[0.0, 1.0], [1.0, 1.0]])) == pytest.approx(1.0)
    assert rank_correlation(predicted, np.ones((2, 2))) is None


def test_lengths_are_judged_where_they_are_known():
    tokens = np.array([[10.0, np.nan], [20.0, 40.0], [np.nan, np.nan]])
    constant = np.full((3, 2), 20.0)
    found = judge_lengths(np.where(np.isnan(tokens), 1.0, tokens), constant, tokens)
    assert found.answers == 3
    assert found.error.mean == 0.0
    assert found.constant_error.mean == pytest.approx((np.log(2) + np.log(2) / 2) / 2)


def test_a_new_task_has_the_overall_mean():
    found = task_means(["a", "b"], np.array([[1.0], [0.0]]), ["a", "c"])
    assert found.ravel() == pytest.approx([1.0, 0.5])
