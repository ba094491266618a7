"""The kas files: right by kas' own schema, and each ready combination says all that a build needs."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
FILES = sorted(RECIPES.rglob("*.yml"))
COMBINATIONS = sorted(path for path in RECIPES.glob("*.yml") if path.name != "base.yml")


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def merged(path: Path) -> dict[str, Any]:
    """A file with what it includes, later ones winning, as kas does it."""
    own = load(path)
    result: dict[str, Any] = {}
    for name in own["header"].get("includes", []):
        merge(result, merged(ROOT / name))
    merge(result, own)
    return result


def merge(target: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            merge(target[key], value)
        else:
            target[key] = value


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    path = distribution("kas").locate_file("kas/schema-kas.json")
    content: dict[str, Any] = json.loads(Path(str(path)).read_text())
    return content


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_file_keeps_to_the_schema(path: Path, schema: dict[str, Any]) -> None:
    jsonschema.validate(load(path), schema)


def test_the_schema_would_refuse_a_mistake(schema: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"header": {"version": 14}, "machines": "qemux86-64"}, schema)


@pytest.mark.parametrize("path", COMBINATIONS, ids=lambda path: path.stem)
def test_a_combination_is_complete(path: Path) -> None:
    build = merged(path)
    kind, _, rest = path.stem.partition("-")
    machine = next(name for name in ("qemux86-64", "qemuarm64", "genericx86-64") if rest.startswith(name))
    assert (build["machine"], build["target"], build["distro"]) == (machine, f"aos-image-{kind}", "aos-core")
    assert build["repos"]["aoscore"] == {"layers": {"meta-aoscore": None}}
    others = {name: repo for name, repo in build["repos"].items() if name != "aoscore"}
    series = "wrynose" if rest.endswith("wrynose") else "scarthgap"
    assert build["defaults"]["repos"]["branch"] == series
    branches = {name: repo["branch"] for name, repo in others.items() if "branch" in repo}
    assert branches == {"bitbake": {"scarthgap": "2.8", "wrynose": "2.18"}[series]}
    assert all(repo["url"].startswith("https://") for repo in others.values())
    settings = "\n".join(build["local_conf_header"].values())
    assert f'AOS_MAIN_NODE = "{int(kind == "main")}"' in settings
    assert ("mp" in build["local_conf_header"]) == (rest.endswith(("gateway", "xen")) and kind == "main")


def test_every_part_is_used_or_offered() -> None:
    parts = {path for path in FILES if path.parent != RECIPES}
    used = {ROOT / name for path in COMBINATIONS for name in load(path)["header"]["includes"]}
    assert {path.name for path in parts - used} == {"benchmark.yml"}


def test_kas_itself_reads_a_combination_the_same_way(tmp_path: Path) -> None:
    """Without a network: every repository is an empty one beside a copy of the files."""
    name = "main-genericx86-64.yml"
    wanted = merged(RECIPES / name)
    shutil.copytree(RECIPES, tmp_path / "recipes")
    here: dict[str, Any] = {"aoscore": {"path": "."}}
    for repo, entry in wanted["repos"].items():
        directory = tmp_path if repo == "aoscore" else tmp_path / repo
        for layer in entry.get("layers", {}):
            (directory / layer).mkdir(parents=True, exist_ok=True)
        directory.mkdir(exist_ok=True)
        author = ("-c", "user.name=test", "-c", "user.email=test@example.com")
        for args in (("init", "-q"), (*author, "commit", "-q", "--allow-empty", "-m", "empty")):
            subprocess.run(["git", "-C", str(directory), *args], check=True, timeout=30)
        if repo != "aoscore":
            here[repo] = {"url": None, "path": str(directory)}
    overlay = {"header": {"version": 14, "includes": [f"recipes/{name}"]}, "repos": here}
    (tmp_path / "local.yml").write_text(yaml.safe_dump(overlay))
    command = [sys.executable, "-m", "kas", "dump", "local.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    read = yaml.safe_load(done.stdout)
    assert {key: read[key] for key in ("machine", "target", "distro", "defaults", "local_conf_header")} == {
        key: wanted[key] for key in ("machine", "target", "distro", "defaults", "local_conf_header")
    }
    assert {name: repo.get("layers") for name, repo in read["repos"].items()} == {
        name: repo.get("layers") for name, repo in wanted["repos"].items()
    }
