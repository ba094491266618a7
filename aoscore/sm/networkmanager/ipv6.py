"""IPv6 for instances, beside the IPv4 addresses that CM gives (sm-runtime.md §7, D41). Pure.

CM knows IPv4 alone (grpc.md). So an IPv6 address is the IPv4 address behind a prefix of 96 bits, the same one on all
nodes of a Unit: then whatever is said about an IPv4 address or subnet holds for its IPv6 twin, word for word, and every
rule of the firewall and of the traffic counters gets such a twin.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from aoscore.common.errors import InvalidArgumentError
from aoscore.sm.networkmanager.nft import Command, prefix

_LENGTH = 96
_SUFFIX = "6"
# Where nothing is counted: the twin of "private" is not the private IPv4 networks behind our prefix.
_PRIVATE = tuple(prefix(subnet) for subnet in ("::1", "fc00::/7", "fe80::/10", "ff00::/8"))
# Of what both have, and of chains.
_NAMES = frozenset(("name", "table", "chain", "target", "hook", "counter"))
_WORDS = {"icmp": "icmpv6", "ip": "ip6", "ipv4_addr": "ipv6_addr"}


class Ipv6:
    """Twins of what is about IPv4."""

    def __init__(self, text: str, private: Iterable[str] = ()) -> None:
        """`text`: the prefix, such as ``fd12:3456:789a::/96``; `private`: IPv4 subnets that stand for "not public".

        Raises InvalidArgumentError.
        """
        try:
            self._prefix = ipaddress.IPv6Network(text)
        except ValueError as error:
            raise InvalidArgumentError(f"{text!r} is no IPv6 prefix: {error}") from None
        if self._prefix.prefixlen != _LENGTH:
            raise InvalidArgumentError(f"{text!r} has not {_LENGTH} bits, write for example fd12:3456:789a::/96")
        self._private = [prefix(subnet) for subnet in private]

    def address(self, ipv4: str) -> str:
        """The IPv6 address that goes with an IPv4 address."""
        return str(self._prefix.network_address + int(ipaddress.IPv4Address(ipv4)))

    @staticmethod
    def prefix_length(ipv4: int) -> int:
        """Of the subnet that goes with an IPv4 subnet."""
        return _LENGTH + ipv4

    def with_twins(self, commands: Iterable[Command]) -> list[Command]:
        """Commands for nftables, each that is about IPv4 followed by the same about IPv6."""
        result = []
        for command in commands:
            result.append(command)
            twin = self._twin(command)
            if twin != command:
                result.append(twin)
        return result

    def _twin(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._word(value)
        if isinstance(value, Mapping):
            if set(value) == {"prefix"}:
                inner = value["prefix"]
                return {"prefix": {"addr": self.address(inner["addr"]), "len": self.prefix_length(inner["len"])}}
            if set(value) == {"set"} and value["set"] == self._private:
                return {"set": list(_PRIVATE)}
            return {key: self._member(key, one) for key, one in value.items()}
        if isinstance(value, list):
            return [self._twin(one) for one in value]
        return value

    def _member(self, key: str, value: Any) -> Any:
        if key in _NAMES and isinstance(value, str):
            return value
        twin = self._twin(value)
        # Maps and sets hold one kind of address: those of the other have names of their own.
        if key == "element" or (key in ("map", "set") and isinstance(value, dict) and value.get("type") == "ipv4_addr"):
            twin["name"] += _SUFFIX
        return twin

    def _word(self, text: str) -> str:
        if text.startswith("@"):
            return text + _SUFFIX
        try:
            return self.address(text)
        except ValueError:
            return _WORDS.get(text, text)
