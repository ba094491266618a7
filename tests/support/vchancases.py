"""Both ends of a vchan in one process, over the real libxenvchan: `python -m tests.support.vchancases CASE`.

Runs with the environment of `tests.support.fakexen`, in domain 1. A case that fails ends with a traceback.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from aoscore._speedups._vchan import MAX_PATH_BYTES, Vchan, xenstore_list, xenstore_read
from aoscore.common.aio import Backoff, Worker
from aoscore.common.errors import FailedError
from aoscore.mp.communication.connection import Connection, LinkSettings
from aoscore.mp.communication.connector import Connector
from aoscore.mp.communication.frames import FrameDecoder, encode_frame, encode_message
from aoscore.mp.communication.ports import Ports
from aoscore.mp.communication.vchans import Peer, VchanLink
from aoscore.mp.legacy import LegacyGateway
from tests.support.running import running, until

OURS = 1
RING = 65536
CLOCK = encode_frame(3, encode_message(b"\x5a\x00"))
"""A question for the time, of a node of the older kind."""
CASES: dict[str, Callable[[Worker], Coroutine[Any, Any, None]]] = {}


def case(function: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
    CASES[function.__name__] = function


def link(role: Any, worker: Worker, domain: int | str = OURS, ring: int = RING) -> VchanLink:
    return VchanLink(role, Peer(domain, "data/rx", "data/tx", ring), worker)


async def ends(worker: Worker, ring: int = RING) -> tuple[Any, Any]:
    """Entered context managers of gateway and node, and their streams."""
    gateway = link("gateway", worker, ring=ring).connected()
    waiting = asyncio.create_task(gateway.__aenter__())
    await until(lambda: xenstore_read(f"/local/domain/{OURS}/data/tx/event-channel"))
    node = link("node", worker).connected()
    streams = await node.__aenter__()
    return (gateway, await waiting), (node, streams)


@case
async def node_comes_first(worker: Worker) -> None:
    served: list[str] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> None:
        served.append(peer)
        await reader.read(1)

    node = Connector("main", link("node", worker).connected, handler, backoff=Backoff(0.05, 0.1))
    async with running(node):
        await asyncio.sleep(0.3)
        assert not served
        gateway = Connector("second", link("gateway", worker).connected, handler, backoff=Backoff(0.05, 0.1))
        async with running(gateway):
            await until(lambda: sorted(served) == ["main", "second"])


@case
async def rest_is_read_after_the_end(worker: Worker) -> None:
    (gateway, (_, writer)), (node, (reader, _)) = await ends(worker)
    data = os.urandom(RING // 2)
    writer.write(data)
    await gateway.__aexit__(None, None, None)
    assert await reader.read(-1) == data
    await node.__aexit__(None, None, None)


@case
async def both_rings_full_at_once(worker: Worker) -> None:
    for ring in (0, RING):
        (gateway, gateway_streams), (node, node_streams) = await ends(worker, ring)
        data = os.urandom(1_000_000)

        async def exchange(streams: Any, data: bytes = data) -> None:
            reader, writer = streams
            writer.write(data)  # all of it, before anything is read
            assert await reader.readexactly(len(data)) == data
            await writer.drain()

        async with asyncio.timeout(30):
            await asyncio.gather(exchange(gateway_streams), exchange(node_streams))
        await node.__aexit__(None, None, None)
        await gateway.__aexit__(None, None, None)


@case
async def slow_reader_stops_the_writer(worker: Worker) -> None:
    (gateway, (_, writer)), (node, (reader, _)) = await ends(worker)
    sent = 0

    async def write() -> None:
        nonlocal sent
        while sent < 4_000_000:
            writer.write(bytes(10_000))
            sent += 10_000
            await writer.drain()

    task = asyncio.create_task(write())
    last = -1
    while last != sent:
        last = sent
        await asyncio.sleep(0.2)
    assert sent < 1_500_000, sent
    assert await reader.readexactly(4_000_000) == bytes(4_000_000)
    await task
    await node.__aexit__(None, None, None)
    await gateway.__aexit__(None, None, None)


@case
async def each_link_has_new_rings(worker: Worker) -> None:
    seen = set()
    for _ in range(3):
        (gateway, (_, writer)), (node, _) = await ends(worker)
        seen.add(xenstore_read(f"/local/domain/{OURS}/data/rx/ring-ref"))
        writer.write(b"never read")
        await node.__aexit__(None, None, None)
        await gateway.__aexit__(None, None, None)
        assert xenstore_list(f"/local/domain/{OURS}/data/rx") == []
    assert len(seen) == 3 and None not in seen


@case
async def node_attaches_by_halves(worker: Worker) -> None:
    gateway = asyncio.create_task(link("gateway", worker).connected().__aenter__())
    await until(lambda: xenstore_read(f"/local/domain/{OURS}/data/tx/event-channel"))
    half = Vchan.connect(OURS, f"/local/domain/{OURS}/data/rx")
    await asyncio.sleep(0.2)
    assert not gateway.done()
    half.close()
    try:
        await gateway
    except FailedError as error:
        assert "went away" in str(error)
    else:
        raise AssertionError("half a link is none")


@case
async def long_paths(worker: Worker) -> None:
    Vchan.serve(2, "p" * MAX_PATH_BYTES, read_bytes=0, write_bytes=0).close()
    for path in ("p" * (MAX_PATH_BYTES + 1), "", "a\0b"):
        try:
            Vchan.serve(2, path, read_bytes=0, write_bytes=0)
        except ValueError as error:
            assert "1 to 49" in str(error)
        else:
            raise AssertionError(path)
    ring = Vchan.serve(2, "p", read_bytes=0, write_bytes=0)
    ring.close()
    ring.close()
    try:
        ring.read(1)
    except ValueError as error:
        assert "closed" in str(error)
    try:
        Vchan.connect(1, "/local/domain/1/nothing")
    except OSError as error:
        assert "/local/domain/1/nothing" in str(error)
    else:
        raise AssertionError("nobody is there")


@case
async def guest_by_name_or_key(worker: Worker) -> None:
    # The test wrote the names: guest "second" is domain 7.
    assert link("gateway", worker, "name:second")._resolve() == 7
    assert link("gateway", worker, "key:data/peer")._resolve() == 9
    for domain, text in (("name:third", "no guest 'third'"), ("key:data/none", "no domain number under 'data/none'")):
        try:
            link("gateway", worker, domain)._resolve()
        except FailedError as error:
            assert text in str(error)
        else:
            raise AssertionError(domain)


@case
async def a_million_small_frames(worker: Worker) -> None:
    """In both directions at once, every one as it was sent."""
    count, together = 1_000_000, 1000
    (gateway, gateway_streams), (node, node_streams) = await ends(worker)

    async def write(writer: asyncio.StreamWriter) -> None:
        for first in range(0, count, together):
            writer.write(
                b"".join(encode_frame(3, number.to_bytes(4, "big")) for number in range(first, first + together))
            )
            await writer.drain()

    async def read(reader: asyncio.StreamReader) -> None:
        decoder = FrameDecoder()
        number = 0
        while number < count:
            for port, payloads in decoder.feed(await reader.read(65536)):
                for payload in payloads:
                    assert (port, payload) == (3, number.to_bytes(4, "big")), number
                    number += 1

    await asyncio.gather(
        *(work for reader, writer in (gateway_streams, node_streams) for work in (write(writer), read(reader)))
    )
    await node.__aexit__(None, None, None)
    await gateway.__aexit__(None, None, None)


@case
async def stale_bytes_at_attach(worker: Worker) -> None:
    """A node died in the middle of a frame and attaches to the same rings again, as the Zephyr application does."""
    made = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> None:
        nonlocal made
        made += 1
        settings = LinkSettings(role="gateway", ports=Ports(), provisioning=True)
        legacy = LegacyGateway(settings.ports.cm_open, [])

        async def serve(connection: Connection) -> None:
            await asyncio.gather(*legacy.services(connection))

        await Connection(reader, writer, settings, {}, peer=peer).run(serve)

    def attach() -> tuple[Vchan, Vchan]:
        rx, tx = (Vchan.connect(OURS, f"/local/domain/{OURS}/data/{name}") for name in ("rx", "tx"))
        return rx, tx

    async def attached() -> tuple[Vchan, Vchan]:
        """As soon as there is something to attach to that lives."""
        while True:
            with contextlib.suppress(OSError):
                rx, tx = attach()
                if rx.has_peer and tx.has_peer:
                    return rx, tx
                rx.close()
                tx.close()
            await asyncio.sleep(0.1)

    gateway = Connector("zephyr", link("gateway", worker, ring=0).connected, handler, backoff=Backoff(0.05, 0.1))
    async with running(gateway):
        first = await attached()
        await until(lambda: made == 1)
        first[0].write(memoryview(encode_frame(4, bytes(900)))[:300])
        # It never says that it is gone. The new one finds the old rings, and begins in the middle of that frame.
        second = attach()
        second[0].write(memoryview(CLOCK))
        async with asyncio.timeout(30):
            await until(lambda: second[0].is_over, 30)
            third = await attached()
        await until(lambda: made == 2)
        third[0].write(memoryview(CLOCK))
        answer = b""
        async with asyncio.timeout(20):
            while len(answer) < 40:
                answer += third[1].read(4096) or b""
                await asyncio.sleep(0.02)
        ((port, payloads),) = FrameDecoder().feed(answer)
        assert port == 3 and len(payloads) == 1
    for ring in (*first, *second, *third):
        ring.close()


async def _main(name: str) -> None:
    async with Worker("xenstore", 2) as worker:
        await CASES[name](worker)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
