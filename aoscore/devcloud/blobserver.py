"""Serves encrypted blobs over HTTP with ranges, as the Unit's downloader fetches them (cm-cloud.md §6)."""

from aiohttp import web

from aoscore.devcloud.core import Core
from aoscore.devcloud.faults import BLOB
from aoscore.devcloud.peer import abort, apply_request_faults


class BlobServer:
    """Handlers of the blob listener. No client certificate: blobs are encrypted and signed."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def app(self) -> web.Application:
        """GET and HEAD of /blobs/sha256/HEX."""
        app = web.Application()
        app.router.add_get("/blobs/sha256/{hex:[0-9a-f]{64}}", self._blob)
        return app

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        digest = f"sha256:{request.match_info['hex']}"
        if (answer := await apply_request_faults(self._core.faults, request, BLOB, digest=digest)) is not None:
            return answer
        path = self._core.sealed_path(digest)
        if not path.is_file():
            raise web.HTTPNotFound(text=f"blob {digest} does not exist")
        if fault := self._core.faults.take("truncated_blob", on=BLOB, digest=digest):
            response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
            response.content_length = path.stat().st_size
            await response.prepare(request)
            with path.open("rb") as file:
                await response.write(file.read(fault.size_bytes))
            abort(request)
            return response
        if self._core.faults.take("corrupt_blob", on=BLOB, digest=digest):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            return web.Response(body=bytes(content), content_type="application/octet-stream")
        return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})
