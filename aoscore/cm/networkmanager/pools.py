"""Subnets, addresses and VLAN ids that are free. Pure (cm-orchestration §6.1)."""

import random
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network

import msgspec

from aoscore.common.errors import InvalidArgumentError, OutOfRangeError

DEFAULT_POOLS = (
    "172.17.0.0/16",
    "172.18.0.0/16",
    "172.19.0.0/16",
    "172.20.0.0/14",
    "172.24.0.0/14",
    "172.28.0.0/14",
)
SUBNET_PREFIX = 16
FIRST_VLAN, LAST_VLAN = 2, 4094
"""1 is the untagged VLAN of most switches, 0 and 4095 are reserved."""


class Route(msgspec.Struct, frozen=True):
    """A route of this machine; the default route has a gateway and a destination of prefix 0."""

    destination: IPv4Network
    gateway: IPv4Address | None = None

    def touches(self, subnet: IPv4Network) -> bool:
        """Whether a network with that subnet would be in the way of the route."""
        if self.gateway is not None and self.gateway in subnet:
            return True
        return self.destination.prefixlen > 0 and self.destination.overlaps(subnet)


class SubnetPool:
    """Subnets for networks, cut from larger pools, given out in order; returned ones come last."""

    def __init__(self, pools: Sequence[str] = DEFAULT_POOLS, prefix: int = SUBNET_PREFIX) -> None:
        """Raises InvalidArgumentError for a text that is no pool."""
        self._free: deque[IPv4Network] = deque()
        for text in pools:
            try:
                pool = IPv4Network(text)
            except ValueError as error:
                raise InvalidArgumentError(f"{text!r} is no pool of networks: {error}") from None
            self._free += pool.subnets(new_prefix=prefix) if pool.prefixlen < prefix else [pool]

    def choose(self, routes: Iterable[Route]) -> IPv4Network:
        """The first free subnet that is in no route's way; it stays free until `take`."""
        known = list(routes)
        for subnet in self._free:
            if not any(route.touches(subnet) for route in known):
                return subnet
        raise OutOfRangeError("no available network")

    def take(self, subnet: IPv4Network) -> None:
        """Mark a subnet as used; one from elsewhere (another pool in an older configuration) is fine."""
        if subnet in self._free:
            self._free.remove(subnet)

    def give_back(self, subnet: IPv4Network) -> None:
        """The subnet is free again."""
        if subnet not in self._free:
            self._free.append(subnet)


class AddressPool:
    """Addresses of one subnet, x.y.0.2 and up, given out in order; returned ones only when all others were used."""

    def __init__(self, subnet: IPv4Network) -> None:
        self.subnet = subnet
        self._next = int(subnet.network_address) + 2
        self._taken: set[IPv4Address] = set()
        self._returned: deque[IPv4Address] = deque()

    def choose(self, count: int = 1) -> list[IPv4Address]:
        """The next free addresses; they stay free until `take`. Raises OutOfRangeError when there are not enough."""
        found: list[IPv4Address] = []
        candidate, last = self._next, int(self.subnet.broadcast_address) - 1
        returned = set(self._returned)
        while len(found) < count and candidate <= last:
            address = IPv4Address(candidate)
            if address not in self._taken and address not in returned:
                found.append(address)
            candidate += 1
        found += list(self._returned)[: count - len(found)]
        if len(found) < count:
            raise OutOfRangeError(f"no available IP for network {self.subnet}")
        return found

    def take(self, address: IPv4Address) -> None:
        """Mark an address as used."""
        self._taken.add(address)
        if address in self._returned:
            self._returned.remove(address)
        while IPv4Address(self._next) in self._taken:
            self._next += 1

    def give_back(self, address: IPv4Address) -> None:
        """The address is free again."""
        if address in self._taken:
            self._taken.remove(address)
            self._returned.append(address)


def choose_vlan(taken: Collection[int], rng: random.Random) -> int:
    """A VLAN id that no other network has."""
    free = [vlan for vlan in range(FIRST_VLAN, LAST_VLAN + 1) if vlan not in taken]
    if not free:
        raise OutOfRangeError("no available VLAN id")
    return rng.choice(free)
