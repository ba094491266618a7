"""The health check, and what is asked of systemctl."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from aoscore.common.errors import FailedError
from aoscore.sm.launcher.runtimes.health import ATTEMPTS, find_fault
from aoscore.sm.systemd import Systemd


async def check(*answers: str) -> tuple[str | None, list[float]]:
    """What is found when unit b is in these states, one an attempt, and the pauses."""
    pauses_s: list[float] = []
    left = list(answers)

    async def states_of(units: Sequence[str]) -> dict[str, str]:
        state = left.pop(0)
        if state == "error":
            raise FailedError("no bus")
        return {"a": "active", "b": state}

    async def sleep(pause_s: float) -> None:
        pauses_s.append(pause_s)

    return await find_fault(states_of, ("a", "b"), sleep=sleep), pauses_s


async def test_active_at_once_or_later() -> None:
    assert await check("active") == (None, [])
    assert await check("activating", "error", "inactive", "active") == (None, [10, 20, 40])


async def test_failed_is_wrong_at_once_others_get_time() -> None:
    assert await check("activating", "failed") == ("unit b has failed", [10])
    assert await check(*["inactive"] * ATTEMPTS) == ("unit b is inactive and not active", [10, 20, 40, 60])
    assert (await check(*["error"] * ATTEMPTS))[0] == "no bus"


@pytest.fixture
def systemctl(tmp_path: Path) -> Path:
    path = tmp_path / "systemctl"
    path.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\nprintf "active\\n\\nfailed\\n"\n')
    path.chmod(0o755)
    return path


async def test_states_come_in_the_order_of_the_units(systemctl: Path) -> None:
    systemd = Systemd(str(systemctl))
    assert await systemd.active_states(["x", "-y"]) == {"x": "active", "-y": "failed"}
    assert await systemd.active_states([]) == {}
    with pytest.raises(FailedError, match="2 states of the 1 units z"):
        await systemd.active_states(["z"])
    await systemd.reboot()
    calls = (systemctl.parent / "calls").read_text().splitlines()
    assert calls[0] == "show --value --property=ActiveState -- x -y"
    assert calls[-1] == "start --no-block --job-mode=replace-irreversibly aos-reboot.service"
