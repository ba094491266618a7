"""The link to the cloud: finds it, stays connected, moves messages (cloud-protocol §2, §3).

Decisions are in `discovery` and `session`; here are sockets, timers and tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import ssl
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Final, NamedTuple, Protocol, TypeVar, cast
from urllib.parse import urlsplit

import msgspec

from aoscore.cm.certnotes import CertificateNotes
from aoscore.cm.communication import discovery
from aoscore.cm.communication.discovery import REDIRECT, REPEAT_LATER, Addresses, Answer
from aoscore.cm.communication.envelope import EnvelopeError, Received
from aoscore.cm.communication.inbox import Inbox
from aoscore.cm.communication.messagelog import MessageLog
from aoscore.cm.communication.messages import Message, message_type
from aoscore.cm.communication.outbox import Change, Outbox, StoredMessage
from aoscore.cm.communication.session import LASTING, Session
from aoscore.common.aio import Backoff, Broadcast, Worker, comes_within, log_and_continue
from aoscore.common.certurls import first_der, read_chain_url
from aoscore.common.errors import AosError, DeadlineError, FailedError, WrongStateError
from aoscore.common.http import request
from aoscore.common.log import kv
from aoscore.common.tls import TlsIdentity
from aoscore.common.websocket import UnauthorizedError, WebSocket, connect

_log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
A = TypeVar("A", bound=Message)
Handler = Callable[[M], Awaitable[None]]

DISCOVERY_TIMEOUT_S: Final = 30.0
RECONNECT_FIRST_S: Final = 1.0
RECONNECT_LIMIT_S: Final = 600.0
# A connection that lived this long was no accident: the next trouble begins with short pauses again.
STABLE_AFTER_S: Final = 60.0
MISSED_PONGS: Final = 2
_TOPIC: Final = "cloud"
_TOPIC_QUEUE: Final = 256


class Identities(Protocol):
    """Where the certificate for the cloud comes from."""

    async def online_identity(self) -> TlsIdentity:
        """The present `online` certificate; asked for each TLS session, so that a renewed one is used."""


class LinkSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the link is told by the configuration; times in seconds."""

    discovery_url: str
    override_discovery_url: str = ""
    response_timeout_s: float = 10.0
    ping_period_s: float = 8.0
    reconnect_first_s: float = RECONNECT_FIRST_S
    reconnect_limit_s: float = RECONNECT_LIMIT_S


_Act = Callable[[Received], Awaitable[None]]


