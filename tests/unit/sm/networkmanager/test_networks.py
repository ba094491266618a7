"""Names, firewall rules, DNS files, traffic rules and rows of the network manager: the pure parts."""

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoscore.common.errors import InvalidArgumentError
from aoscore.common.oci import ImageConfig, ItemConfig, ProcessConfig, Quotas
from aoscore.common.types import FirewallRule, InstanceIdent, InstanceNetwork, NodeNetwork
from aoscore.sm.database import open_database
from aoscore.sm.networkmanager.dns import Records, hosts_text, servers_text
from aoscore.sm.networkmanager.firewall import instance_rules, ruleset
from aoscore.sm.networkmanager.model import (
    Network,
    NetworkConfig,
    Ports,
    StoredInstance,
    bridge_name,
    check_network_id,
    fnv1a,
    host_names,
    hosts_file,
    network_config,
    node_network,
    parse_ports,
    resolv_conf,
    veth_name,
    vlan_name,
    wishes,
)
from aoscore.sm.networkmanager.store import NetworkStore
from aoscore.sm.networkmanager.traffic import Counted, Period, StoredTraffic, remove_commands, start_of_period, table
from aoscore.sm.resourcemanager.resources import HostConfig

IDENT = InstanceIdent("item", "subject", 0)
NETWORK = Network("owner", "172.17.0.0/16", "172.17.0.1", "br-00000001", 7, "vlan-00000001")
RULE = FirewallRule("172.18.0.5", "8087-8088", "udp", "172.17.0.2")
CONFIG = NetworkConfig(IDENT, hostname="svc", exposed_ports=("9000", "53/udp"), hosts=(HostConfig("10.0.0.9", "db"),))
ALLOCATED = InstanceNetwork("172.17.0.0/16", "172.17.0.2", ("10.0.0.1",), (RULE,))
INSTANCE = StoredInstance("b2f1ae96-7078-327f-96c5-f93a950662af", "owner", CONFIG, ALLOCATED, "veth01234567")


@pytest.mark.parametrize(("text", "digest"), [("", "811c9dc5"), ("a", "e40c292c"), ("foobar", "bf9cf968")])
def test_fnv_vectors(text: str, digest: str) -> None:
    assert fnv1a(text) == digest


def test_link_names_fit_the_kernel() -> None:
    assert len(veth_name("x" * 100)) == 12 and len(bridge_name("y" * 100)) == 11


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("8080", Ports("tcp", 8080, 8080)),
        ("8080/UDP", Ports("udp", 8080, 8080)),
        (" 8087-8088/tcp", Ports("tcp", 8087, 8088)),
        ("65535", Ports("tcp", 65535, 65535)),
    ],
)
def test_ports(text: str, ports: Ports) -> None:
    assert parse_ports(text) == ports


@pytest.mark.parametrize("text", ["", "0", "65536", "9-8", "80/sctp", "80;drop", "80/", "a", "80-", '80"', "٣"])
def test_bad_ports(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="is no port"):
        parse_ports(text)


@given(st.text())
def test_any_text_is_a_port_or_refused(text: str) -> None:
    try:
        ports = parse_ports(text)
    except InvalidArgumentError:
        return
    assert 1 <= ports.first <= ports.last <= 65535 and ports.proto in ("tcp", "udp")


@pytest.mark.parametrize("text", ["", "..", "../x", "a/b", "a b", "-x", "a\n"])
def test_network_id_that_leads_elsewhere(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="network id"):
        check_network_id(text)


