"""Manifests from disk: the only part of the embedded mode that touches files."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pointsman_core.manifests import ManifestError, ManifestErrors

MAX_FILE_BYTES = 1 << 20
"""As etcd's and a ConfigMap's own limit; a larger file is hardly a manifest."""

SUFFIXES = frozenset({".yaml", ".yml"})


def read_manifest_files(paths: Iterable[Path]) -> dict[str, str]:
    """Texts of all manifest files by path; folders give their YAML files, sorted.

    Hidden files and folders are passed over: a mounted ConfigMap keeps its files a second
    time in ``..data``. Raises `ManifestErrors` with everything that cannot be read.
    """
    texts: dict[str, str] = {}
    errors: list[ManifestError] = []
    seen: set[Path] = set()
    for file in _files(paths, errors):
        real = file.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            texts[str(file)] = _read(file)
        except (OSError, ValueError) as error:
            errors.append(ManifestError(str(file), message=_reason(error)))
    if errors:
        raise ManifestErrors(errors)
    return texts


def _files(paths: Iterable[Path], errors: list[ManifestError]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(_below(path, errors))
        if not found:
            errors.append(ManifestError(str(path), message="holds no *.yaml or *.yml file"))
        yield from found


def _below(folder: Path, errors: list[ManifestError]) -> Iterator[Path]:
    """Manifest files of a folder and those in it, through links too but not in circles."""

    def refused(error: OSError) -> None:
        errors.append(ManifestError(str(error.filename), message=_reason(error)))

    entered: set[Path] = set()
    for root, folders, files in os.walk(folder, onerror=refused, followlinks=True):
        here = Path(root)
        if here.resolve() in entered:
            folders.clear()
            continue
        entered.add(here.resolve())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and Path(name).suffix in SUFFIXES:
                yield here / name


def _read(file: Path) -> str:
    with file.open("rb") as stream:
        content = stream.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"is larger than {MAX_FILE_BYTES >> 20} MiB")
    return content.decode("utf-8-sig")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.start})"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return str(error)
