"""Every recipe reads, for both node kinds, both series and every selection; packages hold what they must."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import bb
import pytest

from aoscore.ctl.target import COMPONENTS, PARTS, node_from, tree, write
from tests.layer import parser

RECIPE = parser.LAYER / "recipes-aos" / "aoscore" / "aoscore_0.1.0.bb"
IMAGES = {kind: parser.LAYER / "recipes-core" / "images" / f"aos-image-{kind}.bb" for kind in ("main", "secondary")}
SELECTIONS = [chosen for count in range(1, 5) for chosen in itertools.combinations(COMPONENTS, count)]
GOLDEN = Path(__file__).resolve().parent / "golden"
PROGRAMS = {
    "cm": ("aos_communicationmanager", "aos_cm_app"),
    "sm": ("aos_servicemanager", "aos_sm_app"),
    "iam": ("aos_iamanager", "aos_iam_app"),
    "mp": ("aos_messageproxy", "aos_mp_app"),
}


def names(chosen: tuple[str, ...]) -> str:
    return "+".join(chosen)


@pytest.mark.parametrize("series", parser.SERIES)
@pytest.mark.parametrize("main", ["1", "0"])
@pytest.mark.parametrize("recipe", parser.recipes(), ids=lambda path: path.name)
def test_every_recipe_reads(recipe: Path, main: str, series: str) -> None:
    store = parser.parse(recipe, series, AOS_MAIN_NODE=main)
    for name in ("SUMMARY", "LICENSE"):
        assert store.getVar(name), f"{recipe.name} has no {name}"
    for package in parser.package_names(store):
        # Expanding is where mistakes in our inline functions show.
        parser.depends(store, package)


@pytest.mark.parametrize("series", parser.SERIES)
@pytest.mark.parametrize("append", parser.appends(), ids=lambda path: path.name)
def test_changes_to_other_recipes_are_guarded(append: Path, series: str, tmp_path: Path) -> None:
    """Without our distribution feature nothing of another layer's recipe may differ, its signatures included."""
    recipe = tmp_path / append.name.replace(".bbappend", ".bb").replace("%", "1.0")
    recipe.write_text('SUMMARY = "x"\nLICENSE = "MIT"\nPACKAGECONFIG ??= "one"\nSRC_URI = "file://a"\n')

    def values(features: str, with_append: bool) -> dict[str, list[str]]:
        store = parser.parse(recipe, series, append if with_append else None, DISTRO_FEATURES=features)
        unlike = {"BBINCLUDED", "FILE", "FILE_DIRNAME", "WORKDIR", "T", "D", "B", "S", "__inherit_cache", "__depends"}
        ours = (key for key in store if key not in unlike and not key.startswith("__"))
        return {key: words for key in ours if (words := str(store.getVar(key) or "").split())}

    plain, off = values("systemd", False), values("systemd", True)
    differ = {key for key in plain.keys() | off.keys() if plain.get(key) != off.get(key)}
    # The search path for files is not part of a signature.
    assert differ <= {"FILESEXTRAPATHS"}, f"{append.name} changes {differ} without the feature aoscore"
    on = values("systemd aoscore xen selinux", True)
    assert any(on[key] != plain.get(key) for key in on), f"{append.name} does nothing"


@pytest.mark.parametrize("chosen", SELECTIONS, ids=names)
@pytest.mark.parametrize("kind", ["main", "secondary"])
def test_selections(kind: str, chosen: tuple[str, ...]) -> None:
    settings = {"AOS_MAIN_NODE": "1" if kind == "main" else "0", "AOS_COMPONENTS": " ".join(chosen)}
    if kind == "secondary" and "cm" in chosen:
        for recipe in (RECIPE, IMAGES[kind]):
            del parser.messages()[:]
            with pytest.raises(bb.BBHandledException):
                parser.parse(recipe, **settings)
            assert re.search(
                r"'cm' runs on the main node only; valid on a secondary node: sm iam mp", parser.messages()[-1]
            )
        return
    store = parser.parse(RECIPE, **settings)
    packages = parser.package_names(store)
    for name in COMPONENTS:
        assert (f"aoscore-{name}" in packages) == (name in chosen)
    installed = parser.parse(IMAGES[kind], **settings).getVar("IMAGE_INSTALL").split()
    assert {word for word in installed if word in {f"aoscore-{name}" for name in COMPONENTS}} == {
        f"aoscore-{name}" for name in chosen
    }


