"""Builds the wheel of this tree and writes the list of its files as JSON: `python -m tests.layer.wheelfiles FILE`.

Runs in the environment that has Cython and grpcio-tools; the tests of the layer, in theirs, read the list.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ("aoscore", "proto", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


def build(target: Path) -> Path:
    """Build from a copy of the tree's own files, so that the working tree stays as it is; the wheel is in `target`."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    source = target / "source"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(target), str(source)], check=True)
    return next(target.glob("aoscore-*.whl"))


def main() -> None:
    """Write the list."""
    with tempfile.TemporaryDirectory(prefix="aos-wheel-") as temporary:
        with zipfile.ZipFile(build(Path(temporary))) as wheel:
            names = sorted(name for name in wheel.namelist() if not name.endswith("/"))
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    Path(sys.argv[1]).write_text(json.dumps(names))


if __name__ == "__main__":
    main()
