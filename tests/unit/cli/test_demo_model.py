import hashlib
from importlib import resources

import pytest

from pointsman_cli.demo.model import served_model
from pointsman_core.deciders import han_drl
from pointsman_core.resources import ModelReference, ObjectMeta, RoutingPolicy, RoutingPolicySpec


@pytest.fixture
def content() -> bytes:
    return (resources.files("pointsman_core") / "models" / han_drl.SHIPPED).read_bytes()


def policy(**spec) -> RoutingPolicy:
    return RoutingPolicy(
        metadata=ObjectMeta(name="auto"), spec=RoutingPolicySpec(models=["auto"], **spec)
    )


def test_the_shipped_one_whatever_the_policy_decides_by(content):
    found = served_model(policy(algorithm="LeastLoad"))
    assert found.source == "the shipped model"
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.trained is han_drl.shipped_model().info.trained
    assert found.error == ""


def test_the_policys_own_from_the_folder_of_models(content, tmp_path, monkeypatch):
    (tmp_path / "own.onnx").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    own = policy(algorithm="HanDrl", model=ModelReference(file="own.onnx", sha256=sha256))
    monkeypatch.delenv("POINTSMAN_MODELS", raising=False)
    found = served_model(own)
    assert (found.sha256, found.trained) == ("", False)
    assert "own.onnx: the policy server has no folder of models" in found.error
    monkeypatch.setenv("POINTSMAN_MODELS", str(tmp_path))
    assert (served_model(own).source, served_model(own).sha256) == ("own.onnx", sha256)
