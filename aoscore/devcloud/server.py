"""Binds the listeners of the cloud and runs it until it is told to stop."""

import asyncio
import json
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from aoscore.common.db import Database
from aoscore.common.files import DirectoryLock, write_atomic
from aoscore.devcloud.admin import AdminApi
from aoscore.devcloud.blobserver import BlobServer
from aoscore.devcloud.ca import Authority
from aoscore.devcloud.client import SOCKET_NAME
from aoscore.devcloud.core import Core
from aoscore.devcloud.endpoints import Endpoints
from aoscore.devcloud.faults import Fault, Faults
from aoscore.devcloud.logserver import LogServer
from aoscore.devcloud.published import PublishedSchema
from aoscore.devcloud.rest import Rest
from aoscore.devcloud.store import SCHEMA
from aoscore.devcloud.unitserver import UnitServer

_log = logging.getLogger(__name__)

PORTS_FILE = "ports.json"
CA_FOLDER = "ca"
_STOP_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Options:
    """How a cloud is run.

    `domain` is the host name that goes into certificates and URLs, `host` the address to listen on; port 0 takes a
    free one. `ws_port` None puts the link on the discovery port. `blob_tls` serves blobs over https, as the cloud in
    the field does; the Unit then needs the root in its system store.
    """

    directory: Path
    domain: str = "localhost"
    host: str = "127.0.0.1"
    rest_port: int = 10000
    discovery_port: int = 9000
    ws_port: int | None = None
    blob_port: int = 9002
    blob_tls: bool = False
    next_request_delay_ms: int = 1000
    schema_file: Path | None = None
    faults: list[Fault] = field(default_factory=list)


@asynccontextmanager
async def running(options: Options) -> AsyncIterator[Core]:
    """The cloud, up and listening inside the block; ports.json is there on entry.

    Raises:
        AlreadyExistsError: another cloud runs on the directory.
        OSError: a port is taken.
    """
    directory = options.directory
    published = PublishedSchema.load(options.schema_file)
    lock = await asyncio.to_thread(DirectoryLock, directory)
    async with AsyncExitStack() as stack:
        stack.callback(lock.release)
        authority = await asyncio.to_thread(Authority.open, directory / CA_FOLDER, options.domain)
        tls_files = await asyncio.to_thread(authority.server_files, [options.host, socket.gethostname()])
        database = await stack.enter_async_context(Database(directory / "cloud.db", SCHEMA))
        endpoints = Endpoints(options.domain, blob_scheme="https" if options.blob_tls else "http")
        core = Core(directory, database, authority, endpoints, Faults(options.faults), published)
        stack.callback(core.close)

        def tls(client: ssl.VerifyMode) -> ssl.SSLContext:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(*tls_files)
            context.load_verify_locations(authority.root_file)
            context.verify_mode = client
            return context

        units = UnitServer(core, next_request_delay_ms=options.next_request_delay_ms)
        discovery = units.discovery_app()
        with_certificate, without = tls(ssl.CERT_REQUIRED), tls(ssl.CERT_NONE)
        listen = _Listeners(stack, options.host)
        if options.ws_port is None:
            units.websocket_app(discovery)
        endpoints.discovery_port = await listen.tcp(discovery, options.discovery_port, with_certificate)
        endpoints.ws_port = endpoints.discovery_port
        if options.ws_port is not None:
            endpoints.ws_port = await listen.tcp(units.websocket_app(), options.ws_port, with_certificate)
        blob_tls = without if options.blob_tls else None
        endpoints.blob_port = await listen.tcp(BlobServer(core).app(), options.blob_port, blob_tls)
        # aos-keys comes without a certificate, so the handlers demand one where it is needed.
        rest = Rest(core).app()
        LogServer(core).add_to(rest)
        endpoints.rest_port = await listen.tcp(rest, options.rest_port, tls(ssl.CERT_OPTIONAL))
        await listen.unix(AdminApi(core).app(), directory)
        ports = json.dumps(endpoints.ports(), indent=2).encode() + b"\n"
        await asyncio.to_thread(write_atomic, directory / PORTS_FILE, ports, 0o644)
        stack.callback((directory / PORTS_FILE).unlink, missing_ok=True)
        _log.info("Cloud is listening: directory=%s, %s", directory, endpoints.ports())
        yield core


class _Listeners:
    """Starts aiohttp applications; the stack stops them in reverse order."""

    def __init__(self, stack: AsyncExitStack, host: str) -> None:
        self._stack = stack
        self._host = host

    async def tcp(self, app: web.Application, port: int, tls: ssl.SSLContext | None) -> int:
        """Listen on a TCP port, which is returned."""
        sock = socket.create_server(
            (self._host, port), family=socket.AF_INET6 if ":" in self._host else socket.AF_INET, backlog=128
        )
        await self._start(app, sock, tls)
        return int(sock.getsockname()[1])

    async def unix(self, app: web.Application, directory: Path) -> None:
        """Listen on the admin socket, which nobody but its owner may open."""
        path = directory / SOCKET_NAME
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.bind(f"/proc/self/fd/{fd}/{SOCKET_NAME}")
        finally:
            os.close(fd)
        path.chmod(0o600)
        await self._start(app, sock, None)
        self._stack.callback(path.unlink, missing_ok=True)

    async def _start(self, app: web.Application, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=_STOP_TIMEOUT_S)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.SockSite(runner, sock, ssl_context=tls).start()
