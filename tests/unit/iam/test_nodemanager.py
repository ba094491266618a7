import asyncio

import pytest

from aoscore.common.errors import NotFoundError
from aoscore.common.types import NodeInfo, NodeState
from aoscore.iam.nodemanager import NodeManager


async def test_current_node_comes_first_and_wins_over_the_stored_one() -> None:
    stored = [NodeInfo("b", title="stored"), NodeInfo("a", title="stored")]
    nodes = NodeManager(stored, NodeInfo("a", title="now"))
    assert nodes.ids() == ["a", "b"]
    assert (nodes.get("a").title, nodes.get("b").title) == ("now", "stored")
    with pytest.raises(NotFoundError, match="'c'"):
        nodes.get("c")


async def test_changes_of_two_nodes_both_arrive_and_no_change_is_silent() -> None:
    nodes = NodeManager([], NodeInfo("a"))
    changes = nodes.changes.values()
    nodes.update(NodeInfo("a"))
    nodes.update(NodeInfo("b", state=NodeState.PROVISIONED))
    nodes.update(NodeInfo("a", state=NodeState.PROVISIONED))
    seen = [await anext(changes), await anext(changes)]
    assert [node.node_id for node in seen] == ["b", "a"]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(changes), 0.01)
