"""Host resources of the node: what ``resources.cfg`` offers and what an instance that asks for one is given (sm.md §6).

The file is read once at start. Whether devices and groups exist is checked there, whenever a device comes or goes, and
again, as an error, when an instance asks (sm.md §12, D18). How many may share a resource is a matter of CM, which knows
all nodes; that nobody gets one beyond the count is made sure of here too.
"""

import grp
import logging
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from aoscore.common.config import load_config
from aoscore.common.errors import ConfigError, NotFoundError
from aoscore.common.log import kv
from aoscore.common.oci import ResourceRef
from aoscore.common.types import InstanceIdent, ResourceInfo
from aoscore.sm.resourcemanager.devices import find_devices

_log = logging.getLogger(__name__)

_KINDS = ((stat.S_ISCHR, "c"), (stat.S_ISBLK, "b"), (stat.S_ISFIFO, "p"))


class _Section(msgspec.Struct, frozen=True, rename="camel"):
    """Base of all members of the file."""


class MountConfig(_Section, frozen=True):
    """A mount inside the container; an empty type means bind."""

    destination: str
    type: str = ""
    source: str = ""
    options: tuple[str, ...] = ()


class HostConfig(_Section, frozen=True):
    """A line of /etc/hosts."""

    ip: str
    hostname: str


class UdevConfig(_Section, frozen=True):
    """Devices by their udev properties (own key): all must be equal. `path` is the place inside, for a single one."""

    match: dict[str, str]
    path: str = ""


class ResourceConfig(_Section, frozen=True):
    """One entry of the file; `shared_count` 0 means unlimited."""

    name: str
    shared_count: int = 0
    groups: tuple[str, ...] = ()
    mounts: tuple[MountConfig, ...] = ()
    envs: tuple[str, ...] = ()
    hosts: tuple[HostConfig, ...] = ()
    devices: tuple[str, ...] = ()
    udev: tuple[UdevConfig, ...] = ()


class DeviceNode(msgspec.Struct, frozen=True):
    """A device node inside the container; `access` are cgroup permissions out of "rwm"."""

    path: str
    type: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int
    access: str


class GrantedResource(msgspec.Struct, frozen=True):
    """A node resource, looked up on the host for one instance."""

    name: str
    gids: tuple[int, ...] = ()
    mounts: tuple[MountConfig, ...] = ()
    env: tuple[str, ...] = ()
    hosts: tuple[HostConfig, ...] = ()
    devices: tuple[DeviceNode, ...] = ()


class Change(msgspec.Struct, frozen=True):
    """A resource came or went.

    `problem` says why it can't be used, empty when it can. `renewed`: what instances have been given of it is no longer
    what it is, for example because a device came back with another number. `holders` are using it.
    """

    name: str
    problem: str = ""
    renewed: bool = False
    holders: tuple[InstanceIdent, ...] = ()


class ResourceError(NotFoundError):
    """A resource cannot be given to an instance; `resource` names it."""

    def __init__(self, resource: str, message: str) -> None:
        super().__init__(message)
        self.resource = resource


class Resources:
    """The node's resources by name."""

    def __init__(self, configs: Iterable[ResourceConfig]) -> None:
        self._configs: Mapping[str, ResourceConfig] = {config.name: config for config in configs}
        self._holders: dict[str, dict[str, InstanceIdent]] = {name: {} for name in self._configs}
        self._problems: dict[str, str] = {}
        """Why each resource could not be used when last looked at; empty when it could."""
        self._usable: dict[str, GrantedResource] = {}
        """What each resource was when it could be used last."""

    def infos(self) -> tuple[ResourceInfo, ...]:
        """What CM is told."""
        return tuple(ResourceInfo(config.name, config.shared_count) for config in self._configs.values())

    def hosts(self, wanted: Sequence[ResourceRef]) -> tuple[HostConfig, ...]:
        """Lines for /etc/hosts of an instance that asks for these resources. Raises ResourceError."""
        return tuple(host for reference in wanted for host in self._config(reference.name).hosts)

    def grant(self, wanted: Sequence[ResourceRef]) -> list[GrantedResource]:
        """Look up everything on the host; short blocking file system calls.

        Raises ResourceError for an unknown resource, group or device and for something that is no device.
        """
        return [_grant(self._config(reference.name), reference.mode) for reference in wanted]

    def have_devices(self) -> bool:
        """Whether any resource has devices."""
        return any(config.devices or config.udev for config in self._configs.values())

    def check(self) -> list[Change]:
        """Look everything up again; what is different from the last time. Short blocking file system calls."""
        changes = []
        for config in self._configs.values():
            name, problem, renewed = config.name, "", False
            try:
                now = _grant(config, "")
                renewed = self._usable.setdefault(name, now) != now
                self._usable[name] = now
            except ResourceError as error:
                problem = str(error)
            if renewed or problem != self._problems.get(name, problem):
                changes.append(Change(name, problem, renewed, tuple(self._holders[name].values())))
            self._problems[name] = problem
        return changes

    def problems(self) -> dict[str, str]:
        """Resources that nothing could use when last looked at, and why."""
        return {name: problem for name, problem in self._problems.items() if problem}

    def allocate(self, instance_id: str, ident: InstanceIdent, names: Iterable[str]) -> None:
        """Note that an instance uses these resources; repeatable.

        Raises ResourceError, and notes nothing, for an unknown resource and one that as many use as may share it.
        """
        configs = [self._config(name) for name in names]
        for config in configs:
            others = self._holders[config.name].keys() - {instance_id}
            if config.shared_count and len(others) >= config.shared_count:
                raise ResourceError(
                    config.name,
                    f"resource {config.name} may be shared by {config.shared_count} and is by {len(others)}",
                )
        for config in configs:
            self._holders[config.name][instance_id] = ident

    def adopt(self, instance_id: str, ident: InstanceIdent, names: Iterable[str]) -> None:
        """Note what a running instance uses, whatever the file says by now."""
        for name in names:
            self._holders.setdefault(name, {})[instance_id] = ident

    def release(self, instance_id: str) -> None:
        """Note that an instance uses nothing any more; repeatable."""
        for holders in self._holders.values():
            holders.pop(instance_id, None)

    def _config(self, name: str) -> ResourceConfig:
        config = self._configs.get(name)
        if config is None:
            raise ResourceError(name, f"the node has no resource {name!r}")
        return config


