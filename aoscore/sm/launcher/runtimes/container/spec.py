"""The OCI runtime spec of an instance, from image config, item config and instance info (sm-runtime.md §2.4).

Pure: what had to be looked up on the host (device numbers, group ids, the secret) comes in as values. The result equals
what AosCore 9.1 writes, order of mounts and variables included, but for the version, ``AOS_SERVICE_ID``, a seccomp
profile, limits that the node sets, and that services are ended first when the node's memory is short.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import msgspec

from aoscore.common.errors import InvalidArgumentError, to_error_info
from aoscore.common.oci import ImageConfig, ItemConfig, Quotas
from aoscore.common.types import EnvVar, EnvVarStatus, InstanceInfo
from aoscore.sm.launcher.runtimes.base import instance_id
from aoscore.sm.launcher.runtimes.container.config import CAPABILITIES, DiskSpeed
from aoscore.sm.resourcemanager.resources import DeviceNode, GrantedResource
from aoscore.sm.resourcemanager.resources import MountConfig as Mount

# What the spec needs, not the newest: crun refuses specs newer than itself (1.8 in Debian 12 knows 1.0).
OCI_VERSION = "1.0.2"
CPU_PERIOD_US = 100_000
SECRET = "AOS_SECRET"  # noqa: S105 - the variable's name
_MIN_CPU_QUOTA_US = 1000
_DEFAULT_NOFILE = 1024
# Among all that the kernel can choose from when memory is short, a service is better than the software of the node.
_OOM_SCORE = 500
# Names of the kernel for what images call otherwise, and what a processor runs beside its own.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i386": "386", "i686": "386"}
_ALSO_RUNS = {"amd64": "386", "arm64": "arm"}
_BASE_ENV = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm")
# devpts gives terminals to this group.
_TERMINAL_GID = 5
_MASKED_PATHS = [
    *(f"/proc/{name}" for name in ("acpi", "asound", "kcore", "keys", "latency_stats", "timer_list", "timer_stats")),
    *("/proc/sched_debug", "/proc/scsi", "/sys/firmware"),
]
_READONLY_PATHS = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


class CpuCapacity(msgspec.Struct, frozen=True):
    """What 100 % of the node's CPUs are worth."""

    cores: int
    max_dmips: int


class SpecInput(msgspec.Struct, frozen=True):
    """Everything the spec depends on. `netns` None means the host's network; empty `secret` means none."""

    info: InstanceInfo
    image: ImageConfig
    item: ItemConfig
    rootfs: Path
    cgroup: str
    cpu: CpuCapacity
    netns: Path | None = None
    secret: str = ""
    resources: Sequence[GrantedResource] = ()
    host_files: Sequence[Path] = ()
    """Files and directories of the host that are bound read-only at the same place."""
    state: Path | None = None
    storage: Path | None = None
    seccomp: Mapping[str, Any] | None = None
    capabilities: Sequence[str] = CAPABILITIES
    default_pids_limit: int = 0
    disk_speed: DiskSpeed = DiskSpeed()
    disks: Sequence[tuple[int, int]] = ()
    """Major and minor number of what `disk_speed` is about."""
    user_base: int = 0
    """Id of the node that root of a user namespace has; 0 means none."""


def build_spec(source: SpecInput) -> dict[str, Any]:
    """The content of config.json. Raises InvalidArgumentError for an image or item that cannot be run."""
    info, quotas = source.info, source.item.quotas
    process = source.image.config
    args = [*process.entrypoint, *process.cmd]
    if not args:
        raise InvalidArgumentError(f"image of item {info.ident.item_id} names no program to run")
    spec: dict[str, Any] = {
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": False,
            "user": {"uid": info.uid, "gid": info.gid},
            "args": args,
            "env": _environment(source),
            "cwd": process.working_dir or "/",
            "capabilities": {kind: _capabilities(source) for kind in ("bounding", "effective", "permitted")},
            "rlimits": _rlimits(quotas),
            "noNewPrivileges": True,
            "oomScoreAdj": _OOM_SCORE,
        },
        "root": {"path": str(source.rootfs), "readonly": False},
        "hostname": source.item.hostname or instance_id(info.ident),
        "mounts": [_mount_object(mount) for mount in _mounts(source)],
        "linux": {
            "resources": _resources(quotas, source),
            "cgroupsPath": source.cgroup,
            "namespaces": _namespaces(source.netns),
            "maskedPaths": list(_MASKED_PATHS),
            "readonlyPaths": list(_READONLY_PATHS),
        },
    }
    gids = sorted({gid for resource in source.resources for gid in resource.gids})
    if gids:
        spec["process"]["user"]["additionalGids"] = gids
    if source.user_base:
        spec["linux"]["namespaces"].append({"type": "user"})
        spec["linux"]["uidMappings"] = _mapping({0: source.user_base}, [info.uid])
        terminals = {0: source.user_base, _TERMINAL_GID: source.user_base + _TERMINAL_GID}
        spec["linux"]["gidMappings"] = _mapping(terminals, [info.gid, *gids])
    if source.item.sysctl:
        spec["linux"]["sysctl"] = dict(source.item.sysctl)
    devices = {node.path: node for resource in source.resources for node in resource.devices}
    if devices:
        spec["linux"]["devices"] = [_device_object(node) for node in devices.values()]
    if source.seccomp is not None:
        spec["linux"]["seccomp"] = dict(source.seccomp)
    return spec