def test_wishes_come_from_image_and_item() -> None:
    image = ImageConfig(config=ProcessConfig(exposed_ports={"80/tcp": {}}))
    item = ItemConfig(
        hostname="svc",
        allowed_connections={"other/90": {}},
        quotas=Quotas(upload_speed=1, download_speed=2, upload_limit=3, download_limit=4),
    )
    config = network_config(IDENT, image, item)
    assert config == NetworkConfig(
        IDENT, "svc", ("80/tcp",), ("other/90",), download_speed_kbit=2, upload_speed_kbit=1,
        download_limit_bytes=4, upload_limit_bytes=3,
    )  # fmt: skip
    assert wishes(config, "owner").hosts == (
        "svc",
        "0.subject.item",
        "0.subject.item.owner",
        "subject.item",
        "subject.item.owner",
    )


def test_second_instance_has_its_index_in_the_host_name() -> None:
    config = NetworkConfig(InstanceIdent("item", "subject", 2), hostname="svc")
    assert host_names(config, "owner") == ["svc-2", "2.subject.item", "2.subject.item.owner"]


def test_files_in_the_container() -> None:
    assert hosts_file("172.17.0.2", ["svc"], "owner", CONFIG.hosts) == (
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n172.17.0.2\towner svc\n10.0.0.9\tdb\n"
    )
    text = resolv_conf("172.17.0.1", ["10.0.0.1", "172.17.0.1", ""])
    assert text == "nameserver\t172.17.0.1\nnameserver\t10.0.0.1\n"


def rules_of(commands: list[dict[str, Any]], chain: str) -> list[str]:
    """Rules of a chain in a short notation."""
    rules = [command["add"]["rule"] for command in commands if "rule" in command.get("add", {})]
    return [" ".join(map(short, rule["expr"])) for rule in rules if rule["chain"] == chain]


def short(expression: dict[str, Any]) -> str:
    [(kind, value)] = expression.items()
    if kind == "match":
        [(left, key)] = value["left"].items()
        right = value["right"]
        if isinstance(right, dict) and "prefix" in right:
            right = f"{right['prefix']['addr']}/{right['prefix']['len']}"
        elif isinstance(right, dict):
            right = json.dumps(next(iter(right.values())))
        name = f"{key['protocol']} {key['field']}" if left == "payload" else key["key"]
        return f"{name} {'' if value['op'] == 'in' else value['op'] + ' '}{right}"
    if kind == "vmap":
        return f"{value['key']['payload']['field']} vmap {[element[0] for element in value['data']['set']]}"
    return kind


def test_rules_of_one_instance() -> None:
    """Table 6.5 of sm-runtime.md; the last row returns so that the receiver decides (D35)."""
    commands = ruleset([NETWORK], [instance_rules(INSTANCE)])
    assert rules_of(commands, "instance_b2f1ae96_7078_327f_96c5_f93a950662af") == [
        "ip saddr == 172.17.0.0/16 ip daddr == 172.17.0.2 accept",
        "ip saddr == 172.17.0.2 ip daddr == 172.17.0.0/16 accept",
        "ip daddr == 172.17.0.2 tcp dport == 9000 accept",
        "ip daddr == 172.17.0.2 udp dport == 53 accept",
        "ip saddr == 172.17.0.2 ip daddr == 172.18.0.5 udp dport == [8087, 8088] accept",
        "ip daddr == 172.17.0.2 drop",
        "ip saddr == 172.17.0.2 return",
    ]
    assert rules_of(commands, "forward") == [
        "state invalid drop",
        'state ["established", "related"] accept',
        "saddr vmap ['172.17.0.2']",
        "daddr vmap ['172.17.0.2']",
        'ip saddr == ["172.17.0.2"] accept',
    ]
    assert rules_of(commands, "postrouting") == ["ip saddr == 172.17.0.0/16 oifname != br-00000001 masquerade"]


def test_networks_of_others_on_other_nodes_are_reached_by_what_is_allowed_only() -> None:
    """Who is there has no chain on this node; what goes on within a network, or outside, is left alone."""
    other = msgspec.structs.replace(NETWORK, network_id="other", subnet="172.18.0.0/16", bridge="br-00000002")
    rules = rules_of(ruleset([NETWORK, other], [instance_rules(INSTANCE)]), "forward")
    assert rules[-3:] == [
        'ip saddr == 172.17.0.0/16 oifname == ["br-00000002"] drop',
        'ip saddr == 172.18.0.0/16 oifname == ["br-00000001"] drop',
        'ip saddr == ["172.17.0.2"] accept',
    ]


