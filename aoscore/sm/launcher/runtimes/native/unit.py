"""A native service out of the OCI spec that a container would get (sm-runtime.md §5). Pure.

Two halves: a transient systemd unit has the limits and the devices, and crun, which the unit runs, has the rest: root
file system, mounts, identity, environment. So each means the same for both kinds of services. (systemd alone would do
for the second half too, but it starts no process under a user id that is not in the user database.) What is missing
against a container is on purpose: a native service shares the host's processes, IPC and host name.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

SLICE = "system-aos-service.slice"
CGROUP_PARENT = "/system.slice/system-aos.slice/system-aos-service.slice"

_OWN_NAMESPACES = ("network", "mount")
_UNLIMITED = 2**64 - 1
_SIGKILL = 9


class Property(msgspec.Struct, frozen=True):
    """A property as D-Bus has it: name, signature of its value, the value's words in the form of ``busctl``."""

    name: str
    signature: str
    words: tuple[str, ...]


def unit_name(instance_id: str) -> str:
    """Name of an instance's unit."""
    return f"aos-service@{instance_id}.service"


def native_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a container's spec that crun does for a native service."""
    linux = {name: value for name, value in spec["linux"].items() if name not in ("resources", "cgroupsPath")}
    linux["namespaces"] = [space for space in linux["namespaces"] if space["type"] in _OWN_NAMESPACES]
    # Without a control group namespace it would show those of everybody.
    mounts = [mount for mount in spec["mounts"] if mount["type"] != "cgroup"]
    return {name: value for name, value in spec.items() if name != "hostname"} | {"linux": linux, "mounts": mounts}


def unit_properties(spec: Mapping[str, Any], instance_id: str, command: Sequence[str]) -> list[Property]:
    """Properties of the unit that runs `command` within the limits of a container's spec."""
    resources = spec["linux"].get("resources", {})
    return [
        _text("Description", f"Service instance {instance_id}"),
        _text("Slice", SLICE),
        _text("Type", "exec"),
        # What ended well is remembered too, until SM has read its exit code.
        _flag("RemainAfterExit", True),
        # Without the flag systemd would replace $NAME in arguments.
        Property("ExecStartEx", "a(sasas)", ("1", command[0], str(len(command)), *command, "1", "no-env-expand")),
        *_limits(resources),
        *_disks(resources.get("blockIO", {})),
        *_devices(resources.get("devices", ())),
        _text("SyslogIdentifier", instance_id),
        _text("StandardOutput", "journal"),
        _text("StandardError", "journal"),
        # SM asks the service to end before it stops the unit.
        Property("KillSignal", "i", (str(_SIGKILL),)),
    ]


def _text(name: str, value: str) -> Property:
    return Property(name, "s", (value,))


def _flag(name: str, value: bool) -> Property:
    return Property(name, "b", (str(value).lower(),))


def _number(name: str, value: int) -> Property:
    return Property(name, "t", (str(value),))


def _limits(resources: Mapping[str, Any]) -> Iterable[Property]:
    # Also without limits: monitoring reads the control group.
    for what in ("CPU", "Memory", "Tasks", "IO"):
        yield _flag(f"{what}Accounting", True)
    yield _number("MemoryMax", resources.get("memory", {}).get("limit", _UNLIMITED))
    yield _number("TasksMax", resources.get("pids", {}).get("limit", _UNLIMITED))
    if cpu := resources.get("cpu"):
        yield _number("CPUQuotaPerSecUSec", cpu["quota"] * 1_000_000 // cpu["period"])
        yield _number("CPUQuotaPeriodUSec", cpu["period"])


_DISK_LIMITS = (
    ("throttleReadBpsDevice", "IOReadBandwidthMax"),
    ("throttleWriteBpsDevice", "IOWriteBandwidthMax"),
    ("throttleReadIOPSDevice", "IOReadIOPSMax"),
    ("throttleWriteIOPSDevice", "IOWriteIOPSMax"),
)


def _disks(limits: Mapping[str, Sequence[Mapping[str, int]]]) -> Iterable[Property]:
    for key, name in _DISK_LIMITS:
        if disks := limits.get(key):
            words = [word for one in disks for word in (f"/dev/block/{one['major']}:{one['minor']}", str(one["rate"]))]
            yield Property(name, "a(st)", (str(len(disks)), *words))


def _devices(rules: Iterable[Mapping[str, Any]]) -> Iterable[Property]:
    # crun makes nodes in /dev of the root; making one is not using it.
    allowed = ["char-*", "m", "block-*", "m"]
    for rule in rules:
        if rule["allow"]:
            kind = {"c": "char", "b": "block"}[rule["type"]]
            allowed += [f"/dev/{kind}/{rule['major']}:{rule['minor']}", rule["access"]]
    yield _text("DevicePolicy", "closed")
    yield Property("DeviceAllow", "a(ss)", (str(len(allowed) // 2), *allowed))
