"""Two ends of a link over a socket pair: streams, back-pressure, fairness, damage."""

import asyncio
import os
from pathlib import Path

import pytest
from cryptography import x509

from aoscore.common.errors import ChecksumError, NotSupportedError, OutOfRangeError
from aoscore.mp.communication.connection import ChannelClosedError, Connection, LinkSettings, Stream
from aoscore.mp.communication.frames import encode_frame
from aoscore.mp.communication.ports import CONTROL, PROXY, RPC, Ports
from tests.support.links import PORTS, Contexts, Link, contexts, linked, stream_pair
from tests.support.pki import TestCa
from tests.support.running import until


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Contexts, Contexts]:
    ca = TestCa()
    directory = tmp_path_factory.mktemp("pki")
    return contexts("gateway", ca.identity(directory, "main")), contexts("node", ca.identity(directory, "second"))


async def opened(link: Link, port: int) -> tuple[Stream, Stream]:
    """Node's and gateway's stream of a channel, after a first message."""
    node = await link.node.connect(port)
    await node.send(b"first")
    gateway = await link.gateway.accept(port)
    assert await gateway.receive() == b"first"
    return node, gateway


@pytest.mark.parametrize("port", [1, 2, 3, 4, RPC, PROXY])
async def test_messages_on_every_channel(tls: tuple[Contexts, Contexts], port: int) -> None:
    async with linked(*tls) as link:
        node, gateway = await opened(link, port)
        for size in (1, 100, 16_380, 60_000):
            message = os.urandom(size)
            await gateway.send(message)
            assert await node.receive() == message
            await node.send(message)
            assert await gateway.receive() == message


async def test_certificates_of_the_peer_are_known(tls: tuple[Contexts, Contexts]) -> None:
    async with linked(*tls) as link:
        await opened(link, 4)
        await opened(link, 1)
        subject = x509.load_der_x509_certificate(link.gateway.certificates[4]).subject.rfc4514_string()
        assert (subject, list(link.gateway.certificates)) == ("CN=second", [4])


async def test_closing_tells_the_other_end_after_all_messages(tls: tuple[Contexts, Contexts]) -> None:
    async with linked(*tls) as link:
        node, gateway = await opened(link, 4)
        await node.send(b"last words")
        await node.close("SM stopped")
        assert await gateway.receive() == b"last words"
        with pytest.raises(ChannelClosedError, match="SM stopped"):
            await gateway.receive()
        with pytest.raises(ChannelClosedError, match="SM stopped"):
            await gateway.send(b"x")
        node, gateway = await opened(link, 4)
        await gateway.send(b"again")
        assert await node.receive() == b"again"


async def test_failure_of_a_block_is_the_reason_of_its_stream(tls: tuple[Contexts, Contexts]) -> None:
    async with linked(*tls) as link:
        node, gateway = await opened(link, 4)
        with pytest.raises(OutOfRangeError):
            async with gateway:
                raise OutOfRangeError("too far")
        with pytest.raises(ChannelClosedError, match="too far"):
            await node.receive()


async def test_restart_of_a_channel_leaves_the_others(tls: tuple[Contexts, Contexts]) -> None:
    async with linked(*tls) as link:
        node, _ = await opened(link, 4)
        other, other_gateway = await opened(link, 2)
        link.gateway.restart(4, "certificate changed")
        with pytest.raises(ChannelClosedError, match="certificate changed"):
            await node.receive()
        await other.send(b"still here")
        assert await other_gateway.receive() == b"still here"
        await opened(link, 4)


async def test_bulk_transfer_delays_nothing_and_fills_no_memory(tls: tuple[Contexts, Contexts]) -> None:
    """A reader of downloads that is fast enough: what else is sent goes between the pieces."""
    async with linked(*tls) as link:
        node, gateway = await opened(link, PROXY)
        status, status_gateway = await opened(link, 4)
        received = 0

        async def read() -> None:
            nonlocal received
            while True:
                received += len(await node.receive())

        async def write() -> None:
            while True:
                await gateway.send(bytes(15_360))

        reader, writer = asyncio.create_task(read()), asyncio.create_task(write())
        await until(lambda: received > 1_000_000)
        before = received
        await status_gateway.send(b"update")
        assert await status.receive() == b"update"
        overtaken = received - before
        assert link.gateway.pending_bytes(PROXY) < 2.1 * link.gateway.quantum_bytes
        writer.cancel()
        reader.cancel()
        # What waited in both kernels and in the two processes; not what waited to be sent.
        assert overtaken < 4_000_000


async def test_slow_reader_stops_the_sender_and_loses_nothing(tls: tuple[Contexts, Contexts]) -> None:
    async with linked(*tls, channel_buffer_bytes=100_000) as link:
        node, gateway = await opened(link, 4)
        sent = 0

        async def write() -> None:
            nonlocal sent
            for index in range(2000):
                await gateway.send(index.to_bytes(4, "big") * 1024)
                sent += 1

        writer = asyncio.create_task(write())
        last = -1
        while last != sent:
            last = sent
            await asyncio.sleep(0.2)
        assert sent < 2000
        for index in range(2000):
            assert await node.receive() == index.to_bytes(4, "big") * 1024
        await writer


