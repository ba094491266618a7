"""`make layer-check OE=PATH`: the layer in a real build, as far as that goes without the network (testbed.md §9).

PATH is a checkout of openembedded-core with bitbake/ and meta-openembedded/ in it. BitBake computes the task graphs of
both images and says which run-time packages nobody provides. Recipes that need no compiler are really installed, and
compared with the golden trees. Every module that ours import is looked for in the packages of Python that the recipe
names. Nothing is written into the checkout.

meta-virtualization is not part of it: a stand-in layer of its name provides what we need of it, as empty recipes.
"""

import argparse
import ast
import json
import os
import pwd
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LAYER = ROOT / "meta-aoscore"
GOLDEN = Path(__file__).resolve().parent / "golden"
IMAGES = ("aos-image-main", "aos-image-secondary")
OPENEMBEDDED = ("meta-oe", "meta-python", "meta-networking")
# Of those layers only what images need is read: the rest is 2000 recipes more.
WANTED = """
    abseil-cpp autoconf-archive c-ares ccid cmocka cryptsetup dnsmasq googlebenchmark googletest jansson jsoncpp
    libaio libdevmapper libmnl libnftnl libssh libusb-compat lvm2 nftables opensc pcsc-lite pkcs11-provider protobuf
    python3-grpcio python3-grpcio-tools python3-h11 python3-protobuf python3-pyroute2 python3-pyudev python3-systemd
    python3-zstandard re2 softhsm thin-provisioning-tools
"""
# Modules of aoscore.ctl that the recipe leaves out.
UNSHIPPED = ("demo", "host", "keeper", "localcloud", "machine", "sandbox", "webservice")
STANDINS = ("crun", "conmon", "xen-tools")
# Hosts may lack the one locale that BitBake asks for.
LOCALE = "en_US.UTF-8"

_STANDIN = """SUMMARY = "Stand-in for the recipe of that name"
LICENSE = "CLOSED"
INHIBIT_DEFAULT_DEPS = "1"
ALLOW_EMPTY:${PN} = "1"
"""
_LAYER_CONF = """BBPATH .= ":${LAYERDIR}"
BBFILES += "${LAYERDIR}/*.bb"
BBFILE_COLLECTIONS += "virtualization-layer"
BBFILE_PATTERN_virtualization-layer = "^${LAYERDIR}/"
LAYERSERIES_COMPAT_virtualization-layer = "scarthgap wrynose"
"""
_LOCAL_CONF = r"""MACHINE = "qemux86-64"
DISTRO = "{distro}"
INIT_MANAGER = "systemd"
BB_NO_NETWORK = "1"
CONNECTIVITY_CHECK_URIS = ""
PREMIRRORS = ""
MIRRORS = ""
DL_DIR = "${{TOPDIR}}/downloads"
BBMASK = "/meta-openembedded/.*/(?!({wanted})(_[^/]*)?\.bb)[^/]*\.bb(append)?$"
{more}
"""
# Tools of the host in the place of native ones, for recipes without a compiler.
_NO_COMPILER = """ASSUME_PROVIDED += "quilt-native patch-native patch-replacement-native pseudo-native \\
    virtual/fakeroot-native systemd-systemctl-native rpm-native opkg-utils-native dwarfsrcfiles-native"
HOSTTOOLS += "pseudo quilt patch"
FAKEROOTCMD = "/usr/bin/pseudo"
"""
GENERATED = (
    "aos-target",
    *(f"aos-{what}-{kind}" for what in ("config", "firewall", "disks") for kind in ("main", "secondary")),
    "aos-provisioning",
)


