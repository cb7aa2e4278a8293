import math
from dataclasses import replace

import numpy as np
import pytest

from pointsman_core.prediction import DeclaredPriors
from pointsman_core.resources import Admission, Algorithm
from pointsman_core.workload import WorkloadError
from pointsman_learning.simulator import Change, Gauges, check
from pointsman_learning.workloads import (
    Limits,
    OnOff,
    arrival_process,
    capacity,
    edge_site,
    limits_of,
    make_scenario,
    outages,
    predicted_lengths,
    random_pool,
    synthetic_corpus,
    user_arrivals,
    user_corpus,
)
from pointsman_learning.workloads.scenarios import BASE_MS, CODE_BASE_MS, base_limits_ms


def make(**changes):
    arguments = {
        "pool_snapshot": edge_site(),
        "process": "poisson",
        "load": 0.9,
        "split": "test",
        "requests": 300,
        "seed": 3,
    }
    return make_scenario(**(arguments | changes))


ARRAYS = (
    "arrival_s",
    "prompt_tokens",
    "limit_s",
    "score",
    "output_tokens",
    "predicted_quality",
    "predicted_output_tokens",
    "domain",
    "prompt",
)


def differing(one, other) -> set[str]:
    return {name for name in ARRAYS if not np.array_equal(getattr(one, name), getattr(other, name))}


def test_equal_arguments_equal_scenarios():
    one, same = make(mishaps=outages), make(mishaps=outages)
    assert differing(one, same) == set()
    assert one.availability == same.availability
    assert one.description == same.description
    assert differing(one, make(seed=4)) == set(ARRAYS)


@pytest.mark.parametrize(
    ("changes", "differ"),
    [
        ({"load": 0.5}, {"arrival_s"}),
        ({"limits": "x5"}, {"limit_s"}),
        ({"limits": "mixed"}, {"limit_s"}),
        ({"length_error": 0.0}, {"predicted_output_tokens"}),
        ({"mishaps": outages}, set()),
        ({"gauges": Gauges(lag_s=3.0)}, set()),
        ({"admission": Admission.REJECT, "algorithm": Algorithm.RANDOM}, set()),
        ({"process": "on-off"}, {"arrival_s"}),
    ],
)
def test_one_change_changes_nothing_else(changes, differ):
    assert differing(make(), make(**changes)) == differ


def test_splits_share_no_draws():
    train = make(split="train")
    assert differing(make(), train) == set(ARRAYS)


@pytest.mark.parametrize("process", ["poisson", "on-off"])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_scenarios_are_sound(process, split):
    scenario = make(process=process, split=split, limits="mixed", mishaps=outages)
    check(scenario)
    assert len(scenario) == 300
    assert scenario.description.startswith("composed: ")
    for part in ("synthetic generator", "load 0.9", "limits mixed", "declared priors"):
        assert part in scenario.description


def test_random_pools_are_sound():
    rng = np.random.default_rng(5)
    for seed in range(10):
        pool = random_pool(rng, small_share=0.3)
        scenario = make(pool_snapshot=pool, split="train", seed=seed, mishaps=outages)
        check(scenario)
        assert scenario.snapshot.candidates == pool.snapshot.candidates


def test_load_is_the_share_of_capacity():
    process = arrival_process("poisson", split="test")
    scenario = make(load=0.5, requests=20_000)
    verbosity = _verbosity(scenario)
    full = capacity(
        scenario.snapshot,
        input_tokens=np.minimum(process.sizes.input_tokens, 8192 - 256).mean(),
        output_tokens=process.sizes.output_tokens.mean() * verbosity,
    )
    assert 20_000 / scenario.arrival_s[-1] == pytest.approx(0.5 * full, rel=0.03)


def _verbosity(scenario):
    corpus = synthetic_corpus("test")
    columns = [corpus.column(c.model) for c in scenario.snapshot.candidates]
    return corpus.relative_verbosity[columns]


def test_answers_are_as_long_as_their_expert_is_verbose():
    scenario = make(requests=2000)
    base = scenario.output_tokens / _verbosity(scenario)
    # Not cut by the context, and long enough for rounding not to matter.
    long = (scenario.output_tokens.min(axis=1) > 50) & (scenario.prompt_tokens < 2000)
    assert long.sum() > 300
    np.testing.assert_allclose(base[long].min(axis=1), base[long].max(axis=1), rtol=0.02)


def test_lengths_fit_the_context():
    scenario = make(requests=5000)
    assert scenario.prompt_tokens.max() <= 8192 - 256
    assert (scenario.prompt_tokens[:, None] + scenario.output_tokens).max() <= 8192
    assert scenario.predicted_output_tokens.min() >= 1


