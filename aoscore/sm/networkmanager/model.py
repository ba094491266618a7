"""Values of the instance network and the names of kernel objects (sm-runtime.md §6.1, §6.2, §6.6)."""

import ipaddress
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from aoscore.common.errors import InvalidArgumentError
from aoscore.common.oci import ImageConfig, ItemConfig
from aoscore.common.types import InstanceIdent, InstanceNetwork, NetworkWishes, NodeNetwork
from aoscore.sm.resourcemanager.resources import HostConfig

NETNS_DIR = Path("/run/netns")
_MAX_VLAN_ID = 4094
_NETWORK_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_PORT = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/(tcp|udp))?")


class NetworkConfig(msgspec.Struct, frozen=True):
    """What an instance asks of its network. Speeds in kbit/s and limits in bytes per period; 0 means none."""

    ident: InstanceIdent
    hostname: str = ""
    exposed_ports: tuple[str, ...] = ()
    allowed_connections: tuple[str, ...] = ()
    hosts: tuple[HostConfig, ...] = ()
    download_speed_kbit: int = 0
    upload_speed_kbit: int = 0
    download_limit_bytes: int = 0
    upload_limit_bytes: int = 0


class Network(msgspec.Struct, frozen=True):
    """The network of one owner on this node."""

    network_id: str
    subnet: str
    ip: str
    """Address of the bridge: gateway and DNS server of the instances."""
    bridge: str
    vlan_id: int = 0
    """VLAN of this network between the nodes; 0 means it stays on this one."""
    vlan_if_name: str = ""


class StoredInstance(msgspec.Struct, frozen=True):
    """An instance with a network, as the database has it. `host_if_name` is empty while it is not attached."""

    instance_id: str
    network_id: str
    config: NetworkConfig
    allocated: InstanceNetwork
    host_if_name: str = ""


class AttachedNetwork(msgspec.Struct, frozen=True):
    """What a container needs of its network besides the namespace, which is at `netns_path`: two files."""

    hosts: str
    resolv_conf: str


class Ports(msgspec.Struct, frozen=True, order=True):
    """A port or a range of them; `proto` tcp or udp."""

    proto: str
    first: int
    last: int


def network_config(
    ident: InstanceIdent, image: ImageConfig, item: ItemConfig, hosts: Sequence[HostConfig] = ()
) -> NetworkConfig:
    """The wishes of an instance, from its image and item."""
    quotas = item.quotas
    return NetworkConfig(
        ident=ident,
        hostname=item.hostname,
        exposed_ports=tuple(image.config.exposed_ports),
        allowed_connections=tuple(item.allowed_connections),
        hosts=tuple(hosts),
        download_speed_kbit=quotas.download_speed or 0,
        upload_speed_kbit=quotas.upload_speed or 0,
        download_limit_bytes=quotas.download_limit or 0,
        upload_limit_bytes=quotas.upload_limit or 0,
    )


def parse_ports(text: str) -> Ports:
    """Read ``8080``, ``8080/udp`` or ``8087-8088/tcp``. Raises InvalidArgumentError."""
    match = _PORT.fullmatch(text.strip().lower())
    if match:
        first = int(match[1])
        last = int(match[2] or first)
        if 1 <= first <= last <= 65535:
            return Ports(match[3] or "tcp", first, last)
    raise InvalidArgumentError(f"{text!r} is no port, write for example 8080, 8080/udp or 8087-8088/tcp")


def fnv1a(text: str) -> str:
    """FNV-1a, 32 bit, as eight hex digits: short names out of long ones."""
    value = 2166136261
    for byte in text.encode():
        value = ((value ^ byte) * 16777619) & 0xFFFFFFFF
    return f"{value:08x}"


def check_network_id(network_id: str) -> str:
    """A network id names files and links. Raises InvalidArgumentError for one that could lead elsewhere."""
    if not _NETWORK_ID.fullmatch(network_id):
        raise InvalidArgumentError(f"{network_id!r} can't be a network id")
    return network_id


