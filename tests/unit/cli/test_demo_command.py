import asyncio
import signal

import pytest
import typer
from typer.testing import CliRunner

from pointsman_cli.demo.command import demo, run_until_signal

runner = CliRunner()


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(demo)
    return app


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seconds", "nan"),
        ("--rate", "nan"),
        ("--rate", "inf"),
        ("--limit-ms", "nan"),
        ("--limit-ms", "600001"),
        ("--deciders", "Best"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(app, tmp_path, option, value):
    result = runner.invoke(app, ["--output-dir", str(tmp_path / "out"), option, value])
    assert result.exit_code == 2
    assert option in result.stderr
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line_on_standard_error(app, tmp_path):
    manifests = tmp_path / "bad.yaml"
    manifests.write_text("kind: [")
    result = runner.invoke(
        app, ["--manifests", str(manifests), "--output-dir", str(tmp_path / "out"), "--json"]
    )
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "error: " in result.stderr
    assert "bad.yaml:" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_in_order(number):
    cleaned = []

    async def main():
        try:
            signal.raise_signal(number)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    assert run_until_signal(main()) is False
    assert cleaned == [True]


def test_a_run_that_ends_by_itself():
    assert run_until_signal(asyncio.sleep(0)) is True
