"""Every option of every command that names a file: what is wrong with it is said in one way."""

import re
import typing
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest
import typer
from typer.testing import CliRunner

from pointsman_cli.main import app

READ, READ_ANY, WRITE, NEW, FOLDER, OWN = (
    "a file to read",
    "a file or folder to read",
    "a file to write",
    "a file to write with its folders",
    "a folder to write to",
    "tested elsewhere",
)
KINDS = {
    "demo --manifests": READ_ANY,
    "demo --output-dir": FOLDER,
    "policy-server --manifests": READ_ANY,
    "policy-server --snapshots": OWN,  # may come after the server has started
    "policy-server --tls-cert": READ,
    "policy-server --tls-key": READ,
    "policy-server --tls-client-ca": READ,
    "policy-server --models": OWN,  # likewise
    "policy-server --predictor": READ,
    "engine-sim --manifests": READ_ANY,
    "train --config": READ,
    "train --experts": READ_ANY,
    "train --quality-data": READ,
    "train --arrivals": READ,
    "train --output": FOLDER,
    "tune --journal": WRITE,
    "tune --output": WRITE,
    "snapshot --manifests": READ_ANY,
    "snapshot --output": FOLDER,
    "evaluate --quality-data": READ,
    "evaluate --arrivals": READ,
    "evaluate --experts": READ_ANY,
    "evaluate --predictor": READ,
    "evaluate --model": READ,
    "evaluate --output-dir": FOLDER,
    "evaluate --markdown": WRITE,
    "model-card MODEL": READ,
    "model-card --evaluation": READ,
    "model-card --output": WRITE,
    "validate PATH...": OWN,  # tells of all files at once
    "generate-crds DIR": FOLDER,
    "generate-docs FILE": NEW,
    "calibrate engine --csv": WRITE,
    "calibrate prometheus --csv": WRITE,
    "calibrate file CSV": READ,
    "data fetch --to": FOLDER,
    "data show DIR": OWN,
    "predictor train --output": NEW,
    "predictor train --quality-data": READ,
    "predictor evaluate --predictor": READ,
    "predictor evaluate --quality-data": READ,
}
NAMED_BY_TEXT = {"policy-server --predictor", "evaluate --predictor", "evaluate --model"}
"""Options that may hold something else than a path."""
BESIDE = {
    "snapshot": ("--manifests", "site.yaml"),
    "model-card": ("--evaluation", "site.yaml"),
    "calibrate engine": ("http://127.0.0.1:1", "--model", "m"),
    "calibrate prometheus": ("http://127.0.0.1:1", "--model", "m"),
    "predictor train": ("--output", "new.onnx"),
    "model-card --evaluation": ("site.yaml",),
    "model-card --output": ("site.yaml", "--evaluation", "site.yaml"),
}
"""What else a command needs before it looks at the file."""


def commands(group: typer.Typer, *before: str):
    for one in group.registered_commands:
        yield (*before, one.name or one.callback.__name__.replace("_", "-")), one.callback
    for one in group.registered_groups:
        yield from commands(one.typer_instance, *before, one.name)


def names_paths(hint: object) -> bool:
    return hint is Path or any(names_paths(one) for one in get_args(hint))


def files_of(function):
    for name, hint in typing.get_type_hints(function, include_extras=True).items():
        if get_origin(hint) is Annotated and names_paths(hint.__origin__):
            option = hint.__metadata__[0]
            argument = isinstance(option, typer.models.ArgumentInfo)
            written = option.metavar or name.upper()
            yield written if argument else "--" + name.replace("_", "-")


def test_all_of_them_are_here():
    found = {f"{' '.join(path)} {o}" for path, fn in commands(app) for o in files_of(fn)}
    assert found == set(KINDS) - NAMED_BY_TEXT


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "site.yaml").write_text("{}")
    (tmp_path / "loop").symlink_to("loop")  # unreadable, for root too
    monkeypatch.setenv("COLUMNS", "200")


WRONG = {
    READ: {
        "nowhere": "nowhere: there is no such file",
        "folder": "folder: is a folder, not a file",
        "loop": "loop: too many levels of symbolic links",
        "site.yaml/x": "site.yaml/x: a part of it is a file, not a folder",
    },
    READ_ANY: {
        "nowhere": "nowhere: there is no such file",
        "loop": "loop: too many levels of symbolic links",
    },
    WRITE: {
        "folder": "folder: is a folder, not a file",
        "nowhere/x": "nowhere: there is no such folder",
        "site.yaml/x": "site.yaml: is a file, not a folder",
    },
    NEW: {
        "folder": "folder: is a folder, not a file",
        "site.yaml/y/x": "site.yaml: is a file, not a folder",
    },
    FOLDER: {
        "site.yaml": "site.yaml: is a file, not a folder",
        "site.yaml/x": "site.yaml: is a file, not a folder",
    },
    OWN: {},
}
CASES = [(where, file, said) for where, kind in KINDS.items() for file, said in WRONG[kind].items()]


@pytest.mark.parametrize(("where", "file", "said"), CASES)
def test_one_sentence_names_option_and_file(where, file, said):
    command, _, option = where.rpartition(" ")
    beside = BESIDE.get(where, BESIDE.get(command, ()))
    named = (option, file) if option.startswith("--") else (file,)
    result = CliRunner().invoke(app, [*command.split(), *beside, *named])
    told = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
    assert result.exit_code == 2, result.output
    hint = rf"'?{option}'?( / '-o')?"
    assert re.search(f"Invalid value for {hint}: {re.escape(said)}$", told), told
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["validate", "data show"])
def test_arguments_that_are_told_of_otherwise(command):
    result = CliRunner().invoke(app, [*command.split(), "nowhere"])
    assert result.exit_code == 1
    assert "nowhere: " in result.stderr
    assert "Errno" not in result.output


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("train", "--config"),
        ("evaluate", "--quality-data"),
        ("evaluate", "--arrivals"),
        ("calibrate file", ""),
        ("engine-sim --expert a", "--manifests"),
    ],
)
def test_text_that_is_none(command, option, monkeypatch):
    monkeypatch.setenv("POINTSMAN_DATA", "folder")
    Path("binary").write_bytes(b"\xff\xfe\x00")
    words = [*command.split(), *([option] if option else []), "binary"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code in {1, 2}
    assert "is not UTF-8 (byte 0)" in result.stderr
    assert "binary" in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
