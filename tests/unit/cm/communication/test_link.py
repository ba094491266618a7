"""The link against a cloud on loopback: connecting, moving messages, and everything that breaks."""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aoscore.cm.certnotes import CertificateNotes
from aoscore.cm.communication import discovery
from aoscore.cm.communication.envelope import Received
from aoscore.cm.communication.link import CloudLink, LinkSettings
from aoscore.cm.communication.messagelog import MessageLog
from aoscore.cm.communication.messages import (
    BlobUrls,
    DesiredStatus,
    Identity,
    RequestBlobUrls,
    StateAcceptance,
    StateRequest,
    UpdateState,
)
from aoscore.cm.communication.session import Session
from aoscore.cm.database import OWN_TABLES
from aoscore.common.aio import Worker
from aoscore.common.db import Database, Schema
from aoscore.common.errors import DeadlineError, NotFoundError, WrongStateError
from aoscore.common.tls import TlsIdentity
from tests.support.cloud import FakeCloud
from tests.support.pki import TestCa
from tests.support.running import running, until

SYSTEM = "unit-0042"
STATE = StateRequest(item=Identity(id="i"), subject=Identity(id="s"), instance=0, default=False)


class Identities:
    """The Unit's certificate, or none."""

    def __init__(self, identity: TlsIdentity | None = None) -> None:
        self.identity = identity
        self.asked = 0

    async def online_identity(self) -> TlsIdentity:
        self.asked += 1
        if self.identity is None:
            raise NotFoundError("no certificate")
        return self.identity


@pytest.fixture
async def cloud() -> AsyncIterator[FakeCloud]:
    async with FakeCloud(SYSTEM).running() as cloud:
        yield cloud


def make_link(worker: Worker, url: str, identities: Identities | None = None, **more: Any) -> CloudLink:
    values: dict[str, Any] = {
        "response_timeout_s": 0.5,
        "reconnect_first_s": 0.02,
        "reconnect_limit_s": 0.1,
        "ping_period_s": 0.0,
    }
    settings = LinkSettings(discovery_url=url, **(values | more.pop("settings", {})))
    return CloudLink(SYSTEM, settings, identities or Identities(), worker, **more)


async def test_discovery_handshake_and_messages_both_ways(worker: Worker, cloud: FakeCloud) -> None:
    link = make_link(worker, cloud.discovery_url)
    got: list[DesiredStatus] = []

    async def on_desired(message: DesiredStatus) -> None:
        got.append(message)

    link.on(DesiredStatus, on_desired)
    with link.connection.subscribe() as events:
        async with running(link):
            await link.wait_connected()
            assert await events.get() is True and link.connected
            await cloud.connected()
            assert cloud.discoveries == [{"version": 7, "systemId": SYSTEM, "supportedProtocols": ["wss"]}]
            headers = cloud.handshakes[0]
            assert headers["Authorization"] == "Bearer token-1" and headers["Accept"] == "application/json"
            assert "Sec-WebSocket-Extensions" not in headers and "Origin" not in headers
            await link.send(STATE)
            sent = await cloud.next("stateRequest")
            assert sent["header"]["version"] == 7 and sent["header"]["systemId"] == SYSTEM
            for text in (False, True):
                txn = await cloud.send_frame({"messageType": "desiredStatus", "items": [], "n": text}, text=text)
                await until(lambda: txn in [frame["header"]["txn"] for frame in cloud.frames])  # noqa: B023
            await until(lambda: len(got) == 2)
        assert events.get_nowait() is False and not link.connected


async def test_large_and_fragmented_messages(worker: Worker, cloud: FakeCloud) -> None:
    link = make_link(worker, cloud.discovery_url)
    sizes: list[int] = []

    async def on_state(message: UpdateState) -> None:
        sizes.append(len(message.state))

    link.on(UpdateState, on_state)
    ident = {"item": {"id": "i"}, "subject": {"id": "s"}, "instance": 0}
    async with running(link):
        await cloud.connected()
        await cloud.send_frame({"messageType": "updateState", **ident, "state": "x" * 4_000_000})
        await until(lambda: sizes == [4_000_000])


