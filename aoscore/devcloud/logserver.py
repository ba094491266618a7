"""Takes the logs that Units upload by HTTPS (`uploadOptions` of a log request, cloud-protocol-v7 §6.9).

The contract names a URL and a token, no more. Our CM posts the `data` of the pushLog that would have gone over the
link, a part at a time.
"""

import json
from typing import Any

from aiohttp import web

from aoscore.devcloud import schema
from aoscore.devcloud.core import Core
from aoscore.devcloud.endpoints import LOGS_PATH
from aoscore.devcloud.faults import LOG
from aoscore.devcloud.link import Received
from aoscore.devcloud.peer import apply_request_faults


class LogServer:
    """Handler of uploads. No client certificate: the token says which Unit uploads, and for which request."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def add_to(self, app: web.Application) -> None:
        """Answer POST on the path of uploads."""
        app.router.add_post(LOGS_PATH, self._take)

    async def _take(self, request: web.Request) -> web.Response:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        owner = self._core.log_token_owner(token) if scheme == "Bearer" else None
        if owner is None:
            raise web.HTTPUnauthorized(text="token is unknown or expired")
        system_id, correlation_id = owner
        if (answer := await apply_request_faults(self._core.faults, request, LOG, system_id)) is not None:
            return answer
        raw = await request.read()
        data, problems = _parsed(raw, correlation_id)
        await self._core.take(system_id, Received(data, None, "pushLog", problems), raw)
        if problems:
            raise web.HTTPBadRequest(text="; ".join(problems))
        return web.Response(status=204)


def _parsed(raw: bytes, correlation_id: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The part of a log, or what is wrong with it."""
    try:
        data = json.loads(raw)
    except ValueError as error:
        return None, [f"upload of a log is no JSON: {error}"]
    problems = schema.from_unit_problems(data)
    if not problems and (data["messageType"], data["correlationId"]) != ("pushLog", correlation_id):
        problems = ["upload is no part of the log that its token is for"]
    return (None, problems) if problems else (data, [])
