"""SM runs where only its own extra is installed."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).parents[3] / "pyproject.toml"
PROGRAM = """
import sys
before = set(sys.modules)
import aoscore.sm.app
print("\\n".join(set(sys.modules) - before))
"""


def name_of(requirement: str) -> str:
    """Normalised name of a distribution."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]).lower()


def with_needs(name: str, found: set[str]) -> None:
    """Add a distribution and all it needs, without extras."""
    if name in found:
        return
    found.add(name)
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in requirements:
        if "extra ==" not in requirement:
            with_needs(name_of(requirement), found)


def test_only_the_sm_extra_is_needed() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    allowed: set[str] = set()
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["sm"]):
        with_needs(name_of(requirement), allowed)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    owners = metadata.packages_distributions()
    # grpc imports its tools where they happen to be installed.
    for module in sorted({name.split(".")[0] for name in modules} - {"aoscore", "grpc_tools"}):
        # A namespace such as "google" has several owners.
        names = {name_of(owner) for owner in owners.get(module, ())}
        assert not names or names & allowed, f"{module} comes from {names}"
    foreign = [name for name in modules if re.match(r"aoscore\.(cm|iam|mp|devcloud|ctl)(\.|$)", name)]
    assert foreign == []
