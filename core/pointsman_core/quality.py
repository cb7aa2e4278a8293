"""Expected quality of each expert's answer to a prompt.

Today it comes from the priors that experts declare per domain, the domain being told by
keywords that the policy declares. `QualityPredictor` is the seam where a learned
predictor takes over.
"""

from typing import Protocol

import numpy as np

from pointsman_core.resources import DomainRule
from pointsman_core.snapshot import Snapshot
from pointsman_core.state import FloatArray

PROMPT_CHARS_READ = 4096
"""Keywords are looked for in this many leading characters, so that cost is bounded."""


class QualityPredictor(Protocol):
    """Predicts, before a request is served, how good each candidate's answer would be."""

    def predict(self, prompt: str) -> FloatArray:
        """(E,) expected quality in [0, 1], in the order of the snapshot's candidates."""
        ...


class DeclaredPriors:
    """`QualityPredictor` from declared priors; knows nothing of the prompt but its domain."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._keywords = fold_keywords(snapshot.domains)
        self._default = _column(snapshot, None)
        self._by_domain = {rule.name: _column(snapshot, rule.name) for rule in snapshot.domains}

    def predict(self, prompt: str) -> FloatArray:
        """(E,) expected quality in [0, 1]."""
        domain = detect_domain(prompt, self._keywords)
        return self._default if domain is None else self._by_domain[domain]


Keywords = tuple[tuple[str, tuple[str, ...]], ...]
"""Name and case-folded keywords of each domain."""


def fold_keywords(rules: tuple[DomainRule, ...]) -> Keywords:
    """Prepare rules for `detect_domain`."""
    return tuple((rule.name, tuple(word.casefold() for word in rule.keywords)) for rule in rules)


def detect_domain(prompt: str, keywords: Keywords) -> str | None:
    """Name of the domain most of whose keywords the prompt contains.

    Case is ignored; the first of equals wins; None when no keyword occurs.
    """
    text = prompt[:PROMPT_CHARS_READ].casefold()
    best, most = None, 0
    for name, words in keywords:
        hits = sum([word in text for word in words])
        if hits > most:
            best, most = name, hits
    return best


def _column(snapshot: Snapshot, domain: str | None) -> FloatArray:
    scores = [
        next((d.score for d in c.quality.domains if d.name == domain), c.quality.default)
        for c in snapshot.candidates
    ]
    return np.array(scores, np.float64)
