"""What the local SM says on its stream, on the way to the gateway (mp.md §6, §9). Node."""

import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common import convert
from aoscore.common.errors import InvalidArgumentError
from aoscore.mp.logprovider.archive import Archive, LogArchiver, is_packed
from aoscore.mp.nodeserver.link import NodeLink


class SmMessages:
    """Learns the node's id, and packs logs that come as text; all else passes as it is.

    Logs that fall silent are closed when the next message passes, which an SM that lives sends every few seconds.
    """

    def __init__(
        self,
        link: NodeLink,
        make_archiver: Callable[[], LogArchiver],
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._make_archiver = make_archiver
        self._archiver = make_archiver()
        self._now = now

    def take(self, message: bytes) -> list[bytes]:
        """What to send in place of a message. Raises InvalidArgumentError for one that is none."""
        try:
            outgoing = pb.SMOutgoingMessages.FromString(message)
        except DecodeError as error:
            raise InvalidArgumentError(f"message of SM is malformed: {error}") from error
        kind = outgoing.WhichOneof("SMOutgoingMessage")
        if kind == "sm_info":
            self._link.node_id = outgoing.sm_info.node_id
            # A new stream: logs of an earlier one are asked for again.
            self._archiver = self._make_archiver()
            return [message]
        silent = [one for archive in self._archiver.overdue(self._now()) for one in _messages(archive)]
        if kind == "log" and (not is_packed(outgoing.log.data) or self._archiver.has(outgoing.log.correlation_id)):
            archive = self._add(outgoing.log)
            return silent + (_messages(archive) if archive is not None else [])
        return [*silent, message]

    def _add(self, log: pb.LogData) -> Archive | None:
        # Status words that nobody knows count as more to come, as for AosCore; the last part of a whole log ends it.
        status = log.status if log.status in ("error", "empty", "absent") else "ok"
        if status == "ok" and log.part_count and log.part == log.part_count:
            status = "empty"
        error = convert.error_from_pb(log.error)
        return self._archiver.add(log.correlation_id, log.data, status, error, self._now())


def _messages(archive: Archive) -> list[bytes]:
    messages = []
    for members, error in archive.log_data():
        log = pb.LogData(correlation_id=archive.log_id, error=convert.error_to_pb(error), **members)
        messages.append(pb.SMOutgoingMessages(log=log).SerializeToString())
    return messages
