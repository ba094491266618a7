"""Lines about links: what they count, when they come."""

import logging
import os
import signal
from pathlib import Path

import pytest

from aoscore.mp.status import Status
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
