"""Logs that the cloud wants by HTTPS instead of over its WebSocket (`uploadOptions`, cloud-protocol §6.9).

The contract names a URL and a token, no more. Each part is a POST to that URL, its body the `data` of the pushLog that
would have gone over the WebSocket, so that whoever receives it finds request, node and part number where they always
are.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import msgspec

from aoscore.cm.communication.envelope import to_json
from aoscore.cm.communication.messages import ErrorInfo, PushLog, UploadOptions
from aoscore.cm.monitoring import CloudLink
from aoscore.common.aio import Backoff, unbroken
from aoscore.common.download import HttpStatusError
from aoscore.common.errors import AosError, FailedError, InvalidArgumentError, NoSpaceError, to_error_info
from aoscore.common.http import request, split_url, without_query
from aoscore.common.log import kv
from aoscore.common.types import LogStatus

_log = logging.getLogger(__name__)

QUEUE_PARTS: Final = 256
QUEUE_BYTES: Final = 8 * 1024 * 1024
"""What waits for its upload; as much as may wait for the WebSocket."""
ATTEMPTS: Final = 3
TIMEOUT_S: Final = 120.0
"""For one part of at most 256 KiB, on a slow link too."""
_ANSWER_BYTES: Final = 64 * 1024
_TOKEN: Final = re.compile(r"[A-Za-z0-9\-._~+/]{1,4096}={0,2}")
"""Longer than AosCore 9.1 takes (256 characters), as tokens grow."""


class Upload:
    """Where the parts of one request go, and what has become of it."""

    def __init__(self, options: UploadOptions) -> None:
        """Raises InvalidArgumentError when the options cannot be used. The token is in no message."""
        url = options.url
        parts = split_url(url)
        if parts.scheme != "https" or not parts.hostname:
            raise InvalidArgumentError(f"logs are uploaded by https only, not to {without_query(url)!r}")
        if "@" in parts.netloc:
            raise InvalidArgumentError("the URL for the upload of logs has a user name, the token says who we are")
        if not _TOKEN.fullmatch(options.bearer_token):
            raise InvalidArgumentError("the token for the upload of logs is none (RFC 6750 §2.1)")
        self.url = url
        self.headers = {"Authorization": f"Bearer {options.bearer_token}", "Content-Type": "application/json"}
        self.expires_at = options.bearer_token_ttl
        self.error: AosError | None = None
        """Set once: after that nothing more is sent to the URL."""
        self.closed: set[str] = set()
        """Nodes of which no more parts are taken after the error."""
        self.told: set[str] = set()
        """Nodes whose failure the cloud has been told."""


class LogUploads:
    """Uploads parts, one after the other. A failure goes to the cloud as pushLog, once for each node."""

    def __init__(
        self,
        link: CloudLink,
        *,
        ssl_context: ssl.SSLContext | None = None,
        timeout_s: float = TIMEOUT_S,
        backoff: Callable[[], Backoff] = lambda: Backoff(2.0, 30.0),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`ssl_context`: whom to trust; the system's root CAs without one. `timeout_s`: for one part."""
        self._link = link
        self._ssl_context = ssl_context
        self._timeout_s = timeout_s
        self._backoff = backoff
        self._now = now
        self._queue: asyncio.Queue[tuple[Upload, PushLog]] = asyncio.Queue()
        self._queued_bytes = 0

    def put(self, upload: Upload, part: PushLog) -> None:
        """Has a part uploaded."""
        if self._queue.qsize() >= QUEUE_PARTS or self._queued_bytes + len(part.content) > QUEUE_BYTES:
            upload.error = upload.error or NoSpaceError("logs come faster than they can be uploaded")
        if upload.error is not None:
            if part.node.codename in upload.closed:
                return
            # One more, so that the node is told of.
            upload.closed.add(part.node.codename)
            part = msgspec.structs.replace(part, content=b"")
        self._queued_bytes += len(part.content)
        self._queue.put_nowait((upload, part))

    async def run(self, started: Callable[[], None]) -> None:
        """Uploads until cancelled; of what has not been uploaded then the cloud is told, it can ask again."""
        started()
        try:
            while True:
                upload, part = await self._queue.get()
                self._queued_bytes -= len(part.content)
                try:
                    if upload.error is None:
                        await self._upload(upload, part)
                except AosError as error:
                    _log.error(kv("Can't upload log", correlation_id=part.correlation_id, error=error))
                    upload.error = error
                except asyncio.CancelledError:
                    self._queue.put_nowait((upload, part))
                    raise
                await unbroken(self._tell(upload, part))
        finally:
            # Now, as the message is kept over a restart and the parts are not.
            while not self._queue.empty():
                upload, part = self._queue.get_nowait()
                upload.error = upload.error or FailedError("CM was stopped before the log was uploaded")
                await self._tell(upload, part)

    async def _tell(self, upload: Upload, part: PushLog) -> None:
        node_id = part.node.codename
        if upload.error is not None and node_id not in upload.told:
            upload.told.add(node_id)
            await self._link.send(failure(part, upload.error))

    async def _upload(self, upload: Upload, part: PushLog) -> None:
        body = to_json(part)
        backoff = self._backoff()
        for left in reversed(range(ATTEMPTS)):
            if upload.expires_at is not None and upload.expires_at <= self._now():
                raise FailedError("the token for the upload of logs has expired")
            try:
                await self._post(upload, body)
                return
            except AosError as error:
                # No redirect is followed: the token is for this server.
                is_final = isinstance(error, HttpStatusError) and (error.is_final or error.errno < 400)
                if is_final or not left:
                    raise
                pause_s = backoff.next()
                _log.warning(kv("Upload of a log is tried again", pause_s=round(pause_s, 1), error=error))
                await asyncio.sleep(pause_s)

    async def _post(self, upload: Upload, body: bytes) -> None:
        answer = await request(
            "POST",
            upload.url,
            headers=upload.headers,
            body=body,
            ssl_context=self._ssl_context,
            timeout_s=self._timeout_s,
            limit_bytes=_ANSWER_BYTES,
        )
        if not 200 <= answer.status < 300:
            text = f"{without_query(upload.url)} answered {answer.status} to the upload of a log"
            raise HttpStatusError(text, answer.status)


def failure(part: PushLog, error: AosError) -> PushLog:
    """What the cloud gets in place of a part."""
    return msgspec.structs.replace(
        part, content=b"", status=LogStatus.ERROR, error_info=ErrorInfo.of(to_error_info(error))
    )