class _Topic:
    """Messages that must be handled one after the other, and the task that does."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: asyncio.Queue[tuple[_Act, Received, str]] = asyncio.Queue(_TOPIC_QUEUE)
        """Handler, message, key in the inbox or empty."""

    async def run(self, inbox: Inbox | None) -> None:
        while True:
            handler, received, key = await self.queue.get()
            with log_and_continue(_log, f"Can't handle a message of the cloud ({self.name})"):
                await handler(received)
            if inbox is not None and key:
                with log_and_continue(_log, "Can't forget a message of the cloud, it will be handled again"):
                    await inbox.remove(key)


class _Route(NamedTuple):
    """What happens to messages of one type."""

    act: _Act
    topic: _Topic
    again: _Act | None
    """Acts on one that an earlier process has not finished with; None: those are not kept."""


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine, whose certificate then need not carry that name (§1.1)."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class CloudLink:
    """The Unit's link to its cloud, as a service.

    Handlers are registered before `run`. `send` queues; the messages leave when there is a connection. Messages of one
    topic (by default: of one type) are handled in order, topics independently of each other.
    """

    def __init__(
        self,
        system_id: str,
        settings: LinkSettings,
        identities: Identities,
        worker: Worker,
        *,
        outbox: Outbox | None = None,
        inbox: Inbox | None = None,
        notes: CertificateNotes | None = None,
        message_log: MessageLog | None = None,
        unreadable: Callable[[AosError], None] = lambda _: None,
    ) -> None:
        """`outbox` keeps messages that must arrive, `inbox` those to act on, `notes` what our certificate says.

        `unreadable` is told of frames and messages that cannot be read.
        """
        self._system_id = system_id
        self._settings = settings
        self._identities = identities
        self._worker = worker
        self._outbox = outbox
        self._inbox = inbox
        self._notes = notes
        self._finished: list[str] = []
        self._has_finished = asyncio.Event()
        self._message_log = message_log
        self._unreadable = unreadable
        self._session = Session(system_id, response_timeout_s=settings.response_timeout_s)
        self._addresses = Addresses()
        self._backoff = Backoff(settings.reconnect_first_s, settings.reconnect_limit_s)
        self._routes: dict[type[Message], _Route] = {}
        self._topics: dict[str, _Topic] = {}
        self._waiting: dict[str, asyncio.Future[Message]] = {}
        self._wake = asyncio.Event()
        self._is_connected = asyncio.Event()
        self.connection: Broadcast[bool] = Broadcast("cloud connection")

    # ---- what others use

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._is_connected.is_set()

    async def wait_connected(self) -> None:
        """Returns when there is a connection."""
        await self._is_connected.wait()

    def on(self, kind: type[M], handler: Handler[M], *, topic: str = "", again: Handler[M] | None = None) -> None:
        """Has messages of a type handled; types that share a `topic` are handled in the order of their arrival.

        With `again`, a message is on disk before the cloud has its ack. When the process ends before `handler` does,
        the next one calls `again` with it, without the passwords in it. Raises WrongStateError when the type has a
        handler already.
        """

        def act(handle: Handler[M]) -> _Act:
            async def with_message(received: Received) -> None:
                await handle(cast("M", received.message))

            return with_message

        self._add_route(kind, act(handler), topic, None if again is None else act(again))

    def on_received(self, kind: type[Message], handler: _Act) -> None:
        """Like `on` with `again`, for a handler that wants to know which parts of a message could not be read."""
        self._add_route(kind, handler, "", handler)

    def _add_route(self, kind: type[Message], act: _Act, topic: str, again: _Act | None) -> None:
        if kind in self._routes:
            raise WrongStateError(f"{message_type(kind)} has a handler already")
        name = topic or message_type(kind)
        self._routes[kind] = _Route(act, self._topics.setdefault(name, _Topic(name)), again)

    async def send(self, message: Message, *, also: Change | None = None) -> bool:
        """Queues a message for the cloud (bounds per type: `session.QUEUE_LIMITS`).

        One that must arrive, by its type (`session.LASTING`) or because it comes with `also`, is on disk when this
        returns, and with it what `also` changes in the database. Returns whether it is: what cannot be kept is sent
        nevertheless.
        """
        kind = type(message)
        if self._outbox is None or (kind not in LASTING and also is None):
            self._send(message)
            return False
        txn, frame = self._session.frame(message, created_at=datetime.now(UTC))
        kept = False
        with log_and_continue(_log, f"Can't keep {message_type(kind)} on disk, it is lost if CM ends now"):
            await self._outbox.put(StoredMessage(kind, txn, frame), also)
            kept = True
        self._session.enqueue(kind, txn, frame, now=_now(), is_lasting=True)
        self._note_finished()
        self._wake.set()
        return kept

    async def keep(self, kind: type[Message]) -> None:
        """Puts on disk what still waits of a type (`session.KEPT_AT_TIMES`) of which not every message is kept.

        Raises FailedError, NoSpaceError.
        """
        if self._outbox is not None:
            for txn, frame in self._session.passing(kind):
                # Before it is done: should the ack come meanwhile, its row is removed behind it.
                self._session.set_lasting(txn, True)
                try:
                    await self._outbox.put(StoredMessage(kind, txn, frame))
                except BaseException:
                    self._session.set_lasting(txn, False)
                    raise

    def _note_finished(self) -> None:
        if self._outbox is not None and (finished := self._session.take_finished()):
            self._finished += finished
            self._has_finished.set()

    async def _clear_outbox(self, outbox: Outbox) -> None:
        """Deletes what has arrived, many at a time."""
        backoff = Backoff(1.0, 60.0)
        while True:
            await self._has_finished.wait()
            self._has_finished.clear()
            finished, self._finished = self._finished, []
            try:
                await outbox.remove(finished)
            except AosError as error:
                _log.error("Can't forget messages that the cloud has acknowledged: %s", error)
                self._finished += finished
                await asyncio.sleep(backoff.next())
                self._has_finished.set()
            else:
                backoff.reset()

    def _send(self, message: Message) -> str:
        txn = self._session.send(message, now=_now(), created_at=datetime.now(UTC))
        self._wake.set()
        return txn

    async def request(self, message: Message, answer: type[A]) -> A:
        """Sends a message with a new correlation id and waits for the answer with the same one (§3.6).

        Raises DeadlineError when none comes within the response time-out; the message is then withdrawn.
        """
        correlation_id = str(uuid.uuid4())
        message = msgspec.structs.replace(message, correlation_id=correlation_id)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[correlation_id] = future
        txn = self._send(message)
        try:
            async with asyncio.timeout(self._settings.response_timeout_s):
                received = await future
        except TimeoutError:
            raise DeadlineError(
                f"the cloud did not answer {message_type(message)} within {self._settings.response_timeout_s:g} s"
            ) from None
        finally:
            del self._waiting[correlation_id]
            self._session.withdraw(txn)
        if not isinstance(received, answer):
            raise FailedError(f"the cloud answered {message_type(message)} with {message_type(received)}")
        return received

    # ---- service

    async def run(self, started: Callable[[], None]) -> None:
        """Stays connected until cancelled. Counts as started at once: a Unit works without its cloud."""
        async with asyncio.TaskGroup() as group:
            if self._outbox is not None:
                self._session.restore(await self._outbox.load(), now=_now())
                self._note_finished()
                group.create_task(self._clear_outbox(self._outbox), name="cloud outbox")
            for topic in self._topics.values():
                group.create_task(topic.run(self._inbox), name=f"cloud topic {topic.name}")
            await self._take_up()
            group.create_task(self._stay_connected(), name="cloud connection")
            started()

    async def _take_up(self) -> None:
        """Acts on what an earlier process has not finished with."""
        if self._inbox is None:
            return
        for key, message in await self._inbox.load():
            route = self._routes.get(type(message))
            if route is None or route.again is None:
                await self._inbox.remove(key)
                continue
            _log.info("Message of the cloud is taken up again: type=%s", message_type(message))
            await route.topic.queue.put((route.again, Received("", message), key))

    async def _stay_connected(self) -> None:
        while True:
            began = _now()
            worked = False
            try:
                async with self._open() as socket:
                    worked = True
                    began = _now()
                    await self._exchange(socket)
                    _log.info("The cloud closed the connection")
            except AosError as error:
                _log.error("%s: %s", "Cloud connection lost" if worked else "Can't connect to the cloud", error)
            if worked and _now() - began >= STABLE_AFTER_S:
                self._backoff.reset()
                continue
            pause_s = self._backoff.next()
            _log.info(kv("Next attempt to connect to the cloud", pause_s=round(pause_s, 1)))
            await asyncio.sleep(pause_s)

    # ---- one connection

    async def _ssl_context(self, url: str, identity: TlsIdentity | None) -> ssl.SSLContext | None:
        if urlsplit(url).scheme not in ("https", "wss"):
            return None
        if identity is None:
            raise FailedError(f"{url} needs our certificate, there is none")
        return await self._worker.run(identity.ssl_client_context, check_hostname=not is_loopback(url))

    async def _identity(self) -> TlsIdentity | None:
        """Our certificate; None when it cannot be had, which plain test set-ups can live with."""
        try:
            return await self._identities.online_identity()
        except AosError as error:
            _log.warning("No certificate for the cloud: %s", error)
            return None

    async def _ask(self, url: str, identity: TlsIdentity | None) -> Answer:
        response = await request(
            "POST",
            url,
            headers={"Accept": "application/json", "Content-Type": "application/json"},
            body=discovery.request_body(self._system_id),
            ssl_context=await self._ssl_context(url, identity),
            timeout_s=DISCOVERY_TIMEOUT_S,
        )
        return discovery.parse_answer(response.status, response.body, url)

    async def _named_urls(self, cert_url: str) -> list[str]:
        """Where our certificate says the cloud is."""
        der = first_der(await self._worker.run(read_chain_url, cert_url), what=cert_url)
        if self._notes is not None and (noted := self._notes.find(der, _TOPIC)):
            return msgspec.json.decode(noted[0], type=list[str])
        from aoscore.common.certs import load_der

        urls = discovery.certificate_urls(load_der(der, what=cert_url))
        if self._notes is not None:
            with log_and_continue(_log, "Can't note what the certificate says"):
                await self._notes.add(der, _TOPIC, msgspec.json.encode(urls).decode())
        return urls

    async def _discover(self, identity: TlsIdentity | None) -> None:
        """Asks for addresses, one service after the other, one redirect each."""
        named: list[str] = []
        if identity is not None and not self._settings.override_discovery_url:
            named = await self._named_urls(identity.cert_url)
        urls = discovery.discovery_urls(
            configured=self._settings.discovery_url,
            override=self._settings.override_discovery_url,
            named=named,
        )
        failure: AosError = FailedError("no service discovery URL works")
        for url in urls:
            try:
                answer = await self._ask(url, identity)
                if answer.error_code == REDIRECT:
                    _log.info(kv("Service discovery redirects", url=answer.connection_info[0]))
                    answer = await self._ask(answer.connection_info[0], identity)
                    if answer.error_code == REDIRECT:
                        raise FailedError(f"service discovery at {url} redirects in circles")
            except AosError as error:
                _log.warning("Service discovery failed: %s", error)
                failure = error
                continue
            if answer.delay_s is not None:
                self._backoff = Backoff(answer.delay_s, max(answer.delay_s, self._settings.reconnect_limit_s))
            if answer.error_code == REPEAT_LATER:
                raise FailedError(f"service discovery at {url} asks to come back later")
            self._addresses.take(answer)
            return
        raise failure

    @contextlib.asynccontextmanager
    async def _open(self) -> AsyncIterator[WebSocket]:
        identity = await self._identity()
        if self._addresses.current is None:
            await self._discover(identity)
        url = self._addresses.current
        if url is None:
            raise FailedError("service discovery named no address")
        async with contextlib.AsyncExitStack() as stack:
            try:
                context = await self._ssl_context(url, identity)
                headers = {"Accept": "application/json", "Authorization": f"Bearer {self._addresses.token}"}
                socket = await stack.enter_async_context(connect(url, context, headers))
            except UnauthorizedError:
                self._addresses.forget()
                raise
            except AosError:
                self._addresses.failed()
                raise
            self._addresses.worked()
            _log.info(kv("Connected to the cloud", url=url))
            yield socket

    async def _exchange(self, socket: WebSocket) -> None:
        """Moves messages until the connection ends."""
        self._session.connected()
        self._is_connected.set()
        self.connection.publish(True)
        try:
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._write(socket), name="cloud writer")
                pinger = group.create_task(self._watch(socket), name="cloud watch")
                await self._read(socket)
                writer.cancel()
                pinger.cancel()
        except BaseExceptionGroup as errors:
            # One of the three failed and took the others with it; its error says what happened.
            raise errors.exceptions[0] from None
        finally:
            self._is_connected.clear()
            self._session.disconnected(now=_now())
            self._note_finished()
            self.connection.publish(False)

    async def _write(self, socket: WebSocket) -> None:
        while True:
            self._wake.clear()
            frames = self._session.transmit(now=_now())
            self._note_finished()
            for frame in frames:
                if self._message_log is not None:
                    self._message_log.write("TX", frame)
                await socket.send(frame)
            if self._wake.is_set():
                continue
            next_time = self._session.next_time()
            await comes_within(self._wake, None if next_time is None else next_time - _now())

    async def _watch(self, socket: WebSocket) -> None:
        """Notices a dead link that TCP does not notice."""
        if self._settings.ping_period_s <= 0:
            return
        missed = 0
        while True:
            pongs = socket.pongs
            await socket.ping()
            await asyncio.sleep(self._settings.ping_period_s)
            missed = 0 if socket.pongs > pongs else missed + 1
            if missed >= MISSED_PONGS:
                raise FailedError(f"the cloud left {missed} pings unanswered")

    async def _read(self, socket: WebSocket) -> None:
        async for frame in socket.messages():
            if self._message_log is not None:
                self._message_log.write("RX", frame)
            try:
                received = self._session.receive(frame, now=_now(), created_at=datetime.now(UTC))
            except EnvelopeError as error:
                _log.error("Message is dropped: %s", error)
                self._unreadable(error)
                continue
            self._note_finished()
            if received is not None:
                # When the connection ends in here, the cloud gets no ack and says it again on the next one.
                await self._dispatch(received, frame)
                self._session.acknowledge(received.txn, frame, created_at=datetime.now(UTC))
            self._wake.set()

    async def _dispatch(self, received: Received, frame: bytes | str) -> None:
        message = received.message
        if message is None:
            error = received.error or FailedError("message without content")
            _log.error("Message can't be used: %s", error)
            self._unreadable(error)
            return
        for problem in received.problems:
            _log.error("Part of %s from the cloud is left out: %s", message_type(message), problem)
        future = self._waiting.get(message.correlation_id)
        if future is not None:
            if not future.done():
                future.set_result(message)
            return
        route = self._routes.get(type(message))
        if route is None:
            _log.warning("Nobody waits for this message: %s", message_type(message))
            return
        key = ""
        if self._inbox is not None and route.again is not None:
            with log_and_continue(_log, f"Can't keep {message_type(message)} on disk, it is lost if CM ends now"):
                key = await self._inbox.put(frame, message)
        # A full topic holds up the connection rather than lose a message that was acknowledged.
        await route.topic.queue.put((route.act, received, key))


def _now() -> float:
    return asyncio.get_running_loop().time()


__all__ = ["CloudLink", "Identities", "LinkSettings"]
