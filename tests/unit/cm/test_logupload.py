"""Upload of logs by HTTPS: what the server gets, what the cloud is told, and that the token stays secret."""

import asyncio
import base64
import logging
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aoscore.cm import logupload
from aoscore.cm.communication.messages import (
    Identity,
    LogFilter,
    LogType,
    Message,
    PushLog,
    RequestLog,
    UploadOptions,
    UploadType,
)
from aoscore.cm.logs import MAX_OPEN_UPLOADS, LogForwarder
from aoscore.cm.logupload import LogUploads, Upload
from aoscore.common.aio import Backoff
from aoscore.common.errors import InvalidArgumentError, NotFoundError
from aoscore.common.tls import TlsRoots
from aoscore.common.types import LogData, LogRequest, LogStatus
from tests.support.logserver import LogServer
from tests.support.pki import TestCa
from tests.support.running import running
from tests.unit.cm.fakes import FakeLink

TOKEN = "s3cret-token~+/=="
NOW = datetime(2026, 3, 1, tzinfo=UTC)


class FakeSource:
    def __init__(self) -> None:
        self.asked: list[str] = []

    async def request_log(self, node_id: str, request: LogRequest) -> None:
        if node_id == "gone":
            raise NotFoundError("node gone is not connected")
        self.asked.append(node_id)


class Bench:
    """Forwarder and uploads between a link, nodes and a server."""

    def __init__(self, server: LogServer, uploads: LogUploads, link: FakeLink) -> None:
        self.server = server
        self.link = link
        self.source = FakeSource()
        self.forwarder = LogForwarder(link, self.source, uploads, node_ids=lambda: ["a", "b"])

    async def request(self, *node_ids: str, correlation_id: str = "c", **options: Any) -> None:
        wanted = {"type": UploadType.HTTPS, "url": self.server.url, "bearer_token": TOKEN, **options}
        await self.forwarder.on_request(
            RequestLog(
                correlation_id=correlation_id,
                log_type=LogType.SYSTEM,
                filter=LogFilter(node_ids=tuple(Identity(codename=node_id) for node_id in node_ids)),
                upload_options=UploadOptions(**wanted),
            )
        )

    async def log(self, node_id: str, part: int, count: int, correlation_id: str = "c") -> None:
        data = f"{node_id}{part}".encode()
        await self.forwarder.on_log(node_id, LogData(correlation_id, LogStatus.OK, count, part, data))

    async def until(self, received: int = 0, sent: int = 0) -> list[PushLog]:
        """Wait for so many uploads and messages; the messages."""
        async with asyncio.timeout(20):
            while len(self.server.received) < received or len(self.link.sent) < sent:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0)
        assert (len(self.server.received), len(self.link.sent)) == (received, sent)
        return [message for message in self.link.sent if isinstance(message, PushLog)]


@pytest.fixture(scope="module")
def ca() -> TestCa:
    return TestCa()


@pytest.fixture
async def bench(tmp_path: Path, ca: TestCa) -> AsyncIterator[Bench]:
    link = FakeLink()
    context = TlsRoots(ca.write_root(tmp_path)).ssl_client_context()
    uploads = LogUploads(link, ssl_context=context, backoff=lambda: Backoff(0.01, 0.02), now=lambda: NOW)
    async with LogServer().running(tmp_path, ca) as server, running(uploads):
        yield Bench(server, uploads, link)


