"""Prompts with the score of every expert's answer, in fixed splits by prompt.

The public corpus is LLMRouter's: the questions of its test.json are the test split and occur
nowhere else; those of train.json that repeat one of them, be it with other digits, case,
spaces or punctuation, are left out. The rest is divided into train and validation by a hash
of the normalised text, so near-duplicates stay on one side and no file order matters.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import orjson

from pointsman_common.data_folder import TEST_SCORES
from pointsman_core import workload
from pointsman_core.prediction import Keywords, detect_domain, fold_keywords
from pointsman_core.resources import DomainRule
from pointsman_core.state import BoolArray, FloatArray, IntArray
from pointsman_core.workload import QualityTable, WorkloadError, parse_quality
from pointsman_learning.workloads.folder import (
    ANSWERS,
    TASKS,
    TRAIN_SCORES,
    DataFolder,
    read_text,
)

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

VALIDATION_SHARE = 0.15
"""Share of the prompts outside the test split that are for validation. Ours."""

EDGE_EXPERTS = (
    "qwen2.5-7b-instruct",
    "codegemma-7b",
    "gemma-2-9b-it",
    "llama-3.1-8b-instruct",
    "llama3-chatqa-1.5-8b",
    "mistral-7b-instruct-v0.3",
)
"""The six of LLMRouter's nine models that are of edge size, 7 to 9 billion parameters."""

TASK_DOMAINS: Mapping[str, str] = {
    "mbpp": "code",
    "human_eval": "code",
    "gsm8k": "math",
    "math": "math",
    "agentverse-mgsm": "math",
    "agentverse-logicgrid": "logic",
    "gpqa": "research",
    "mmlu": "reading",
    "arc_challenge": "science",
    "openbook_qa": "science",
    "commonsense_qa": "commonsense",
    "natural_qa": "knowledge",
    "trivia_qa": "knowledge",
    "commongen": "writing",
}
"""Domain of each task, as examples/edge-site names them (``writing`` is not among those)."""
UNKNOWN_DOMAIN = "other"

