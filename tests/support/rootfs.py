"""A node with a rootfs runtime, and its initramfs as a plain model."""

import json
from pathlib import Path

from aoscore.common.types import InstanceInfo
from aoscore.sm.imagemanager.model import InstalledImage
from aoscore.sm.launcher.runtimes.rootfs.config import RootfsConfig
from aoscore.sm.launcher.runtimes.rootfs.runtime import RootfsRuntime
from tests.support.components import NODE, FakeSystem, Lives, image, instance, no_pause

FULL = "application/vnd.aos.image.component.full.v1+squashfs"
INCREMENTAL = "application/vnd.aos.image.component.inc.v1+squashfs"


class Node(Lives):
    """A disk, and the initramfs as sm-runtime.md §3.3 tells it. The image of version V is squashfs magic and V."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.updates = directory / "updates"
        self.version_file = directory / "version"
        self.root = "1.0.0"
        self.boots = 0
        self.system = FakeSystem()
        self.ignores_updates = False
        self.boot()

    def boot(self) -> None:
        """Reboot, or come up after a power cut."""
        self.boots += 1
        version = self.root if self.ignores_updates else self._initramfs()
        self.version_file.write_text(f'VERSION="{version}"\n')

    def _initramfs(self) -> str:
        has = {name: (self.updates / name).exists() for name in ("do_update", "do_apply", "updated", "failed")}
        if has["do_apply"]:
            self.root = self._image()
            for name in ("do_update", "updated", "failed", "do_apply"):
                (self.updates / name).unlink(missing_ok=True)
        elif has["updated"]:
            if not has["failed"]:
                (self.updates / "failed").write_text("update not confirmed")
            (self.updates / "do_update").unlink(missing_ok=True)
            (self.updates / "updated").unlink()
        elif has["do_update"] and not has["failed"]:
            (self.updates / "updated").write_text("1")
            return self._image()
        return self.root

    def _image(self) -> str:
        return (self.updates / "image.squashfs").read_bytes().removeprefix(b"hsqs").decode()

    def runtime(self) -> RootfsRuntime:
        """SM's next life."""
        config = RootfsConfig(
            working_dir=self.updates, version_file_path=self.version_file, health_check_services=("a.service",)
        )
        return RootfsRuntime(config, "rootfs", NODE, self.system, boot_id=f"boot {self.boots}", sleep=no_pause)

    def update(self, version: str = "2.0.0", *, holds: str | None = None) -> tuple[InstanceInfo, InstalledImage]:
        """What CM wants, and its image as the store has it."""
        info = instance(self.runtime().info.runtime_id, version, f"sha256:manifest-{version}")
        return info, image(self.directory / f"blob-{version}", info, b"hsqs" + (holds or version).encode(), FULL)

    def files(self) -> set[str]:
        """All there is in the directory."""
        return {path.name for path in self.updates.iterdir()}

    def installed(self) -> str:
        """Version in the record of what is installed."""
        version: str = json.loads((self.updates / "installed_instance.json").read_text())["version"]
        return version
