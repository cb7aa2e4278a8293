"""Results that take long are kept on disk, outside any repository."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

CACHE_VARIABLE: Final = "POINTSMAN_CACHE"
"""Environment variable that names the cache folder."""


def cache_folder() -> Path:
    """``POINTSMAN_CACHE``, else ``pointsman`` in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pointsman"


def write_whole(file: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all, so that another process never reads a part of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(handle, "wb") as stream:
            if isinstance(content, bytes):
                stream.write(content)
            else:
                content(stream)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
