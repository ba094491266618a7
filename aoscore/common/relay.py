"""TLS with a key on a token: stdlib ssl speaks TLS, and everybody else plain text inside this process.

    server   peer ──TLS──► TlsFront ──unix socket──► gRPC server
    client   gRPC channel ──unix socket──► TlsBack ──TLS──► server
             HTTP, WebSocket ──socket pair──► tls_pipe ──TLS──► server

The library grpcio from PyPI has a TLS of its own that can't use a token. Handshakes do their work in threads, because a
token may be slow or hang; afterwards bytes are moved by the event loop. Nobody but this process can use the unix
sockets: that of a server lies in a directory for its user only, that of a client asks the kernel who connects.
"""

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import shutil
import socket
import ssl
import struct
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from aoscore.common.aio import log_and_continue, run_abandonable
from aoscore.common.errors import AlreadyExistsError, AosError, DeadlineError, FailedError, UnreachableError
from aoscore.common.tls import TOKEN_LOCK, ServerTls, TlsRoots, within_token_limit

T = TypeVar("T")

_log = logging.getLogger(__name__)

_HANDSHAKE_LIMIT_S = 10.0
# gRPC learns of a connection when the peer has spoken on it, and this is how long gRPC itself would wait for that:
# version 1.78 crashes when its server is stopped while a connection has not sent its HTTP/2 settings.
_FIRST_WORD_LIMIT_S = 120.0
# One works, the others wait for it; more connections wait without a thread.
_MAX_THREADS = 4
_BACKLOG = 128
_CHUNK_BYTES = 64 * 1024
_PAUSE_S = 1.0
_DIRECTORY_PREFIX = "aos-tls-"
_ABANDONED_AGE_S = 60.0
_RETRY_S = 0.01
_STRAY_ERRORS = 3
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class RelayedPeer(NamedTuple):
    """Who is behind a connection: address as gRPC writes it, and DER of the certificate when one was shown."""

    address: str
    certificate: bytes | None


# Peers that came through a TlsFront of this process, by the name that gRPC knows them by. A service method gets
# nothing else that could lead it there, hence one table for the process.
_peers: dict[str, RelayedPeer] = {}


def relayed_peer(name: str) -> RelayedPeer | None:
    """Who it is that gRPC's context.peer() calls so; None for who did not come through here."""
    return _peers.get(name)


def _of_tls(call: Callable[..., T], *arguments: Any) -> T:
    """The result of an operation on a TLS socket, or the error that is its own.

    pkcs11-provider 1.0 leaves an error in OpenSSL's queue when it frees an object ("Objects pool in inconsistent
    state"), and the next operation of the thread that would have to wait fails with it instead. Its failure empties
    the queue, and the connection is as it was.
    """
    for _ in range(_STRAY_ERRORS):
        try:
            return call(*arguments)
        except ssl.SSLError as error:
            if type(error) is not ssl.SSLError or error.library == "SSL":
                raise
            _log.debug("Error that is not of this connection: %s", error)
    return call(*arguments)


