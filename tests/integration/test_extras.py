"""A component runs with its own extra alone: what is not declared for it cannot be imported (design rule 1).

The environment of the tests has everything; a child process is shown only what pip would have installed.
"""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grimp
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
APPS = sorted(target.partition(":")[0] for target in PROJECT["scripts"].values())
# Standard library of newer Pythons than this one may be.
NEWER_STDLIB = {"compression"}

IMPORT_UNDER_A_VEIL = """
import importlib, sys
from importlib.machinery import PathFinder

app, *forbidden = sys.argv[1:]

class Veil(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if path is None and name in forbidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Veil
importlib.import_module(app)
"""


def normal(name: str) -> str:
    """A distribution's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: Iterable[str]) -> set[str]:
    """Names of all distributions that pip installs here for the requirements."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, wanted_by_extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": wanted_by_extra}):
            continue
        for extra in {"", *requirement.extras}:
            key = (normal(requirement.name), extra)
            if key not in found:
                found.add(key)
                declared = importlib.metadata.requires(requirement.name) or []
                waiting += [(Requirement(text), extra) for text in declared]
    return {name for name, _ in found}


def modules_by_origin(app: str) -> tuple[set[str], set[str]]:
    """Top-level modules here that come with the app's declared dependencies, and those that do not."""
    component = app.split(".")[1]
    installed = closure([*PROJECT["dependencies"], *EXTRAS.get(component, [])])
    allowed, forbidden = set(), set()
    for module, distributions in importlib.metadata.packages_distributions().items():
        names = {normal(name) for name in distributions}
        (allowed if names & (installed | {PROJECT["name"]}) else forbidden).add(module)
    return allowed, forbidden


def import_veiled(app: str, forbidden: Iterable[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", IMPORT_UNDER_A_VEIL, app, *sorted(forbidden)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("app", APPS)
def test_app_is_imported_with_its_own_extra_alone(app: str) -> None:
    _, forbidden = modules_by_origin(app)
    result = import_veiled(app, forbidden)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("app", APPS)
def test_everything_an_app_can_import_is_declared(app: str) -> None:
    """Also what it imports only on use."""
    allowed, _ = modules_by_origin(app)
    graph = grimp.build_graph("aoscore", include_external_packages=True, exclude_type_checking_imports=True)
    reachable = {name for name in graph.find_upstream_modules(app) if graph.is_module_squashed(name)}
    assert reachable, "the graph has no libraries"
    unknown = reachable - allowed - sys.stdlib_module_names - NEWER_STDLIB
    where = {name: sorted(graph.find_modules_that_directly_import(name)) for name in unknown}
    assert not where


def test_a_missing_declaration_is_found() -> None:
    """The veil itself: without websockets nothing that needs it can be imported."""
    result = import_veiled("websockets", {"websockets"})
    assert "No module named 'websockets'" in result.stderr
    assert import_veiled("websockets", {"h11"}).returncode == 0
