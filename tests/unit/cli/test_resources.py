"""`pointsman validate`, `generate-crds` and `generate-docs`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pointsman_cli.main import app
from pointsman_core.crd import generate_crds

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "edge-site"
README = ROOT / "README.md"


@pytest.fixture
def run():
    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


def test_validate_shows_policies_and_experts(run):
    result = run("validate", EXAMPLE)
    assert result.exit_code == 0
    assert "default/auto answers auto" in result.stdout
    assert "127.0.0.1:18001" in result.stdout
    assert result.stderr == ""


def test_validate_as_json(run):
    result = run("validate", EXAMPLE, "--json")
    report = json.loads(result.stdout)
    assert report["valid"] is True
    (policy,) = report["policies"]
    assert len(policy["endpoints"]) == 6
    assert all(endpoint["ms_per_token_alone"] < 60 for endpoint in policy["endpoints"])


def test_validate_lists_all_errors_on_standard_error(run, tmp_path):
    (tmp_path / "a.yaml").write_text("foo")
    (tmp_path / "b.yaml").write_text("a: [")
    result = run("validate", tmp_path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == [
        f"{tmp_path}/a.yaml",
        f"{tmp_path}/b.yaml",
    ]


def test_validate_reports_errors_as_json_too(run, tmp_path):
    result = run("validate", tmp_path / "gone.yaml", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["valid"] is False
    assert report["errors"][0]["message"].startswith("cannot be read")


def test_validate_shows_warnings(run, tmp_path):
    expert = (EXAMPLE / "experts.yaml").read_text()
    (tmp_path / "a.yaml").write_text(expert.replace("name: code,", "name: coding,", 1))
    result = run("validate", tmp_path, EXAMPLE / "policy.yaml")
    assert result.exit_code == 0
    assert result.stderr.startswith(f"warning: {tmp_path}/a.yaml:")


def test_validate_warns_of_a_limit_that_no_expert_keeps(run, tmp_path):
    text = (EXAMPLE / "policy.yaml").read_text().replace("PerTokenMs: 60", "PerTokenMs: 12")
    (tmp_path / "policy.yaml").write_text(text)
    line = text[: text.index("latencyPerTokenMs")].count("\n") + 1
    result = run("validate", tmp_path, EXAMPLE / "experts.yaml", "--json")
    assert result.exit_code == 0
    assert f"warning: {tmp_path}/policy.yaml:{line} RoutingPolicy default/auto" in result.stderr
    (warning,) = json.loads(result.stdout)["warnings"]
    assert warning["line"] == line
    assert warning["field"] == "spec.qos.latencyPerTokenMs"
    assert warning["message"].startswith("no expert can keep 12 ms per token, not even idle: ")


def test_validate_does_not_warn_while_one_expert_keeps_the_limit(run, tmp_path):
    report = json.loads(run("validate", EXAMPLE, "--json").stdout)
    fastest = min(e["ms_per_token_alone"] for e in report["policies"][0]["endpoints"])
    text = (EXAMPLE / "policy.yaml").read_text()
    (tmp_path / "policy.yaml").write_text(
        text.replace("PerTokenMs: 60", f"PerTokenMs: {fastest + 0.1}")
    )
    assert run("validate", tmp_path, EXAMPLE / "experts.yaml").stderr == ""


def test_the_readme_s_site_is_valid_and_feasible(run, tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (tmp_path / "site.yaml").write_text(example)
    result = run("validate", tmp_path, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    (policy,) = json.loads(result.stdout)["policies"]
    assert policy["endpoints"][0]["ms_per_token_alone"] < 60


def test_generate_crds_writes_all_files(run, tmp_path):
    result = run("generate-crds", tmp_path / "crds")
    assert result.exit_code == 0
    written = {file.name: file.read_text() for file in (tmp_path / "crds").iterdir()}
    assert written == generate_crds()


def test_generate_docs_writes_the_reference(run, tmp_path):
    result = run("generate-docs", tmp_path / "docs" / "crds.md")
    assert result.exit_code == 0
    assert "## LLMExpert" in (tmp_path / "docs" / "crds.md").read_text()


def test_defining_the_commands_loads_nothing_heavy():
    program = (
        "import sys, pointsman_cli.resources; "
        "print(*sorted({'pydantic', 'numpy', 'grpc', 'yaml'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (output.returncode, output.stdout.split()) == (0, [])