def check_platform(image: ImageConfig, architectures: Set[str]) -> None:
    """Raise InvalidArgumentError for an image of another system or processor (sm-runtime.md §8).

    `architectures` are those of the node; none means that they are not known.
    """
    if image.os not in ("", "linux"):
        raise InvalidArgumentError(f"the image is for {image.os!r}, this node runs linux")
    known = {_ARCHITECTURES.get(name, name) for name in architectures}
    known |= {_ALSO_RUNS[name] for name in known if name in _ALSO_RUNS}
    if image.architecture and known and _ARCHITECTURES.get(image.architecture, image.architecture) not in known:
        raise InvalidArgumentError(f"the image is for {image.architecture!r}, this node has {', '.join(sorted(known))}")


def override_statuses(overrides: Iterable[EnvVar]) -> tuple[EnvVarStatus, ...]:
    """The answer to each override variable of the desired state."""
    statuses = []
    for variable in overrides:
        try:
            _check_name(variable.name.strip())
            statuses.append(EnvVarStatus(variable.name))
        except InvalidArgumentError as error:
            statuses.append(EnvVarStatus(variable.name, to_error_info(error)))
    return tuple(statuses)


def cpu_quota_us(limit_dmips: int, cpu: CpuCapacity) -> int:
    """Share of one period for a limit in DMIPS (integer arithmetic, as AosCore 9.1)."""
    if cpu.max_dmips <= 0:
        raise InvalidArgumentError("a CPU limit needs the node's DMIPS figure, which is not known")
    return max(limit_dmips * CPU_PERIOD_US * max(cpu.cores, 1) // cpu.max_dmips, _MIN_CPU_QUOTA_US)


def _capabilities(source: SpecInput) -> list[str]:
    return [name for name in source.capabilities if name not in source.item.drop_capabilities]


def _check_name(name: str) -> None:
    if not name or "=" in name or "\0" in name:
        raise InvalidArgumentError(f"{name!r} is no name of an environment variable")


def _environment(source: SpecInput) -> list[str]:
    ident = source.info.ident
    variables: dict[str, str] = {}

    def put(entries: Iterable[str]) -> None:
        # A later variable replaces an earlier one in its place.
        for entry in entries:
            name, _, value = entry.partition("=")
            _check_name(name.strip())
            variables[name.strip()] = value

    put(_BASE_ENV)
    # AOS_SERVICE_ID is the name that services for the former Go generation look for (sm-runtime.md §8).
    put((f"AOS_ITEM_ID={ident.item_id}", f"AOS_SERVICE_ID={ident.item_id}", f"AOS_SUBJECT_ID={ident.subject_id}"))
    put((f"AOS_INSTANCE_INDEX={ident.instance}", f"AOS_INSTANCE_ID={instance_id(ident)}"))
    put(source.image.config.env)
    if source.secret:
        put((f"{SECRET}={source.secret}",))
    for resource in source.resources:
        put(resource.env)
    refused = {status.name for status in override_statuses(source.info.env_vars) if status.error}
    put(f"{variable.name}={variable.value}" for variable in source.info.env_vars if variable.name not in refused)
    return [f"{name}={value}" for name, value in variables.items()]


def _rlimits(quotas: Quotas) -> list[dict[str, Any]]:
    limits = {"RLIMIT_NOFILE": quotas.no_file_limit if quotas.no_file_limit is not None else _DEFAULT_NOFILE}
    if quotas.pids_limit is not None:
        # One more than AosCore 9.1 has: at an equal limit the kernel asks this one first, and never counts, for CM to
        # hear of it, that the control group's was reached.
        limits["RLIMIT_NPROC"] = quotas.pids_limit + 1
    return [{"type": name, "hard": value, "soft": value} for name, value in limits.items()]


def _base_mounts(host_files: Sequence[Path]) -> Iterable[Mount]:
    quiet = ("nosuid", "noexec", "nodev")
    yield Mount("/proc", "proc", "proc")
    yield Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k"))
    terminal = ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")
    yield Mount("/dev/pts", "devpts", "devpts", terminal)
    yield Mount("/dev/shm", "tmpfs", "shm", (*quiet, "mode=1777", "size=65536k"))  # noqa: S108 - inside the container
    yield Mount("/dev/mqueue", "mqueue", "mqueue", quiet)
    yield Mount("/sys", "sysfs", "sysfs", (*quiet, "ro"))
    yield Mount("/sys/fs/cgroup", "cgroup", "cgroup", (*quiet, "relatime", "ro"))
    for path in host_files:
        yield Mount(str(path), "bind", str(path), ("bind", "ro"))


def _mounts(source: SpecInput) -> list[Mount]:
    mounts = {mount.destination: mount for mount in _base_mounts(source.host_files)}

    def put(mount: Mount) -> None:
        if not mount.destination.startswith("/") or ".." in Path(mount.destination).parts:
            raise InvalidArgumentError(f"mount destination {mount.destination!r} is no absolute path in the container")
        mounts[mount.destination] = mount

    if source.item.quotas.tmp_limit is not None:
        options = ("nosuid", "strictatime", "mode=1777", f"size={source.item.quotas.tmp_limit}")
        put(Mount("/tmp", "tmpfs", "tmpfs", options))  # noqa: S108 - inside the container
    for resource in source.resources:
        for mount in resource.mounts:
            put(mount if mount.type else msgspec.structs.replace(mount, type="bind"))
    if source.state is not None:
        put(Mount("/state.dat", "bind", str(source.state), ("bind", "rw")))
    if source.storage is not None:
        put(Mount("/storage", "bind", str(source.storage), ("bind", "rw")))
    return list(mounts.values())


def _mount_object(mount: Mount) -> dict[str, Any]:
    result: dict[str, Any] = {"destination": mount.destination, "type": mount.type, "source": mount.source}
    if mount.options:
        result["options"] = list(mount.options)
    return result


def _resources(quotas: Quotas, source: SpecInput) -> dict[str, Any]:
    rules: dict[tuple[str, int, int], dict[str, Any]] = {}
    for resource in source.resources:
        for node in resource.devices:
            if node.type in ("c", "b"):
                rules[node.type, node.major, node.minor] = {
                    "allow": True,
                    "type": node.type,
                    "major": node.major,
                    "minor": node.minor,
                    "access": node.access,
                }
    result: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}, *rules.values()]}
    if quotas.ram_limit is not None:
        result["memory"] = {"limit": quotas.ram_limit}
    if quotas.cpu_dmips_limit is not None:
        result["cpu"] = {"quota": cpu_quota_us(quotas.cpu_dmips_limit, source.cpu), "period": CPU_PERIOD_US}
    pids_limit = source.default_pids_limit or None if quotas.pids_limit is None else quotas.pids_limit
    if pids_limit is not None:
        result["pids"] = {"limit": pids_limit}
    speed = source.disk_speed
    rates = {
        "throttleReadBpsDevice": speed.read_bytes_per_s,
        "throttleWriteBpsDevice": speed.write_bytes_per_s,
        "throttleReadIOPSDevice": speed.reads_per_s,
        "throttleWriteIOPSDevice": speed.writes_per_s,
    }
    disk_limits = {
        name: [{"major": major, "minor": minor, "rate": rate} for major, minor in source.disks]
        for name, rate in rates.items()
        if rate and source.disks
    }
    if disk_limits:
        result["blockIO"] = disk_limits
    return result


def _namespaces(netns: Path | None) -> list[dict[str, str]]:
    network = [] if netns is None else [{"type": "network", "path": str(netns)}]
    return [{"type": "pid"}, *network, *({"type": kind} for kind in ("ipc", "uts", "mount", "cgroup"))]


def _mapping(fixed: Mapping[int, int], same: Iterable[int]) -> list[dict[str, int]]:
    """Ids inside to ids of the node; those of `same` are what they are, so that files and quotas are the service's."""
    ids = {**fixed, **{one: one for one in same if one}}
    return [{"containerID": inside, "hostID": outside, "size": 1} for inside, outside in sorted(ids.items())]


def _device_object(node: DeviceNode) -> dict[str, Any]:
    numbers = {"major": node.major, "minor": node.minor} if node.type in ("c", "b") else {}
    return {"path": node.path, "type": node.type, **numbers, "fileMode": node.mode, "uid": node.uid, "gid": node.gid}