def bridge_name(network_id: str) -> str:
    """Bridge of an owner. AosCore 9.1 draws the digits by lot; a name that can be computed again is found again."""
    return f"br-{fnv1a(network_id)}"


def vlan_name(network_id: str) -> str:
    """Link that joins an owner's bridges of all nodes; as with bridges, AosCore 9.1 draws the digits by lot."""
    return f"vlan-{fnv1a(network_id)}"


def veth_name(instance_id: str) -> str:
    """Host end of an instance's link."""
    return f"veth{fnv1a(instance_id)}"


def netns_path(instance_id: str) -> Path:
    """Bind mount of an instance's network namespace."""
    return NETNS_DIR / instance_id


def alias(config: NetworkConfig) -> str:
    """The host name that the item asks for, empty when it asks for none.

    Only the first instance of an item gets it bare, further ones get it with their index (sm.md §12, D10).
    """
    index = config.ident.instance
    return f"{config.hostname}-{index}" if config.hostname and index else config.hostname


def host_names(config: NetworkConfig, network_id: str) -> list[str]:
    """All names of an instance, its alias first."""
    ident = config.ident
    names = [alias(config)] if config.hostname else []
    long_name = f"{ident.subject_id}.{ident.item_id}"
    names += [f"{ident.instance}.{long_name}", f"{ident.instance}.{long_name}.{network_id}"]
    if ident.instance == 0:
        names += [long_name, f"{long_name}.{network_id}"]
    return names


def wishes(config: NetworkConfig, network_id: str) -> NetworkWishes:
    """What CM is asked for."""
    return NetworkWishes(
        hosts=tuple(host_names(config, network_id)),
        allowed_connections=config.allowed_connections,
        exposed_ports=config.exposed_ports,
    )


def node_network(network_id: str, node: NodeNetwork) -> Network:
    """The network as CM gave it to this node. Raises InvalidArgumentError naming the wrong part."""
    if not 0 <= node.vlan_id <= _MAX_VLAN_ID:
        raise InvalidArgumentError(f"network {network_id}: {node.vlan_id} is no VLAN id")
    return Network(
        network_id=network_id,
        subnet=str(parse_subnet(node.subnet)),
        ip=str(parse_address(node.ip)),
        bridge=bridge_name(network_id),
        vlan_id=node.vlan_id,
        vlan_if_name=vlan_name(network_id) if node.vlan_id else "",
    )


def prefix_length(subnet: str) -> int:
    """Prefix length of a subnet in CIDR notation. Raises InvalidArgumentError."""
    return parse_subnet(subnet).prefixlen


def parse_subnet(subnet: str) -> ipaddress.IPv4Network:
    """Raises InvalidArgumentError naming the subnet."""
    try:
        return ipaddress.IPv4Network(subnet, strict=False)
    except ValueError:
        raise InvalidArgumentError(f"{subnet!r} is no IPv4 subnet") from None


def parse_address(address: str) -> ipaddress.IPv4Address:
    """Raises InvalidArgumentError naming the address."""
    try:
        return ipaddress.IPv4Address(address)
    except ValueError:
        raise InvalidArgumentError(f"{address!r} is no IPv4 address") from None


def hosts_file(ip: str, names: Iterable[str], network_id: str, extra: Iterable[HostConfig], *, ipv6: str = "") -> str:
    """``/etc/hosts`` of an instance (sm-runtime.md §6.7)."""
    own = " ".join(dict.fromkeys((network_id, *names)))
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback", f"{ip}\t{own}"]
    lines += [f"{ipv6}\t{own}"] if ipv6 else []
    lines += [f"{host.ip}\t{host.hostname}" for host in extra]
    return "".join(f"{line}\n" for line in lines)


def resolv_conf(bridge_ip: str, dns_servers: Iterable[str]) -> str:
    """``/etc/resolv.conf`` of an instance: the bridge, then CM's servers."""
    return "".join(f"nameserver\t{server}\n" for server in dict.fromkeys((bridge_ip, *dns_servers)) if server)
