"""Blobs for the local SM: fetched through the link, kept, served over HTTP while they still grow (mp.md §7). Node."""

import asyncio
import contextlib
import logging
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from http import HTTPStatus
from pathlib import Path

import grpc
import h11
from google.protobuf.message import DecodeError

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore._speedups.chunker import Digest
from aoscore.common.aio import Backoff, Worker, log_and_continue
from aoscore.common.blobstore import add_file, check_digest
from aoscore.common.errors import (
    AosError,
    CanceledError,
    ChecksumError,
    FailedError,
    InvalidArgumentError,
    NoSpaceError,
)
from aoscore.common.fileserver import FileServer
from aoscore.common.log import kv
from aoscore.common.oci import Descriptor, ImageManifest
from aoscore.mp.communication.connection import ChannelClosedError
from aoscore.mp.nodeserver.calls import CallClient, CallError
from aoscore.mp.nodeserver.downloads import DownloadClient
from aoscore.mp.nodeserver.store import NodeStore, named_by

_log = logging.getLogger(__name__)

_TARGET = re.compile(r"/sha256/([0-9a-f]{64})")
_ATTEMPTS = 3
# So long may the link be away before its absence counts as a failed attempt: as long as an SM waits for the next byte.
_OUTAGE_S = 60.0
_WRITE_BYTES = 1024 * 1024
# In one go; then others get their turn.
_SEND_BYTES = 256 * 1024
_AHEAD_PARALLEL = 2
_AHEAD_MOST = 256
_MOST_SIZES = 1024
_CONTENT_TYPE = "application/octet-stream"
_GET_BLOBS_INFOS = "/servicemanager.v5.SMService/GetBlobsInfos"


class Transfer:
    """A blob on its way into the store. Readers follow `written` with `progress`."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.written = 0
        self.is_complete = False
        self.error: BaseException | None = None
        self.readers = 0
        self.task: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Nothing more is going to be written."""
        return self.is_complete or self.error is not None

    def tell(self) -> None:
        """Something has changed."""
        self._progress.set()
        self._progress = asyncio.Event()

    async def progress(self) -> None:
        """Wait for a change."""
        await self._progress.wait()


class _Image:
    """What a manifest names, on its way ahead of SM; `diff_ids` by blob once `is_known`."""

    def __init__(self, manifest: ImageManifest) -> None:
        self.manifest = manifest
        self.diff_ids: dict[str, str] = {}
        self.is_known = asyncio.Event()


