"""Models of HanDrl: found by name in one folder, checked, and loaded once.

A policy whose new model cannot be loaded keeps deciding by the one it had; one that has none
is decided by its fallback. Both are told to the operator and counted.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pointsman_core.deciders import Decider
from pointsman_core.deciders.han_drl import (
    MAX_BYTES,
    HanDrl,
    HanModel,
    MissingModel,
    ModelError,
    shipped_model,
)
from pointsman_core.resources import Algorithm, ModelReference
from pointsman_core.snapshot import Snapshot

MAX_LOADED: Final = 16
"""Models that are kept; each takes a few MiB."""


@dataclass(frozen=True, slots=True)
class PolicyModel:
    """What a policy decides by."""

    model: HanModel | None
    """None: it has none, so the fallback decides."""
    error: str = ""
    """Why the model that it names is not in force; empty when it is."""

    def decider(self) -> Decider:
        """What the policy's router is to have."""
        return MissingModel(self.error) if self.model is None else HanDrl(self.model)


class ModelStore:
    """Models by checksum. Thread-safe: they are loaded beside the event loop."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._loaded: OrderedDict[str, HanModel] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self, snapshots: Iterable[Snapshot]) -> None:
        """Load what snapshots need, so that `of` finds it at once. What fails, fails there."""
        for snapshot in snapshots:
            if snapshot.algorithm is Algorithm.HAN_DRL:
                try:
                    self._load(snapshot.model)
                except ModelError:
                    continue

    def of(self, snapshot: Snapshot, before: PolicyModel | None) -> PolicyModel | None:
        """The model of a snapshot whose policy had ``before``; None where it needs none."""
        if snapshot.algorithm is not Algorithm.HAN_DRL:
            return None
        try:
            return PolicyModel(self._load(snapshot.model))
        except ModelError as error:
            return PolicyModel(before.model if before else None, str(error))

    def _load(self, reference: ModelReference | None) -> HanModel:
        if reference is None:
            return shipped_model()
        with self._lock:
            model = self._loaded.get(reference.sha256)
            if model is None:
                content = self._read(reference.file)
                model = HanModel(content, sha256=reference.sha256, source=reference.file)
                self._loaded[reference.sha256] = model
            self._loaded.move_to_end(reference.sha256)
            while len(self._loaded) > MAX_LOADED:
                self._loaded.popitem(last=False)
            return model

    def _read(self, name: str) -> bytes:
        if self._folder is None:
            raise ModelError(f"{name}: the policy server has no folder of models (--models)")
        try:
            with (self._folder / name).open("rb") as file:
                return file.read(MAX_BYTES + 1)
        except OSError as error:
            raise ModelError(f"{name} cannot be read: {error.strerror or error}") from None
