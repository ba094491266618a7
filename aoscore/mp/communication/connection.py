"""One link at work: a byte stream below, channels above. The thin shell around frames, channels and control.

One task reads, one writes, one looks at the clock. What is done with the channels is the business of the `serve` that
`run` is given: it opens channels with `connect` or takes those that the peer opens with `accept`, and gets a Stream.
"""

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import msgspec

import aoscore
from aoscore._pb.transport.v1 import transport_pb2 as pb
from aoscore.common.aio import Broadcast, comes_within
from aoscore.common.errors import (
    ChecksumError,
    DeadlineError,
    FailedError,
    NotSupportedError,
    OutOfMemoryError,
    first_cause,
)
from aoscore.common.log import kv
from aoscore.common.tls import TlsIdentity
from aoscore.mp.communication.channelcore import (
    ChannelCore,
    Closed,
    Event,
    OpenChannel,
    Opened,
    Ready,
    Received,
    SecureChannel,
    State,
)
from aoscore.mp.communication.connector import READ_BYTES, Reader
from aoscore.mp.communication.control import SILENCE_LIMIT_S, Control, Role
from aoscore.mp.communication.frames import (
    MAX_OPEN_MESSAGE_BYTES,
    Bytes,
    FrameDecoder,
    MessageDecoder,
    encode_frame,
    encode_message,
)
from aoscore.mp.communication.ports import CONTROL, PROXY, RPC, Ports
from aoscore.mp.communication.scheduler import Scheduler

_log = logging.getLogger(__name__)

_TICK_S = 1.0
_OPEN_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 5.0
_FLUSH_TIMEOUT_S = 5.0
_BYE_TIMEOUT_S = 1.0
_MAX_BAD_FRAMES = 3
# Answers to what the peer sends on the control channel: a peer that asks without end and never reads is cut off.
_CONTROL_LIMIT_BYTES = 64 * 1024
# What goes to the link in one go: each go costs as much as the bytes of some frames. Little of a download waits here,
# so that what is more urgent does not wait behind it in the kernel either: more only while the link takes it at once.
_LEAST_QUANTUM_BYTES = 64 * 1024
MOST_QUANTUM_BYTES = 256 * 1024
_AT_ONCE_S = 0.005


Contexts = Mapping[int, Callable[[], ssl.SSLContext]]
"""TLS settings of a connection that begins now, by secure channel; may raise AosError without a certificate."""


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait for their end; their errors are not looked at."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def until_one_ends(*works: Coroutine[Any, Any, None]) -> None:
    """Run all; when one ends, by success or failure, end the others. Raises the error of the one.

    Not a task group: before Python 3.13 one that fails while it is cancelled hides the cancellation, and the loops that
    relay one use of a channel after the other would go on for ever.
    """
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end_tasks(tasks)
    for task in tasks:
        if task in done:
            task.result()


class ChannelClosedError(FailedError):
    """The channel, or the link below it, is closed."""


class Counters(msgspec.Struct):
    """What became of a link so far.

    Frames and their bytes; frames that were damaged or of no known channel; messages that were not allowed; uses of
    channels that began and ended; bytes of downloads.
    """

    frames_in: int = 0
    frames_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    damaged: int = 0
    unknown: int = 0
    refused: int = 0
    opened: int = 0
    closed: int = 0
    download_bytes: int = 0


class LinkSettings(msgspec.Struct, frozen=True):
    """What is the same for all links of a process.

    `profile`, of a gateway: whether peers are of our kind, of the older one, or show what they are (mp-wire §9).
    """

    role: Role
    ports: Ports
    profile: Literal["auto", "v5", "legacy"] = "auto"
    provisioning: bool = False
    max_message_bytes: int = 16 * 1024 * 1024
    channel_buffer_bytes: int = 1024 * 1024

    @property
    def served(self) -> tuple[int, ...]:
        """Channels of a link."""
        return self.ports.served(provisioning=self.provisioning)


