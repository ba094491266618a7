from pathlib import Path

import msgspec
import pytest

from aoscore.common.aio import Worker
from aoscore.common.types import NodeInfo, NodeState
from aoscore.iam.config import NodeInfoConfig
from aoscore.iam.currentnode import state as module
from aoscore.iam.currentnode.node import CurrentNode
from aoscore.iam.currentnode.state import StateStore
from aoscore.iam.database import IamDatabase

NODE = NodeInfo("n1", state=NodeState.PROVISIONED)
PAUSED = msgspec.structs.replace(NODE, state=NodeState.PAUSED)
UNPROVISIONED = msgspec.structs.replace(NODE, state=NodeState.UNPROVISIONED)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "aos/.provisionstate"


@pytest.fixture
def store(path: Path, database: IamDatabase, worker: Worker) -> StateStore:
    return StateStore(path, database, worker)


async def test_no_file_is_unprovisioned(store: StateStore) -> None:
    assert await store.load("n1") is NodeState.UNPROVISIONED


async def test_file_holds_the_bare_word(store: StateStore, path: Path) -> None:
    await store.save(NODE)
    assert path.read_bytes() == b"provisioned"
    await store.save(PAUSED)
    assert path.read_bytes() == b"paused"
    assert await store.load("n1") is NodeState.PAUSED
    await store.save(UNPROVISIONED)
    assert not path.exists()
    assert await store.load("n1") is NodeState.UNPROVISIONED


@pytest.mark.parametrize("damage", [None, "", "provis", "\0\0\0", "error"])
async def test_lost_or_broken_file_is_restored(store: StateStore, path: Path, damage: str | None) -> None:
    await store.save(PAUSED)
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage)
    assert await store.load("n1") is NodeState.PAUSED
    assert path.read_bytes() == b"paused"


async def test_broken_file_without_a_copy_is_an_error(store: StateStore, path: Path) -> None:
    path.parent.mkdir()
    path.write_text("garbage")
    assert await store.load("n1") is NodeState.ERROR
    assert path.read_text() == "garbage"


async def test_copy_of_another_node_does_not_count(store: StateStore, path: Path) -> None:
    await store.save(NODE)
    path.unlink()
    assert await store.load("n2") is NodeState.UNPROVISIONED


async def test_file_wins_over_the_database(store: StateStore, path: Path) -> None:
    await store.save(NODE)
    path.write_text("paused\n")
    assert await store.load("n1") is NodeState.PAUSED


async def test_crash_between_the_copies_leaves_one_of_both_states(
    store: StateStore, database: IamDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def power_cut(*_: object, **__: object) -> None:
        raise OSError("power cut")

    await store.save(NODE)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_state_file", power_cut)
        with pytest.raises(OSError, match="power cut"):
            await store.save(UNPROVISIONED)
    assert await store.load("n1") is NodeState.PROVISIONED
    await store.save(UNPROVISIONED)
    with monkeypatch.context() as patch:
        patch.setattr(database, "save_node", power_cut)
        with pytest.raises(OSError, match="power cut"):
            await store.save(NODE)
    assert await store.load("n1") is NodeState.PROVISIONED


@pytest.fixture
def config(tmp_path: Path, path: Path) -> NodeInfoConfig:
    (tmp_path / "id").write_text("n1\n")
    (tmp_path / "mem").write_text("MemTotal: 2 kB\n")
    return NodeInfoConfig(
        node_id_path=tmp_path / "id",
        mem_info_path=tmp_path / "mem",
        provisioning_state_path=path,
        node_type="type",
        node_name="title",
        attrs={"MainNode": ""},
    )


async def test_current_node_tells_each_change_once(config: NodeInfoConfig, store: StateStore, worker: Worker) -> None:
    node = await CurrentNode.load(config, store, worker)
    assert (node.info.node_id, node.info.node_type, node.info.title) == ("n1", "type", "title")
    assert node.info.is_main and node.info.total_ram == 2048 and node.info.state is NodeState.UNPROVISIONED
    seen: list[NodeState] = []
    node.on_change(lambda info: seen.append(info.state))
    for state in (NodeState.UNPROVISIONED, NodeState.PROVISIONED, NodeState.PROVISIONED, NodeState.PAUSED):
        await node.set_state(state)
        assert node.info.state is state
    assert seen == [NodeState.PROVISIONED, NodeState.PAUSED]
    again = await CurrentNode.load(config, store, worker)
    assert again.info.state is NodeState.PAUSED


async def test_failed_write_keeps_the_old_state(
    config: NodeInfoConfig, store: StateStore, worker: Worker, path: Path
) -> None:
    node = await CurrentNode.load(config, store, worker)
    path.parent.write_text("a file where a directory should be")
    with pytest.raises(OSError, match="exists"):
        await node.set_state(NodeState.PROVISIONED)
    assert node.info.state is NodeState.UNPROVISIONED


async def test_bad_state_file_is_an_error_that_says_what_to_do(
    config: NodeInfoConfig, store: StateStore, worker: Worker, path: Path
) -> None:
    path.parent.mkdir()
    path.write_text("garbage")
    node = await CurrentNode.load(config, store, worker)
    assert node.info.state is NodeState.ERROR
    assert node.info.error is not None and node.info.error.aos_code == 5
    assert str(path) in node.info.error.message
    await node.set_state(NodeState.UNPROVISIONED)
    assert node.info.error is None and not path.exists()
