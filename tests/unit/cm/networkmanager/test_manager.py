"""Networks with their database: calls of nodes, late rules, restart."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from aoscore.cm import database
from aoscore.cm.networkmanager.manager import NetworkManager, RuleUpdate
from aoscore.cm.networkmanager.store import Change, NetworkStore
from aoscore.common.db import Database, Schema
from aoscore.common.errors import AlreadyExistsError, FailedError, InvalidArgumentError, NotFoundError
from aoscore.common.types import FirewallRule, InstanceIdent, InstanceNetworkState, NetworkWishes

SERVER = InstanceIdent("s1", "subject", 0)
CLIENT = InstanceIdent("s2", "subject", 0)
SERVES = NetworkWishes(hosts=("server",), exposed_ports=("8080/tcp", "9090/udp"))
CONNECTS = NetworkWishes(hosts=("client",), allowed_connections=("s1/8080/tcp", "s1/9090/udp"))
RULES = (
    FirewallRule("172.17.0.3", "8080", "tcp", "172.18.0.3"),
    FirewallRule("172.17.0.3", "9090", "udp", "172.18.0.3"),
)


class FakeDns:
    servers = ("10.0.0.100",)
    text = "never written"

    def write(self, text: str) -> None:
        self.text = text


class Bed:
    def __init__(self, db: Database) -> None:
        self.db = db
        self.dns = FakeDns()
        self.store = NetworkStore(db)
        self.manager = NetworkManager(self.store, self.dns, routes=list, rng=random.Random(1))

    async def rows(self, table: str) -> list[tuple[Any, ...]]:
        return await self.db.select(f"SELECT * FROM {table}")


@asynccontextmanager
async def open_bed(path: Path) -> AsyncIterator[Bed]:
    tables = (*database.NETWORK_MANAGER_TABLES, *database.OWN_TABLES)
    async with Database(path / "cm.db", Schema(create=tables, foreign_keys=True)) as db:
        bed = Bed(db)
        await bed.manager.load()
        yield bed


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    async with open_bed(tmp_path) as opened:
        yield opened


async def start_pair(bed: Bed, *, server_first: bool = True) -> None:
    """Server in network n1, client in n2, both on node "node"."""
    await bed.manager.get_node_network("n1", "node")
    await bed.manager.get_node_network("n2", "node")
    if server_first:
        await bed.manager.allocate(SERVER, "n1", "node", SERVES)
    await bed.manager.allocate(CLIENT, "n2", "node", CONNECTS)


async def test_nodes_join(bed: Bed) -> None:
    first = await bed.manager.get_node_network("n1", "a")
    assert (first.subnet, first.ip) == ("172.17.0.0/16", "172.17.0.2")
    assert 2 <= first.vlan_id <= 4094
    assert await bed.manager.get_node_network("n1", "a") == first
    second = await bed.manager.get_node_network("n1", "b")
    assert (second.subnet, second.ip, second.vlan_id) == ("172.17.0.0/16", "172.17.0.3", first.vlan_id)
    assert (await bed.manager.get_node_network("n2", "a")).subnet == "172.18.0.0/16"
    assert len(await bed.rows("hosts")) == 3


async def test_allocate_needs_a_joined_node(bed: Bed) -> None:
    with pytest.raises(NotFoundError, match="network n1 not found"):
        await bed.manager.allocate(SERVER, "n1", "node", SERVES)
    await bed.manager.get_node_network("n1", "other")
    with pytest.raises(NotFoundError, match="has not joined"):
        await bed.manager.allocate(SERVER, "n1", "node", SERVES)


async def test_allocation(bed: Bed) -> None:
    await bed.manager.get_node_network("n1", "node")
    found = await bed.manager.allocate(SERVER, "n1", "node", SERVES)
    assert (found.subnet, found.ip, found.dns_servers) == ("172.17.0.0/16", "172.17.0.3", ("10.0.0.100",))
    assert bed.dns.text == "172.17.0.3\tserver\n"
    assert await bed.manager.allocate(SERVER, "n1", "node", SERVES) == found
    rows = await bed.rows("networkmanager_instances")
    assert rows == [
        (
            "s1",
            "subject",
            0,
            "service",
            0,
            "n1",
            "node",
            "172.17.0.3",
            '[{"protocol":"tcp","port":"8080"},{"protocol":"udp","port":"9090"}]',
            '["10.0.0.100"]',
        )
    ]


async def test_rules_when_the_server_is_there(bed: Bed) -> None:
    await start_pair(bed)
    found = await bed.manager.allocate(CLIENT, "n2", "node", CONNECTS)
    assert found.firewall_rules == RULES
    assert await bed.rows("pending_connections") == []


async def test_late_server_pushes_rules_once(bed: Bed) -> None:
    await start_pair(bed, server_first=False)
    assert len(await bed.rows("pending_connections")) == 2
    with bed.manager.subscribe("node") as updates:
        await bed.manager.allocate(SERVER, "n1", "node", SERVES)
        assert updates.get_nowait() == RuleUpdate(CLIENT, RULES)
        await bed.manager.allocate(SERVER, "n1", "node", SERVES)
        assert updates.empty()
    assert await bed.rows("pending_connections") == []


async def test_ports_that_are_exposed_later_count(bed: Bed) -> None:
    """AosCore 9.1 keeps those of the first time (cm-orchestration §10.3, item 27)."""
    await start_pair(bed, server_first=False)
    await bed.manager.allocate(SERVER, "n1", "node", NetworkWishes())
    with bed.manager.subscribe("node") as updates:
        assert updates.empty()
        await bed.manager.allocate(SERVER, "n1", "node", SERVES)
        assert updates.get_nowait() == RuleUpdate(CLIENT, RULES)


async def test_rules_wait_for_the_subscription(bed: Bed) -> None:
    await start_pair(bed, server_first=False)
    await bed.manager.allocate(SERVER, "n1", "node", SERVES)
    with bed.manager.subscribe("node") as updates:
        assert updates.get_nowait() == RuleUpdate(CLIENT, RULES)


async def test_sync_repeats_what_the_node_lacks(bed: Bed) -> None:
    await start_pair(bed)
    with bed.manager.subscribe("node") as updates:
        states = [
            InstanceNetworkState(SERVER, "n1", "172.17.0.3"),
            InstanceNetworkState(CLIENT, "n2", "172.18.0.3", RULES[:1]),
        ]
        await bed.manager.sync("node", states)
        assert updates.get_nowait() == RuleUpdate(CLIENT, RULES[1:])
        await bed.manager.sync("node", [states[0], InstanceNetworkState(CLIENT, "n2", "172.18.0.3", RULES)])
        assert updates.empty()


async def test_sync_frees_what_the_node_lost(bed: Bed) -> None:
    await start_pair(bed)
    await bed.manager.sync("node", [InstanceNetworkState(SERVER, "n1", "172.17.0.3")])
    assert [row[0] for row in await bed.rows("networkmanager_instances")] == ["s1"]
    await bed.manager.sync("other", [])
    assert [row[0] for row in await bed.rows("networkmanager_instances")] == ["s1"]


async def test_move_keeps_the_address(bed: Bed) -> None:
    await start_pair(bed)
    await bed.manager.get_node_network("n1", "second")
    moved = await bed.manager.allocate(SERVER, "n1", "second", SERVES)
    assert moved.ip == "172.17.0.3"
    await bed.manager.release_instance(SERVER, "node")  # the late word of the old node
    assert ("s1", "second") in [(row[0], row[6]) for row in await bed.rows("networkmanager_instances")]
    other = await bed.manager.allocate(InstanceIdent("s3", "subject", 0), "n1", "second", NetworkWishes())
    assert other.ip == "172.17.0.5"


async def test_release(bed: Bed) -> None:
    await start_pair(bed)
    await bed.manager.release_instance(SERVER, "node")
    assert bed.dns.text == "172.18.0.3\tclient\n"
    assert len(await bed.rows("pending_connections")) == 2
    await bed.manager.release_node("n1", "node")
    await bed.manager.release_node("n2", "node")
    for table in ("networks", "hosts", "networkmanager_instances", "pending_connections", "aoscore_network_wishes"):
        assert await bed.rows(table) == []
    with pytest.raises(NotFoundError):
        await bed.manager.release_node("n2", "node")


async def test_node_address_comes_back(bed: Bed) -> None:
    for node in ("a", "b"):
        await bed.manager.get_node_network("n1", node)
    await bed.manager.release_node("n1", "a")
    addresses = [(await bed.manager.get_node_network("n1", f"x{index}")).ip for index in range(3)]
    assert addresses == ["172.17.0.4", "172.17.0.5", "172.17.0.6"]


@pytest.mark.parametrize(
    ("wishes", "error"),
    [
        (NetworkWishes(hosts=("server",)), AlreadyExistsError),
        (NetworkWishes(exposed_ports=("x",)), InvalidArgumentError),
        (NetworkWishes(allowed_connections=("s1",)), InvalidArgumentError),
    ],
)
async def test_refused_wishes_change_nothing(bed: Bed, wishes: NetworkWishes, error: type[Exception]) -> None:
    await bed.manager.get_node_network("n1", "node")
    await bed.manager.allocate(SERVER, "n1", "node", SERVES)
    before = await bed.rows("networkmanager_instances"), bed.dns.text
    with pytest.raises(error):
        await bed.manager.allocate(CLIENT, "n1", "node", wishes)
    assert (await bed.rows("networkmanager_instances"), bed.dns.text) == before
    assert (await bed.manager.allocate(CLIENT, "n1", "node", NetworkWishes())).ip == "172.17.0.4"


async def test_failed_write_changes_nothing(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    await bed.manager.get_node_network("n1", "node")

    async def fail(change: Change) -> None:
        raise FailedError("disk")

    with monkeypatch.context() as patch:
        patch.setattr(bed.store, "apply", fail)
        for call in (
            bed.manager.allocate(SERVER, "n1", "node", SERVES),
            bed.manager.get_node_network("n2", "node"),
            bed.manager.release_node("n1", "node"),
        ):
            with pytest.raises(FailedError):
                await call
    assert (await bed.manager.allocate(SERVER, "n1", "node", SERVES)).ip == "172.17.0.3"
    assert (await bed.manager.get_node_network("n2", "node")).subnet == "172.18.0.0/16"


async def test_restart(tmp_path: Path) -> None:
    async with open_bed(tmp_path) as bed:
        await start_pair(bed, server_first=False)
        network = await bed.manager.get_node_network("n1", "node")
    async with open_bed(tmp_path) as bed:
        assert bed.dns.text == "172.18.0.3\tclient\n"
        assert await bed.manager.get_node_network("n1", "node") == network
        await bed.manager.sync("node", [InstanceNetworkState(CLIENT, "n2", "172.18.0.3")])
        with bed.manager.subscribe("node") as updates:
            await bed.manager.allocate(SERVER, "n1", "node", SERVES)
            assert updates.get_nowait() == RuleUpdate(CLIENT, RULES)
        assert (await bed.manager.get_node_network("n3", "node")).subnet == "172.19.0.0/16"


async def test_takes_over_a_database_of_9_1(tmp_path: Path) -> None:
    """No own tables filled, a pending connection twice, five networks."""
    async with open_bed(tmp_path) as bed:
        for number in range(5):
            await bed.db.execute(
                "INSERT INTO networks VALUES (?, ?, ?)", (f"n{number}", f"172.{17 + number}.0.0/16", 0)
            )
        await bed.db.execute("INSERT INTO hosts VALUES ('n1', 'node', '172.18.0.2')")
        await bed.db.execute(
            "INSERT INTO networkmanager_instances VALUES"
            " ('s2', 'subject', 0, 'service', 0, 'n1', 'node', '172.18.0.3', '[]', '[\"10.0.0.100\"]')"
        )
        for _ in range(2):
            await bed.db.execute(
                "INSERT INTO pending_connections VALUES ('s2', 'subject', 0, 'service', 0, 'node', 'n1', '172.18.0.3',"
                " '172.18.0.0/16', 's1', '8080', 'tcp')"
            )
    async with open_bed(tmp_path) as bed:
        assert len(await bed.rows("pending_connections")) == 1
        await bed.manager.get_node_network("n0", "node")
        await bed.manager.sync("node", [InstanceNetworkState(CLIENT, "n1", "172.18.0.3")])
        with bed.manager.subscribe("node") as updates:
            await bed.manager.allocate(SERVER, "n0", "node", SERVES)
            assert updates.get_nowait() == RuleUpdate(CLIENT, RULES[:1])


async def test_too_many_rules_are_cut_for_the_sake_of_9_1(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    await bed.manager.get_node_network("n1", "node")
    await bed.manager.get_node_network("n2", "node")
    ports = tuple(str(port) for port in range(8000, 8012))
    await bed.manager.allocate(SERVER, "n1", "node", NetworkWishes(exposed_ports=ports))
    wishes = NetworkWishes(allowed_connections=tuple(f"s1/{port}" for port in ports))
    found = await bed.manager.allocate(CLIENT, "n2", "node", wishes)
    assert len(found.firewall_rules) == 10
    assert "Too many firewall rules" in caplog.text