class Stream:
    """One use of a channel, from opening to closing. Use as an async context manager: leaving closes it."""

    def __init__(self, connection: "Connection", slot: "_Slot") -> None:
        self._connection = connection
        self._slot = slot
        self._messages: deque[Bytes] = deque()
        self._bytes = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._is_open = asyncio.Event()
        self._reason: str | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        await self.close(str(first_cause(error)) if isinstance(error, Exception) else "done")

    @property
    def port(self) -> int:
        """Number of the channel."""
        return self._slot.core.port

    @property
    def is_closed(self) -> bool:
        """Nothing can be sent any more."""
        return self._reason is not None

    @property
    def quantum_bytes(self) -> int:
        """How much of a download to send in one go at present."""
        return self._connection.quantum_bytes

    async def receive(self) -> bytes:
        """The next message. Raises ChannelClosedError after the last one."""
        await self._some()
        message = self._messages.popleft()
        self._bytes -= len(message)
        if self._bytes <= self._connection.settings.channel_buffer_bytes:
            self._room.set()
        return bytes(message)

    async def receive_all(self) -> list[Bytes]:
        """The next message and all that came behind it. Raises ChannelClosedError after the last one."""
        await self._some()
        messages = [*self._messages]
        self._messages.clear()
        self._bytes = 0
        self._room.set()
        return messages

    async def _some(self) -> None:
        while not self._messages:
            if self._reason is not None:
                raise ChannelClosedError(self._reason)
            self._news.clear()
            await self._news.wait()

    async def send(self, *messages: bytes) -> None:
        """Queue messages, waiting for room. Raises ChannelClosedError, InvalidArgumentError for one too large."""
        await self._has_room()
        self._slot.core.send(*messages)

    async def send_encoded(self, messages: bytes) -> None:
        """The same for messages that have their lengths before them already."""
        await self._has_room()
        self._slot.core.send_encoded(messages)

    async def _has_room(self) -> None:
        bulk = self.port == PROXY
        await self._drained(self.quantum_bytes if bulk else self._connection.settings.channel_buffer_bytes)
        if self._reason is not None:
            raise ChannelClosedError(self._reason)

    def send_soon(self, message: bytes) -> None:
        """Queue a small message without waiting; nothing happens on a closed channel."""
        if self._reason is None:
            self._slot.core.send(message)

    async def _drained(self, limit_bytes: int) -> None:
        while self._reason is None and self._connection.pending_bytes(self.port) > limit_bytes:
            self._slot.sent.clear()
            await self._slot.sent.wait()

    async def close(self, reason: str) -> None:
        """Send what is queued, as far as the link takes it, and close. Safe to call twice."""
        try:
            async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                await self._drained(0)
        except TimeoutError:
            _log.warning("Channel is closed with messages unsent: port=%d", self.port)
        finally:
            self.abort(reason)

    def abort(self, reason: str) -> None:
        """Close at once."""
        if self._reason is None:
            self._connection.close_channel(self._slot, reason)
            # Nobody is going to read what is left, and the link must not wait for it.
            self._messages.clear()
            self.on_closed(reason)

    # Of the connection

    def on_open(self) -> None:
        """The channel is open."""
        self._is_open.set()

    async def opened(self) -> None:
        """Wait until the channel is open. Raises ChannelClosedError when it does not become so."""
        if not await comes_within(self._is_open, _OPEN_TIMEOUT_S):
            self.abort("no answer")
        if self._reason is not None:
            raise ChannelClosedError(self._reason)

    async def on_messages(self, messages: Sequence[Bytes]) -> None:
        """Take messages; waits while the reader is far behind, and with it the whole link (mp-wire §3)."""
        if self._reason is not None:
            return
        self._messages += messages
        self._bytes += sum(map(len, messages))
        self._news.set()
        if self._bytes > self._connection.settings.channel_buffer_bytes:
            self._room.clear()
            await self._room.wait()

    def on_closed(self, reason: str) -> None:
        """The channel is closed."""
        if self._reason is None:
            self._reason = reason
        for event in (self._news, self._room, self._is_open, self._slot.sent):
            event.set()


class _Slot:
    """A channel and its present use."""

    def __init__(self, core: ChannelCore) -> None:
        self.core = core
        self.stream: Stream | None = None
        self.accepted: asyncio.Queue[Stream] = asyncio.Queue()
        self.idle = asyncio.Event()
        self.idle.set()
        self.sent = asyncio.Event()
        self.lock = asyncio.Lock()
        self.since_s = 0.0
        """When the channel began to open or to close."""


