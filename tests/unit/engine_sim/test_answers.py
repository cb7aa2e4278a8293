import statistics

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman_engine_sim.answers import Answer, count_tokens


def make_answer(prompt="hello", *, model="tiny", seed=0):
    return Answer(model=model, prompt=prompt, seed=seed)


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 1), ("a", 1), ("abcd", 1), ("abcde", 2), ("ä" * 8, 2)]
)
def test_four_characters_are_about_a_token(text, tokens):
    assert count_tokens(text) == tokens


def test_text_says_at_once_that_it_is_simulated():
    assert (
        make_answer(model="org/coder-7b").text(6).startswith("Simulated answer of org/coder-7b: ")
    )
    assert make_answer().text(1) == "Simulated"


@given(tokens=st.integers(0, 300), prompt=st.text())
def test_token_is_the_same_alone_in_json_and_in_the_whole(tokens, prompt):
    answer = make_answer(prompt, model='odd "name"\n')
    whole = answer.text(tokens)
    assert "".join(answer.token(i) for i in range(tokens)) == whole
    in_json = b'"%b"' % b"".join(answer.token_json(i) for i in range(tokens))
    assert orjson.loads(in_json) == whole


def test_same_prompt_gives_the_same_answer_and_others_another():
    answer = make_answer()
    same = make_answer()
    assert (answer.text(50), answer.natural_tokens(100)) == (
        same.text(50),
        same.natural_tokens(100),
    )
    others = [make_answer(seed=1), make_answer("bye"), make_answer(model="big")]
    assert len({a.natural_tokens(1000) for a in (answer, *others)}) == 4


def test_lengths_have_the_mean_they_should():
    lengths = [make_answer(str(i)).natural_tokens(200) for i in range(4000)]
    assert statistics.mean(lengths) == pytest.approx(200, rel=0.05)
    assert min(lengths) >= 1


def test_shortest_answer_has_a_token():
    assert min(make_answer(str(i)).natural_tokens(1) for i in range(200)) == 1


class TestStopped:
    """The answer reads ``Simulated answer of tiny: …``, a token a word."""

    @pytest.fixture
    def answer(self):
        return Answer(model="tiny", prompt="hello", seed=0)

    @pytest.mark.parametrize(
        ("stops", "want"),
        [
            (["answer"], (2, 10)),
            ([" ans"], (2, 9)),
            (["d answer o"], (3, 8)),
            (["of", "ulat"], (1, 3)),
            (["Simulated"], (1, 0)),
            (["no such"], None),
            ([], None),
        ],
    )
    def test_at_the_first_text_that_is_complete(self, answer, stops, want):
        cut = answer.stopped(20, stops)
        assert (cut and (cut.tokens, cut.characters)) == want

    def test_not_beyond_its_length_nor_before_the_least(self, answer):
        assert answer.stopped(1, ["answer"]) is None
        assert answer.stopped(20, [" of"], least=3) is None
