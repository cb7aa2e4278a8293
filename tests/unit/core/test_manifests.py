"""Manifests: every mistake is found, at its line, in words that say what to write instead."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pointsman_core.manifest_yaml import YamlSyntaxError, read_documents
from pointsman_core.manifests import (
    ManifestErrors,
    compile_manifests,
    format_path,
    parse_manifests,
)

EXAMPLES = Path(__file__).parents[3] / "examples"

EXPERT = """\
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata:
  name: qwen
  labels: {site: edge}
spec:
  model: qwen2.5
  backend:
    addresses: [127.0.0.1:8001, "127.0.0.1:8002"]
"""

POLICY = """\
apiVersion: pointsman.dev/v1alpha1
kind: RoutingPolicy
metadata:
  name: auto
spec:
  models: [auto]
"""


def expert(name, *, model="m", namespace="default", extra=""):
    return (
        EXPERT.replace("name: qwen", f"name: {name}\n  namespace: {namespace}").replace(
            "model: qwen2.5", f"model: {model}"
        )
        + extra
    )


def errors(text, source="f.yaml"):
    with pytest.raises(ManifestErrors) as caught:
        parse_manifests(text, source=source)
    return str(caught.value).splitlines()


def compile_errors(*texts, **files):
    sources = {f"{index}.yaml": text for index, text in enumerate(texts)} | files
    with pytest.raises(ManifestErrors) as caught:
        compile_manifests(sources)
    return str(caught.value).splitlines()


# --- what is read ----------------------------------------------------------------------


def test_a_file_of_several_documents():
    parsed = parse_manifests(f"---\n# nothing\n---\n{EXPERT}---\n{POLICY}---\n", source="f.yaml")
    (one,) = parsed.experts
    (policy,) = parsed.policies
    assert one.spec.backend.addresses == ["127.0.0.1:8001", "127.0.0.1:8002"]
    assert policy.spec.models == ["auto"]


def test_an_empty_file_holds_nothing():
    assert parse_manifests("", source="f.yaml").experts == ()


def test_other_groups_are_passed_over_with_all_their_yaml():
    text = "apiVersion: v1\nkind: Secret\ndata: !!binary aGk=\nwhen: 2026-01-01\na: 1\na: 2\n"
    assert parse_manifests(f"{text}---\n{EXPERT}", source="f.yaml").experts


def test_a_list_as_kubectl_prints_it():
    items = [yaml.safe_load(EXPERT), yaml.safe_load(POLICY), {"apiVersion": "v1", "kind": "Pod"}]
    text = yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": items})
    parsed = parse_manifests(text, source="f.yaml")
    assert len(parsed.experts) == len(parsed.policies) == 1


def test_errors_within_a_list_are_located():
    text = f"kind: List\nitems:\n- {EXPERT.replace(chr(10), chr(10) + '  ')}\n"
    (line,) = errors(text.replace("model:", "modell:") + "    model: x\n")
    assert line.startswith("f.yaml:9 LLMExpert default/qwen spec.modell: is not a field")


def test_what_the_api_server_wrote_may_be_there():
    text = EXPERT.replace("metadata:\n", "metadata:\n  uid: abc\n  resourceVersion: '1'\n")
    text += "status: {anything: goes}\n"
    assert parse_manifests(text, source="f.yaml").experts


def test_null_means_absent_as_for_the_api_server():
    (one,) = parse_manifests(f"{EXPERT}  limits:\n  engine: {{type: null}}\n", source="f").experts
    assert one.spec.limits.context_tokens == 8192


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("1e3", 1000.0),
        ("0x10", 16),
        ("1_000", "1_000"),
        ("'1'", "1"),
        ("no", False),
        ("~", None),
        ("1.", 1.0),
        (".5", 0.5),
        ("-7", -7),
        ("1.2.3", "1.2.3"),
    ],
)
def test_scalars_are_read_as_the_api_server_reads_them(text, value):
    (document,) = read_documents(f"x: {text}")
    read = document.value["x"]
    assert read == value
    assert type(read) is type(value)


# --- what is refused -------------------------------------------------------------------


def change(old, new, text=EXPERT):
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "f.yaml:1: not YAML: while parsing a flow sequence"),
        ("a: b: c", "f.yaml:1: not YAML: mapping values are not allowed"),
        ("a\x00b", "f.yaml: not YAML: "),
        ("a: *b", "f.yaml:1: not YAML: found undefined alias"),
        ("- a", "f.yaml:1: must be a Kubernetes object, that is a mapping (got a list)"),
        ("foo", 'f.yaml:1: must be a Kubernetes object, that is a mapping (got "foo")'),
        ("kind: LLMExpert", "f.yaml:1 LLMExpert default/? apiVersion: is required"),
        ("apiVersion: 1\nkind: LLMExpert", "apiVersion: must be text (got 1)"),
        ("apiVersion: v1", "f.yaml:1 ? default/? kind: is required"),
        (
            change("v1alpha1", "v2"),
            "f.yaml:1 LLMExpert default/qwen apiVersion: must be pointsman.dev/v1alpha1 (got",
        ),
        (
            change("pointsman.dev", "pointsmen.dev"),
            "apiVersion: must be pointsman.dev/v1alpha1 for",
        ),
        (change("LLMExpert", "LLMExprt"), "(got LLMExprt); did you mean LLMExpert?"),
        (change("  name: qwen\n", ""), "f.yaml:3 LLMExpert default/? metadata.name: is required"),
        (change("name: qwen", "name: Qwen"), "f.yaml:4 LLMExpert default/Qwen metadata.name: must"),
        (
            change("  model: qwen2.5\n", ""),
            "f.yaml:6 LLMExpert default/qwen spec.model: is required",
        ),
        (change("site: edge", "site: 1"), "metadata.labels.site: must be a valid string (got 1)"),
        (
            change("8002", "99999"),
            "f.yaml:9 LLMExpert default/qwen spec.backend.addresses[1]: must",
        ),
        (change("8002", "8001"), "spec.backend.addresses: must not repeat 127.0.0.1:8001"),
        (change("addresses", "adresses"), "is not a field; did you mean addresses?"),
        (EXPERT + "  expected_output_tokens: 1\n", "did you mean expectedOutputTokens?"),
        (EXPERT + "  zzz: 1\n", "f.yaml:10 LLMExpert default/qwen spec.zzz: is not a field; known"),
        (EXPERT + "  engine: {type: vLLM}\n", '(got "vLLM"); did you mean vllm?'),
        (EXPERT + "  engine: {metrics: {enabled: 'yes'}}\n", "must be a valid boolean (got"),
        (EXPERT + "  expectedOutputTokens: '60'\n", "must be a valid integer (got"),
        (EXPERT + "  expectedOutputTokens: 1.5\n", "must be a valid integer (got 1.5)"),
        (EXPERT + "  cost: {perMillionInputTokens: -3}\n", "greater than or equal to 0 (got -3)"),
        (EXPERT + "  cost: {perMillionInputTokens: .inf}\n", "must be a finite number"),
        (EXPERT + "  cost: []\n", "spec.cost: must be an object (got a list)"),
        (EXPERT + "  model: x\n", "f.yaml:10 LLMExpert default/qwen spec.model: stands here twice"),
        (EXPERT + "  <<: {}\n", "spec: merge keys (<<) are not supported"),
        (EXPERT + "  ? [a]\n  : b\n", "spec: a key must be text"),
        (EXPERT + "  cost: !!timestamp 2026-01-01\n", "the YAML tag"),
        (EXPERT + "  cost: !!int abc\n", "spec.cost: is not a valid int"),
        (
            EXPERT + "  limits: {contextTokens: 1000000}\n",
            "f.yaml:6 LLMExpert default/qwen spec: the KV cache cannot hold",
        ),
        (
            POLICY + "  qos: {latencyPerTokenMs: 60, timeToFirstTokenMs: 1}\n",
            "f.yaml:7 RoutingPolicy default/auto spec.qos: timeToFirstTokenMs must not be below",
        ),
        (POLICY + "  qos:\n    latencyPerTokenMs: 0\n", "f.yaml:8 RoutingPolicy default/auto spec"),
        (POLICY.replace("[auto]", "[]"), "must have at least 1 item (got 0)"),
        (POLICY + "  selector: {matchLabels: {a.b/c: 1}}\n", 'spec.selector.matchLabels["a.b/c"]'),
        (POLICY + f"  fallback: {'x' * 80}\n", f'(got "{"x" * 59}…)'),
    ],
)
def test_mistakes(text, expected):
    lines = errors(text)
    assert len(lines) == 1, lines
    assert expected in lines[0]


def test_all_mistakes_are_told_at_once():
    text = f"{change('8002', '0')}  zzz: 1\n  expectedOutputTokens: 0\n---\nfoo\n---\na: [1"
    first, second, third, fourth, fifth = errors(text)
    assert "spec.backend.addresses[1]" in first
    assert "spec.zzz" in second
    assert "spec.expectedOutputTokens" in third
    assert fourth.startswith("f.yaml:13: must be a Kubernetes object")
    assert fifth.startswith("f.yaml:15: not YAML")


def test_an_error_carries_its_parts():
    with pytest.raises(ManifestErrors) as caught:
        parse_manifests(f"{POLICY}---\n{EXPERT}  cost: 1\n", source="dir/f.yaml")
    (error,) = caught.value.errors
    assert error.as_dict() == {
        "source": "dir/f.yaml",
        "line": 17,
        "document": 1,
        "resource": "LLMExpert/default/qwen",
        "field": "spec.cost",
        "message": "must be an object (got 1)",
    }


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 500_000,
        "- " * 200_000 + "x",
        "&a [*a]",
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{k}: &{k} [{','.join([f'*{p}'] * 9)}]\n" for p, k in pairwise("abcdefg")),
    ],
    ids=["brackets", "dashes", "circle", "bomb"],
)
def test_hostile_nesting_is_refused(text):
    (line,) = errors(text)
    assert "nested" in line


def messages(text):
    """Of the errors in a text; anything but a list of errors is a bug."""
    try:
        parse_manifests(text, source="f.yaml")
    except ManifestErrors as refused:
        return [error.message for error in refused.errors]
    return []


@given(st.text(alphabet="ab:- \n[]{}&*!|>'\"#?,<~\t\\%@`1.", max_size=60))
def test_any_text_is_read_or_refused_with_a_message(text):
    assert all(messages(text))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(st.sampled_from(["metadata", "spec"]), json_values)
def test_any_content_is_read_or_refused_with_a_message(field, value):
    manifest = yaml.safe_load(EXPERT) | {field: value}
    assert all(messages(json.dumps(manifest)))


def test_documents_before_a_syntax_error_are_read():
    documents = read_documents("a: 1\n---\nb: [")
    assert next(documents).value == {"a": 1}
    with pytest.raises(YamlSyntaxError) as caught:
        next(documents)
    assert (caught.value.index, caught.value.line) == (1, 3)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), ""),
        (("spec", "models", 0), "spec.models[0]"),
        (("a", "b.c/d", 1, "e"), 'a["b.c/d"][1].e'),
    ],
)
def test_paths(path, text):
    assert format_path(path) == text


# --- several resources -----------------------------------------------------------------


def test_compiles_one_snapshot_per_policy():
    other = POLICY.replace("name: auto", "name: aaa").replace("[auto]", "[fast, good]")
    compiled = compile_manifests({"e.yaml": EXPERT, "p.yaml": f"{POLICY}---\n{other}"})
    assert [snapshot.policy for snapshot in compiled.snapshots] == ["aaa", "auto"]
    assert compiled.snapshots[0].models == ("fast", "good")
    assert [c.address for c in compiled.snapshots[1].candidates] == [
        "127.0.0.1:8001",
        "127.0.0.1:8002",
    ]
    assert compiled.warnings == ()


def test_experts_of_one_name_in_two_namespaces_keep_their_own_addresses():
    elsewhere = expert("qwen", namespace="lab").replace("127.0.0.1", "127.0.0.9")
    policy = POLICY.replace("name: auto", "name: auto\n  namespace: lab").replace("auto]", "lab]")
    compiled = compile_manifests({"a": EXPERT, "b": elsewhere, "c": POLICY, "d": policy})
    hosts = [{c.address.split(":")[0] for c in s.candidates} for s in compiled.snapshots]
    assert hosts == [{"127.0.0.1"}, {"127.0.0.9"}]


def test_a_resource_exists_once():
    (line,) = compile_errors(EXPERT, EXPERT, POLICY)
    assert line == (
        "1.yaml:4 LLMExpert default/qwen metadata.name: exists twice, first at 0.yaml:1"
    )


def test_a_model_name_is_answered_once_in_all_namespaces():
    other = POLICY.replace("name: auto", "name: b\n  namespace: lab").replace("[auto]", "[x, auto]")
    lines = compile_errors(f"{EXPERT}---\n{POLICY}", f"{expert('a', namespace='lab')}---\n{other}")
    assert len(lines) == 1
    assert "RoutingPolicy lab/b spec.models[1]: auto is answered by RoutingPolicy/def" in lines[0]


@pytest.mark.parametrize(
    "backend",
    [
        "service: {name: a, port: 80}",
        "inferencePool: {name: a}",
        "podSelector: {matchLabels: {a: b}, port: 80}",
    ],
)
def test_without_a_cluster_only_addresses_can_be_resolved(backend):
    text = EXPERT.replace('addresses: [127.0.0.1:8001, "127.0.0.1:8002"]', backend)
    (line,) = compile_errors(text, POLICY)
    name = backend.partition(":")[0]
    assert line.startswith(
        f"0.yaml:9 LLMExpert default/qwen spec.backend.{name}: only the operator"
    )


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("  selector: {matchLabels: {site: moon}}\n", "in namespace default with site=moon"),
        ("", "no LLMExpert in namespace default"),
    ],
)
def test_a_policy_selects_something(extra, expected):
    experts = EXPERT if extra else expert("a", namespace="lab")
    (line,) = compile_errors(experts, POLICY + extra)
    assert "spec.selector: selects nothing" in line
    assert expected in line


def test_without_a_policy_nothing_could_be_routed():
    (line,) = compile_errors(EXPERT)
    assert line == "0.yaml: holds no RoutingPolicy, so nothing could be routed"
    assert compile_errors() == ["nothing: holds no RoutingPolicy, so nothing could be routed"]


def test_errors_of_all_files_come_together_and_hide_what_only_follows_from_them():
    lines = compile_errors(EXPERT.replace("8001", "x"), f"{POLICY}  zzz: 1\n", "a: [")
    assert [line.partition(" ")[0] for line in lines] == ["0.yaml:9", "1.yaml:7", "2.yaml:1:"]


def warnings(*texts):
    sources = {f"{index}.yaml": text for index, text in enumerate(texts)}
    return [str(warning) for warning in compile_manifests(sources).warnings]


def test_warns_of_an_expert_that_nothing_selects():
    policy = POLICY + "  selector: {matchLabels: {site: edge}}\n"
    lonely = expert("b").replace("edge", "moon")
    assert warnings(EXPERT, lonely, policy) == [
        "1.yaml:1 LLMExpert default/b: is selected by no RoutingPolicy"
    ]


def test_warns_of_a_domain_that_no_policy_defines():
    text = EXPERT + "  quality:\n    domains:\n    - {name: coding, score: 1}\n"
    policy = POLICY + "  domains:\n  - {name: code, keywords: [def]}\n"
    (warning,) = warnings(text, policy)
    assert warning.startswith("0.yaml:12 LLMExpert default/qwen spec.quality.domains[0].name")
    assert warning.endswith("defines the domain coding; did you mean code?")


def test_warns_of_one_engine_declared_twice():
    first, second = warnings(expert("a"), expert("b"), POLICY)
    assert "spec.backend.addresses[0]: LLMExpert/default/a serves m there as well" in first
    assert "spec.backend.addresses[1]: LLMExpert/default/a serves m there as well" in second


def test_two_models_at_one_address_are_fine():
    assert warnings(expert("a", model="x"), expert("b", model="y"), POLICY) == []


# --- the examples ----------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted(p for p in EXAMPLES.iterdir() if p.is_dir()), ids=str)
def test_examples_compile_without_warnings(folder):
    files = {str(file): file.read_text() for file in sorted(folder.glob("*.yaml"))}
    compiled = compile_manifests(files)
    assert compiled.snapshots
    assert compiled.warnings == ()