@pytest.mark.parametrize("error", [0.1, 0.5, 1.0, math.inf])
def test_predicted_lengths_are_unbiased_and_know_their_error(error):
    sizes = arrival_process("poisson", split="test").sizes
    rng = np.random.default_rng(0)
    base = rng.choice(sizes.output_tokens, 200_000).astype(float)
    guess = predicted_lengths(base, rng.standard_normal(len(base)), sizes=sizes, error=error)
    assert guess.mean() == pytest.approx(base.mean(), rel=0.02)
    # What is predicted long is as long as predicted, in the mean.
    for low, high in ((0, 30), (30, 70), (70, 100)):
        edge = np.percentile(guess, [low, high])
        inside = (guess >= edge[0]) & (guess <= edge[1])
        assert guess[inside].mean() == pytest.approx(base[inside].mean(), rel=0.04)


def test_lengths_are_predicted_from_what_the_training_part_tells():
    process = arrival_process("poisson", split="test")
    assert process.known_sizes is arrival_process("poisson", split="train").sizes
    longer = replace(
        process.sizes, output_tokens=process.sizes.output_tokens * 4, source="four times as long"
    )
    drifted = make(process=replace(process, sizes=longer), length_error=math.inf, load=0.1)
    usual = make(process=process, length_error=math.inf, load=0.1)
    fits = drifted.prompt_tokens < 3000
    np.testing.assert_array_equal(
        drifted.predicted_output_tokens[fits], usual.predicted_output_tokens[fits]
    )


def test_learned_lengths_count_where_lengths_are_known():
    corpus = synthetic_corpus("test")
    own = np.full_like(corpus.scores, np.nan)
    own[:, 0] = 40.0
    own[::2, 1] = 40.0
    learned = np.full_like(own, 33.0)
    learned[:, 2] = np.nan
    known = replace(corpus, output_tokens=own)
    column = [corpus.column(c.model) for c in edge_site().candidates]
    scenario = make(corpus=known, predicted_tokens=learned)
    plain = make(corpus=known)
    told = np.isfinite(own)[scenario.prompt][:, column]
    assert told.any(axis=0).sum() == 2
    assert (scenario.predicted_output_tokens[told] == 33).all()
    np.testing.assert_array_equal(
        scenario.predicted_output_tokens[~told], plain.predicted_output_tokens[~told]
    )
    assert "predicted by the model where the table has them" in scenario.description
    unlearned = make(corpus=known, predicted_tokens=np.full_like(own, np.nan))
    assert unlearned.description == plain.description


def test_less_error_predicts_better():
    def distance(error):
        scenario = make(requests=3000, length_error=error)
        ratio = scenario.predicted_output_tokens / scenario.output_tokens
        return np.abs(np.log(ratio)).mean()

    distances = [distance(error) for error in (0.0, 0.2, 0.5, 1.0, math.inf)]
    assert distances == sorted(distances)
    assert distances[0] < 0.01


def test_declared_priors_are_what_core_says():
    scenario = make()
    corpus = synthetic_corpus("test")
    priors = DeclaredPriors(scenario.snapshot)
    by_prompt = np.stack([priors.predict(prompt).quality for prompt in corpus.prompts])
    known = {row.tobytes() for row in by_prompt}
    assert {row.tobytes() for row in scenario.predicted_quality} == known


def test_passed_in_predictions_follow_prompts():
    corpus = synthetic_corpus("test")
    # A predictor that knows the truth.
    scenario = make(corpus=corpus, predictor=corpus.scores)
    np.testing.assert_array_equal(scenario.predicted_quality, scenario.score)
    assert "quality predicted by a model" in scenario.description


def test_prompts_repeat_only_when_all_were_asked():
    corpus = synthetic_corpus("test").take(np.arange(100))
    # Each prompt's number as a prediction tells which one was asked.
    number = np.repeat(np.arange(100)[:, None] / 100, len(corpus.experts), axis=1)
    scenario = make(corpus=corpus, predictor=number, requests=250)
    asked = scenario.predicted_quality[:, 0]
    np.testing.assert_array_equal(scenario.prompt, np.rint(asked * 100))
    for start in (0, 100):
        assert len(np.unique(asked[start : start + 100])) == 100


def test_blends_answer_as_one_of_two():
    pool = random_pool(np.random.default_rng(0), 12, small_share=0.5)
    corpus = synthetic_corpus("test")
    number = np.repeat(np.arange(500)[:, None] / 500, len(corpus.experts), axis=1)
    requests = make(pool_snapshot=pool, corpus=corpus, predictor=number)
    row = np.rint(requests.predicted_quality[:, 0] * 500).astype(int)
    predicted = make(pool_snapshot=pool, corpus=corpus, predictor=corpus.scores)
    for endpoint, candidate in enumerate(pool.snapshot.candidates):
        if blend := pool.blends.get(candidate.expert):
            first = corpus.scores[row, corpus.column(blend.first)]
            second = corpus.scores[row, corpus.column(blend.second)]
            score = requests.score[:, endpoint]
            assert ((score == first) | (score == second)).all()
            differ = first != second
            share = (score == second)[differ].mean()
            assert share == pytest.approx(blend.share, abs=0.15)
            mixed = (1 - blend.share) * first + blend.share * second
            np.testing.assert_allclose(predicted.predicted_quality[:, endpoint], mixed)


