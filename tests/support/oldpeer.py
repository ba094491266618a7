"""A node of the older kind at a gateway, as strict as the Zephyr application (mp-wire §3, §7, §8).

It reads one frame at a time, one TLS record per frame, a message with a single read of TLS, speaks TLS 1.2 only, and
takes it ill when anything comes on a channel that it does not have.
"""

import asyncio
import contextlib
import hashlib
import ssl
import struct
from collections.abc import AsyncIterator

from aoscore.common.tls import TlsIdentity
from aoscore.mp.communication.frames import encode_frame, encode_message

MAX_PAYLOAD = 66_560
_HEADER = struct.Struct("<II32s")


class OldPeer:
    """One connection. `failure` says what the gateway did wrong, if anything."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.payloads: dict[int, asyncio.Queue[bytes]] = {port: asyncio.Queue() for port in (1, 2, 3, 4)}
        self.failure = ""
        self.is_over = asyncio.Event()

    async def read(self) -> None:
        """Take frames until the gateway closes."""
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                port, size, checksum = _HEADER.unpack(await self.reader.readexactly(_HEADER.size))
                payload = await self.reader.readexactly(size)
                if size > MAX_PAYLOAD or port not in self.payloads or hashlib.sha256(payload).digest() != checksum:
                    self.failure = f"frame of {size} bytes on channel {port}"
                else:
                    self.payloads[port].put_nowait(payload)
        self.is_over.set()

    def send(self, port: int, message: bytes) -> None:
        """A message on an open channel."""
        self.writer.write(encode_frame(port, encode_message(message)))

    async def receive(self, port: int) -> bytes:
        """A message of an open channel: one frame."""
        async with asyncio.timeout(30):
            payload = await self.payloads[port].get()
        (length,) = struct.unpack_from("<I", payload)
        assert length == len(payload) - 4, "a message in another form than one frame"
        return payload[4:]

    async def secure(self, port: int, identity: TlsIdentity, *, version: ssl.TLSVersion) -> "OldChannel":
        """Open a secure channel."""
        context = identity.ssl_client_context(check_hostname=False)
        context.maximum_version = version
        if version == ssl.TLSVersion.TLSv1_2:
            context.set_ciphers("ECDHE-ECDSA-AES128-CCM:AES128-CCM")
        channel = OldChannel(self, port, context)
        async with asyncio.timeout(30):
            await channel.handshake()
        return channel


class OldChannel:
    """TLS in frames."""

    def __init__(self, peer: OldPeer, port: int, context: ssl.SSLContext) -> None:
        self.peer = peer
        self.port = port
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing)

    def _flush(self) -> None:
        rest = self.outgoing.read()
        while rest:
            size = 5 + int.from_bytes(rest[3:5], "big")
            self.peer.writer.write(encode_frame(self.port, rest[:size]))
            rest = rest[size:]

    async def _feed(self) -> None:
        payload = await self.peer.payloads[self.port].get()
        assert len(payload) == 5 + int.from_bytes(payload[3:5], "big"), "a frame is not one record"
        self.incoming.write(payload)

    async def handshake(self) -> None:
        """Until TLS is up."""
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                await self._feed()
        self._flush()

    def send(self, message: bytes) -> None:
        """A message."""
        self.tls.write(encode_message(message))
        self._flush()

    async def receive(self) -> bytes:
        """A message; b"" when the gateway has ended the channel. A short read of the body is damage."""
        async with asyncio.timeout(30):
            while True:
                try:
                    head = self.tls.read(4)
                    break
                except ssl.SSLWantReadError:
                    await self._feed()
                except ssl.SSLZeroReturnError:
                    return b""
        if not head:
            return b""
        (length,) = struct.unpack("<I", head)
        body = self.tls.read(length)
        assert len(body) == length, "a message is more than one record"
        return body


@contextlib.asynccontextmanager
async def old_peer(port: int) -> AsyncIterator[OldPeer]:
    """Connected for the length of the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    peer = OldPeer(reader, writer)
    reading = asyncio.create_task(peer.read())
    try:
        yield peer
        assert not peer.failure, peer.failure
    finally:
        reading.cancel()
        writer.transport.abort()