async def test_loss_of_the_link_ends_every_stream(tls: tuple[Contexts, Contexts]) -> None:
    async with linked(*tls) as link:
        node, gateway = await opened(link, 4)
        waiting = asyncio.create_task(node.receive())
        link.gateway._writer.transport.abort()
        with pytest.raises(ChannelClosedError, match="the link to gateway is down"):
            await waiting
        with pytest.raises(ChannelClosedError, match="the link to node is down"):
            await gateway.receive()
        await until(lambda: len(link.ends) == 2)


async def test_who_waits_for_a_channel_hears_that_the_link_is_gone(tls: tuple[Contexts, Contexts]) -> None:
    async with linked(*tls) as link:
        node, _ = await opened(link, 4)
        # The peer never answers the Reset of the old use.
        link.gateway._control._on_reset = lambda *_: None
        node.abort("called anew")
        waiting = asyncio.create_task(link.node.connect(4))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        link.node.shut("cut")
        with pytest.raises(ChannelClosedError, match="the link to gateway is down"):
            await asyncio.wait_for(waiting, 5)
        with pytest.raises(ChannelClosedError, match="the link to gateway is down"):
            await link.node.connect(2)


async def test_good_bye(tls: tuple[Contexts, Contexts]) -> None:
    async with linked(*tls) as link:
        node, gateway = await opened(link, 4)
        await gateway.send(b"the answer")
        link.stop.set()
        await until(lambda: len(link.ends) == 2)
        assert await node.receive() == b"the answer"


async def test_damaged_frames(tls: tuple[Contexts, Contexts]) -> None:
    async with linked(*tls) as link:
        node, gateway = await opened(link, 4)
        damaged = bytearray(encode_frame(4, b"payload"))
        damaged[-1] ^= 1
        link.node._writer.write(damaged)
        with pytest.raises(ChannelClosedError, match="a frame was damaged"):
            await gateway.receive()
        with pytest.raises(ChannelClosedError, match="a frame was damaged"):
            await node.receive()
        await opened(link, 4)
        for _ in range(2):
            link.node._writer.write(damaged)
        await until(lambda: link.ends.get("gateway"))
        assert isinstance(link.ends["gateway"], ChecksumError)


async def test_frame_above_the_limit_ends_the_link(tls: tuple[Contexts, Contexts]) -> None:
    async with linked(*tls) as link:
        link.node._writer.write(b"\x01\x00\x00\x00\xff\xff\xff\x7f" + bytes(32))
        await until(lambda: link.ends.get("gateway"))
        assert isinstance(link.ends["gateway"], OutOfRangeError)


async def test_unknown_channel_does_no_harm(tls: tuple[Contexts, Contexts]) -> None:
    async with linked(*tls) as link:
        for port in range(1000, 1200):
            link.node._writer.write(encode_frame(port, b"?"))
        await opened(link, 4)


async def test_while_provisioning_there_are_no_secure_channels() -> None:
    async with linked({}, {}, provisioning=True) as link:
        await opened(link, 1)
        with pytest.raises(NotSupportedError, match="does not serve channel 4"):
            await link.node.connect(4)


async def test_peer_of_the_older_kind_is_refused_where_only_ours_are_wanted() -> None:
    reader, writer, _, peer = await stream_pair()
    settings = LinkSettings(role="gateway", ports=Ports(), profile="v5", provisioning=True)
    connection = Connection(reader, writer, settings, {}, peer="old")
    peer.write(encode_frame(3, b"\x02\x00\x00\x00\x5a\x00"))

    async def never(_: Connection) -> None:
        raise AssertionError

    with pytest.raises(NotSupportedError, match="old began with channel 3"):
        await connection.run(never)
    peer.close()


async def test_peer_that_asks_without_reading_is_cut_off(tls: tuple[Contexts, Contexts]) -> None:
    async with linked(*tls) as link:
        link.node._writer.transport.pause_reading()
        ping = encode_frame(CONTROL, b"\x04\x00\x00\x00\x12\x02\x08\x01")

        async def flood() -> None:
            while "gateway" not in link.ends:
                link.node._writer.write(ping * 1000)
                await link.node._writer.drain()

        with pytest.raises((OSError, TimeoutError)):
            async with asyncio.timeout(20):
                await flood()
        await until(lambda: link.ends.get("gateway"))
        assert "does not read" in str(link.ends["gateway"])


async def test_gateway_without_certificate_tells_the_node(tmp_path: Path) -> None:
    ca = TestCa()
    node_tls = contexts("node", ca.identity(tmp_path, "node"))
    gateway_tls = dict(contexts("gateway", ca.identity(tmp_path, "main")))
    gateway_tls[PORTS.cm_secure] = lambda: TestCa().identity(tmp_path / "absent", "none").ssl_server_context()
    (tmp_path / "absent").mkdir()
    async with linked(gateway_tls, node_tls) as link:
        with pytest.raises(ChannelClosedError, match="TLS failed"):
            stream = await link.node.connect(4)
            await stream.receive()