async def test_pings_of_the_cloud_are_answered(worker: Worker, cloud: FakeCloud) -> None:
    async with running(make_link(worker, cloud.discovery_url)):
        await cloud.connected()
        await cloud.sockets[0].ping(b"are you there")
        await link_is_alive(cloud)


async def link_is_alive(cloud: FakeCloud) -> None:
    txn = await cloud.send_frame({"messageType": "desiredStatus"})
    await until(lambda: any(frame["header"]["txn"] == txn for frame in cloud.frames))


async def test_a_message_without_an_ack_goes_out_four_times(worker: Worker, cloud: FakeCloud) -> None:
    cloud.acks = False
    link = make_link(worker, cloud.discovery_url, settings={"response_timeout_s": 0.05})
    async with running(link):
        await link.send(STATE)
        await asyncio.sleep(0.5)
        assert [frame["data"]["messageType"] for frame in cloud.frames] == ["stateRequest"] * 4
        assert len({json.dumps(frame) for frame in cloud.frames}) == 1


async def test_defect_3_what_is_queued_offline_leaves_once_after_connecting(worker: Worker) -> None:
    """AosCore 9.1 sends it twice, and burns a core meanwhile (observed.md, defect 3)."""
    cloud = FakeCloud(SYSTEM)
    async with cloud.running():
        url = cloud.discovery_url
    link = make_link(worker, url, settings={"response_timeout_s": 0.2})
    async with running(link):
        await link.send(STATE)
        await asyncio.sleep(0.4)
        async with cloud.running():
            await cloud.next("stateRequest")
            await asyncio.sleep(0.3)
            assert len(cloud.frames) == 1


