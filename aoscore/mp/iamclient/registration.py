"""RegisterNode at the main IAM for the IAM of a node (mp.md §1, §6). Gateway."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from aoscore._pb.iamanager.v5 import iamanager_pb2 as v5
from aoscore._pb.iamanager.v6 import iamanager_pb2 as v6
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


@dataclass(frozen=True)
class Interface:
    """Of IAM: as the nodes of our days speak it, or as those of the older kind do."""

    path: str
    message: type[v6.IAMOutgoingMessages] | type[v5.IAMOutgoingMessages]
    state: str
    """Member of a node info that says how far the node is."""


CURRENT = Interface("/iamanager.v6.IAMPublicNodesService/RegisterNode", v6.IAMOutgoingMessages, "state")
LEGACY = Interface("/iamanager.v5.IAMPublicNodesService/RegisterNode", v5.IAMOutgoingMessages, "status")


def open_iam_relay(port: int, address: str, ways: Sequence[Way], interface: Interface = CURRENT) -> ServerRelay:
    """The relay of the open channel, for nodes that have no certificate yet."""

    def check(connection: Connection, message: bytes) -> bool:
        outgoing = _parse(connection, message, interface)
        if outgoing is None:
            return False
        kind, state = outgoing.WhichOneof("IAMOutgoingMessage"), getattr(outgoing.node_info, interface.state)
        if kind not in _OPEN_KINDS or (kind == "node_info" and state != NodeState.UNPROVISIONED):
            connection.counters.refused += 1
            _log.warning(kv("Not allowed on the open channel, dropped", peer=connection.peer, kind=kind, state=state))
            return False
        return True

    def on_end(connection: Connection) -> None:
        # Can't be told in another way, and says only once who it is (mp-wire §6).
        connection.shut("IAM lost the node, which has to say again who it is")

    return _relay(port, address, ways, check, interface, on_end if interface is LEGACY else lambda _: None)


def secure_iam_relay(
    port: int, address: str, way: Way, claim: Callable[[Connection, str], None], interface: Interface = CURRENT
) -> ServerRelay:
    """The relay of the secure channel. `claim` is that of `cmclient.registration.sm_relay`."""

    def check(connection: Connection, message: bytes) -> bool:
        outgoing = _parse(connection, message, interface)
        if outgoing is None:
            return False
        if outgoing.WhichOneof("IAMOutgoingMessage") == "node_info":
            if getattr(outgoing.node_info, interface.state) == NodeState.UNPROVISIONED:
                connection.counters.refused += 1
                _log.warning(kv("Unprovisioned node on the secure channel, dropped", peer=connection.peer))
                return False
            if not outgoing.node_info.node_id:
                raise InvalidArgumentError("the node info has no node id")
            claim(connection, outgoing.node_info.node_id)
        return True

    return _relay(port, address, [way], check, interface)


def _relay(
    port: int,
    address: str,
    ways: Sequence[Way],
    check: Check,
    interface: Interface,
    on_end: Callable[[Connection], None] = lambda _: None,
) -> ServerRelay:
    what = "RegisterNode at main IAM"
    return ServerRelay(port, address, interface.path, ways, what=what, check=check, on_end=on_end)


def _parse(
    connection: Connection, message: bytes, interface: Interface
) -> v6.IAMOutgoingMessages | v5.IAMOutgoingMessages | None:
    if interface is LEGACY and _is_of_newer_kind(message):
        connection.shut("the peer began like one of the older kind and speaks a newer interface")
        raise InvalidArgumentError("the IAM of a peer of the older kind does not speak iamanager.v5")
    try:
        return interface.message.FromString(message)
    except DecodeError as error:
        connection.counters.refused += 1
        _log.warning(kv("Message of node is malformed, dropped", peer=connection.peer, error=error))
        return None


def _is_of_newer_kind(message: bytes) -> bool:
    """Whether it is a node info as IAM sends it now: its state is where the older interface has nothing."""
    try:
        return bool(v6.IAMOutgoingMessages.FromString(message).node_info.state)
    except DecodeError:
        return False
