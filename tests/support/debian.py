"""Layers of images that others made: Debian packages with all they need, fetched once and kept in the cache."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aoscore"
_SUITE = "trixie"
_FETCH_S = 300.0
# What no program needs to run.
_EXCLUDED = ("dev", "var", "tmp", "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/perl*", "usr/games")


def fetch(packages: Iterable[str]) -> str:
    """See that the layers of packages are in the cache; why that can't be, empty when they are."""
    for package in packages:
        if layer_file(package).exists():
            continue
        if shutil.which("mmdebstrap") is None:
            return f"mmdebstrap is not installed, which fetches Debian's {package}"
        building = _CACHE / f"building-{package}-{os.getpid()}"
        building.mkdir(parents=True)
        # Unpacked and not configured, and nothing but the package and its needs.
        command = [
            "mmdebstrap",
            "--variant=extract",
            f"--include={package}",
            '--aptopt=APT::Install-Recommends "false"',
        ]
        try:
            subprocess.run([*command, _SUITE, building / "tree"], check=True, capture_output=True, timeout=_FETCH_S)
            excluded = [f"--exclude=./{path}" for path in _EXCLUDED]
            archive = ["tar", "--sort=name", *excluded, "-C", building / "tree", "-cf", building / "layer.tar", "."]
            subprocess.run(archive, check=True, timeout=_FETCH_S)
            (building / "layer.tar").rename(layer_file(package))
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            return _reason(package, error)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return ""


def fetch_root() -> str:
    """See that a root file system is in the cache, as the tool packs it; why that can't be, empty when it is."""
    if root().exists():
        return ""
    if shutil.which("mmdebstrap") is None:
        return "mmdebstrap is not installed, which fetches Debian"
    building = root().with_name(f"building-{os.getpid()}-{root().name}")
    building.parent.mkdir(parents=True, exist_ok=True)
    command = ["mmdebstrap", "--variant=standard", "--skip=output/dev", '--aptopt=APT::Install-Recommends "false"']
    try:
        subprocess.run([*command, _SUITE, building], check=True, capture_output=True, timeout=_FETCH_S)
        building.rename(root())
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return _reason("root file system", error)
    finally:
        building.unlink(missing_ok=True)
    return ""


def root() -> Path:
    """The root file system, packed by gzip; `fetch_root` before."""
    return _CACHE / f"debian-{_SUITE}-root.tar.gz"


def layer(package: str) -> bytes:
    """The archive with a package and all it needs; `fetch` it before."""
    return layer_file(package).read_bytes()


def _reason(what: str, error: subprocess.CalledProcessError | subprocess.TimeoutExpired) -> str:
    said = (error.stderr or b"").decode(errors="replace").strip().splitlines()
    return f"can't fetch Debian's {what}: {said[-1] if said else error}"


def layer_file(package: str) -> Path:
    """Where the layer is in the cache."""
    return _CACHE / f"debian-{_SUITE}-{package}.tar"
