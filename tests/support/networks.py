"""A network manager for tests, CM's part played in memory.

Also a program, so that a test can kill the process that manages networks:
``python -m tests.support.networks DIR ID...`` attaches instances of network "owner", prints "ready" and waits.
AOSCORE_TEST_CNI holds CniSettings as JSON for the CNI backend.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from aoscore.common.config import from_json
from aoscore.common.db import Database
from aoscore.common.types import FirewallRule, InstanceIdent, InstanceNetwork, NetworkWishes, NodeNetwork
from aoscore.sm.database import open_database
from aoscore.sm.launcher.runtimes.base import instance_id
from aoscore.sm.networkmanager.cni import CniSettings
from aoscore.sm.networkmanager.ipv6 import Ipv6
from aoscore.sm.networkmanager.manager import NetworkManager
from aoscore.sm.networkmanager.model import NetworkConfig, Ports
from aoscore.sm.networkmanager.store import NetworkStore
from tests.support.running import running

MIGRATIONS = Path(__file__).parents[2] / "aoscore" / "sm" / "migration"


class FakeCm:
    """Hands out 172.31.<n>.0/24 per network, addresses from .2 on."""

    def __init__(self) -> None:
        self.networks: dict[str, int] = {}
        self.allocated: dict[InstanceIdent, str] = {}
        self.wishes: dict[InstanceIdent, NetworkWishes] = {}
        self.rules: dict[InstanceIdent, tuple[FirewallRule, ...]] = {}
        self.calls: list[str] = []

    async def get_node_network_params(self, network_id: str) -> NodeNetwork:
        self.calls.append(f"join {network_id}")
        number = self.networks.setdefault(network_id, len(self.networks) + 1)
        return NodeNetwork(f"172.31.{number}.0/24", f"172.31.{number}.1", 1000 + number)

    async def allocate_instance_network(
        self, ident: InstanceIdent, network_id: str, wishes: NetworkWishes
    ) -> InstanceNetwork:
        self.calls.append(f"allocate {ident.instance}")
        number = self.networks[network_id]
        ip = self.allocated.setdefault(ident, f"172.31.{number}.{len(self.allocated) + 2}")
        self.wishes[ident] = wishes
        return InstanceNetwork(f"172.31.{number}.0/24", ip, ("172.31.0.53",), self.rules.get(ident, ()))

    async def release_instance_network(self, ident: InstanceIdent) -> None:
        self.calls.append(f"release {ident.instance}")

    async def release_node_network(self, network_id: str) -> None:
        self.calls.append(f"leave {network_id}")


def ident(number: int) -> InstanceIdent:
    """Instance `number` of the test's item."""
    return InstanceIdent("item", "subject", number)


def name(number: int) -> str:
    """Its instance id."""
    return instance_id(ident(number))


@contextlib.asynccontextmanager
async def manager(
    directory: Path,
    cm: FakeCm,
    cni: CniSettings | None = None,
    host_ports: Sequence[Ports] | None = None,
    ipv6: Ipv6 | None = None,
) -> AsyncIterator[NetworkManager]:
    """A running network manager with a database in `directory`."""
    database: Database = open_database(directory / "servicemanager.db", MIGRATIONS, directory / "merged")
    async with database:
        made = NetworkManager(
            NetworkStore(database), cm, cni=cni, host_ports=host_ports, ipv6=ipv6, dns_dir=Path("/run/aos/dns")
        )
        async with running(made):
            yield made


async def _main(directory: Path, numbers: list[int], cni: CniSettings | None) -> None:
    async with manager(directory, FakeCm(), cni) as networks:
        for number in numbers:
            await networks.attach(name(number), "owner", NetworkConfig(ident(number), hostname="svc"))
        os.write(1, b"ready\n")
        await asyncio.Event().wait()


if __name__ == "__main__":
    with_cni = os.environ.get("AOSCORE_TEST_CNI")
    settings = from_json(with_cni, CniSettings, what="AOSCORE_TEST_CNI") if with_cni else None
    asyncio.run(_main(Path(sys.argv[1]), [int(number) for number in sys.argv[2:]], settings))
