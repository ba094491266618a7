"""TCP: many nodes at one gateway, a node that looks for its gateway."""

import asyncio
import socket
import struct
from functools import partial
from typing import Any

import pytest

from aoscore.common.aio import Backoff
from aoscore.common.errors import AlreadyExistsError, FailedError
from aoscore.mp.communication import connector as connector_module
from aoscore.mp.communication import sockets
from aoscore.mp.communication.connection import until_one_ends
from aoscore.mp.communication.connector import Connector, Reader
from aoscore.mp.communication.sockets import Listener, connected
from tests.support.running import running, until


async def test_each_connection_has_its_own_handler() -> None:
    seen: list[bytes] = []

    async def handler(reader: Reader, writer: asyncio.StreamWriter, peer: str) -> None:
        seen.append(bytes(await reader.read(1)))
        await asyncio.Event().wait()

    listener = Listener("127.0.0.1:0", handler)
    async with running(listener):
        writers = []
        for name in (b"a", b"b"):
            _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(name)
            writers.append(writer)
            await until(lambda name=name: name in seen)
        for writer in writers:
            writer.close()


async def test_failure_of_one_link_leaves_the_others() -> None:
    ended = asyncio.Event()
    count = 0

    async def handler(reader: Reader, writer: asyncio.StreamWriter, peer: str) -> None:
        nonlocal count
        count += 1
        if count == 1:
            raise TypeError("a bug")
        await reader.read(1)
        ended.set()

    listener = Listener("127.0.0.1:0", handler)
    async with running(listener):
        reader, _ = await asyncio.open_connection("127.0.0.1", listener.port)
        with pytest.raises(ConnectionResetError):
            assert await reader.read() == b""
            raise ConnectionResetError
        _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(b"x")
        await ended.wait()


async def test_number_of_links_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "MAX_LINKS", 1)

    async def handler(reader: Reader, writer: asyncio.StreamWriter, peer: str) -> None:
        writer.write(b"!")
        await asyncio.Event().wait()

    listener = Listener("127.0.0.1:0", handler)
    async with running(listener):
        reader, _ = await asyncio.open_connection("127.0.0.1", listener.port)
        assert await reader.read(1) == b"!"
        refused, _ = await asyncio.open_connection("127.0.0.1", listener.port)
        with pytest.raises(ConnectionResetError):
            assert await refused.read(1) == b""
            raise ConnectionResetError


async def test_taken_port_is_named() -> None:
    async def handler(*_: Any) -> None: ...

    first = Listener("127.0.0.1:0", handler)
    async with running(first):
        with pytest.raises(AlreadyExistsError, match=f"can't wait for nodes on 127.0.0.1:{first.port}"):
            async with running(Listener(f"127.0.0.1:{first.port}", handler)):
                pass


async def test_node_connects_again_after_every_end() -> None:
    served = 0

    async def gateway(reader: Reader, writer: asyncio.StreamWriter, peer: str) -> None:
        await reader.read(1)

    async def node(reader: Reader, writer: asyncio.StreamWriter, peer: str) -> None:
        nonlocal served
        served += 1
        if served < 3:
            raise FailedError("broken")
        await asyncio.Event().wait()

    listener = Listener("127.0.0.1:0", gateway)
    async with running(listener):
        address = f"127.0.0.1:{listener.port}"
        connector = Connector(address, partial(connected, address), node, backoff=Backoff(0.01, 0.02))
        async with running(connector):
            await until(lambda: served == 3)


async def test_gateway_may_be_away() -> None:
    async def node(*_: Any) -> None: ...

    async with running(Connector("main", partial(connected, "127.0.0.1:1"), node, backoff=Backoff(0.01, 0.02))) as task:
        await asyncio.sleep(0.1)
        assert not task.done()


