import numpy as np
import pytest

from pointsman_common.data_folder import user_folder
from pointsman_core.workload import WorkloadError
from pointsman_learning.workloads import SPLITS, DataFolder, load_corpus, normalise, user_corpus
from pointsman_learning.workloads.folder import ANSWERS, TASKS

QUALITY = """prompt,expert,score,output_tokens
one,a,1,10
one,b,0,
two,a,0.5,30
two,b,1,
"""


@pytest.fixture
def corpora(data_folder):
    return {split: load_corpus(split, DataFolder(data_folder)) for split in SPLITS}


def test_questions_of_the_test_file_are_nowhere_else(corpora):
    texts = {split: {normalise(p) for p in c.prompts} for split, c in corpora.items()}
    assert len(corpora["test"]) == 3
    assert not texts["test"] & (texts["train"] | texts["validation"])
    assert not texts["train"] & texts["validation"]
    # 200 less the same question and the one that differs in case, digits and spaces only.
    assert len(corpora["train"]) + len(corpora["validation"]) == 198
    assert len(corpora["validation"]) > 10


def test_scores_follow_the_expert_whatever_the_order_of_the_file(corpora):
    assert corpora["train"].experts == corpora["test"].experts == ("big-70b", "codegemma-7b")
    for corpus in corpora.values():
        np.testing.assert_array_equal(corpus.scores.sum(axis=1), 1.0)
    assert corpora["test"].scores[:, 0].tolist() == [0.0, 1.0, 1.0]


def test_tasks_domains_sizes_and_verbosity(corpora):
    train, test = corpora["train"], corpora["test"]
    assert set(train.tasks) == {"gsm8k"}
    assert set(train.domains) == {"math"}
    assert test.tasks == ("gsm8k", "", "trivia_qa")
    assert test.domains == ("math", "other", "knowledge")
    assert train.edge.tolist() == [False, True]
    assert train.edge_experts == ("codegemma-7b",)
    # Four words on average; nothing is known of the other expert.
    assert train.verbosity.tolist() == pytest.approx([150.0, 4 * 1.33])
    assert train.relative_verbosity[1] == pytest.approx(1.0)


def test_loading_again_gives_the_same(data_folder, corpora):
    from pointsman_learning.workloads import corpus as module

    module._load.cache_clear()
    again = load_corpus("train", DataFolder(data_folder))
    assert again is not corpora["train"]
    assert again.prompts == corpora["train"].prompts


def test_taking_some_prompts(corpora):
    test = corpora["test"]
    some = test.take(np.array([2, 0]))
    assert some.prompts == (test.prompts[2], test.prompts[0])
    np.testing.assert_array_equal(some.scores, test.scores[[2, 0]])
    assert test.take(np.array([True, False, False])).prompts == test.prompts[:1]


def test_unknown_expert(corpora):
    assert corpora["test"].column("google/CodeGemma-7b") == 1
    with pytest.raises(WorkloadError, match="no scores of c; it has big-70b, codegemma-7b"):
        corpora["test"].column("c", "d")


def test_unknown_split(data_folder):
    with pytest.raises(WorkloadError, match="must be one of train, validation, test"):
        load_corpus("dev", DataFolder(data_folder))


def test_missing_file_says_what_to_do(data_folder):
    (data_folder / ANSWERS).unlink()
    with pytest.raises(WorkloadError, match=r"nq\.json: is not there: run `pointsman data fetch"):
        load_corpus("train", DataFolder(data_folder))


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        (ANSWERS, "[{}]", "must be a list of objects with llm_name_list and response_list"),
        (ANSWERS, "no", "must be a list of objects"),
        (TASKS[0], '{"query": "a"}', "row 1: must have query and task_name"),
        (TASKS[1], "\n{", "row 2: is not JSON"),
    ],
)
def test_wrong_files(data_folder, path, content, message):
    (data_folder / path).write_text(content)
    with pytest.raises(WorkloadError, match=message):
        load_corpus("train", DataFolder(data_folder))


def test_where_the_folder_is(tmp_path, monkeypatch):
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path / "nothing"))
    with pytest.raises(WorkloadError, match=r"POINTSMAN_DATA=.*nothing is not a folder"):
        DataFolder.find()
    monkeypatch.delenv("POINTSMAN_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr("pointsman_common.data_folder.checkout", lambda: tmp_path / "somewhere")
    assert DataFolder.find() is None
    with pytest.raises(WorkloadError, match="run `pointsman data fetch`, or set POINTSMAN_DATA"):
        DataFolder.require()
    user_folder().mkdir()
    assert DataFolder.find() == DataFolder(tmp_path / "pointsman")
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert DataFolder.find() == DataFolder(tmp_path / "shared" / "data")


def test_own_quality_table(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text(QUALITY)
    corpus = user_corpus(file)
    assert (corpus.split, corpus.experts, len(corpus)) == ("test", ("a", "b"), 2)
    # Lengths of "b" are unknown: taken for the usual.
    assert corpus.verbosity.tolist() == [20.0, 20.0]
    assert corpus.edge.all()
    np.testing.assert_array_equal(corpus.output_tokens[:, 0], [10.0, 30.0])
    assert np.isnan(corpus.output_tokens[:, 1]).all()


def test_own_quality_table_in_splits(tmp_path):
    file = tmp_path / "own.csv"
    rows = [f"prompt {chr(97 + i // 20)}{chr(97 + i % 20)},a,1,\n" for i in range(300)]
    file.write_text("prompt,expert,score,output_tokens\n" + "".join(rows))
    parts = [set(user_corpus(file, split).prompts) for split in SPLITS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 300
    assert min(map(len, parts)) > 20


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("two,b,1,", "two,b,1.5,", r"own\.csv, row 5, column score: must be a number from 0 to 1"),
        ("one,a,1,10", "one,a,1,ten", r"own\.csv, row 2, column output_tokens"),
        ("prompt,expert", "question,expert", r"own\.csv, row 1: the header must be prompt,expert"),
    ],
)
def test_wrong_quality_table(tmp_path, old, new, message):
    file = tmp_path / "own.csv"
    file.write_text(QUALITY.replace(old, new))
    with pytest.raises(WorkloadError, match=message):
        user_corpus(file)


def test_quality_table_that_is_not_there(tmp_path):
    with pytest.raises(WorkloadError, match=r"own\.csv: cannot be read"):
        user_corpus(tmp_path / "own.csv")
