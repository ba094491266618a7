"""A server that logs are uploaded to."""

import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.support.pki import TestCa


class LogServer:
    """Answers with `statuses` in turn, the last of them for ever."""

    def __init__(self) -> None:
        self.statuses = [204]
        self.headers: list[dict[str, str]] = []
        self.received: list[dict[str, Any]] = []
        """Bodies of all requests, accepted or not."""
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self, directory: Path, ca: TestCa) -> AsyncIterator["LogServer"]:
        """Serve https on localhost, with a certificate below `ca`; its files go to `directory`."""
        ca.issue("logs").write(directory, "logs")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "logs.pem", directory / "logs.key")
        app = web.Application()
        app.router.add_post("/upload", self._take)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "localhost", 0, ssl_context=context)
        await site.start()
        self.url = f"https://localhost:{runner.addresses[0][1]}/upload?key=hidden"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        self.headers.append({**request.headers, "target": request.path_qs})
        self.received.append(json.loads(await request.read()))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return web.Response(status=status, headers={"Location": "/elsewhere"})
