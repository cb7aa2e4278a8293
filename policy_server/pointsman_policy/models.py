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
"""Models that are kept, besides those in use; each takes a few MiB."""


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
    """Models by checksum. Thread-safe: they are loaded beside the event loop.

    What was prepared is never read again on it, whether that worked or not.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._loaded: OrderedDict[str, HanModel] = OrderedDict()
        self._failed: dict[ModelReference | None, str] = {}
        self._needed: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    def prepare(self, snapshots: Iterable[Snapshot]) -> None:
        """Load what snapshots need, so that `of` finds it at once, or why it cannot be had.

        What failed before is tried again.
        """
        wanted = {s.model for s in snapshots if s.algorithm is Algorithm.HAN_DRL}
        self._needed = frozenset(reference.sha256 for reference in wanted if reference)
        for reference in wanted:
            try:
                self._load(reference)
            except ModelError as error:
                self._failed[reference] = str(error)
            else:
                self._failed.pop(reference, None)

    def of(self, snapshot: Snapshot, before: PolicyModel | None) -> PolicyModel | None:
        """The model of a snapshot whose policy had ``before``; None where it needs none."""
        if snapshot.algorithm is not Algorithm.HAN_DRL:
            return None
        kept = before.model if before else None
        if failure := self._failed.get(snapshot.model):
            return PolicyModel(kept, failure)
        try:
            return PolicyModel(self._load(snapshot.model))
        except ModelError as error:
            return PolicyModel(kept, str(error))

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
            spare = [sha256 for sha256 in self._loaded if sha256 not in self._needed]
            for sha256 in spare[: max(0, len(self._loaded) - MAX_LOADED)]:
                del self._loaded[sha256]
            return model

    def _read(self, name: str) -> bytes:
        if self._folder is None:
            raise ModelError(f"{name}: the policy server has no folder of models (--models)")
        try:
            with (self._folder / name).open("rb") as file:
                return file.read(MAX_BYTES + 1)
        except OSError as error:
            raise ModelError(f"{name} cannot be read: {error.strerror or error}") from None
