"""Links over Xen vchan: the gateway offers one to each node, a node attaches to it (vchan.md §2).

Two vchans make a link, one per direction, named from the gateway's view: it reads `rx` and writes `tx`. The gateway
makes both anew for every link, so that nothing of an older one is ever read.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import msgspec

from aoscore.common.aio import Worker
from aoscore.common.errors import DeadlineError, FailedError, NotSupportedError
from aoscore.common.log import kv
from aoscore.mp.communication.connector import Streams
from aoscore.mp.communication.control import Role
from aoscore.mp.communication.sockets import STREAM_LIMIT_BYTES, WRITE_BUFFER_BYTES

_log = logging.getLogger(__name__)

_EVENT_DEVICE = Path("/dev/xen/evtchn")
_READ_BYTES = 64 * 1024
# In one go; then others get their turn.
_QUANTUM_BYTES = 4 * _READ_BYTES
_OTHER_HALF_S = 10.0
_LOOK_AT_NAME_S = 5.0
_BY_NAME = "name:"
_BY_KEY = "key:"


class Ring(Protocol):
    """One vchan; see `_speedups/_vchan.pyi`."""

    def fileno(self) -> int: ...
    def wait(self) -> None: ...
    @property
    def has_peer(self) -> bool: ...
    @property
    def is_over(self) -> bool: ...
    def read(self, size: int) -> bytes | None: ...
    def write(self, data: memoryview) -> int: ...
    def close(self) -> None: ...


class Peer(msgspec.Struct, frozen=True):
    """The other end of a link, and where the link's two vchans are announced in xenstore.

    `domain` is a number, `name:GUEST` where all guests can be looked up, or `key:PATH` for a key of xenstore that has
    the number. Guests get a new one with every start.
    """

    domain: int | str
    rx_path: str
    tx_path: str
    ring_bytes: int

    @property
    def label(self) -> str:
        """For messages."""
        return f"domain {self.domain}"


def is_built() -> bool:
    """Whether the binding of libxenvchan is there."""
    return find_spec("aoscore._speedups._vchan") is not None


def is_there() -> bool:
    """Whether this machine can have vchans."""
    return is_built() and _EVENT_DEVICE.exists()


class VchanLink:
    """Makes the link to one peer; `worker` has the round trips to xenstore."""

    def __init__(self, role: Role, peer: Peer, worker: Worker) -> None:
        if not is_built():
            raise NotSupportedError("vchan is not built: libxenvchan was not there when aoscore was")
        self._role = role
        self._peer = peer
        self._worker = worker

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Streams]:
        """A link for the length of the block. A gateway waits for its node as long as it takes.

        Raises FailedError, DeadlineError, and OSError of Xen.
        """
        rings: list[Ring] = []
        transport = None
        try:
            domain = await self._worker.run(self._resolve)
            rx, tx = await self._worker.run(partial(self._open, domain, rings))
            if self._role == "gateway":
                await self._wait_for_node(rx, tx, domain)
            elif not (rx.has_peer and tx.has_peer):
                raise FailedError(f"the vchans of {self._peer.label} are those of a process that is gone")
            transport, streams = open_streams(rx, tx)
            yield streams
        finally:
            if transport is not None:
                transport.abort()
            await self._worker.run(partial(_close, rings))

    def _resolve(self) -> int:
        domain = self._peer.domain
        if isinstance(domain, int):
            return domain
        from aoscore._speedups._vchan import xenstore_list, xenstore_read

        if domain.startswith(_BY_KEY):
            value = xenstore_read(domain.removeprefix(_BY_KEY))
            if value is None or not value.isdecimal():
                raise FailedError(f"xenstore has no domain number under {domain.removeprefix(_BY_KEY)!r}")
            return int(value)
        wanted = domain.removeprefix(_BY_NAME)
        for number in xenstore_list("/local/domain"):
            if xenstore_read(f"/local/domain/{number}/name") == wanted:
                return int(number)
        raise FailedError(f"there is no guest {wanted!r}")

    def _open(self, domain: int, rings: list[Ring]) -> tuple[Ring, Ring]:
        """Our reading and our writing vchan; both are in `rings`, one is also when the other fails."""
        from aoscore._speedups._vchan import Vchan

        peer = self._peer
        if self._role == "gateway":
            rings.append(Vchan.serve(domain, peer.rx_path, read_bytes=peer.ring_bytes, write_bytes=0))
            rings.append(Vchan.serve(domain, peer.tx_path, read_bytes=0, write_bytes=peer.ring_bytes))
            _log.info(kv("Waiting for node", peer=peer.label, domain=domain, path=peer.rx_path))
        else:
            for path in (peer.tx_path, peer.rx_path):
                rings.append(Vchan.connect(domain, path if path.startswith("/") else f"/local/domain/{domain}/{path}"))
        rx, tx = rings
        return rx, tx

    async def _wait_for_node(self, rx: Ring, tx: Ring, domain: int) -> None:
        news = asyncio.Event()
        with _events(rx, news.set), _events(tx, news.set):
            first_s: float | None = None
            loop = asyncio.get_running_loop()
            while not (rx.has_peer and tx.has_peer):
                if rx.is_over or tx.is_over:
                    raise FailedError("the node attached and went away")
                if rx.has_peer or tx.has_peer:
                    first_s = first_s or loop.time()
                    if loop.time() - first_s > _OTHER_HALF_S:
                        raise DeadlineError(f"the node attached to one of its two vchans for {_OTHER_HALF_S:g} s")
                news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_AT_NAME_S):
                        await news.wait()
                        continue
                if isinstance(self._peer.domain, str) and await self._worker.run(self._resolve) != domain:
                    raise FailedError(f"{self._peer.label} was started anew and is another domain now")


def _close(rings: list[Ring]) -> None:
    for ring in rings:
        ring.close()


@contextlib.contextmanager
def _events(ring: Ring, tell: Callable[[], None]) -> Any:
    """Call `tell` on every event of a vchan for the length of the block."""

    def take() -> None:
        ring.wait()
        tell()

    loop = asyncio.get_running_loop()
    loop.add_reader(ring.fileno(), take)
    try:
        yield
    finally:
        loop.remove_reader(ring.fileno())


def open_streams(rx: Ring, tx: Ring) -> tuple["VchanTransport", Streams]:
    """Streams over two connected vchans, which stay the caller's."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=STREAM_LIMIT_BYTES)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport = VchanTransport(rx, tx, protocol)
    return transport, (reader, asyncio.StreamWriter(transport, protocol, reader, loop))


