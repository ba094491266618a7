"""The guest image of the system tests: Debian trixie with systemd, crun and aoscore built in it (testbed.md §5, §6).

Three parts, each kept under a key of what it is made of, below ~/.cache/aoscore: the Debian tree, the Python packages
for its interpreter, and a layer with aoscore itself. A node is an overlay of these, so nothing is copied.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aoscore"

_SUITE = "trixie"
_PYTHON = "3.13"
_DEBIAN = (
    *("systemd-sysv", "udev", "dbus", "iproute2", "iputils-ping", "nftables", "dnsmasq-base", "crun", "conmon"),
    *("python3", "python3-venv", "python3-dev", "python3-systemd", "procps", "busybox-static", "openssl"),
    # What builds the extensions.
    *("gcc", "libc6-dev", "libssl-dev", "libzstd-dev", "zlib1g-dev"),
)
# Debian's package takes the place of the one that would have to be compiled.
_FROM_DEBIAN = ("systemd-python",)
_COMPONENTS = ("cm", "sm", "iam")


def lower_layers() -> list[Path]:
    """Directories to overlay, uppermost first. Builds what is not there yet."""
    tree = _kept("tree", [_SUITE, *_DEBIAN], _build_tree)
    pyproject = (ROOT / "pyproject.toml").read_text()
    wheels = _kept("wheels", [_PYTHON, pyproject], _download_wheels)
    sources = _source_files()
    parts = [tree.name, wheels.name, *(hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in sources)]
    return [_kept("aoscore", [*parts, *sources], lambda target: _build_aoscore(target, tree, wheels, sources)), tree]


def _source_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "aoscore", "proto", "pyproject.toml", "setup.py", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())


def _kept(kind: str, key_parts: Iterable[str], build: Callable[[Path], None]) -> Path:
    """The directory for this key, built if it is not there; others of its kind are removed."""
    key = hashlib.sha256("\0".join(key_parts).encode()).hexdigest()[:16]
    target = CACHE / f"{kind}-{key}"
    if not target.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"{kind}-*"):
            shutil.rmtree(old)
        building = CACHE / f"building-{kind}-{os.getpid()}"
        try:
            build(building)
            building.rename(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return target


def _run(args: Sequence[str | Path], **more: object) -> None:
    done = subprocess.run([str(arg) for arg in args], capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise RuntimeError(
            f"{args[0]} failed with code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )


def _build_tree(target: Path) -> None:
    include = ",".join(_DEBIAN)
    no_recommends = '--aptopt=APT::Install-Recommends "false"'
    _run(["mmdebstrap", "--variant=minbase", f"--include={include}", no_recommends, _SUITE, target])


def _download_wheels(target: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for part in _COMPONENTS for name in project["optional-dependencies"][part]),
    ]
    wanted = [name for name in wanted if not name.startswith(_FROM_DEBIAN)]
    platforms = [
        f"--platform={name}" for name in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
    ]
    abis = ["--abi=cp313", "--abi=abi3", "--abi=none"]
    options = [f"--python-version={_PYTHON}", "--implementation=cp", "--only-binary=:all:", *abis, *platforms]
    _run([sys.executable, "-m", "pip", "download", "-q", "-d", target, *options, *wanted])
    builders = ("setuptools", "wheel", "cython>=3.0", "grpcio-tools")
    _run([sys.executable, "-m", "pip", "download", "-q", "-d", target / "build", *options, *builders])


def _build_aoscore(target: Path, tree: Path, wheels: Path, sources: list[str]) -> None:
    """Build the wheel inside the guest and install it to /opt/aoscore; only that remains in the layer."""
    for name in ("layer", "work", "mount", "source"):
        (target / name).mkdir(parents=True)
    for name in sources:
        copy = target / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    mount = target / "mount"
    extras = ",".join(_COMPONENTS)
    inside = f"""set -e
        python3 -m venv /tmp/build
        /tmp/build/bin/pip install -q --no-index --find-links /mnt/wheels/build setuptools wheel cython grpcio-tools
        cd /mnt/source
        /tmp/build/bin/pip wheel -q --no-index --no-deps --no-build-isolation -w /tmp/wheel .
        python3 -m venv --system-site-packages /opt/aoscore
        /opt/aoscore/bin/pip install -q --no-index --find-links /mnt/wheels --find-links /tmp/wheel 'aoscore[{extras}]'
        rm -rf /tmp/build /tmp/wheel /root/.cache
    """
    script = f"""set -e
        mount -t overlay overlay -o lowerdir={tree},upperdir={target}/layer,workdir={target}/work {mount}
        mkdir -p {mount}/mnt/wheels {mount}/mnt/source
        mount --bind {wheels} {mount}/mnt/wheels
        mount --bind {target}/source {mount}/mnt/source
        mount -t proc proc {mount}/proc
        exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 chroot {mount} sh -c "$0"
    """
    _run(["unshare", "--mount", "sh", "-c", script, inside])
    (target / "layer" / "mnt" / "wheels").rmdir()
    (target / "layer" / "mnt" / "source").rmdir()
    for name in ("work", "mount", "source"):
        shutil.rmtree(target / name)
    # The layer itself becomes the directory.
    for entry in (target / "layer").iterdir():
        entry.rename(target / entry.name)
    (target / "layer").rmdir()
