"""Why a file cannot be used, in words."""

import errno
import os
from pathlib import Path

import pytest
import typer

from pointsman_common.files import (
    must_be_readable,
    readable,
    readable_file,
    reason,
    told,
    writable_file,
    writable_folder,
)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(errno.ENOENT, "No such", "a.csv"), "a.csv: there is no such file"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device"),
        (OSError("cannot listen on Here"), "cannot listen on Here"),
        (ValueError("is wrong"), "is wrong"),
    ],
)
def test_errors_are_told_without_numbers(error, text):
    assert told(error) == text


def test_text_that_is_none():
    with pytest.raises(UnicodeDecodeError) as caught:
        b"ab\xff".decode()
    assert reason(caught.value) == "is not UTF-8 (byte 2)"


def test_what_is_fine_passes(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert readable_file(None) is None
    assert readable_file([file]) == [file]
    assert readable(tmp_path) == tmp_path
    assert writable_file(file) == file
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()


def test_a_pipe_is_not_read():
    """As in ``--arrivals <(zcat trace.csv.gz)``: what is read of it is gone."""
    read, write = os.pipe()
    try:
        os.write(write, b"content")
        readable_file(Path(f"/dev/fd/{read}"))
        assert os.read(read, 100) == b"content"
    finally:
        os.close(read)
        os.close(write)


def test_permissions(tmp_path, monkeypatch):
    """Root may do everything, so the system is made to say no."""
    file = tmp_path / "secret"
    file.write_text("")

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(typer.BadParameter, match=f"{file}: permission denied") as caught:
        must_be_readable(file, option="--model")
    assert caught.value.param_hint == "--model"
    monkeypatch.setattr(os, "access", lambda *_: False)
    for check, path in ((writable_file, file), (writable_folder, tmp_path)):
        with pytest.raises(typer.BadParameter, match=f"{path}: permission denied"):
            check(path)
