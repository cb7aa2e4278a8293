import hashlib
import json
import sys

import pytest
from typer.testing import CliRunner

from pointsman_cli.main import app
from pointsman_common.data_folder import TRACES
from pointsman_learning.workloads import folder as folder_module
from pointsman_learning.workloads.fetch import Fetched, FetchError
from pointsman_learning.workloads.folder import FILES, DataFile


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *words: CliRunner().invoke(app, ["data", *words])


@pytest.fixture
def pinned(tmp_path, monkeypatch):
    """A small trace that is the pinned one, and a file that is missing."""
    rows = [f"2023-11-16 18:{i // 60:02}:{i % 60:02},10,7" for i in range(1000)]
    content = "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, ""]).encode()
    file = tmp_path / TRACES["azure-conv"]
    file.parent.mkdir()
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    files = (
        DataFile(TRACES["azure-conv"], "http://a", digest, len(content), "CC-BY-4.0", "arrivals"),
        DataFile("llmrouter/x.json", "http://b", "0" * 64, 3, "MIT", "scores"),
    )
    monkeypatch.setattr(folder_module, "FILES", files)
    return file


def test_files_are_pinned():
    assert len({file.path for file in FILES}) == len(FILES) == 7
    for file in FILES:
        assert file.url.startswith("https://raw.githubusercontent.com/")
        assert file.url.rpartition("/")[2] == file.path.rpartition("/")[2]
        assert len(bytes.fromhex(file.sha256)) == 32


@pytest.mark.usefixtures("pinned")
def test_show_tells_what_is_there(run):
    result = run("show")
    assert result.exit_code == 0
    for part in ("pinned", "missing", "1,000", "CC-BY-4.0", "azure-conv", "LLMRouter", "Splitwise"):
        assert part in result.stdout
    report = json.loads(run("show", "--json").stdout)
    assert [file["state"] for file in report["files"]] == ["pinned", "missing"]
    assert report["files"][0]["rows"] == 1000
    (split,) = report["splits"]
    assert 300 < split["train"] <= 400
    assert split["test"] > split["validation"] > 100


def test_show_fails_on_another_file(run, pinned):
    pinned.write_text("TIMESTAMP\n1\n")
    result = run("show", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["files"][0]["state"] == "differs"
    assert report["splits"] == []


def test_show_of_no_folder(run, tmp_path, monkeypatch):
    result = run("show", str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert "nothing: is not a folder" in result.stderr
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path / "nowhere"))
    assert "POINTSMAN_DATA=" in run("show").stderr


@pytest.mark.usefixtures("pinned")
def test_fetch_reports_each_file(run, tmp_path, monkeypatch):
    asked = []

    def fetch_file(file, folder, _client, *, on_progress):
        asked.append((file.path, folder))
        on_progress(file.size)
        return Fetched.DOWNLOADED

    monkeypatch.setattr("pointsman_learning.workloads.fetch.fetch_file", fetch_file)
    result = run("fetch")
    assert result.exit_code == 0
    assert f"All 2 files are in {tmp_path}." in result.stderr
    assert "export" not in result.stderr
    assert [folder for _, folder in asked] == [tmp_path] * 2
    result = run("fetch", "--to", str(tmp_path / "else"))
    assert f"export POINTSMAN_DATA={tmp_path / 'else'}" in result.stderr


@pytest.mark.usefixtures("pinned")
def test_fetch_goes_on_after_a_failure_and_fails(run, monkeypatch):
    asked = []

    def fetch_file(file, *_, **__):
        asked.append(file.path)
        raise FetchError(f"{file.url}: HTTP 404 Not Found")

    monkeypatch.setattr("pointsman_learning.workloads.fetch.fetch_file", fetch_file)
    result = run("fetch")
    assert result.exit_code == 1
    assert len(asked) == 2
    assert "error: http://b: HTTP 404 Not Found" in result.stderr


@pytest.mark.parametrize(("command", "module"), [("fetch", "httpx"), ("show", "numba")])
def test_without_the_extra(run, monkeypatch, command, module):
    for name in [name for name in sys.modules if name.startswith("pointsman_learning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    result = run(command)
    assert result.exit_code == 2
    assert "needs the learning extra: pip install 'pointsman[learning]'" in result.stderr
