"""Connecting instances by CNI plugins, as CNI specification 1.0 has it, instead of by ourselves.

A configuration list is the template for the networks of all owners: for each, we put in the name of the network and of
its bridge, which we make, and offer the plugins what CM allocated through the capabilities ``ips``, ``ipRanges``,
``mac``, ``bandwidth`` and ``dns``. The firewall of instances stays ours in any case, since no plugin knows of exposed
ports and allowed connections; a plugin may restrict more.

What was asked and what came back is kept in a file per instance, from before the first plugin runs until the last one
has undone its work (specification section 4, "cached results"). So whatever was half made can be undone, also by the
next SM.
"""

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from aoscore.common.aio import Worker, log_and_continue
from aoscore.common.config import JSON_ERRORS, from_json, to_json
from aoscore.common.errors import AosError, ConfigError, FailedError, NotFoundError
from aoscore.common.files import write_atomic
from aoscore.common.log import kv
from aoscore.common.process import run_program
from aoscore.sm.launcher.runtimes.base import is_instance_id
from aoscore.sm.networkmanager.backend import Attached, Attachment
from aoscore.sm.networkmanager.links import INSIDE, Links, burst_bytes, mac_address
from aoscore.sm.networkmanager.model import Network, NetworkConfig, netns_path, parse_subnet

_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

STATE_DIR = Path("/run/aos/cni")
BIN_DIRS = (Path("/opt/cni/bin"), Path("/usr/lib/cni"), Path("/usr/libexec/cni"))
# CHECK came with 0.4.0, and results have been of one shape since then.
_VERSIONS = ("0.4.0", "1.0.0")
_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TIMEOUT_S = 30.0
_PARALLEL = 8


class ConfigList(msgspec.Struct, frozen=True, rename={"cni_version": "cniVersion", "disable_check": "disableCheck"}):
    """A network configuration list (specification section 1)."""

    cni_version: str
    plugins: tuple[dict[str, Any], ...]
    name: str = ""
    disable_check: bool = False


DEFAULT = ConfigList(
    cni_version="1.0.0",
    plugins=(
        {
            "type": "bridge",
            "isGateway": True,
            "hairpinMode": True,
            "ipam": {"type": "host-local", "routes": [{"dst": "0.0.0.0/0"}]},
            "capabilities": {"ips": True, "ipRanges": True, "mac": True},
        },
        {"type": "firewall", "backend": "iptables"},
        {"type": "bandwidth", "capabilities": {"bandwidth": True}},
    ),
)
"""What is used when no list is configured."""


class CniSettings(msgspec.Struct, frozen=True):
    """What to run, and where plugins and notes are."""

    template: ConfigList = DEFAULT
    bin_dirs: tuple[Path, ...] = BIN_DIRS
    state_dir: Path = STATE_DIR


class Record(msgspec.Struct, frozen=True):
    """What is kept of an instance. `result` is that of the last plugin that has answered."""

    config: ConfigList
    runtime_config: dict[str, Any]
    result: dict[str, Any] | None = None
    is_complete: bool = False


class _Answer(msgspec.Struct, frozen=True):
    """Of an error."""

    msg: str = ""
    details: str = ""


class _Interface(msgspec.Struct, frozen=True):
    name: str
    sandbox: str = ""


class _Ip(msgspec.Struct, frozen=True):
    address: str


class _Result(msgspec.Struct, frozen=True):
    interfaces: tuple[_Interface, ...] = ()
    ips: tuple[_Ip, ...] = ()


def load_config_list(path: Path) -> ConfigList:
    """Read a ``.conflist`` file. Raises NotFoundError or ConfigError naming file and key."""
    if not path.is_file():
        raise NotFoundError(f"there is no CNI configuration list {path}")
    loaded = from_json(path.read_bytes(), ConfigList, what=str(path))
    if loaded.cni_version not in _VERSIONS:
        raise ConfigError(f"{path}: 'cniVersion' {loaded.cni_version!r} is not supported, use {' or '.join(_VERSIONS)}")
    if not loaded.plugins:
        raise ConfigError(f"{path}: 'plugins' is empty")
    for index, plugin in enumerate(loaded.plugins):
        if not _TYPE.fullmatch(str(plugin.get("type", ""))):
            raise ConfigError(f"{path}: 'plugins[{index}].type' {plugin.get('type')!r} is no name of a plugin")
    return loaded


