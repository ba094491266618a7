"""What the Unit knows about its nodes."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from aoscore.cm.nodeinfo import NodeInfoProvider, NodeTable
from aoscore.common.errors import DeadlineError
from aoscore.common.types import NodeInfo, NodeState, RuntimeInfo, SMInfo
from tests.support.running import running

RUNTIME = RuntimeInfo("rt", "crun")


def iam_node(state: NodeState, components: str = "cm,iam,sm", node_id: str = "n") -> NodeInfo:
    return NodeInfo(node_id, attrs={"MainNode": "", "AosComponents": components}, state=state)


class TestTable:
    """cm-orchestration §3.2, row by row."""

    @pytest.mark.parametrize(
        ("iam", "has_sm_link", "late", "state", "connected", "timed_out"),
        [
            (None, True, False, NodeState.UNPROVISIONED, False, False),
            (None, False, True, NodeState.ERROR, False, True),
            (iam_node(NodeState.PROVISIONED, "iam"), False, True, NodeState.PROVISIONED, True, False),
            (iam_node(NodeState.ERROR, "iam"), False, True, NodeState.ERROR, True, False),
            (iam_node(NodeState.UNPROVISIONED), False, True, NodeState.UNPROVISIONED, True, False),
            (iam_node(NodeState.PROVISIONED), True, True, NodeState.PROVISIONED, True, False),
            (iam_node(NodeState.PAUSED, "CM,SM"), True, False, NodeState.PAUSED, True, False),
            (iam_node(NodeState.PROVISIONED), False, False, NodeState.PROVISIONED, False, False),
            (iam_node(NodeState.PROVISIONED), False, True, NodeState.ERROR, False, True),
            (iam_node(NodeState.PAUSED), False, True, NodeState.ERROR, False, True),
            (iam_node(NodeState.ERROR), True, True, NodeState.ERROR, True, False),
            (iam_node(NodeState.ERROR), False, True, NodeState.ERROR, False, False),
        ],
    )
    def test_view(
        self, iam: NodeInfo | None, has_sm_link: bool, late: bool, state: NodeState, connected: bool, timed_out: bool
    ) -> None:
        table = NodeTable(60)
        table.set_sm_lost("n", 100)
        if iam:
            table.set_iam_info(iam, 100)
        if has_sm_link:
            table.set_sm_info(SMInfo("n", (RUNTIME,)), 100)
        view = table.view("n", 160 if late else 159)
        assert (view.info.state, view.is_connected, view.has_sm_link) == (state, connected, has_sm_link)
        assert view.runtimes == ((RUNTIME,) if has_sm_link else ())
        assert (view.info.error is not None and view.info.error.aos_code == DeadlineError.aos_code) == timed_out

    def test_deadline_counts_from_the_loss(self) -> None:
        table = NodeTable(60)
        table.set_iam_info(iam_node(NodeState.PROVISIONED), 0)
        assert table.next_deadline_s(10) == 60
        table.set_sm_info(SMInfo("n"), 20)
        assert table.next_deadline_s(30) is None
        table.set_sm_lost("n", 40)
        table.set_iam_info(iam_node(NodeState.PROVISIONED), 90)
        assert table.next_deadline_s(90) == 100
        assert table.next_deadline_s(100) is None


class FakeIam:
    def __init__(self) -> None:
        self.changes: asyncio.Queue[NodeInfo] = asyncio.Queue()

    async def get_node_ids(self) -> tuple[str, ...]:
        return ("a", "broken", "b")

    async def get_node(self, node_id: str) -> NodeInfo:
        if node_id == "broken":
            raise DeadlineError("no answer")
        return iam_node(NodeState.PROVISIONED, node_id=node_id)

    async def watch_nodes(self) -> AsyncIterator[NodeInfo]:
        while True:
            yield await self.changes.get()


async def test_provider_tells_changes_once(caplog: pytest.LogCaptureFixture) -> None:
    iam = FakeIam()
    provider = NodeInfoProvider(iam, sm_timeout_s=0.05)
    async with running(provider):
        assert [node.node_id for node in provider.nodes()] == ["a", "b"]
        assert provider.main_node_id() == "a"
        assert "Can't get info of node broken" in caplog.text
        with provider.changed.subscribe() as changes:
            provider.on_sm_info(SMInfo("a", (RUNTIME,)))
            provider.on_sm_info(SMInfo("a", (RUNTIME,)))
            connected = changes.get_nowait()
            assert (connected.node_id, connected.is_usable) == ("a", True)
            assert changes.empty()
            provider.on_sm_lost("a")
            assert not changes.get_nowait().is_connected
            async with asyncio.timeout(2):
                late = {node.node_id: node.info.state for node in [await changes.get(), await changes.get()]}
            assert late == {"a": NodeState.ERROR, "b": NodeState.ERROR}
            iam.changes.put_nowait(iam_node(NodeState.PAUSED, node_id="c"))
            assert (await changes.get()).node_id == "c"