def load_resources(path: Path) -> Resources:
    """Read the file; without one the node has no resources. Raises ConfigError naming file and key."""
    if not path.exists():
        _log.warning("No resources file, the node offers none: file=%s", path)
        return Resources(())
    configs = load_config(path, tuple[ResourceConfig, ...])
    names = [config.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: resource {name!r} is there twice")
    resources = Resources(configs)
    resources.check()
    for name, problem in resources.problems().items():
        _log.warning(kv("Resource can't be used", resource=name, reason=problem))
    return resources


def _grant(config: ResourceConfig, access: str) -> GrantedResource:
    if set(access) - set("rwm"):
        raise ResourceError(config.name, f"resource {config.name}: device permissions {access!r} are not out of 'rwm'")
    gids = []
    for group in config.groups:
        try:
            gids.append(grp.getgrnam(group).gr_gid)
        except KeyError:
            raise ResourceError(config.name, f"resource {config.name}: the host has no group {group!r}") from None
    return GrantedResource(
        name=config.name,
        gids=tuple(gids),
        mounts=config.mounts,
        env=config.envs,
        hosts=config.hosts,
        devices=(
            *(node for text in config.devices for node in _device_nodes(config.name, text, access)),
            *(node for wanted in config.udev for node in _found_nodes(config.name, wanted, access)),
        ),
    )


def _found_nodes(resource: str, wanted: UdevConfig, access: str) -> Iterable[DeviceNode]:
    found = find_devices(wanted.match)
    properties = ", ".join(f"{name}={value}" for name, value in wanted.match.items())
    if not found:
        raise ResourceError(resource, f"resource {resource}: the host has no device with {properties}")
    if wanted.path and len(found) > 1:
        several = ", ".join(map(str, found))
        raise ResourceError(
            resource, f"resource {resource}: {several} have {properties}, only one can be {wanted.path}"
        )
    for path in found:
        yield _device_node(resource, path, wanted.path or str(path), access)


def _device_nodes(resource: str, text: str, access: str) -> Iterable[DeviceNode]:
    # "host[:container[:permissions]]"; the permissions come from the item instead (sm.md §6).
    host, _, rest = text.partition(":")
    inside = rest.split(":")[0] or host
    root = Path(host)
    if not root.exists():
        raise ResourceError(resource, f"resource {resource}: the host has no device {host}")
    if not root.is_dir():
        yield _device_node(resource, root, inside, access)
        return
    for folder, _, names in os.walk(root, followlinks=True):
        for name in sorted(names):
            path = Path(folder, name)
            yield _device_node(resource, path, str(Path(inside, path.relative_to(root))), access)


def _device_node(resource: str, path: Path, inside: str, access: str) -> DeviceNode:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ResourceError(resource, f"resource {resource}: {path} is gone") from None
    kind = next((letter for test, letter in _KINDS if test(status.st_mode)), None)
    if kind is None:
        raise ResourceError(resource, f"resource {resource}: {path} is no device")
    return DeviceNode(
        path=inside,
        type=kind,
        major=os.major(status.st_rdev),
        minor=os.minor(status.st_rdev),
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        access=access,
    )