def for_network(template: ConfigList, network: Network, ipam_dir: Path) -> ConfigList:
    """The configuration list of one network. Pure.

    A bridge plugin gets the network's bridge. The host-local plugin keeps its notes with ours, gone after a reboot as
    the addresses are, unless the list names a place for them.
    """
    plugins = []
    for plugin in template.plugins:
        made = dict(plugin)
        if made["type"] == "bridge":
            made["bridge"] = network.bridge
        ipam = made.get("ipam")
        if isinstance(ipam, dict) and ipam.get("type") == "host-local":
            made["ipam"] = {"dataDir": str(ipam_dir), **ipam}
        plugins.append(made)
    return msgspec.structs.replace(template, name=network.network_id, plugins=tuple(plugins))


def runtime_config(instance_id: str, network: Network, ip: str, config: NetworkConfig) -> dict[str, Any]:
    """What plugins can ask for, by capability (CNI conventions). Speeds are in bits here. Pure."""
    prefix_length = parse_subnet(network.subnet).prefixlen
    offered: dict[str, Any] = {
        "ips": [f"{ip}/{prefix_length}"],
        "ipRanges": [[{"subnet": str(parse_subnet(network.subnet)), "gateway": network.ip}]],
        "mac": mac_address(instance_id),
        "dns": {"servers": [network.ip]},
    }
    bandwidth: dict[str, int] = {}
    for direction, kbit in (("ingress", config.download_speed_kbit), ("egress", config.upload_speed_kbit)):
        if kbit > 0:
            bandwidth |= {f"{direction}Rate": kbit * 1000, f"{direction}Burst": burst_bytes(kbit) * 8}
    if bandwidth:
        offered["bandwidth"] = bandwidth
    return offered


