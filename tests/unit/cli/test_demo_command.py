import asyncio
import signal
import sys

import pytest
import typer
from typer.testing import CliRunner

from pointsman_cli.deciders import parse_deciders
from pointsman_cli.demo.command import demo, run_until_signal
from pointsman_cli.demo.options import TELLING_DECIDERS

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


def test_the_learned_decider_is_among_those_shown_by_default():
    chosen = parse_deciders(TELLING_DECIDERS)
    assert chosen[-2:] == ("ImpactGreedy", "HanDrl")
    assert len(chosen) == 6


def test_nothing_is_compared_without_deciders(app):
    result = runner.invoke(app, ["--compare", "--deciders", "none"])
    assert result.exit_code == 2
    assert "--compare: needs --deciders to compare" in " ".join(result.stderr.split())


def test_comparing_needs_the_learning_extra(app, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("pointsman_learning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    result = runner.invoke(app, ["--compare", "--output-dir", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "needs the learning extra: pip install 'pointsman[learning]'" in result.stderr
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
