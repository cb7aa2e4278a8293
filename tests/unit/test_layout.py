"""What the tree must be like so that packages neither shadow nor drag in one another."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [Path(p) for p in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]

IMPORT_ALL = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {forbidden!r}:
            raise AssertionError(f"{{name}} is imported")

sys.meta_path.insert(0, Refuse())
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
"""


def run(code: str, *, cwd: Path = ROOT) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_operator_is_the_standard_librarys():
    """With an ``__init__.py`` the folder would shadow it for whoever starts Python here."""
    assert not (ROOT / "operator" / "__init__.py").exists()
    where = run("import operator, pointsman_operator; print(operator.__file__)")
    assert Path(where) == Path(run("import operator; print(operator.__file__)", cwd=Path("/")))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_every_package_is_typed_and_its_folder_is_none(package):
    assert (ROOT / package / "py.typed").is_file()
    assert (ROOT / package / "__init__.py").is_file()
    assert not (ROOT / package.parent / "__init__.py").exists()


def test_every_folder_with_modules_is_part_of_the_distribution():
    found = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/pointsman_*/__init__.py")}
    assert found == set(PACKAGES)


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("pointsman_core", {"torch", "kubernetes", "kopf", "grpc", "aiohttp", "prometheus_client"}),
        ("pointsman_common", {"torch", "kubernetes", "kopf", "grpc", "aiohttp", "pointsman_core"}),
        ("pointsman_policy", {"torch", "torch_geometric", "kubernetes", "kopf"}),
        ("pointsman_engine_sim", {"torch", "torch_geometric", "kubernetes", "kopf", "grpc"}),
        ("pointsman_operator", {"torch", "torch_geometric"}),
    ],
)
def test_a_package_can_be_imported_without(package, forbidden):
    run(IMPORT_ALL.format(package=package, forbidden=sorted(forbidden)))