async def test_absence_of_the_link_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connector_module, "_ALERT_S", 0.05)

    async def node(*_: Any) -> None: ...

    async with running(Connector("main", partial(connected, "127.0.0.1:1"), node, backoff=Backoff(0.01, 0.02))):
        await until(lambda: "There has been no link" in caplog.text)
        count = caplog.text.count("Link is down")
        await until(lambda: caplog.text.count("Link is down") > count + 5)
    assert caplog.text.count("There has been no link") == 1


async def test_what_comes_is_read_in_its_order_and_no_more_than_fits_is_taken() -> None:
    """Larger than all buffers together, read late and in odd parts."""
    data = bytes(range(256)) * 40_000
    found = bytearray()
    largest = 0
    is_over = asyncio.Event()

    async def handler(reader: Reader, writer: asyncio.StreamWriter, peer: str) -> None:
        nonlocal largest
        assert isinstance(reader, sockets._Input)
        await until(lambda: reader._filled == sockets._BUFFER_BYTES)
        while part := await reader.read(100_003):
            largest = max(largest, len(part))
            found.extend(part)
            await asyncio.sleep(0)
        is_over.set()

    listener = Listener("127.0.0.1:0", handler)
    async with running(listener):
        _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(data)
        writer.write_eof()
        await asyncio.wait_for(is_over.wait(), 30)
        writer.close()
    assert found == data
    assert largest <= 100_003


async def test_what_follows_a_download_does_not_wait_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bytearray()
    woken_for: list[int] = []
    is_there = asyncio.Event()
    wake_for = sockets._Input._wake_for

    def seen(reader: sockets._Input, least_bytes: int) -> None:
        wake_for(reader, least_bytes)
        woken_for.append(least_bytes)

    monkeypatch.setattr(sockets._Input, "_wake_for", seen)

    async def handler(reader: Reader, writer: asyncio.StreamWriter, peer: str) -> None:
        is_there.set()
        while part := await reader.read(1 << 20):
            found.extend(part)

    listener = Listener("127.0.0.1:0", handler)
    async with running(listener):
        with socket.create_connection(("127.0.0.1", listener.port)) as sock:
            await is_there.wait()
            for size in (1, sockets._DOWNLOAD_BYTES, 1):
                found.clear()
                sock.sendall(bytes(size))  # the kernel takes all of it before the reader's turn comes
                await until(lambda size=size: len(found) == size)
            assert woken_for == [sockets._WORTH_WAKING_BYTES, 1]


async def test_what_came_before_a_reset_is_read_first() -> None:
    found: list[bytes | BaseException] = []
    go_on, is_over = asyncio.Event(), asyncio.Event()
    inputs: list[sockets._Input] = []

    async def handler(reader: Reader, writer: asyncio.StreamWriter, peer: str) -> None:
        assert isinstance(reader, sockets._Input)
        inputs.append(reader)
        await go_on.wait()
        try:
            while part := await reader.read(10):
                found.append(bytes(part))
        except OSError as error:
            found.append(error)
        is_over.set()

    listener = Listener("127.0.0.1:0", handler)
    async with running(listener):
        _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(b"0123456789abc")
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # A reset would wipe out what the kernel still has.
        await until(lambda: inputs and inputs[0]._filled == 13)
        writer.transport.abort()
        await until(lambda: inputs[0]._is_over)
        go_on.set()
        await asyncio.wait_for(is_over.wait(), 30)
    assert found[:2] == [b"0123456789", b"abc"]
    assert isinstance(found[2], ConnectionResetError)


async def test_cancellation_is_never_hidden_by_a_failure() -> None:
    """A work fails in the very turn in which the whole is cancelled."""
    for turns in range(6):
        go = asyncio.Event()

        async def fails(go: asyncio.Event = go) -> None:
            await go.wait()
            raise FailedError("broken")

        async def loop(go: asyncio.Event = go) -> None:
            while True:
                try:
                    await until_one_ends(fails(), asyncio.sleep(60))
                except FailedError:
                    go.clear()

        task = asyncio.create_task(loop())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        go.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=5)
        assert task.cancelled(), turns
