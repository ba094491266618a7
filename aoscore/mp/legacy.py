"""A gateway's link to a peer of the older kind, such as the Zephyr application in Xen's Dom0 (mp-wire §7-8, mp.md §6).

channel 1, 2    its IAM   ->  RegisterNode of iamanager.v5 at main IAM, public and protected
channel 3       its clock ->  answered here
channel 4       its SM    ->  RegisterSM of servicemanager.v4 at CM; images and logs are handled here
"""

import asyncio
import contextlib
import hmac
import itertools
import logging
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from aoscore._pb.servicemanager.v4 import servicemanager_pb2 as pb
from aoscore.common import convert
from aoscore.common.aio import Worker, log_and_continue
from aoscore.common.blobstore import file_digest
from aoscore.common.download import Downloader
from aoscore.common.errors import (
    AlreadyExistsError,
    AosError,
    ChecksumError,
    InvalidArgumentError,
    NoSpaceError,
    OutOfRangeError,
    WrongStateError,
    to_error_info,
)
from aoscore.common.files import available_bytes, remove_tree
from aoscore.common.log import kv
from aoscore.mp.clock import main_time
from aoscore.mp.communication.connection import ChannelClosedError, Connection, Stream, end_tasks
from aoscore.mp.communication.relay import ServerRelay, Way
from aoscore.mp.filechunker.files import MAX_FILES, ImageFile, files_of, pieces_of
from aoscore.mp.imageunpacker.unpacker import unpack_image
from aoscore.mp.logprovider.archive import Archive, LogArchiver

_log = logging.getLogger(__name__)

_REGISTER_SM = "/servicemanager.v4.SMService/RegisterSM"
_LOOK_AT_LOGS_S = 10.0
_MAX_REQUESTS = 16
_MAX_OFFERED = 1024
_PIECES_AT_ONCE = 16


class Offer:
    """What CM said of a service or layer when it gave its address."""

    def __init__(self, sha256: bytes, size: int) -> None:
        self.sha256 = sha256
        self.size = size


class LegacyImages:
    """Fetches and unpacks images, `parallel` at a time, below two directories that are its own."""

    def __init__(
        self,
        downloads: Path,
        images: Path,
        worker: Worker,
        downloader: Downloader,
        *,
        min_free_bytes: int,
        parallel: int,
    ) -> None:
        self._downloads = downloads
        self._images = images
        self._worker = worker
        self._downloader = downloader
        self._min_free_bytes = min_free_bytes
        self._slots = asyncio.Semaphore(parallel)

    def begin(self) -> None:
        """Make the directories, and remove what an earlier process left in them. Blocks."""
        for directory in (self._downloads, self._images):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in directory.glob("request-*"):
                remove_tree(left)

    async def send(self, stream: Stream, request: pb.ImageContentRequest, offer: Offer) -> None:
        """Answer a request for the image of a service. Raises AosError, OSError."""
        async with self._slots:
            archives, images = await self._worker.run(self._make_room, offer.size)
            try:
                archive = archives / "archive"
                await self._downloader.download(request.url, archive, size=offer.size or None)
                image = images / "image"
                files = await self._worker.run(_unpack, archive, image, offer)
                told = [pb.ImageFile(relative_path=one.path, sha256=one.sha256, size=one.size) for one in files]
                info = pb.ImageContentInfo(request_id=request.request_id, image_files=told)
                await stream.send(pb.SMIncomingMessages(image_content_info=info).SerializeToString())
                for file in files:
                    await self._send_file(stream, request.request_id, image, file)
            finally:
                for directory in (archives, images):
                    await self._worker.run(remove_tree, directory)

    def _make_room(self, size: int) -> tuple[Path, Path]:
        # The archive and what comes out of it; how much that is only unpacking shows, and no space ends that, too.
        if available_bytes(self._downloads) - size < self._min_free_bytes:
            raise NoSpaceError(f"no room for {size} bytes in {self._downloads}")
        archives, images = (
            Path(tempfile.mkdtemp(prefix="request-", dir=directory)) for directory in (self._downloads, self._images)
        )
        return archives, images

    async def _send_file(self, stream: Stream, request_id: int, image: Path, file: ImageFile) -> None:
        pieces = pieces_of(image, file)
        while some := await self._worker.run(_take, pieces):
            for part, data in some:
                content = pb.ImageContent(
                    request_id=request_id,
                    relative_path=file.path,
                    parts_count=file.parts_count,
                    part=part,
                    data=data,
                )
                await stream.send(pb.SMIncomingMessages(image_content=content).SerializeToString())