def test_own_data(tmp_path):
    quality, arrivals = tmp_path / "quality.csv", tmp_path / "arrivals.csv"
    names = [c.model for c in edge_site().candidates]
    rows = [f"p{i},{name},{i % 2},{10 * (i + 1)}\n" for i in range(5) for name in names]
    # A prompt without a score of every expert is not asked.
    rows.append(f"lonely,{names[0]},1,999\n")
    quality.write_text("prompt,expert,score,output_tokens\n" + "".join(rows))
    times = "".join(f"{i},100,20\n" for i in range(50))
    arrivals.write_text("arrival_seconds,input_tokens,output_tokens\n" + times)
    scenario = make(
        process=user_arrivals(arrivals), corpus=user_corpus(quality), requests=50, length_error=0.0
    )
    check(scenario)
    assert set(scenario.output_tokens.ravel()) == {10, 20, 30, 40, 50}
    np.testing.assert_array_equal(scenario.predicted_output_tokens, scenario.output_tokens)
    assert "arrivals.csv" in scenario.description
    assert "quality.csv" in scenario.description
    noisy = make(process=user_arrivals(arrivals), corpus=user_corpus(quality), requests=50)
    assert not np.array_equal(noisy.predicted_output_tokens, noisy.output_tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load": 0.0}, r"load: must be above 0 \(got 0.0\)"),
        ({"load": math.nan}, "load: must be above 0"),
        ({"length_error": -1.0}, "length_error: must be at least 0"),
        ({"split": "dev"}, "split: must be one of train, validation, test"),
        ({"limits": "tight"}, "limits: must be one of x1, x2.5, x5, mixed, or a factor like x3"),
        ({"requests": 0}, "at least 1 request"),
        ({"process": "azure-conv"}, "run `pointsman data fetch"),
        ({"predictor": np.zeros((2, 2))}, r"predictor: must be of shape \(500, 6\)"),
        ({"predictor": np.full((500, 6), 1.5)}, "predictor: must hold numbers from 0 to 1"),
        ({"predictor": np.full((500, 6), np.nan)}, "predictor: must hold numbers from 0 to 1"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(WorkloadError, match=message):
        make(**changes)


def test_parts_of_other_splits():
    with pytest.raises(WorkloadError, match="is the train split, the scenario is of test"):
        make(corpus=synthetic_corpus("train"))
    with pytest.raises(WorkloadError, match="of the train split, the scenario is of test"):
        make(process=arrival_process("poisson", split="train"))


def test_pool_without_scores():
    corpus = synthetic_corpus("test")
    with pytest.raises(WorkloadError, match="has no scores of codegemma-7b; it has other"):
        make(corpus=replace(corpus, experts=("other",)))
    unscored = replace(corpus, scores=np.full_like(corpus.scores, np.nan))
    with pytest.raises(WorkloadError, match="no prompt with a score of every expert"):
        make(corpus=unscored)


def test_limits():
    rng = np.random.default_rng(0)
    drawn = limits_of("x2.5").draw(rng, 3000, BASE_MS)
    assert set(np.round(drawn, 6)) == {0.125, 0.175, 0.25}
    mixed = limits_of("mixed").draw(rng, 30_000, (100.0,))
    assert (mixed.min(), mixed.max()) == pytest.approx((0.1, 0.5), rel=0.01)
    assert np.median(mixed) == pytest.approx(0.1 * math.sqrt(5.0), rel=0.02)
    assert limits_of("x3") == limits_of(3) == Limits("x3", (3.0, 3.0))
    own = Limits("mine", (1.0, 1.0), base_ms=(40.0,))
    assert limits_of(own).draw(rng, 2, BASE_MS).tolist() == [0.04, 0.04]
    assert base_limits_ms("azure-code") == CODE_BASE_MS
    assert base_limits_ms("azure-conv") == BASE_MS


@pytest.mark.parametrize("endpoints", [1, 2, 6])
def test_outages_lose_one_and_join_another(endpoints):
    for seed in range(20):
        changes = outages(np.random.default_rng(seed), endpoints, 90.0)
        times = [change.time_s for change in changes]
        assert times == sorted(times)
        mid_run = [change for change in changes if change.time_s > 0]
        assert all(30.0 <= change.time_s <= 60.0 for change in mid_run)
        by_change = {change.change: change.endpoint for change in mid_run}
        assert set(by_change) == {Change.FAIL, Change.JOIN}
        assert (by_change[Change.FAIL] == by_change[Change.JOIN]) == (endpoints == 1)
        if endpoints > 1:
            assert changes[0].change is Change.LEAVE
            assert (changes[0].time_s, changes[0].endpoint) == (0.0, by_change[Change.JOIN])


def test_on_off_of_ones_own():
    process = arrival_process("on-off", split="test", on_off=OnOff(on_s=2.0, off_s=2.0, ratio=9.0))
    assert "2 s at 9 times the rate of 2 s" in make(process=process).description
