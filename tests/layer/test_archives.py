"""Checksums and licences of the Python recipes against the archives of the package registry."""

import hashlib
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.layer import parser

CACHE = parser.ROOT / ".cache" / "sdist"
RECIPES = sorted((parser.LAYER / "recipes-devtools" / "python").glob("python3-*_*.bb"))

# pip asks the build backend of an archive for its name and version, which may take that for an occasion to fetch and
# build all kinds of things. This backend reads what stands in the archive.
_BACKEND = """
import email
import sys
from pathlib import Path

# The name that archives without a backend of their own are built by.
__legacy__ = sys.modules[__name__]


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    info = email.message_from_string(Path("PKG-INFO").read_text())
    target = Path(metadata_directory, f"{info['Name'].replace('-', '_').lower()}-{info['Version']}.dist-info")
    target.mkdir()
    text = f"Metadata-Version: 2.1\\nName: {info['Name']}\\nVersion: {info['Version']}\\n"
    (target / "METADATA").write_text(text)
    (target / "WHEEL").write_text("Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    return target.name
"""


def archive_of(name: str, version: str) -> Path:
    """The source archive, from the cache or the registry."""
    CACHE.mkdir(parents=True, exist_ok=True)
    pattern = f"{name}-{version}.tar.gz"
    if not (CACHE / pattern).exists():
        backend = CACHE / "backend" / "setuptools"
        backend.mkdir(parents=True, exist_ok=True)
        (backend / "__init__.py").touch()
        (backend / "build_meta.py").write_text(_BACKEND)
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(CACHE)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", *options, f"{name}=={version}"],
            env={**os.environ, "PYTHONPATH": str(backend.parent)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    return CACHE / pattern


@pytest.mark.registry
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_checksums_and_licences(recipe: Path) -> None:
    store = parser.parse(recipe)
    name, version = store.getVar("PYPI_PACKAGE"), store.getVar("PV")
    archive = archive_of(name, version)
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == store.getVarFlag("SRC_URI", "sha256sum")
    licences = re.findall(r"file://([^;\s]+);md5=(\w+)", store.getVar("LIC_FILES_CHKSUM"))
    assert licences
    with tarfile.open(archive) as tar:
        for path, md5 in licences:
            member = tar.extractfile(f"{name}-{version}/{path}")
            assert member is not None
            assert hashlib.md5(member.read()).hexdigest() == md5, path


def test_versions_are_those_that_the_pins_are_tested_with() -> None:
    for series in parser.SERIES:
        text = (parser.ROOT / "tests" / "constraints" / f"{series}.txt").read_text()
        pins = dict(re.findall(r"^([\w-]+)==(\S+)$", text, flags=re.MULTILINE))
        data = parser.data(series)
        for name in ("apsw", "msgspec"):
            preferred = data.getVar(f"PREFERRED_VERSION_python3-{name}")
            assert pins[name].startswith(preferred.rstrip("%")), (series, name)
            assert (parser.LAYER / f"recipes-devtools/python/python3-{name}_{pins[name]}.bb").is_file()
    text = (parser.ROOT / "tests" / "constraints" / "scarthgap.txt").read_text()
    version = re.search(r"^zstandard==(\S+)$", text, flags=re.MULTILINE)
    assert version and (parser.LAYER / f"recipes-devtools/python/python3-zstandard_{version[1]}.bb").is_file()
