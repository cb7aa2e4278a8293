import hashlib
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from pointsman_core.deciders.han_drl import ModelError
from pointsman_core.resources import Admission
from pointsman_learning.evaluation import (
    Composer,
    Plan,
    TrainedModel,
    collect,
    contenders,
    load_models,
    registered,
    run_all,
)

SHIPPED = (resources.files("pointsman_core") / "models" / "han_drl.onnx").read_bytes()
COMPOSER = Composer(requests=60)


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path_factory.mktemp("empty")))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run-1" / "first.onnx"
    path.parent.mkdir()
    path.write_bytes(SHIPPED)
    return path


@pytest.fixture
def small() -> Plan:
    return Plan(
        workloads=["poisson"],
        loads=[0.9],
        limits=["x1"],
        admissions=[Admission.REJECT],
        deciders=["HanDrl", "HanDrl:mine"],
        seeds=[0, 1],
    )


def test_names(file: Path) -> None:
    plain, named = load_models([str(file), f"no-han.2={file}"])
    assert (plain.decider, named.decider) == ("HanDrl:first", "HanDrl:no-han.2")
    digest = hashlib.sha256(SHIPPED).hexdigest()
    assert plain.setting() == {"file": "first.onnx", "sha256": digest, "bytes": len(SHIPPED)}


def test_an_equals_sign_in_a_folder(file: Path) -> None:
    odd = file.parent / "seed=1"
    odd.mkdir()
    (odd / "han.onnx").write_bytes(SHIPPED)
    assert TrainedModel.load(str(odd / "han.onnx")).name == "han"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no model", r"first\.onnx is no ONNX model"),
        (SHIPPED[:-200_000], r"first\.onnx is no ONNX model"),
        (SHIPPED.replace(b"pointsman-han/1", b"pointsman-han/0"), "this release serves"),
    ],
)
def test_what_is_refused(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        TrainedModel.load(str(file))


def test_wrong_names(file: Path) -> None:
    with pytest.raises(ModelError, match="one is the name of two models: write NAME=FILE"):
        load_models([f"One={file}", f"one={file}"])
    with pytest.raises(ModelError, match="mine= names no file"):
        load_models(["mine="])
    with pytest.raises(ModelError, match="a name has letters, digits"):
        load_models(["my model.onnx"])
    with pytest.raises(FileNotFoundError):
        load_models(["nowhere.onnx"])


@pytest.mark.parametrize("jobs", [1, 2])
def test_it_decides_as_the_shipped_one_of_equal_bytes(file: Path, small: Plan, jobs: int) -> None:
    one = TrainedModel.load(f"mine={file}").contender()
    file.unlink()  # workers are sent the model, they do not read it anew
    with registered([one]):
        runs = collect(run_all(small.tasks(), COMPOSER, jobs=jobs, extra=[one]), small).runs
    assert "HanDrl:mine" not in contenders()
    shipped, mine = (runs.filter(decider=name).drop("decider") for name in small.deciders)
    assert len(mine) == 2
    assert mine.equals(shipped)


def test_it_is_never_a_baseline_and_stands_before_bounds(file: Path) -> None:
    one = TrainedModel.load(f"mine={file}").contender()
    with registered([one]):
        known = contenders()
        assert not known["HanDrl:mine"].baseline
        names = list(known)
        assert names.index("HanDrl") < names.index("HanDrl:mine")
        assert not any(known[name].bound for name in names[: names.index("HanDrl:mine")])


def test_what_is_registered_for_a_while_is_gone_after_an_error(file: Path) -> None:
    one = TrainedModel.load(f"mine={file}").contender()
    before = dict(contenders())
    with pytest.raises(KeyError), registered([one, replace(one, name="HanDrl:other")]):
        raise KeyError
    assert contenders().keys() == before.keys()
