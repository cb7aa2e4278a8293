"""``pointsman train``: options and messages; the run itself is tested with the trainer."""

import json
import sys
from types import ModuleType

import pytest
import yaml
from typer.testing import CliRunner

from pointsman_cli.main import app
from pointsman_cli.train import _begun_by

TINY = {
    "domain": {
        "processes": {"poisson": 1.0},
        "most_endpoints": 3,
        "predictors": {"declared": 1.0},
    },
    "labels": {
        "shards": 1,
        "second_round": 0,
        "rollouts": {"horizon": 5, "requests": 30, "trunks": 3, "states_per_scenario": 4},
    },
    "network": {"width": 8, "heads": 2, "layers": 1, "hidden": 8},
    "warm": {"epochs": 1, "held_out": 0.4},
    "validation": {
        "workloads": ["poisson"],
        "loads": [0.9],
        "limits": ["x1"],
        "seeds": 1,
        "requests": 20,
    },
}


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.setattr("pointsman_learning.workloads.DataFolder.find", lambda: None)


def invoke(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_it_trains_and_says_what_it_does(tmp_path):
    config, output = tmp_path / "tiny.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(TINY))
    result = invoke("--config", config, "--output", output, "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert "about 12 states" in result.stderr
    assert "warm start 1/1: validation" in result.stderr
    assert "poisson 0.9 x1" in result.stdout
    assert json.loads((output / "training_report.json").read_text())["model"] == "han_drl.onnx"
    again = invoke("--config", config, "--output", output, "--jobs", 1)
    assert again.exit_code == 1
    assert "holds a run; resume it, or use another folder" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "there is no checkpoint to go on from"),
    ],
)
def test_wrong_options_are_named(tmp_path, arguments, message):
    result = invoke(*arguments, "--output", tmp_path / "out", "--jobs", 1)
    assert result.exit_code == 1, result.output
    assert message in result.stderr


def test_cuda_needs_a_device(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = invoke("--device", "cuda", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "there is no CUDA device here" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "--output", "han"], "pointsman train --output han"),
        (["train", "--resume", "--output", "/home/me/runs/han"], "pointsman train --output han"),
        (["train", "--arrivals=../my site/a.csv"], "pointsman train --arrivals=a.csv"),
    ],
)
def test_the_command_in_a_model_tells_no_folder(arguments, told):
    assert _begun_by(arguments) == told


def test_ray_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = invoke("--ray", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "pip install 'pointsman[ray]'" in result.stderr


def test_ray_that_does_not_start_is_told(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("The current node timed out\nduring startup.")

    broken = ModuleType("ray")
    broken.init = init
    monkeypatch.setitem(sys.modules, "ray", broken)
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    result = invoke("--ray", "--config", config, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "error: Ray does not start: The current node timed out during startup." in result.stderr
