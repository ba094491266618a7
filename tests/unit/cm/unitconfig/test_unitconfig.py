"""Unit config: versions, parts for nodes, check, update, nodes that connect."""

import asyncio
import json
from pathlib import Path

import pytest

from aoscore.cm.communication.envelope import to_json
from aoscore.cm.communication.messages import Identity, NodeConfig, UnitConfig, UnitConfigStatus
from aoscore.cm.unitconfig.config import node_config_text, pick_node_config
from aoscore.cm.unitconfig.manager import UnitConfigManager
from aoscore.common.errors import FailedError, WrongStateError
from aoscore.common.types import ConfigState, ErrorInfo, NodeConfigStatus
from tests.support.running import running, until
from tests.unit.cm.fakes import FakeNodes, unit_node


def config(version: str, priority: int = 1) -> UnitConfig:
    return UnitConfig(
        version=version,
        nodes=(
            NodeConfig(node_group_subject=Identity(codename="main"), priority=priority),
            NodeConfig(node_group_subject=Identity(codename="other"), node=Identity(codename="b"), priority=7),
        ),
    )


def test_part_of_a_node() -> None:
    of_type = pick_node_config(config("1.0.0"), "a", "main")
    assert (of_type.priority, of_type.node, of_type.version) == (1, Identity(codename="a"), "1.0.0")
    assert pick_node_config(config("1.0.0"), "b", "main").priority == 7
    empty = pick_node_config(config("1.0.0"), "c", "unknown")
    assert (empty.priority, empty.node_group_subject.codename) == (0, "unknown")
    assert json.loads(node_config_text(of_type)) == {
        "version": "1.0.0",
        "node": {"codename": "a"},
        "nodeGroupSubject": {"codename": "main"},
        "priority": 1,
    }


class FakeSms:
    """Nodes that keep their config as SMs do: answers hold the state before the request."""

    def __init__(self) -> None:
        self.configs: dict[str, tuple[str, int]] = {}
        self.refuse: set[str] = set()
        self.hanging: set[str] = set()
        self._released = asyncio.Event()
        self.calls: list[tuple[str, str]] = []

    def release(self) -> None:
        """What hangs goes on."""
        self.hanging.clear()
        self._released.set()

    async def get_node_config_status(self, node_id: str) -> NodeConfigStatus:
        self.calls.append(("get", node_id))
        version, _ = self.configs.get(node_id, ("", 0))
        return NodeConfigStatus(ConfigState.INSTALLED if version else ConfigState.ABSENT, version)

    async def check_node_config(self, node_id: str, config: str, version: str) -> NodeConfigStatus:
        self.calls.append(("check", node_id))
        return self._answer(node_id, version)

    async def set_node_config(self, node_id: str, config: str, version: str) -> NodeConfigStatus:
        self.calls.append(("set", node_id))
        if node_id in self.hanging:
            await self._released.wait()
        if node_id not in self.refuse or version == "1.0.0":
            self.configs[node_id] = (version, json.loads(config)["priority"])
        return self._answer(node_id, version)

    def _answer(self, node_id: str, version: str) -> NodeConfigStatus:
        error = ErrorInfo(1, 0, "no such label") if node_id in self.refuse else None
        return NodeConfigStatus(ConfigState.ABSENT, version, error)


class Bed:
    def __init__(self, path: Path, *node_ids: str) -> None:
        self.file = path / "aos_unit.cfg"
        self.nodes = FakeNodes(*(unit_node(node_id) for node_id in node_ids))
        self.sms = FakeSms()
        self.manager = UnitConfigManager(self.file, self.nodes, self.sms)


async def test_first_config(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "a", "b")
    async with running(bed.manager):
        assert bed.manager.status() == UnitConfigStatus(state=ConfigState.ABSENT)
        await bed.manager.check(config("1.0.0"))
        await bed.manager.update(config("1.0.0"))
        assert bed.sms.configs == {"a": ("1.0.0", 1), "b": ("1.0.0", 7)}
        assert bed.manager.status() == UnitConfigStatus(version="1.0.0", state=ConfigState.INSTALLED)
        assert bed.file.read_bytes() == to_json(config("1.0.0"))
        assert bed.manager.current() == config("1.0.0")
        assert bed.manager.node_config("b", "main").priority == 7