class Blobs:
    """Gives blobs to readers: from the store, or from the one transfer that brings them.

    With `prefetch` what a manifest names is brought before anybody asks, while nobody waits for a blob, and its layers
    are unpacked, in `unpacker` (mp.md §7).
    """

    def __init__(
        self,
        store: NodeStore,
        worker: Worker,
        calls: CallClient,
        downloads: DownloadClient,
        *,
        clean_period_s: float,
        unpacker: Worker | None = None,
        backoff: Callable[[], Backoff] = lambda: Backoff(1.0, 5.0),
    ) -> None:
        self.store = store
        self.worker = worker
        self._calls = calls
        self._downloads = downloads
        self._clean_period_s = clean_period_s
        self._unpacker = unpacker
        self._ahead: asyncio.Queue[tuple[_Image, Descriptor]] = asyncio.Queue(_AHEAD_MOST)
        self._sizes: dict[str, int] = {}
        """What manifests said of blobs."""
        self._asked = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._backoff = backoff
        self._transfers: dict[str, Transfer] = {}
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self, started: Callable[[], None]) -> None:
        """Own the transfers, and clean the store now and then."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            if self._unpacker is not None:
                for _ in range(_AHEAD_PARALLEL):
                    tasks.create_task(self._fetch_ahead(self._unpacker))
            started()
            while True:
                with log_and_continue(_log, "Can't clean the image store"):
                    await self.worker.run(self.store.clean)
                await asyncio.sleep(self._clean_period_s)

    @contextlib.asynccontextmanager
    async def reading(self, digest: str) -> AsyncIterator[Transfer]:
        """The transfer of a blob that is not in the store; it is given up when its last reader goes."""
        transfer = self._transfers.get(digest)
        if transfer is None:
            if self._tasks is None:
                raise FailedError("the image store is not running")
            transfer = self._transfers[digest] = Transfer(digest)
            transfer.task = self._tasks.create_task(self._bring(digest, transfer))
        transfer.readers += 1
        try:
            yield transfer
        finally:
            transfer.readers -= 1
            # What has come stays for the next time. One that is complete goes on, to what a manifest names.
            if not transfer.readers and transfer.task is not None and not transfer.is_complete:
                transfer.task.cancel()

    def size_bytes(self, digest: str) -> int | None:
        """Size of a blob, as far as a manifest has said it."""
        return self._sizes.get(digest)

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Somebody waits for a blob during the block: nothing is begun ahead meanwhile."""
        self._asked += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._asked -= 1
            if not self._asked:
                self._idle.set()

    async def _look_ahead(self, digest: str) -> None:
        if self._unpacker is None:
            return
        manifest = await self.worker.run(self.store.manifest, digest)
        if manifest is None:
            return
        image = _Image(manifest)
        for named in named_by(manifest):
            if named.size:
                self._sizes[named.digest] = named.size
            if self._ahead.full():
                _log.warning(kv("Too much to fetch ahead, left to SM", digest=named.digest))
                break
            self._ahead.put_nowait((image, named))
        while len(self._sizes) > _MOST_SIZES:
            del self._sizes[next(iter(self._sizes))]

    async def _fetch_ahead(self, unpacker: Worker) -> None:
        while True:
            image, named = await self._ahead.get()
            await self._idle.wait()
            with log_and_continue(_log, f"Can't fetch {named.digest} ahead"):
                try:
                    is_ours = await self._fetched_ahead(named)
                finally:
                    if named is image.manifest.config:
                        image.diff_ids = await self.worker.run(self.store.diff_ids, image.manifest)
                        image.is_known.set()
                if is_ours and named in image.manifest.layers:
                    # Came out of the queue before it, so it is there or on its way.
                    await image.is_known.wait()
                    if diff_id := image.diff_ids.get(named.digest):
                        await unpacker.run(self.store.unpack_ahead, named, diff_id)

    async def _fetched_ahead(self, named: Descriptor) -> bool:
        """Bring a blob; whether it came, and SM does not read it: what it reads it is going to unpack itself."""
        if await self.worker.run(self.store.use, named.digest):
            return False
        # Known before the first byte: what does not fit is not begun.
        await self.worker.run(self.store.make_room, named.size)
        async with self.reading(named.digest) as transfer:
            while not transfer.is_over:
                await transfer.progress()
            return transfer.is_complete and transfer.readers == 1

    async def _bring(self, digest: str, transfer: Transfer) -> None:
        backoff = self._backoff()
        left = _ATTEMPTS
        now = asyncio.get_running_loop().time
        advanced_s = now()
        try:
            while True:
                before = transfer.written
                try:
                    await self._attempt(digest, transfer)
                    transfer.is_complete = True
                    await self._look_ahead(digest)
                    return
                except (AosError, OSError) as error:
                    if transfer.written > before:
                        left, advanced_s = _ATTEMPTS, now()
                        backoff.reset()
                    elif not _is_outage(error) or now() - advanced_s > _OUTAGE_S:
                        left -= 1
                    if left <= 0 or isinstance(error, (NoSpaceError, ChecksumError)):
                        _log.error(kv("Can't get blob", digest=digest, error=error))
                        transfer.error = error
                        return
                    pause_s = backoff.next()
                    _log.warning(kv("Can't get blob yet", digest=digest, error=error, next_try_s=round(pause_s, 1)))
                await asyncio.sleep(pause_s)
        except asyncio.CancelledError:
            transfer.error = CanceledError("nobody reads the blob any more")
            raise
        finally:
            del self._transfers[digest]
            transfer.tell()

    async def _attempt(self, digest: str, transfer: Transfer) -> None:
        url = await self._url(digest)
        part = await self.worker.run(_Part, self.store, digest)
        try:
            transfer.written = part.written
            transfer.tell()
            waiting: list[bytes] = []
            size = 0
            try:
                async with contextlib.aclosing(self._downloads.fetch(url, transfer.written)) as pieces:
                    async for piece in pieces:
                        waiting.append(piece)
                        size += len(piece)
                        if transfer.written + size > (self.size_bytes(digest) or sys.maxsize):
                            raise ChecksumError(f"blob {digest} has more bytes than its manifest says")
                        if size >= _WRITE_BYTES:
                            await self._write(part, waiting, transfer)
                            size = 0
            except ChecksumError:
                await self.worker.run(self.store.drop_part, digest)
                raise
            except BaseException:
                # When the link broke, for example: what has come need not come again.
                await self._write(part, waiting, transfer)
                raise
            await self._write(part, waiting, transfer)
        finally:
            await self.worker.run(part.close)
        await self.worker.run(self.store.adopt, digest, part.digest)

    async def _url(self, digest: str) -> str:
        """Where CM offers the blob now. Asked each time: a gateway that has restarted knows no earlier answer."""
        request = pb.BlobsInfosRequest(digests=[digest]).SerializeToString()
        try:
            (url,) = pb.BlobsInfos.FromString(await self._calls.call(_GET_BLOBS_INFOS, request)).urls
        except (DecodeError, ValueError) as error:
            raise InvalidArgumentError(f"CM did not answer with one address for blob {digest}") from error
        return url

    async def _write(self, part: "_Part", waiting: list[bytes], transfer: Transfer) -> None:
        pieces, waiting[:] = list(waiting), []
        if pieces:
            await self.worker.run(part.write, pieces)
            transfer.written = part.written
            transfer.tell()


