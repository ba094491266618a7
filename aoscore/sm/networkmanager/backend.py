"""How an instance is connected with the bridge of its owner: one interface, and the built-in way of doing it."""

from typing import Protocol

import msgspec

from aoscore.common.aio import Worker
from aoscore.sm.networkmanager.links import Links
from aoscore.sm.networkmanager.model import Network, NetworkConfig, veth_name


class Attached(msgspec.Struct, frozen=True):
    """An instance is connected: name of the link's host end, and what had to be done for it, in words."""

    host_if_name: str
    done: tuple[str, ...] = ()


class Backend(Protocol):
    """Connects instances with bridges, which are there already; bridges, firewall and names are not its matter."""

    async def attach(self, instance_id: str, network: Network, ip: str, config: NetworkConfig) -> Attached:
        """Make namespace, link, address, default route and speed limits, or mend what is wrong with them.

        A namespace that is there is kept: a container may be running in it. Raises AosError; then call `detach`.
        """
        ...

    async def detach(self, instance_id: str) -> None:
        """Remove everything of an instance, however much there is of it; repeatable."""
        ...

    async def known(self) -> frozenset[str]:
        """Ids of instances that the backend has notes of, besides what can be seen in the kernel."""
        ...


class BuiltinBackend:
    """Netlink, by ourselves: the default."""

    def __init__(self, links: Links, netlink: Worker) -> None:
        self._links = links
        self._netlink = netlink

    async def attach(self, instance_id: str, network: Network, ip: str, config: NetworkConfig) -> Attached:
        """See Backend."""
        done = await self._netlink.run(self._links.attach, instance_id, network, ip, config)
        return Attached(veth_name(instance_id), tuple(done))

    async def detach(self, instance_id: str) -> None:
        """See Backend."""
        await self._netlink.run(self._links.detach, instance_id)

    async def known(self) -> frozenset[str]:
        """See Backend."""
        return frozenset()
