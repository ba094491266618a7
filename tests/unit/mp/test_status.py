"""Lines about links: what they count, when they come."""

import asyncio
import logging
import os
import signal
from pathlib import Path

import pytest

from aoscore.common.errors import FailedError
from aoscore.mp.status import Status, ask
from tests.support.links import contexts, linked
from tests.support.pki import TestCa
from tests.support.running import running, until


async def test_counts_of_a_link_on_a_signal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ca = TestCa()
    tls = contexts("gateway", ca.identity(tmp_path, "main")), contexts("node", ca.identity(tmp_path, "second"))
    status = Status()
    async with running(status), linked(*tls) as link:
        os.kill(os.getpid(), signal.SIGUSR1)
        await until(lambda: "there is none" in caplog.text)
        with status.watching(link.gateway):
            stream = await link.node.connect(17)
            await stream.send(bytes(5000))
            await (await link.gateway.accept(17)).receive()
            os.kill(os.getpid(), signal.SIGUSR1)
            await until(lambda: "Status of link: nodeID" in caplog.text)
    (line,) = (one.getMessage() for one in caplog.records if "Status of link: nodeID" in one.getMessage())
    assert "damaged=0" in line and "opened=1" in line and "queued_bytes=0" in line
    count = link.gateway.counters
    assert count.frames_in >= 4 and count.bytes_in > 5000 and count.download_bytes > 5000
    assert link.node.counters.bytes_out > 5000 and link.node.counters.frames_out >= 4


async def test_lines_come_by_themselves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ca = TestCa()
    tls = contexts("gateway", ca.identity(tmp_path, "main")), contexts("node", ca.identity(tmp_path, "second"))
    status = Status(period_s=0.01)
    async with running(status), linked(*tls) as link:
        with status.watching(link.node):
            await until(lambda: caplog.text.count("Status of link: nodeID") >= 2)
    assert "there is none" not in caplog.text


async def test_somebody_else_asks(tmp_path: Path) -> None:
    ca = TestCa()
    tls = contexts("gateway", ca.identity(tmp_path, "main")), contexts("node", ca.identity(tmp_path, "second"))
    # Deeper than the path of a socket may be long.
    directory = tmp_path.joinpath(*["deep" * 20] * 3)
    directory.mkdir(parents=True)
    (directory / "status.sock").write_text("left over")
    status = Status(directory)
    async with running(status), linked(*tls) as link:
        assert await asyncio.to_thread(ask, directory) == "Status of link: there is none\n"
        with status.watching(link.gateway), status.watching(link.node):
            first, second = (await asyncio.to_thread(ask, directory)).splitlines()
            assert "peer=node" in first and "peer=gateway" in second
        assert (directory / "status.sock").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FailedError, match="no MP answers"):
        await asyncio.to_thread(ask, directory)
    with pytest.raises(FailedError, match="no MP answers"):
        await asyncio.to_thread(ask, tmp_path / "absent")
