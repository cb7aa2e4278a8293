"""Which model HanDrl decides by in the demo."""

import os
from pathlib import Path

from pointsman_cli.demo.results import ModelReport
from pointsman_cli.demo.site import clone_policy
from pointsman_core.resources import Algorithm, RoutingPolicy
from pointsman_core.snapshot import Snapshot, compile_snapshot
from pointsman_policy.models import ModelStore, PolicyModel

MODELS_VARIABLE = "POINTSMAN_MODELS"
"""The demo's policy server reads it too: the folder of the models that policies name."""


def model_of(snapshot: Snapshot) -> PolicyModel | None:
    """What the demo's policy server has for a snapshot; None where it needs no model."""
    folder = os.environ.get(MODELS_VARIABLE)
    return ModelStore(Path(folder) if folder else None).of(snapshot, None)


def served_model(policy: RoutingPolicy) -> ModelReport:
    """Tell the model of a policy's HanDrl, or why it has none."""
    clone = clone_policy(policy, Algorithm.HAN_DRL)
    found = model_of(compile_snapshot(clone, (), {})) or PolicyModel(None)
    if found.model is None:
        return ModelReport(error=found.error)
    model = found.model
    return ModelReport(source=model.source, sha256=model.sha256, trained=model.info.trained)