@pytest.mark.parametrize("recipe", [RECIPE, *IMAGES.values()], ids=lambda path: path.name)
def test_an_unknown_component_ends_parsing(recipe: Path) -> None:
    del parser.messages()[:]
    with pytest.raises(bb.BBHandledException):
        parser.parse(recipe, AOS_COMPONENTS="sm vis")
    assert "AOS_COMPONENTS = 'sm vis': component 'vis' is unknown; valid on a" in parser.messages()[-1]


@pytest.mark.parametrize("version", ["", "1", "1.0", "one"])
def test_a_version_that_is_none_ends_parsing(version: str) -> None:
    del parser.messages()[:]
    with pytest.raises(bb.BBHandledException):
        parser.parse(IMAGES["main"], AOS_ROOTFS_IMAGE_VERSION=version)
    assert "AOS_ROOTFS_IMAGE_VERSION" in parser.messages()[-1]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AOS_MAIN_NODE", "yes", "AOS_MAIN_NODE = 'yes' is not valid; valid: 1"),
        ("AOS_KEYS", "paper", "'paper' is not one of softhsm, optee, file"),
        ("AOS_RUNTIMES", "container vm", "runtime 'vm' is unknown"),
        ("AOSCORE_TREE", "/nowhere", "AOSCORE_TREE = '/nowhere' is not the tree of aoscore"),
    ],
)
def test_other_wrong_values_end_parsing(variable: str, value: str, message: str) -> None:
    del parser.messages()[:]
    with pytest.raises(bb.BBHandledException):
        parser.parse(IMAGES["main"], **{variable: value})
    assert message in parser.messages()[-1]


def test_a_product_without_secondary_nodes_only_skips_them() -> None:
    with pytest.raises(bb.parse.SkipRecipe, match="AOS_COMPONENTS:aos-secondary-node"):
        parser.parse(IMAGES["secondary"], AOS_COMPONENTS="cm sm iam")
    parser.parse(IMAGES["main"], AOS_COMPONENTS="cm sm iam")
    parser.parse(IMAGES["secondary"], **{"AOS_COMPONENTS": "cm sm iam", "AOS_COMPONENTS:aos-secondary-node": "sm"})


def test_one_build_directory_has_what_both_images_select() -> None:
    settings = {"AOS_COMPONENTS:aos-main-node": "cm iam", "AOS_COMPONENTS:aos-secondary-node": "iam mp"}
    assert set(parser.parse(RECIPE, **settings).getVar("AOSCORE_BUILT").split()) == {"cm", "iam", "mp"}
    for kind, chosen in (("main", {"cm", "iam"}), ("secondary", {"iam", "mp"})):
        installed = parser.parse(IMAGES[kind], **settings).getVar("IMAGE_INSTALL").split()
        assert chosen == {name for name in COMPONENTS if f"aoscore-{name}" in installed}


def test_an_unselected_component_pulls_nothing_in() -> None:
    store = parser.parse(RECIPE, AOS_COMPONENTS="iam")
    needed = set().union(*(parser.depends(store, package) for package in parser.package_names(store)))
    assert not needed & {"crun", "conmon", "nftables", "python3-pyroute2", "python3-pyudev", "aoscore-cm"}
    assert "python3-websockets" in needed, "IAM asks VIS servers"
    mp = parser.parse(RECIPE, AOS_COMPONENTS="mp", AOS_MAIN_NODE="0")
    needed = set().union(*(parser.depends(mp, package) for package in parser.package_names(mp)))
    assert "python3-websockets" not in needed