def request(
    config: ConfigList, plugin: Mapping[str, Any], offered: Mapping[str, Any], previous: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a plugin reads (specification section 3, "deriving execution configuration"). Pure."""
    made = {key: value for key, value in plugin.items() if key != "capabilities"}
    made |= {"cniVersion": config.cni_version, "name": config.name}
    wanted = plugin.get("capabilities") or {}
    if given := {name: value for name, value in offered.items() if wanted.get(name)}:
        made["runtimeConfig"] = given
    if previous is not None:
        made["prevResult"] = previous
    return made


class CniBackend:
    """See the module text, and Backend."""

    def __init__(self, links: Links, netlink: Worker, files: Worker, settings: CniSettings) -> None:
        self._links = links
        self._netlink = netlink
        self._files = files
        self._template = settings.template
        self._bin_dirs = settings.bin_dirs
        self._records = settings.state_dir / "results"
        self._ipam = settings.state_dir / "ipam"

    async def attach(self, wanted: Sequence[Attachment]) -> list[Attached | BaseException]:
        """See Backend. An instance whose plugins find fault with it is undone and made again."""
        return await self._each(self._attach, wanted)

    async def _attach(self, attachment: Attachment) -> Attached:
        instance_id, network, ip = attachment.instance_id, attachment.network, attachment.ip
        wanted = Record(
            for_network(self._template, network, self._ipam),
            runtime_config(instance_id, network, ip, attachment.config),
        )
        done = await self._netlink.run(self._links.ensure_namespace, instance_id)
        record = await self._files.run(self._read, instance_id)
        if record is not None:
            if not done and record.is_complete and _same(record, wanted):
                try:
                    await self._check(instance_id, record)
                    return Attached(_host_if_name(record, network))
                except AosError as error:
                    _log.warning(kv("CNI plugins find fault", id=instance_id, error=error))
            if not await self._delete(instance_id, record):
                raise FailedError(f"CNI plugins can't undo what they did for instance {instance_id}, see the log")
            done.append("CNI attachment")
        record = await self._add(instance_id, wanted)
        addresses = {one.address.partition("/")[0] for one in _decoded(record).ips}
        if ip not in addresses:
            raise FailedError(f"CNI plugins gave instance {instance_id} {sorted(addresses)}, CM allocated {ip}")
        return Attached(_host_if_name(record, network), tuple(done))

    async def detach(self, instance_ids: Sequence[str]) -> list[BaseException | None]:
        """See Backend. What a plugin can't undo now is tried again before the next attachment and at the next start."""
        return await self._each(self._detach, instance_ids)

    async def _detach(self, instance_id: str) -> None:
        record = await self._files.run(self._read, instance_id)
        if record is not None:
            await self._delete(instance_id, record)
        await self._netlink.run(self._links.detach, instance_id)

    async def known(self) -> frozenset[str]:
        """See Backend."""
        found = self._records.glob("*.json") if self._records.is_dir() else ()
        return frozenset(path.stem for path in found if is_instance_id(path.stem))

    async def _each(self, work: Callable[[T], Awaitable[R]], values: Sequence[T]) -> list[R | BaseException]:
        """Do it for all, a few at a time."""
        limit = asyncio.Semaphore(_PARALLEL)

        async def one(value: T) -> R:
            async with limit:
                return await work(value)

        return await asyncio.gather(*map(one, values), return_exceptions=True)

    async def _add(self, instance_id: str, record: Record) -> Record:
        await self._files.run(self._write, instance_id, record)
        for plugin in record.config.plugins:
            asked = request(record.config, plugin, record.runtime_config, record.result)
            answer = await self._run("ADD", instance_id, asked)
            result = from_json(answer, dict[str, Any], what=f"result of CNI plugin {plugin['type']}")
            record = msgspec.structs.replace(record, result=result)
            # After each: a plugin undoes its work by the result that it was given or has given.
            await self._files.run(self._write, instance_id, record)
        record = msgspec.structs.replace(record, is_complete=True)
        await self._files.run(self._write, instance_id, record)
        return record

    async def _check(self, instance_id: str, record: Record) -> None:
        if record.config.disable_check:
            return
        for plugin in record.config.plugins:
            await self._run("CHECK", instance_id, request(record.config, plugin, record.runtime_config, record.result))

    async def _delete(self, instance_id: str, record: Record) -> bool:
        """Undo in reverse; whether all of it is undone. A plugin that fails does not keep the others from it."""
        all_done = True
        for plugin in reversed(record.config.plugins):
            asked = request(record.config, plugin, record.runtime_config, record.result)
            try:
                await self._run("DEL", instance_id, asked)
            except AosError as error:
                _log.warning(kv("CNI plugin can't undo its work", id=instance_id, error=error))
                all_done = False
        if all_done:
            await self._files.run(self._path(instance_id).unlink, missing_ok=True)
        return all_done

    async def _run(self, command: str, instance_id: str, asked: Mapping[str, Any]) -> bytes:
        kind = asked["type"]
        program = next((path for folder in self._bin_dirs if (path := folder / kind).is_file()), None)
        if program is None:
            places = ", ".join(map(str, self._bin_dirs))
            raise NotFoundError(f"CNI plugin {kind} is in none of {places}")
        namespace = netns_path(instance_id)
        env = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": instance_id,
            "CNI_NETNS": str(namespace) if namespace.exists() else "",
            "CNI_IFNAME": INSIDE,
            "CNI_PATH": os.pathsep.join(map(str, self._bin_dirs)),
        }
        done = await run_program([program], timeout_s=_TIMEOUT_S, stdin=to_json(asked), env=env, check=False)
        if done.code != 0:
            raise FailedError(f"CNI plugin {kind} failed in {command}: {_reason(done.stdout, done.stderr)}")
        return done.stdout

    def _path(self, instance_id: str) -> Path:
        return self._records / f"{instance_id}.json"

    def _read(self, instance_id: str) -> Record | None:
        """None for one that can't be read, too: then nobody knows what is to be undone."""
        path = self._path(instance_id)
        with log_and_continue(_log, f"Can't read what CNI plugins did for instance {instance_id}"):
            return from_json(path.read_bytes(), Record, what=str(path)) if path.exists() else None
        return None

    def _write(self, instance_id: str, record: Record) -> None:
        self._records.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(self._path(instance_id), to_json(record), mode=0o600)


def _same(record: Record, wanted: Record) -> bool:
    return (record.config, record.runtime_config) == (wanted.config, wanted.runtime_config)


def _decoded(record: Record) -> _Result:
    try:
        return msgspec.convert(record.result or {}, _Result)
    except msgspec.ValidationError as error:
        raise FailedError(f"result of the CNI plugins is none: {error}") from error


def _host_if_name(record: Record, network: Network) -> str:
    """The link's end on the host: the first that is in no sandbox and not the bridge; plugins append theirs."""
    outside = [one.name for one in _decoded(record).interfaces if not one.sandbox and one.name != network.bridge]
    return outside[0] if outside else INSIDE


def _reason(stdout: bytes, stderr: bytes) -> str:
    """What a plugin says of its failure: JSON on standard output, if it came that far."""
    try:
        answer = msgspec.json.decode(stdout, type=_Answer)
    except JSON_ERRORS:
        return (stderr or stdout).decode(errors="replace").strip() or "no reason given"
    return ": ".join(filter(None, (answer.msg, answer.details)))
