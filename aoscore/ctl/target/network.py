"""Addresses, names and firewall of a Node (yocto.md §5, §8). Pure."""

import ipaddress
from collections.abc import Iterable, Iterator

from aoscore.ctl.target.entry import Entry
from aoscore.ctl.target.node import Node
from aoscore.ctl.target.units import UNIT_DIR

_SERVERS = {"cm": (8093, 8094), "iam": (8089, 8090)}
_GATEWAY_PORT = 30001
_NFS_PORTS = (111, 2049)
_PROVISIONING_PORTS = (8089, 8090)
_INSTANCE_BRIDGES = "br-*"


def entries(node: Node) -> Iterator[Entry]:
    """Parts network and firewall."""
    yield Entry("/etc/hostname", f"{node.hostname}\n", "image")
    yield Entry("/etc/hosts", _hosts(node), "image")
    yield Entry("/usr/lib/systemd/network/20-aos.network", _networkd(node), "network")
    if node.has("cm") and node.dns_ip:
        yield Entry(f"{node.etc}/addnhosts", _addn_hosts(node), "network")
        if not node.dns_by_cm:
            yield Entry(f"{node.etc}/dnsmasq.conf", _dnsmasq(node), "network")
            yield Entry(f"{UNIT_DIR}/aos-dns.service", _dns_unit(node), "network")
            yield Entry(
                f"{UNIT_DIR}/multi-user.target.wants/aos-dns.service", "../aos-dns.service", "network", kind="link"
            )
    yield Entry("/etc/nftables/aos.nft", _base_rules(), "firewall")
    yield Entry(f"{UNIT_DIR}/aos-nftables.service", _BASE_UNIT, "firewall")
    for provisioned in (False, True):
        name = "aos-provisioned" if provisioned else "aos-unprovisioned"
        yield Entry(f"/etc/nftables/{name}.nft", _provisioning_rules(node, provisioned=provisioned), "firewall")
    yield Entry(f"{UNIT_DIR}/aos-provfirewall.service", _provisioning_unit(node), "firewall")
    yield Entry(f"{node.opt}/provfirewall.sh", _provisioning_script(node), "firewall", 0o755)
    for name in ("aos-nftables", "aos-provfirewall"):
        yield Entry(f"{UNIT_DIR}/sysinit.target.wants/{name}.service", f"../{name}.service", "firewall", kind="link")
    yield Entry(
        f"{UNIT_DIR}/aos.target.d/aoscore-firewall.conf",
        "[Unit]\nWants=aos-provfirewall.service\nAfter=aos-provfirewall.service\n",
        "firewall",
    )


def _hosts(node: Node) -> str:
    # The node's own servers are reached whatever the state of the network.
    lines = ["127.0.0.1 localhost", "::1 localhost", f"127.0.1.1 {node.hostname}"]
    if not node.is_main and node.main_ip:
        lines.append(f"{node.main_ip} {node.main_host}")
    return "".join(f"{line}\n" for line in lines)


def _networkd(node: Node) -> str:
    lines = ["[Match]", f"Name={node.interface}", "", "[Network]"]
    if node.dhcp:
        lines.append("DHCP=ipv4")
    if node.ip and (node.is_main or not node.dhcp):
        lines.append(f"Address={node.ip}")
        if node.gateway and not node.dhcp:
            lines.append(f"Gateway={node.gateway}")
    if node.dns_ip:
        lines.append(f"DNS={node.dns_ip}")
        if node.is_main and node.dns_ip != node.ip.partition("/")[0]:
            lines += ["", "[Address]", f"Address={node.dns_ip}/32"]
    return "".join(f"{line}\n" for line in lines)


def _addn_hosts(node: Node) -> str:
    hosts = [(node.main_ip, (node.hostname,)), *node.hosts]
    return "".join(f"{address} {' '.join(names)}\n" for address, names in hosts)


def _dnsmasq(node: Node) -> str:
    """CM's reload relies on these options (yocto.md §5); the first hosts file is CM's, the second the image's."""
    return "".join(
        f"{line}\n"
        for line in (
            f"listen-address={node.dns_ip}",
            "bind-dynamic",
            "except-interface=lo",
            "no-hosts",
            f"addn-hosts={node.var}/dns/addnhosts",
            f"addn-hosts={node.etc}/addnhosts",
            "expand-hosts",
            # Plain names are the Unit's alone. Unlike local=// this holds without any other server too, when dnsmasq
            # would refuse to say that a name has no address of another kind.
            "domain-needed",
            "strict-order",
            "all-servers",
            f"pid-file={node.var}/dns/pidfile",
            # The system's own servers, not the stub that asks us again.
            "resolv-file=/run/systemd/resolve/resolv.conf",
        )
    )


