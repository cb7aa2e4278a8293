"""Cards of a small model, from evaluations that are made up or tiny."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pointsman_cli.main import app
from pointsman_core.deciders.han_drl import HanModel
from pointsman_core.resources import Admission
from pointsman_learning.evaluation import Plan, Run, as_document, collect, summarise
from pointsman_learning.evaluation.card import CardError, Evaluation, model_card
from pointsman_learning.han import HanConfig, HanNetwork
from pointsman_learning.han.export import export
from pointsman_learning.training.config import TrainConfig

BASELINES = ["Random", "RoundRobin", "ImpactGreedy"]
ROW = {
    "impact_greedy_qos": 0.41,
    "qos": 0.42,
    "gain_percent": [2.5, 0.75, 4.25],
    "predicted_gain_percent": [2.0, None, None],
    "rejected": [0.1, 0.2],
}
PROVENANCE = {
    "config": json.loads(TrainConfig().model_dump_json()),
    "schema": "0",
    "command": "pointsman train --minutes 9 | tee log",
    "minutes": 8.5,
    "labels": 123_456,
    "states": 7_890,
    "data": "composed: made up",
    "kept": "warm start 5",
    "finished": True,
    "cores": 2,
}
METRICS = {
    "validation": [
        {"windows": "poisson 0.9 x1", "count": 3, **ROW},
        {"windows": "all", "count": 3, **ROW},
    ],
    "estimator": {"chance_auc": 0.9876, "analytic_chance_auc": 0.9123, "pairs": 4_321},
}


def model(**told: Any) -> bytes:
    options = {"use_han": True} | told.pop("network", {})
    network = HanNetwork(HanConfig(width=8, heads=2, layers=1, hidden=8, **options))
    return export(network, **({"provenance": PROVENANCE, "metrics": METRICS} | told))


def loaded(content: bytes) -> HanModel:
    return HanModel(content)


@pytest.fixture(scope="module")
def content() -> bytes:
    return model()


Fake = Callable[[Plan], list[Run]]
Write = Callable[..., Path]


@pytest.fixture
def write(fakes: Fake, plan: Plan, tmp_path: Path, content: bytes) -> Write:
    """Writes an evaluation.json in which the made-up ``ImpactGreedy`` is called HanDrl:mine."""

    def evaluation(
        name: str = "evaluation.json",
        *,
        change: Callable[[dict[str, Any]], None] = lambda _: None,
        seeds: int = 6,
        mine: str = "ImpactGreedy",
        reference: str = "best",
        **setting: Any,
    ) -> Path:
        small = Plan(
            workloads=plan.workloads,
            loads=plan.loads,
            limits=["x1"],
            admissions=[Admission.REJECT],
            deciders=plan.deciders,
            seeds=range(seeds),
        )
        told = {
            "site": "examples/edge-site",
            "requests": 100,
            "endpoints": 6,
            "predictor": "builtin",
            "prompts": 500,
            "quality_data": "made-up scores",
            "outages": False,
            "models": {mine: {"file": "m.onnx", "sha256": loaded(content).sha256}},
        }
        results = collect(fakes(small), small, setting=told | setting)
        baselines = [each for each in BASELINES if each != mine]
        summary = summarise(
            results.runs, reference=reference, baselines=baselines, prompts=results.prompts
        )
        document = as_document(results, summary)
        change(document)
        path = tmp_path / name
        path.write_text(json.dumps(document))
        return path

    return evaluation


def card_of(content: bytes, *files: Path) -> str:
    own = loaded(content)
    found = [Evaluation.load(file, sha256=own.sha256) for file in files]
    return model_card(own, file="han_drl.onnx", size=len(content), evaluations=found)


def test_it_says_what_the_model_is_and_how_it_was_trained(content: bytes, write: Write) -> None:
    card = card_of(content, write())
    assert card.startswith("# Model card: `han_drl.onnx`\n")
    assert f"| file | `han_drl.onnx`, {len(content):,} bytes |" in card
    assert f"| SHA-256 | `{loaded(content).sha256}` |" in card
    assert "use_han yes" in card
    assert "| command | `pointsman train --minutes 9 \\| tee log` |" in card
    for line in (
        "| minutes | 8.5 |",
        "| labels | 123,456 |",
        "| states that have labels | 7,890 |",
        "| data, for example | composed: made up |",
        "| weights kept of | warm start 5 |",
        "| ran to its end | yes |",
        "| cores | 2 |",
        "| all | 3 | 0.410 | 0.420 | +2.50 % [+0.75, +4.25] | +2.00 % |",
        "on 4,321 held-out choices:",
        "| chance auc | 0.988 | 0.912 |",
    ):
        assert line in card
    folded = card.partition("<summary>By kind of window</summary>")[2]
    assert "| poisson 0.9 x1 | 3 |" in folded
    settings = card.partition("<summary>All settings</summary>")[2]
    assert "least_endpoints: 2" in settings
    assert card == card_of(content, write())


def test_what_it_is_for(content: bytes, write: Write) -> None:
    card = card_of(content, write())
    assert "random pools of 2 to 16 endpoints" in card
    assert "loads 0.2 to 1.5 of a pool's capacity" in card
    assert "workloads poisson, azure-code; limits x1; loads 0.5, 0.9." in card
    assert "Not evaluated on pools other than those named above." in card
    assert "Not evaluated with an endpoint lost or added" in card
    seen = write(site="random:24", outages=True, pool={"kind": "random"})
    wider = card_of(content, write("site.json"), seen)
    assert "Not evaluated" not in wider
    assert "### `examples/edge-site`\n`site.json`: 6 windows of 100 requests in each of 4" in wider
    assert "### `random:24`, an endpoint lost and one added in each window\n" in wider


def test_one_window_and_one_endpoint_are_no_plurals(content: bytes, write: Write) -> None:
    def one(document: dict[str, Any]) -> None:
        document["setting"]["endpoints"] = 1
        for row in document["summary"]:
            row["windows"], row["overlapping_windows"] = 1, int(row["workload"] == "azure-code")

    card = card_of(content, write(change=one))
    assert "`, 1 endpoint; workloads" in card
    assert ": 1 window of 100 requests in each of 4 cells;" in card
    assert "1 window of azure-code overlaps others: its intervals are too narrow." in card


def test_results_against_every_decider(content: bytes, write: Write) -> None:
    card = card_of(content, write())
    lines = card.splitlines()
    ranked = [line for line in lines if line.startswith(("| Random ", "| RoundRobin ", "| bound:"))]
    assert [line.split(" | ")[0] for line in ranked] == [
        *("| RoundRobin", "| Random", "| bound:lookahead-true-quality")
    ]
    # Made up: 0.5 against 0.3 and 0.2, whatever the cell.
    assert "+0.20" in ranked[0] or "+0.19" in ranked[0]
    assert "▲" in ranked[0]
    assert "▼" in ranked[2]
    assert "`bound:` see what no router can" in card
    (own,) = [line for line in lines if line.startswith("| **ImpactGreedy**")]
    assert own.split(" | ")[2:5] == ["the model", "30.0 %", "10.0 %"]


def test_every_cell_against_its_reference(content: bytes, write: Write) -> None:
    card = card_of(content, write())
    cells = [line for line in card.splitlines() if "| Reject |" in line]
    assert len(cells) == 4
    first = cells[0].strip("| ").split(" | ")
    assert first[:4] == ["poisson", "0.5", "x1", "Reject"]
    assert first[5].startswith("RoundRobin 0.")
    assert first[6].startswith("+0.")
    assert "[" in first[6]
    assert first[7:] == ["30.0 % / 30.0 %", "10.0 % / 10.0 %", "? / ?"]


def test_where_it_is_worse(content: bytes, write: Write) -> None:
    better = card_of(content, write()).partition("## Where it is worse")[2]
    assert "clearly better in 4 of 4 cells, clearly worse in 0, not told apart in 0" in better
    assert "Deciders with a higher mean QoS over all cells: none." in better
    assert "More late answers than the reference: in none of 4 cells." in better
    worse = card_of(content, write(mine="Random", reference="ImpactGreedy"))
    worse = worse.partition("## Where it is worse")[2]
    assert "clearly better in 0 of 4 cells, clearly worse in 4" in worse
    assert "  - azure-code, load 0.9, x1, Reject: -0." in worse
    assert "Deciders with a higher mean QoS over all cells: ImpactGreedy (-0." in worse

    def late(document: dict[str, Any]) -> None:
        for row in document["summary"]:
            if row["decider"] == "ImpactGreedy" and row["load"] == 0.9:
                row["violation_rate"] = 0.45

    later = card_of(content, write(change=late))
    told = "in 2 of 4 cells, most in poisson, load 0.9, x1, Reject: 45.0 % to 30.0 %."
    assert f"More late answers than the reference: {told}" in later


def test_few_windows_conclude_nothing(content: bytes, write: Write) -> None:
    card = card_of(content, write(seeds=2))
    assert "Too few windows for intervals: nothing can be concluded." in card
    assert "[+" not in card.partition("## Results")[2]
    assert "not told apart in 4" in card


def test_an_untrained_ablation_says_so(write: Write) -> None:
    content = model(
        provenance={"trained": False, "note": "as it began"},
        metrics={},
        network={"use_han": False},
    )
    own = loaded(content)

    def rename(document: dict[str, Any]) -> None:
        document["setting"]["models"]["ImpactGreedy"]["sha256"] = own.sha256

    card = card_of(content, write(change=rename))
    assert "It was **not trained**" in card
    assert "| note | as it began |" in card
    assert "not recorded" not in card
    assert "without the graph (an ablation)" in card


def test_what_is_not_recorded_is_said(write: Write) -> None:
    bare = model(provenance={"labels": 5}, metrics={})

    def rename(document: dict[str, Any]) -> None:
        document["setting"]["models"]["ImpactGreedy"]["sha256"] = loaded(bare).sha256

    card = card_of(bare, write(change=rename))
    assert "| command | not recorded |" in card
    assert "| data, for example | not recorded |" in card


def no_models(document: dict[str, Any]) -> None:
    del document["setting"]["models"]


def no_setting(document: dict[str, Any]) -> None:
    del document["setting"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"change": no_models}, r"evaluation.json: does not evaluate the model with the SHA-256"),
        ({"change": no_setting}, r"evaluation.json: is no evaluation.json of pointsman evaluate"),
        ({"reference": "ImpactGreedy"}, r"compares ImpactGreedy with nothing: evaluate baselines"),
    ],
)
def test_evaluations_that_say_nothing_of_it(
    content: bytes, write: Write, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CardError, match=message):
        Evaluation.load(write(**options), sha256=loaded(content).sha256)


# --- The command -------------------------------------------------------------------------


def command(*options: object) -> Result:
    return CliRunner().invoke(app, ["model-card", *map(str, options)], env={"COLUMNS": "200"})


def test_from_a_model_to_its_card(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path / "empty"))
    (tmp_path / "tiny.onnx").write_bytes(content)
    evaluated = CliRunner().invoke(
        app,
        [
            *("evaluate", "--workloads", "poisson", "--loads", "0.9", "--requests", "40"),
            *("--seeds", "5", "--deciders", "Random,ImpactGreedy", "--jobs", "1"),
            *("--model", f"tiny={tmp_path / 'tiny.onnx'}", "--pool", "random:3-4", "--outages"),
            *("--output-dir", str(tmp_path / "out")),
        ],
    )
    assert evaluated.exit_code == 0, evaluated.output
    file = tmp_path / "out" / "evaluation.json"
    result = command(
        *(tmp_path / "tiny.onnx", "--evaluation", file, "--output", tmp_path / "card.md")
    )
    assert result.exit_code == 0, result.output
    card = (tmp_path / "card.md").read_text()
    assert "| **HanDrl:tiny** |" in card
    assert "### `random:3-4`, an endpoint lost and one added in each window" in card
    assert str(tmp_path) not in card
    assert command(tmp_path / "tiny.onnx", "--evaluation", file).stdout == card


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere.onnx", "there is no such file"), ("broken.onnx", "broken.onnx is no ONNX model")],
)
def test_models_that_cannot_be_read(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    result = command(tmp_path / name, "--evaluation", tmp_path / "broken.onnx")
    assert result.exit_code == 2
    assert "Invalid value for" in result.stderr
    assert "MODEL" in result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_evaluations_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tiny.onnx").write_bytes(content)
    (tmp_path / "broken.json").write_text("[")
    result = command(tmp_path / "tiny.onnx", "--evaluation", tmp_path / "broken.json")
    assert result.exit_code == 2
    assert "Invalid value for --evaluation: broken.json: is no evaluation.json" in result.stderr
    assert command(tmp_path / "tiny.onnx").exit_code == 2


def test_an_output_that_cannot_be_written(tmp_path: Path, content: bytes, write: Write) -> None:
    (tmp_path / "tiny.onnx").write_bytes(content)
    result = command(
        *(tmp_path / "tiny.onnx", "--evaluation", write()),
        *("--output", tmp_path / "nowhere" / "card.md"),
    )
    assert result.exit_code == 2
    assert "Invalid value for '--output': " in result.stderr
