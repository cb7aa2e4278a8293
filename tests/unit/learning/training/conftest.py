"""Small, synthetic training runs: seconds, no data folder."""

import pytest

from pointsman_learning.training.config import TrainConfig

SMALL = {
    "domain": {
        "processes": {"poisson": 1.0},
        "most_endpoints": 3,
        "outage_share": 0.0,
        "predictors": {"declared": 1.0},
    },
    "labels": {
        "shards": 2,
        "second_round": 0,
        "rollouts": {"horizon": 8, "requests": 40, "trunks": 3, "states_per_scenario": 5},
    },
    "network": {"width": 8, "heads": 2, "layers": 1, "hidden": 8},
    "warm": {"epochs": 2, "batch": 8, "held_out": 0.4},
    "sac": {"rounds": 2, "worlds": 2, "requests": 12, "updates": 3, "batch": 8},
    "validation": {
        "workloads": ["poisson"],
        "loads": [0.9],
        "limits": ["x1"],
        "seeds": 2,
        "requests": 30,
    },
}


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    """Synthetic prompts and sizes everywhere, also where the public data is at hand."""
    monkeypatch.setattr("pointsman_learning.workloads.DataFolder.find", lambda: None)


@pytest.fixture
def config() -> TrainConfig:
    return TrainConfig.parse(SMALL, source="test")
