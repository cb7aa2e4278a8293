import asyncio
import signal

import pytest
import typer
from typer.testing import CliRunner

from pointsman_cli.demo.command import demo, parse_deciders, run_until_signal
from pointsman_core.resources import Algorithm

runner = CliRunner()


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(demo)
    return app


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", tuple(Algorithm)),
        ("None", ()),
        ("leastload, Random,random", (Algorithm.LEAST_LOAD, Algorithm.RANDOM)),
    ],
)
def test_deciders_by_name(text, expected):
    assert parse_deciders(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [("Random,Best", "best: choose from"), ("", "nothing: choose from"), ("none,all", "none, all")],
)
def test_unknown_deciders(text, message):
    with pytest.raises(typer.BadParameter, match=message):
        parse_deciders(text)


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