def _take(pieces: Iterator[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    return list(itertools.islice(pieces, _PIECES_AT_ONCE))


def _unpack(archive: Path, image: Path, offer: Offer) -> list[ImageFile]:
    actual = file_digest(archive)
    if offer.size and archive.stat().st_size != offer.size:
        raise ChecksumError(f"the archive has {archive.stat().st_size} bytes, CM announced {offer.size}")
    if not hmac.compare_digest(actual, f"sha256:{offer.sha256.hex()}"):
        raise ChecksumError(f"content of the archive is {actual}, CM announced sha256:{offer.sha256.hex()}")
    unpack_image(archive, image)
    files = files_of(image)
    if len(files) > MAX_FILES:
        raise OutOfRangeError(f"the image has {len(files)} files, {MAX_FILES} is most for this node")
    return files


class LegacySm(ServerRelay):
    """Relays the SM of one link. `claim(connection, node_id)` ties the link to a node, or raises AosError."""

    def __init__(
        self,
        port: int,
        address: str,
        way: Way,
        *,
        claim: Callable[[Connection, str], None],
        images: LegacyImages,
        archiver: LogArchiver,
    ) -> None:
        super().__init__(port, address, _REGISTER_SM, [way], what="RegisterSM (v4) at CM", check=self._check)
        self._claim = claim
        self._images = images
        self._archiver = archiver
        self._offered: dict[str, Offer] = {}
        self._requests: asyncio.Queue[pb.ImageContentRequest] = asyncio.Queue(_MAX_REQUESTS)
        self._archives: asyncio.Queue[Archive] = asyncio.Queue()

    def _check(self, connection: Connection, message: bytes) -> bool:
        """What is for CM passes; images and logs are taken here."""
        try:
            outgoing = pb.SMOutgoingMessages.FromString(message)
        except DecodeError as error:
            connection.counters.refused += 1
            _log.warning(kv("Message of node is malformed, dropped", peer=connection.peer, error=error))
            return False
        kind = outgoing.WhichOneof("SMOutgoingMessage")
        if kind is None:
            # The first member of the newer interface is none of this one.
            connection.shut("the peer began like one of the older kind and speaks a newer interface")
            raise InvalidArgumentError("the SM of a peer of the older kind does not speak servicemanager.v4")
        if kind == "node_config_status":
            if not outgoing.node_config_status.node_id:
                raise InvalidArgumentError("the node config status has no node id")
            self._claim(connection, outgoing.node_config_status.node_id)
        elif not connection.node_id:
            raise InvalidArgumentError("the SM did not begin with node_config_status")
        match kind:
            case "image_content_request":
                try:
                    self._requests.put_nowait(outgoing.image_content_request)
                except asyncio.QueueFull:
                    _log.error(kv("Too many requests for images, one is dropped", nodeID=connection.node_id))
                return False
            case "log":
                self._take_log(outgoing.log)
                return False
            case "clock_sync_request":
                connection.counters.refused += 1
                _log.warning(kv("The clock has a channel of its own, dropped", peer=connection.peer))
                return False
        return True

    def _take_log(self, log: pb.LogData) -> None:
        # Status words that nobody knows count as more to come, as for AosCore.
        status = log.status if log.status in ("error", "empty", "absent") else "ok"
        now_s = asyncio.get_running_loop().time()
        if archive := self._archiver.add(log.log_id, log.data, status, convert.error_from_pb(log.error), now_s):
            self._archives.put_nowait(archive)

    def _see(self, message: bytes) -> None:
        """Remember what CM offers: nothing else is fetched for the node."""
        try:
            incoming = pb.SMIncomingMessages.FromString(message)
        except DecodeError:
            return
        if incoming.WhichOneof("SMIncomingMessage") == "run_instances":
            run = incoming.run_instances
            offers = {one.url: Offer(one.sha256, one.size) for one in run.services}
            offers |= {one.url: Offer(one.sha256, one.size) for one in run.layers}
            self._offered = {url: offer for url, offer in self._offered.items() if url not in offers} | offers
            while len(self._offered) > _MAX_OFFERED:
                del self._offered[next(iter(self._offered))]

    async def _beside(self, stream: Stream, write: Callable[[bytes], Awaitable[None]]) -> None:
        running: dict[int, asyncio.Task[None]] = {}
        helpers = [asyncio.create_task(self._look_for_silent_logs())]
        helpers.append(asyncio.create_task(self._start_images(stream, running)))
        try:
            while True:
                archive = await self._archives.get()
                for message in _log_messages(archive):
                    await write(message)
        finally:
            await end_tasks([*helpers, *running.values()])

    async def _look_for_silent_logs(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_AT_LOGS_S)
            for archive in self._archiver.overdue(asyncio.get_running_loop().time()):
                self._archives.put_nowait(archive)

    async def _start_images(self, stream: Stream, running: dict[int, asyncio.Task[None]]) -> None:
        while True:
            request = await self._requests.get()
            if request.request_id in running:
                busy = AlreadyExistsError(f"request {request.request_id} is already being answered")
                with contextlib.suppress(AosError):
                    await stream.send(_refused(request.request_id, busy))
            else:
                running[request.request_id] = asyncio.create_task(self._answer(stream, request, running))

    async def _answer(
        self, stream: Stream, request: pb.ImageContentRequest, running: dict[int, asyncio.Task[None]]
    ) -> None:
        with log_and_continue(_log, f"Request {request.request_id} for an image failed"):
            try:
                if request.content_type != "service":
                    raise InvalidArgumentError(f"content type {request.content_type!r} is not one of those served")
                offer = self._offered.get(request.url)
                if offer is None:
                    raise InvalidArgumentError("this address was not offered to the node")
                await self._images.send(stream, request, offer)
            except (AosError, OSError) as error:
                if not stream.is_closed:
                    _log.error(kv("Image can't be sent", url=request.url, error=error))
                    await stream.send(_refused(request.request_id, error))
            finally:
                running.pop(request.request_id, None)


def _refused(request_id: int, error: BaseException) -> bytes:
    info = pb.ImageContentInfo(request_id=request_id, error=convert.error_to_pb_v1(to_error_info(error)))
    return pb.SMIncomingMessages(image_content_info=info).SerializeToString()


def _log_messages(archive: Archive) -> list[bytes]:
    messages = []
    for members, error in archive.log_data():
        log = pb.LogData(log_id=archive.log_id, **members)
        if error is not None:
            log.error.CopyFrom(convert.error_to_pb_v1(error))
        messages.append(pb.SMOutgoingMessages(log=log).SerializeToString())
    return messages


def answer_to_clock(message: bytes) -> bytes | None:
    """The answer to a question of the older kind for the time; None for everything else.

    Raises WrongStateError for the question of a newer peer: then this is none of the older kind.
    """
    try:
        outgoing = pb.SMOutgoingMessages.FromString(message)
    except DecodeError:
        return None
    if outgoing.WhichOneof("SMOutgoingMessage") == "clock_sync_request":
        return pb.SMIncomingMessages(clock_sync=pb.ClockSync(current_time=main_time())).SerializeToString()
    if message[:1] in (b"\x22", b"\x0a"):
        raise WrongStateError("the peer began like one of the older kind and speaks a newer interface")
    return None


class LegacyGateway:
    """What a gateway serves on the links of peers of the older kind.

    `relays` are those of IAM; `make_sm` makes the relay of one link's SM, None while provisioning.
    """

    def __init__(
        self, cm_open: int, relays: Sequence[ServerRelay], make_sm: Callable[[], LegacySm] | None = None
    ) -> None:
        self._cm_open = cm_open
        self._relays = relays
        self._make_sm = make_sm

    def services(self, connection: Connection) -> list[Coroutine[Any, Any, None]]:
        """To be run side by side for one link."""
        relays = [*self._relays, *([self._make_sm()] if self._make_sm is not None else [])]
        return [self._answer_clock(connection), *(relay.serve(connection) for relay in relays)]

    async def _answer_clock(self, connection: Connection) -> None:
        while True:
            stream = await connection.accept(self._cm_open)
            try:
                while True:
                    answer = answer_to_clock(await stream.receive())
                    if answer is not None:
                        await stream.send(answer)
                    else:
                        connection.counters.refused += 1
                        _log.warning(kv("Only the clock is on the open channel, dropped", peer=connection.peer))
            except ChannelClosedError as error:
                _log.debug(kv("Clock channel is off", peer=connection.peer, reason=error))
            except WrongStateError as error:
                connection.shut(str(error))
