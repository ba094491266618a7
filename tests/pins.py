"""Unit and wire tests on the library versions of the Yocto series: `make pins`, or `python tests/pins.py [series ...]`.

Each series has its own virtual environment (.venv-<series>) and its own copy of the source tree
(.cache/pins/<series>), in which protobuf code and extensions are built for its interpreter and its generators: the
build of the working tree stays as it is. A series without an interpreter on this machine is skipped with a reason;
where CI is set, at least one must be there.
"""

import argparse
import filecmp
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ".[cm,sm,iam,mp,devcloud,test]"
# Python versions that stand for a series, the best first. Wrynose has 3.14; distributions rather have 3.13.
SERIES = {"scarthgap": ("3.12",), "wrynose": ("3.14", "3.13")}
# A change in one of these builds anew.
BUILD_INPUTS = ("proto", "aoscore/_speedups", "setup.py")


def find_interpreter(versions: tuple[str, ...]) -> Path | None:
    """The first interpreter of one of these versions that runs and can make virtual environments."""
    pyenv = Path.home() / ".pyenv" / "versions"
    for version in versions:
        in_path = [Path(folder) / f"python{version}" for folder in os.get_exec_path()]
        for candidate in [*in_path, *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)]:
            # A pyenv shim is there for versions that it then refuses to run.
            if candidate.is_file() and _succeeds(candidate, "-c", "import ensurepip, ssl, venv"):
                return candidate
    return None


def _succeeds(*command: str | Path) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(*command: str | Path, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True)


def sync_tree(target: Path) -> list[str]:
    """Make target hold the files of the working tree that git knows or would add, beside what is built there.

    Returns their names.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    names = sorted(name for name in set(listed.stdout.split("\0")) if name and (ROOT / name).is_file())
    manifest = target / ".manifest"
    target.mkdir(parents=True, exist_ok=True)
    for gone in set(manifest.read_text().splitlines() if manifest.exists() else ()) - set(names):
        (target / gone).unlink(missing_ok=True)
    manifest.write_text("\n".join(names))
    for name in names:
        copy = target / name
        if not copy.exists() or not filecmp.cmp(ROOT / name, copy, shallow=False):
            copy.parent.mkdir(parents=True, exist_ok=True)
            # Not the source's time stamp: what is built from the file must look older than it.
            shutil.copy(ROOT / name, copy)
    return names


def digest(*parts: Path | str) -> str:
    """SHA-256 over texts and contents of files."""
    state = hashlib.sha256()
    for part in parts:
        state.update(hashlib.sha256(part.encode() if isinstance(part, str) else part.read_bytes()).digest())
    return state.hexdigest()


def prepare(series: str, interpreter: Path) -> tuple[Path, Path]:
    """The virtual environment's Python and the built source tree of a series, made only as far as something changed."""
    venv, tree = ROOT / f".venv-{series}", ROOT / ".cache" / "pins" / series
    constraints = ROOT / "tests" / "constraints" / f"{series}.txt"
    python = venv / "bin" / "python"
    names = sync_tree(tree)

    environment = digest(str(interpreter), constraints, ROOT / "pyproject.toml")
    sources = [name for name in names if name.startswith(BUILD_INPUTS)]
    build = digest(environment, *sources, *(tree / name for name in sources))
    environment_stamp, build_stamp = venv / ".made-from", tree / ".built-from"

    def install(*arguments: str | Path) -> None:
        _run(python, "-m", "pip", "install", "-q", *arguments, cwd=tree)

    if _read(environment_stamp) != environment:
        build_stamp.unlink(missing_ok=True)
        _run(interpreter, "-m", "venv", "--clear", venv, cwd=tree)
        install("--upgrade", "pip")
        install("-c", constraints, "setuptools", "wheel", "Cython", "grpcio-tools")
        environment_stamp.write_text(environment)
    if _read(build_stamp) != build:
        shutil.rmtree(tree / "build", ignore_errors=True)
        for old in (tree / "aoscore" / "_speedups").glob("*.so"):
            old.unlink()
        # Without isolation the generators of the series are used: code of a newer protoc does not run on its protobuf.
        install("--no-build-isolation", "-c", constraints, "-e", EXTRAS)
        build_stamp.write_text(build)
    return python, tree


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def main() -> int:
    """Run the tests of the named series, of all when none is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", nargs="*", help=", ".join(SERIES))
    parser.add_argument("--jobs", default="2", help="tests at a time")
    arguments = parser.parse_args()
    if unknown := set(arguments.series) - set(SERIES):
        parser.error(f"unknown series {', '.join(sorted(unknown))}; known: {', '.join(SERIES)}")
    # The directory of recorded facts lies beside the working tree, not beside the copy.
    os.environ.setdefault("AOSCORE_SHARED", str(ROOT.parent / "shared"))
    os.environ.pop("PYTHONPATH", None)  # it might lead to the working tree

    run, failed = [], []
    for series in arguments.series or SERIES:
        versions = SERIES[series]
        interpreter = find_interpreter(versions)
        if interpreter is None:
            print(
                f"pins: SKIPPED {series}: no Python {' or '.join(versions)} in PATH or ~/.pyenv/versions",
                file=sys.stderr,
            )
            continue
        run.append(series)
        print(f"pins: {series} on {interpreter}", flush=True)
        python, tree = prepare(series, interpreter)
        command = [python, "-m", "pytest", "tests/unit", "tests/wire", "tests/fuzz", "-n", arguments.jobs, "-q"]
        if subprocess.run(command, cwd=tree, check=False).returncode != 0:
            failed.append(series)
    if failed:
        print(f"pins: FAILED on {', '.join(failed)}", file=sys.stderr)
    if not run and os.environ.get("CI"):
        print("pins: FAILED: CI must have an interpreter of at least one series", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
