"""Parses the layer with the parser of BitBake from PyPI, over small stand-ins for openembedded-core (testbed.md §9).

The stand-ins give the variables that our metadata uses and empty classes for those it inherits: enough to read every
recipe, for each node kind and selection, in milliseconds and without any other layer.
"""

import logging
import re
import sys
import tempfile
import types
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

# The package on PyPI lacks the server for equivalent hashes, which parsing does not need.
for _name in ("hashserv", "hashserv.client"):
    sys.modules.setdefault(_name, types.ModuleType(_name))
sys.modules["hashserv"].client = sys.modules["hashserv.client"]  # type: ignore[attr-defined]

import bb  # noqa: E402
import bb.data_smart  # noqa: E402
import bb.parse  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
LAYER = ROOT / "meta-aoscore"
STANDINS = Path(__file__).resolve().parent / "standins"
SERIES = {"scarthgap": "python3.12", "wrynose": "python3.14"}


def recipes() -> list[Path]:
    """Every recipe of the layer, those for other layers included."""
    return sorted([*LAYER.glob("recipes-*/*/*.bb"), *LAYER.glob("dynamic-layers/*/recipes-*/*/*.bb")])


def appends() -> list[Path]:
    """Every change to a recipe of another layer."""
    return sorted([*LAYER.glob("recipes-*/*/*.bbappend"), *LAYER.glob("dynamic-layers/*/recipes-*/*/*.bbappend")])


def data(series: str = "scarthgap", **variables: str) -> Any:
    """A data store as it is before recipes are parsed: stand-ins, then the product's variables, then our layer.conf."""
    store = bb.data_smart.DataSmart()
    store.setVar("LAYERSERIES_CORENAMES", series)
    store.setVar("PYTHON_DIR", SERIES[series])
    store.setVar("BBPATH", f"{STANDINS}:{LAYER}")
    store.setVar("__bbclasstype", "recipe")
    store = bb.parse.handle(str(STANDINS / "conf" / "bitbake.conf"), store, True)
    for name, value in variables.items():
        store.setVar(name, value)
    store.setVar("LAYERDIR", str(LAYER))
    store = bb.parse.handle(str(LAYER / "conf" / "layer.conf"), store, True)
    store.expandVarref("LAYERDIR")
    bb.parse.init_parser(store)
    return store


def parse(recipe: Path, series: str = "scarthgap", append: Path | None = None, **variables: str) -> Any:
    """A recipe's data store, with what `append` changes.

    Raises bb.parse.SkipRecipe, bb.parse.ParseError, or bb.BBHandledException after a message.
    """
    store = data(series, **variables)
    store.setVar("FILE", str(recipe))
    name = re.match(r"(?P<PN>.+?)(?:_(?P<PV>[^_]+))?\.bb", recipe.name)
    assert name is not None, recipe
    store.setVar("PN", name["PN"])
    store.setVar("BPN", name["PN"])
    store.setVar("PV", name["PV"] or "1.0")
    store.setVar("WORKDIR", f"{tempfile.gettempdir()}/aos-layer/{name['PN']}")
    if append is not None:
        store.setVar("__BBAPPEND", str(append))
    parsed = bb.parse.handle(str(recipe), store, False)[""]
    if reason := parsed.getVar("__SKIPPED"):
        raise bb.parse.SkipRecipe(reason)
    return parsed


@cache
def messages() -> list[str]:
    """What BitBake says while parsing, newest last: errors are raised without their text."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logging.getLogger("BitBake").addHandler(Keep())
    logging.getLogger("BitBake").propagate = False
    return found


def package_names(store: Any) -> list[str]:
    """The packages of a recipe."""
    return (store.getVar("PACKAGES") or "").split()


def depends(store: Any, package: str) -> set[str]:
    """Names of what a package needs at run time, without versions."""
    text = store.getVar(f"RDEPENDS:{package}") or ""
    return set(re.sub(r"\([^)]*\)", "", text).split())


def split_files(store: Any, files: Mapping[str, str]) -> dict[str, set[str]]:
    """Which package takes which file, as the package task does: in the order of PACKAGES, the first that matches.

    `files` are absolute paths on the target; the values are not looked at. Files that nobody takes are under "".
    """
    left = set(files)
    result: dict[str, set[str]] = {}
    for package in package_names(store):
        patterns = (store.getVar(f"FILES:{package}") or "").split()
        taken = {path for path in left for pattern in patterns if _matches(path, pattern.rstrip("/"))}
        result[package] = taken
        left -= taken
    result[""] = left
    return result


def _matches(path: str, pattern: str) -> bool:
    """A pattern takes what it names, and all below a directory that it names."""
    parts = path.split("/")
    wanted = len(pattern.split("/"))
    return len(parts) >= wanted and fnmatchcase("/".join(parts[:wanted]), pattern)