@pytest.fixture(scope="session")
def wheel_files() -> dict[str, str]:
    """What the wheel of this tree installs on a device, by path; taken from the real wheel."""
    listed = os.environ.get("AOSCORE_WHEEL_FILES")
    if not listed:
        pytest.fail("AOSCORE_WHEEL_FILES is not set: run `make layer`, which builds the wheel")
    paths = json.loads(Path(listed).read_text())
    assert "aoscore/cm/app.py" in paths and "aoscore/sm/app.py" in paths, "that is no wheel of aoscore"
    return dict.fromkeys(paths, "")


def on_device(store: object, wheel_files: dict[str, str]) -> dict[str, str]:
    """The files after do_install: packages, byte code, programs with their links, without what is unselected."""
    site = store.getVar("PYTHON_SITEPACKAGES_DIR")  # type: ignore[attr-defined]
    features = store.getVar("PACKAGECONFIG").split()  # type: ignore[attr-defined]
    found = {}
    for path in wheel_files:
        parts = path.split("/")
        if parts[0] == "bin":
            continue
        if (
            parts[0] == "aoscore"
            and len(parts) > 2
            and (parts[1] == "devcloud" or (parts[1] in COMPONENTS and parts[1] not in features))
        ):
            continue
        found[f"{site}/{path}"] = ""
        if path.endswith(".py"):
            found[f"{site}/{'/'.join(parts[:-1])}/__pycache__/{parts[-1][:-3]}.cpython-312.pyc"] = ""
    for component, programs in PROGRAMS.items():
        if component in features:
            found |= {f"/usr/bin/{program}": "" for program in programs}
    found["/usr/bin/aosctl"] = ""
    return found


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [("main", ()), ("secondary", ()), ("secondary", ("sm", "iam")), *(("main", chosen) for chosen in SELECTIONS)],
    ids=lambda value: value if isinstance(value, str) else names(value) or "default",
)
def test_no_file_of_a_component_left_out(kind: str, chosen: tuple[str, ...], wheel_files: dict[str, str]) -> None:
    settings = {f"AOS_COMPONENTS:aos-{kind}-node": " ".join(chosen)} if chosen else {}
    image = parser.parse(IMAGES[kind], **settings)
    selected = image.getVar("AOS_COMPONENTS").split()
    store = parser.parse(RECIPE, **settings)
    packages = parser.split_files(store, on_device(store, wheel_files))
    assert packages[""] == set(), "files that no package takes"
    # What the image installs: the packages it names, and what those need of ours.
    wanted = {word for word in image.getVar("IMAGE_INSTALL").split() if word in packages}
    while more := {name for package in wanted for name in parser.depends(store, package) if name in packages} - wanted:
        wanted |= more
    files = set().union(*(packages[name] for name in wanted))
    for component, programs in PROGRAMS.items():
        present = [path for path in files if f"/aoscore/{component}/" in path or Path(path).name in programs]
        assert bool(present) == (component in selected), (component, present[:3])
    assert not [path for path in files if "devcloud" in path]
    # And nothing in the configuration either.
    config = node_from({"kind": kind, "components": " ".join(selected)})
    for entry in tree(config):
        for component in set(COMPONENTS) - set(selected):
            assert not re.search(rf"/(aos-)?{component}(-prov\w*)?\.(cfg|service)$", entry.path)


def settings_of(store: object) -> dict[str, str]:
    """The settings that the class hands to the generator."""
    pairs = (word.split("=") for word in store.getVar("AOSCORE_SETTINGS").split())  # type: ignore[attr-defined]
    given = {name: (store.getVar(variable) or "").strip() for name, variable in pairs}  # type: ignore[attr-defined]
    return {name: value for name, value in given.items() if value}


