"""RegisterSM at CM for the SM of a node (mp.md §1, §6). Gateway."""

import logging
from collections.abc import Callable

from google.protobuf.message import DecodeError

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.log import kv
from aoscore.mp.communication.connection import Connection
from aoscore.mp.communication.relay import ServerRelay, Way

_log = logging.getLogger(__name__)


def sm_relay(port: int, address: str, way: Way, claim: Callable[[Connection, str], None]) -> ServerRelay:
    """The relay of the channel. `claim(connection, node_id)` ties a link to a node, or raises AosError."""

    def check(connection: Connection, message: bytes) -> bool:
        try:
            outgoing = pb.SMOutgoingMessages.FromString(message)
        except DecodeError as error:
            connection.counters.refused += 1
            _log.warning(kv("Message of node is malformed, dropped", peer=connection.peer, error=error))
            return False
        if outgoing.WhichOneof("SMOutgoingMessage") == "sm_info":
            if not outgoing.sm_info.node_id:
                raise InvalidArgumentError("the SM info has no node id")
            claim(connection, outgoing.sm_info.node_id)
        elif not connection.node_id:
            raise InvalidArgumentError("the SM did not begin with sm_info")
        return True

    return ServerRelay(
        port, address, "/servicemanager.v5.SMService/RegisterSM", [way], what="RegisterSM at CM", check=check
    )