def test_ports_of_the_node() -> None:
    """Open to instances unless the node says which are (D36)."""
    assert not any("input" in str(command) for command in ruleset([NETWORK], [instance_rules(INSTANCE)]))
    commands = ruleset([NETWORK], [], (Ports("tcp", 8088, 8090),))
    assert rules_of(commands, "input") == ['iifname == ["br-00000001"] jump']
    assert rules_of(commands, "host") == [
        'state ["established", "related"] accept',
        "l4proto == icmp accept",
        "tcp dport == 53 accept",
        "udp dport == 53 accept",
        "tcp dport == [8088, 8090] accept",
        "drop",
    ]
    assert rules_of(ruleset([], [], ()), "input") == []


def test_only_our_table_is_named() -> None:
    commands = ruleset([NETWORK], [instance_rules(INSTANCE)])
    for command in commands:
        [action] = command.values()
        [(kind, thing)] = action.items()
        assert thing["name" if kind == "table" else "table"] == "aos" and thing["family"] == "inet"


def test_without_instances_nothing_is_forwarded() -> None:
    commands = ruleset([], [])
    forward = next(c["add"]["chain"] for c in commands if c.get("add", {}).get("chain", {}).get("name") == "forward")
    assert forward["policy"] == "drop"
    assert rules_of(commands, "forward") == ["state invalid drop", 'state ["established", "related"] accept']


@pytest.mark.parametrize(
    "allocated",
    [
        InstanceNetwork("172.17.0.0/16", 'x" drop'),
        InstanceNetwork("nowhere", "172.17.0.2"),
        InstanceNetwork("172.17.0.0/16", "172.17.0.2", (), (FirewallRule("a;b", "80", "tcp", ""),)),
        InstanceNetwork("172.17.0.0/16", "172.17.0.2", (), (FirewallRule("10.0.0.1", "80", "sctp", ""),)),
        InstanceNetwork("172.17.0.0/16", "172.17.0.2", (), (FirewallRule("10.0.0.1", "", "tcp", ""),)),
    ],
)
def test_bad_allocation_is_refused(allocated: InstanceNetwork) -> None:
    with pytest.raises(InvalidArgumentError):
        instance_rules(StoredInstance("id", "owner", CONFIG, allocated))


def test_dns_files() -> None:
    records = {
        "id1": Records("172.17.0.3", ("svc-1",), ("10.0.0.1",)),
        "id0": Records("172.17.0.2", ("svc", "subject.item.owner"), ("10.0.0.1", "10.0.0.2")),
    }
    assert hosts_text("owner", records) == (
        "172.17.0.2\tsvc\tsvc.owner\tsubject.item.owner\tsubject.item.owner.owner # id0\n"
        "172.17.0.3\tsvc-1\tsvc-1.owner # id1\n"
    )
    assert servers_text(records.values(), "") == "server=10.0.0.1\nserver=10.0.0.2\n"
    host = "# comment\nsearch lan\nnameserver 192.0.2.1\n"
    assert servers_text([Records("172.17.0.2", (), ())], host) == "server=192.0.2.1\n"