async def test_version_rules(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "a")
    async with running(bed.manager):
        await bed.manager.update(config("1.0.1"))
        bed.sms.calls.clear()
        await bed.manager.check(config("1.0.1"))
        await bed.manager.update(config("1.0.1"))
        assert bed.sms.calls == []
        for refused in (config("1.0.0"), config("1.0.1", priority=2)):
            with pytest.raises(WrongStateError):
                await bed.manager.check(refused)
            with pytest.raises(WrongStateError):
                await bed.manager.update(refused)


async def test_refusing_node_brings_all_back(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "a", "b")
    async with running(bed.manager):
        await bed.manager.update(config("1.0.0"))
        bed.sms.refuse.add("b")
        with pytest.raises(FailedError, match="node b: no such label"):
            await bed.manager.check(config("2.0.0", priority=9))
        with pytest.raises(FailedError, match="node b: no such label"):
            await bed.manager.update(config("2.0.0", priority=9))
        await until(lambda: bed.sms.configs == {"a": ("1.0.0", 1), "b": ("1.0.0", 7)})
        assert bed.manager.status().version == "1.0.0"
        assert bed.file.read_bytes() == to_json(config("1.0.0"))


async def test_update_that_is_not_wanted_any_more_leaves_no_node_behind(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "a", "b")
    async with running(bed.manager):
        await bed.manager.update(config("1.0.0"))
        bed.sms.hanging.add("b")
        bed.sms.calls.clear()
        update = asyncio.create_task(bed.manager.update(config("2.0.0", priority=9)))
        await until(lambda: ("set", "b") in bed.sms.calls)
        assert bed.sms.configs["a"] == ("2.0.0", 9)
        update.cancel()
        await asyncio.wait({update})
        bed.sms.hanging.clear()
        await until(lambda: bed.sms.configs == {"a": ("1.0.0", 1), "b": ("1.0.0", 7)})
        assert bed.manager.current() == config("1.0.0")


async def test_node_that_connects_in_the_middle_of_an_update_gets_the_new_config(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "a")
    async with running(bed.manager):
        bed.sms.hanging.add("a")
        update = asyncio.create_task(bed.manager.update(config("1.0.0")))
        await until(lambda: ("set", "a") in bed.sms.calls)
        bed.nodes.set(unit_node("b"))
        await asyncio.sleep(0.01)  # it is looked at while there is no config yet
        bed.sms.release()
        await update
        await until(lambda: bed.sms.configs == {"a": ("1.0.0", 1), "b": ("1.0.0", 7)})


async def test_node_that_connects_is_configured_once(tmp_path: Path) -> None:
    Bed(tmp_path).file.write_bytes(to_json(config("1.0.0")))
    bed = Bed(tmp_path)
    async with running(bed.manager):
        bed.nodes.set(unit_node("a"))
        bed.nodes.set(unit_node("a", max_dmips=5))
        await asyncio.sleep(0.01)
        assert bed.sms.calls == [("get", "a"), ("set", "a")]
        bed.nodes.set(unit_node("a", connected=False))
        bed.nodes.set(unit_node("a"))
        await asyncio.sleep(0.01)
        assert bed.sms.calls == [("get", "a"), ("set", "a"), ("get", "a")]


async def test_broken_file_is_mended_by_the_cloud(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "a")
    bed.file.write_text("{")
    async with running(bed.manager):
        status = bed.manager.status()
        assert status.state is ConfigState.FAILED
        assert status.error_info is not None
        await bed.manager.update(config("1.0.0"))
        assert bed.manager.status() == UnitConfigStatus(version="1.0.0", state=ConfigState.INSTALLED)
