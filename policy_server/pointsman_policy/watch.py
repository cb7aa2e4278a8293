"""Noticing that files have changed.

File events tell at once, and a look at the files every second backs them up: events stop
when a watched folder is deleted, and some file systems send none. In either case the
content decides, so that touching a file, or an event from elsewhere in the folder,
changes nothing.
"""

import asyncio
import hashlib
import os
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Final

import structlog
from watchfiles import Change, awatch

log = structlog.get_logger(__name__)

Contents = Mapping[Path, bytes]
"""Digest of each file by path."""

MANIFESTS: Final = frozenset({".yaml", ".yml"})
"""What the files in a folder end on to be looked at."""
MAX_BYTES: Final = 1024 * 1024
"""Of a file, so much is looked at; longer ones are refused anyway (etcd's own limit)."""


def watched_files(paths: Iterable[Path], *, suffixes: Collection[str] = MANIFESTS) -> list[Path]:
    """The files given, and all of these suffixes in the folders given, sorted.

    Hidden files and folders are left out: a mounted ConfigMap keeps its files in such a
    folder and links to them from beside it. Links to folders are followed, each folder once.
    """
    files: set[Path] = set()
    for path in paths:
        if _is_folder(path):
            files.update(_files_below(path, suffixes))
        else:
            files.add(path)
    return sorted(files)


def file_contents(paths: Iterable[Path], *, suffixes: Collection[str] = MANIFESTS) -> Contents:
    """Digests of the :func:`watched_files`; those that cannot be read count as absent."""
    contents: dict[Path, bytes] = {}
    for path in watched_files(paths, suffixes=suffixes):
        with suppress(OSError), path.open("rb") as file:
            contents[path] = hashlib.blake2b(file.read(MAX_BYTES + 1)).digest()
    return contents


def _is_folder(path: Path) -> bool:
    with suppress(OSError):
        return path.is_dir()
    return False


def _files_below(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(parent)
        for name in names:
            if not name.startswith(".") and Path(name).suffix in suffixes:
                yield here / name


async def watch_files(
    paths: Sequence[Path],
    on_change: Callable[[], Awaitable[None]],
    *,
    suffixes: Collection[str] = MANIFESTS,
    known: Contents | None = None,
    poll_seconds: float = 1.0,
    debounce_ms: int = 100,
) -> None:
    """Await ``on_change()`` whenever the :func:`watched_files` change; runs until it is cancelled.

    ``known`` is what :func:`file_contents` gave before the caller read the files, so
    that no change is lost in between; without it, changes count from the start. Changes
    within ``debounce_ms`` are one. Paths may be absent, deleted and created again. An
    exception from ``on_change`` is logged and the watch goes on.
    """
    look = partial(file_contents, paths, suffixes=suffixes)
    seen = await asyncio.to_thread(look) if known is None else known
    marks: Mapping[Path, object] | None = None
    while True:
        roots = _roots(paths)
        rounds = _rounds(roots, poll_seconds=poll_seconds, debounce_ms=debounce_ms)
        async with aclosing(rounds):
            async for events in rounds:
                former, marks = marks, await asyncio.to_thread(_marks, paths, suffixes)
                if events or marks != former:
                    contents = await asyncio.to_thread(look)
                    changed, seen = contents != seen, contents
                    if changed:
                        await _notify(on_change)
                if _roots(paths) != roots:
                    break  # watch what is there now


async def _notify(on_change: Callable[[], Awaitable[None]]) -> None:
    log.info("files changed")
    try:
        await on_change()
    except Exception:
        log.exception("files not reloaded")


async def _rounds(
    roots: Collection[Path], *, poll_seconds: float, debounce_ms: int
) -> AsyncGenerator[bool, None]:
    """One item per batch of file events (true) and per poll (false)."""
    yield False  # for what happened while no watch stood
    if not roots:
        await asyncio.sleep(poll_seconds)
        return
    events = awatch(
        *roots,
        watch_filter=None,
        debounce=debounce_ms,
        step=min(50, debounce_ms),
        rust_timeout=round(poll_seconds * 1000),
        yield_on_timeout=True,
        ignore_permission_denied=True,
    )
    try:
        async with aclosing(events):
            async for changes in events:
                yield bool(changes)
                if any(
                    change is Change.deleted and Path(name) in roots for change, name in changes
                ):
                    return  # what is there again may have got the same inode
    # A root vanished just now, or the system has no watch left: watchfiles' own error for the
    # latter, when it meets that in a folder that is new, is a RuntimeError.
    except (OSError, RuntimeError) as error:
        log.warning("no file events, polling", reason=str(error))
        await asyncio.sleep(poll_seconds)


def _roots(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """The paths that exist, with the identity of what is there."""
    roots = {}
    for path in paths:
        with suppress(OSError):
            status = path.stat()
            roots[path] = (status.st_dev, status.st_ino)
    return roots


def _marks(paths: Iterable[Path], suffixes: Collection[str]) -> dict[Path, tuple[int, int, int]]:
    """What tells cheaply that a file has changed: its inode, size and time."""
    marks = {}
    for path in watched_files(paths, suffixes=suffixes):
        with suppress(OSError):
            status = path.stat()
            marks[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return marks