def _dns_unit(node: Node) -> str:
    return f"""[Unit]
Description=Name server of the Unit
After=network.target
RequiresMountsFor={node.var}
StartLimitIntervalSec=0

[Service]
ExecStartPre=/usr/sbin/dnsmasq --test --conf-file={node.etc}/dnsmasq.conf
ExecStart=/usr/sbin/dnsmasq --keep-in-foreground --conf-file={node.etc}/dnsmasq.conf
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=1
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ReadWritePaths={node.var}/dns

[Install]
WantedBy=multi-user.target
"""


def _base_rules() -> str:
    """Closed until SM opens what its instances need (yocto.md §8)."""
    return """table inet aos {
    chain forward {
        type filter hook forward priority 0; policy drop;
        ct state invalid drop
        ct state established,related accept
    }
    chain postrouting {
        type nat hook postrouting priority 100; policy accept;
    }
}
"""


_BASE_UNIT = """[Unit]
Description=Base firewall rules of AosCore
DefaultDependencies=no
After=local-fs.target
Before=network-pre.target
Wants=network-pre.target

[Service]
Type=oneshot
RemainAfterExit=yes
# One transaction, and only where the table is missing: a second start neither doubles rules nor touches SM's chains.
ExecStart=/bin/sh -c 'nft list chain inet aos forward >/dev/null 2>&1 || exec nft -f /etc/nftables/aos.nft'

[Install]
WantedBy=sysinit.target
"""


def _provisioning_rules(node: Node, *, provisioned: bool) -> str:
    """Who may call this node's servers; replaced as a whole, in one transaction (yocto.md §8, §12).

    Nodes of the Unit may always. Where the node is provisioned from may reach the provisioning ports until then, and
    only the ports for administration afterwards. Instances reach IAM's public port, for permissions.
    """
    servers = sorted(_server_ports(node))
    lines = ["ct state established,related accept", 'iifname "lo" accept']
    for family, peers in _by_family(node.trusted_peers, without=node.provisioning_peers):
        lines.append(f"{family} saddr {peers} tcp dport {_set(servers)} accept")
    if node.has("iam"):
        lines.append(f'iifname "{_INSTANCE_BRIDGES}" tcp dport 8090 accept')
    for family, peers in _by_family(node.provisioning_peers):
        if provisioned:
            if node.admin_ports:
                lines.append(f"{family} saddr {peers} tcp dport {_set(node.admin_ports)} accept")
            lines.append(f"{family} saddr {peers} drop")
        else:
            lines.append(f"{family} saddr {peers} tcp dport {_set(_PROVISIONING_PORTS)} accept")
    if servers:
        lines.append(f"tcp dport {_set(servers)} drop")
    body = "".join(f"        {line}\n" for line in lines)
    return f"""table inet aos-provfw
delete table inet aos-provfw
table inet aos-provfw {{
    chain input {{
        type filter hook input priority 0; policy accept;
{body}    }}
}}
"""


def _server_ports(node: Node) -> Iterator[int]:
    for name in node.components:
        yield from _SERVERS.get(name, ())
    if node.is_main and node.has("mp"):
        yield _GATEWAY_PORT
    if node.is_main and node.nfs:
        yield from _NFS_PORTS


def _by_family(addresses: Iterable[str], without: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
    """Sets of nftables by address family; `without` are left out of the networks that contain them."""
    networks = [ipaddress.ip_network(text, strict=False) for text in addresses]
    excluded = [ipaddress.ip_network(text, strict=False) for text in without]
    for version, family in ((4, "ip"), (6, "ip6")):
        mine = [str(network) for network in networks if network.version == version]
        if mine:
            others = [str(network) for network in excluded if network.version == version]
            guard = f" {family} saddr != {{ {', '.join(others)} }}" if others else ""
            yield family, f"{{ {', '.join(mine)} }}{guard}"


def _set(ports: Iterable[int]) -> str:
    return "{ " + ", ".join(map(str, ports)) + " }"


def _provisioning_script(node: Node) -> str:
    return f"""#!/bin/sh
# Loads the rules for the node's state: see the two files.
state=unprovisioned
[ -e {node.state_file} ] && state=provisioned
exec nft -f "/etc/nftables/aos-$state.nft"
"""


def _provisioning_unit(node: Node) -> str:
    return f"""[Unit]
Description=Firewall of AosCore servers, by provisioning state
DefaultDependencies=no
RequiresMountsFor={node.var}
After=local-fs.target
Before=network-pre.target
Wants=network-pre.target
# Its rules follow the state that the daemons change with.
PartOf=aos.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={node.opt}/provfirewall.sh

[Install]
WantedBy=sysinit.target
"""
