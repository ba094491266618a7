"""All Nodes of the Unit as the Main Node knows them (iam.md §9.3)."""

from collections.abc import Iterable

from aoscore.common.aio import ChangeFeed
from aoscore.common.errors import NotFoundError
from aoscore.common.types import NodeInfo


class NodeManager:
    """Known Nodes by id; `changes` tells each change of any of them."""

    def __init__(self, known: Iterable[NodeInfo], current: NodeInfo) -> None:
        """`known` are the Nodes of the database, `current` is this one as it is now."""
        self._nodes = {current.node_id: current}
        for node in known:
            self._nodes.setdefault(node.node_id, node)
        self.changes: ChangeFeed[str, NodeInfo] = ChangeFeed()

    def ids(self) -> list[str]:
        """Ids of all Nodes, this one first."""
        return list(self._nodes)

    def get(self, node_id: str) -> NodeInfo:
        """One Node. Raises NotFoundError naming it."""
        try:
            return self._nodes[node_id]
        except KeyError:
            raise NotFoundError(f"node {node_id!r} is not known") from None

    def update(self, node: NodeInfo) -> None:
        """Take over a change, and tell it when there is one."""
        if self._nodes.get(node.node_id) != node:
            self._nodes[node.node_id] = node
            self.changes.publish(node.node_id, node)
