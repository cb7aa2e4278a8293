"""Whole runs: they learn, export, and go on exactly where they were broken off."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from pointsman_core.deciders.han_drl import HanDrl, HanModel
from pointsman_learning.evaluation.statistics import Interval
from pointsman_learning.han import HanConfig, HanNetwork
from pointsman_learning.training import checkpoints
from pointsman_learning.training.config import ConfigError, TrainConfig
from pointsman_learning.training.lockstep import Lockstep, by_decider
from pointsman_learning.training.policy import by_network
from pointsman_learning.training.trainer import Trainer, _public
from pointsman_learning.training.validation import Validation

TWO_ROUNDS = {"labels": {"second_round": 1, "followed": 2}}


class BrokenOffError(Exception):
    """Stands for a crash."""


def run(config, folder, *, events=None, stop_at=None, resume=False):
    count = 0

    def report(event):
        nonlocal count
        if event.stage != "labels":
            count += 1
            if stop_at is not None and count > stop_at:
                raise BrokenOffError
        if events is not None:
            events.append(event)

    return Trainer(config, folder, report=report).run(resume=resume)


@pytest.fixture
def two_rounds(config) -> TrainConfig:
    labels = config.labels.model_copy(update=TWO_ROUNDS["labels"])
    return config.model_copy(update={"labels": labels})


def test_a_run_makes_a_model_a_card_and_curves(config, tmp_path):
    events = []
    result = run(config, tmp_path, events=events)
    assert result.finished
    card = json.loads(result.report.read_text())
    assert card["provenance"]["labels"] > 50
    assert card["provenance"]["finished"] is True
    kept_one = card["provenance"]["kept"] != "the untrained network"
    assert card["provenance"]["trained"] is kept_one
    assert HanModel(result.model.read_bytes()).info.trained is kept_one
    assert card["metrics"]["validation"][0]["windows"] == "poisson 0.9 x1"
    assert 0 <= card["metrics"]["estimator"]["chance_brier"] <= 1
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["warm start"] * 2 + ["soft actor-critic"] * 2
    assert {event.stage for event in events} == {"labels", "warm start", "soft actor-critic"}


def test_the_exported_model_decides_as_the_network_does(config, tmp_path):
    result = run(config, tmp_path)
    weights = checkpoints.load(tmp_path / "checkpoint.pt")["best"]["weights"]
    network = HanNetwork(HanConfig(**config.network.model_dump()))
    network.load_state_dict(weights)
    served = by_decider(HanDrl(HanModel(result.model.read_bytes())))
    worlds = Lockstep.of([config.domain.draw(1, requests=40).scenario])
    for _ in range(40):
        worlds.advance_to_arrivals()
        seen = worlds.observe()
        chosen = by_network(network)(worlds, seen)
        one = worlds.one(seen, 0)
        assert served(worlds, one).tolist() == chosen.tolist()
        worlds.apply(chosen)


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_resumed_run_ends_with_the_same_weights(two_rounds, tmp_path, stop_at):
    run(two_rounds, tmp_path / "whole")
    with pytest.raises(BrokenOffError):
        run(two_rounds, tmp_path / "broken", stop_at=stop_at)
    run(two_rounds, tmp_path / "broken", resume=True)
    whole, broken = (
        checkpoints.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "broken")
    )
    assert broken["stage"] == whole["stage"] == "done"
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, broken["weights"][name]), name
    assert (tmp_path / "whole" / "warm.pt").exists()


def test_a_run_is_not_overwritten(config, tmp_path):
    run(config, tmp_path)
    with pytest.raises(ConfigError, match="holds a run; resume it, or use another folder"):
        run(config, tmp_path)
    other = config.model_copy(update={"seed": 1})
    with pytest.raises(ConfigError, match=r"had other settings: seed: 0 → 1$"):
        run(other, tmp_path, resume=True)


def test_there_must_be_something_to_resume(config, tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match="there is no checkpoint to go on from"):
        run(config, tmp_path, resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"nonsense")
    with pytest.raises(checkpoints.CheckpointError, match="is no checkpoint, or a damaged one"):
        run(config, tmp_path, resume=True)


def test_a_run_broken_off_among_its_first_labels_goes_on(config, tmp_path):
    def stop(event):
        if event.stage == "labels" and event.done == 1:
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        Trainer(config, tmp_path, report=stop).run()
    kept = sorted(file.name for file in (tmp_path / "labels-1").glob("*.npz"))
    assert len(kept) == 1
    other = config.model_copy(update={"seed": 1})
    with pytest.raises(ConfigError, match="seed: 0 → 1"):
        run(other, tmp_path, resume=True)
    events = []
    assert run(config, tmp_path, resume=True, events=events).finished
    assert [event.total for event in events if event.stage == "labels"] == [1]


def test_damaged_settings_are_told(config, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: is damaged"):
        run(config, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": {"workloads": ("azure-conv",)}}, "validation.workloads: the data of none"),
        ({"domain": {"processes": {"azure-conv": 1.0}}}, "domain.processes: the data of none"),
    ],
)
def test_workloads_whose_data_is_not_at_hand(config, tmp_path, changes, message):
    content = config.model_dump()
    for section, values in changes.items():
        content[section] |= values
    trainer = Trainer(TrainConfig.parse(content, source="test"), tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        trainer.prepare()
    assert not (tmp_path / "out").exists()


def test_time_may_run_out(config, tmp_path):
    trainer = Trainer(config, tmp_path, minutes=1e-9)
    result = trainer.run()
    assert not result.finished
    assert result.model.exists()


@pytest.mark.parametrize(
    ("changes", "rounds"),
    [
        ({"network": {"use_han": False}}, 0),
        ({"network": {"use_impact": False, "residual": False}}, 0),
        ({"credit": {"own_only": True}}, 1),
        ({"warm": {"epochs": 0}}, 1),
    ],
    ids=["without HAN", "without impact estimator", "plain reward", "without warm start"],
)
def test_ablations_run(config, tmp_path, changes, rounds):
    content = config.model_dump()
    for section, values in changes.items():
        content[section] |= values
    content["sac"]["rounds"] = rounds
    assert run(TrainConfig.parse(content, source="test"), tmp_path).finished


def test_learning_beats_noise(config, tmp_path):
    """The best weights are those of the best validation, and never worse than ImpactGreedy."""
    run(config, tmp_path)
    with (tmp_path / "curves.csv").open() as file:
        seen = [float(r["validation_predicted_gain_percent"]) for r in csv.DictReader(file)]
    assert checkpoints.load(tmp_path / "checkpoint.pt")["best"]["score"] == max(0.0, *seen)


def test_what_is_worse_than_impact_greedy_is_not_kept(config, tmp_path, monkeypatch):
    """Untrained the network is ImpactGreedy, and better than all that follows."""
    compared = Validation.rows

    def worse(*arguments):
        lost = Interval(-1.0, -2.0, -0.5)
        return [replace(row, predicted_gain=lost) for row in compared(*arguments)]

    monkeypatch.setattr(Validation, "rows", worse)
    told = json.loads(run(config, tmp_path).report.read_text())["provenance"]
    assert told["trained"] is False
    assert told["kept"] == "the untrained network"


def test_names_of_files_are_told_without_their_folders():
    config = TrainConfig.parse({"domain": {"arrivals": "/home/me/trace.csv"}}, source="test")
    assert _public(config)["domain"]["arrivals"] == "trace.csv"
    assert "/home" not in json.dumps(_public(config))


def test_each_stage_has_a_patience_of_its_own(two_rounds, tmp_path, monkeypatch):
    """A stage that begins below the best of the one before is given its time all the same."""
    content = two_rounds.model_dump()
    content["warm"] |= {"epochs": 4, "patience": 2}
    content["sac"]["rounds"] = 0
    scores = iter([3.0, 2.0, 1.0, *(0.5, 1.0, 0.7, 1.5)])
    judged = []

    def judge(trainer, *_, **__):
        judged.append(trainer.stage)
        return next(scores)

    monkeypatch.setattr(Trainer, "_judge", judge)
    assert run(TrainConfig.parse(content, source="test"), tmp_path).finished
    assert judged == ["warm start"] * 3 + ["second round"] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("warm: {epoch: 3}", "warm.epoch: Extra inputs are not permitted"),
        ("domain: {load: [1, 2]}", "domain.load: Unexpected keyword argument"),
        ("seed: -1", "seed: Input should be greater than or equal to 0"),
        ("- 1", "must be a mapping of settings"),
        ("a: [", "is no YAML"),
        ("network: {width: 30, heads: 4}", "width a multiple of heads"),
    ],
)
def test_wrong_settings_are_named(tmp_path, text, message):
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        Trainer(TrainConfig.load(file), tmp_path / "out")
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: there is no such file"):
        TrainConfig.load(tmp_path / "none.yaml")
