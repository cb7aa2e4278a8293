"""What is expected of each expert's answer to a prompt, before anyone has served it.

Without a learned predictor it comes from what experts declare: priors per domain, the domain
being told by keywords that the policy declares, and one mean length. `Predictor` is the seam
where a learned one takes over.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pointsman_core.resources import DomainRule
from pointsman_core.snapshot import Snapshot
from pointsman_core.state import BoolArray, FloatArray

PROMPT_CHARS_READ = 4096
"""Keywords are looked for in this many leading characters, so that cost is bounded."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What each candidate's answer to one prompt would be like, in the snapshot's order."""

    quality: FloatArray
    """(E,) expected quality in [0, 1]."""
    output_tokens: FloatArray
    """(E,) expected length of the answer, at least 1."""
    learned: BoolArray
    """(E,) whether the quality was learned from data; else it is the declared prior."""


class Predictor(Protocol):
    """Predicts, before a request is served, what each candidate's answer would be like."""

    def predict(self, prompt: str) -> Prediction:
        """Predict for all E candidates of the snapshot that it was made for."""
        ...


class DeclaredPriors:
    """`Predictor` from declared priors; knows nothing of the prompt but its domain."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._keywords = fold_keywords(snapshot.domains)
        self._default = _prediction(snapshot, None)
        self._by_domain = {rule.name: _prediction(snapshot, rule.name) for rule in snapshot.domains}

    def predict(self, prompt: str) -> Prediction:
        """Look up what was declared for the prompt's domain."""
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


def _prediction(snapshot: Snapshot, domain: str | None) -> Prediction:
    scores = [
        next((d.score for d in c.quality.domains if d.name == domain), c.quality.default)
        for c in snapshot.candidates
    ]
    return Prediction(
        quality=np.array(scores, np.float64),
        output_tokens=np.array([c.expected_output_tokens for c in snapshot.candidates], np.float64),
        learned=np.zeros(len(scores), np.bool_),
    )