class _Pump:
    """Moves bytes from one socket to another; one that takes nothing more stops the other."""

    def __init__(self, source: socket.socket, target: socket.socket, end: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._source = source
        self._target = target
        self._end = end
        self._left = memoryview(b"")

    def start(self) -> None:
        """Begin; the source may hold bytes already that it will not announce."""
        self._loop.add_reader(self._source, self._move)
        self._move()

    def _move(self) -> None:
        try:
            while True:
                data = _of_tls(self._source.recv, _CHUNK_BYTES)
                if not data:
                    self._end()
                    return
                self._left = memoryview(data)
                if not self._send():
                    self._loop.remove_reader(self._source)
                    self._loop.add_writer(self._target, self._flush)
                    return
                if not isinstance(self._source, ssl.SSLSocket) or not self._source.pending():
                    return
        except ssl.SSLWantWriteError:
            # TLS has to answer something first, and the connection is full.
            self._loop.call_later(_RETRY_S, self._again)
        except _WOULD_BLOCK:
            pass
        except OSError as error:
            _log.debug("Connection ended by an error: error=%s", error)
            self._end()

    def _again(self) -> None:
        if self._source.fileno() >= 0 and not self._left:
            self._move()

    def _send(self) -> bool:
        """Whether all is sent."""
        try:
            sent = _of_tls(self._target.send, self._left)
        except _WOULD_BLOCK:
            sent = 0
        self._left = self._left[sent:]
        return not self._left

    def _flush(self) -> None:
        try:
            if not self._send():
                return
        except OSError:
            self._end()
            return
        self._loop.remove_writer(self._target)
        self.start()


async def _bridge(one: socket.socket, other: socket.socket) -> None:
    """Move bytes both ways until one side ends. Closes both."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for sock in (one, other):
        sock.setblocking(False)
    try:
        for source, target in ((one, other), (other, one)):
            _Pump(source, target, ended.set).start()
        await ended.wait()
    finally:
        for sock in (one, other):
            loop.remove_reader(sock)
            loop.remove_writer(sock)
            sock.close()


class _Handshakes:
    """Does handshakes: what costs time in threads, the waiting for peers in the loop.

    A token that hangs stops all that are made, for good; who waits for them is told so in time.
    """

    def __init__(self) -> None:
        self._threads = asyncio.Semaphore(_MAX_THREADS)

    async def shake(
        self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, name: str | None = None
    ) -> ssl.SSLSocket:
        """TLS over a connected socket. Raises OSError, DeadlineError or TimeoutError; the socket is then closed.

        `name` is of the server, for its certificate to be checked as the context says.
        """
        tls = context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False, server_hostname=name)
        abandoned = threading.Event()
        try:
            tls.setblocking(False)
            async with asyncio.timeout(_HANDSHAKE_LIMIT_S):
                if server_side:
                    await _ready(tls)
                while (wait := await self._step(tls, abandoned)) is not None:
                    await _ready(tls, write=wait)
        except BaseException:
            if not abandoned.is_set():
                tls.close()
            raise
        return tls

    async def _step(self, tls: ssl.SSLSocket, abandoned: threading.Event) -> bool | None:
        """As far as it goes without the peer: None when done, else whether to wait until it can be written to."""

        def step() -> bool | None:
            if not TOKEN_LOCK.acquire(timeout=_HANDSHAKE_LIMIT_S):
                raise DeadlineError("the token is busy")
            try:
                _of_tls(tls.do_handshake)
            except ssl.SSLWantReadError:
                return False
            except ssl.SSLWantWriteError:
                return True
            finally:
                TOKEN_LOCK.release()
                if abandoned.is_set():
                    # Not before: while it was in use, its number must not go to another file.
                    tls.close()
            return None

        async with self._threads:
            try:
                return await run_abandonable(step, _HANDSHAKE_LIMIT_S)
            except (TimeoutError, asyncio.CancelledError):
                abandoned.set()
                raise


async def _ready(sock: socket.socket, *, write: bool = False) -> None:
    """Wait until there is something to read, or room to write."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    (loop.add_writer if write else loop.add_reader)(sock, ready.set)
    try:
        await ready.wait()
    finally:
        (loop.remove_writer if write else loop.remove_reader)(sock)


async def _accepted(listener: socket.socket) -> AsyncIterator[tuple[socket.socket, Any]]:
    """Connections as they come, with the address of the other side. What is wrong with one does not end it."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            yield await loop.sock_accept(listener)
        except OSError as error:
            _log.error("Can't take a connection: error=%s", error)
            await asyncio.sleep(_PAUSE_S)


def _listen(host: str, port: int) -> socket.socket:
    """As gRPC listens: the wildcard means IPv6 too; the port is ours alone."""
    everything = host in ("0.0.0.0", "::") and socket.has_dualstack_ipv6()  # noqa: S104 - as configured
    family = socket.AF_INET6 if everything or ":" in host else socket.AF_INET
    try:
        listener = socket.create_server(
            ("::" if everything else host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=everything
        )
    except OSError as error:
        raise AlreadyExistsError(f"can't listen on {host}:{port}: {error.strerror or error}, is it in use?") from error
    listener.setblocking(False)
    return listener


def _remove_abandoned() -> None:
    """Delete the directories of processes that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_DIRECTORY_PREFIX}*"):
        with contextlib.suppress(OSError):
            # Not one that is just being made.
            if time.time() - path.stat().st_mtime < _ABANDONED_AGE_S:
                continue
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)


