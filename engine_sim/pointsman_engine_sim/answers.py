"""What a simulated engine says, and for how long: a function of seed, model and prompt."""

import hashlib
import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import orjson

LENGTH_SIGMA = 0.7
"""Spread of answer lengths: standard deviation of their logarithm. Our own choice."""
CHARACTERS_PER_TOKEN = 4
"""Usual rule of thumb for English text and subword tokenizers."""

_WORDS = (
    *("able", "about", "after", "along", "around", "because", "before", "between"),
    *("bridge", "bright", "carries", "certain", "change", "clear", "corner", "distance"),
    *("early", "enough", "evening", "every", "field", "follow", "forward", "from"),
    *("garden", "gentle", "given", "green", "ground", "harbour", "however", "inside"),
    *("into", "journey", "large", "letter", "light", "little", "longer", "many"),
    *("measure", "moment", "morning", "mountain", "nearly", "never", "often", "other"),
    *("paper", "passing", "people", "quiet", "rather", "reach", "river", "signal"),
    *("simple", "station", "steady", "stone", "table", "through", "track", "window"),
)
_VOCABULARY = tuple(f" {word}" for word in _WORDS)
_VOCABULARY_JSON = tuple(word.encode() for word in _VOCABULARY)
_STRIDES = (5, 11, 19, 27, 37, 43, 51, 59)  # odd: each visits all 64 words


def count_tokens(text: str) -> int:
    """Estimate the tokens of a text; at least 1, since engines add special tokens."""
    return max(1, math.ceil(len(text) / CHARACTERS_PER_TOKEN))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """An answer that ends at a text: as in vLLM, the token that completes it is the last one.

    The text itself is not part of the answer.
    """

    tokens: int
    """Tokens that are made."""
    characters: int
    """Length of the answer."""
    whole_tokens: int
    """Tokens that are in it completely."""
    rest: int
    """Characters of the next one that are in it."""


class Answer:
    """The endless text that one prompt gets from one model; token ``i`` is one word."""

    def __init__(self, *, model: str, prompt: str, seed: int) -> None:
        digest = hashlib.blake2b(f"{seed}\0{model}\0{prompt}".encode(), digest_size=16)
        self._key = int.from_bytes(digest.digest(), "big")
        self._start = self._key % len(_VOCABULARY)
        self._stride = _STRIDES[(self._key >> 8) % len(_STRIDES)]
        self._opening = ("Simulated", " answer", " of", f" {model}:")
        self._opening_json = tuple(orjson.dumps(word)[1:-1] for word in self._opening)

    def token(self, index: int) -> str:
        """Text of token ``index``, counted from 0, with its leading space."""
        if index < len(self._opening):
            return self._opening[index]
        return _VOCABULARY[self._pick(index)]

    def token_json(self, index: int) -> bytes:
        """Text of token ``index`` as the inside of a JSON string."""
        if index < len(self._opening_json):
            return self._opening_json[index]
        return _VOCABULARY_JSON[self._pick(index)]

    def text(self, tokens: int) -> str:
        """First ``tokens`` tokens in one string."""
        return "".join(map(self.token, range(tokens)))

    def stopped(self, tokens: int, stops: Sequence[str], *, least: int = 0) -> Cut | None:
        """Where the first of some texts ends the answer, of which ``least`` tokens are passed over.

        None where none does within ``tokens``.
        """
        text = self.text(tokens)
        start = len(self.text(least))
        found = [(at + len(stop), at) for stop in stops if (at := text.find(stop, start)) >= 0]
        if not found:
            return None
        end, characters = min(found)
        ends = list(accumulate(len(self.token(index)) for index in range(tokens)))
        whole = bisect_right(ends, characters)
        return Cut(
            tokens=bisect_left(ends, end) + 1,
            characters=characters,
            whole_tokens=whole,
            rest=characters - (ends[whole - 1] if whole else 0),
        )

    def natural_tokens(self, mean: float) -> int:
        """Length at which the answer stops by itself: lognormal with this mean, at least 1."""
        mu = math.log(mean) - LENGTH_SIGMA**2 / 2
        return max(1, round(random.Random(self._key).lognormvariate(mu, LENGTH_SIGMA)))

    def _pick(self, index: int) -> int:
        return (self._start + index * self._stride) % len(_VOCABULARY)
