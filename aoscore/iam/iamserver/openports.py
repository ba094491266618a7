"""Limits for the plain ports of a Node that waits to be provisioned (iam.md §16, 34)."""

import asyncio
import fcntl
import ipaddress
import logging
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from aoscore.common.aio import Service
from aoscore.common.errors import NotFoundError
from aoscore.common.log import kv
from aoscore.common.rpc import split_address

_log = logging.getLogger(__name__)

_SIOCGIFADDR = 0x8915
_IF_INET6 = Path("/proc/net/if_inet6")
_GLOBAL_SCOPE = "00"


def address_at(url: str, interface: str) -> str:
    """The listening address `url` on one network interface only: its IPv4 address, else its global IPv6 address.

    Raises NotFoundError when the interface has none.
    """
    _, port = split_address(url)
    host = _ipv4_of(interface) or _ipv6_of(interface)
    if host is None:
        raise NotFoundError(f"network interface {interface!r} (provisioningInterface) has no address")
    return f"{host}:{port}"


def _ipv4_of(interface: str) -> str | None:
    request = struct.pack("16sH14s", interface.encode()[:15], socket.AF_INET, b"")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFADDR, request)
        except OSError:
            return None
    return str(ipaddress.IPv4Address(answer[20:24]))


def _ipv6_of(interface: str) -> str | None:
    try:
        lines = _IF_INET6.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        digits, _, _, scope, _, name = line.split()
        if name == interface and scope == _GLOBAL_SCOPE:
            return f"[{ipaddress.IPv6Address(bytes.fromhex(digits))}]"
    return None


class LimitedService:
    """Runs a service until nobody has used it for `limit_s`; then it is stopped, and stays so."""

    def __init__(
        self,
        service: Service,
        limit_s: float,
        last_use_s: Callable[[], float],
        *,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`last_use_s` is when it was used last, on the clock of `now_s`."""
        self._service = service
        self._limit_s = limit_s
        self._last_use_s = last_use_s
        self._now_s = now_s

    async def run(self, started: Callable[[], None]) -> None:
        """See aio.Service."""
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(self._service.run(started))
            while True:
                left_s = self._last_use_s() + self._limit_s - self._now_s()
                if left_s <= 0:
                    break
                await asyncio.sleep(left_s)
            serving.cancel()
            await asyncio.wait({serving})
            _log.error(
                kv("Nobody has provisioned the Node, its port is closed until the next start", limit_s=self._limit_s)
            )
            await asyncio.Event().wait()
