"""Stand-ins for the other parts of CM."""

from collections.abc import Sequence

from aoscore.cm.communication.messages import Message
from aoscore.cm.communication.outbox import Change
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.common.aio import Broadcast
from aoscore.common.types import NodeInfo, NodeState, ResourceInfo, RuntimeInfo


class FakeLink:
    """A cloud link that keeps what was sent."""

    def __init__(self) -> None:
        self.connected = True
        self.connection: Broadcast[bool] = Broadcast("cloud")
        self.sent: list[Message] = []

    async def send(self, message: Message, *, also: Change | None = None) -> bool:
        """Nothing is on disk, and `also` is not done."""
        self.sent.append(message)
        return False

    async def keep(self, kind: type[Message]) -> None:
        """Nothing waits here: it is sent."""


class FakeNodes:
    """Nodes as a test wants them."""

    def __init__(self, *nodes: UnitNodeInfo) -> None:
        self.changed: Broadcast[UnitNodeInfo] = Broadcast("nodes")
        self._nodes = {node.node_id: node for node in nodes}

    def nodes(self) -> list[UnitNodeInfo]:
        return [self._nodes[node_id] for node_id in sorted(self._nodes)]

    def set(self, node: UnitNodeInfo) -> None:
        self._nodes[node.node_id] = node
        self.changed.publish(node)


def unit_node(
    node_id: str,
    *,
    node_type: str = "main",
    state: NodeState = NodeState.PROVISIONED,
    connected: bool = True,
    runtimes: Sequence[RuntimeInfo] | None = None,
    resources: Sequence[ResourceInfo] = (),
    max_dmips: int = 1000,
    total_ram: int = 1024,
) -> UnitNodeInfo:
    """A node with an SM."""
    if runtimes is None:
        runtimes = (RuntimeInfo(f"crun-{node_id}", "crun"),)
    info = NodeInfo(
        node_id,
        node_type,
        max_dmips=max_dmips,
        total_ram=total_ram,
        attrs={"AosComponents": "sm,iam"},
        state=state,
    )
    return UnitNodeInfo(info, tuple(runtimes), tuple(resources), is_connected=connected, has_sm_link=connected)