class Connection:
    """See the module text. `contexts` gives the TLS settings of each secure channel; `peer` names the other end."""

    def __init__(
        self,
        reader: Reader,
        writer: asyncio.StreamWriter,
        settings: LinkSettings,
        contexts: Contexts,
        *,
        peer: str,
    ) -> None:
        self.settings = settings
        self.peer = peer
        self.node_id = ""
        """The node at the other end (gateway); `node_known` is set with it."""
        self.node_known = asyncio.Event()
        self.is_legacy = False
        """The peer is of the older kind: no control channel, no calls, no downloads."""
        self.certificates: dict[int, bytes] = {}
        """The peer's certificate (DER) on each secure channel that was opened last."""
        self.counters = Counters()
        self.quantum_bytes = _LEAST_QUANTUM_BYTES
        """What goes to the link in one go at present."""
        self._reader = reader
        self._writer = writer
        self._scheduler = Scheduler(settings.ports.order)
        self._filled = asyncio.Event()
        self._wrote = asyncio.Event()
        self._introduced = asyncio.Event()
        self._shut_reason = ""
        self._is_over = False
        self._decoder = FrameDecoder()
        self._heard_s = self._now()
        self._is_reading = True
        self._unknown: set[int] = set()
        self._control_messages = MessageDecoder(MAX_OPEN_MESSAGE_BYTES)
        self._control = Control(
            settings.role,
            software=f"aoscore {aoscore.__version__}",
            ports=settings.served,
            max_message_bytes=settings.max_message_bytes,
            now_s=self._now(),
            send=self._send_control,
            on_reset=self._on_reset,
        )
        accepts = settings.role == "gateway"
        self._slots: dict[int, _Slot] = {}
        for port in settings.served:
            if port == CONTROL:
                continue
            if port in settings.ports.secure:
                limit = settings.max_message_bytes
                core: ChannelCore = SecureChannel(
                    port, self, accepts=accepts, limit_bytes=limit, context=contexts[port]
                )
            else:
                core = OpenChannel(port, self, accepts=accepts)
            self._slots[port] = _Slot(core)

    # For those who use the link

    async def run(self, serve: Callable[["Connection"], Awaitable[None]]) -> None:
        """Keep the link up and serve it until either ends; says good-bye when it is we who end it.

        Raises AosError or OSError when the link breaks.
        """
        if self.settings.profile == "legacy":
            self._be_legacy()
        self._control.begin()
        jobs = [asyncio.create_task(job()) for job in (self._read, self._write, self._watch)]
        for job in jobs:
            job.add_done_callback(_look_at_error)
        served = asyncio.create_task(self._served(serve))
        ended: list[asyncio.Task[None]] = []
        try:
            await asyncio.wait((*jobs, served), return_when=asyncio.FIRST_COMPLETED)
            ended = [task for task in (*jobs, served) if task.done()]
        finally:
            is_up = not any(job.done() for job in jobs)
            if not is_up:
                self._close_streams()
            # Otherwise with the link still at work: what the relays have queued gets through.
            await end_tasks([served])
            if is_up:
                await self._say_bye()
            await end_tasks(jobs)
            self._close_streams()
            self._writer.transport.abort()
        for task in ended:
            task.result()

    def _close_streams(self) -> None:
        self._is_over = True
        for slot in self._slots.values():
            slot.idle.set()  # whoever waits for it shall see that there is nothing to wait for
            if slot.stream is not None:
                slot.stream.on_closed(self._down)

    @property
    def _down(self) -> str:
        return f"the link to {self.peer} is down"

    async def _served(self, serve: Callable[["Connection"], Awaitable[None]]) -> None:
        await self._introduced.wait()
        _log.info(kv("Link is up", peer=self.peer, software=self._software))
        await serve(self)

    @property
    def _software(self) -> str:
        return self._control.peer.software if self._control.peer else "of the older kind"

    def _be_legacy(self) -> None:
        self.is_legacy = True
        for port in (PROXY, RPC):
            self._slots.pop(port, None)
        for slot in self._slots.values():
            slot.core.be_legacy()
        self._introduced.set()

    async def connect(self, port: int) -> Stream:
        """Open a channel, first waiting for the end of its last use. Raises ChannelClosedError, NotSupportedError."""
        slot = self._slots.get(port)
        peer = self._control.peer
        if slot is None or peer is None or port not in peer.ports:
            raise NotSupportedError(f"{self.peer} does not serve channel {port}")
        async with slot.lock:
            if not await comes_within(slot.idle, _OPEN_TIMEOUT_S):
                raise DeadlineError(f"channel {port} is in use")
            if self._is_over:
                raise ChannelClosedError(self._down)
            stream = slot.stream = Stream(self, slot)
            slot.idle.clear()
            try:
                self._apply_now(slot, slot.core.connect())
                await stream.opened()
            except BaseException:
                stream.abort("not needed any more")
                raise
            return stream

    async def accept(self, port: int) -> Stream:
        """The next use of a channel that the peer begins."""
        while True:
            stream = await self._slots[port].accepted.get()
            if not stream.is_closed:
                return stream

    def shut(self, reason: str) -> None:
        """Give up the whole link."""
        self._shut_reason = self._shut_reason or reason
        self._writer.transport.abort()

    def restart(self, port: int, reason: str) -> None:
        """Close a channel, so that its users open it anew."""
        slot = self._slots.get(port)
        if slot is not None and slot.stream is not None:
            slot.stream.abort(reason)

    # For the streams

    @property
    def queued_bytes(self) -> int:
        """What waits to be sent on all channels."""
        return sum(map(self._scheduler.pending_bytes, self.settings.ports.order))

    @property
    def unexpected(self) -> int:
        """Frames that belonged to no open use of their channel."""
        return sum(slot.core.passed_over for slot in self._slots.values())

    def pending_bytes(self, port: int) -> int:
        """What waits to be sent on a channel."""
        return self._scheduler.pending_bytes(port)

    def close_channel(self, slot: _Slot, reason: str) -> None:
        """Close whatever use the channel has."""
        self._apply_now(slot, slot.core.close(reason))

    # For the channels: channelcore.Wire

    def push(self, port: int, frames: bytes, count: int) -> None:
        """Queue frames of one channel, `count` of them."""
        self._scheduler.push(port, frames, count)
        self._filled.set()

    def drop(self, port: int) -> None:
        """Forget what is queued of a channel."""
        self._scheduler.drop(port)
        self._slots[port].sent.set()

    def reset(self, port: int, reason: str, *, answer: bool) -> None:
        """Send a Reset."""
        self._control.reset(port, reason, answer=answer)

    # Inside

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def _send_control(self, message: pb.Control) -> None:
        if self._scheduler.pending_bytes(CONTROL) > _CONTROL_LIMIT_BYTES:
            raise OutOfMemoryError(f"{self.peer} does not read what it asks for")
        self.push(CONTROL, encode_frame(CONTROL, encode_message(message.SerializeToString())), 1)

    async def _say_bye(self) -> None:
        if self._control.is_over or self.is_legacy:
            return
        self._control.bye("stopping")
        try:
            async with asyncio.timeout(_BYE_TIMEOUT_S):
                while self._scheduler.pending_bytes(CONTROL):
                    self._wrote.clear()
                    await self._wrote.wait()
                await self._writer.drain()
                if self._writer.can_write_eof():
                    self._writer.write_eof()
        except (TimeoutError, OSError):
            _log.debug("Good-bye did not get through: peer=%s", self.peer)

    async def _read(self) -> None:
        decoder = self._decoder
        while data := await self._reader.read(READ_BYTES):
            self.counters.bytes_in += len(data)
            self._heard_s = self._now()
            self._control.on_bytes(self._heard_s)
            self._is_reading = False
            for port, payloads in decoder.feed(data):
                await self._on_frames(port, payloads)
            self._is_reading = True
        raise FailedError(self._shut_reason or "the peer closed the link")

    async def _write(self) -> None:
        while True:
            bursts: list[bytes] = []
            size = 0
            ports = set()
            while size < self.quantum_bytes and (burst := self._scheduler.pop()):
                bursts.append(burst.frames)
                size += len(burst.frames)
                ports.add(burst.port)
                self.counters.frames_out += burst.number
                if burst.port == PROXY:
                    self.counters.download_bytes += len(burst.frames)
            if not bursts:
                self._filled.clear()
                await self._filled.wait()
                continue
            for port in ports & self._slots.keys():
                self._slots[port].sent.set()
            self.counters.bytes_out += size
            # As a rule there is one, which costs no copy. After writelines() some Pythons (3.12, 3.13) never pause.
            self._writer.write(b"".join(bursts))
            self._wrote.set()
            began_s = self._now()
            await self._writer.drain()
            if self._now() - began_s > _AT_ONCE_S:
                self.quantum_bytes = max(self.quantum_bytes // 2, _LEAST_QUANTUM_BYTES)
            elif size >= self.quantum_bytes:
                self.quantum_bytes = min(self.quantum_bytes * 2, MOST_QUANTUM_BYTES)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = self._now()
            if not self._is_reading:
                # It is we who do not listen: that the peer is not heard says nothing about it.
                self._control.on_bytes(now_s)
            if not self.is_legacy:
                self._control.tick(now_s)
            elif self._is_reading and self._decoder.begun_bytes and now_s - self._heard_s > SILENCE_LIMIT_S:
                # A vchan that a node attaches to again may hold the rest of a frame of before (vchan.md §2).
                raise DeadlineError(f"half a frame, and nothing more for {SILENCE_LIMIT_S:g} s")
            for slot in self._slots.values():
                waited_s = now_s - slot.since_s
                if slot.core.state is State.OPENING and waited_s > _OPEN_TIMEOUT_S:
                    self._apply_now(slot, slot.core.close("TLS took too long"))
                elif slot.core.state is State.CLOSING and waited_s > _ANSWER_TIMEOUT_S:
                    self._apply_now(slot, slot.core.on_no_more())

    async def _on_frames(self, port: int, payloads: Sequence[Bytes]) -> None:
        """Frames of one channel that came one after the other; no payload stands for a damaged frame."""
        self.counters.frames_in += len(payloads) or 1
        slot = self._slots.get(port)
        if not payloads:
            self._on_bad_frame(port, slot)
            return
        if self._control.peer is None and not self.is_legacy and port != CONTROL:
            if self.settings.role == "node" or self.settings.profile == "v5":
                raise NotSupportedError(f"{self.peer} began with channel {port} and did not introduce itself")
            self._be_legacy()
            slot = self._slots.get(port)
        if port == CONTROL and not self.is_legacy:
            for payload in payloads:
                for message in self._control_messages.feed(payload):
                    self._control.receive(bytes(message))
            if self._control.peer is not None:
                self._introduced.set()
        elif slot is None:
            self.counters.unknown += len(payloads)
            if port not in self._unknown and len(self._unknown) < 64:
                self._unknown.add(port)
                _log.warning(kv("Frames for an unknown channel are dropped", peer=self.peer, port=port))
        else:
            if port == PROXY:
                self.counters.download_bytes += sum(map(len, payloads))
            before = slot.core.state
            for event in slot.core.feed(*payloads):
                self._note_time(slot, before)
                await self._apply(slot, event)
            self._note_time(slot, before)

    def _on_bad_frame(self, port: int, slot: _Slot | None) -> None:
        count = self.counters.damaged = self.counters.damaged + 1
        _log.warning(kv("Frame is damaged", peer=self.peer, port=port, count=count))
        if count >= _MAX_BAD_FRAMES or not self._introduced.is_set():
            raise ChecksumError(f"{count} damaged frames from {self.peer}")
        if slot is not None:
            self._apply_now(slot, slot.core.close("a frame was damaged"))

    def _on_reset(self, port: int, reason: str, is_answer: bool) -> None:
        if slot := self._slots.get(port):
            self._apply_now(slot, slot.core.on_reset(reason or "closed by the peer", is_answer=is_answer))

    def _note_time(self, slot: _Slot, before: State) -> None:
        if slot.core.state is not before:
            slot.since_s = self._now()

    async def _apply(self, slot: _Slot, event: Event) -> None:
        if isinstance(event, Received):
            if slot.stream is not None:
                await slot.stream.on_messages(event.messages)
            return
        self._apply_one(slot, event)

    def _apply_now(self, slot: _Slot, events: Iterator[Event]) -> None:
        """Take events that bring no messages."""
        before = slot.core.state
        for event in events:
            self._apply_one(slot, event)
        self._note_time(slot, before)

    def _apply_one(self, slot: _Slot, event: Event) -> None:
        match event:
            case Opened():
                self.counters.opened += 1
                _log.debug(kv("Channel is open", peer=self.peer, port=slot.core.port))
                if isinstance(slot.core, SecureChannel):
                    self.certificates[slot.core.port] = slot.core.peer_der
                if slot.core.accepts:
                    slot.stream = Stream(self, slot)
                    slot.idle.clear()
                    while not slot.accepted.empty():
                        slot.accepted.get_nowait()  # a use that was over before anybody looked
                    slot.accepted.put_nowait(slot.stream)
                if slot.stream is not None:
                    slot.stream.on_open()
            case Closed(reason):
                self.counters.closed += 1
                _log.info(kv("Channel is closed", peer=self.peer, port=slot.core.port, reason=reason))
                if slot.stream is not None:
                    slot.stream.on_closed(reason)
                    slot.stream = None
            case Ready():
                slot.idle.set()


def _look_at_error(task: asyncio.Task[None]) -> None:
    """Also when we are cancelled while the link breaks, its error counts as seen."""
    if not task.cancelled():
        task.exception()


async def restart_on_renewal(connection: Connection, changed: Broadcast[TlsIdentity], ports: Sequence[int]) -> None:
    """Close the channels that use a certificate when there is a new one: they open anew with it (mp.md §11)."""
    with changed.subscribe() as renewals:
        while True:
            await renewals.get()
            for port in ports:
                connection.restart(port, "the certificate was renewed")
