"""The generated CRDs and the examples on a real API server, as users meet them."""

import json
from pathlib import Path

import pytest

from pointsman_core.crd import KINDS
from pointsman_core.manifests import MODELS

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).parents[3] / "examples"

SPECS = {
    "LLMExpert": {"model": "qwen", "backend": {"service": {"name": "qwen", "port": 8000}}},
    "RoutingPolicy": {"models": ["auto", "fast"]},
}

CONDITION = {
    "type": "Ready",
    "status": "True",
    "observedGeneration": 1,
    "lastTransitionTime": "2026-01-01T00:00:00Z",
    "reason": "AllWell",
    "message": "All is well.",
}

STATUSES = {
    "LLMExpert": {"endpoints": {"ready": 2, "total": 3}, "conditions": [CONDITION]},
    "RoutingPolicy": {
        "experts": 4,
        "averageQos": 0.75,
        "violationRate": 0.25,
        "snapshotVersion": "0123456789abcdef",
        "conditions": [CONDITION],
    },
}

COLUMNS = {
    "LLMExpert": {
        "NAME": "x",
        "MODEL": "qwen",
        "ENGINE": "openai",
        "READY": "True",
        "ENDPOINTS": "2",
        "TOTAL": "3",
        "REASON": "AllWell",
    },
    "RoutingPolicy": {
        "NAME": "x",
        "MODELS": '["auto","fast"]',
        "ALGORITHM": "LatencyQualityGreedy",
        "LIMIT": "60",
        "READY": "True",
        "QOS": "0.75",
        "LATE": "0.25",
        "EXPERTS": "4",
        "ADMISSION": "BestEffort",
        "SNAPSHOT": "0123456789abcdef",
        "REASON": "AllWell",
    },
}
WIDE = {"EXPERTS", "ADMISSION", "SNAPSHOT"}

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def manifest(kind, **fields):
    return {
        "apiVersion": "pointsman.dev/v1alpha1",
        "kind": kind.name,
        "metadata": {"name": "x"},
        "spec": SPECS[kind.name],
        **fields,
    }


@pytest.fixture
def kubectl(crds, namespace):
    """kubectl in an empty namespace of a cluster that knows our kinds."""

    def run(*arguments, **options):
        return crds.kubectl(f"--namespace={namespace}", *arguments, **options)

    return run


@pytest.fixture
def create(kubectl):
    """Create an object and return it as stored."""

    def create(content):
        done = kubectl("create", "-o", "json", "-f", "-", stdin=json.dumps(content))
        return json.loads(done.stdout)

    return create


@each_kind
def test_the_api_server_serves_the_kinds(crds, kind):
    crd = crds.get("crd", f"{kind.plural}.pointsman.dev")
    conditions = {item["type"]: item["status"] for item in crd["status"]["conditions"]}
    # NonStructuralSchema and the like appear where something is wrong.
    assert conditions == {"Established": "True", "NamesAccepted": "True"}


@each_kind
def test_the_stored_definition_is_the_generated_one(crds, kind):
    """Nothing was pruned or ignored: a second apply has nothing to do."""
    file = Path(__file__).parents[3] / "crds" / kind.file_name
    before = crds.get("crd", f"{kind.plural}.pointsman.dev")["metadata"]["resourceVersion"]
    crds.kubectl("apply", "--server-side", "-f", str(file))
    crds.kubectl("diff", "--server-side", "-f", str(file))
    after = crds.get("crd", f"{kind.plural}.pointsman.dev")["metadata"]["resourceVersion"]
    assert before == after


@pytest.mark.parametrize("flags", [(), ("--recursive",)], ids=["folder", "recursive"])
@pytest.mark.parametrize("side", [(), ("--server-side",)], ids=["client-side", "server-side"])
def test_the_examples_are_accepted(kubectl, flags, side):
    done = kubectl("apply", *flags, *side, "-f", str(EXAMPLES))
    # A warning would go there.
    assert done.stderr == ""
    again = kubectl("apply", *flags, *side, "-f", str(EXAMPLES))
    assert len(again.stdout.splitlines()) == len(done.stdout.splitlines()) > 2


@each_kind
def test_columns(kubectl, create, kind):
    create(manifest(kind))
    patch = json.dumps({"status": STATUSES[kind.name]})
    kubectl("patch", kind.plural, "x", "--subresource=status", "--type=merge", f"--patch={patch}")
    for options, hidden in (((), WIDE), (("-o", "wide"), set())):
        titles, cells = kubectl("get", kind.plural, *options).stdout.splitlines()
        shown = dict(zip(titles.split(), cells.split(), strict=True))
        assert shown.pop("AGE")
        expected = COLUMNS[kind.name].items()
        assert shown == {title: cell for title, cell in expected if title not in hidden}


def test_before_the_operator_has_looked_columns_are_empty(kubectl, create):
    for kind in KINDS:
        create(manifest(kind))
        titles, cells = kubectl("get", kind.plural).stdout.splitlines()
        at = titles.index("READY")
        assert cells[at : at + len("READY")].strip() == ""


@pytest.mark.parametrize("name", ["pointsman", "llmx,rtp", "llmexperts,routingpolicies"])
def test_names_by_which_both_kinds_are_found(kubectl, create, name):
    for kind in KINDS:
        create(manifest(kind))
    found = kubectl("get", name, "-o", "name").stdout.split()
    assert found == [f"{kind.name.lower()}.pointsman.dev/x" for kind in KINDS]


@each_kind
def test_defaults_are_those_of_the_models(create, kind):
    stored = create(manifest(kind))
    model = MODELS[kind.name]
    assert model.model_validate(stored).spec == model.model_validate(manifest(kind)).spec
    dumped = model.model_validate(manifest(kind)).spec.model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    assert without_empty(dumped) == without_empty(stored["spec"])


def without_empty(value):
    """A list or map that is absent and one that is empty mean the same."""
    if isinstance(value, dict):
        slim = {key: without_empty(item) for key, item in value.items()}
        return {key: item for key, item in slim.items() if item not in ({}, [])}
    return value


@each_kind
def test_a_status_is_not_written_with_the_spec(create, kind):
    assert "status" not in create(manifest(kind, status=STATUSES[kind.name]))


@each_kind
def test_a_status_does_not_change_the_generation(kubectl, create, kind):
    generation = create(manifest(kind))["metadata"]["generation"]
    patch = json.dumps({"status": STATUSES[kind.name]})
    done = kubectl(
        *("patch", kind.plural, "x", "--subresource=status", "--type=merge"),
        *(f"--patch={patch}", "-o", "json"),
    )
    patched = json.loads(done.stdout)
    assert patched["metadata"]["generation"] == generation
    assert patched["status"] == STATUSES[kind.name]


def test_what_may_be_changed(kubectl, create):
    """Only the model of an expert must stay."""
    kind = KINDS[0]
    create(manifest(kind))
    changed = SPECS["LLMExpert"] | {
        "backend": {"addresses": ["[fd00::1]:8000", "10.0.0.1:8000"]},
        "aliases": ["llama"],
    }
    kubectl("replace", "-f", "-", stdin=json.dumps(manifest(kind, spec=changed)))


@each_kind
def test_explain_describes_the_fields(crds, kind):
    text = crds.kubectl("explain", f"{kind.plural}.spec").stdout
    assert kind.model.model_fields["spec"].annotation.__doc__ in " ".join(text.split())
