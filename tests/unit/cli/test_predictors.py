import orjson
import pytest
from typer.testing import CliRunner

from pointsman_cli import predictors
from pointsman_cli.main import app
from pointsman_core.predictors import Artefact
from pointsman_learning.evaluation.statistics import Interval
from pointsman_learning.predictors.judge import Judgement, LengthJudgement


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path / "empty"))
    monkeypatch.setenv("POINTSMAN_CACHE", str(tmp_path / "cache"))


def predictor(*options):
    return CliRunner().invoke(app, ["predictor", *map(str, options)])


@pytest.fixture
def scores(tmp_path):
    file = tmp_path / "scores.csv"
    lines = ["prompt,expert,score,output_tokens"]
    for i in range(40):
        what = "Add {i} and {i}." if i % 2 else "Who was king number {i}?"
        lines += [f"{what.format(i=i)},good,{i % 2},", f"{what.format(i=i)},bad,{1 - i % 2},"]
    file.write_text("\n".join(lines))
    return file


def test_a_predictor_is_trained_on_scores_of_ones_own(scores, tmp_path):
    output = tmp_path / "new" / "own.onnx"
    done = predictor("train", "-o", output, "--quality-data", scores)
    assert done.exit_code == 0, done.stderr
    info = Artefact(output.read_bytes()).info
    assert info.experts == ("good", "bad")
    assert info.provenance["data"] == "scores.csv"
    assert info.metrics["out_of_fold"]["chosen"]["mean"] > 0.9


@pytest.fixture
def trained(scores, tmp_path):
    output = tmp_path / "own.onnx"
    assert predictor("train", "-o", output, "--quality-data", scores).exit_code == 0
    return output


def test_a_trained_predictor_is_judged_by_other_scores(trained, tmp_path):
    others = tmp_path / "others.csv"
    lines = ["prompt,expert,score,output_tokens"]
    for i in range(100, 120):
        lines += [f"Add {i} and {i}.,{name},{score}," for name, score in (("good", 1), ("bad", 0))]
        lines += [f"Who was king number {i}?,bad,1,", f"Who was king number {i}?,good,0,"]
    others.write_text("\n".join(lines))
    done = predictor("evaluate", "--predictor", trained, "--quality-data", others, "--json")
    assert done.exit_code == 0, done.stderr
    report = orjson.loads(done.stdout)
    assert (report["split"], report["prompts"]) == ("others.csv", 40)
    (rows,) = report["experts"].values()
    chosen = {row["method"]: row["chosen"]["mean"] for row in rows}
    assert chosen == {
        "random": 0.5,
        "best single": 0.5,
        "own.onnx": pytest.approx(1.0, abs=0.1),
        "oracle": 1.0,
    }
    assert (
        "2 known experts, others.csv"
        in predictor("evaluate", "--predictor", trained, "--quality-data", others).stdout
    )


def test_a_predictor_is_not_judged_by_what_it_was_trained_on(trained, scores):
    done = predictor("evaluate", "--predictor", trained, "--quality-data", scores)
    assert done.exit_code == 1
    assert done.stderr == "error: own.onnx was trained on scores.csv: give other prompts\n"


def test_a_predictor_must_know_the_experts(scores):
    done = predictor("evaluate", "--quality-data", scores)
    assert done.exit_code == 1
    assert "knows 0 of the experts good, bad: two are needed for a choice" in done.stderr


def test_the_predictor_table_needs_the_data():
    done = predictor("evaluate", "--json")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["evaluate", "--split", "tests"], "must be one of train, validation, test (got 'tests')"),
        (
            ["train", "-o", "x", "--kind", "bert"],
            "--kind must be one of ngram, embedding, combined",
        ),
    ],
)
def test_wrong_options_are_named(options, message):
    done = predictor(*options)
    assert done.exit_code == 1
    assert message in done.stderr


def test_a_damaged_table_is_named(tmp_path):
    file = tmp_path / "bad.csv"
    file.write_text("prompt,expert,score,output_tokens\nhello,one,2,\n")
    done = predictor("train", "-o", tmp_path / "x.onnx", "--quality-data", file)
    assert done.exit_code == 1
    assert "bad.csv, row 2, column score" in done.stderr


def test_the_report_is_json(monkeypatch):
    one = Interval(0.5, 0.4, 0.6)
    row = Judgement("ngram", one, one, 0.1, 0.2, None, 0.3, {100: 50.0})
    lengths = LengthJudgement(10, one, one, one)
    shown = []
    monkeypatch.setattr(predictors.typer, "echo", shown.append)
    predictors._print({"edge": [row]}, lengths, split="test", prompts=5, as_json=True)
    report = orjson.loads(shown[0])
    assert report["experts"]["edge"][0]["microseconds"] == {"100": 50.0}
    assert report["output_tokens"]["answers"] == 10


def test_the_report_is_a_table(capsys):
    one = Interval(0.5, 0.4, 0.6)
    rows = [Judgement("ngram", one, one, 0.1, None, None, None, {100: 50.0})]
    lengths = LengthJudgement(10, one, one, one)
    predictors._print({"edge": rows}, lengths, split="test", prompts=5, as_json=False)
    out = capsys.readouterr().out
    assert "edge experts, test split" in out
    assert "ngram" in out
    assert "10 real answers" in out