@pytest.mark.parametrize("kind", ["main", "secondary"])
def test_golden_trees(kind: str, tmp_path: Path) -> None:
    """The files of all recipes together, as a product gets them; AOS_WRITE_GOLDEN=1 writes them anew."""
    recipes = sorted((parser.LAYER / "recipes-aos").glob(f"aos-*/aos-*-{kind}_*.bb"))
    recipes += sorted((parser.LAYER / "recipes-aos").glob("aos-*/aos-target_*.bb"))
    recipes += sorted((parser.LAYER / "recipes-aos").glob("aos-*/aos-provisioning_*.bb"))
    parts: list[str] = []
    for recipe in recipes:
        store = parser.parse(recipe)
        mine = store.getVar("AOSCORE_PARTS").split()
        parts += mine
        settings = {"kind": store.getVar("AOSCORE_NODE_KIND"), **settings_of(store)}
        write(tree(node_from(settings), tuple(mine)), tmp_path)
    assert sorted(parts) == sorted(set(PARTS) - {"data", "image"}), "every part is in one recipe"
    got = {}
    for path in sorted(tmp_path.rglob("*")):
        if path.is_symlink():
            got[str(path.relative_to(tmp_path))] = f"link to {path.readlink()}\n"
        elif path.is_file():
            mode = path.stat().st_mode & 0o7777
            got[str(path.relative_to(tmp_path))] = f"mode {mode:04o}\n{path.read_text()}"
    golden = GOLDEN / f"{kind}.txt"
    text = "".join(f"=== {name}\n{content}" for name, content in got.items())
    if os.environ.get("AOS_WRITE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


def test_units_are_what_systemd_takes(tmp_path: Path) -> None:
    """systemd-analyze verify on all units of both kinds; programs of a device are not looked for."""
    for kind in ("main", "secondary"):
        root = tmp_path / kind
        write(tree(node_from({"kind": kind, "components": "cm sm iam mp" if kind == "main" else "sm iam mp"})), root)
        units = sorted((root / "usr/lib/systemd/system").glob("aos*.*"))
        checked = [path for path in units if path.suffix in (".service", ".target", ".slice")]
        assert len(checked) > 8
        for path in checked:
            text = re.sub(r"^(Exec\w+=[-+]*)\S+", r"\1/bin/true", path.read_text(), flags=re.MULTILINE)
            path.write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *map(str, checked)],
            capture_output=True,
            text=True,
            env={**os.environ, "SYSTEMD_UNIT_PATH": f"{root}/usr/lib/systemd/system:/usr/lib/systemd/system"},
        )
        # Older programs do not know what newer series have; they say so and go on.
        said = [line for line in done.stderr.splitlines() if "Unknown key name" not in line and "aos" in line]
        assert done.returncode == 0 and said == [], done.stderr


def test_shell_scripts_are_clean(tmp_path: Path) -> None:
    scripts = [path for path in parser.LAYER.rglob("*") if path.is_file() and path.read_bytes()[:9] == b"#!/bin/sh"]
    for kind in ("main", "secondary"):
        write(tree(node_from({"kind": kind})), tmp_path / kind)
        scripts += sorted((tmp_path / kind / "opt").rglob("*.sh"))
    assert scripts
    # The framework of the initramfs gives its modules the kernel's arguments as variables: assigned elsewhere.
    modules = [path for path in scripts if "initrdscripts" in path.parts]
    for files, options in ((set(scripts) - set(modules), []), (modules, ["--exclude=SC2154"])):
        if files:
            command = ["shellcheck", "-s", "sh", *options, *map(str, sorted(files))]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


def test_oelint() -> None:
    tool = Path(sys.executable).parent / "oelint-adv"
    files = sorted(
        str(path)
        for path in parser.LAYER.rglob("*")
        if path.suffix in (".bb", ".inc", ".bbappend", ".bbclass", ".conf") and path.is_file()
    )
    done = subprocess.run([tool, "--jobs", "2", *files], cwd=parser.LAYER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
