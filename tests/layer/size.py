"""What aoscore adds to the image of a Main Node: `python -m tests.layer.size [FILE]` (make layer-size).

aoscore's own packages and every Python package that only they pull in, installed as on a device: without what the
recipe leaves out, with byte code, extensions stripped. Python packages only: the interpreter, and the programs that the
daemons run (crun, conmon, nftables, dnsmasq and others), are not counted. With FILE the table is put into that page.
"""

import compileall
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

from tests.layer.wheelfiles import build
from tests.support.pages import put_section

BUDGET_MIB = 60
COMPONENTS = ("cm", "sm", "iam")
# The recipe leaves them out.
UNSHIPPED = (
    "aoscore/devcloud/",
    "aoscore/mp/",
    *(
        f"aoscore/ctl/{name}.py"
        for name in ("demo", "host", "keeper", "localcloud", "machine", "sandbox", "webservice")
    ),
)
# The data of tests, what only building needs, and SQLite's own tools, which apsw adds to the packages of the registry
# alone: a recipe's package does not hold them either.
_UNUSED = re.compile(r"(^|/)(tests?|__pycache__|sqlite_extra_binaries)/|\.(pyx|pxd|pyi|c|cpp|h|hpp)$")


def closure(names: list[str]) -> list[str]:
    """Distributions that these need, themselves included, as installed here."""
    found: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found[name] = None
        for text in importlib.metadata.distribution(name).requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return sorted(found)


def copy_distribution(name: str, target: Path) -> None:
    """Its files below `target`, as a package of an image has them."""
    distribution = importlib.metadata.distribution(name)
    for file in distribution.files or []:
        source = Path(str(distribution.locate_file(file)))
        if ".." in file.parts or _UNUSED.search(str(file)) or not source.is_file():
            continue
        copy = target / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())


def finish(directory: Path) -> int:
    """Strip and compile what is there; its size in bytes, in blocks of 4 KiB as a file system has them."""
    for library in directory.rglob("*.so*"):
        subprocess.run(["strip", "--strip-unneeded", str(library)], check=True)
    compileall.compile_dir(directory, quiet=2, workers=1)
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in directory.rglob("*") if path.is_file())


def measure() -> list[tuple[str, int]]:
    """Names and sizes, aoscore first."""
    project = importlib.metadata.distribution("aoscore")
    needed = []
    for text in project.requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": name}) for name in COMPONENTS):
            needed.append(requirement.name)
    sizes = []
    with tempfile.TemporaryDirectory(prefix="aos-size-") as temporary:
        own = Path(temporary) / "own"
        with zipfile.ZipFile(build(Path(temporary) / "build")) as wheel:
            for name in wheel.namelist():
                if not name.startswith(UNSHIPPED):
                    wheel.extract(name, own)
        sizes.append(("aoscore", finish(own)))
        for name in closure(needed):
            target = Path(temporary) / name
            target.mkdir()
            copy_distribution(name, target)
            sizes.append((name, finish(target)))
    return sizes


def table(sizes: list[tuple[str, int]]) -> str:
    """The result as Markdown."""
    mib = 1024 * 1024
    total = sum(size for _, size in sizes)
    rows = "".join(f"| {name} | {size / mib:.1f} |\n" for name, size in sorted(sizes, key=lambda row: -row[1]))
    return (
        f"Python {platform.python_version()}, {platform.machine()}, {os.uname().sysname}; by `make layer-size`. "
        f"Packages of the registry, stripped; a recipe builds with the system's libraries and is smaller.\n\n"
        f"| package | MiB |\n| --- | ---: |\n{rows}| **all** | **{total / mib:.1f}** of {BUDGET_MIB} |\n"
    )


def main() -> None:
    """Print the table, put it into a file, and fail when the budget is spent."""
    sizes = measure()
    text = table(sizes)
    print(text)
    if len(sys.argv) > 1:
        put_section(Path(sys.argv[1]), "layer size", "What it adds to an image", text)
    if sum(size for _, size in sizes) > BUDGET_MIB * 1024 * 1024:
        raise SystemExit(f"more than the budget of {BUDGET_MIB} MiB")


if __name__ == "__main__":
    main()
