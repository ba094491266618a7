"""Download and file server together, and each against a badly behaved other side."""

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from aoscore.common import fileserver
from aoscore.common.aio import Backoff, Worker
from aoscore.common.download import Downloader, HttpStatusError, TooSlowError, redirected
from aoscore.common.errors import (
    AlreadyExistsError,
    AosError,
    DeadlineError,
    FailedError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
)
from aoscore.common.fileserver import FileServer, parse_range
from aoscore.common.http import request
from aoscore.common.pacing import SpeedLimit
from tests.support.running import running, until

DATA = os.urandom(3_000_000)


def downloader(worker: Worker, **more: object) -> Downloader:
    settings = {"attempts": 2, "idle_timeout_s": 0.3, "backoff": lambda: Backoff(0.01, 0.02)} | more
    return Downloader(worker, **settings)  # type: ignore[arg-type]


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async with Worker("test") as worker:
        yield worker


@asynccontextmanager
async def file_server(directory: Path, **more: object) -> AsyncIterator[str]:
    def resolve(target: str) -> Path | None:
        return directory / target.lstrip("/") if target.count("/") == 1 else None

    server = FileServer("127.0.0.1:0", resolve, **more)  # type: ignore[arg-type]
    async with running(server):
        yield f"http://127.0.0.1:{server.port}"


