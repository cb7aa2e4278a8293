"""What a fast predictor sees of a prompt: hashed n-grams and a few counts.

No Python loop runs over the text: n-grams of bytes and words are hashed by whole-array
arithmetic on unsigned integers that wrap. Long prompts are read at their two ends only, so
the cost is bounded. Ours; hashing features after Weinberger et al. (2009).

A model is only as good as the equality of the features it was trained and is served with:
`SCHEMA` names this layout, and artefacts carry it.
"""

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]

HEAD_CHARS: Final = 1024
TAIL_CHARS: Final = 512
"""Characters read at the start and at the end of a longer prompt."""

WORD_BUCKETS: Final = 4096
BYTE_BUCKETS: Final = 4096
"""Buckets of word 1- and 2-grams, and of byte 3-, 4- and 5-grams; powers of two."""

_COUNTED: Final = (
    b"?", b"$", b"\\", b"{}", b"()", b"[]", b",", b".", b":;", b'"', b"'", b"_", b"=", b"+-*/^",
    b"<>", b"\n", b" \t", b"0123456789", b"abcdefghijklmnopqrstuvwxyz",
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
)  # fmt: skip
"""Kinds of characters counted; all bytes beyond ASCII are one more kind."""

_KINDS: Final = len(_COUNTED) + 1
SHAPE_FEATURES: Final = 2 * _KINDS + 5
"""Logarithms and shares of those counts, length, words, and how the prompt begins and ends."""

FEATURES: Final = WORD_BUCKETS + BYTE_BUCKETS + SHAPE_FEATURES
"""Columns of `features`: word buckets, byte buckets, shape features."""

_HASH: Final = np.uint32(0x9E3779B1)
_BASE: Final = np.uint64(0x100000001B3)
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)
_WORD_SHIFT: Final = np.uint64(64 - (WORD_BUCKETS.bit_length() - 1))
_BYTE_SHIFT: Final = np.uint32(32 - (BYTE_BUCKETS.bit_length() - 1))
# UTF-8 takes at most 4 bytes a character; the joint between head and tail is one more.
_LONGEST: Final = 4 * (HEAD_CHARS + TAIL_CHARS) + 1


def _powers() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Powers of the base and their inverses, modulo 2**64 (odd numbers have inverses there)."""
    inverse = np.uint64(pow(int(_BASE), -1, 2**64))
    ones = np.ones(_LONGEST + 1, np.uint64)
    ones[0] = 1
    up, down = ones.copy(), ones
    up[1:], down[1:] = _BASE, inverse
    return np.multiply.accumulate(up), np.multiply.accumulate(down)


_UP, _DOWN = _powers()


def _byte_tables() -> tuple[bytes, NDArray[np.float64]]:
    every = np.arange(256, dtype=np.uint8)
    kinds = np.zeros((256, _KINDS))
    for column, characters in enumerate(_COUNTED):
        kinds[list(characters), column] = 1.0
    kinds[128:, -1] = 1.0
    in_word = (kinds[:, -4:].sum(axis=1) > 0) | (every == ord("'"))
    return in_word.tobytes(), kinds


_IN_WORD, _KIND_OF = _byte_tables()


def features(prompt: str, out: Float32Array | None = None) -> Float32Array:
    """(FEATURES,) of a prompt: 1 for every n-gram that occurs, then the shape features.

    ``out``, all zeros, is written to if given.
    """
    found = np.zeros(FEATURES, np.float32) if out is None else out
    text = _bounded(prompt)
    raw = np.frombuffer(text, np.uint8)
    small = text.lower()  # of bytes, that is of ASCII only
    lower = np.frombuffer(small, np.uint8)
    starts, ends = _words(small)
    if len(starts):
        found[_word_buckets(lower, starts, ends)] = 1.0
    if len(lower) >= 3:
        found[WORD_BUCKETS : WORD_BUCKETS + BYTE_BUCKETS][_byte_buckets(lower)] = 1.0
    found[WORD_BUCKETS + BYTE_BUCKETS :] = _shape(prompt, raw, words=len(starts))
    return found


def feature_matrix(prompts: Sequence[str]) -> Float32Array:
    """(P, FEATURES), a row per prompt."""
    rows = np.zeros((len(prompts), FEATURES), np.float32)
    for prompt, row in zip(prompts, rows, strict=True):
        features(prompt, row)
    return rows


def _bounded(prompt: str) -> bytes:
    if len(prompt) > HEAD_CHARS + TAIL_CHARS:
        prompt = f"{prompt[:HEAD_CHARS]}\n{prompt[-TAIL_CHARS:]}"
    # What is not text (a lone surrogate in JSON) must cost no request.
    return prompt.encode("utf-8", "replace")


def _words(text: bytes) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Start and end of each run of letters, digits and apostrophes."""
    edge = np.frombuffer(b"\0" + text.translate(_IN_WORD) + b"\0", np.int8)
    change = (edge[1:] != edge[:-1]).nonzero()[0]
    return change[0::2], change[1::2]


