"""Predictions for the candidates of a snapshot, learned where an artefact knows the expert."""

from typing import Final

import numpy as np

from pointsman_core.prediction import DeclaredPriors, Prediction, Predictor
from pointsman_core.predictors.artefact import Artefact
from pointsman_core.predictors.features import FEATURES, features
from pointsman_core.snapshot import Candidate, Snapshot

_NONE: Final = -1


class LearnedPredictor:
    """`Predictor` that asks an artefact, and the declared priors about experts it lacks.

    Candidates are matched to the artefact's columns by model name, see `model_key`.
    """

    def __init__(self, artefact: Artefact, snapshot: Snapshot) -> None:
        """Match candidates to columns.

        Raises:
            ValueError: the artefact needs sentence embeddings, which nobody makes here.

        """
        if artefact.info.embedding:
            raise ValueError(
                f"{artefact.source} needs sentence embeddings: they take milliseconds a prompt,"
                " so only predictors on n-grams can be served"
            )
        self._artefact = artefact
        self._declared = DeclaredPriors(snapshot)
        known = {model_key(name): column for column, name in enumerate(artefact.info.experts)}
        columns = np.array([_column(c, known) for c in snapshot.candidates], np.int64)
        self._learned = columns != _NONE
        self._columns = columns
        self._lengths = self._learned & np.array(artefact.info.lengths, np.bool_)[columns]
        self._usual_tokens = np.array(
            [c.expected_output_tokens for c in snapshot.candidates], np.float64
        )

    @property
    def knows_any(self) -> bool:
        """Whether any candidate's quality is learned."""
        return bool(self._learned.any())

    def predict(self, prompt: str) -> Prediction:
        """Predict for all candidates; ``learned`` says which of them the artefact knows."""
        said = self._artefact.run(features(prompt).reshape(1, FEATURES))
        quality = said.quality[0, self._columns]
        if not self._learned.all():
            quality = np.where(self._learned, quality, self._declared.predict(prompt).quality)
        tokens = self._usual_tokens
        if self._lengths.any():
            tokens = np.where(self._lengths, said.output_tokens[0, self._columns], tokens)
        return Prediction(quality=quality, output_tokens=tokens, learned=self._learned)


def make_predictor(artefact: Artefact | None, snapshot: Snapshot) -> Predictor:
    """Build the predictor of one snapshot: declared priors alone where nothing is learned."""
    if artefact is not None:
        learned = LearnedPredictor(artefact, snapshot)
        if learned.knows_any:
            return learned
    return DeclaredPriors(snapshot)


def model_key(name: str) -> str:
    """By what model names are compared: case and the publisher's prefix do not matter.

    Suffixes do: a quantised model scores differently and is another expert.
    """
    return name.rpartition("/")[2].casefold()


def _column(candidate: Candidate, known: dict[str, int]) -> int:
    for name in candidate.served_models:
        column = known.get(model_key(name))
        if column is not None:
            return column
    return _NONE