class TlsFront:
    """The listening side of a server. `inner` is where the gRPC server has to listen, without TLS."""

    def __init__(self, host: str, port: int, tls: ServerTls) -> None:
        """Raises AlreadyExistsError when the port is taken."""
        self._tls = tls
        self._listener = _listen(host, port)
        self.port = int(self._listener.getsockname()[1])
        _remove_abandoned()
        self._directory = Path(tempfile.mkdtemp(prefix=_DIRECTORY_PREFIX))
        # Held for as long as we live: that is how others see that the directory is in use.
        self._lock = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._inner = self._directory / "grpc"
        self.inner = f"unix:{self._inner}"
        self._numbers = itertools.count()
        self._handshakes = _Handshakes()

    def close(self) -> None:
        """Give up port and files."""
        self._listener.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        os.close(self._lock)

    async def run(self) -> None:
        """Take connections until cancelled."""
        async with asyncio.TaskGroup() as connections:
            async for sock, address in _accepted(self._listener):
                connections.create_task(self._serve(sock, _address_text(address)))

    async def _serve(self, sock: socket.socket, address: str) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tls = await self._handshakes.shake(sock, await self._tls.context(), server_side=True)
        except (OSError, ValueError, AosError) as error:
            sock.close()
            _log.debug("TLS handshake failed: port=%d, peer=%s, error=%s", self.port, address, error)
            return
        with log_and_continue(_log, "Can't hand on a connection"), contextlib.closing(tls):
            try:
                async with asyncio.timeout(_FIRST_WORD_LIMIT_S):
                    await _ready(tls)
            except TimeoutError:
                _log.debug("A connection says nothing: port=%d, peer=%s", self.port, address)
                return
            with self._inner_connection(RelayedPeer(address, tls.getpeercert(binary_form=True))) as inner:
                await asyncio.get_running_loop().sock_connect(inner, str(self._inner))
                await _bridge(tls, inner)

    @contextlib.contextmanager
    def _inner_connection(self, peer: RelayedPeer) -> Iterator[socket.socket]:
        """A socket under whose name gRPC sees the peer, so that services can find out who it is."""
        name = self._directory / str(next(self._numbers))
        with socket.socket(socket.AF_UNIX) as inner:
            inner.setblocking(False)
            inner.bind(str(name))
            name.unlink()
            _peers[f"unix:{name}"] = peer
            try:
                yield inner
            finally:
                _peers.pop(f"unix:{name}", None)


class TlsBack:
    """The connecting side of a client. `target` is the address for a gRPC channel without TLS."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext) -> None:
        self._host = host
        self._port = port
        self._context = context
        self._handshakes = _Handshakes()
        name = f"aos-tls-{uuid.uuid4().hex}"
        self.target = f"unix-abstract:{name}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        self._listener.bind(f"\0{name}")
        self._listener.listen()
        self._first: ssl.SSLSocket | None = None
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, host: str, port: int, roots: TlsRoots) -> Self:
        """Connect for the first time. Raises FailedError or DeadlineError saying what is wrong with the server."""

        def make() -> ssl.SSLContext:
            context = roots.ssl_client_context(check_hostname=False)
            context.set_alpn_protocols(["h2"])
            return context

        back = cls(host, port, await within_token_limit(f"connection to {host}:{port}", make))
        try:
            back._first = await back._connect()
        except BaseException:
            back._listener.close()
            raise
        back._task = asyncio.create_task(back._run(), name="TlsBack")
        return back

    async def close(self) -> None:
        """End all connections."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._first is not None:
            self._first.close()
        self._listener.close()

    async def _connect(self) -> ssl.SSLSocket:
        where = f"{self._host}:{self._port}"
        try:
            async with asyncio.timeout(_HANDSHAKE_LIMIT_S):
                sock = await _connected(self._host, self._port)
                return await self._handshakes.shake(sock, self._context, server_side=False)
        except TimeoutError:
            raise DeadlineError(f"no TLS answer from {where} within {_HANDSHAKE_LIMIT_S:g} s") from None
        except ssl.SSLError as error:
            raise FailedError(f"TLS with {where} failed: {error.reason or error}") from error
        except OSError as error:
            raise UnreachableError(f"can't connect to {where}: {error.strerror or error}") from error

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as connections:
            async for local, _ in _accepted(self._listener):
                if _peer_pid(local) != os.getpid():
                    _log.error("Another process tried to use our TLS connection: pid=%d", _peer_pid(local))
                    local.close()
                    continue
                connections.create_task(self._serve(local))

    async def _serve(self, local: socket.socket) -> None:
        with contextlib.closing(local):
            tls, self._first = self._first, None
            try:
                tls = tls or await self._connect()
            except (ValueError, AosError) as error:
                _log.debug("Can't connect: error=%s", error)
                return
            await _bridge(tls, local)


@contextlib.asynccontextmanager
async def tls_pipe(host: str, port: int, context: ssl.SSLContext) -> AsyncIterator[socket.socket]:
    """The plain end of a connection on which TLS is spoken here: for whoever would do the handshake in the loop.

    The caller closes what it gets. Raises OSError, DeadlineError or TimeoutError while connecting.
    """
    sock = await _connected(host, port)
    tls = await _Handshakes().shake(sock, context, server_side=False, name=host)
    near, far = socket.socketpair()
    near.setblocking(False)
    bridge = asyncio.create_task(_bridge(tls, far), name="tls pipe")
    try:
        yield near
    finally:
        near.close()
        bridge.cancel()
        await asyncio.wait({bridge})


async def _connected(host: str, port: int) -> socket.socket:
    """A TCP connection to the first address of the host that answers. Raises OSError."""
    loop = asyncio.get_running_loop()
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise failure


def _address_text(address: Any) -> str:
    host, port = str(address[0]).removeprefix("::ffff:"), address[1]
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


def _peer_pid(sock: socket.socket) -> int:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", raw)[0]
    return pid
