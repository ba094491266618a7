"""The boot runtime's own configuration (sm-runtime.md §4.1)."""

import re
from pathlib import Path
from typing import Any

import msgspec

from aoscore.common.config import load_section
from aoscore.common.errors import ConfigError, InvalidArgumentError

_ROOT = re.compile(r"(?:^|\s)root=(\S+)")


class BootConfig(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The object ``runtimes[].config`` of a boot runtime.

    `partitions` are the two boot partitions: device paths, or with `detect_mode` ``auto`` their numbers on the disk of
    the root file system. Images of AosCore 9.1 list the runtime without any, to be filled in for a machine: then it is
    there and says what is missing when it is asked for an update (sm-runtime.md §7, D40).
    """

    working_dir: Path | None = None
    loader: str = "/EFI/BOOT/bootx64.efi"
    version_file: str = "aos/version"
    detect_mode: str = ""
    partitions: tuple[str, ...] = ()
    health_check_services: tuple[str, ...] = ()


def load_boot_config(raw: dict[str, Any], *, path: Path, where: str, working_dir: Path) -> BootConfig:
    """Check the object at key path `where` of file `path`; fill the path that depends on SM's working directory.

    Raises ConfigError naming file and key.
    """
    config = load_section(raw, BootConfig, path=path, where=where)
    if config.detect_mode not in ("", "auto"):
        raise ConfigError(f"{path}: '{where}.detectMode' {config.detect_mode!r} is not supported, use auto or leave it")
    if len(set(config.partitions)) not in (0, 2) or len(config.partitions) > 2:
        raise ConfigError(f"{path}: '{where}.partitions' must name two different partitions")
    for name in config.partitions:
        if config.detect_mode and not name.isdigit():
            raise ConfigError(f"{path}: '{where}.partitions' with detectMode auto are numbers, {name!r} is none")
        if not config.detect_mode and not name.startswith("/"):
            raise ConfigError(f"{path}: '{where}.partitions' {name!r} is no path of a device; detectMode is not auto")
    return msgspec.structs.replace(config, working_dir=config.working_dir or working_dir / "runtimes" / "boot")


def partition_devices(config: BootConfig, command_line: str, disks: Path = Path("/dev/disk")) -> tuple[Path, Path]:
    """The two devices. Raises InvalidArgumentError when they can't be told.

    `command_line` is that of the kernel; `disks` has the links that stand for ``root=PARTUUID=…`` and the like.
    """
    if len(config.partitions) != 2:
        raise InvalidArgumentError("'partitions' of the boot runtime names no partitions")
    first, second = config.partitions
    if not config.detect_mode:
        return Path(first), Path(second)
    found = _ROOT.search(command_line)
    if found is None:
        raise InvalidArgumentError("the kernel's command line has no root=, so the boot partitions can't be detected")
    kind, is_link, name = found[1].partition("=")
    root = (disks / f"by-{kind.lower()}" / name).resolve() if is_link else Path(found[1])
    prefix = str(root).rstrip("0123456789")
    if prefix == str(root) or not prefix.startswith("/dev/"):
        raise InvalidArgumentError(f"root={found[1]} is no partition, so the boot partitions can't be detected")
    return Path(prefix + first), Path(prefix + second)
