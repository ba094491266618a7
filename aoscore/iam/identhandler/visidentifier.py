"""Identity from a vehicle information service, by WebSocket (iam.md §4.2).

What the service has said is kept on disk: a Unit starts with it when the service is not there yet. After each connect
everything is asked anew and compared, so that nothing that changed meanwhile is missed.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from aoscore.common.aio import ChangeFeed, Worker, log_and_continue, raise_if_cancelled
from aoscore.common.config import from_json, to_json
from aoscore.common.errors import AosError, DeadlineError, FailedError, InvalidArgumentError, first_cause
from aoscore.common.files import write_atomic
from aoscore.common.log import kv
from aoscore.common.tls import TlsRoots
from aoscore.common.types import Duration, SystemInfo
from aoscore.common.websocket import WebSocket, connect
from aoscore.iam.identhandler.fileidentifier import parse_unit_model
from aoscore.iam.identhandler.visprotocol import (
    SUBJECTS_PATH,
    UNIT_MODEL_PATH,
    VIN_PATH,
    Answer,
    Notification,
    VisSession,
    to_subjects,
    to_text,
)

_log = logging.getLogger(__name__)

FILE_NAME = "visidentity.json"
RECONNECT_PAUSE_S = 2.0
PING_PERIOD_S = 30.0
_MISSED_PONGS = 2
_DEFAULT_TIMEOUT_S = 120.0


class VisIdentifierParams(msgspec.Struct, frozen=True, rename="camel"):
    """Section identifier.params of the plug-in visidentifier. Without `ca_cert_file` the roots of the system count."""

    vis_server: str
    ca_cert_file: Path | None = None
    web_socket_timeout: Duration = Duration(_DEFAULT_TIMEOUT_S)


class Identity(msgspec.Struct, frozen=True):
    """What the service has said last."""

    system_info: SystemInfo
    subjects: tuple[str, ...]


class VisIdentifier:
    """Follows the service from its start on; being started does not mean being connected."""

    def __init__(
        self, params: VisIdentifierParams, directory: Path, worker: Worker, *, pause_s: float = RECONNECT_PAUSE_S
    ) -> None:
        """`directory` is where the identity is kept."""
        self.subjects_changes: ChangeFeed[None, tuple[str, ...]] = ChangeFeed()
        self._url = params.vis_server
        self._ca_file = params.ca_cert_file
        self._timeout_s = params.web_socket_timeout if params.web_socket_timeout > 0 else _DEFAULT_TIMEOUT_S
        self._path = directory / FILE_NAME
        self._worker = worker
        self._pause_s = pause_s
        self._identity: Identity | None = None
        self._known = asyncio.Event()
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._notified: tuple[str, ...] | None = None
        self._taking = asyncio.Lock()
        self._reason = ""

    async def run(self, started: Callable[[], None]) -> None:
        """Connect, again and again."""
        await self._load()
        started()
        while True:
            try:
                await self._connect_once()
                reason = "it closed the connection"
            except Exception as error:
                raise_if_cancelled()
                cause = first_cause(error)
                if not isinstance(cause, AosError | OSError):
                    _log.error(kv("Link to the VIS server failed unexpectedly", url=self._url), exc_info=cause)
                reason = str(cause) or type(cause).__name__
            if reason != self._reason:
                _log.warning(kv("No link to the VIS server", url=self._url, reason=reason))
            self._reason = reason
            await asyncio.sleep(self._pause_s)

    async def system_info(self) -> SystemInfo:
        """Identity of the Unit. Waits for a service that has never been there; raises DeadlineError after its limit."""
        return (await self._present()).system_info

    async def subjects(self) -> tuple[str, ...]:
        """Subjects that are active, as far as is known. Waits like system_info."""
        return (await self._present()).subjects

    async def _present(self) -> Identity:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._known.wait()
        except TimeoutError:
            raise DeadlineError(f"VIS server {self._url} has not told the identity of the Unit yet") from None
        assert self._identity is not None  # noqa: S101 - that is what the event says
        return self._identity

    async def _load(self) -> None:
        data = await self._worker.run(_read, self._path)
        if data is None:
            return
        try:
            self._identity = from_json(data, Identity, what=str(self._path))
        except InvalidArgumentError as error:
            _log.error(kv("Kept identity is damaged, the VIS server must tell it", error=error))
            return
        self._known.set()
        _log.info(kv("Unit as the VIS server told it last", systemID=self._identity.system_info.system_id))

    async def _take(self, identity: Identity) -> None:
        """Take over what the service says now; on disk first."""
        before = self._identity
        if identity == before:
            return
        await self._worker.run(write_atomic, self._path, to_json(identity), 0o600)
        self._identity = identity
        self._known.set()
        info = identity.system_info
        _log.info(kv("Unit", systemID=info.system_id, model=info.unit_model, subjects=identity.subjects))
        if before is None or before.subjects != identity.subjects:
            self.subjects_changes.publish(None, identity.subjects)

    async def _connect_once(self) -> None:
        """One connection from its beginning to its end."""
        context = await self._worker.run(self._ssl_context) if self._url.startswith("wss:") else None
        async with connect(self._url, context) as socket:
            session = VisSession()
            self._notified = None
            try:
                async with asyncio.TaskGroup() as tasks:
                    others = [
                        tasks.create_task(self._begin(session, socket)),
                        tasks.create_task(_watch(socket)),
                    ]
                    await self._read(session, socket)
                    for task in others:
                        task.cancel()
            finally:
                for future in self._waiting.values():
                    future.cancel()
                self._waiting.clear()
                with contextlib.suppress(AosError):
                    await socket.send_text(session.unsubscribe_all())

    def _ssl_context(self) -> ssl.SSLContext:
        return TlsRoots(self._ca_file).ssl_client_context() if self._ca_file else ssl.create_default_context()

    async def _begin(self, session: VisSession, socket: WebSocket) -> None:
        """Subscribe first, then ask: what changes in between is told."""
        await self._ask(socket, session, session.subscribe(SUBJECTS_PATH))
        system_id = to_text(await self._ask(socket, session, session.get(VIN_PATH)), VIN_PATH)
        model = to_text(await self._ask(socket, session, session.get(UNIT_MODEL_PATH)), UNIT_MODEL_PATH)
        subjects = to_subjects(await self._ask(socket, session, session.get(SUBJECTS_PATH)))
        async with self._taking:
            # What was told meanwhile is newer than the answer.
            subjects = self._notified if self._notified is not None else subjects
            await self._take(Identity(SystemInfo(system_id, *parse_unit_model(model)), subjects))
        _log.info(kv("Connected to the VIS server", url=self._url))
        self._reason = ""

    async def _ask(self, socket: WebSocket, session: VisSession, request: tuple[str, str]) -> Any:
        request_id, text = request
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        try:
            await socket.send_text(text)
            async with asyncio.timeout(self._timeout_s):
                return await future
        except TimeoutError:
            raise DeadlineError(f"VIS server {self._url} did not answer within {self._timeout_s:g} s") from None
        finally:
            session.give_up(request_id)
            self._waiting.pop(request_id, None)

    async def _read(self, session: VisSession, socket: WebSocket) -> None:
        async for text in socket.messages():
            # One frame without sense must not cost the connection.
            with log_and_continue(_log, "Can't read what the VIS server says"):
                match session.receive(text):
                    case Answer(request_id, value, failure):
                        self._answer(request_id, value, failure)
                    case Notification(value):
                        self._notified = to_subjects(value)
                        async with self._taking:
                            if self._identity is not None:
                                await self._take(msgspec.structs.replace(self._identity, subjects=self._notified))

    def _answer(self, request_id: str, value: Any, failure: str) -> None:
        future = self._waiting.get(request_id)
        if future is None or future.done():
            return
        if failure:
            future.set_exception(FailedError(failure))
        else:
            future.set_result(value)


async def _watch(socket: WebSocket) -> None:
    """Notice a service that is gone without a word."""
    seen, missed = socket.pongs, 0
    while missed < _MISSED_PONGS:
        await socket.ping()
        await asyncio.sleep(PING_PERIOD_S)
        missed = missed + 1 if socket.pongs == seen else 0
        seen = socket.pongs
    raise DeadlineError("the VIS server does not answer pings")


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
