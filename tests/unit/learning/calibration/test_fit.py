from pathlib import Path

import numpy as np
import pytest

from pointsman_core.cost import CostModel
from pointsman_core.resources import ExpertLimits, LLMExpertSpec
from pointsman_learning.calibration.design import EngineLimits
from pointsman_learning.calibration.fit import Times, fit
from pointsman_learning.calibration.measurements import (
    CalibrationError,
    Measurement,
    Measurements,
    read_csv,
    write_csv,
)
from pointsman_learning.calibration.profile import (
    cost_model,
    profile_fields,
    profile_yaml,
    times_of,
)

TRUE = Times(overhead_s=0.004, compute_s_per_token=2e-4, weights_s=0.016, context_s_per_token=4e-7)
LIMITS = EngineLimits(
    context_tokens=4096, concurrency=32, kv_capacity_tokens=131_071, max_batched_tokens=512
)
VLLM_CPU = Path(__file__).parent / "vllm-cpu-llama-59mb.csv"


def rows(times=TRUE, *, prefills=(0, 64, 128, 256, 500), noise=0.0, seed=1):
    """A grid of loads with their times, some of them noisy."""
    generator = np.random.default_rng(seed)
    grid = [
        (batch, batch * prompt + prefill, prefill)
        for batch in (1, 4, 16)
        for prompt in (50, 1000, 3000)
        for prefill in prefills
    ]
    b, c, p = (np.array(column, float) for column in zip(*grid, strict=True))
    blank = Measurements(b, c, p, np.ones(len(b)), np.ones(len(b)))
    seconds = times.predict(blank) * np.exp(generator.normal(0, noise, len(b)))
    return Measurements(b, c, p, seconds, np.ones(len(b)))


def as_array(times):
    return np.array(
        [times.overhead_s, times.compute_s_per_token, times.weights_s, times.context_s_per_token]
    )


def test_finds_the_times_that_made_the_measurements():
    found = fit(rows())
    assert as_array(found.times) == pytest.approx(as_array(TRUE), rel=1e-3)
    assert found.held_out.r2 > 0.999
    assert found.held_out.worst < 1e-2
    assert found.warnings == ()


def test_noise_moves_them_little_and_shows_in_the_errors():
    found = fit(rows(noise=0.05))
    total = found.times.overhead_s + found.times.weights_s
    assert total == pytest.approx(0.020, rel=0.05)
    assert found.times.compute_s_per_token == pytest.approx(2e-4, rel=0.15)
    assert found.times.context_s_per_token == pytest.approx(4e-7, rel=0.15)
    assert 0.02 < found.held_out.mape < 0.08


def test_an_outlier_is_not_followed():
    spoiled = rows(noise=0.01)
    spoiled.iteration_seconds[7] *= 6
    found = fit(spoiled)
    total = found.times.overhead_s + found.times.weights_s
    assert total == pytest.approx(0.020, rel=0.03)
    assert found.fitted.worst_row == 7
    assert found.fitted.worst == pytest.approx(5 / 6, abs=0.05)


def test_arithmetic_that_never_binds_is_bounded_and_said():
    found = fit(rows(prefills=(0,)))
    assert found.times.compute_s_per_token >= 1e-4  # not free
    assert found.fitted.worst < 1e-3
    assert "perTokenUs is an upper bound" in found.warnings[0]


def test_context_without_effect_is_said():
    found = fit(rows(Times(overhead_s=0, compute_s_per_token=2e-4, weights_s=0.02,
                           context_s_per_token=0)))  # fmt: skip
    assert found.warnings == ("the context made no difference: measure longer prompts",)


def test_no_time_is_negative():
    decreasing = rows()
    decreasing.iteration_seconds[:] = 0.03 - 1e-7 * decreasing.context_tokens
    assert (as_array(fit(decreasing).times) >= 0).all()


def test_too_few_rows_are_refused():
    with pytest.raises(CalibrationError, match=r"needs at least 6 measurements \(got 5\)"):
        fit(rows()[np.arange(5)])


