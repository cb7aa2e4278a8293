"""Watching files on a real file system."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from watchfiles._rust_notify import WatchfilesRustInternalError

from pointsman_policy.watch import file_contents, watch_files, watched_files

pytestmark = pytest.mark.integration

Changes = asyncio.Queue[dict[str, str]]


@asynccontextmanager
async def watching(
    *paths: Path, before: Callable[[], object] = lambda: None, poll_seconds: float = 0.2
) -> AsyncIterator[Changes]:
    """A running watch; each change brings what the folders hold then.

    ``before`` runs after the first look at the files and before the watch.
    """
    changes: Changes = asyncio.Queue()

    async def on_change() -> None:
        changes.put_nowait(content(*paths))

    known = file_contents(paths)
    before()
    task = asyncio.create_task(
        watch_files(paths, on_change, known=known, poll_seconds=poll_seconds, debounce_ms=10)
    )
    yield changes
    assert not task.done(), task
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def content(*paths: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in watched_files(paths) if file.exists()}


def write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


async def until(changes: Changes, wanted: dict[str, str]) -> None:
    """Changes may be seen one by one or together; the last state counts."""
    while await changes.get() != wanted:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "manifests"
    folder.mkdir()
    (folder / "a.yaml").write_text("one")
    return folder


async def test_a_changed_an_added_and_a_removed_file(folder: Path):
    async with watching(folder) as changes:
        (folder / "a.yaml").write_text("two")
        await until(changes, {"a.yaml": "two"})
        (folder / "sub").mkdir()
        (folder / "sub" / "b.yml").write_text("new")
        await until(changes, {"a.yaml": "two", "b.yml": "new"})
        (folder / "a.yaml").unlink()
        await until(changes, {"b.yml": "new"})


async def test_events_alone_are_enough(folder: Path):
    """With polling out of reach, the first change proves that the watch stands."""
    async with watching(folder, poll_seconds=1000) as changes:
        await rewrite_until_seen(folder / "a.yaml", changes)
        (folder / "a.yaml").write_text("by event")
        await until(changes, {"a.yaml": "by event"})


async def rewrite_until_seen(file: Path, changes: Changes) -> None:
    count = 0
    while changes.empty():
        count += 1
        write(file, f"{count}")
        with suppress(TimeoutError):
            await asyncio.wait_for(changes.get(), 0.2)
            return


async def test_without_any_events_files_are_polled(folder: Path, monkeypatch):
    """As when the system has no watch left for a folder that is new."""

    async def broken(*_, **__):
        raise WatchfilesRustInternalError(
            "error in underlying watcher: OS file watch limit reached"
        )
        yield

    monkeypatch.setattr("pointsman_policy.watch.awatch", broken)
    async with watching(folder, poll_seconds=0.01) as changes:
        (folder / "a.yaml").write_text("two")
        await until(changes, {"a.yaml": "two"})


async def test_a_change_between_reading_and_watching_is_not_lost(folder: Path):
    late = folder / "late.yaml"
    async with watching(folder, before=lambda: late.write_text("x")) as changes:
        await until(changes, {"a.yaml": "one", "late.yaml": "x"})


async def test_an_atomic_rename_over_a_single_file(folder: Path):
    file = folder / "a.yaml"
    async with watching(file) as changes:
        for text in ("two", "three"):
            other = folder / ".a.yaml.tmp"
            other.write_text(text)
            other.rename(file)
            await until(changes, {"a.yaml": text})


async def test_a_config_map_swap(tmp_path: Path):
    """The kubelet's way: ..data links to a dated folder and is renamed over."""
    mount = tmp_path / "mount"
    (mount / "..one").mkdir(parents=True)
    (mount / "..one" / "a.yaml").write_text("one")
    (mount / "..data").symlink_to("..one")
    (mount / "a.yaml").symlink_to("..data/a.yaml")
    async with watching(mount) as changes:
        for old, new in (("one", "two"), ("two", "three")):
            (mount / f"..{new}").mkdir()
            (mount / f"..{new}" / "a.yaml").write_text(new)
            (mount / "..data_tmp").symlink_to(f"..{new}")
            (mount / "..data_tmp").rename(mount / "..data")
            shutil.rmtree(mount / f"..{old}")
            await until(changes, {"a.yaml": new})


async def test_a_folder_that_is_deleted_and_created_again(folder: Path):
    async with watching(folder) as changes:
        for text in ("two", "three"):
            shutil.rmtree(folder)
            await until(changes, {})
            write(folder / "a.yaml", text)
            await until(changes, {"a.yaml": text})


async def test_a_path_that_comes_later(tmp_path: Path):
    folder = tmp_path / "later"
    async with watching(folder) as changes:
        folder.mkdir()
        (folder / "a.yaml").write_text("here")
        await until(changes, {"a.yaml": "here"})


async def test_only_manifests_and_only_content_count(folder: Path):
    async with watching(folder) as changes:
        (folder / "notes.txt").write_text("not looked at")
        (folder / "a.yaml").touch()
        (folder / "b.yaml").write_text("the only change")
        assert await changes.get() == {"a.yaml": "one", "b.yaml": "the only change"}
        assert changes.empty()


async def test_an_error_in_the_callback_does_not_end_the_watch(folder: Path):
    calls: asyncio.Queue[None] = asyncio.Queue()

    async def on_change() -> None:
        calls.put_nowait(None)
        raise ValueError("bad manifests")

    known = file_contents([folder])
    watch = watch_files([folder], on_change, known=known, poll_seconds=0.2, debounce_ms=10)
    task = asyncio.create_task(watch)
    for text in ("two", "three"):
        (folder / "a.yaml").write_text(text)
        await calls.get()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_which_files_are_manifests(tmp_path: Path):
    for name in (
        "b.yaml",
        "a.yml",
        "no.txt",
        "sub/c.yaml",
        ".hidden/d.yaml",
        "..data/e.yaml",
        ".f.yaml",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to("..data")
    names = [str(path.relative_to(tmp_path)) for path in watched_files([tmp_path])]
    assert names == ["a.yml", "b.yaml", "linked/e.yaml", "sub/c.yaml"]


def test_other_suffixes_may_be_asked_for(tmp_path: Path):
    for name in ("a.yaml", "b.json"):
        (tmp_path / name).write_text("")
    assert watched_files([tmp_path], suffixes={".json"}) == [tmp_path / "b.json"]
    assert list(file_contents([tmp_path], suffixes={".json"})) == [tmp_path / "b.json"]


def test_files_that_cannot_be_read_count_as_absent(tmp_path: Path):
    (tmp_path / "dangling.yaml").symlink_to("nowhere")
    assert file_contents([tmp_path, tmp_path / "absent"]) == {}