TOKENS_PER_WORD = 1.33
"""By which the words of an answer are turned into tokens: no tokenizer is at hand."""
GUESSED_TOKENS = 150.0
"""Mean answer length of an expert of which no answer is at hand: a guess."""


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """P prompts with scores of X experts. Immutable but for a cache of told domains."""

    split: Split
    prompts: tuple[str, ...]
    experts: tuple[str, ...]
    """Model names of the experts, the columns of ``scores``."""
    scores: FloatArray
    """(P, X) score of each expert's answer, in [0, 1]; NaN where unknown."""
    tasks: tuple[str, ...]
    """(P,) name of the task that each prompt is from; "" where unknown."""
    domains: tuple[str, ...]
    """(P,) domain of each prompt, coarser than its task."""
    verbosity: FloatArray
    """(X,) mean length of the expert's answers, in tokens."""
    edge: BoolArray
    """(X,) whether the expert is of edge size."""
    output_tokens: FloatArray
    """(P, X) length of each answer, NaN where unknown (everywhere in the public corpus)."""
    source: str
    _told: dict[Keywords, IntArray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def relative_verbosity(self) -> FloatArray:
        """(X,) how much longer than others each expert answers; mean 1 over edge experts."""
        usual = self.verbosity[self.edge] if self.edge.any() else self.verbosity
        relative: FloatArray = self.verbosity / usual.mean()
        return relative

    @property
    def edge_experts(self) -> tuple[str, ...]:
        """Names of the experts of edge size."""
        return tuple(np.array(self.experts, dtype=object)[self.edge])

    def column(self, *names: str) -> int:
        """Column of the expert of one of these names.

        Raises WorkloadError when the corpus has no score of it.
        """
        found = workload.column_of(names, self.experts)
        if found is None:
            known = ", ".join(self.experts)
            raise WorkloadError(f"has no scores of {names[0]}; it has {known}", source=self.source)
        return found

    def take(self, rows: IntArray | BoolArray) -> "Corpus":
        """Those prompts only, in the order of ``rows``."""
        index = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return Corpus(
            split=self.split,
            prompts=tuple(self.prompts[i] for i in index),
            experts=self.experts,
            scores=self.scores[index],
            tasks=tuple(self.tasks[i] for i in index),
            domains=tuple(self.domains[i] for i in index),
            verbosity=self.verbosity,
            edge=self.edge,
            output_tokens=self.output_tokens[index],
            source=self.source,
        )

    def told_domains(self, rules: tuple[DomainRule, ...]) -> IntArray:
        """(P,) number of the rule whose keywords a prompt contains, -1 for none; cached."""
        keywords = fold_keywords(rules)
        if keywords not in self._told:
            number = {rule.name: index for index, rule in enumerate(rules)}
            told = (detect_domain(prompt, keywords) for prompt in self.prompts)
            self._told[keywords] = np.array(
                [-1 if name is None else number[name] for name in told], np.int64
            )
        return self._told[keywords]


def normalise(prompt: str) -> str:
    """Text by which near-duplicates are told: no case, digits, spaces or punctuation."""
    return re.sub(r"[\W\d_]+", " ", prompt.casefold()).strip()


def check_split(split: str) -> Split:
    """Return the split; raises WorkloadError when there is none of that name."""
    for known in SPLITS:
        if split == known:
            return known
    raise WorkloadError(f"must be one of {', '.join(SPLITS)} (got {split!r})", source="split")


def load_corpus(split: Split, folder: DataFolder | None = None) -> Corpus:
    """One split of LLMRouter's score set; read once per folder and process.

    Raises WorkloadError when there is no data folder, or the files in it are not those.
    """
    check_split(split)
    found = folder or DataFolder.require()
    return _load(str(found.path))[split]


@lru_cache(maxsize=4)
def _load(path: str) -> dict[Split, Corpus]:
    folder = DataFolder(Path(path))
    train = parse_quality(folder.read(TRAIN_SCORES), source=TRAIN_SCORES)
    test = parse_quality(folder.read(TEST_SCORES), source=TEST_SCORES)
    order = [test.experts.index(name) for name in train.experts]
    held_out = {normalise(prompt) for prompt in test.prompts}
    side = np.array([_side(prompt, held_out) for prompt in train.prompts], dtype=object)
    tasks = _tasks(folder)
    verbosity = _verbosity(folder, train.experts)

    def corpus(split: Split, table: QualityTable, rows: IntArray, columns: list[int]) -> Corpus:
        prompts = tuple(table.prompts[i] for i in rows)
        own = tuple(tasks.get(prompt, "") for prompt in prompts)
        return Corpus(
            split=split,
            prompts=prompts,
            experts=train.experts,
            scores=table.scores[rows][:, columns],
            tasks=own,
            domains=tuple(TASK_DOMAINS.get(task, UNKNOWN_DOMAIN) for task in own),
            verbosity=verbosity,
            edge=np.isin(train.experts, EDGE_EXPERTS),
            output_tokens=table.output_tokens[rows][:, columns],
            source=f"LLMRouter scores ({split} split)",
        )

    every = list(range(len(train.experts)))
    return {
        "train": corpus("train", train, np.flatnonzero(side == "train"), every),
        "validation": corpus("validation", train, np.flatnonzero(side == "validation"), every),
        "test": corpus("test", test, np.arange(len(test)), order),
    }


def _side(prompt: str, held_out: set[str]) -> str:
    text = normalise(prompt)
    if text in held_out:
        return "left out"
    return hashed_split(text, (("validation", VALIDATION_SHARE), ("train", 1.0)))


def hashed_split(text: str, shares: Sequence[tuple[Split, float]]) -> Split:
    """Split that a text belongs to, by its hash; the last one takes the rest."""
    position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    for split, share in shares:
        if position < share:
            return split
        position -= share
    return shares[-1][0]


def _tasks(folder: DataFolder) -> dict[str, str]:
    tasks: dict[str, str] = {}
    for path in TASKS:
        for row, entry in enumerate(_json_lines(folder.read(path), source=path), start=1):
            try:
                tasks.setdefault(entry["query"], entry["task_name"])
            except (KeyError, TypeError) as error:
                raise WorkloadError(
                    "must have query and task_name", source=path, row=row
                ) from error
    return tasks


def _json_lines(text: str, *, source: str) -> list[Any]:
    rows = []
    # Not splitlines(): JSON texts may hold other line separators as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(orjson.loads(line))
            except orjson.JSONDecodeError as error:
                raise WorkloadError(f"is not JSON: {error}", source=source, row=number) from error
    return rows


def _verbosity(folder: DataFolder, experts: tuple[str, ...]) -> FloatArray:
    """(X,) mean words x `TOKENS_PER_WORD` of the answers to Natural Questions."""
    words: dict[str, list[int]] = {}
    text = folder.read(ANSWERS)
    try:
        entries = orjson.loads(text)
        for entry in entries:
            for name, answer in zip(entry["llm_name_list"], entry["response_list"], strict=True):
                words.setdefault(name.rpartition("/")[2], []).append(len(answer.split()))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise WorkloadError(
            "must be a list of objects with llm_name_list and response_list", source=ANSWERS
        ) from error
    means = {name: TOKENS_PER_WORD * float(np.mean(counts)) for name, counts in words.items()}
    return np.array([means.get(name, GUESSED_TOKENS) for name in experts])


# --- A user's own ----------------------------------------------------------------------

USER_SHARES: tuple[tuple[Split, float], ...] = (("test", 0.4), ("validation", 0.15), ("train", 1.0))
"""Shares of a user's prompts; the last takes the rest."""


def user_corpus(file: Path, split: Split | None = None) -> Corpus:
    """A user's own quality table: CSV ``prompt,expert,score,output_tokens``, or LLMRouter's JSON.

    Without ``split`` all prompts are taken, and called test; else those of one split, by hash
    of the normalised text. ``output_tokens`` may be empty. Raises WorkloadError with file, row
    and column at the first bad cell.
    """
    table = parse_quality(read_text(file), source=file.name)
    corpus = _from_table(table, split="test" if split is None else check_split(split))
    if split is None:
        return corpus
    sides = [hashed_split(normalise(prompt), USER_SHARES) for prompt in corpus.prompts]
    rows = np.array([side == split for side in sides])
    if not rows.any():
        raise WorkloadError(f"has no prompt in the {split} split", source=file.name)
    return corpus.take(rows)


def _from_table(table: QualityTable, *, split: Split) -> Corpus:
    known = np.isfinite(table.output_tokens)
    counts = known.sum(axis=0)
    sums = np.where(known, table.output_tokens, 0.0).sum(axis=0)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)
    usual = means[counts > 0].mean() if (counts > 0).any() else GUESSED_TOKENS
    domains = table.domains or (UNKNOWN_DOMAIN,) * len(table)
    return Corpus(
        split=split,
        prompts=table.prompts,
        experts=table.experts,
        scores=table.scores,
        tasks=domains if table.domains else ("",) * len(table),
        domains=domains,
        verbosity=np.where(counts > 0, np.maximum(means, 1.0), usual),
        edge=np.ones(len(table.experts), np.bool_),
        output_tokens=np.where(known, np.maximum(table.output_tokens, 1.0), math.nan),
        source=table.source,
    )
