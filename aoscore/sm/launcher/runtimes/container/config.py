"""The container runtime's own configuration (sm-runtime.md §2.1) and keys that only we have."""

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from aoscore.common.config import Duration, load_section
from aoscore.common.errors import ConfigError

CAPABILITIES = ("CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE")
# Below are users of the node and of services.
_FIRST_FREE_ID = 65536
_LAST_ID = 2**31
_CAPABILITY = re.compile(r"CAP_[A-Z_]{2,30}")


class OutputKind(StrEnum):
    """Where the output of containers goes."""

    AUTO = "auto"
    JOURNAL = "journal"
    FILES = "files"


class DiskSpeed(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """How fast one instance may use each disk that it has files on; 0 means as fast as it can.

    Item configurations have no such limits, so they are the node's and equal for all instances.
    """

    read_bytes_per_s: int = msgspec.field(name="readSpeed", default=0)
    write_bytes_per_s: int = msgspec.field(name="writeSpeed", default=0)
    reads_per_s: int = msgspec.field(name="readOperations", default=0)
    writes_per_s: int = msgspec.field(name="writeOperations", default=0)

    @property
    def is_limited(self) -> bool:
        """Whether any of them is set."""
        return self != DiskSpeed()


class ContainerConfig(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The object ``runtimes[].config`` of a container runtime.

    Own keys: `conmon_executable`; `cgroup_parent`; `host_files` (bound read-only at the same place where the host has
    them); `seccomp` (whether the default profile is applied); `stop_timeout` (between SIGTERM and SIGKILL where the
    item says nothing); `settle_time` (a process that lives that long is active); `restart_limit` (longest pause between
    restarts); `output` and, for files, `output_dir`, `output_max_size` (bytes per instance); `default_pids_limit`
    (processes of an instance whose item names no limit, 0 for none: one that forks without end must not take the node
    along);
    `disk_speed`; `capabilities` (all that a service may ever have, those of AosCore 9.1 unless others are named);
    `user_namespace_base` (0 for none: otherwise services live in user namespaces, where root is this id of the node and
    nobody else exists but the service's own user and groups. Then their storages must be reachable for everybody by
    path, and devices have the same place inside as outside).
    """

    runtime_dir: Path = Path("/run/aos/runtime")
    host_whiteouts_dir: Path | None = None
    """Accepted for files of AosCore 9.1 and not needed: nothing of the host is visible that is not named."""
    storage_dir: Path | None = None
    state_dir: Path | None = None
    host_binds: tuple[str, ...] = ("bin", "sbin", "lib", "lib64", "usr")
    crun_state_root: Path = Path("/run/crun")
    crun_executable: str = "/usr/bin/crun"
    conmon_executable: str = "/usr/bin/conmon"
    cgroup_parent: str = "/system.slice/system-aos.slice/system-aos-service.slice"
    host_files: tuple[Path, ...] = (Path("/etc/nsswitch.conf"), Path("/etc/ssl"))
    seccomp: bool = True
    stop_timeout_s: Duration = msgspec.field(name="stopTimeout", default=Duration(10))
    settle_time_s: Duration = msgspec.field(name="settleTime", default=Duration(0.1))
    restart_limit_s: Duration = msgspec.field(name="restartLimit", default=Duration(60))
    default_pids_limit: int = 4096
    disk_speed: DiskSpeed = DiskSpeed()
    capabilities: tuple[str, ...] = CAPABILITIES
    user_namespace_base: int = 0
    output: OutputKind = OutputKind.AUTO
    output_dir: Path | None = None
    output_max_size_bytes: int = msgspec.field(name="outputMaxSize", default=1024 * 1024)


def load_container_config(raw: dict[str, Any], *, path: Path, where: str, working_dir: Path) -> ContainerConfig:
    """Check the object at key path `where` of file `path`; fill paths that depend on SM's working directory.

    Raises ConfigError naming file and key.
    """
    config = load_section(raw, ContainerConfig, path=path, where=where)
    check_limits(config.default_pids_limit, config.disk_speed, config.capabilities, path=path, where=where)
    if config.user_namespace_base and not _FIRST_FREE_ID <= config.user_namespace_base < _LAST_ID:
        raise ConfigError(f"{path}: '{where}.userNamespaceBase' must be 0 or at least {_FIRST_FREE_ID}")
    return msgspec.structs.replace(
        config,
        storage_dir=config.storage_dir or working_dir / "storages",
        state_dir=config.state_dir or working_dir / "states",
        output_dir=config.output_dir or working_dir / "instancelogs",
    )


def check_limits(
    pids_limit: int, disk_speed: DiskSpeed, capabilities: Sequence[str], *, path: Path, where: str
) -> None:
    """Raise ConfigError for limits below 0 and for what can be no capability."""
    if min(pids_limit, *msgspec.structs.astuple(disk_speed)) < 0:
        raise ConfigError(f"{path}: '{where}': 'defaultPidsLimit' and 'diskSpeed' can't be below 0")
    if bad := [name for name in capabilities if not _CAPABILITY.fullmatch(name)]:
        raise ConfigError(f"{path}: '{where}.capabilities': {bad[0]!r} is no capability, write for example CAP_KILL")
