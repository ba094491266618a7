"""The root file system of guests in layers: Debian trixie, without its compilers, with aoscore (testbed.md §5).

A node is an overlay of these and its own files, so nothing is copied: systemd-nspawn boots the overlay, and a guest's
disk is made of it.
"""

import hashlib
import shutil
import sys
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from aoscore.common.files import remove_tree
from aoscore.ctl.host import run
from qemu.cache import kept, run_builder

ROOT = Path(__file__).resolve().parent.parent

_SUITE = "trixie"
_PYTHON = "3.13"
_GUEST_KERNEL = "linux-image-cloud-amd64"
_RUN = (
    *(
        "systemd-sysv",
        "systemd-resolved",
        "udev",
        "dbus",
        "kmod",
        "iproute2",
        "iputils-ping",
        "procps",
        "busybox-static",
        "openssl",
        "libisal2",
    ),
    *(_GUEST_KERNEL, "initramfs-tools", "zstd", "ca-certificates"),
    *("nftables", "dnsmasq-base", "crun", "conmon", "python3", "python3-venv", "python3-systemd"),
    *("softhsm2", "opensc", "pkcs11-provider"),
    *("e2fsprogs", "quota", "cryptsetup-bin", "lvm2", "nfs-kernel-server", "nfs-common", "rpcbind"),
)
# Builds the extensions; a guest does not have it.
_BUILD = ("python3-dev", "gcc", "libc6-dev", "libisal-dev", "libssl-dev", "libzstd-dev", "zlib1g-dev")
_XEN = "libxen-dev"
# The guest's kernel is not built for Dom0.
_DOM0 = ("linux-image-amd64", "xen-hypervisor-4.20-amd64", "xen-utils-4.20", "xenstore-utils")
# An initial RAM disk with all modules of Dom0's kernel would take long to load, and to make.
_DOM0_HOOKS = (
    '--essential-hook=mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"',
    '--essential-hook=echo MODULES=list > "$1/etc/initramfs-tools/conf.d/aos"',
    '--essential-hook=printf "%s\\n" virtio_pci virtio_blk ext4 > "$1/usr/share/initramfs-tools/modules.d/aos"',
)
# Debian's package takes the place of the one that would have to be compiled.
_FROM_DEBIAN = ("systemd-python",)
_COMPONENTS = ("cm", "sm", "iam", "mp")
_SOURCES = ("aoscore", "proto", "pyproject.toml", "setup.py", "LICENSE")
_BUILD_TIMEOUT_S = 1800.0


def lower_layers(*, with_vchan: bool = False) -> list[Path]:
    """Directories to overlay, uppermost first. Builds what is not there yet. `with_vchan`: MP has its vchan module."""
    names = (*_RUN, *_BUILD)
    tree = kept("tree", [_SUITE, *names], partial(_build_tree, names=names))
    runtime = kept("runtime", [tree.name], lambda target: _build_runtime(target, tree))
    pyproject = (ROOT / "pyproject.toml").read_text()
    wheels = kept("wheels", [_PYTHON, pyproject], _download_wheels)
    sources = _source_files()
    contents = [hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in sources]
    # What libxenvchan is made of is found when aoscore is built, and lies beside it.
    xen = [kept("xen", [_SUITE, _XEN], _extract_xen)] if with_vchan else []
    lower = [*xen, tree]
    product = kept(
        "aoscore",
        [*(layer.name for layer in lower), wheels.name, *contents, *sources],
        lambda target: _build_aoscore(target, lower, wheels, sources),
    )
    return [product, *xen, runtime, tree]


def dom0_layers() -> list[Path]:
    """Directories to overlay for Xen's Dom0, uppermost first: aoscore as guests have it, and a tree with Xen."""
    names = [name for name in (*_RUN, *_DOM0) if name != _GUEST_KERNEL]
    tree = kept("dom0", [_SUITE, *names, *_DOM0_HOOKS], partial(_build_tree, names=names, hooks=_DOM0_HOOKS))
    return [lower_layers(with_vchan=True)[0], tree]


def kernel(layers: list[Path]) -> tuple[Path, Path]:
    """Kernel and initial RAM disk of the layers."""
    boot = layers[-1] / "boot"
    return next(boot.glob("vmlinuz-*")), next(boot.glob("initrd.img-*"))


