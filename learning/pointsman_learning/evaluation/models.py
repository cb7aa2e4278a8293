"""Trained models as contenders, beside the one that is shipped."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

from pointsman_core.deciders.han_drl import HanDrl, HanModel, ModelError
from pointsman_core.resources import Algorithm
from pointsman_learning.evaluation.registry import Contender
from pointsman_learning.simulator import simulate
from pointsman_learning.simulator.scenario import Outcome, Scenario

PREFIX: Final = f"{Algorithm.HAN_DRL.value}:"
"""How the names of such contenders start."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model that can be served, as it was read; goes to worker processes as it is."""

    name: str
    file: str
    """Name of its file, without the folder."""
    content: bytes = field(repr=False)
    sha256: str

    @classmethod
    def load(cls, text: str) -> "TrainedModel":
        """Read ``NAME=FILE``, or ``FILE``, which is named by its stem, and try the model out.

        Raises:
            ModelError: the name cannot be one, or the file is no model of this release's.
            OSError: the file cannot be read.

        """
        name, file = _parse(text)
        content = file.read_bytes()
        model = cls(name, file.name, content, hashlib.sha256(content).hexdigest())
        _decider(model)
        return model

    @property
    def decider(self) -> str:
        """Name of the contender."""
        return PREFIX + self.name

    def contender(self) -> Contender:
        """A contender that is never a baseline, and can be sent to other processes."""
        return Contender(self.decider, partial(_play, self), baseline=False)

    def setting(self) -> Mapping[str, Any]:
        """For the files: which model it was."""
        return {"file": self.file, "sha256": self.sha256, "bytes": len(self.content)}


def load_models(texts: Iterable[str]) -> tuple[TrainedModel, ...]:
    """Read all; raises as `TrainedModel.load`, and ModelError for two of one name."""
    models: dict[str, TrainedModel] = {}
    for text in texts:
        model = TrainedModel.load(text)
        # Deciders are named in any case.
        if models.setdefault(model.name.casefold(), model) is not model:
            raise ModelError(f"{model.name} is the name of two models: write NAME=FILE")
    return tuple(models.values())


def _parse(text: str) -> tuple[str, Path]:
    name, told, file = text.partition("=")
    if not (told and _NAME.fullmatch(name)):
        name, file = Path(text).stem, text
    if not _NAME.fullmatch(name):
        raise ModelError(f"{text}: a name has letters, digits, '.', '_' and '-': write NAME=FILE")
    if not file:
        raise ModelError(f"{text} names no file")
    return name, Path(file)


def _play(model: TrainedModel, scenario: Scenario, seed: int) -> Outcome:
    snapshot = scenario.snapshot.model_copy(update={"algorithm": Algorithm.HAN_DRL})
    return simulate(replace(scenario, snapshot=snapshot), _decider(model), seed=seed)


@lru_cache(maxsize=16)
def _decider(model: TrainedModel) -> HanDrl:
    return HanDrl(HanModel(model.content, source=model.file))
