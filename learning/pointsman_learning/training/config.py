"""All settings of a training run; a YAML file names those that differ from the defaults."""

from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pointsman_common.files import reason
from pointsman_learning.training.dataset import Credit
from pointsman_learning.training.domain import Domain
from pointsman_learning.training.rollouts import RolloutOptions
from pointsman_learning.training.validation import ValidationOptions


class ConfigError(ValueError):
    """A configuration cannot be used; the message says where and why."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NetworkOptions(_Strict):
    """Sizes and ablations of the network, see `HanConfig`."""

    width: int = 32
    heads: int = 4
    layers: int = 1
    hidden: int = 64
    use_han: bool = True
    use_impact: bool = True
    residual: bool = True


class WarmOptions(_Strict):
    """Regression on labels."""

    epochs: int = Field(6, ge=0)
    """0: no warm start (an ablation)."""
    batch: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-3, ge=0)
    huber: float = Field(1.0, gt=0)
    """Errors beyond this count linearly, in QoS."""
    estimator_weight: float = Field(0.3, ge=0)
    """Of the estimator's own losses beside that of the values."""
    sharpness: float = Field(25.0, gt=0)
    """The policy is trained towards softmax(sharpness x value)."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the labels, by scenario, on which errors are reported."""
    patience: int = Field(3, ge=1)
    """Epochs without a better validation before this stops."""


class SacOptions(_Strict):
    """Discrete soft actor-critic on top."""

    rounds: int = Field(0, ge=0)
    """Of collecting decisions and learning from them; 0: none."""
    worlds: int = Field(16, ge=1)
    """Scenarios played at once in a round."""
    requests: int = Field(200, ge=2)
    updates: int = Field(100, ge=1)
    """Gradient steps of a round."""
    batch: int = Field(128, ge=1)
    replay: int = Field(40_000, ge=1)
    """Decisions kept."""
    discount: float = Field(0.98, ge=0, lt=1)
    """Per decision."""
    learning_rate: float = Field(1e-4, gt=0)
    target_rate: float = Field(0.01, gt=0, le=1)
    """Step of the level's slow copy towards it at each update."""
    entropy: float = Field(0.1, ge=0, le=1)
    """Target entropy as a share of log(number of valid actions)."""
    temperature: float = Field(0.02, gt=0)
    """At the beginning."""
    label_weight: float = Field(1.0, ge=0)
    """Of the labels' regression, which goes on beside."""
    start_load: float = Field(0.7, gt=0)
    """Curriculum: loads are drawn up to this at first, up to the domain's most at the end."""
    patience: int = Field(6, ge=1)
    """Rounds without a better validation before this stops."""


class LabelOptions(_Strict):
    """How many labels, and how they are made."""

    shards: int = Field(120, ge=1)
    """Of `RolloutOptions.trunks` scenarios each."""
    second_round: int = Field(0, ge=0)
    """Shards made once more with the learned policy as the base; 0: none."""
    followed: int = Field(20, ge=0)
    """Decisions of a branch that the learned policy takes, before ImpactGreedy goes on."""
    rollouts: RolloutOptions = RolloutOptions()


class TrainConfig(_Strict):
    """A whole run. Loads as they are in `Domain`; all choices are ours."""

    seed: int = Field(0, ge=0)
    device: str = "cpu"
    domain: Domain = Domain()
    labels: LabelOptions = LabelOptions()
    credit: Credit = Credit()
    network: NetworkOptions = NetworkOptions()
    warm: WarmOptions = WarmOptions()
    sac: SacOptions = SacOptions()
    validation: ValidationOptions = ValidationOptions()

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read a YAML file.

        Raises:
            ConfigError: it cannot be read, is no YAML, or a setting is unknown or wrong.

        """
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: {reason(error)}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{file}: is no YAML: {' '.join(str(error).split())}") from error
        return cls.parse(content, source=str(file))

    @classmethod
    def parse(cls, content: object, *, source: str) -> Self:
        """Check plain data.

        Raises:
            ConfigError: a setting is unknown or wrong.

        """
        if not isinstance(content, dict):
            raise ConfigError(f"{source}: must be a mapping of settings")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{source}: {where}: {first['msg']}") from error
