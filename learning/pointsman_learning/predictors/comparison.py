"""The predictor table: what can be had from a prompt, from nothing to the oracle."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import orjson
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_union

from pointsman_core.prediction import DeclaredPriors
from pointsman_core.predictors import Artefact, LearnedPredictor, model_key
from pointsman_core.snapshot import Snapshot
from pointsman_core.state import FloatArray, IntArray
from pointsman_learning.predictors.judge import (
    Judgement,
    LengthJudgement,
    columns_of,
    judge,
    judge_lengths,
    task_means,
)
from pointsman_learning.predictors.minilm import Encoder, embed
from pointsman_learning.predictors.training import (
    Kind,
    content_key,
    leave_task_out,
    predict_matrix,
    train,
)
from pointsman_learning.predictors.training import out_of_fold_answers as answers_out_of_fold
from pointsman_learning.workloads import Corpus, DataFolder, edge_site
from pointsman_learning.workloads.corpus import TOKENS_PER_WORD
from pointsman_learning.workloads.folder import ANSWERS

CHARACTERS: Final = (100, 1000, 8000)
_TEXT: Final = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in"
    " May. How many clips did Natalia sell altogether in April and May? "
)


def compare(
    train_corpus: Corpus,
    held_out: Corpus,
    *,
    embeddings: bool = True,
    speed: bool = True,
    on_step: Callable[[str], object] = lambda _: None,
) -> dict[str, list[Judgement]]:
    """Judge all methods on the edge-size experts and on all; by the name of that set.

    Methods are fitted on ``train_corpus`` only. "True task" and "oracle" know what nobody
    does: references, not methods.

    Raises:
        EncoderMissingError: embeddings are asked for, and the encoder is not installed.

    """
    methods = list(_methods(train_corpus, held_out, embeddings, speed, on_step))
    sets = {"all": np.arange(len(held_out.experts))}
    if held_out.edge.any() and not held_out.edge.all():
        sets = {"edge": np.flatnonzero(held_out.edge)} | sets
    return {
        name: [
            _judged(method, train_corpus, held_out, columns)
            for method in methods
            if np.isfinite(method[1][:, columns]).all()
        ]
        for name, columns in sets.items()
    }


_Method = tuple[str, FloatArray, bool, Mapping[int, float]]
"""Name, (P, X) predictions, whether they are expected scores, microseconds per prompt."""


def _methods(
    known: Corpus,
    held_out: Corpus,
    embeddings: bool,
    speed: bool,
    on_step: Callable[[str], object],
) -> Iterator[_Method]:
    shape = held_out.scores.shape
    yield "random", np.zeros(shape), False, {}
    yield "best single", np.tile(np.nanmean(known.scores, axis=0), (len(held_out), 1)), True, {}
    on_step("declared priors")
    yield "declared priors", *_declared(held_out, speed)
    on_step("ridge on TF-IDF")
    yield "ridge on TF-IDF", _tfidf_ridge(known, held_out), True, {}
    kinds: tuple[Kind, ...] = ("ngram", "embedding", "combined") if embeddings else ("ngram",)
    encoder = Encoder() if embeddings and speed else None
    for kind in kinds:
        on_step(f"{kind}: fitting")
        artefact = Artefact(train(known, kind=kind, embed=embed), source=kind)
        said = predict_matrix(artefact, held_out.prompts, embed)
        yield kind, said, True, _speed(artefact, encoder) if speed else {}
    if all(held_out.tasks):
        yield "true task", task_means(known.tasks, known.scores, held_out.tasks), True, {}
    yield "oracle", held_out.scores, True, {}


def _judged(method: _Method, known: Corpus, held_out: Corpus, columns: IntArray) -> Judgement:
    name, predicted, expects, microseconds = method
    return judge(
        name,
        predicted[:, columns],
        held_out.scores[:, columns],
        best_single=int(np.nanmean(known.scores[:, columns], axis=0).argmax()),
        expects=expects,
        microseconds=microseconds,
    )


def _declared(held_out: Corpus, speed: bool) -> tuple[FloatArray, bool, Mapping[int, float]]:
    """The edge site's declared priors; NaN for experts that are not there."""
    snapshot = edge_site()
    priors = DeclaredPriors(snapshot)
    said = np.array([priors.predict(prompt).quality for prompt in held_out.prompts])
    quality = np.full(held_out.scores.shape, np.nan)
    column = {model_key(name): x for x, name in enumerate(held_out.experts)}
    for candidate, one in enumerate(snapshot.candidates):
        found = column.get(model_key(one.model))
        if found is not None:
            quality[:, found] = said[:, candidate]
    return quality, True, microseconds(priors.predict) if speed else {}


def _tfidf_ridge(known: Corpus, held_out: Corpus) -> FloatArray:
    """The usual first attempt: one regression per expert on words and characters.

    Inputs and penalty are those that choose best in cross-validation on the training split,
    as for our own: of words with and without characters, and penalties 1, 3, 10 and 30.
    """
    words = make_union(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        TfidfVectorizer(
            analyzer="char_wb", ngram_range=(3, 5), min_df=3, sublinear_tf=True, max_features=60_000
        ),
    )
    inputs = words.fit_transform(known.prompts)
    target = np.where(np.isfinite(known.scores), known.scores, np.nanmean(known.scores, axis=0))
    model = Ridge(30.0, solver="sparse_cg").fit(inputs, target)
    said: FloatArray = model.predict(words.transform(held_out.prompts))
    return np.clip(said, 0.0, 1.0)