class VchanTransport(asyncio.Transport):
    """Two vchans as a transport of asyncio. Its end leaves them open: their owner closes them."""

    def __init__(self, rx: Ring, tx: Ring, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._rx = rx
        self._tx = tx
        self._protocol = protocol
        self._waiting: deque[memoryview] = deque()
        self._waiting_bytes = 0
        self._is_reading = True
        self._is_writing_paused = False
        self._is_closing = False
        protocol.connection_made(self)
        self._loop.add_reader(rx.fileno(), self._on_event, rx)
        self._loop.add_reader(tx.fileno(), self._on_event, tx)
        # The first event may have been taken before we were here.
        self._loop.call_soon(self._read)

    # Of asyncio.Transport

    def is_closing(self) -> bool:
        return self._is_closing

    def pause_reading(self) -> None:
        self._is_reading = False

    def resume_reading(self) -> None:
        if not self._is_reading and not self._is_closing:
            self._is_reading = True
            self._loop.call_soon(self._read)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._is_closing or not data:
            return
        self._waiting.append(memoryview(data))
        self._waiting_bytes += len(data)
        if len(self._waiting) == 1:
            self._flush()
        if self._waiting_bytes > WRITE_BUFFER_BYTES and not self._is_writing_paused:
            self._is_writing_paused = True
            self._protocol.pause_writing()

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return self._waiting_bytes

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        self._end(None)

    # Inside

    def _on_event(self, ring: Ring) -> None:
        try:
            ring.wait()
        except OSError as error:
            self._end(error)
            return
        self._flush()
        self._read()

    def _read(self) -> None:
        if self._is_closing or not self._is_reading:
            return
        count = 0
        while self._is_reading and not self._is_closing:
            try:
                data = self._rx.read(_READ_BYTES)
            except OSError as error:
                self._end(error)
                return
            if data is None:
                self._end(None)
                return
            if not data:
                if self._tx.is_over:
                    self._end(None)
                return
            self._protocol.data_received(data)
            count += len(data)
            if count >= _QUANTUM_BYTES:
                self._loop.call_soon(self._read)
                return

    def _flush(self) -> None:
        try:
            while self._waiting and not self._is_closing:
                count = self._tx.write(self._waiting[0])
                if count == 0:
                    break
                self._waiting_bytes -= count
                if count == len(self._waiting[0]):
                    self._waiting.popleft()
                else:
                    self._waiting[0] = self._waiting[0][count:]
        except OSError as error:
            self._end(error)
            return
        if self._is_writing_paused and self._waiting_bytes <= WRITE_BUFFER_BYTES // 4:
            self._is_writing_paused = False
            self._protocol.resume_writing()

    def _end(self, error: OSError | None) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        for ring in (self._rx, self._tx):
            self._loop.remove_reader(ring.fileno())
        self._waiting.clear()
        self._waiting_bytes = 0
        self._loop.call_soon(self._protocol.connection_lost, error)