class Build:
    """A build directory over the checkout, used by a user who is not root: BitBake refuses that one."""

    def __init__(self, oe: Path, directory: Path, distro: str = "aos-core", more: str = "") -> None:
        self.oe = oe
        self.directory = directory
        (directory / "conf").mkdir(parents=True)
        standin = directory / "meta-standin"
        (standin / "conf").mkdir(parents=True)
        (standin / "conf" / "layer.conf").write_text(_LAYER_CONF)
        for name in STANDINS:
            (standin / f"{name}_1.0.bb").write_text(_STANDIN)
        layers = [oe / "meta", *(oe / "meta-openembedded" / name for name in OPENEMBEDDED), standin, LAYER]
        listed = " \\\n".join(f"    {layer}" for layer in layers)
        (directory / "conf" / "bblayers.conf").write_text(
            f'BBPATH = "${{TOPDIR}}"\nBBFILES ?= ""\nBBLAYERS = " \\\n{listed} \\\n"\n'
        )
        (directory / "conf" / "local.conf").write_text(
            _LOCAL_CONF.format(distro=distro, more=more, wanted="|".join(WANTED.split()))
        )
        (directory / "conf" / "templateconf.cfg").write_text("meta/conf/templates/default\n")
        self._become: list[str] = []
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._become = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
            subprocess.run(["chown", "-R", f"{nobody.pw_uid}:{nobody.pw_gid}", str(directory)], check=True)

    def run(self, *args: str, timeout_s: float = 1800) -> tuple[int, str]:
        """Run a program of BitBake; its exit code and all it said."""
        environment = {
            "LANG": LOCALE,
            "HOME": str(self.directory),
            "BUILDDIR": str(self.directory),
            "BBPATH": str(self.directory),
            "PATH": f"{self.oe}/bitbake/bin:{self.oe}/scripts:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": f"{self.oe}/bitbake/lib",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            ["nice", "-n", "5", *self._become, *args],
            cwd=self.directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        return done.returncode, done.stdout

    def bitbake(self, *args: str) -> str:
        """Run bitbake. Raises SystemExit with what it said when it fails."""
        code, said = self.run("bitbake", *args)
        if code != 0:
            raise SystemExit(f"bitbake {' '.join(args)} failed:\n{said[-6000:]}")
        return said


def series_of(oe: Path) -> str:
    """The series of a checkout. Raises SystemExit when it is none."""
    for part in (
        "meta/conf/layer.conf",
        "bitbake/bin/bitbake",
        *(f"meta-openembedded/{name}" for name in OPENEMBEDDED),
    ):
        if not (oe / part).exists():
            raise SystemExit(f"{oe} has no {part}: see the docstring of {Path(__file__).name} for what it must be")
    text = (oe / "meta" / "conf" / "layer.conf").read_text()
    found = re.search(r'LAYERSERIES_CORENAMES = "(\w+)"', text)
    if found is None:
        raise SystemExit(f"{oe}/meta/conf/layer.conf names no series")
    return found[1]


def graphs(build: Build) -> None:
    """Task graphs of both images; a run-time package that nobody provides fails here."""
    for image in IMAGES:
        began = time.monotonic()
        said = build.bitbake("-g", image)
        warnings = [line for line in said.splitlines() if line.startswith(("WARNING", "ERROR"))]
        recipes = set((build.directory / "pn-buildlist").read_text().split())
        print(f"  {image}: {len(recipes)} recipes, {time.monotonic() - began:.0f} s")
        for line in warnings:
            print(f"    {line}")
        ours = sorted(name for name in recipes if name.startswith(("aos", "isa-l", "python3-apsw", "python3-msgspec")))
        print(f"    ours: {' '.join(ours)}")


def trees(build: Build) -> None:
    """Install every recipe of generated files for real, and compare with the golden trees that the tests keep."""
    for recipe in GENERATED:
        build.bitbake("-c", "install", recipe)
    for kind in ("main", "secondary"):
        got: dict[str, str] = {}
        for recipe in GENERATED:
            if recipe.endswith(("-main", "-secondary")) and not recipe.endswith(kind):
                continue
            code, said = build.run("bitbake-getvar", "--quiet", "--value", "-r", recipe, "D")
            image = Path(said.strip().splitlines()[-1])
            if code != 0 or not image.is_dir():
                raise SystemExit(f"{recipe} was not installed:\n{said}")
            got |= describe(image)
        expected = read_golden(kind)
        wrong = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
        if wrong:
            raise SystemExit(f"files of the {kind} node differ from the generator's: {', '.join(wrong)}")
        print(f"  {kind}: {len(got)} files installed by BitBake are the generator's")


def describe(root: Path) -> dict[str, str]:
    """Files below a directory as the golden trees describe them."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}\n"
        elif path.is_file():
            found[name] = f"mode {path.stat().st_mode & 0o7777:04o}\n{path.read_text()}"
    return found


def read_golden(kind: str) -> dict[str, str]:
    """The golden tree of a kind of node."""
    parts = re.split(r"^=== (.*)\n", (GOLDEN / f"{kind}.txt").read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def python_packages(build: Build, oe: Path) -> None:
    """Every module of the standard library that a component imports is in a package that its recipe names.

    Python is split into many packages there; one that is missing shows only on the target.
    """
    text = (oe / "meta/recipes-devtools/python/python3/python3-manifest.json").read_text()
    manifest = json.loads(re.sub(r"^#.*$", "", text, flags=re.MULTILINE))
    owner: dict[str, str] = {}
    for package, entry in manifest.items():
        for path in entry["files"]:
            match = re.search(r"/python\$\{PYTHON_MAJMIN\}/(?:lib-dynload/)?(_?\w+?)(?:\.py|\.\*|/|\.\w|$)", path)
            if match:
                owner.setdefault(match[1], package)
    closure: dict[str, set[str]] = {}

    def closed(package: str) -> set[str]:
        if package not in closure:
            closure[package] = {package}
            for other in manifest.get(package, {}).get("rdepends", []):
                closure[package] |= closed(other)
        return closure[package]

    missing = []
    for component in ("common", "cm", "sm", "iam", "mp", "ctl", "_speedups"):
        package = component.strip("_")
        needed = set()
        for name in {f"aoscore-{package}", "aoscore-common"}:
            _, said = build.run("bitbake-getvar", "--quiet", "--value", "-r", "aoscore", f"RDEPENDS:{name}")
            needed |= {word.removeprefix("python3-") for word in said.split() if word.startswith("python3-")}
        have = set().union(*(closed(name) for name in needed), closed("core"))
        for module in sorted(imported(ROOT / "aoscore" / component)):
            where = owner.get(module)
            if where is not None and where not in have:
                missing.append(f"aoscore-{package} imports {module}: python3-{where}")
    if missing:
        raise SystemExit("\n".join(["modules without their package:", *missing]))
    print("  modules of the standard library: all in the packages that the recipe names")


def imported(folder: Path) -> set[str]:
    """Top-level names of modules of the standard library that the Python files of a folder import, wherever."""
    found = set()
    for path in folder.rglob("*.py"):
        if path.parent.name == "ctl" and path.stem in UNSHIPPED:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found & sys.stdlib_module_names


def main() -> None:
    """Run all checks on one checkout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("oe", type=Path, help="checkout of openembedded-core")
    parser.add_argument("--only", choices=("graphs", "trees", "modules"), help="one of the checks")
    parser.add_argument("--keep", type=Path, help="build directory to make and keep")
    arguments = parser.parse_args()
    oe = arguments.oe.resolve()
    series = series_of(oe)
    print(f"Series {series}")
    with tempfile.TemporaryDirectory(prefix="aos-layer-check-") as temporary:
        directory = arguments.keep.resolve() if arguments.keep else Path(temporary) / "build"
        Path(temporary).chmod(0o755)
        build = Build(oe, directory)
        if arguments.only in (None, "graphs"):
            graphs(build)
        if arguments.only in (None, "modules"):
            python_packages(build, oe)
        if arguments.only in (None, "trees"):
            # Without the optional distribution: the layer serves others too.
            trees(Build(oe, directory.with_name(directory.name + "-trees"), "nodistro", _NO_COMPILER))


if __name__ == "__main__":
    main()