class _Part:
    """A blob that grows in the store, and the digest of what is there. All methods block."""

    def __init__(self, store: NodeStore, digest: str) -> None:
        self._store = store
        self._digest = Digest()
        self._file = store.part(digest).open("a+b", buffering=0)
        add_file(self._digest, self._file.fileno())

    @property
    def digest(self) -> str:
        """Of all that was written."""
        return self._digest.text()

    @property
    def written(self) -> int:
        """How many bytes that is."""
        return self._digest.size_bytes

    def write(self, pieces: list[bytes]) -> None:
        self._store.make_room(sum(map(len, pieces)))
        for piece in pieces:
            self._digest.write(self._file.fileno(), piece)

    def close(self) -> None:
        self._file.close()


def _is_outage(error: BaseException) -> bool:
    """Whether the link or the registration behind it is not there, which passes: no fault of the blob."""
    if isinstance(error, CallError):
        return error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)
    return isinstance(error, ChannelClosedError)


class BlobServer(FileServer):
    """`/sha256/HEX` for the local SM, nothing else."""

    def __init__(self, address: str, blobs: Blobs) -> None:
        super().__init__(address, self._kept)
        self._base = f"http://{address}/sha256/"
        self._blobs = blobs

    def url(self, digest: str) -> str:
        """Where SM gets a blob. Raises InvalidArgumentError for what is no digest."""
        return f"{self._base}{check_digest(digest).removeprefix('sha256:')}"

    def _kept(self, target: str) -> Path | None:
        match = _TARGET.fullmatch(target)
        return self._blobs.store.path(f"sha256:{match[1]}") if match else None

    async def _answer(self, connection: h11.Connection, writer: asyncio.StreamWriter, request: h11.Request) -> None:
        match = _TARGET.fullmatch(request.target.decode("ascii", "replace"))
        digest = f"sha256:{match[1]}" if match else ""
        if not match or request.method != b"GET":
            await super()._answer(connection, writer, request)
            return
        if await self._blobs.worker.run(self._blobs.store.use, digest):
            await super()._answer(connection, writer, request)
        else:
            with self._blobs.asked():
                async with self._blobs.reading(digest) as transfer:
                    await self._pass_on(connection, writer, transfer)
        if connection.our_state is h11.DONE:
            await self._blobs.worker.run(self._blobs.store.handed_over, digest)

    async def _pass_on(self, connection: h11.Connection, writer: asyncio.StreamWriter, transfer: Transfer) -> None:
        """Send what is there and what is still coming, always from the first byte: not all is there to choose from."""
        while not (transfer.written or transfer.is_over):
            await transfer.progress()
        if transfer.error is not None:
            no_space = isinstance(transfer.error, NoSpaceError)
            _refuse(connection, writer, HTTPStatus.INSUFFICIENT_STORAGE if no_space else HTTPStatus.BAD_GATEWAY)
            return
        file = await self._blobs.worker.run(self._blobs.store.open_growing, transfer.digest)
        sent = 0
        headers = [("Content-Type", _CONTENT_TYPE)]
        size_bytes = self._blobs.size_bytes(transfer.digest)
        if size_bytes is not None:
            headers.append(("Content-Length", str(size_bytes)))
        with file:
            writer.write(connection.send(h11.Response(status_code=200, headers=headers)) or b"")
            while True:
                if sent < transfer.written:
                    part_bytes = min(transfer.written - sent, _SEND_BYTES)
                    await self._send_part(connection, writer, file, sent, part_bytes)
                    sent += part_bytes
                elif transfer.is_complete:
                    if sent != (size_bytes or sent):
                        raise FailedError(f"blob {transfer.digest} has {sent} bytes, its manifest says {size_bytes}")
                    writer.write(connection.send(h11.EndOfMessage()) or b"")
                    return
                elif transfer.error is not None:
                    raise FailedError(f"blob {transfer.digest} is cut short: {transfer.error}")
                else:
                    await transfer.progress()


def _refuse(connection: h11.Connection, writer: asyncio.StreamWriter, status: HTTPStatus) -> None:
    head = h11.Response(status_code=status, headers=[("Content-Length", "0")], reason=status.phrase)
    writer.write((connection.send(head) or b"") + (connection.send(h11.EndOfMessage()) or b""))
