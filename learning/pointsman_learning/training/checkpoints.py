"""Networks and whole states of training on disk."""

from pathlib import Path
from typing import Any

import torch

from pointsman_learning.han import HanConfig, HanNetwork
from pointsman_learning.predictors.cache import write_whole

CHECKPOINT_FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why."""


def save(file: Path, state: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    content = {"format": CHECKPOINT_FORMAT} | state
    write_whole(file, lambda stream: torch.save(content, stream))


def load(file: Path) -> dict[str, Any]:
    """Read what `save` wrote: plain data and tensors only, no code.

    Raises:
        CheckpointError: there is none, or it is damaged or of another format.

    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: there is no checkpoint to go on from") from error
    except Exception as error:
        raise CheckpointError(f"{file}: is no checkpoint, or a damaged one") from error
    if not isinstance(found, dict) or found.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{file}: was written by another release")
    return found


def save_network(file: Path, network: HanNetwork) -> None:
    """Weights and configuration."""
    save(file, {"config": network.config.to_dict(), "weights": network.state_dict()})


def load_network(file: Path) -> HanNetwork:
    """The network, ready to answer; raises `CheckpointError`."""
    found = load(file)
    network = HanNetwork(HanConfig.from_dict(found["config"]))
    network.load_state_dict(found["weights"])
    return network.eval()
