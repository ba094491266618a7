"""RegisterNode at the main IAM for the IAM of a node (mp.md §1, §6). Gateway."""

import logging
from collections.abc import Callable, Sequence

from google.protobuf.message import DecodeError

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.log import kv
from aoscore.common.types import NodeState
from aoscore.mp.communication.connection import Connection
from aoscore.mp.communication.relay import Check, ServerRelay, Way

_log = logging.getLogger(__name__)

# What a node may say before anybody knows who it is: that it is new, and how its provisioning goes.
_OPEN_KINDS = frozenset(
    {
        "node_info",
        "start_provisioning_response",
        "cert_types_response",
        "create_key_response",
        "apply_cert_response",
        "finish_provisioning_response",
    }
)


def open_iam_relay(port: int, address: str, ways: Sequence[Way]) -> ServerRelay:
    """The relay of the open channel, for nodes that have no certificate yet."""
    return _relay(port, address, ways, _check_open)


def secure_iam_relay(port: int, address: str, way: Way, claim: Callable[[Connection, str], None]) -> ServerRelay:
    """The relay of the secure channel. `claim` is that of `cmclient.registration.sm_relay`."""

    def check(connection: Connection, message: bytes) -> bool:
        outgoing = _parse(connection, message)
        if outgoing is None:
            return False
        if outgoing.WhichOneof("IAMOutgoingMessage") == "node_info":
            if outgoing.node_info.state == NodeState.UNPROVISIONED:
                _log.warning(kv("Unprovisioned node on the secure channel, dropped", peer=connection.peer))
                return False
            if not outgoing.node_info.node_id:
                raise InvalidArgumentError("the node info has no node id")
            claim(connection, outgoing.node_info.node_id)
        return True

    return _relay(port, address, [way], check)


def _relay(port: int, address: str, ways: Sequence[Way], check: Check) -> ServerRelay:
    path = "/iamanager.v6.IAMPublicNodesService/RegisterNode"
    return ServerRelay(port, address, path, ways, what="RegisterNode at main IAM", check=check)


def _check_open(connection: Connection, message: bytes) -> bool:
    outgoing = _parse(connection, message)
    if outgoing is None:
        return False
    kind, state = outgoing.WhichOneof("IAMOutgoingMessage"), outgoing.node_info.state
    if kind not in _OPEN_KINDS or (kind == "node_info" and state != NodeState.UNPROVISIONED):
        _log.warning(kv("Not allowed on the open channel, dropped", peer=connection.peer, kind=kind, state=state))
        return False
    return True


def _parse(connection: Connection, message: bytes) -> pb.IAMOutgoingMessages | None:
    try:
        return pb.IAMOutgoingMessages.FromString(message)
    except DecodeError as error:
        _log.warning(kv("Message of node is malformed, dropped", peer=connection.peer, error=error))
        return None
