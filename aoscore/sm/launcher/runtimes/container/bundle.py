"""The files of one container: bundle directory, root file system, state and storage (sm-runtime.md §2.2, §2.5, §2.6).

Everything here blocks and is called from a worker thread. Every step can be repeated, and `remove` clears what any
interrupted step may have left.
"""

import errno
import logging
import os
import shutil
import signal
import stat
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from aoscore.common import linux
from aoscore.common.config import from_json, to_json
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.files import remove_tree, safe_join, write_atomic
from aoscore.common.oci import RunParameters
from aoscore.common.types import InstanceInfo
from aoscore.sm.launcher.runtimes.container.spec import SECRET

_log = logging.getLogger(__name__)

# Both tell of a container, which a power cut ends: they need not be on the disk before the next step.
_RECORD = "instance.json"
_SPEC = "config.json"
_UNMOUNT_ATTEMPTS = 3
# mount(2) hands the options over in one page.
_MAX_MOUNT_OPTIONS_BYTES = 4000
_VIRTUAL_TYPES = frozenset(("proc", "tmpfs", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2"))


class Overlay(msgspec.Struct, frozen=True, rename="camel"):
    """A read-only overlay mount: place below the bundle's rootfs, layers from top to bottom."""

    place: str
    layers: tuple[Path, ...]


class BundleRecord(msgspec.Struct, frozen=True, rename="camel"):
    """What SM must know about a container after its own death. Times are seconds since the epoch."""

    info: InstanceInfo
    started: float = 0.0
    registered: bool = False
    """Whether IAM gave the instance a secret that has to be taken back."""
    permissions: dict[str, dict[str, str]] = {}
    """What the secret stands for."""
    overlays: tuple["Overlay", ...] = ()
    """The root file system, outer mounts first."""
    run_parameters: RunParameters = RunParameters()
    resources: tuple[str, ...] = ()
    """Names of the node's resources that it uses."""
    stop_signal: int = signal.SIGTERM.value
    """What asks it to end."""
    restarts: int = 0
    """Since its last stable run."""


class Bundle:
    """Paths and contents of ``<runtimeDir>/<instanceID>``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rootfs = path / "rootfs"
        self.mounts = path / "mounts"

    def create(self) -> None:
        """An empty bundle in place of whatever was there."""
        self.remove()
        self.path.mkdir(mode=0o755, parents=True)
        self.rootfs.mkdir()
        _make_folders(self.mounts)

    def write_record(self, record: BundleRecord) -> None:
        """Persist what adoption needs."""
        write_atomic(self.path / _RECORD, to_json(record), durable=False)

    def read_record(self) -> BundleRecord | None:
        """None when there is none, as for a container of AosCore 9.1. Raises InvalidArgumentError for a damaged one."""
        try:
            data = (self.path / _RECORD).read_bytes()
        except FileNotFoundError:
            return None
        return from_json(data, BundleRecord, what=str(self.path / _RECORD))

    def write_spec(self, spec: dict[str, Any]) -> None:
        """config.json; it may hold the instance's secret."""
        write_atomic(self.path / _SPEC, to_json(spec), durable=False)

    def secret(self) -> str:
        """The secret in the spec; empty when it has none. Raises OSError, InvalidArgumentError."""
        entries = self._environment(self._read_spec())
        return next((entry.partition("=")[2] for entry in entries if entry.startswith(f"{SECRET}=")), "")

    def replace_secret(self, secret: str) -> None:
        """Have the next start of the bundle use another secret. Raises as `secret`."""
        spec = self._read_spec()
        entries = self._environment(spec)
        entries[:] = [f"{SECRET}={secret}" if entry.startswith(f"{SECRET}=") else entry for entry in entries]
        self.write_spec(spec)

    def _read_spec(self) -> dict[str, Any]:
        path = self.path / _SPEC
        return from_json(path.read_bytes(), dict[str, Any], what=str(path))

    @staticmethod
    def _environment(spec: dict[str, Any]) -> list[str]:
        entries: list[str] = spec["process"]["env"]
        return entries

    def write_host_files(self, hosts: str, resolv_conf: str) -> None:
        """``/etc/hosts`` and ``/etc/resolv.conf`` in the top layer."""
        folder = self.mounts / "etc"
        _make_folders(folder)
        for name, content in (("hosts", hosts), ("resolv.conf", resolv_conf)):
            (folder / name).write_text(content)
            (folder / name).chmod(0o644)

    def make_mount_points(
        self, mounts: Iterable[dict[str, Any]], layers: Sequence[Path], host_binds: Sequence[str]
    ) -> None:
        """A directory or an empty file in the top layer for each mount: the root file system cannot be written later.

        A mount in an earlier one (``/dev/pts``) needs none: its place is there or made in the file system around it.
        What exists in a layer or in a visible directory of the host is left alone, since a new directory would hide a
        symbolic link there (``/lib`` of a merged-usr system). Raises OSError naming the source of a bind mount that
        does not exist.
        """
        above: tuple[str, ...] = ()
        for mount in mounts:
            relative = str(mount["destination"]).strip("/")
            if relative.startswith(above):
                continue
            above += (f"{relative}/",)
            top = relative.partition("/")[0]
            below = [*layers, *([Path("/")] if top in host_binds else [])]
            if any((tree / relative).exists() for tree in below):
                continue
            place = self._below_mounts(top, relative)
            if mount["type"] in _VIRTUAL_TYPES or stat.S_ISDIR(Path(mount["source"]).stat().st_mode):
                _make_folders(place)
            else:
                _make_folders(place.parent)
                place.touch(mode=0o644)

    def _below_mounts(self, top: str, relative: str) -> Path:
        """A place in the top layer, which is new: its links are at its top, and looking for more is what costs."""
        if top and ".." not in relative and "\0" not in relative and not (self.mounts / top).is_symlink():
            return self.mounts / relative
        return safe_join(self.mounts, relative)

    def plan_overlays(
        self, layers: Sequence[Path], host_binds: Sequence[str], *, host_root: Path = Path("/")
    ) -> tuple[Overlay, ...]:
        """The mounts that make up the root file system: image layers (top to bottom) over named host directories.

        The host's root is no layer itself: each visible directory gets an overlay of its own, so nothing else of the
        host can be seen (sm-runtime.md §7, D25), and image layers may lie on the host's root file system, which one
        overlay over all of it would refuse. A symbolic link (``/bin`` of a merged-usr system) is copied.
        """
        overlays = [Overlay("", (self.mounts, *layers))]
        for name in host_binds:
            host = host_root / name
            if host.is_symlink():
                if not any((layer / name).exists() for layer in layers):
                    (self.mounts / name).symlink_to(host.readlink())
            elif host.is_dir():
                _make_folders(self.mounts / name)
                inner = [layer / name for layer in layers if (layer / name).is_dir()]
                overlays.append(Overlay(name, (self.mounts / name, *inner, host)))
        return tuple(overlays)

    def mount_rootfs(self, overlays: Iterable[Overlay]) -> None:
        """Mount what is not mounted yet."""
        for overlay in overlays:
            target = self.rootfs / overlay.place
            if os.path.ismount(target):
                continue
            bad = [str(layer) for layer in overlay.layers if {":", ",", "\\"} & set(str(layer))]
            if bad:
                raise InvalidArgumentError(f"layer path {bad[0]} has a character that an overlay cannot take")
            # A single layer cannot be mounted: overlayfs wants two.
            layers = overlay.layers if len(overlay.layers) > 1 else (*overlay.layers, self._empty())
            options = "lowerdir=" + ":".join(map(str, layers))
            if len(options) > _MAX_MOUNT_OPTIONS_BYTES:
                raise InvalidArgumentError(f"{len(layers)} layers are too many for one root file system")
            linux.mount("overlay", target, "overlay", linux.MS_RDONLY, options)

    def remove(self) -> None:
        """Unmount and delete everything; repeatable."""
        if not self.path.exists():
            return
        for target in self._mounted():
            self._unmount(target)
        remove_tree(self.path)

    def _empty(self) -> Path:
        path = self.path / "empty"
        path.mkdir(exist_ok=True)
        return path

    def _mounted(self) -> list[Path]:
        """Mounts at or below rootfs, inner ones first."""
        rootfs = str(self.rootfs)
        # A node has thousands of mounts: they are compared as text.
        targets = [line.split(" ", 2)[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        return [Path(one) for one in reversed(targets) if one == rootfs or one.startswith(f"{rootfs}/")]

    def _unmount(self, target: Path) -> None:
        for attempt in range(1, _UNMOUNT_ATTEMPTS + 1):
            last = attempt == _UNMOUNT_ATTEMPTS
            try:
                linux.umount(target, linux.MNT_DETACH if last else 0)
                return
            except OSError as error:
                if error.errno != errno.EBUSY or last:
                    raise
                time.sleep(0.05)


def _make_folders(path: Path) -> None:
    """A directory and what lacks above it, readable for the service's user whatever our umask is."""
    try:
        path.mkdir()
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_folders(path.parent)
        path.mkdir()
    path.chmod(0o755)


def prepare_state(root: Path, relative: str, uid: int, gid: int) -> Path | None:
    """The instance's state file, made when absent; None when it has none. Raises InvalidArgumentError for an escape."""
    if not relative:
        return None
    path = safe_join(root, relative)
    if not path.exists():
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.fchown(fd, uid, gid)
        finally:
            os.close(fd)
    return path


def prepare_storage(root: Path, relative: str, uid: int, gid: int) -> Path | None:
    """The instance's storage directory, made when absent; None when it has none."""
    if not relative:
        return None
    path = safe_join(root, relative)
    if not path.exists():
        path.mkdir(mode=0o755, parents=True)
        shutil.chown(path, uid, gid)
    return path