async def test_defect_3_what_waits_costs_nothing(
    worker: Worker, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AosCore 9.1 burns a core offline, and 17 % of one while a single message waits for its ack (observed.md)."""
    looks = 0
    transmit = Session.transmit

    def counted(self: Session, *, now: float) -> list[bytes]:
        nonlocal looks
        looks += 1
        return transmit(self, now=now)

    monkeypatch.setattr(Session, "transmit", counted)
    nowhere = make_link(worker, "http://127.0.0.1:1/")
    async with running(nowhere):
        for _ in range(100):
            await nowhere.send(STATE)
        await asyncio.sleep(0.3)
    assert looks == 0
    cloud.acks = False
    link = make_link(worker, cloud.discovery_url)
    async with running(link):
        await link.send(STATE)
        await cloud.next("stateRequest")
        await asyncio.sleep(0.3)
    assert looks <= 3


async def test_blob_urls_are_asked_for_and_answered(worker: Worker, cloud: FakeCloud) -> None:
    link = make_link(worker, cloud.discovery_url)
    async with running(link):
        asking = asyncio.create_task(link.request(RequestBlobUrls(digests=("sha256:0",)), BlobUrls))
        asked = (await cloud.next("requestBlobUrls"))["data"]
        assert asked["digests"] == ["sha256:0"]
        answer = {"messageType": "blobUrls", "correlationId": asked["correlationId"], "items": []}
        await cloud.send_frame(answer)
        assert (await asking).correlation_id == asked["correlationId"]


async def test_an_unanswered_question_is_withdrawn_and_a_late_answer_ignored(worker: Worker, cloud: FakeCloud) -> None:
    cloud.acks = False
    link = make_link(worker, cloud.discovery_url, settings={"response_timeout_s": 0.2})
    async with running(link):
        await link.wait_connected()
        with pytest.raises(DeadlineError, match="requestBlobUrls"):
            await link.request(RequestBlobUrls(digests=("sha256:0",)), BlobUrls)
        asked = (await cloud.next("requestBlobUrls"))["data"]
        await cloud.send_frame({"messageType": "blobUrls", "correlationId": asked["correlationId"], "items": []})
        await asyncio.sleep(0.5)
        assert [frame["data"]["messageType"] for frame in cloud.frames] == ["requestBlobUrls", "ack"]


async def test_one_topic_keeps_its_order_and_does_not_hold_up_another(worker: Worker, cloud: FakeCloud) -> None:
    link = make_link(worker, cloud.discovery_url)
    order: list[str] = []
    gate = asyncio.Event()

    async def slow(message: StateAcceptance) -> None:
        await gate.wait()
        order.append("acceptance")

    async def fast(message: UpdateState) -> None:
        order.append("update")

    async def other(message: DesiredStatus) -> None:
        order.append("desired")
        gate.set()

    link.on(StateAcceptance, slow, topic="state")
    link.on(UpdateState, fast, topic="state")
    link.on(DesiredStatus, other)
    with pytest.raises(WrongStateError):
        link.on(DesiredStatus, other)
    ident = {"item": {"id": "i"}, "subject": {"id": "s"}, "instance": 0}
    async with running(link):
        await cloud.connected()
        await cloud.send_frame({"messageType": "stateAcceptance", **ident, "result": "accepted"})
        await cloud.send_frame({"messageType": "updateState", **ident})
        await cloud.send_frame({"messageType": "desiredStatus"})
        await until(lambda: len(order) == 3)
    assert order == ["desired", "acceptance", "update"]


async def test_nonsense_and_failing_handlers_do_no_harm(worker: Worker, cloud: FakeCloud) -> None:
    unreadable: list[str] = []
    problems: list[str] = []
    link = make_link(worker, cloud.discovery_url, unreadable=lambda error: unreadable.append(str(error)))

    async def fail(received: Received) -> None:
        problems.extend(str(problem) for problem in received.problems)
        raise NotFoundError("not today")

    link.on_received(DesiredStatus, fail)
    async with running(link):
        await cloud.connected()
        await cloud.sockets[0].send_bytes(b"{ not json")
        await cloud.sockets[0].send_bytes(b'{"header": {"version": 6}, "data": {}}')
        await cloud.send_frame({"messageType": "nobodyKnowsMe"})
        await cloud.send_frame({"messageType": "requestLog"})
        await cloud.send_frame({"messageType": "desiredStatus", "subjects": [{"type": "group"}]})
        await link_is_alive(cloud)
        assert len(cloud.handshakes) == 1
    assert [text.partition(":")[0] for text in unreadable] == [
        "message from the cloud is not JSON",
        "message from the cloud has protocol version 6, not 7",
        "unknown message from the cloud",
        "requestLog from the cloud",
    ]
    assert problems == ["subjects[0].identity: missing"]


async def test_a_lost_connection_comes_back(worker: Worker, cloud: FakeCloud) -> None:
    link = make_link(worker, cloud.discovery_url)
    async with running(link):
        for number in range(1, 4):
            await until(lambda: len(cloud.sockets) == number and link.connected)  # noqa: B023
            if number == 2:
                await cloud.sockets[-1].close(code=1001)
            else:
                transport = cloud.sockets[-1]._req.transport  # type: ignore[union-attr]
                assert transport is not None
                transport.abort()
        assert len(cloud.discoveries) == 1  # the answer is used again


async def test_a_refused_token_leads_to_new_discovery(worker: Worker, cloud: FakeCloud) -> None:
    cloud.discovery = {"authToken": "stale"}
    link = make_link(worker, cloud.discovery_url)
    async with running(link):
        await until(lambda: len(cloud.handshakes) >= 2)
        cloud.discovery = {}
        await cloud.connected()
        assert len(cloud.discoveries) == len(cloud.handshakes)


async def test_of_several_addresses_the_good_one_is_found(worker: Worker, cloud: FakeCloud) -> None:
    cloud.discovery = {"connectionInfo": ["ws://127.0.0.1:1/x", "nonsense", cloud.ws_url]}
    async with running(make_link(worker, cloud.discovery_url)):
        await cloud.connected()
        assert len(cloud.discoveries) == 1


async def test_a_redirect_is_followed(worker: Worker, cloud: FakeCloud) -> None:
    async with FakeCloud(SYSTEM).running() as first:
        first.discovery = {"errorCode": 1, "connectionInfo": [cloud.discovery_url]}
        async with running(make_link(worker, first.discovery_url)):
            await cloud.connected()


@pytest.mark.parametrize("trouble", [{"errorCode": 3}, {"errorCode": 2}, {"connectionInfo": []}])
async def test_a_refusing_discovery_is_asked_again(worker: Worker, cloud: FakeCloud, trouble: dict[str, Any]) -> None:
    cloud.discovery = trouble
    async with running(make_link(worker, cloud.discovery_url)):
        await until(lambda: len(cloud.discoveries) >= 3)
        assert not cloud.handshakes
        cloud.discovery = {}
        await cloud.connected()


async def test_defect_5_stop_while_the_discovery_server_is_silent(worker: Worker) -> None:
    """AosCore 9.1 cannot be stopped then (observed.md, defect 5)."""
    accepted = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with asyncio.timeout(5):
            async with running(make_link(worker, url)):
                await accepted.wait()


async def test_a_dead_link_is_noticed(worker: Worker, cloud: FakeCloud) -> None:
    """The cloud keeps the TCP connection open and says nothing more."""
    link = make_link(worker, cloud.discovery_url, settings={"ping_period_s": 0.05})
    async with running(link):
        await cloud.connected()
        await asyncio.sleep(0.3)
        assert len(cloud.handshakes) == 1  # answered pings are enough
        transport = cloud.sockets[0]._req.transport  # type: ignore[union-attr]
        assert transport is not None
        transport.pause_reading()
        await until(lambda: len(cloud.handshakes) == 2)


async def test_a_cloud_that_takes_no_more_data_is_dropped_on_stop(worker: Worker, cloud: FakeCloud) -> None:
    link = make_link(worker, cloud.discovery_url)
    async with asyncio.timeout(8):
        async with running(link):
            await cloud.connected()
            transport = cloud.sockets[0]._req.transport  # type: ignore[union-attr]
            assert transport is not None
            transport.pause_reading()
            for _ in range(64):
                await link.send(UpdateState(item=Identity(id="i"), subject=Identity(id="s"), state="x" * 1_000_000))
            await asyncio.sleep(0.1)


class Tls:
    """A cloud with mutual TLS and a Unit's certificate."""

    def __init__(self, directory: Path, server_ca: TestCa, unit_ca: TestCa) -> None:
        (directory / "cloud").mkdir()
        (directory / "unit").mkdir()
        server_ca.issue("cloud", dns=("localhost",)).write(directory / "cloud", "cloud")
        trusted = server_ca.write_root(directory / "cloud")
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(directory / "cloud" / "cloud.pem", directory / "cloud" / "cloud.key")
        self.context.load_verify_locations(trusted)
        self.context.verify_mode = ssl.CERT_REQUIRED
        cert_url, key_url = unit_ca.issue("unit").write(directory / "unit", "online")
        self.unit = TlsIdentity(trusted, cert_url, key_url)
        self.foreign = TlsIdentity(unit_ca.write_root(directory / "unit"), cert_url, key_url)


async def test_mutual_tls_with_the_online_certificate(worker: Worker, tmp_path: Path) -> None:
    ca = TestCa()
    tls = Tls(tmp_path, ca, ca)
    identities = Identities(tls.unit)
    async with FakeCloud(SYSTEM, tls.context).running() as cloud:
        async with running(make_link(worker, cloud.discovery_url, identities)):
            await cloud.connected()
            await cloud.sockets[-1].close()
            await until(lambda: len(cloud.handshakes) == 2)
    assert identities.asked == 2  # for each connection, so that a renewed certificate is used


async def test_what_the_certificate_says_is_read_once(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over restarts, too: the X.509 library takes 9 MB."""
    ca = TestCa()
    tls = Tls(tmp_path, ca, ca)
    read = 0

    def certificate_urls(certificate: object) -> list[str]:
        nonlocal read
        read += 1
        return [cloud.discovery_url]

    monkeypatch.setattr(discovery, "certificate_urls", certificate_urls)
    async with (
        Database(tmp_path / "cm.db", Schema(create=OWN_TABLES)) as database,
        FakeCloud(SYSTEM, tls.context).running() as cloud,
    ):
        for number in (1, 2):
            notes = CertificateNotes(database)
            await notes.load()
            async with running(make_link(worker, "http://configured/sd/v7/", Identities(tls.unit), notes=notes)):
                await until(lambda: len(cloud.handshakes) == number)  # noqa: B023
    assert read == 1


async def test_a_cloud_with_a_foreign_certificate_gets_nothing(
    worker: Worker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tls = Tls(tmp_path, TestCa("Cloud"), TestCa("Unit"))
    async with FakeCloud(SYSTEM, tls.context).running() as cloud:
        async with running(make_link(worker, cloud.discovery_url, Identities(tls.foreign))) as task:
            await until(lambda: caplog.text.count("Can't connect to the cloud") >= 2)
            assert not task.done()
        assert cloud.discoveries == []
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text


async def test_a_cloud_that_refuses_our_certificate(
    worker: Worker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tls = Tls(tmp_path, TestCa("Cloud"), TestCa("Unit"))
    async with FakeCloud(SYSTEM, tls.context).running() as cloud:
        async with running(make_link(worker, cloud.discovery_url, Identities(tls.unit))) as task:
            await until(lambda: caplog.text.count("Can't connect to the cloud") >= 2)
            assert not task.done()
        assert cloud.discoveries == []


async def test_no_certificate_no_tls(worker: Worker, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ca = TestCa()
    async with FakeCloud(SYSTEM, Tls(tmp_path, ca, ca).context).running() as cloud:
        async with running(make_link(worker, cloud.discovery_url)):
            await until(lambda: caplog.text.count("Can't connect to the cloud") >= 2)
    assert "No certificate for the cloud" in caplog.text


async def test_message_log_masks_secrets(worker: Worker, cloud: FakeCloud, tmp_path: Path) -> None:
    path = tmp_path / "log" / "messages"
    async with running(make_link(worker, cloud.discovery_url, message_log=MessageLog(path))):
        await cloud.connected()
        request = {"messageType": "startProvisioningRequest", "node": {"codename": "n"}, "PassWord": "hush"}
        await cloud.send_frame(request)
        await link_is_alive(cloud)
    lines = path.read_text().splitlines()
    assert lines[0].startswith("RX: {") and "startProvisioningRequest" in lines[0]
    assert any(line.startswith("TX: {") and '"ack"' in line for line in lines)
    assert "hush" not in path.read_text() and "***" in path.read_text()


async def test_a_message_log_on_a_full_disk_does_not_end_the_link(
    worker: Worker, cloud: FakeCloud, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(make_link(worker, cloud.discovery_url, message_log=MessageLog(Path("/dev/full")))):
        await cloud.connected()
        await link_is_alive(cloud)
    assert "Can't write the log of cloud messages: [Errno 28]" in caplog.text
    assert len(cloud.handshakes) == 1


def test_message_log_is_bounded(tmp_path: Path) -> None:
    log = MessageLog(tmp_path / "messages", limit_bytes=1000)
    for _ in range(100):
        log.write("TX", b'{"data": "' + b"x" * 100 + b'"}')
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2500
