"""Routes of this machine, so that networks of the Unit do not get in their way."""

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from aoscore.cm.networkmanager.pools import Route

_ROUTES_FILE = Path("/proc/net/route")
_FLAG_GATEWAY = 0x2


def read_routes(path: Path = _ROUTES_FILE) -> list[Route]:
    """IPv4 routes of the main table as the kernel lists them."""
    return parse_routes(path.read_text())


def parse_routes(text: str) -> list[Route]:
    """Read the kernel's table: addresses are host-order words in hex."""
    routes = []
    for line in text.splitlines()[1:]:
        columns = line.split()
        if len(columns) < 8:
            continue
        destination, gateway, flags, mask = columns[1], columns[2], columns[3], columns[7]
        routes.append(
            Route(
                IPv4Network((_address(destination), str(_address(mask))), strict=False),
                _address(gateway) if int(flags, 16) & _FLAG_GATEWAY else None,
            )
        )
    return routes


def _address(word: str) -> IPv4Address:
    return IPv4Address(bytes.fromhex(word)[::-1])
