"""The native runtime's own configuration; all of it is ours, AosCore 9.1 has no such runtime (sm-runtime.md §5)."""

from pathlib import Path
from typing import Any

import msgspec

from aoscore.common.config import Duration, load_section
from aoscore.sm.launcher.runtimes.container.config import (
    CAPABILITIES,
    ContainerConfig,
    DiskSpeed,
    OutputKind,
    check_limits,
)
from aoscore.sm.launcher.runtimes.native.unit import CGROUP_PARENT


class NativeConfig(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The object ``runtimes[].config`` of a native runtime: keys mean what they mean for containers."""

    runtime_dir: Path = Path("/run/aos/native")
    storage_dir: Path | None = None
    state_dir: Path | None = None
    host_binds: tuple[str, ...] = ("bin", "sbin", "lib", "lib64", "usr")
    host_files: tuple[Path, ...] = (Path("/etc/nsswitch.conf"), Path("/etc/ssl"))
    crun_state_root: Path = Path("/run/aos/crun-native")
    crun_executable: str = "/usr/bin/crun"
    seccomp: bool = True
    stop_timeout_s: Duration = msgspec.field(name="stopTimeout", default=Duration(10))
    settle_time_s: Duration = msgspec.field(name="settleTime", default=Duration(0.3))
    restart_limit_s: Duration = msgspec.field(name="restartLimit", default=Duration(60))
    default_pids_limit: int = 4096
    disk_speed: DiskSpeed = DiskSpeed()
    capabilities: tuple[str, ...] = CAPABILITIES

    def as_container(self) -> ContainerConfig:
        """What the parts that both runtimes share are told."""
        return ContainerConfig(
            runtime_dir=self.runtime_dir,
            storage_dir=self.storage_dir,
            state_dir=self.state_dir,
            host_binds=self.host_binds,
            host_files=self.host_files,
            cgroup_parent=CGROUP_PARENT,
            seccomp=self.seccomp,
            stop_timeout_s=self.stop_timeout_s,
            settle_time_s=self.settle_time_s,
            restart_limit_s=self.restart_limit_s,
            default_pids_limit=self.default_pids_limit,
            disk_speed=self.disk_speed,
            capabilities=self.capabilities,
            output=OutputKind.JOURNAL,
        )


def load_native_config(raw: dict[str, Any], *, path: Path, where: str, working_dir: Path) -> NativeConfig:
    """Check the object at key path `where` of file `path`; fill paths that depend on SM's working directory.

    Raises ConfigError naming file and key.
    """
    config = load_section(raw, NativeConfig, path=path, where=where)
    check_limits(config.default_pids_limit, config.disk_speed, config.capabilities, path=path, where=where)
    return msgspec.structs.replace(
        config,
        storage_dir=config.storage_dir or working_dir / "storages",
        state_dir=config.state_dir or working_dir / "states",
    )