def test_the_held_out_error_is_not_that_of_the_fit():
    found = fit(rows(noise=0.1))
    assert found.held_out.mape > found.fitted.mape


class TestProfile:
    def test_gives_the_same_cost_model(self):
        fields = profile_fields(TRUE, LIMITS)
        cost = cost_model(fields)
        assert as_array(cost) == pytest.approx(as_array(TRUE), rel=1e-4)
        assert cost.kv_capacity_tokens == LIMITS.kv_capacity_tokens
        assert (cost.max_sequences, cost.max_batched_tokens) == (32, 512)

    def test_is_yaml_of_an_expert(self):
        import yaml

        fields = yaml.safe_load(profile_yaml(TRUE, LIMITS))
        spec = LLMExpertSpec.model_validate(
            {"model": "m", "backend": {"addresses": ["10.0.0.1:80"]}, **fields}
        )
        assert spec.limits == ExpertLimits(context_tokens=4096, concurrency=32)
        assert as_array(times_of(spec.profile.measured)) == pytest.approx(as_array(TRUE))
        assert isinstance(CostModel.from_profile(spec.profile, spec.limits), CostModel)


class TestRealEngine:
    """Our own measurement of vLLM 0.32 on a CPU: Llama, random weights, 59 MB."""

    def test_the_cost_model_describes_it(self):
        """Held out R² 0.969 and MAPE 6.8 % when it was added."""
        found = fit(read_csv(VLLM_CPU.read_text(), source=VLLM_CPU.name))
        assert found.warnings == ()
        assert found.held_out.r2 > 0.95
        assert found.held_out.mape < 0.08
        constant = found.times.overhead_s + found.times.weights_s
        assert 0.008 < constant < 0.014


class TestCsv:
    def test_what_is_written_is_read_again(self):
        table = rows(noise=0.1)
        again = read_csv(write_csv(table), source="x.csv")
        assert again.iteration_seconds == pytest.approx(table.iteration_seconds, rel=1e-6)
        assert again.context_tokens == pytest.approx(table.context_tokens)

    def test_order_further_columns_and_spaces_do_not_matter(self):
        text = "iteration_seconds, batch,note,prefill_tokens,context_tokens\n" + "0.1,2,x,3,4\n" * 6
        table = read_csv("\ufeff" + text, source="x.csv")
        first = table[np.array([0])]
        assert (first.batch[0], first.prefill_tokens[0], first.context_tokens[0]) == (2, 3, 4)
        assert first.iterations[0] == 1

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("1,x,0,0.1", "x.csv, row 8, column context_tokens: must be a number .*'x'"),
            ("1,2", "x.csv, row 8, column prefill_tokens: the cell is missing"),
            ("1,2,-1,0.1", "x.csv, row 8, column prefill_tokens: must be a number .*'-1'"),
            ("1,2,nan,0.1", "x.csv, row 8, column prefill_tokens: must be a number"),
            ("1,2,0,0", "x.csv, row 8: iteration_seconds and iterations must be above 0"),
            ("0,2,0,0.1", "x.csv, row 8: an iteration computes at least one token"),
            ('1,2,0,"0.1', r"x.csv, row \d+: is not CSV"),
        ],
    )
    def test_wrong_cells_are_named(self, line, message):
        good = "batch,context_tokens,prefill_tokens,iteration_seconds\n" + "1,2,0,0.1\n" * 6
        with pytest.raises(CalibrationError, match=message):
            read_csv(good + line + "\n", source="x.csv")

    def test_missing_columns_are_named(self):
        with pytest.raises(
            CalibrationError,
            match=r"x.csv, row 1: the header lacks prefill_tokens, iteration_seconds "
            r"\(got batch,context_tokens\)",
        ):
            read_csv("batch,context_tokens\n1,2\n", source="x.csv")

    def test_too_few_rows_are_refused(self):
        text = write_csv(Measurements.of([Measurement(
            batch=1, context_tokens=1, prefill_tokens=0, iteration_seconds=1)]))  # fmt: skip
        with pytest.raises(CalibrationError, match=r"needs at least 6 rows .*\(got 1\)"):
            read_csv(text, source="x.csv")
