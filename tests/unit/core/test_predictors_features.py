import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman_core.predictors import FEATURES, SCHEMA, feature_matrix, features
from pointsman_core.predictors.features import (
    BYTE_BUCKETS,
    HEAD_CHARS,
    TAIL_CHARS,
    WORD_BUCKETS,
)

GRAMS = WORD_BUCKETS + BYTE_BUCKETS


@given(st.text(max_size=300))
def test_any_text_has_finite_features(text):
    found = features(text)
    assert found.shape == (FEATURES,)
    assert np.isfinite(found).all()
    assert set(np.unique(found[:GRAMS])) <= {0.0, 1.0}


def test_the_empty_prompt_has_no_grams():
    assert features("")[:GRAMS].sum() == 0


def test_a_lone_surrogate_is_no_error():
    assert np.isfinite(features("a \ud800 b")).all()


def test_a_word_hashes_alike_wherever_it_stands():
    alone = set(np.flatnonzero(features("one zebra two")[:WORD_BUCKETS]))
    moved = set(np.flatnonzero(features("it was, I think: one zebra two!")[:WORD_BUCKETS]))
    # All but the marks of the first two words and the pairs across them.
    assert len(alone & moved) >= 5


def test_grams_ignore_case_but_shape_does_not():
    lower, upper = features("what is this"), features("WHAT IS THIS")
    assert (lower[:GRAMS] == upper[:GRAMS]).all()
    assert (lower[GRAMS:] != upper[GRAMS:]).any()


def test_word_hashes_are_those_of_a_plain_loop():
    text = "count these words"
    mask = 2**64 - 1

    def mixed(value):
        return ((value ^ (value >> 29)) * 0x9E3779B97F4A7C15 & mask) >> (
            64 - (WORD_BUCKETS.bit_length() - 1)
        )

    def word(letters):
        total = sum((byte + 1) * pow(0x100000001B3, i, 2**64) for i, byte in enumerate(letters))
        return total * 0x9E3779B97F4A7C15 & mask

    hashes = [word(one.encode()) for one in text.split()]
    pairs = [(a * 3 + b) & mask for a, b in itertools.pairwise(hashes)]
    places = [hashes[0] * 5 & mask, hashes[1] * 5 & mask, hashes[2] * 7 & mask]
    expected = {mixed(value) for value in hashes + pairs + places}
    assert set(np.flatnonzero(features(text)[:WORD_BUCKETS])) == expected


def test_only_the_ends_of_a_long_prompt_are_read():
    head, tail = "a" * HEAD_CHARS, "b" * TAIL_CHARS
    one = features(head + "x" * 5000 + tail)
    other = features(head + "y" * 5000 + tail)
    assert (one == other).all()


@pytest.mark.parametrize("place", [0, -1])
def test_the_ends_of_a_long_prompt_are_read(place):
    text = ["filler "] * 2000
    plain = features("".join(text))
    text[place] = "zebra! "
    assert (features("".join(text)) != plain).any()


def test_rows_of_a_matrix_are_the_prompts_features():
    prompts = ["one", "two words", ""]
    assert (feature_matrix(prompts) == np.array([features(p) for p in prompts])).all()


def test_the_layout_did_not_change_unnoticed():
    # Artefacts name it: after a change all of them, the shipped one too, are trained again.
    assert SCHEMA == "e55c95c01303e570"
