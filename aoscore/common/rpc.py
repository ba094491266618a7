"""gRPC as this system uses it: channels with the contract's keepalive, servers that really own their port, errors."""

import asyncio
import contextlib
import functools
import inspect
import ipaddress
import logging
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import unquote

import grpc
import grpc.aio

from aoscore.common.certurls import first_der, names_of_peer
from aoscore.common.connect import open_connection
from aoscore.common.errors import (
    AlreadyExistsError,
    AosError,
    DeadlineError,
    FailedError,
    InvalidArgumentError,
    NotFoundError,
    NotSupportedError,
    UnreachableError,
    first_cause,
)
from aoscore.common.tls import ServerTls, TlsIdentity, TlsRoots

if TYPE_CHECKING:
    from cryptography import x509

    from aoscore.common.relay import RelayedPeer

_log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

# grpc.md, "Keepalive": ping every 10 s also without calls, 3 s for the answer, 1..3 s between connection attempts.
_CLIENT_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    # A channel of its own per object: a shared one would keep credentials that were replaced.
    ("grpc.use_local_subchannel_pool", 1),
]
_SERVER_OPTIONS: list[tuple[str, Any]] = [
    # Without this a second process could silently share the port (observed.md, defect 7).
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # A peer that lost its power says nothing: without pings of ours its streams would look alive for hours.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]
# The second when it is the other side that ended the call, for example by stopping.
_SERVER_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
# Streams of subscribers have no end of their own and take all of it.
_STOP_GRACE_S = 0.3
_HANDSHAKE_TIMEOUT_S = 10.0


def split_address(address: str, *, default_host: str = "0.0.0.0") -> tuple[str, int]:  # noqa: S104 - ":8090" means all
    """Host and port of "host:port", "[v6]:port" or ":port". Raises InvalidArgumentError naming the address."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:
        raise InvalidArgumentError(f"{address!r} is no address, write host:port")
    return host.strip("[]") or default_host, int(port)


async def peer_name(address: str, context: ssl.SSLContext) -> str:
    """A name that the server at `address` proves by its certificate.

    The chain is checked by `context`, the name is not: gRPC insists on one, so it gets a name that is in the
    certificate (design, "TLS names").
    """
    return _name_in(await _shown_certificate(address, context), address)


async def _shown_certificate(address: str, context: ssl.SSLContext) -> dict[str, Any]:
    host, port = split_address(address)
    context.check_hostname = False
    async with open_connection(host, port, context, timeout_s=_HANDSHAKE_TIMEOUT_S) as (_, writer):
        transport: ssl.SSLObject = writer.get_extra_info("ssl_object")
        return dict(transport.getpeercert() or {})


def _name_in(certificate: dict[str, Any], address: str) -> str:
    names = names_of_peer(certificate)
    if not names:
        raise FailedError(f"the certificate of {address} names nobody")
    return names[0]


def open_channel(
    address: str, credentials: grpc.ChannelCredentials | None, *, name: str | None = None
) -> grpc.aio.Channel:
    """A channel with the contract's keepalive; `name` is the certificate name to expect instead of the host."""
    options = list(_CLIENT_OPTIONS)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    if name is not None:
        options.append(("grpc.ssl_target_name_override", name.replace("*", "any")))
    return grpc.aio.secure_channel(address, credentials, options=options)


async def open_tls_channel(address: str, tls: TlsRoots) -> grpc.aio.Channel:
    """A channel to whoever proves at `address` to be of our Unit. Raises the errors of `peer_name`."""
    if isinstance(tls, TlsIdentity) and tls.on_token:
        return await _open_relayed_channel(address, tls)
    shown = await _shown_certificate(address, tls.ssl_client_context(check_hostname=False))
    begins_s, ends_s = (ssl.cert_time_to_seconds(str(shown[key])) for key in ("notBefore", "notAfter"))
    if not begins_s <= time.time() <= ends_s:
        # gRPC's own TLS insists on the time.
        return await _open_relayed_channel(address, tls)
    return open_channel(address, tls.grpc_client_credentials(), name=_name_in(shown, address))


async def _open_relayed_channel(address: str, tls: TlsRoots) -> grpc.aio.Channel:
    # Import on use: a Unit whose keys are files never needs it.
    from aoscore.common.relay import TlsBack

    back = await TlsBack.open(*split_address(address), tls)
    # The server is called by the name it is known by, not by that of a socket in this process.
    options = [*_CLIENT_OPTIONS, ("grpc.default_authority", address)]
    channel = grpc.aio.insecure_channel(back.target, options=options)
    close = channel.close

    async def close_both(grace: float | None = None) -> None:
        try:
            await close(grace)
        finally:
            await back.close()

    channel.close = close_both  # type: ignore[method-assign]
    return channel


def peer_certificate_der(context: Any) -> bytes | None:
    """The same as `peer_certificate`, unparsed."""
    if (relayed := _relayed(context)) is not None:
        return relayed.certificate
    if shown := context.auth_context().get("x509_pem_cert"):
        return first_der(shown[0], what="certificate of the caller")
    return None


def peer_certificate(context: Any) -> "x509.Certificate | None":
    """The certificate that the caller of a service method has shown; None without one (public port, plain text)."""
    der = peer_certificate_der(context)
    if der is None:
        return None
    from aoscore.common.certs import load_der

    return load_der(der, what="certificate of the caller")


def peer_address(context: Any) -> str:
    """The address of the caller of a service method, as gRPC writes it: `ipv4:10.0.0.1:4711`."""
    relayed = _relayed(context)
    return str(context.peer()) if relayed is None else relayed.address


def peer_host(context: Any) -> str:
    """The IP address of the caller of a service method, empty for one that comes otherwise."""
    kind, _, address = unquote(peer_address(context)).partition(":")
    return plain_ip(address.rpartition(":")[0].strip("[]")) if kind in ("ipv4", "ipv6") else ""


def plain_ip(text: str) -> str:
    """An IP address in the one form that can be compared: IPv4 also when it came to a socket of IPv6.

    Raises InvalidArgumentError.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise InvalidArgumentError(f"{text!r} is no IP address") from None
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _relayed(context: Any) -> "RelayedPeer | None":
    # Not imported where it is not in use: then nobody came that way.
    relay = sys.modules.get("aoscore.common.relay")
    return relay.relayed_peer(context.peer()) if relay is not None else None


@contextlib.contextmanager
def rpc_errors(what: str) -> Iterator[None]:
    """Turn gRPC failures of a client call into our errors; `what` names the call, e.g. "GetCert from IAM"."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        text = f"{what}: {error.details() or error.code().name}"
        match error.code():
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineError(text) from error
            case grpc.StatusCode.NOT_FOUND:
                raise NotFoundError(text) from error
            case grpc.StatusCode.UNIMPLEMENTED:
                raise NotSupportedError(text) from error
            case code if code in _SERVER_GONE:
                raise UnreachableError(f"{text} ({code.name})") from error
            case _:
                raise FailedError(f"{text} ({error.code().name})") from error
    except grpc.aio.UsageError as error:
        raise FailedError(f"{what}: {error}") from error
    except asyncio.CancelledError as error:
        # Closing a channel looks like this in every call that is using it. Taken for a cancellation of the caller's
        # own task it would end that task without a word.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise UnreachableError(f"{what}: the connection was closed") from error


class LazyChannel:
    """A channel that is opened at the first call, and again after a failure or with another certificate of ours.

    `tls` gives the certificate to use now; None means plain text. Use as an async context manager.
    """

    def __init__(self, address: str, tls: Callable[[], TlsRoots | None]) -> None:
        self.address = address
        self._tls = tls
        self._channel: grpc.aio.Channel | None = None
        self._used: TlsRoots | None = None
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drop()

    async def open(self) -> grpc.aio.Channel:
        """The channel for a call that begins now. Raises AosError."""
        async with self._opening:
            tls = self._tls()
            if self._channel is None or tls != self._used:
                fresh = open_channel(self.address, None) if tls is None else await open_tls_channel(self.address, tls)
                await self.drop()
                self._channel, self._used = fresh, tls
            return self._channel

    async def drop(self) -> None:
        """Close it; the next call opens another one."""
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    async def call(
        self, what: str, stub: Callable[[grpc.aio.Channel], Any], method: str, request: Any, *, timeout_s: float
    ) -> Any:
        """The answer of a unary call; `what` names it in errors, e.g. "node info from IAM". Raises AosError."""
        channel = await self.open()
        try:
            with rpc_errors(f"{what} at {self.address}"):
                return await getattr(stub(channel), method)(request, timeout=timeout_s)
        except AosError as error:
            # A new channel next time: the name or the certificate of the server may be another one by now. A server
            # that stops cancels the calls it still gets, while the connection looks well.
            gone = isinstance(error, UnreachableError)
            if channel is self._channel and (gone or channel.get_state() != grpc.ChannelConnectivity.READY):
                await self.drop()
            raise


def _describe(method: Callable[..., Any]) -> str:
    return method.__qualname__.rsplit(".", 1)[-1]


async def _abort(context: Any, method: Callable[..., Any], error: BaseException) -> None:
    cause = first_cause(error)
    if isinstance(cause, AosError | OSError):
        _log.error("Request failed: method=%s, error=%s", _describe(method), cause)
    else:
        _log.error("Request failed unexpectedly: method=%s", _describe(method), exc_info=cause)
    # An error may have a status of its own.
    status = getattr(cause, "grpc_status", grpc.StatusCode.INTERNAL)
    await context.abort(status, str(cause) or type(cause).__name__)


async def begin_answers(context: Any) -> None:
    """Send the head of a stream of answers; to be called first by who writes them in a task that it may cancel.

    The head goes with the first write otherwise, and when that is cancelled on its way gRPC sends another one, is told
    that there are too many (GRPC_CALL_ERROR_TOO_MANY_OPERATIONS), and the caller never hears of the end.
    """
    await context.send_initial_metadata(())


def handler(method: F) -> F:
    """Server method whose errors reach the caller as status INTERNAL with the text (grpc.md, "gRPC status").

    Works for unary answers and for answer streams (async generators).
    """
    if inspect.isasyncgenfunction(method):

        @functools.wraps(method)
        async def stream(self: object, request: object, context: Any) -> AsyncIterator[Any]:
            try:
                async for answer in method(self, request, context):
                    yield answer
            except grpc.aio.AbortError:
                raise  # the method chose a status of its own
            except (Exception, BaseExceptionGroup) as error:
                await _abort(context, method, error)

        return stream  # type: ignore[return-value]

    @functools.wraps(method)
    async def unary(self: object, request: object, context: Any) -> Any:
        try:
            return await method(self, request, context)
        except grpc.aio.AbortError:
            raise
        except (Exception, BaseExceptionGroup) as error:
            await _abort(context, method, error)

    return unary  # type: ignore[return-value]


class Server:
    """A gRPC server as a service. Fails to start when its port is taken.

    `register` are functions that add services to the server, e.g. `partial(add_XServicer_to_server, servicer)`.
    `port` is the bound port once started (useful with port 0). `options` are limits of gRPC beside those of the
    contract.
    """

    def __init__(
        self,
        address: str,
        credentials: Callable[[], ServerTls] | None,
        register: Sequence[Callable[[grpc.aio.Server], None]],
        *,
        before_start: Callable[[], Awaitable[None]] | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        self._host, self._wanted_port = split_address(address)
        self._credentials = credentials
        self._register = register
        self._before_start = before_start
        self._options = [*_SERVER_OPTIONS, *options]
        self.port = 0

    async def run(self, started: Callable[[], None]) -> None:
        """Serve until cancelled; running calls get a moment to end."""
        if self._before_start:
            await self._before_start()
        server = grpc.aio.server(options=self._options)
        for register in self._register:
            register(server)
        tls = self._credentials() if self._credentials is not None else None
        if tls is not None and tls.on_token:
            await self._run_relayed(server, tls, started)
            return
        host = f"[{self._host}]" if ":" in self._host else self._host
        address = f"{host}:{self._wanted_port}"
        try:
            if tls is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, tls.credentials())
        except RuntimeError as error:
            raise AlreadyExistsError(f"can't listen on {address}: is it in use?") from error
        if self.port == 0:
            raise AlreadyExistsError(f"can't listen on {address}: is it in use?")
        await self._serve(server, started, "yes" if tls is not None else "no")

    async def _run_relayed(self, server: grpc.aio.Server, tls: ServerTls, started: Callable[[], None]) -> None:
        from aoscore.common.relay import TlsFront

        # A certificate that can't be used is an error now, not at the first connection.
        await tls.context()
        front = TlsFront(self._host, self._wanted_port, tls)
        try:
            server.add_insecure_port(front.inner)
            self.port = front.port
            async with asyncio.TaskGroup() as tasks:
                relaying = tasks.create_task(front.run())
                try:
                    await self._serve(server, started, "key on token")
                finally:
                    relaying.cancel()
        finally:
            front.close()

    async def _serve(self, server: grpc.aio.Server, started: Callable[[], None], tls: str) -> None:
        await server.start()
        _log.info("Listening: address=%s, tls=%s", f"{self._host}:{self.port}", tls)
        started()
        try:
            # Not wait_for_termination: cancelled, it makes stop() return at once and leave the calls running.
            await asyncio.Event().wait()
        finally:
            await server.stop(_STOP_GRACE_S)
