import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from aoscore.common.errors import AlreadyExistsError, NotFoundError
from aoscore.iam.iamserver import openports
from aoscore.iam.iamserver.openports import LimitedService, address_at
from tests.support.running import running, until


def test_address_of_an_interface(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert address_at(":8089", "lo") == "127.0.0.1:8089"
    assert address_at("0.0.0.0:8089", "lo") == "127.0.0.1:8089"
    with pytest.raises(NotFoundError, match=r"'nothing0' .* has no address"):
        address_at(":8089", "nothing0")
    table = tmp_path / "if_inet6"
    table.write_text(
        "fe800000000000000000000000000001 02 40 20 80     six0\n20010db8000000000000000000000001 02 40 00 80     six0\n"
    )
    monkeypatch.setattr(openports, "_IF_INET6", table)
    assert address_at(":8089", "six0") == "[2001:db8::1]:8089"


class Port:
    def __init__(self) -> None:
        self.open = False

    async def run(self, started: Callable[[], None]) -> None:
        self.open = True
        started()
        try:
            await asyncio.Event().wait()
        finally:
            self.open = False


async def test_port_closes_when_nobody_has_come() -> None:
    port, now = Port(), 100.0
    async with running(LimitedService(port, 0.05, lambda: 100.0, now_s=lambda: now)) as task:
        assert port.open
        await asyncio.sleep(0.15)
        assert port.open
        now = 100.06
        await until(lambda: not port.open)
        await asyncio.sleep(0.1)
        assert not task.done()


async def test_use_keeps_it_open_and_a_failure_is_one() -> None:
    port = Port()
    used = [0.0]
    async with running(LimitedService(port, 10, lambda: used[0], now_s=lambda: 9.99)):
        await asyncio.sleep(0.05)
        assert port.open

    class Taken:
        async def run(self, started: Callable[[], None]) -> None:
            raise AlreadyExistsError("taken")

    with pytest.raises(ExceptionGroup) as caught:
        async with running(LimitedService(Taken(), 10, lambda: 0.0, now_s=lambda: 0.0)):
            pass
    assert isinstance(caught.value.exceptions[0], AlreadyExistsError)
