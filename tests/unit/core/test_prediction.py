"""The domain of a prompt, and what experts declare for it."""

import pytest

from pointsman_core.prediction import (
    PROMPT_CHARS_READ,
    DeclaredPriors,
    detect_domain,
    fold_keywords,
)
from pointsman_core.resources import DomainRule, DomainScore, QualityPriors

RULES = (
    DomainRule(name="code", keywords=["python", "def ", "function"]),
    DomainRule(name="math", keywords=["integral", "function", "STRASSE"]),
)


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("", None),
        ("Tell me a story.", None),
        ("A Python script", "code"),
        ("the integral of it", "math"),
        ("an integral of a function, in python", "code"),
        ("the integral of a function", "math"),
        ("a function", "code"),
        ("python python python, integral function", "code"),
        ("INTEGRAL and Straße", "math"),
        ("pythonic", "code"),
        ("x" * (PROMPT_CHARS_READ - 6) + "python", "code"),
        ("x" * (PROMPT_CHARS_READ - 5) + "python", None),
    ],
)
def test_the_domain_is_the_one_with_most_different_keywords(prompt, want):
    assert detect_domain(prompt, fold_keywords(RULES)) == want


def test_no_rules_no_domain():
    assert detect_domain("python", ()) is None


class TestDeclaredPriors:
    @pytest.fixture
    def priors(self, build) -> DeclaredPriors:
        scores = [DomainScore(name="code", score=0.9), DomainScore(name="law", score=0.1)]
        coder = QualityPriors(default=0.3, domains=scores)
        experts = [
            build.expert("coder", "10.0.0.1:1", "10.0.0.2:1", quality=coder),
            build.expert("any", "10.0.0.3:1", quality=QualityPriors(default=0.6)),
        ]
        return DeclaredPriors(build.snapshot(*experts, domains=list(RULES)))

    @pytest.mark.parametrize(
        ("desc", "prompt", "want"),
        [
            ("no domain: the default", "hello", [0.6, 0.3, 0.3]),
            ("a declared domain", "python", [0.6, 0.9, 0.9]),
            ("a domain that nobody declares", "integral", [0.6, 0.3, 0.3]),
            ("a declared domain that the policy does not tell apart", "law", [0.6, 0.3, 0.3]),
        ],
    )
    def test_in_the_order_of_candidates(self, desc, prompt, want, priors):
        assert priors.predict(prompt).quality.tolist() == want, desc
