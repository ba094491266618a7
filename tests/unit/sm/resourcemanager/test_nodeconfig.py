"""Node configuration: states, version rule, answers, and that a bad one changes nothing."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aoscore.common.aio import Worker
from aoscore.common.types import AlertRulePercents, ConfigState
from aoscore.sm.resourcemanager.nodeconfig import NodeConfigManager

GOOD = '{"nodeGroupSubject": {"codename": "main"}, "alertRules": {"CPU": {"minThreshold": 1, "maxThreshold": 2.5}}}'


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async with Worker("test") as one:
        yield one


@pytest.fixture
async def manager(tmp_path: Path, worker: Worker) -> NodeConfigManager:
    manager = NodeConfigManager(tmp_path / "aos_node.cfg", worker)
    await manager.load()
    return manager


async def test_absent_until_set_and_read_again(tmp_path: Path, worker: Worker, manager: NodeConfigManager) -> None:
    assert manager.status().state is ConfigState.ABSENT
    with manager.changed.subscribe() as changes:
        answer = await manager.update(GOOD, "1.0.0")
        # As AosCore 9.1: the answer has the state before (observed.md, 8).
        assert (answer.state, answer.version, answer.error) == (ConfigState.ABSENT, "1.0.0", None)
        config = changes.get_nowait()
    assert config.alert_rules is not None
    assert config.alert_rules.cpu == AlertRulePercents(1, 2.5)
    assert manager.status().state is ConfigState.INSTALLED
    assert (tmp_path / "aos_node.cfg").stat().st_mode & 0o777 == 0o600

    again = NodeConfigManager(tmp_path / "aos_node.cfg", worker)
    await again.load()
    assert again.current == config
    assert again.status().version == "1.0.0"


@pytest.mark.parametrize(
    ("version", "code", "text"),
    [("1.2.0", 8, "set already"), ("1.1.9", 9, "wrong version"), ("two", 6, "no semantic version")],
)
async def test_version_rule(manager: NodeConfigManager, version: str, code: int, text: str) -> None:
    await manager.update(GOOD, "1.2.0")
    for answer in (manager.check(GOOD, version), await manager.update(GOOD, version)):
        assert answer.state is ConfigState.INSTALLED
        assert answer.version == version
        assert answer.error is not None
        assert answer.error.aos_code == code
        assert text in answer.error.message
    assert manager.status().version == "1.2.0"


@pytest.mark.parametrize("bad", ["{bad json", "[]", '{"priority": 1}', '{"nodeGroupSubject": {"codename": 5}}'])
async def test_bad_document_is_answered_and_changes_nothing(
    manager: NodeConfigManager, tmp_path: Path, bad: str
) -> None:
    await manager.update(GOOD, "1.0.0")
    stored = (tmp_path / "aos_node.cfg").read_bytes()
    for answer in (manager.check(bad, "1.0.1"), await manager.update(bad, "1.0.1")):
        assert answer.error is not None
        assert answer.error.aos_code == 6
        assert "node configuration" in answer.error.message
    assert manager.status().version == "1.0.0"
    assert (tmp_path / "aos_node.cfg").read_bytes() == stored


async def test_write_error_keeps_the_old_one_in_use(tmp_path: Path, worker: Worker) -> None:
    manager = NodeConfigManager(tmp_path / "no such directory" / "aos_node.cfg", worker)
    await manager.load()
    answer = await manager.update(GOOD, "1.0.0")
    assert answer.error is not None
    assert answer.error.aos_code == 2
    assert manager.current is None


async def test_damaged_file_is_reported_and_replaced(tmp_path: Path, worker: Worker) -> None:
    (tmp_path / "aos_node.cfg").write_text("{")
    manager = NodeConfigManager(tmp_path / "aos_node.cfg", worker)
    await manager.load()
    status = manager.status()
    assert status.state is ConfigState.FAILED
    assert status.error is not None
    answer = await manager.update(GOOD, "0.0.1")
    assert (answer.state, answer.error) == (ConfigState.FAILED, None)
    assert manager.status().state is ConfigState.INSTALLED
