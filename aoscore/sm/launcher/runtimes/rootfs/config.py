"""The rootfs runtime's own configuration (sm-runtime.md §3.1)."""

from pathlib import Path
from typing import Any

import msgspec

from aoscore.common.config import load_section


class RootfsConfig(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The object ``runtimes[].config`` of a rootfs runtime.

    `working_dir` is where the initramfs looks for updates; `health_check_services` are the systemd units that must be
    active for a new root to be kept.
    """

    working_dir: Path | None = None
    version_file_path: Path = Path("/etc/aos/version")
    health_check_services: tuple[str, ...] = ()


def load_rootfs_config(raw: dict[str, Any], *, path: Path, where: str, working_dir: Path) -> RootfsConfig:
    """Check the object at key path `where` of file `path`; fill the path that depends on SM's working directory.

    Raises ConfigError naming file and key.
    """
    config = load_section(raw, RootfsConfig, path=path, where=where)
    return msgspec.structs.replace(config, working_dir=config.working_dir or working_dir / "runtimes" / "rootfs")
