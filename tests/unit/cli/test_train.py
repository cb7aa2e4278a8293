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


SITE = """
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {name: chat}
spec: {model: chat, backend: {addresses: ["127.0.0.1:18001", "127.0.0.1:18002"]}}
---
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {name: coder}
spec: {model: coder, backend: {addresses: ["127.0.0.1:18003"]}}
---
apiVersion: pointsman.dev/v1alpha1
kind: RoutingPolicy
metadata: {name: auto}
spec: {models: [auto]}
"""


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
    assert "1/2 labels: about 12 states with 102 labels by 1 process: " in result.stderr
    assert "2/2 warm start: up to 1 epoch of regression on them\n" in result.stderr
    assert "  1/2 labels, shard 1/1: " in result.stderr
    assert "  2/2 warm start, epoch 1/1: validation" in result.stderr
    assert "poisson 0.9 x1" in result.stdout
    assert json.loads((output / "training_report.json").read_text())["model"] == "han_drl.onnx"
    again = invoke("--config", config, "--output", output, "--jobs", 1)
    assert again.exit_code == 1
    assert "holds a run; resume it, or use another folder" in again.stderr


def test_stages_are_numbered_alike_in_plan_and_progress(tmp_path):
    config, output = tmp_path / "tiny.yaml", tmp_path / "out"
    labels = TINY["labels"] | {"second_round": 1, "followed": 2}
    sac = {"rounds": 1, "worlds": 2, "requests": 12, "updates": 1, "batch": 4}
    config.write_text(yaml.safe_dump(TINY | {"labels": labels, "sac": sac}))
    result = invoke("--config", config, "--output", output, "--jobs", 1)
    assert result.exit_code == 0, result.output
    plan = [line for line in result.stderr.splitlines() if line[:2] in {"1/", "2/", "3/", "4/"}]
    assert [line.partition(":")[0] for line in plan] == [
        *("1/4 labels", "2/4 warm start", "3/4 second round", "4/4 soft actor-critic")
    ]
    assert "3/4 second round: 1 shard more" in plan[2]
    seen = [line.partition("min  ")[2].partition(":")[0] for line in result.stderr.splitlines()]
    assert [title for title in seen if title] == [
        "1/4 labels, shard 1/1",
        "2/4 warm start, epoch 1/1",
        "3/4 second round, labels, shard 1/1",
        "3/4 second round, epoch 1/1",
        "4/4 soft actor-critic, round 1/1",
    ]
    again = invoke("--config", config, "--output", output, "--jobs", 1, "--resume")
    assert "1/4 labels: all 1 shard there" in again.stderr


def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path):
    config, output = tmp_path / "tiny.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(TINY))
    assert invoke("--config", config, "--output", output, "--jobs", 1).exit_code == 0
    warm = TINY["warm"] | {"epochs": 2}
    config.write_text(yaml.safe_dump(TINY | {"warm": warm, "seed": 3}))
    result = invoke("--config", config, "--output", output, "--resume")
    assert result.exit_code == 1
    assert "had other settings: seed: 0 → 3; warm.epochs: 1 → 2" in result.stderr
    assert "labels: " not in result.stderr


def test_input_is_looked_at_before_the_plan_is_shown(tmp_path):
    scores, trace = tmp_path / "scores.csv", tmp_path / "trace.csv"
    scores.write_text("prompt,expert,score,output_tokens\nHello,chat,1.5,10\n")
    trace.write_text("arrival_seconds,input_tokens,output_tokens\n0,10,10\n1,10,10\n")
    for options, message in (
        (("--quality-data", scores), "scores.csv, row 2, column score: must be a number"),
        (("--arrivals", trace), "trace.csv: has too few arrivals for a validation part"),
    ):
        result = invoke(*options, "--output", tmp_path / "out")
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_it_trains_on_ones_own_data(tmp_path):
    """Each split takes a part of it: by time of the arrivals, and by a hash of the prompts."""
    site, scores, trace = (tmp_path / n for n in ("site.yaml", "scores.csv", "trace.csv"))
    site.write_text(SITE)
    words = [f"Question {chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(80)]
    rows = [f"{word},{expert},0.5,20" for word in words for expert in ("chat", "coder")]
    scores.write_text("\n".join(["prompt,expert,score,output_tokens", *rows]))
    times = [f"{0.5 * n},100,20" for n in range(200)]
    trace.write_text("\n".join(["arrival_seconds,input_tokens,output_tokens", *times]))
    config = tmp_path / "tiny.yaml"
    domain = TINY["domain"] | {"processes": {"azure-conv": 1.0}}
    config.write_text(yaml.safe_dump(TINY | {"domain": domain}))
    own = ("--experts", site, "--quality-data", scores, "--arrivals", trace)
    result = invoke("--config", config, *own, "--output", tmp_path / "out", "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert "trace 0.9 x1" in result.stdout


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
