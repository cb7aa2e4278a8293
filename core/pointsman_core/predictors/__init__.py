"""Learned predictors of quality: what they see of a prompt, and how they are served."""

from pointsman_core.predictors.artefact import (
    Answers,
    Artefact,
    ArtefactError,
    ArtefactInfo,
    builtin_artefact,
)
from pointsman_core.predictors.features import FEATURES, SCHEMA, feature_matrix, features
from pointsman_core.predictors.learned import LearnedPredictor, make_predictor, model_key

__all__ = [
    "FEATURES",
    "SCHEMA",
    "Answers",
    "Artefact",
    "ArtefactError",
    "ArtefactInfo",
    "LearnedPredictor",
    "builtin_artefact",
    "feature_matrix",
    "features",
    "make_predictor",
    "model_key",
]
