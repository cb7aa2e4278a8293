"""Snapshots: what they select, and that equal content means an equal version."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pointsman_core.resources import LLMExpert, RoutingPolicy
from pointsman_core.snapshot import (
    NO_VERSION,
    Snapshot,
    canonical_address,
    compile_snapshot,
    read_snapshot,
    selects,
    snapshot_json,
)

ENDPOINTS = {"a": ("10.0.0.2:1", "10.0.0.1:1"), "b": ("10.0.0.3:1",)}


def expert(name, *, namespace="default", labels=None, **spec):
    return LLMExpert.model_validate(
        {
            "metadata": {"name": name, "namespace": namespace, "labels": labels or {}},
            "spec": {"model": name, "backend": {"addresses": ["127.0.0.1:1"]}} | spec,
        }
    )


def policy(**spec):
    return RoutingPolicy.model_validate(
        {"metadata": {"name": "auto", "generation": 7}, "spec": {"models": ["auto"]} | spec}
    )


def test_candidates_are_ordered_whatever_order_they_come_in():
    forward = compile_snapshot(policy(), [expert("a"), expert("b")], ENDPOINTS)
    backward = compile_snapshot(
        policy(), [expert("b"), expert("a")], dict(reversed(ENDPOINTS.items()))
    )
    assert [(c.expert, c.address) for c in forward.candidates] == [
        ("a", "10.0.0.1:1"),
        ("a", "10.0.0.2:1"),
        ("b", "10.0.0.3:1"),
    ]
    assert forward == backward
    assert forward.generation == 7


def test_the_version_follows_the_content():
    before = compile_snapshot(policy(), [expert("a")], ENDPOINTS)
    again = compile_snapshot(policy(), [expert("a")], ENDPOINTS)
    assert before.version == again.version != "0" * 16
    changed = [
        compile_snapshot(policy(explainHeaders=True), [expert("a")], ENDPOINTS),
        compile_snapshot(policy(), [expert("a", expectedOutputTokens=1)], ENDPOINTS),
        compile_snapshot(policy(), [expert("a")], {"a": ("10.0.0.1:1",)}),
    ]
    assert len({before.version, *(snapshot.version for snapshot in changed)}) == 4


def test_an_expert_without_endpoints_gives_no_candidate():
    assert compile_snapshot(policy(), [expert("a"), expert("c")], {"a": ()}).candidates == ()


@pytest.mark.parametrize(
    ("labels", "namespace", "wanted", "chosen"),
    [
        ({}, "default", {}, True),
        ({"site": "x"}, "default", {}, True),
        ({"site": "x", "gpu": "y"}, "default", {"site": "x"}, True),
        ({"site": "x"}, "default", {"site": "x", "gpu": "y"}, False),
        ({"site": "other"}, "default", {"site": "x"}, False),
        ({"site": "x"}, "elsewhere", {"site": "x"}, False),
    ],
)
def test_selection(labels, namespace, wanted, chosen):
    one = expert("a", namespace=namespace, labels=labels)
    assert selects(policy(selector={"matchLabels": wanted}), one) is chosen


def test_a_snapshot_survives_json():
    spec = {"aliases": ["x"], "profile": {"kvCacheGiB": 5, "memoryBandwidthGBps": 1}}
    snapshot = compile_snapshot(policy(), [expert("a", **spec)], ENDPOINTS)
    assert Snapshot.model_validate_json(snapshot.model_dump_json()) == snapshot
    assert snapshot.candidates[0].served_models == ("a", "x")


def test_a_snapshot_cannot_be_changed():
    snapshot = compile_snapshot(policy(), [expert("a")], ENDPOINTS)
    with pytest.raises(ValidationError):
        snapshot.policy = "other"


@pytest.mark.parametrize(
    ("written", "want"),
    [
        ("10.0.0.1:8000", "10.0.0.1:8000"),
        ("10.0.0.1:08000", "10.0.0.1:8000"),
        ("[0:0:0:0:0:0:0:1]:80", "[::1]:80"),
        ("[2001:DB8::A]:80", "[2001:db8::a]:80"),
        ("nohost:80", "nohost:80"),
    ],
)
def test_addresses_have_one_spelling(written, want):
    assert canonical_address(written) == want


def test_two_spellings_of_an_address_are_one_candidate(build):
    snapshot = build.snapshot(build.expert("a", "[::1]:80", "[0:0::1]:80"))
    assert [c.address for c in snapshot.candidates] == ["[::1]:80"]


class TestReading:
    @pytest.fixture
    def content(self):
        spec = {"aliases": ["x"], "profile": {"kvCacheGiB": 5.1}}
        return compile_snapshot(policy(), [expert("a", **spec)], ENDPOINTS).model_dump_json()

    @given(
        limit=st.floats(1e-3, 6e5),
        score=st.floats(0, 1),
        word=st.text(min_size=1, max_size=9).filter(lambda w: w.isprintable()),
    )
    def test_gives_exactly_what_was_written(self, limit, score, word):
        rule = {"name": "code", "keywords": [word]}
        written = compile_snapshot(
            policy(qos={"latencyPerTokenMs": limit}, domains=[rule]),
            [expert("a", quality={"default": score})],
            ENDPOINTS,
        )
        read = read_snapshot(written.model_dump_json().encode())
        assert read == written
        assert read.model_dump_json() == written.model_dump_json()

    def test_spaces_do_not_matter(self, content):
        assert read_snapshot(json.dumps(json.loads(content), indent=2)).policy == "auto"

    def test_what_an_older_release_wrote_is_read(self, content):
        """As if aliases had come later: the writer's content, and so its version, lacks them."""
        old = json.loads(content) | {"version": NO_VERSION}
        for candidate in old["candidates"]:
            del candidate["aliases"]
        text = json.dumps(old, separators=(",", ":"))
        version = hashlib.sha256(text.encode()).hexdigest()[:16]
        read = read_snapshot(text.replace(NO_VERSION, version))
        assert read.version == version
        assert {candidate.aliases for candidate in read.candidates} == {()}
        # Passed on, as by an operator that was updated, it is still what its version says.
        assert read_snapshot(snapshot_json(read)) == read

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('"generation":7', '"generation":8', "but its content has"),
            ('"generation":7', '"generation":"7"', "generation: Input should be a valid integer"),
            ('"generation":7', '"age":7', r"Field required \(and 1 more\)"),
            ('"policy":"auto",', "", "policy: Field required"),
            ('"algorithm":"', '"algorithm":"New', "algorithm: Input should be"),
            ("{", "", "Invalid JSON"),
            ('"aliases":["x"],', "", "but its content has"),
        ],
    )
    def test_what_is_wrong_is_refused(self, old, new, message, content):
        assert old in content
        with pytest.raises(ValueError, match=message):
            read_snapshot(content.replace(old, new, 1))

    @pytest.mark.parametrize("content", [b"", b"\xff", b"null", b"[]", b"{}"])
    def test_what_is_none_is_refused(self, content):
        with pytest.raises(ValueError, match="is no snapshot"):
            read_snapshot(content)
