"""Log requests of the cloud to the nodes, and their logs to the cloud (cm-cloud §13)."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from aoscore.cm.communication import messages
from aoscore.cm.communication.messages import Identity, LogType, UploadType
from aoscore.cm.logupload import LogUploads, Upload, failure
from aoscore.cm.monitoring import CloudLink
from aoscore.common.errors import AosError, to_error_info
from aoscore.common.log import kv
from aoscore.common.types import InstanceFilter, LogData, LogKind, LogRequest, LogStatus

_log = logging.getLogger(__name__)

MAX_OPEN_UPLOADS: Final = 64
"""Requests by HTTPS that nodes may be working on; of the oldest, the rest goes over the WebSocket."""

_KINDS = {LogType.SYSTEM: LogKind.SYSTEM, LogType.INSTANCE: LogKind.INSTANCE, LogType.CRASH: LogKind.CRASH}


class LogSource(Protocol):
    """Whoever reaches the SM of a node."""

    async def request_log(self, node_id: str, request: LogRequest) -> None: ...


def to_log_request(message: messages.RequestLog) -> LogRequest:
    """What a node is asked for."""
    wanted = message.filter
    selected = InstanceFilter(
        item_id=wanted.item.id or None if wanted.item else None,
        subject_id=wanted.subject.id or None if wanted.subject else None,
        instance=wanted.instance,
    )
    return LogRequest(_KINDS[message.log_type], message.correlation_id, selected, wanted.from_, wanted.till)


class LogForwarder:
    """Asks every node that is meant, all of them when none is named, and answers for those it cannot ask.

    What comes back goes over the WebSocket, or by HTTPS where the request says so. Requests are not kept over a
    restart: parts that come after it go over the WebSocket.
    """

    def __init__(
        self, link: CloudLink, source: LogSource, uploads: LogUploads, *, node_ids: Callable[[], Sequence[str]]
    ) -> None:
        self._link = link
        self._source = source
        self._uploads = uploads
        self._node_ids = node_ids
        self._open: dict[str, _OpenUpload] = {}

    async def on_request(self, message: messages.RequestLog) -> None:
        """The cloud wants a log."""
        request = to_log_request(message)
        node_ids = [node.codename for node in message.filter.node_ids] or list(self._node_ids())
        self._open.pop(request.correlation_id, None)
        options = message.upload_options
        if options is not None and options.type is UploadType.HTTPS:
            try:
                upload = Upload(options)
            except AosError as error:
                _log.error(kv("Log can't be uploaded", correlation_id=request.correlation_id, error=error))
                for node_id in node_ids:
                    unasked = LogData(request.correlation_id, LogStatus.ERROR)
                    await self._link.send(failure(_push_log(node_id, unasked), error))
                return
            self._open[request.correlation_id] = _OpenUpload(upload, set(node_ids))
            if len(self._open) > MAX_OPEN_UPLOADS:
                del self._open[next(iter(self._open))]
        for node_id in node_ids:
            try:
                await self._source.request_log(node_id, request)
            except AosError as error:
                _log.error(kv("Can't request log", nodeID=node_id, error=error))
                absent = LogData(request.correlation_id, LogStatus.ABSENT, error=to_error_info(error))
                await self.on_log(node_id, absent)

    async def on_log(self, node_id: str, log: LogData) -> None:
        """A part of a log came from a node."""
        part = _push_log(node_id, log)
        wanted = self._open.get(log.correlation_id)
        if wanted is None:
            await self._link.send(part)
            return
        self._uploads.put(wanted.upload, part)
        if log.part >= log.part_count:
            wanted.waiting.discard(node_id)
            if not wanted.waiting:
                del self._open[log.correlation_id]


@dataclass
class _OpenUpload:
    upload: Upload
    waiting: set[str]
    """Nodes whose last part has not come."""


def _push_log(node_id: str, log: LogData) -> messages.PushLog:
    return messages.PushLog(
        correlation_id=log.correlation_id,
        node=Identity.of_codename(node_id),
        part=log.part,
        parts_count=log.part_count,
        content=log.data,
        status=log.status,
        error_info=messages.ErrorInfo.of(log.error),
    )
