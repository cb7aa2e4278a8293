import numpy as np
import pytest

from pointsman_cli.demo.data import (
    SiteGrader,
    column_of,
    data_folder,
    load_traces,
    make_workload,
    mean_input_tokens,
)
from pointsman_cli.demo.errors import DemoError
from pointsman_cli.demo.options import WorkloadName
from pointsman_cli.demo.site import Site, load_site
from pointsman_common.data_folder import TEST_SCORES, TRACES
from pointsman_core.workload import WorkloadError

MANIFESTS = """
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {name: qwen2-5-7b}
spec:
  model: Qwen/Qwen2.5-7B
  backend: {addresses: ["127.0.0.1:1"]}
---
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {name: unheard-of}
spec:
  model: unheard-of
  backend: {addresses: ["127.0.0.1:2"]}
  quality: {default: 0.25, domains: [{name: code, score: 1.0}]}
---
apiVersion: pointsman.dev/v1alpha1
kind: RoutingPolicy
metadata: {name: auto}
spec:
  models: [auto]
  domains: [{name: code, keywords: [function]}]
"""
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02}.5,{100 * second},5\n" for second in range(10, 20)
)
QUESTIONS = (
    '[{"question": "Write a function", "scores": {"qwen2.5-7b": 0.75}},'
    ' {"question": "Who?", "scores": {"qwen2.5-7b": 0.5, "other": 1}}]'
)


@pytest.fixture
def site() -> Site:
    return load_site({"site.yaml": MANIFESTS})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for name, text in ((TRACES[WorkloadName.AZURE_CONV], TRACE), (TEST_SCORES, QUESTIONS)):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(text)
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def grader(site) -> tuple[SiteGrader, tuple[str, ...]]:
    traces = load_traces(WorkloadName.AUTO)
    workload = make_workload(traces, site, requests=4, rate=2.0, seed=0)
    return SiteGrader(site, workload), workload.prompts


def test_auto_takes_real_data_where_present(site):
    traces = load_traces(WorkloadName.AUTO)
    workload = make_workload(traces, site, requests=4, rate=2.0, seed=0)
    assert workload.description.startswith("composed: arrivals")
    assert "AzureLLMInferenceTrace_conv.csv" in workload.description
    assert TEST_SCORES in workload.description
    assert mean_input_tokens(workload, 100) == 100.0


def test_auto_falls_back_to_the_generator(site, folder):
    (folder / TEST_SCORES).unlink()
    traces = load_traces(WorkloadName.AUTO)
    assert traces is None
    workload = make_workload(traces, site, requests=4, rate=2.0, seed=0)
    assert workload.description.startswith("synthetic")
    assert workload.table.experts == ("qwen2-5-7b", "unheard-of")
    is_code = np.array([domain == "code" for domain in workload.table.domains])
    assert (workload.scores[is_code, 1] == 1).all()


def test_synthetic_needs_no_data():
    assert load_traces(WorkloadName.SYNTHETIC) is None


def test_a_named_trace_must_be_there():
    with pytest.raises(DemoError, match=r"azure-code needs .*_code\.csv"):
        load_traces(WorkloadName.AZURE_CODE)


def test_a_named_folder_must_be_there(monkeypatch, tmp_path):
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DemoError, match="nowhere is not a folder"):
        data_folder()


def test_what_was_fetched_is_found(monkeypatch, tmp_path, folder):
    """`pointsman data fetch` puts it there when nothing else is named."""
    monkeypatch.delenv("POINTSMAN_DATA")
    monkeypatch.setattr("pointsman_common.data_folder.checkout", lambda: tmp_path / "x" / "y")
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_DATA_HOME", str(home))
    assert data_folder() is None
    home.mkdir()
    (home / "pointsman").symlink_to(folder)
    assert data_folder() == home / "pointsman"
    assert load_traces(WorkloadName.AUTO) is not None


def test_unreadable_files_are_told(folder):
    (folder / TEST_SCORES).write_bytes(b"\xff\xfe")
    with pytest.raises(DemoError, match="cannot be read"):
        load_traces(WorkloadName.AUTO)


def test_bad_files_are_told_with_their_place(folder):
    (folder / TEST_SCORES).write_text("[1]")
    with pytest.raises(WorkloadError, match=r"test\.json, row 1"):
        load_traces(WorkloadName.AUTO)


def test_grades_by_the_table(grader):
    grades, prompts = grader
    expected = {"Write a function": (0.75, True), "Who?": (0.5, True)}
    for index, prompt in enumerate(prompts):
        assert grades.score(index, "qwen2-5-7b") == expected[prompt]


def test_grades_by_declared_priors_where_the_table_knows_nothing(grader):
    grades, prompts = grader
    assert grades.unscored_experts == ["unheard-of"]
    expected = {"Write a function": (1.0, False), "Who?": (0.25, False)}
    for index, prompt in enumerate(prompts):
        assert grades.score(index, "unheard-of") == expected[prompt]
    assert grades.score(0, "not in the site") == (0.0, False)


def test_names_match_without_publisher_and_case(site):
    expert = site.expert("qwen2-5-7b")
    assert column_of(expert, ("other", "qwen2.5-7b")) == 1
    assert column_of(expert, ("QWEN/qwen2.5-7B",)) == 0
    assert column_of(expert, ("other",)) is None
