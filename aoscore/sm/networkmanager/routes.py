"""Notices of changed routes from the kernel (rtnetlink(7)). Nothing in them is read, so it needs no netlink library."""

import asyncio
import contextlib
import socket
from types import TracebackType

_ROUTE_GROUP = 0x40
"""RTMGRP_IPV4_ROUTE."""
_BUFFER_BYTES = 65536


class RouteChanges:
    """Wakes whoever waits when an IPv4 route of this network namespace comes or goes. A context manager."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._socket.bind((0, _ROUTE_GROUP))

    def __enter__(self) -> "RouteChanges":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    async def wait(self) -> None:
        """Return when something has changed since the last call; many changes at once count as one."""
        # A full buffer is an error that says the same: something has changed.
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_recv(self._socket, _BUFFER_BYTES)
        with contextlib.suppress(OSError):
            while True:
                self._socket.recv(_BUFFER_BYTES)