Talk = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def bad_server(talk: Talk) -> AsyncIterator[str]:
    """A server whose every answer is written by `talk(request head, writer)`."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await talk(await reader.readuntil(b"\r\n\r\n"), writer)
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_whole_and_resumed(tmp_path: Path, worker: Worker) -> None:
    (tmp_path / "file").write_bytes(DATA)
    seen: list[tuple[int, int | None]] = []
    async with file_server(tmp_path) as url:
        for begin in (0, 1, 1_234_567, len(DATA)):
            target = tmp_path / f"from{begin}"
            target.write_bytes(DATA[:begin])
            await downloader(worker).download(
                f"{url}/file", target, size=len(DATA), progress=lambda *at: seen.append(at)
            )
            assert target.read_bytes() == DATA
    assert seen[-1] == (len(DATA), len(DATA))
    assert all(total == len(DATA) for _, total in seen)


async def test_goes_on_over_a_link_that_breaks_again_and_again(tmp_path: Path, worker: Worker) -> None:
    ranges: list[int] = []

    async def talk(head: bytes, writer: asyncio.StreamWriter) -> None:
        start = int(head.split(b"bytes=")[1].split(b"-")[0]) if b"bytes=" in head else 0
        ranges.append(start)
        status = b"206 Partial Content" if start else b"200 OK"
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n" % (status, len(DATA) - start))
        writer.write(b"Content-Range: bytes %d-%d/%d\r\n\r\n" % (start, len(DATA) - 1, len(DATA)) if start else b"\r\n")
        writer.write(DATA[start : start + 400_000])
        await writer.drain()

    async with bad_server(talk) as url:
        await downloader(worker).download(f"{url}/x", tmp_path / "x", size=len(DATA))
    assert (tmp_path / "x").read_bytes() == DATA
    assert ranges == list(range(0, len(DATA), 400_000)), "every piece was asked for once"


async def test_status_errors(tmp_path: Path, worker: Worker) -> None:
    calls = 0

    async def talk(head: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        status = head.split(b" ")[1].lstrip(b"/").partition(b"?")[0]
        writer.write(b"HTTP/1.1 %s Because\r\nContent-Length: 0\r\n\r\n" % status)

    async with bad_server(talk) as url:
        for status, tries in ((403, 1), (503, 2)):
            calls = 0
            with pytest.raises(HttpStatusError, match=f"answered {status}") as caught:
                await downloader(worker).download(f"{url}/{status}?secret=1", tmp_path / "x")
            assert (caught.value.errno, calls) == (status, tries)
            assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world", OutOfRangeError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nb\r\nhello world\r\n0\r\n\r\n", OutOfRangeError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel", FailedError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", FailedError),
        (b"nonsense\r\n\r\n", FailedError),
        (b"", FailedError),
    ],
)
async def test_wrong_answers(tmp_path: Path, worker: Worker, answer: bytes, error: type[AosError]) -> None:
    async def talk(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    async with bad_server(talk) as url:
        with pytest.raises(error):
            await downloader(worker, attempts=1).download(f"{url}/x", tmp_path / "x", size=5)


async def test_silent_server_is_given_up(tmp_path: Path, worker: Worker) -> None:
    async def talk(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel")
        await writer.drain()
        await asyncio.sleep(1)

    async with bad_server(talk) as url:
        with pytest.raises(DeadlineError, match="said nothing"):
            await downloader(worker, attempts=1).download(f"{url}/x", tmp_path / "x", size=5)
    assert (tmp_path / "x").read_bytes() == b"hel", "what came is kept for the next attempt"


async def test_a_server_that_trickles_is_given_up(tmp_path: Path, worker: Worker) -> None:
    async def talk(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(1000):
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.02)

    async with bad_server(talk) as url:
        with pytest.raises(TooSlowError, match="bytes per second"):
            await downloader(worker).download(f"{url}/x", tmp_path / "x", size=1000)


async def test_downloads_share_one_speed_limit(tmp_path: Path, worker: Worker) -> None:
    (tmp_path / "file").write_bytes(DATA[:200_000])
    limited = downloader(worker, speed_limit=SpeedLimit(2_000_000))
    loop = asyncio.get_running_loop()
    async with file_server(tmp_path) as url:
        begin = loop.time()
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(limited.download(f"{url}/file", tmp_path / f"x{number}", size=200_000))
        assert loop.time() - begin >= 3 * 200_000 / 2_000_000 - 0.01
    assert all((tmp_path / f"x{number}").read_bytes() == DATA[:200_000] for number in range(3))


async def test_our_own_limit_is_not_the_slowness_of_a_server(tmp_path: Path, worker: Worker) -> None:
    (tmp_path / "file").write_bytes(DATA)
    limited = downloader(worker, speed_limit=SpeedLimit(2_000_000), idle_timeout_s=0.5, min_speed=3_000_000)
    async with file_server(tmp_path) as url:
        await limited.download(f"{url}/file", tmp_path / "x", size=len(DATA))
    assert (tmp_path / "x").read_bytes() == DATA


async def test_redirects_are_followed_so_far(tmp_path: Path, worker: Worker) -> None:
    (tmp_path / "file").write_bytes(DATA)
    async with file_server(tmp_path) as good:

        async def talk(head: bytes, writer: asyncio.StreamWriter) -> None:
            left = int(head.split()[1].lstrip(b"/"))
            location = f"/{left - 1}" if left else f"{good}/file"
            writer.write(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())
            await writer.drain()

        async with bad_server(talk) as url:
            (tmp_path / "x").write_bytes(DATA[:1000])
            await downloader(worker).download(f"{url}/4", tmp_path / "x", size=len(DATA))
            assert (tmp_path / "x").read_bytes() == DATA
            with pytest.raises(FailedError, match="more than 5 redirects"):
                await downloader(worker).download(f"{url}/5", tmp_path / "y", size=len(DATA))


def test_where_redirects_lead() -> None:
    assert redirected("https://a/x?sig=1", 200, "https://b") is None
    assert redirected("https://a/x", 307, "/y") == "https://a/y"
    assert redirected("http://a/x", 301, "https://b/y") == "https://b/y"
    for location in ("http://b/y", "file:///etc/passwd", "https://[/", ""):
        with pytest.raises(FailedError, match="not as safe"):
            redirected("https://a/x", 302, location)


async def test_changed_file_is_begun_anew(tmp_path: Path, worker: Worker) -> None:
    (tmp_path / "file").write_bytes(b"short")
    target = tmp_path / "x"
    target.write_bytes(b"longer than it is now")
    async with file_server(tmp_path) as url:
        await downloader(worker).download(f"{url}/file", target)
    assert target.read_bytes() == b"short"


class StopError(Exception):
    """Ends a download in the middle."""


async def begin_only(worker: Worker, url: str, path: Path, size: int) -> None:
    """Download a part of a file, and break off."""

    def progress(received: int, _: int | None) -> None:
        raise StopError

    with pytest.raises(StopError):
        await downloader(worker).download(url, path, size=size, progress=progress)
    assert 0 < path.stat().st_size < size


@asynccontextmanager
async def changing_server(tmp_path: Path) -> AsyncIterator[tuple[str, list[Path]]]:
    """Our file server with a file that is replaced by another, first in the list, under the same URL."""
    files = [tmp_path / "old"]
    files[0].write_bytes(DATA)
    server = FileServer("127.0.0.1:0", lambda _: files[0])
    async with running(server):
        yield f"http://127.0.0.1:{server.port}/blob?signature=1", files


async def test_a_resumed_file_is_the_same_as_before(tmp_path: Path, worker: Worker) -> None:
    target = tmp_path / "x"
    async with changing_server(tmp_path) as (url, _):
        await begin_only(worker, url, target, len(DATA))
        noted = os.getxattr(target, "user.aoscore.validator")
        assert noted == url.partition("?")[0].encode() + b' "old"', "the signature of the link is not kept"
        seen: list[int] = []
        have = target.stat().st_size
        await downloader(worker).download(
            url.replace("signature=1", "signature=2"), target, size=len(DATA), progress=lambda now, _: seen.append(now)
        )
    assert target.read_bytes() == DATA
    assert seen[0] > have
    assert os.listxattr(target) == []


async def test_a_file_that_has_changed_comes_once(tmp_path: Path, worker: Worker) -> None:
    """Not the rest of it first, to be found wrong at the end."""
    target = tmp_path / "x"
    other = os.urandom(len(DATA))
    async with changing_server(tmp_path) as (url, files):
        await begin_only(worker, url, target, len(DATA))
        files.insert(0, tmp_path / "new")
        files[0].write_bytes(other)
        seen: list[int] = []
        await downloader(worker).download(url, target, size=len(DATA), progress=lambda now, _: seen.append(now))
    assert target.read_bytes() == other
    assert seen == sorted(seen), "begun once, from the start"


async def test_what_another_server_says_is_no_condition(tmp_path: Path, worker: Worker) -> None:
    target = tmp_path / "x"
    asked: list[bytes] = []

    async def talk(head: bytes, writer: asyncio.StreamWriter) -> None:
        asked.append(head)

    async with changing_server(tmp_path) as (url, _), bad_server(talk) as mirror:
        await begin_only(worker, url, target, len(DATA))
        with pytest.raises(FailedError):
            await downloader(worker, attempts=1).download(f"{mirror}/blob", target, size=len(DATA))
    assert b"Range: bytes=" in asked[0] and b"If-Range" not in asked[0]


class CuttingServer:
    """Sends a third of DATA an answer, then the connection breaks."""

    def __init__(self, headers: Callable[[int], bytes], *, knows_if_range: bool) -> None:
        """`headers(n)`: more headers of the n-th answer."""
        self.headers = headers
        self.knows_if_range = knows_if_range
        self.answers: list[tuple[int, str]] = []
        """Start of each answer and the condition it was asked for with."""

    async def talk(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
        start = int(fields.get("Range", "bytes=0-").split("=")[1].rstrip("-"))
        condition = fields.get("If-Range", "")
        headers = self.headers(len(self.answers))
        if self.knows_if_range and condition and condition.encode() not in headers:
            start = 0
        self.answers.append((start, condition))
        status = b"206 Partial Content" if start else b"200 OK"
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s" % (status, len(DATA) - start, headers))
        writer.write(b"Content-Range: bytes %d-%d/%d\r\n\r\n" % (start, len(DATA) - 1, len(DATA)) if start else b"\r\n")
        with contextlib.suppress(OSError):
            writer.write(DATA[start : start + THIRD])
            await writer.drain()


THIRD = len(DATA) // 3
DATE = b"Date: Sun, 01 Mar 2026 12:00:00 GMT\r\nLast-Modified: "


@pytest.mark.parametrize(
    ("headers", "condition"),
    [
        (b'ETag: "a"\r\n', '"a"'),
        (DATE + b"Sun, 01 Mar 2026 11:59:59 GMT\r\n", "Sun, 01 Mar 2026 11:59:59 GMT"),
        (b'ETag: W/"a"\r\n' + DATE + b"Sun, 01 Mar 2026 11:00:00 GMT\r\n", "Sun, 01 Mar 2026 11:00:00 GMT"),
        (b'ETag: W/"a"\r\n', ""),
        (DATE + b"Sun, 01 Mar 2026 12:00:00 GMT\r\n", ""),
        (b"Last-Modified: Sun, 01 Mar 2026 11:00:00 GMT\r\n", ""),
        (DATE + b"long ago\r\n", ""),
        (b"", ""),
    ],
)
async def test_only_what_is_sure_is_a_condition(tmp_path: Path, worker: Worker, headers: bytes, condition: str) -> None:
    server = CuttingServer(lambda _: headers, knows_if_range=True)
    async with bad_server(server.talk) as url:
        await downloader(worker).download(f"{url}/x", tmp_path / "x", size=len(DATA))
    assert (tmp_path / "x").read_bytes() == DATA
    assert server.answers == [(0, ""), (THIRD, condition), (2 * THIRD, condition)]


@pytest.mark.parametrize("knows_if_range", [True, False])
async def test_servers_that_never_agree_cost_one_new_start(
    tmp_path: Path, worker: Worker, *, knows_if_range: bool
) -> None:
    """Behind one name, each calls the same file otherwise; also where only Range is known."""
    server = CuttingServer(lambda number: b'ETag: "%d"\r\n' % number, knows_if_range=knows_if_range)
    async with bad_server(server.talk) as url:
        await downloader(worker, attempts=3).download(f"{url}/x", tmp_path / "x", size=len(DATA))
    assert (tmp_path / "x").read_bytes() == DATA
    first_time = [(0, ""), (0, '"0"')] if knows_if_range else [(0, ""), (THIRD, '"0"'), (0, "")]
    assert server.answers == [*first_time, (THIRD, ""), (2 * THIRD, "")]


async def test_without_attributes_of_files_it_resumes_too(
    tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.ENOTSUP, "not supported")

    for name in ("getxattr", "setxattr", "removexattr"):
        monkeypatch.setattr(os, name, refuse)
    server = CuttingServer(lambda _: b'ETag: "a"\r\n', knows_if_range=True)
    async with bad_server(server.talk) as url:
        await downloader(worker).download(f"{url}/x", tmp_path / "x", size=len(DATA))
    assert server.answers == [(0, ""), (THIRD, ""), (2 * THIRD, "")]


async def test_local_file_and_bad_urls(tmp_path: Path, worker: Worker) -> None:
    (tmp_path / "a b").write_bytes(b"local")
    await downloader(worker).download(f"file://{tmp_path}/a%20b", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"local"
    with pytest.raises(NotFoundError, match="nothing"):
        await downloader(worker).download(f"file://{tmp_path}/nothing", tmp_path / "x")
    for url in (
        "ftp://host/x",
        "http:///x",
        "http://[/x",
        "http://host:port/x",
        "http://host/a b",
        "http://host/\xe4\n",
    ):
        with pytest.raises(InvalidArgumentError):
            await downloader(worker).download(url, tmp_path / "x")


async def test_file_server_rules(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "empty").write_bytes(b"")
    async with file_server(tmp_path) as url:
        head = await request("HEAD", f"{url}/file")
        assert (head.status, head.headers["content-length"], head.body) == (200, "10", b"")
        assert (await request("GET", f"{url}/empty")).body == b""
        assert (await request("GET", f"{url}/nothing")).status == 404
        assert (await request("GET", f"{url}/../file")).status == 404
        assert (await request("POST", f"{url}/file", body=b"x")).status == 405
        part = await request("GET", f"{url}/file", headers={"Range": "bytes=2-4"})
        assert (part.status, part.body, part.headers["content-range"]) == (206, b"234", "bytes 2-4/10")
        assert (await request("GET", f"{url}/file", headers={"Range": "bytes=-3"})).body == b"789"
        assert (await request("GET", f"{url}/file", headers={"Range": "bytes=10-"})).status == 416
        other = await request("GET", f"{url}/file", headers={"Range": "bytes=2-4", "If-Range": '"other"'})
        assert (other.status, other.body) == (200, b"0123456789")
        with pytest.raises(OutOfRangeError):
            await request("GET", f"{url}/file", limit_bytes=9)


async def test_file_server_serves_so_many_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    server = FileServer("127.0.0.1:0", lambda path: tmp_path / path[1:], max_connections=1)
    async with running(server):
        connections = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
        (first, _), (second, _) = connections
        for _, writer in connections:
            writer.write(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await first.readuntil(b"content")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await second.read(1)
        connections[0][1].close()
        async with asyncio.timeout(10):
            await second.readuntil(b"content")
        connections[1][1].close()


async def test_file_server_waits_for_addresses_and_refuses_taken_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fileserver, "_FIRST_LOOK_S", 0.01)
    monkeypatch.setattr(fileserver, "_LAST_LOOK_S", 0.01)
    looks = 0

    async def find() -> list[str]:
        nonlocal looks
        looks += 1
        return ["127.0.0.1", "192.0.2.7"]

    server = FileServer(":0", lambda _: None, find=find)
    async with running(server):
        await until(lambda: looks > 3)
        assert (await request("GET", f"http://127.0.0.1:{server.port}/x")).status == 404
        assert caplog.text.count("Waiting for the address of the file server: address=192.0.2.7, error=") == 1
        with pytest.raises(AlreadyExistsError):
            async with running(FileServer(f":{server.port}", lambda _: None, find=find)):
                pass


async def test_file_server_refuses_taken_ports(tmp_path: Path) -> None:
    async with file_server(tmp_path) as url:
        with pytest.raises(AlreadyExistsError):
            async with running(FileServer(url.removeprefix("http://"), lambda _: None)):
                pass


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("bytes=0-", (0, 10)),
        ("bytes=9-", (9, 1)),
        ("bytes=0-99", (0, 10)),
        ("bytes=-20", (0, 10)),
        ("bytes=-0", None),
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("bytes=1-2,3-4", None),
        ("lines=1-2", None),
    ],
)
def test_ranges(text: str, part: tuple[int, int] | None) -> None:
    assert parse_range(text, 10) == part
