"""Files that a command line names: looked at before anything else is done, in the same words.

`readable_file` and its like are callbacks of typer options and arguments: the message names
the option by itself. Of options that hold more than a path, `must_be_readable` checks it.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import typer

_T = TypeVar("_T", Path, list[Path], Path | None, list[Path] | None)

_REASONS = {
    errno.ENOENT: "there is no such file",
    errno.EISDIR: "is a folder, not a file",
    errno.EEXIST: "is a file, not a folder",
    errno.ENOTDIR: "a part of it is a file, not a folder",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}


def reason(error: OSError | UnicodeDecodeError) -> str:
    """Why a file cannot be used, without numbers of errors and without its name."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.start})"
    if error.errno is None or not error.strerror:
        return str(error)
    return _REASONS.get(error.errno, error.strerror[0].lower() + error.strerror[1:])


def told(error: Exception) -> str:
    """An error as people read it: ``nowhere.csv: there is no such file``.

    Errors other than OSError tell what they tell.
    """
    if not isinstance(error, OSError):
        return str(error)
    return reason(error) if error.filename is None else f"{error.filename}: {reason(error)}"


def must_be_readable(file: Path, *, option: str) -> Path:
    """Return a file that can be read.

    Raises:
        typer.BadParameter: it cannot; the message names it and ``option``.

    """
    try:
        return readable_file(file)
    except typer.BadParameter as error:
        raise typer.BadParameter(error.message, param_hint=option) from None


def readable_file(value: _T) -> _T:
    """Typer's callback: files that are read."""
    return _checked(value, _try_to_read)


def readable(value: _T) -> _T:
    """Typer's callback: files that are read, or folders of them."""
    return _checked(value, _try_to_read_or_list)


def writable_file(value: _T) -> _T:
    """Typer's callback: files that are written; their folders must be there."""
    return _checked(value, _try_to_write)


def new_file(value: _T) -> _T:
    """Typer's callback: files that are written; their folders are made where they lack."""
    return _checked(value, _try_to_make_file)


def writable_folder(value: _T) -> _T:
    """Typer's callback: folders that are written to, and made where they lack."""
    return _checked(value, _try_to_make_folder)


def _checked(value: _T, check: Callable[[Path], None]) -> _T:
    paths: Iterable[Path] = () if value is None else [value] if isinstance(value, Path) else value
    for path in paths:
        try:
            check(path)
        except OSError as error:
            raise _unusable(path, reason(error)) from None
    return value


def _try_to_read(file: Path) -> None:
    mode = file.stat().st_mode
    if stat.S_ISDIR(mode):
        raise _unusable(file, _REASONS[errno.EISDIR])
    if stat.S_ISREG(mode):  # what a pipe holds can be read once only
        with file.open("rb") as stream:
            stream.read(1)


def _try_to_read_or_list(path: Path) -> None:
    if path.is_dir():
        with os.scandir(path):
            return
    _try_to_read(path)


def _try_to_write(file: Path) -> None:
    if not file.exists() and not file.parent.exists():
        raise _unusable(file.parent, "there is no such folder")
    _try_to_make_file(file)


def _try_to_make_file(file: Path) -> None:
    if file.is_dir():
        raise _unusable(file, _REASONS[errno.EISDIR])
    if file.exists():
        _require(file, os.W_OK)
    else:
        _try_to_make_folder(file.parent)


def _try_to_make_folder(folder: Path) -> None:
    there = next(one for one in (folder, *folder.parents) if one.exists())
    if not there.is_dir():
        raise _unusable(there, _REASONS[errno.EEXIST])
    _require(there, os.W_OK | os.X_OK)


def _require(path: Path, mode: int) -> None:
    if not os.access(path, mode):
        raise _unusable(path, _REASONS[errno.EACCES])


def _unusable(path: Path, why: str) -> typer.BadParameter:
    return typer.BadParameter(f"{path}: {why}")
