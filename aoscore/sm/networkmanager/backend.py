"""How an instance is connected with the bridge of its owner: one interface, and the built-in way of doing it."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from aoscore.common.aio import Worker
from aoscore.sm.networkmanager.links import Links
from aoscore.sm.networkmanager.model import Network, NetworkConfig, veth_name


class Attached(msgspec.Struct, frozen=True):
    """An instance is connected: name of the link's host end, and what had to be done for it, in words."""

    host_if_name: str
    done: tuple[str, ...] = ()


class Attachment(msgspec.Struct, frozen=True):
    """An instance to be connected."""

    instance_id: str
    network: Network
    ip: str
    config: NetworkConfig


class Backend(Protocol):
    """Connects instances with bridges, which are there already; bridges, firewall and names are not its matter."""

    async def attach(self, wanted: Sequence[Attachment]) -> list[Attached | BaseException]:
        """Make namespaces, links, addresses, default routes and speed limits, or mend what is wrong with them.

        A namespace that is there is kept: a container may be running in it. Where the answer is an error, call
        `detach`.
        """
        ...

    async def detach(self, instance_ids: Sequence[str]) -> list[BaseException | None]:
        """Remove everything of instances, however much there is of it; repeatable."""
        ...

    async def known(self) -> frozenset[str]:
        """Ids of instances that the backend has notes of, besides what can be seen in the kernel."""
        ...


class BuiltinBackend:
    """Netlink, by ourselves: the default."""

    def __init__(self, links: Links, netlink: Worker) -> None:
        self._links = links
        self._netlink = netlink

    async def attach(self, wanted: Sequence[Attachment]) -> list[Attached | BaseException]:
        """See Backend."""
        return await self._netlink.run(lambda: [self._attach(one) for one in wanted])

    def _attach(self, wanted: Attachment) -> Attached | BaseException:
        try:
            done = self._links.attach(wanted.instance_id, wanted.network, wanted.ip, wanted.config)
        except Exception as error:
            return error
        return Attached(veth_name(wanted.instance_id), tuple(done))

    async def detach(self, instance_ids: Sequence[str]) -> list[BaseException | None]:
        """See Backend."""
        return await self._netlink.run(self._detach, instance_ids)

    def _detach(self, instance_ids: Sequence[str]) -> list[BaseException | None]:
        results: list[BaseException | None] = []
        try:
            self._links.remove_pairs(instance_ids)
        except Exception as error:
            return [error] * len(instance_ids)
        for instance_id in instance_ids:
            try:
                self._links.remove_namespace(instance_id)
                results.append(None)
            except Exception as error:
                results.append(error)
        return results

    async def known(self) -> frozenset[str]:
        """See Backend."""
        return frozenset()