def test_traffic_table_starts_with_given_totals() -> None:
    commands = table([Counted("a-b", "172.17.0.2")], {"in_a_b": 5, "out_system": 7})
    counters = [command["add"]["counter"] for command in commands if "counter" in command.get("add", {})]
    assert {counter["name"]: counter["bytes"] for counter in counters} == {
        "in_system": 0,
        "out_system": 7,
        "in_a_b": 5,
        "out_a_b": 0,
    }
    removal = remove_commands(Counted("a-b", "172.17.0.2"), ["in"])
    assert [next(iter(command["delete"])) for command in removal] == [
        "element", "element", "counter", "element", "counter"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("period", "begin"),
    [
        ("minute", datetime(2026, 5, 17, 13, 45, tzinfo=UTC)),
        ("hour", datetime(2026, 5, 17, 13, tzinfo=UTC)),
        ("day", datetime(2026, 5, 17, tzinfo=UTC)),
        ("month", datetime(2026, 5, 1, tzinfo=UTC)),
        ("year", datetime(2026, 1, 1, tzinfo=UTC)),
    ],
)
def test_periods_are_those_of_the_calendar_in_utc(period: Period, begin: datetime) -> None:
    moment = datetime(2026, 5, 17, 15, 45, 30, 7, tzinfo=timezone(timedelta(hours=2)))
    assert start_of_period(moment, period) == begin
    assert start_of_period(begin, period) == begin
    assert start_of_period(begin - timedelta(microseconds=1), period) < begin


def test_a_network_from_cm_is_checked() -> None:
    network = node_network("owner", NodeNetwork("172.17.0.0/16", "172.17.0.1", 7))
    assert (network.bridge, network.vlan_if_name) == (bridge_name("owner"), vlan_name("owner"))
    assert node_network("owner", NodeNetwork("172.17.0.0/16", "172.17.0.1", 0)).vlan_if_name == ""
    for node in (
        NodeNetwork("172.17.0.0/16", "172.17.0.1", 4095),
        NodeNetwork("172.17.0.0/16", "::1", 7),
        NodeNetwork("all", "172.17.0.1", 7),
    ):
        with pytest.raises(InvalidArgumentError):
            node_network("owner", node)


MIGRATIONS = Path(__file__).parents[4] / "aoscore" / "sm" / "migration"


async def test_rows_are_those_of_aoscore_9_1(tmp_path: Path) -> None:
    async with open_database(tmp_path / "sm.db", MIGRATIONS, tmp_path / "merged") as database:
        store = NetworkStore(database)
        await store.save((NETWORK, INSTANCE))
        assert (await store.load_networks(), await store.load_instances()) == ([NETWORK], [INSTANCE])
        [(config, allocated)] = await database.select("SELECT networkConfig, allocatedParams FROM instancenetwork")
        assert json.loads(config) == {
            "instanceIdent": {"itemID": "item", "subjectID": "subject", "instance": 0},
            "hostname": "svc",
            "ingressKbit": 0,
            "egressKbit": 0,
            "uploadLimit": 0,
            "downloadLimit": 0,
            "aliases": ["0.subject.item", "0.subject.item.owner", "subject.item", "subject.item.owner"],
            "exposedPorts": ["9000", "53/udp"],
            "allowedConnections": [],
            "hosts": [{"ip": "10.0.0.9", "hostname": "db"}],
        }
        assert json.loads(allocated) == {
            "networkID": "owner",
            "subnet": "172.17.0.0/16",
            "ip": "172.17.0.2",
            "dnsServers": ["10.0.0.1"],
            "firewallRules": [{"dstIP": "172.18.0.5", "dstPort": "8087-8088", "proto": "udp", "srcIP": "172.17.0.2"}],
        }
        await store.remove_instance(INSTANCE.instance_id, "owner")
        assert (await store.load_networks(), await store.load_instances()) == ([], [])


async def test_totals_are_kept(tmp_path: Path) -> None:
    total = StoredTraffic("in_x", datetime(2026, 1, 2, 3, tzinfo=UTC), 12)
    async with open_database(tmp_path / "sm.db", MIGRATIONS, tmp_path / "merged") as database:
        store = NetworkStore(database)
        await store.save_traffic([total])
        assert await store.load_traffic() == [total]
        await store.remove_traffic(["in_x"])
        assert await store.load_traffic() == []
