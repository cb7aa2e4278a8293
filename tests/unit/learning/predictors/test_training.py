import numpy as np
import pytest

from pointsman_core.predictors import Artefact, feature_matrix
from pointsman_learning.predictors import (
    leave_task_out,
    out_of_fold,
    out_of_fold_answers,
    predict_matrix,
    train,
)
from pointsman_learning.predictors import training as module
from pointsman_learning.predictors.export import export
from pointsman_learning.predictors.model import FitOptions, fit

CODE = "Write a function that returns the 5 largest items of list_5."
MATH = "Ann buys 7 pens at $7 each. How many dollars does she pay?"


@pytest.mark.parametrize("tasks", [True, False])
def test_each_expert_is_best_at_its_kind(make_corpus, tasks):
    code, maths = predict_matrix(Artefact(train(make_corpus(tasks=tasks))), [CODE, MATH])
    assert code == pytest.approx([0.9, 0.1], abs=0.15)
    assert maths == pytest.approx([0.2, 0.8], abs=0.15)


def test_predictions_are_calibrated_where_prompts_tell_nothing(make_corpus):
    said = out_of_fold(make_corpus(600))
    assert said[2::3].mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.08)


def test_the_same_corpus_gives_the_same_bytes(make_corpus):
    assert train(make_corpus()) == train(make_corpus())


def test_unfamiliar_prompts_get_nearly_what_is_usual(make_corpus):
    corpus = make_corpus()
    artefact = Artefact(train(corpus))
    said = artefact.predict([CODE, "Übermäßig: ξένο — 你好 世界"])
    usual = corpus.scores.mean(axis=0)
    assert np.abs(said.quality[1] - usual).max() < np.abs(said.quality[0] - usual).max()


def test_lengths_are_learned_where_the_corpus_has_them(make_corpus):
    artefact = Artefact(train(make_corpus(lengths=True)))
    code, maths = artefact.predict([CODE, MATH]).output_tokens
    assert artefact.info.lengths == (True, False)
    assert code[0] == pytest.approx(200, rel=0.25)
    assert maths[0] == pytest.approx(50, rel=0.25)
    assert np.isnan([code[1], maths[1]]).all()


def test_unknown_scores_are_no_zeros(make_corpus):
    corpus = make_corpus()
    corpus.scores[::2, 1] = np.nan
    assert Artefact(train(corpus)).predict([MATH]).quality[0, 1] == pytest.approx(0.8, abs=0.2)


@pytest.mark.parametrize("embedded", [False, True])
def test_onnx_answers_what_the_model_means(make_corpus, embedded):
    corpus = make_corpus(lengths=True)
    features = feature_matrix(corpus.prompts)
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((len(corpus), 8)).astype(np.float32) if embedded else None
    model = fit(
        features=features,
        embedding=embedding,
        scores=corpus.scores,
        output_tokens=corpus.output_tokens,
        tasks=corpus.tasks,
        experts=corpus.experts,
    )
    said = Artefact(export(model, provenance={})).run(features, embedding)
    linear, kinds = model.linear, len(model.kinds)
    grams = features[:, : len(linear.gram_weights)].astype(np.float64)
    size = np.linalg.norm(grams * linear.gram_weights, axis=1, keepdims=True)
    columns = grams @ linear.grams / np.maximum(size, 1e-3) + linear.bias
    columns += features[:, len(linear.gram_weights) :] @ linear.shape
    if embedding is not None:
        columns += embedding @ linear.embedding
    power = np.exp(columns[:, :kinds] - columns[:, :kinds].max(axis=1, keepdims=True))
    share, ease = power / power.sum(axis=1, keepdims=True), columns[:, kinds:-1]
    each = model.mean + ease[:, :, None] * model.slope
    quality = (share[:, :, None] * each).sum(axis=1)
    spread = (share[:, :, None] * each**2).sum(axis=1) - quality**2
    spread += (share**2) @ model.error**2
    tokens = np.exp(share @ model.log_length + columns[:, -1:]) * model.length_factor
    assert said.quality == pytest.approx(np.clip(quality, 0, 1), abs=2e-3)
    assert said.uncertainty == pytest.approx(np.sqrt(spread), abs=5e-3)
    assert said.output_tokens[:, 0] == pytest.approx(np.maximum(tokens[:, 0], 1), rel=1e-2)


def test_too_little_data_is_refused(make_corpus):
    with pytest.raises(ValueError, match="only 9 prompts have scores, needs 20"):
        train(make_corpus(9))


def test_an_expert_without_scores_is_refused(make_corpus):
    corpus = make_corpus()
    corpus.scores[:, 1] = np.nan
    with pytest.raises(ValueError, match="counter has no scores to learn from"):
        train(corpus)


def test_embeddings_must_be_given_where_they_are_needed(make_corpus):
    with pytest.raises(ValueError, match="kind embedding needs sentence embeddings"):
        train(make_corpus(), kind="embedding")


def test_embeddings_are_used(make_corpus):
    def embed(prompts):
        marks = ("function", "dollars", "who")
        return np.array([[m in p for m in marks] for p in prompts], np.float32)

    artefact = Artefact(train(make_corpus(), kind="embedding", embed=embed))
    assert artefact.info.embedding == 3
    assert predict_matrix(artefact, [MATH], embed)[0] == pytest.approx([0.2, 0.8], abs=0.15)
    with pytest.raises(ValueError, match="needs sentence embeddings"):
        predict_matrix(artefact, [MATH])


# --- out of fold -----------------------------------------------------------------------


def test_no_prompt_is_predicted_by_what_saw_it(make_corpus):
    corpus = make_corpus(30)
    said = out_of_fold(corpus, cache=False)
    fold = module.fold_of(30, folds=module.FOLDS, seed=0)
    held = fold == fold[0]
    # Its own scores, whatever they are, do not move its prediction.
    corpus.scores[held] = 1.0 - corpus.scores[held]
    assert (out_of_fold(corpus, cache=False)[held] == said[held]).all()


def test_the_second_call_reads_the_cache(make_corpus, monkeypatch):
    corpus = make_corpus(60)
    first = out_of_fold_answers(corpus)
    monkeypatch.setattr(module, "_by_fold", lambda *_: pytest.fail("computed again"))
    again = out_of_fold_answers(corpus)
    assert (again.quality == first.quality).all()
    assert (again.uncertainty == first.uncertainty).all()


def test_the_cache_is_keyed_by_content(make_corpus, own_cache):
    out_of_fold(make_corpus(60))
    out_of_fold(make_corpus(60, seed=1))
    assert len(list(own_cache.iterdir())) == 2


def test_a_damaged_cache_is_computed_again(make_corpus, own_cache):
    corpus = make_corpus(60)
    first = out_of_fold(corpus)
    (file,) = own_cache.iterdir()
    file.write_bytes(b"rubbish")
    assert (out_of_fold(corpus) == first).all()


def test_a_task_left_out_is_not_known(make_corpus):
    corpus = make_corpus()
    said = leave_task_out(corpus).quality
    # Without code prompts nothing shows that the first expert is good at them.
    assert said[::3, 0].mean() < 0.6


def test_few_prompts_without_options_still_fit(make_corpus):
    corpus = make_corpus(24)
    assert train(corpus, options=FitOptions(clusters=2))
