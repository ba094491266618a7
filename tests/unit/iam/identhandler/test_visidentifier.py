"""The VIS identifier against a VIS server on loopback."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aoscore.common.aio import Worker
from aoscore.common.errors import DeadlineError
from aoscore.common.types import Duration, SystemInfo
from aoscore.iam.identhandler import visidentifier
from aoscore.iam.identhandler.visidentifier import FILE_NAME, VisIdentifier, VisIdentifierParams
from tests.support.pki import TestCa
from tests.support.running import running, until
from tests.support.vis import SUBJECTS, UNIT_MODEL, VIN, TestVis

INFO = SystemInfo("VIN-1", "model", "1.0")


@pytest.fixture
async def vis() -> AsyncIterator[TestVis]:
    async with TestVis().running() as vis:
        yield vis


def identifier(vis: TestVis, directory: Path, worker: Worker, *, timeout_s: float = 10, **more: Path) -> VisIdentifier:
    params = VisIdentifierParams(vis.url, web_socket_timeout=Duration(timeout_s), **more)
    return VisIdentifier(params, directory, worker, pause_s=0.02)


def tls(authority: TestCa, directory: Path, *, name: str = "localhost") -> ssl.SSLContext:
    authority.issue("vis", (name,)).write(directory, "vis")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "vis.pem", directory / "vis.key")
    return context


@pytest.mark.parametrize("as_object", [False, True])
async def test_identity_and_subjects(vis: TestVis, tmp_path: Path, worker: Worker, as_object: bool) -> None:
    vis.as_object = as_object
    one = identifier(vis, tmp_path, worker)
    async with running(one):
        assert await one.system_info() == INFO
        assert await one.subjects() == ("s1",)
        changes = one.subjects_changes.values()
        assert await anext(changes) == ("s1",)
        await vis.set(SUBJECTS, {SUBJECTS: ["s2", 3]} if as_object else ["s2", 3])
        assert await asyncio.wait_for(anext(changes), 5) == ("s2", "3")
        assert await one.subjects() == ("s2", "3")
    await until(lambda: vis.requests[-1]["action"] == "unsubscribeAll")
    assert [request["action"] for request in vis.requests[:2]] == ["subscribe", "get"], "nothing may be missed"


async def test_same_subjects_are_told_once_and_bad_ones_not(vis: TestVis, tmp_path: Path, worker: Worker) -> None:
    one = identifier(vis, tmp_path, worker)
    async with running(one):
        changes = one.subjects_changes.values()
        assert await asyncio.wait_for(anext(changes), 5) == ("s1",)
        (client,) = vis.clients
        for _ in range(3):
            await vis.notify(client, "0", ["s1"])
        await vis.notify(client, "0", "no list")
        await vis.notify(client, "77", ["not ours"])
        await client.socket.send_str("{broken")
        await client.socket.send_bytes(b"\xff\xfe")
        await client.socket.send_str(json.dumps({"action": "get", "requestId": "unknown", "value": 1}))
        await vis.notify(client, "0", ["s9"])
        assert await asyncio.wait_for(anext(changes), 5) == ("s9",)
    assert vis.connections == 1


async def test_change_while_disconnected_is_found_after_the_reconnect(
    vis: TestVis, tmp_path: Path, worker: Worker
) -> None:
    one = identifier(vis, tmp_path, worker)
    async with running(one):
        changes = one.subjects_changes.values()
        assert await asyncio.wait_for(anext(changes), 5) == ("s1",)
        vis.values.update({SUBJECTS: ["s2"], VIN: "VIN-2"})
        await vis.disconnect()
        assert await asyncio.wait_for(anext(changes), 5) == ("s2",)
        assert (await one.system_info()).system_id == "VIN-2"
        await vis.set(SUBJECTS, ["s3"])
        assert await asyncio.wait_for(anext(changes), 5) == ("s3",)
    assert vis.connections == 2


async def test_boot_without_the_service_knows_what_it_said_last(tmp_path: Path, worker: Worker) -> None:
    vis = TestVis()
    async with vis.running(), running(one := identifier(vis, tmp_path, worker)):
        await one.system_info()
        path = tmp_path / FILE_NAME
        assert path.stat().st_mode & 0o777 == 0o600
        written = path.stat().st_mtime_ns
        await vis.disconnect()
        await until(lambda: vis.connections == 2)
    again = identifier(vis, tmp_path, worker)
    async with running(again):
        assert await again.system_info() == INFO and await again.subjects() == ("s1",)
        changes = again.subjects_changes.values()
        vis.values[SUBJECTS] = ["s1"]
        # The connection before may have been cut before its first request.
        vis.requests.clear()
        async with vis.running():
            await until(lambda: vis.connections == 3 and len(vis.requests) == 4)
            assert path.stat().st_mtime_ns == written, "what did not change is not written"
            await vis.set(SUBJECTS, ["s2"])
            assert await asyncio.wait_for(anext(changes), 5) == ("s2",)


async def test_damaged_file_is_as_good_as_none(tmp_path: Path, worker: Worker) -> None:
    (tmp_path / FILE_NAME).write_text("{")
    vis = TestVis()
    async with running(one := identifier(vis, tmp_path, worker, timeout_s=0.05)):
        with pytest.raises(DeadlineError, match="has not told the identity of the Unit yet"):
            await one.system_info()
        with pytest.raises(DeadlineError):
            await one.subjects()


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (VIN, "", "no text for Attribute.Vehicle"),
        (UNIT_MODEL, "model", "not of the form model;version"),
        (UNIT_MODEL, 5, "no text for Attribute.Aos.UnitModel"),
        (SUBJECTS, "s1", "no list"),
    ],
)
async def test_nonsense_leads_to_another_try(
    vis: TestVis,
    tmp_path: Path,
    worker: Worker,
    caplog: pytest.LogCaptureFixture,
    path: str,
    value: object,
    reason: str,
) -> None:
    good = vis.values[path]
    vis.values[path] = value
    async with running(one := identifier(vis, tmp_path, worker)):
        await until(lambda: vis.connections >= 3)
        assert caplog.text.count(reason) == 1, "the same reason is told once"
        vis.values[path] = good
        assert await one.system_info() == INFO


async def test_refusals_and_silence_lead_to_another_try(
    vis: TestVis, tmp_path: Path, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    vis.subscribes = False
    async with running(one := identifier(vis, tmp_path, worker, timeout_s=0.2)):
        await until(lambda: "gives no id for the subscription" in caplog.text)
        vis.subscribes = True
        vis.silent.add(VIN)
        await until(lambda: "did not answer within 0.2 s" in caplog.text)
        vis.silent.clear()
        vis.broken.add(UNIT_MODEL)
        await until(lambda: "as 'set'" in caplog.text)
        vis.broken.clear()
        missing = vis.values.pop(SUBJECTS)
        await until(lambda: "404" in caplog.text)
        vis.values[SUBJECTS] = missing
        await until(lambda: one._known.is_set())


async def test_service_that_is_gone_without_a_word_is_noticed(
    vis: TestVis, tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visidentifier, "PING_PERIOD_S", 0.05)
    one = identifier(vis, tmp_path, worker)
    async with running(one):
        await one.system_info()
        await asyncio.sleep(0.3)
        assert vis.connections == 1, "a service that answers keeps its connection"
        monkeypatch.setattr("aoscore.common.websocket.WebSocket.ping", _no_ping)
        await until(lambda: vis.connections == 2)


async def _no_ping(self: object) -> None:
    """A ping that gets lost."""


async def test_tls_with_the_right_service_only(
    authority: TestCa, tmp_path: Path, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    root = authority.write_root(tmp_path)
    async with TestVis(tls(authority, tmp_path)).running() as vis:
        async with running(one := identifier(vis, tmp_path, worker, ca_cert_file=root)):
            assert await one.system_info() == INFO
    for wrong in (tls(authority, tmp_path, name="elsewhere"), tls(TestCa("foreign"), tmp_path)):
        caplog.clear()
        async with TestVis(wrong).running() as vis:
            async with running(identifier(vis, tmp_path, worker, ca_cert_file=root)):
                await until(lambda: "CERTIFICATE_VERIFY_FAILED" in caplog.text)
            assert vis.connections == 0
