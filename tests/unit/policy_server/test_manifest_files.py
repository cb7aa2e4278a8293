"""Reading manifest files: which ones, and what is refused."""

import errno
import os
from pathlib import Path

import pytest

from pointsman_core.manifests import ManifestErrors
from pointsman_policy.manifest_files import MAX_FILE_BYTES, read_manifest_files


def read(*paths):
    return list(read_manifest_files(paths).values())


def refusal(*paths):
    with pytest.raises(ManifestErrors) as caught:
        read_manifest_files(paths)
    return str(caught.value)


def test_folders_give_their_yaml_files_sorted(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.yml", "a.yaml", "notes.txt", ".hidden.yaml", "sub/c.yaml"):
        (tmp_path / name).write_text(name)
    assert sorted(read(tmp_path)) == ["a.yaml", "b.yml", "sub/c.yaml"]
    assert list(read_manifest_files([tmp_path])) == sorted(read_manifest_files([tmp_path]))


def test_a_file_named_outright_needs_no_suffix(tmp_path):
    (tmp_path / "manifest").write_text("x")
    assert read(tmp_path / "manifest") == ["x"]


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.yaml").write_text("x")
    assert read(tmp_path, tmp_path / "a.yaml") == ["x"]


def test_a_mounted_config_map_is_read_once(tmp_path):
    data = tmp_path / "..2026_01_01"
    (data / "sub").mkdir(parents=True)
    (data / "a.yaml").write_text("a")
    (data / "sub" / "b.yaml").write_text("b")
    (tmp_path / "..data").symlink_to(data.name)
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    (tmp_path / "sub").symlink_to("..data/sub")
    assert read(tmp_path) == ["a", "b"]


def test_links_in_circles_end(tmp_path):
    (tmp_path / "a.yaml").write_text("a")
    (tmp_path / "again").symlink_to(tmp_path)
    assert read(tmp_path) == ["a"]


def test_a_byte_order_mark_is_taken_off(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfx: 1")
    assert read(tmp_path) == ["x: 1"]


def test_everything_unreadable_is_told_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.yaml").write_bytes(
        "na\N{LATIN SMALL LETTER I WITH DIAERESIS}f".encode("latin-1")
    )
    with (tmp_path / "big.yaml").open("wb") as big:
        big.truncate(MAX_FILE_BYTES + 1)
    lines = refusal(
        tmp_path / "big.yaml", tmp_path / "empty", tmp_path / "gone.yaml", tmp_path / "latin.yaml"
    ).splitlines()
    assert [line.removeprefix(f"{tmp_path}{os.sep}") for line in lines] == [
        "big.yaml: is larger than 1 MiB",
        "empty: holds no *.yaml or *.yml file",
        "gone.yaml: cannot be read: No such file or directory",
        "latin.yaml: is not UTF-8 (byte 2)",
    ]


def test_a_file_of_just_the_limit_is_read(tmp_path):
    with (tmp_path / "a.yaml").open("wb") as file:
        file.truncate(MAX_FILE_BYTES)
    assert len(read(tmp_path)[0]) == MAX_FILE_BYTES


def test_a_file_without_permission_is_told(tmp_path: Path, monkeypatch):
    (tmp_path / "a.yaml").write_text("x")

    def forbidden(*_args: object) -> None:  # root may read everything, whatever the file's mode
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    assert "Permission denied" in refusal(tmp_path)