def _word_buckets(
    lower: NDArray[np.uint8], starts: NDArray[np.intp], ends: NDArray[np.intp]
) -> NDArray[np.intp]:
    """Buckets of words, of pairs of neighbours, and of the first and last words as such."""
    sums = np.zeros(len(lower) + 1, np.uint64)
    ((lower + np.uint64(1)) * _UP[: len(lower)]).cumsum(out=sums[1:])
    words = (sums[ends] - sums[starts]) * _DOWN[starts] * _MIX
    pairs = words[:-1] * np.uint64(3) + words[1:]
    places = np.concatenate((words[:2] * np.uint64(5), words[-1:] * np.uint64(7)))
    hashes = np.concatenate((words, pairs, places))
    buckets = (hashes ^ (hashes >> np.uint64(29))) * _MIX >> _WORD_SHIFT
    placed: NDArray[np.intp] = buckets.astype(np.intp)
    return placed


def _byte_buckets(lower: NDArray[np.uint8]) -> NDArray[np.intp]:
    wide = lower.astype(np.uint32)
    three = wide[:-2] | wide[1:-1] << np.uint32(8) | wide[2:] << np.uint32(16)
    four = three[:-1] | wide[3:] << np.uint32(24)
    five = four[:-1] * _HASH + wide[4:]
    hashes = np.concatenate((three, four, five))
    hashes *= _HASH
    hashes ^= hashes >> np.uint32(15)
    hashes *= _HASH
    hashes >>= _BYTE_SHIFT
    return hashes.astype(np.intp)


def _shape(prompt: str, raw: NDArray[np.uint8], *, words: int) -> NDArray[np.float64]:
    counts = np.bincount(raw, minlength=256) @ _KIND_OF
    first, last = prompt[:1], prompt[-TAIL_CHARS:].rstrip()[-1:]
    return np.concatenate(
        (
            np.log1p(counts),
            counts / max(len(raw), 1),
            (
                np.log1p(len(prompt)),
                np.log1p(words),
                float(first.isupper()),
                float(last == "?"),
                float(last == "."),
            ),
        )
    )


_PROBE: Final = (
    "Q: What's the 3rd power of 2?\nA) 6 B) 8; write $x_1 = {n}^3$, \u00e9t\u00e9 \\boxed{...}.\n"
    * 40
)


def _schema() -> str:
    """Digest of what the code makes of a text that every part of it has a say in."""
    found = features(_PROBE)
    where = np.flatnonzero(found[: WORD_BUCKETS + BYTE_BUCKETS]).astype("<i4").tobytes()
    shape = np.rint(found[WORD_BUCKETS + BYTE_BUCKETS :] * 1000).astype("<i4").tobytes()
    return hashlib.sha256(where + shape + f"{FEATURES}".encode()).hexdigest()[:16]


SCHEMA: Final = _schema()
"""Names this layout: any change of what `features` answers changes it."""
