import numpy as np
import pytest

from pointsman_core.prediction import detect_domain, fold_keywords
from pointsman_core.workload import WorkloadError
from pointsman_learning.workloads import SPLITS, edge_site, synthetic_corpus
from pointsman_learning.workloads.synthetic import DOMAINS


def test_same_every_time_and_other_in_every_split():
    corpora = [synthetic_corpus(split) for split in SPLITS]
    assert len({corpus.prompts[:5] for corpus in corpora}) == 3
    assert corpora[0].experts == tuple(c.model for c in edge_site().candidates)
    with pytest.raises(WorkloadError, match="must be one of train"):
        synthetic_corpus("dev")


def test_scores_are_near_the_declared_means():
    corpus = synthetic_corpus("train")
    domains = np.array(corpus.domains)
    for candidate in edge_site().candidates:
        declared = {d.name: d.score for d in candidate.quality.domains}
        for domain in DOMAINS:
            mean = corpus.scores[domains == domain, corpus.column(candidate.model)].mean()
            assert mean == pytest.approx(declared[domain], abs=0.25)


def test_keywords_tell_the_domain_mostly():
    corpus = synthetic_corpus("test")
    keywords = fold_keywords(edge_site().domains)
    told = [detect_domain(prompt, keywords) for prompt in corpus.prompts]
    right = np.mean([a == b for a, b in zip(told, corpus.domains, strict=True)])
    assert right > 0.6


def test_words_tell_more_than_the_domain():
    """Means per domain and verb, learned on one split, choose better on another."""
    train, test = synthetic_corpus("train"), synthetic_corpus("test")

    def chosen(keys_of):
        known = keys_of(train)
        means = {key: train.scores[[k == key for k in known]].mean(axis=0) for key in set(known)}
        usual = train.scores.mean(axis=0)
        best = [np.argmax(means.get(key, usual)) for key in keys_of(test)]
        return test.scores[np.arange(len(test)), best].mean()

    verbs = ("sort", "count", "merge", "divide", "copy", "draw", "measure", "carry", "hide")

    def topics(corpus):
        return [
            (domain, next((v for v in verbs if f"{v} " in prompt), ""))
            for domain, prompt in zip(corpus.domains, corpus.prompts, strict=True)
        ]

    assert chosen(topics) > chosen(lambda corpus: corpus.domains) > test.scores.mean() + 0.1
