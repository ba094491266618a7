"""A node: one link to its gateway, and what the local SM and IAM get over it (mp.md §2). See `nodeserver`."""

import asyncio
from collections.abc import Sequence

from aoscore.common.aio import Broadcast
from aoscore.common.tls import TlsIdentity
from aoscore.mp.clock import ClockSync
from aoscore.mp.communication.connection import Connection, Contexts, LinkSettings, restart_on_renewal
from aoscore.mp.communication.connector import Reader
from aoscore.mp.nodeserver.calls import CallClient
from aoscore.mp.nodeserver.downloads import DownloadClient
from aoscore.mp.nodeserver.link import NodeLink
from aoscore.mp.status import Status


class Node:
    """Serves each link in turn. `renewals` tells, for each of our certificates, which channels use it."""

    def __init__(
        self,
        settings: LinkSettings,
        contexts: Contexts,
        link: NodeLink,
        clock: ClockSync,
        shared: Sequence[CallClient | DownloadClient],
        status: Status,
        renewals: Sequence[tuple[Broadcast[TlsIdentity], Sequence[int]]] = (),
    ) -> None:
        self._settings = settings
        self._contexts = contexts
        self._link = link
        self._clock = clock
        self._shared = shared
        self._status = status
        self._renewals = renewals

    async def serve(self, reader: Reader, writer: asyncio.StreamWriter, peer: str) -> None:
        """One link, from its connection to its end. Raises AosError or OSError when it breaks."""
        connection = Connection(reader, writer, self._settings, self._contexts, peer=peer)
        with self._status.watching(connection):
            await connection.run(self._serve_channels)

    async def _serve_channels(self, connection: Connection) -> None:
        self._link.set(connection)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._clock.follow())
                for channel in self._shared:
                    tasks.create_task(channel.run())
                for changed, ports in self._renewals:
                    tasks.create_task(restart_on_renewal(connection, changed, ports))
                await asyncio.get_running_loop().create_future()
        finally:
            self._link.set(None)
