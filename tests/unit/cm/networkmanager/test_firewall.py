"""Firewall rules between instances, and host names."""

import pytest

from aoscore.cm.networkmanager.firewall import Connection, Endpoint, Port, derive_rules, parse_connections, parse_ports
from aoscore.cm.networkmanager.hosts import check_names, hosts_text
from aoscore.common.errors import AlreadyExistsError, InvalidArgumentError
from aoscore.common.types import FirewallRule, InstanceIdent


def endpoint(item: str, ip: str, network: str = "n1", index: int = 0, **members: tuple[str, ...]) -> Endpoint:
    return Endpoint(
        ident=InstanceIdent(item, "subject", index),
        network_id=network,
        node_id="node",
        ip=ip,
        exposed_ports=parse_ports(members.get("exposes", ())),
        connections=parse_connections(members.get("allows", ())),
        hosts=members.get("hosts", ()),
    )


SERVER = endpoint("s1", "172.17.0.3", exposes=("8080", "9090/udp"))
CLIENT = endpoint("s2", "172.18.0.3", "n2", allows=("s1/8080/tcp", "s1/9090/udp"))
RULES = (
    FirewallRule("172.17.0.3", "8080", "tcp", "172.18.0.3"),
    FirewallRule("172.17.0.3", "9090", "udp", "172.18.0.3"),
)


def test_golden_pair() -> None:
    found = derive_rules(CLIENT, [SERVER, CLIENT])
    assert (found.rules, found.pending) == (RULES, ())


def test_server_absent() -> None:
    found = derive_rules(CLIENT, [CLIENT])
    assert (found.rules, found.pending) == ((), CLIENT.connections)


def test_port_not_exposed_stays_pending() -> None:
    """9.1 forgets such a connection; the port may be exposed by the next version."""
    client = endpoint("s2", "172.18.0.3", "n2", allows=("s1/1234",))
    assert derive_rules(client, [SERVER]).pending == (Connection("s1", Port("tcp", "1234")),)


def test_same_network_needs_no_rule() -> None:
    client = endpoint("s2", "172.17.0.9", "n1", allows=("s1/8080", "s1/1"))
    found = derive_rules(client, [SERVER])
    assert (found.rules, found.pending) == ((), ())


def test_every_instance_of_the_server_gets_a_rule() -> None:
    second = endpoint("s1", "172.19.0.4", "n3", index=1, exposes=("8080",))
    found = derive_rules(CLIENT, [second, SERVER])
    assert [rule.dst_ip for rule in found.rules if rule.dst_port == "8080"] == ["172.17.0.3", "172.19.0.4"]


def test_an_instance_is_no_server_of_itself() -> None:
    own = endpoint("s2", "172.18.0.3", "n2", allows=("s2/80",), exposes=("80",))
    assert derive_rules(own, [own]).rules == ()


@pytest.mark.parametrize("text", ["", "0", "65536", "http", "80/icmp", "80/tcp/x", "1-2-3", "-1", "8 0"])
def test_wrong_ports(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"valid port|unknown protocol"):
        Port.parse(text)


@pytest.mark.parametrize("text", ["", "s1", "/80", "s1/80/tcp/x", "s1/x"])
def test_wrong_connections(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        Connection.parse(text)


def test_defect_10_names_belong_to_one_item() -> None:
    """Its instances share them; in AosCore 9.1 all but one of them fail (observed.md, defect 10)."""
    holder = endpoint("s1", "172.17.0.3", hosts=("Web",))
    assert check_names(["web", "web"], "s1", [holder]) == ("web",)
    with pytest.raises(AlreadyExistsError, match="web is used by s1"):
        check_names(["web"], "s2", [holder])


@pytest.mark.parametrize("name", ["", "a b", "a\n1.2.3.4 bank", "a\tb", "-a", "a.", "#x", "x" * 254])
def test_wrong_names(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="no host name"):
        check_names([name], "s1", [])


def test_hosts_file() -> None:
    first = endpoint("s1", "172.17.0.3", hosts=("a", "b"))
    second = endpoint("s0", "172.17.0.4", hosts=("c",))
    assert hosts_text([first, second, endpoint("s9", "1.1.1.1")]) == "172.17.0.4\tc\n172.17.0.3\ta\tb\n"
    assert hosts_text([]) == ""
