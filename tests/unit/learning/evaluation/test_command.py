"""The command line: what it refuses, and how it says so. Nothing is simulated in vain."""

import builtins
import hashlib
import re
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import orjson
import polars as pl
import pytest
from typer.testing import CliRunner, Result

from pointsman_cli.main import app
from pointsman_learning.evaluation import Run, contenders
from pointsman_learning.evaluation.journal import FILE, Journal


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def evaluate(*options: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, options)])


def said(result: Result) -> str:
    """Standard error without the frame that is drawn around it."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--deciders", "Best,Random"], "--deciders: Best: choose from Random, RoundRobin"),
        (["--deciders", ","], "--deciders: names nothing"),
        (["--workloads", "posson"], "--workloads: posson: choose from poisson, on-off"),
        (["--workloads", "azure-conv"], "--workloads: "),
        (["--loads", "0.5,zero"], "--loads: zero: must be a number above 0"),
        (["--loads", "as-recorded,0.5"], "--loads: as-recorded stands alone"),
        (["--loads", "As-Recorded"], "--loads: poisson has no times of its own to be replayed"),
        (["--loads", "-1"], "--loads: -1: must be a number above 0"),
        (["--base-limits", "50,fast"], "--base-limits: fast: must be a number above 0"),
        (["--limits", "loose"], "--limits: must be one of x1"),
        (["--admission", "always"], "--admission: always: choose from best-effort, reject"),
        (["--seeds", "0"], "'--seeds': Input should be greater than or equal to 1"),
        (["--requests", "1"], "'--requests': Input should be greater than or equal to 10"),
        (["--jobs", "0"], "'--jobs': Input should be greater than or equal to 1"),
        (["--pool", "random"], "--pool: must be edge-site, random:N, unseen-boards:N or a range"),
        (["--pool", "random:999"], "--pool: must have 2 to 254 endpoints"),
        (["--model", "a b=x"], "--model: a b=x: a name has letters, digits"),
        (["--policy", "other"], "--policy: names a policy in the manifests of --experts"),
        (
            ["--arrivals", "/dev/null", "--workloads", "poisson"],
            "--workloads: give either this or --arrivals",
        ),
        (
            ["--deciders", "Random", "--reference", "ImpactGreedy"],
            "--reference: ImpactGreedy: choose from best, Random",
        ),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str) -> None:
    result = evaluate(*options)
    assert result.exit_code == 2, result.output
    assert f"Invalid value for {message}" in said(result)
    assert "Traceback" not in result.output


@pytest.mark.parametrize("options", [[], ["--workloads", "poisson"]])
def test_a_data_folder_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str]
) -> None:
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path / "nowhere"))
    result = evaluate(*options)
    assert result.exit_code == 2, result.output
    assert "Invalid value for POINTSMAN_DATA: " in said(result)
    assert "Traceback" not in result.output


def test_a_wrong_cell_is_named(own_files: dict[str, Path]) -> None:
    scores = own_files["scores.csv"]
    scores.write_text("prompt,expert,score,output_tokens\nHello,chat,1.5,10\n")
    result = evaluate("--experts", own_files["site.yaml"], "--quality-data", scores)
    assert result.exit_code == 2
    assert "--quality-data: scores.csv, row 2, column score: must be a number" in said(result)


def test_an_expert_without_scores_is_named(own_files: dict[str, Path]) -> None:
    result = evaluate("--quality-data", own_files["scores.csv"])
    assert result.exit_code == 2
    assert "--quality-data: " in said(result)
    assert "it has chat, coder" in said(result)


def test_a_policy_that_is_not_there(own_files: dict[str, Path]) -> None:
    result = evaluate("--experts", own_files["site.yaml"], "--policy", "other")
    assert result.exit_code == 2
    assert "has no policy other; it has auto" in said(result)


def test_a_trace_that_is_too_short(own_files: dict[str, Path]) -> None:
    result = evaluate(
        "--experts",
        own_files["site.yaml"],
        "--quality-data",
        own_files["scores.csv"],
        "--arrivals",
        own_files["trace.csv"],
        "--requests",
        500,
    )
    assert result.exit_code == 2
    assert "--requests: trace has fewer than 500 requests" in said(result)


def test_names_in_any_case_json_only_on_standard_output(tmp_path: Path) -> None:
    result = evaluate(
        *("--workloads", "Poisson", "--loads", "0.9,0.5", "--requests", 50, "--seeds", 2),
        *("--deciders", "impactgreedy,RANDOM", "--admission", "BestEffort,reject"),
        *("--output-dir", tmp_path / "out", "--jobs", 1, "--json"),
        *("--markdown", tmp_path / "overview.md"),
    )
    assert result.exit_code == 0, result.output
    document = orjson.loads(result.stdout)
    assert list(document) == ["runs", "summary", "setting"]
    setting = document["setting"]
    assert setting["predictor"] == "declared priors"
    assert (setting["requests"], setting["endpoints"], setting["experts"]) == (50, 6, 6)
    assert setting["composed"]["poisson"].startswith("composed: ")
    assert len(document["runs"]) == 2 * 2 * 2 * 2
    assert {run["decider"] for run in document["runs"]} == {"Random", "ImpactGreedy"}
    assert {run["admission"] for run in document["runs"]} == {"BestEffort", "Reject"}
    for run in document["runs"]:
        assert 0 <= run["average_qos"] <= 1
        assert run["requests"] == 50
    assert {row["load"] for row in document["summary"]} == {0.5, 0.9}
    assert orjson.loads((tmp_path / "out" / "evaluation.json").read_bytes()) == document
    assert "Average QoS" in result.stderr
    assert "| decider | poisson, 0.5 | poisson, 0.9 |" in (tmp_path / "overview.md").read_text()
    assert "about" in result.stderr  # how long it will take
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"runs.parquet", "summary.parquet", "routing.png", "qos-by-load.png"} <= names


def test_own_data(own_files: dict[str, Path], tmp_path: Path) -> None:
    result = evaluate(
        *("--experts", own_files["site.yaml"], "--quality-data", own_files["scores.csv"]),
        *("--arrivals", own_files["trace.csv"], "--predictor", "priors"),
        *("--deciders", "RoundRobin", "--requests", 50, "--seeds", 5, "--loads", "0.5"),
        *("--limits", "x2.5", "--output-dir", tmp_path / "out", "--jobs", 1, "--outages"),
    )
    assert result.exit_code == 0, result.output
    assert "trace, load 0.5, limits x2.5, Reject" in result.stdout
    assert "trace: 1 of the windows overlaps others" in result.stdout


def test_own_arrivals_as_they_were_recorded(own_files: dict[str, Path], tmp_path: Path) -> None:
    """One request each half second, then twice that: each window has a load of its own."""
    rows = [f"{n * 0.5 if n < 100 else 25 + n * 0.25},100,20" for n in range(200)]
    header = "arrival_seconds,input_tokens,output_tokens"
    own_files["trace.csv"].write_text("\n".join([header, *rows]))
    result = evaluate(
        *("--experts", own_files["site.yaml"], "--quality-data", own_files["scores.csv"]),
        *("--arrivals", own_files["trace.csv"], "--predictor", "priors", "--jobs", 1, "--json"),
        *("--deciders", "RoundRobin,Random", "--requests", 100, "--seeds", 2),
        *("--loads", "as-recorded", "--output-dir", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.output
    document = orjson.loads(result.stdout)
    assert document["setting"]["as_recorded"] is True
    first, second = (
        next(run for run in document["runs"] if run["seed"] == seed) for seed in (0, 1)
    )
    assert second["window_load"] == pytest.approx(2 * first["window_load"], rel=0.02)
    mean = (first["window_load"] + second["window_load"]) / 2
    assert {run["load"] for run in document["runs"]} == {round(mean, 3)}
    assert {row["load"] for row in document["summary"]} == {round(mean, 3)}
    assert {row["windows"] for row in document["summary"]} == {2}
    assert f"trace, load {round(mean, 3):g}, limits x1, Reject" in result.stderr
    told = " ".join(result.stderr.split())
    low, high = first["window_load"], second["window_load"]
    assert (
        f"as recorded its load is {round(mean, 3):g}, its windows {low:.3g} to {high:.3g}" in told
    )
    assert "time-scaled" not in told
    timeline = pl.read_parquet(tmp_path / "out" / "timeline.parquet")
    ends = timeline.group_by("seed").agg(pl.col("end_s").max()).sort("seed")["end_s"].to_list()
    assert ends == pytest.approx([49.5, 24.75])
    assert not (tmp_path / "out" / "qos-by-load.png").exists()


def test_a_killed_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        *("--workloads", "poisson", "--requests", 30, "--seeds", 3, "--loads", "0.5,0.9"),
        *("--deciders", "Random,RoundRobin", "--jobs", 1, "--json"),
    ]
    whole = evaluate(*options, "--output-dir", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    assert not list((tmp_path / "whole").glob("*.jsonl"))
    added, count = Journal.add, 0

    def killed(journal: Journal, run: Run) -> None:
        nonlocal count
        count += 1
        if count > 5:
            raise KeyboardInterrupt
        added(journal, run)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", killed)
        broken = evaluate(*options, "--output-dir", tmp_path / "broken")
    assert broken.exit_code == 130
    assert "5 of 12 runs were finished; the same command with --resume goes on" in broken.stderr
    other = evaluate(*options, "--base-limits", "60", "--output-dir", "broken", "--resume")
    assert other.exit_code == 2
    assert "--resume: the evaluation in broken had other settings: base_limits_ms:" in said(other)
    resumed = evaluate(*options, "--output-dir", tmp_path / "broken", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "5 of 12 runs are finished already" in resumed.stderr
    assert resumed.stdout == whole.stdout
    (tmp_path / "broken" / FILE).write_text("of another evaluation")
    anew = evaluate(*options, "--output-dir", "broken")
    assert anew.stdout == whole.stdout
    assert "note: what was broken off in broken begins anew" in anew.stderr
    again = evaluate(*options, "--output-dir", tmp_path / "broken", "--resume")
    assert again.exit_code == 2
    assert "holds no evaluation that was broken off" in said(again)


SHIPPED = resources.files("pointsman_core") / "models" / "han_drl.onnx"


def test_a_model_that_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    result = evaluate("--model", "mine=broken.onnx", "--output-dir", tmp_path / "out")
    assert result.exit_code == 2
    assert "Invalid value for --model: broken.onnx is no ONNX model" in said(result)
    assert not (tmp_path / "out").exists()


def test_a_pool_and_experts_of_ones_own(own_files: dict[str, Path]) -> None:
    result = evaluate("--experts", own_files["site.yaml"], "--pool", "random:4")
    assert result.exit_code == 2
    assert "has experts of its own: random pools are drawn from" in said(result)


def test_models_and_pools_are_named_everywhere(tmp_path: Path) -> None:
    (tmp_path / "mine.onnx").write_bytes(SHIPPED.read_bytes())
    digest = hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    result = evaluate(
        *("--workloads", "poisson", "--loads", "0.5", "--requests", 50, "--seeds", 2),
        *("--deciders", "ImpactGreedy", "--model", "mine.onnx", "--model", "other=mine.onnx"),
        *("--pool", "unseen-boards:4-6", "--outages", "--reference", "handrl:MINE"),
        *("--output-dir", tmp_path / "out", "--jobs", 1, "--markdown", tmp_path / "o.md"),
    )
    assert result.exit_code == 0, result.output
    document = orjson.loads((tmp_path / "out" / "evaluation.json").read_bytes())
    assert {row["decider"] for row in document["summary"]} == {
        *("ImpactGreedy", "HanDrl:mine", "HanDrl:other")
    }
    assert {row["reference"] for row in document["summary"]} == {"HanDrl:mine"}
    setting = document["setting"]
    assert setting["site"] == "unseen-boards:4-6"
    assert setting["pool"]["kind"] == "unseen-boards"
    assert setting["models"]["HanDrl:other"]["sha256"] == digest
    assert pl.read_parquet_metadata(tmp_path / "out" / "runs.parquet")["pointsman"].count(digest)
    told = f"HanDrl:mine: mine.onnx, SHA-256 {digest}"
    overview = (tmp_path / "o.md").read_text()
    assert told in overview
    assert "endpoints: unseen-boards:4-6, drawn anew by each seed (" in overview
    assert told in " ".join(result.stdout.split())
    # Experts of one window are not those of another: there is no picture of where requests go.
    assert not (tmp_path / "out" / "routing.png").exists()
    assert "HanDrl:mine" not in contenders()


def test_without_the_learning_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> ModuleType:
        if name == "pointsman_learning.evaluation":
            raise ModuleNotFoundError("No module named 'polars'", name="polars")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    result = evaluate()
    assert result.exit_code == 2
    assert "needs the learning extra: pip install 'pointsman[learning]'" in result.stderr