async def test_parts_go_to_the_server_and_not_to_the_link(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await bench.request()
    assert bench.source.asked == ["a", "b"]
    for node_id, part in (("a", 1), ("b", 1), ("a", 2)):
        await bench.log(node_id, part, 2 if node_id == "a" else 1)
    await bench.until(received=3)
    assert bench.server.received[0] == {
        "messageType": "pushLog",
        "correlationId": "c",
        "node": {"codename": "a"},
        "part": 1,
        "partsCount": 2,
        "content": base64.b64encode(b"a1").decode(),
        "status": "ok",
    }
    assert [base64.b64decode(body["content"]) for body in bench.server.received] == [b"a1", b"b1", b"a2"]
    headers = bench.server.headers[0]
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert headers["Content-Type"] == "application/json"
    assert headers["target"] == "/upload?key=hidden"
    assert bench.forwarder._open == {}, "the token is forgotten with the last part"
    await bench.log("a", 1, 1)
    await bench.until(received=3, sent=1)
    assert TOKEN not in caplog.text and "hidden" not in caplog.text


async def test_a_node_that_is_away_is_uploaded_as_absent(bench: Bench) -> None:
    await bench.request("gone")
    await bench.until(received=1)
    (body,) = bench.server.received
    assert (body["node"], body["status"], body["errorInfo"]["aosCode"]) == ({"codename": "gone"}, "absent", 5)


async def test_a_busy_server_is_asked_again(bench: Bench) -> None:
    bench.server.statuses = [503, 429, 200]
    await bench.request("a")
    await bench.log("a", 1, 1)
    await bench.until(received=3)


@pytest.mark.parametrize(("status", "tries"), [(401, 1), (307, 1), (503, 3)])
async def test_a_refusal_is_told_once_for_each_node(
    bench: Bench, caplog: pytest.LogCaptureFixture, status: int, tries: int
) -> None:
    caplog.set_level(logging.DEBUG)
    bench.server.statuses = [status]
    await bench.request()
    for node_id in ("a", "b"):
        for part in (1, 2, 3):
            await bench.log(node_id, part, 3)
    told = await bench.until(received=tries, sent=2)
    for node_id, answer in zip("ab", told, strict=True):
        assert (answer.correlation_id, answer.node.codename, answer.part, answer.parts_count) == ("c", node_id, 1, 3)
        assert (answer.status, answer.content) == (LogStatus.ERROR, b"")
        assert answer.error_info is not None
        assert answer.error_info.message.endswith(f"/upload answered {status} to the upload of a log")
    assert TOKEN not in caplog.text and "hidden" not in caplog.text


async def test_a_foreign_server_gets_no_token(tmp_path: Path, bench: Bench) -> None:
    (tmp_path / "foreign").mkdir()
    async with LogServer().running(tmp_path / "foreign", TestCa("Foreign")) as foreign:
        await bench.request("a", url=foreign.url)
        await bench.log("a", 1, 1)
        (told,) = await bench.until(sent=1)
        assert foreign.headers == []
    assert told.status is LogStatus.ERROR and told.error_info is not None
    assert "TLS" in told.error_info.message and "hidden" not in told.error_info.message


async def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, ca: TestCa) -> None:
    link = FakeLink()
    uploads = LogUploads(link, timeout_s=0.1, backoff=lambda: Backoff(0.01, 0.02))
    # Connections are made by the kernel and taken by nobody.
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with running(uploads):
            url = f"https://127.0.0.1:{server.getsockname()[1]}/"
            uploads.put(Upload(options(url=url)), part("a"))
            async with asyncio.timeout(20):
                while not link.sent:
                    await asyncio.sleep(0.01)
    assert isinstance(link.sent[0], PushLog) and link.sent[0].error_info is not None
    assert "within 0.1 s" in link.sent[0].error_info.message


async def test_what_is_not_uploaded_when_cm_stops_is_told() -> None:
    link = FakeLink()
    uploads = LogUploads(link)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        async with running(uploads):
            upload = Upload(options(url=f"https://127.0.0.1:{server.getsockname()[1]}/"))
            for node_id in ("a", "a", "b"):
                uploads.put(upload, part(node_id))
            connection, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(server), 20)
        connection.close()
    told = [message for message in link.sent if isinstance(message, PushLog)]
    assert [(message.node.codename, message.status) for message in told] == [
        ("a", LogStatus.ERROR),
        ("b", LogStatus.ERROR),
    ]
    assert told[0].error_info is not None and "CM was stopped" in told[0].error_info.message


async def test_an_expired_token_is_not_sent(bench: Bench) -> None:
    await bench.request("a", bearer_token_ttl=NOW)
    await bench.log("a", 1, 1)
    (told,) = await bench.until(sent=1)
    assert told.error_info is not None and "expired" in told.error_info.message
    await bench.request("a", bearer_token_ttl=NOW + timedelta(seconds=1))
    await bench.log("a", 1, 1)
    await bench.until(received=1, sent=1)


