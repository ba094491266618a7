"""Log requests of the cloud to the nodes, and their logs to the cloud (cm-cloud §13)."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from aoscore.cm.communication import messages
from aoscore.cm.communication.messages import Identity, LogType
from aoscore.cm.monitoring import CloudLink
from aoscore.common.errors import AosError, to_error_info
from aoscore.common.log import kv
from aoscore.common.types import InstanceFilter, LogData, LogKind, LogRequest, LogStatus

_log = logging.getLogger(__name__)

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
    """Asks every node that is meant, all of them when none is named, and answers for those it cannot ask."""

    def __init__(self, link: CloudLink, source: LogSource, *, node_ids: Callable[[], Sequence[str]]) -> None:
        self._link = link
        self._source = source
        self._node_ids = node_ids

    async def on_request(self, message: messages.RequestLog) -> None:
        """The cloud wants a log."""
        request = to_log_request(message)
        for node_id in [node.codename for node in message.filter.node_ids] or self._node_ids():
            try:
                await self._source.request_log(node_id, request)
            except AosError as error:
                _log.error(kv("Can't request log", nodeID=node_id, error=error))
                absent = LogData(request.correlation_id, LogStatus.ABSENT, error=to_error_info(error))
                await self.on_log(node_id, absent)

    async def on_log(self, node_id: str, log: LogData) -> None:
        """A part of a log came from a node."""
        await self._link.send(
            messages.PushLog(
                correlation_id=log.correlation_id,
                node=Identity.of_codename(node_id),
                part=log.part,
                parts_count=log.part_count,
                content=log.data,
                status=log.status,
                error_info=messages.ErrorInfo.of(log.error),
            )
        )