def _source_files() -> list[str]:
    command = [
        "git",
        "ls-files",
        "-co",
        "--exclude-standard",
        "aoscore",
        "proto",
        "pyproject.toml",
        "setup.py",
        "LICENSE",
    ]
    return sorted(name for name in run(command, cwd=ROOT).splitlines() if (ROOT / name).is_file())


def _build_tree(target: Path, names: Sequence[str], hooks: Sequence[str] = ()) -> None:
    no_recommends = '--aptopt=APT::Install-Recommends "false"'
    command = [
        "mmdebstrap",
        "--variant=minbase",
        f"--include={','.join(names)}",
        no_recommends,
        *hooks,
        _SUITE,
        str(target),
    ]
    run_builder(command, _BUILD_TIMEOUT_S)


def _extract_xen(target: Path) -> None:
    command = ["mmdebstrap", "--variant=extract", f"--include={_XEN}", _SUITE, str(target)]
    run_builder(command, _BUILD_TIMEOUT_S)
    for entry in target.iterdir():
        if entry.name != "usr":
            remove_tree(entry)


def _build_runtime(target: Path, tree: Path) -> None:
    """What has to be hidden from the tree, to have it without compilers."""
    _in_overlay(target, [tree], f"apt-get -qq purge --autoremove -y {' '.join(_BUILD)}", {})


def _download_wheels(target: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for part in _COMPONENTS for name in project["optional-dependencies"][part]]
    wanted = [name for name in [*project["dependencies"], *extras] if not name.startswith(_FROM_DEBIAN)]
    platforms = [f"--platform=manylinux{kind}_x86_64" for kind in ("_2_28", "_2_17", "2014")]
    options = [f"--python-version={_PYTHON}", "--implementation=cp", "--only-binary=:all:", *platforms]
    options += ["--abi=cp313", "--abi=abi3", "--abi=none"]
    download = [sys.executable, "-m", "pip", "download", "-q", "-d"]
    run([*download, target, *options, *wanted], _BUILD_TIMEOUT_S)
    run([*download, target / "build", *options, "setuptools", "wheel", "cython>=3.0", "grpcio-tools"], _BUILD_TIMEOUT_S)


def _build_aoscore(target: Path, lower: list[Path], wheels: Path, sources: list[str]) -> None:
    """Build the wheel inside the guest's tree and install it to /opt/aoscore; only that remains in the layer."""
    source = target.with_name(f"{target.name}.source")
    try:
        for name in sources:
            copy = source / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy)
        script = f"""
            python3 -m venv /tmp/build
            /tmp/build/bin/pip install -q --no-index --find-links /mnt/wheels/build setuptools wheel cython grpcio-tools
            cd /mnt/source
            /tmp/build/bin/pip wheel -q --no-index --no-deps --no-build-isolation -w /tmp/wheel .
            python3 -m venv --system-site-packages /opt/aoscore
            /opt/aoscore/bin/pip install -q --no-index --find-links /mnt/wheels --find-links /tmp/wheel \
                'aoscore[{",".join(_COMPONENTS)}]'
            rm -rf /tmp/build /tmp/wheel /root/.cache
        """
        _in_overlay(target, lower, script, {"wheels": wheels, "source": source})
    finally:
        shutil.rmtree(source, ignore_errors=True)


def _in_overlay(target: Path, lower: list[Path], script: str, mounts: dict[str, Path]) -> None:
    """Run a script as root of the overlay of `lower`; what it changes becomes `target`. `mounts` appear below /mnt."""
    for name in ("layer", "work", "mount"):
        (target / name).mkdir(parents=True)
    mount = target / "mount"
    binds = "".join(
        f"mkdir {mount}/mnt/{name}; mount --bind {path} {mount}/mnt/{name}\n" for name, path in mounts.items()
    )
    options = f"lowerdir={':'.join(map(str, lower))},upperdir={target}/layer,workdir={target}/work"
    variables = "PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive"
    enter = f"""set -e
        mount -t overlay overlay -o {options} {mount}
        {binds}
        mount -t proc proc {mount}/proc
        exec env -i {variables} chroot {mount} sh -ec "$0"
    """
    run_builder(["sh", "-c", enter, script], _BUILD_TIMEOUT_S)
    for name in mounts:
        (target / "layer" / "mnt" / name).rmdir()
    for name in ("work", "mount"):
        shutil.rmtree(target / name)
    # The layer itself becomes the directory.
    for entry in (target / "layer").iterdir():
        entry.rename(target / entry.name)
    (target / "layer").rmdir()
