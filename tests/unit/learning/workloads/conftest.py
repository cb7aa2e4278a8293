import json
from pathlib import Path

import pytest

from pointsman_common.data_folder import TEST_SCORES
from pointsman_learning.workloads.folder import ANSWERS, TASKS, TRAIN_SCORES


@pytest.fixture(autouse=True)
def _no_data(tmp_path_factory, monkeypatch):
    """Whatever data the machine has, these tests do without it."""
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path_factory.mktemp("empty")))


@pytest.fixture
def data_folder(tmp_path) -> Path:
    """A folder like LLMRouter's: 200 questions, of which the test file repeats some."""
    folder = tmp_path / "data"
    train = [(f"How many {word(i)} are {i} {word(i + 7)}?", i % 2) for i in range(200)]
    test = [
        (train[0][0], 0),  # the very same
        ("  how MANY b are 77 i!", 1),  # train[1] but for case, digits, spaces, punctuation
        ("Who was the first?", 1),
    ]
    write(folder / TRAIN_SCORES, [question(q, first=s, second=1 - s) for q, s in train])
    write(
        folder / TEST_SCORES,
        [{"question": q, "scores": {"codegemma-7b": 1 - s, "big-70b": s}} for q, s in test],
    )
    tasks = [("gsm8k", q) for q, _ in train] + [("trivia_qa", "Who was the first?")]
    lines = [json.dumps({"task_name": t, "query": q}, ensure_ascii=False) for t, q in tasks]
    text(folder / TASKS[0], "\n".join(lines))
    text(folder / TASKS[1], "")
    write(
        folder / ANSWERS,
        [
            {"llm_name_list": ["x/codegemma-7b", "x/other"], "response_list": ["a b c", "a"]},
            {"llm_name_list": ["x/other", "x/codegemma-7b"], "response_list": ["a", "a b c d e"]},
        ],
    )
    return folder


def question(prompt: str, *, first: float, second: float) -> dict:
    return {"question": prompt, "scores": {"big-70b": first, "codegemma-7b": second}}


def word(number: int) -> str:
    """A different word of letters for each number."""
    letters = ""
    while True:
        number, digit = divmod(number, 26)
        letters = chr(ord("a") + digit) + letters
        if not number:
            return letters
        number -= 1


def write(file: Path, content: object) -> None:
    text(file, json.dumps(content))


def text(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
