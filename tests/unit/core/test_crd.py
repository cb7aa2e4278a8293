"""The generated CRDs: up to date, structural, bounded, and of one mind with the models.

The rules of structural schemas are those of the API server's own validation
(k8s.io/apiextensions-apiserver, validation and schema packages).
"""

import copy
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import Field

from pointsman_core import crd
from pointsman_core.crd import KINDS, build_crd, generate_crds, object_schema
from pointsman_core.crd_reference import generate_reference
from pointsman_core.resources import (
    LABEL_KEY_PATTERN,
    PATTERN_MEANINGS,
    VALIDATIONS,
    LLMExpert,
    Resource,
)

ROOT = Path(__file__).parents[3]

KEYWORDS = {*crd.COPIED, "exclusiveMinimum", "exclusiveMaximum", "items", "properties"}
KEYWORDS |= {"additionalProperties"}

MINIMAL = {
    "LLMExpert": {"model": "m", "backend": {"addresses": ["127.0.0.1:80"]}},
    "RoutingPolicy": {"models": ["auto"]},
}


def nodes(schema, path="$"):
    """Every schema node with its path."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield from nodes(schema[keyword], f"{path}[{keyword}]")


each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def offending(kind, is_wrong):
    """Paths of the nodes of a kind that a rule does not hold for."""
    return [path for path, node in nodes(object_schema(kind.model)) if is_wrong(path, node)]


def with_defaults(schema, value):
    """The value as the API server completes it."""
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            if name not in value and "default" in child:
                value[name] = copy.deepcopy(child["default"])
            if name in value:
                value[name] = with_defaults(child, value[name])
    elif isinstance(value, list):
        value = [with_defaults(schema["items"], item) for item in value]
    return value


def as_json_schema(schema):
    """OpenAPI's flags as JSON schema's bounds, so that jsonschema can check values."""
    result = {key: value for key, value in schema.items() if not key.startswith("x-")}
    for bound in ("minimum", "maximum"):
        if result.pop(f"exclusive{bound.capitalize()}", False):
            result[f"exclusive{bound.capitalize()}"] = result.pop(bound)
    for keyword in ("items", "additionalProperties"):
        if keyword in result:
            result[keyword] = as_json_schema(result[keyword])
    if "properties" in result:
        result["properties"] = {k: as_json_schema(v) for k, v in result["properties"].items()}
        result["additionalProperties"] = False
    return result


def test_committed_crds_are_up_to_date():
    committed = {file.name: file.read_text() for file in (ROOT / "crds").glob("*.yaml")}
    assert committed == generate_crds(), "run `make generate`"


def test_committed_reference_is_up_to_date():
    assert (ROOT / "docs/crds.md").read_text() == generate_reference(), "run `make generate`"


@each_kind
def test_every_node_is_structural(kind):
    types = {"object", "array", "string", "integer", "number", "boolean"}

    def is_wrong(_path, node):
        return (
            node["type"] not in types
            or not node.keys() <= KEYWORDS
            or {"properties", "additionalProperties"} <= node.keys()
            or (node["type"] == "array") != ("items" in node)
            or not set(node.get("required", ())) <= node.get("properties", {}).keys()
        )

    assert offending(kind, is_wrong) == []


@each_kind
def test_everything_is_bounded(kind):
    def is_wrong(path, node):
        bounds = {
            "array": {"maxItems"},
            "string": {"maxLength", "enum", "format"},
            "number": {"maximum"},
            "integer": {"minimum"},
            "boolean": {"type"},
            "object": {"properties", "maxProperties"},
        }[node["type"]]
        by_the_api_server = path in ("$.apiVersion", "$.kind", "$.metadata")
        return not by_the_api_server and not bounds & node.keys()

    assert offending(kind, is_wrong) == []


@each_kind
def test_everything_is_described(kind):
    def is_wrong(path, node):
        of_items = path.endswith(("[items]", "[additionalProperties]"))
        exempt = of_items or path == "$.metadata"
        return not exempt and not node.get("description", "").endswith(".")

    assert offending(kind, is_wrong) == []


@each_kind
def test_lists_say_how_they_merge(kind):
    def is_wrong(_path, node):
        if node["type"] != "array":
            return False
        if node["x-kubernetes-list-type"] == "set":
            return node["items"]["type"] != "string"
        return not set(node["x-kubernetes-list-map-keys"]) <= set(node["items"]["required"])

    assert offending(kind, is_wrong) == []


@each_kind
def test_rules_are_complete(kind):
    def is_wrong(_path, node):
        return any(
            rule.keys() != {"rule", "message"} or "self" not in rule["rule"] or not rule["message"]
            for rule in node.get(VALIDATIONS, ())
        )

    assert offending(kind, is_wrong) == []


@each_kind
def test_patterns_are_rules_with_words(kind):
    """The API server quotes a `pattern`; of a rule it says the message."""

    def is_wrong(_path, node):
        return "pattern" in node or any(
            "matches(" in rule["rule"] and len(rule["message"]) < 10
            for rule in node.get(VALIDATIONS, ())
        )

    assert offending(kind, is_wrong) == []


@pytest.mark.parametrize("pattern", [*PATTERN_MEANINGS, LABEL_KEY_PATTERN])
def test_patterns_are_plain_re2(pattern):
    # RE2 has no look-around and no back-references; \d and \w differ between engines.
    assert re.search(r"\(\?|\\[1-9dwsb]", pattern) is None
    assert pattern.startswith("^")
    assert pattern.endswith("$")
    # It stands in CEL as r'…'.
    assert "'" not in pattern


@each_kind
def test_defaults_are_valid_and_those_of_the_models(kind):
    spec_schema = object_schema(kind.model)["properties"]["spec"]
    completed = with_defaults(spec_schema, copy.deepcopy(MINIMAL[kind.name]))
    jsonschema.Draft202012Validator(as_json_schema(spec_schema)).validate(completed)
    meta = {"name": "x"}
    from_api_server = kind.model.model_validate({"metadata": meta, "spec": completed})
    from_file = kind.model.model_validate({"metadata": meta, "spec": MINIMAL[kind.name]})
    assert from_api_server == from_file
    # Nothing that the models fill in is left to them alone.
    dumped = from_file.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert _without_empty(dumped) == _without_empty(completed)


def _without_empty(value):
    if isinstance(value, dict):
        slim = {key: _without_empty(item) for key, item in value.items()}
        return {key: item for key, item in slim.items() if item not in ({}, [])}
    return value


def test_the_model_of_an_expert_is_immutable():
    spec = object_schema(LLMExpert)["properties"]["spec"]
    rules = [rule["rule"] for rule in spec["properties"]["model"][VALIDATIONS]]
    assert "self == oldSelf" in rules


@each_kind
def test_the_definition_around_the_schema(kind):
    definition = build_crd(kind)
    spec = definition["spec"]
    assert definition["metadata"]["name"] == f"{spec['names']['plural']}.{spec['group']}"
    assert spec["scope"] == "Namespaced"
    assert spec["names"]["categories"] == ["pointsman"]
    (version,) = spec["versions"]
    assert version["subresources"] == {"status": {}}
    columns = version["additionalPrinterColumns"]
    assert {"Ready", "Reason", "Age"} <= {column["name"] for column in columns}


@each_kind
def test_columns_show_fields_that_exist(kind):
    for column in kind.columns:
        schema = object_schema(kind.model)
        path = re.sub(r"\[\?\(@\.type==\"Ready\"\)\]", ".0", column.path)
        for part in path.strip(".").split("."):
            if part == "creationTimestamp":
                break
            schema = schema["items"] if part == "0" else schema["properties"].get(part, {})
            assert schema


def test_yaml_carries_no_anchors():
    for text in generate_crds().values():
        assert not any(
            isinstance(token, (yaml.AnchorToken, yaml.AliasToken)) for token in yaml.scan(text)
        )


class _Union(Resource):
    value: int | str = 1


class _Unknown(Resource):
    value: int = Field(default=1, json_schema_extra={"examples": [1]})


@pytest.mark.parametrize(
    ("model", "message"), [(_Union, "union"), (_Unknown, "examples")], ids=["union", "keyword"]
)
def test_what_has_no_structural_form_is_an_error(model, message):
    with pytest.raises(ValueError, match=message):
        object_schema(model)


def test_the_reference_shows_every_field_and_rule():
    text = generate_reference()
    for kind in KINDS:
        for path, node in nodes(object_schema(kind.model)["properties"]["spec"], "spec"):
            shown = path.replace("[items]", "[]").replace("[additionalProperties]", "")
            if not shown.endswith("[]"):
                assert f"| `{shown}` |" in text
            for rule in node.get(VALIDATIONS, []):
                assert rule["message"].removeprefix(crd.MUST_BE) in text