def compare_one(artefact: Artefact, held_out: Corpus) -> dict[str, list[Judgement]]:
    """Judge a trained predictor on scores of prompts that it was not trained on.

    Only experts that it knows count, and prompts with scores of all of them. "Best single" is
    the best one of these very prompts: a reference.

    Raises:
        ValueError: it knows fewer than two of the experts, no prompt has scores of all those,
            or it was trained on these very prompts.
        EncoderMissingError: it needs embeddings, and the encoder is not installed.

    """
    if artefact.info.provenance.get("content") == content_key(held_out):
        raise ValueError(f"{artefact.source} was trained on {held_out.source}: give other prompts")
    keys = [model_key(name) for name in artefact.info.experts]
    pairs = [
        (x, keys.index(key))
        for x, key in enumerate(map(model_key, held_out.experts))
        if key in keys
    ]
    if len(pairs) < 2:
        raise ValueError(
            f"{artefact.source} knows {len(pairs)} of the experts {', '.join(held_out.experts)}:"
            " two are needed for a choice"
        )
    columns, own = (np.array(side, np.int64) for side in zip(*pairs, strict=True))
    rows = np.isfinite(held_out.scores[:, columns]).all(axis=1)
    if not rows.any():
        raise ValueError(f"{held_out.source}: no prompt has scores of all known experts")
    actual = held_out.scores[rows][:, columns]
    prompts = [held_out.prompts[i] for i in np.flatnonzero(rows).tolist()]
    mean = actual.mean(axis=0)
    methods = (
        ("random", np.zeros(actual.shape), False),
        ("best single", np.tile(mean, (len(actual), 1)), True),
        (artefact.source, predict_matrix(artefact, prompts, embed)[:, own], True),
        ("oracle", actual, True),
    )
    best = int(mean.argmax())
    return {
        f"{len(pairs)} known": [
            judge(name, said, actual, best_single=best, expects=expects)
            for name, said, expects in methods
        ]
    }


def unseen_tasks(corpus: Corpus) -> dict[str, list[Judgement]]:
    """How the n-gram predictor does on tasks of which it saw no prompt.

    Beside it the best single expert, also chosen without the task.
    """
    said = leave_task_out(corpus).quality
    tasks = np.array(corpus.tasks, dtype=object)
    without = {t: np.nanmean(corpus.scores[tasks != t], axis=0) for t in set(corpus.tasks)}
    single = np.array([without[task] for task in corpus.tasks])
    found = {}
    for name, columns in (
        ("edge", np.flatnonzero(corpus.edge)),
        ("all", np.arange(len(corpus.experts))),
    ):
        actual = corpus.scores[:, columns]
        best = int(np.nanmean(actual, axis=0).argmax())
        found[name] = [
            judge(label, table[:, columns], actual, best_single=best)
            for label, table in (("best single, task unseen", single), ("ngram, task unseen", said))
        ]
    return found


def measured_lengths(folder: DataFolder) -> LengthJudgement:
    """Lengths of real answers to Natural Questions, five-fold, against each model's median."""
    corpus = answers_corpus(folder)
    said = answers_out_of_fold(corpus).output_tokens
    usual = np.tile(np.nanmedian(corpus.output_tokens, axis=0), (len(corpus), 1))
    return judge_lengths(said, usual, corpus.output_tokens)


def answers_corpus(folder: DataFolder) -> Corpus:
    """The 500 questions of LLMRouter's example with whole answers of six models."""
    entries = orjson.loads(folder.read(ANSWERS))
    experts = sorted({name.rpartition("/")[2] for name in entries[0]["llm_name_list"]})
    tokens = np.full((len(entries), len(experts)), np.nan)
    scores = tokens.copy()
    for row, entry in enumerate(entries):
        for name, answer, score in zip(
            entry["llm_name_list"], entry["response_list"], entry["perf_list"], strict=True
        ):
            column = columns_of([name.rpartition("/")[2]], experts)[0]
            tokens[row, column] = max(TOKENS_PER_WORD * len(answer.split()), 1.0)
            scores[row, column] = score
    return Corpus(
        split="train",
        prompts=tuple(entry["query"] for entry in entries),
        experts=tuple(experts),
        scores=scores,
        tasks=("natural_qa",) * len(entries),
        domains=("knowledge",) * len(entries),
        verbosity=np.nanmean(tokens, axis=0),
        edge=np.ones(len(experts), np.bool_),
        output_tokens=tokens,
        source="LLMRouter's Natural Questions example",
    )


# --- speed -----------------------------------------------------------------------------


def _speed(artefact: Artefact, encoder: Encoder | None) -> dict[int, float]:
    if not artefact.info.embedding:
        return microseconds(LearnedPredictor(artefact, _all_known(artefact)).predict)

    def predict(prompt: str) -> FloatArray:
        if encoder is None:  # pragma: no cover - speed of embeddings is asked with an encoder
            raise ValueError("no encoder")
        return artefact.predict([prompt], encoder([prompt])).quality

    return microseconds(predict, repeats=5)


def _all_known(artefact: Artefact) -> Snapshot:
    """The edge site with models renamed to those that the artefact knows."""
    site = edge_site()
    names = artefact.info.experts
    candidates = tuple(
        one.model_copy(update={"model": names[i % len(names)]})
        for i, one in enumerate(site.candidates)
    )
    return site.model_copy(update={"candidates": candidates})


def microseconds(
    predict: Callable[[str], object],
    *,
    characters: Sequence[int] = CHARACTERS,
    repeats: int = 300,
) -> dict[int, float]:
    """Median time of one prediction by the prompt's length."""
    found = {}
    for length in characters:
        prompt = (_TEXT * (length // len(_TEXT) + 1))[:length]
        predict(prompt)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            predict(prompt)
            seconds.append(time.perf_counter() - started)
        found[length] = 1e6 * float(np.median(seconds))
    return found