def options(**members: Any) -> UploadOptions:
    return UploadOptions(**{"type": UploadType.HTTPS, "url": "https://logs/x", "bearer_token": TOKEN, **members})


def part(node_id: str, number: int = 1, content: bytes = b"x") -> PushLog:
    return PushLog(
        correlation_id="c",
        node=Identity(codename=node_id),
        part=number,
        parts_count=9,
        content=content,
        status=LogStatus.OK,
    )


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"url": "http://logs/x?key=hidden"}, "https only, not to 'http://logs/x'"),
        ({"url": ""}, "https only"),
        ({"url": "https:///x"}, "https only"),
        ({"url": "https://[/x"}, "no URL"),
        ({"url": "https://logs:port/x"}, "no URL"),
        ({"url": "https://me:hidden@logs/x"}, "user name"),
        ({"bearer_token": ""}, "RFC 6750"),
        ({"bearer_token": "hidden\r\nHost: other"}, "RFC 6750"),
        ({"bearer_token": "hidden token"}, "RFC 6750"),
        ({"bearer_token": "x" * 5000}, "RFC 6750"),
    ],
)
async def test_options_that_cannot_be_used_are_refused_at_once(members: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named) as caught:
        Upload(options(**members))
    assert "hidden" not in str(caught.value) and "x" * 5000 not in str(caught.value)
    link, source = FakeLink(), FakeSource()
    forwarder = LogForwarder(link, source, LogUploads(link), node_ids=lambda: ["a", "b"])
    message = RequestLog(
        correlation_id="c", log_type=LogType.SYSTEM, filter=LogFilter(), upload_options=options(**members)
    )
    await forwarder.on_request(message)
    assert source.asked == []
    assert [(told.node.codename, told.status) for told in link.sent if isinstance(told, PushLog)] == [
        ("a", LogStatus.ERROR),
        ("b", LogStatus.ERROR),
    ]


async def test_by_the_websocket_when_that_is_asked_for() -> None:
    link = FakeLink()
    forwarder = LogForwarder(link, FakeSource(), LogUploads(link), node_ids=lambda: ["a"])
    message = RequestLog(
        correlation_id="c",
        log_type=LogType.SYSTEM,
        filter=LogFilter(),
        upload_options=UploadOptions(type=UploadType.WSS),
    )
    await forwarder.on_request(message)
    await forwarder.on_log("a", LogData("c", LogStatus.OK, 1, 1, b"x"))
    assert [told.content for told in link.sent if isinstance(told, PushLog)] == [b"x"]


async def test_what_waits_is_bounded_and_the_loss_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is not even reached; other requests fail for themselves only."""
    sent: asyncio.Queue[Message] = asyncio.Queue()

    class Link(FakeLink):
        async def send(self, message: Message) -> None:
            sent.put_nowait(message)

    uploads = LogUploads(Link())
    monkeypatch.setattr(uploads, "_upload", _never)
    full, other = Upload(options()), Upload(options())
    uploads.put(other, part("a"))
    for number in range(1, 1000):
        uploads.put(full, part("a", number, b"x" * 100_000))
        uploads.put(full, part("b", number))
    assert uploads._queue.qsize() <= logupload.QUEUE_PARTS + 2
    assert uploads._queued_bytes <= logupload.QUEUE_BYTES
    assert full.error is not None and other.error is None
    async with running(uploads):
        told = [await asyncio.wait_for(sent.get(), 20) for _ in range(2)]
    assert {entry.node.codename for entry in told if isinstance(entry, PushLog)} == {"a", "b"}
    assert sent.empty()


async def _never(*_: object) -> None:
    """An upload that works."""


async def test_requests_that_no_node_answers_do_not_pile_up() -> None:
    link = FakeLink()
    forwarder = LogForwarder(link, FakeSource(), LogUploads(link), node_ids=lambda: ["a"])
    for number in range(2 * MAX_OPEN_UPLOADS):
        message = RequestLog(
            correlation_id=str(number), log_type=LogType.SYSTEM, filter=LogFilter(), upload_options=options()
        )
        await forwarder.on_request(message)
    assert len(forwarder._open) == MAX_OPEN_UPLOADS
    await forwarder.on_log("a", LogData("0", LogStatus.OK, 1, 1, b"x"))
    assert len(link.sent) == 1
