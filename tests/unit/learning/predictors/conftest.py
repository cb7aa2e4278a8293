import numpy as np
import pytest

from pointsman_learning.predictors.cache import CACHE_VARIABLE
from pointsman_learning.workloads import Corpus

TEMPLATES = {
    "code": "Write a function that returns the {n} largest items of list_{n}.",
    "math": "Ann buys {n} pens at ${n} each. How many dollars does she pay?",
    "fact": "who won the cup in the year {n} and where",
}
MEANS = {"code": (0.9, 0.1), "math": (0.2, 0.8), "fact": (0.5, 0.5)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def make_corpus():
    """Three kinds of prompts; two experts, each of them best at one kind."""

    def make(prompts=240, *, tasks=True, seed=0, lengths=False):
        rng = np.random.default_rng(seed)
        names = [list(TEMPLATES)[i % 3] for i in range(prompts)]
        texts = tuple(TEMPLATES[n].format(n=rng.integers(10, 10**6)) for n in names)
        means = np.array([MEANS[n] for n in names])
        tokens = np.full(means.shape, np.nan)
        if lengths:
            usual = np.array([{"code": 200.0, "math": 50.0, "fact": 10.0}[n] for n in names])
            tokens[:, 0] = usual * np.exp(0.2 * rng.standard_normal(prompts))
        return Corpus(
            split="train",
            prompts=texts,
            experts=("coder", "counter"),
            scores=(rng.random(means.shape) < means).astype(np.float64),
            tasks=tuple(names) if tasks else ("",) * prompts,
            domains=tuple(names),
            verbosity=np.array([100.0, 50.0]),
            edge=np.array([True, True]),
            output_tokens=tokens,
            source="made up",
        )

    return make
