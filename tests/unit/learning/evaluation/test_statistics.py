import numpy as np
import pytest
from scipy import stats

from pointsman_learning.evaluation.statistics import (
    Interval,
    mean_intervals,
    over_prompts,
    paired_differences,
)


def test_mean_and_equal_input_give_equal_intervals() -> None:
    values = np.random.default_rng(1).random((3, 12))
    first, again = mean_intervals(values), mean_intervals(values)
    assert first == again
    for row, interval in zip(values, first, strict=True):
        assert interval.mean == pytest.approx(row.mean())
        assert interval.low < interval.mean < interval.high
        assert type(interval.high) is float


@pytest.mark.parametrize("windows", [6, 20])
def test_width_is_about_that_of_students_interval(windows: int) -> None:
    values = np.random.default_rng(2).standard_normal((200, windows))
    ours = np.mean([interval.half_width for interval in mean_intervals(values, resamples=4000)])
    error = values.std(axis=1, ddof=1) / np.sqrt(windows)
    students = np.mean(stats.t.ppf(0.975, windows - 1) * error)
    assert ours == pytest.approx(students, rel=0.1)


@pytest.mark.parametrize("windows", [8, 20])
def test_covers_the_truth_about_as_often_as_it_says(windows: int) -> None:
    values = np.random.default_rng(3).standard_normal((1500, windows))
    intervals = mean_intervals(values, resamples=2000)
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    assert 0.925 <= covered <= 0.975


def test_pairing_sees_what_windows_hide() -> None:
    rng = np.random.default_rng(4)
    window = rng.standard_normal(10)
    reference = window + 0.001 * rng.standard_normal(10)
    better = window + 0.01 + 0.001 * rng.standard_normal(10)
    (gain,) = paired_differences(better[None], reference)
    assert gain.clear_of_zero
    assert gain.mean == pytest.approx(0.01, abs=0.002)
    mean, _ = mean_intervals(np.array([better, reference]))
    assert mean.half_width > 10 * gain.half_width


def test_no_difference_is_not_clear_of_zero() -> None:
    values = np.random.default_rng(5).random(10)
    (gain,) = paired_differences(values[None], values)
    assert (gain.mean, gain.low, gain.high) == (0, 0, 0)
    assert not gain.clear_of_zero


@pytest.mark.parametrize("windows", [1, 2, 4])
def test_too_few_windows_have_no_interval(windows: int) -> None:
    (interval,) = mean_intervals(np.arange(1.0, windows + 1)[None])
    assert interval.mean == (windows + 1) / 2
    assert np.isnan([interval.low, interval.high]).all()
    assert not interval.clear_of_zero


def answers(rng: np.random.Generator, *, windows: int, prompts: int, times: int) -> np.ndarray:
    """(W, P) sums: each window asks each prompt so often; true mean 0."""
    effect = rng.standard_normal(prompts) + 0.3 * rng.standard_normal((windows, 1))
    noise = rng.standard_normal((windows, prompts)) * np.sqrt(times)
    return times * effect + noise


def test_windows_that_ask_the_same_prompts_hide_the_prompts_chance() -> None:
    rng = np.random.default_rng(6)
    asked = np.full((20, 80), 2.0)
    given, wide = [], []
    for _ in range(300):
        sums = answers(rng, windows=20, prompts=80, times=2)
        one = mean_intervals(sums.mean(axis=1)[None] / 2, resamples=1000)
        given += one
        wide += over_prompts(one, sums[None], asked)

    def covered(intervals: list[Interval]) -> float:
        return float(np.mean([each.low <= 0 <= each.high for each in intervals]))

    assert covered(given) < 0.85
    assert 0.91 <= covered(wide) <= 0.98


def test_prompts_that_make_no_difference_add_next_to_nothing() -> None:
    rng = np.random.default_rng(7)
    sums = 0.3 * rng.standard_normal((20, 1)) + rng.standard_normal((20, 500))
    (given,) = mean_intervals(sums.mean(axis=1)[None])
    (wide,) = over_prompts([given], sums[None], np.ones((20, 500)))
    assert given.half_width <= wide.half_width < 1.1 * given.half_width


def test_one_prompt_tells_nothing_of_others() -> None:
    given = Interval(0.5, 0.4, 0.6)
    assert over_prompts([given], np.ones((1, 6, 1)), np.full((6, 1), 2.0)) == [given]


def test_too_few_windows_have_no_interval_over_prompts_either() -> None:
    given = mean_intervals(np.array([[0.4, 0.6]]))
    (wide,) = over_prompts(given, np.array([[[0.0, 0.8], [0.4, 0.8]]]), np.ones((2, 2)))
    assert wide.mean == 0.5
    assert np.isnan([wide.low, wide.high]).all()


@pytest.mark.parametrize("windows", [8, 20, 33])
def test_intervals_do_not_depend_on_where_in_memory_the_values_lie(windows):
    values = np.random.default_rng(1).random((17, windows))
    expected = mean_intervals(values)
    for offset in range(1, 9):
        room = np.empty(values.size + offset)
        elsewhere = room[offset:].reshape(values.shape)
        elsewhere[:] = values
        assert mean_intervals(elsewhere) == expected
        for rows in (1, 5):
            assert mean_intervals(elsewhere[:rows]) == expected[:rows]
