"""Brings blobs from the cloud into the store: URLs, transfer, check, decryption, signature (cm-cloud.md §5.4)."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from aoscore.cm.communication.messages import BlobInfo, BlobUrls, DownloadProgressAlert, DownloadState, ErrorInfo
from aoscore.cm.imagemanager.retries import BlobRetries, Next
from aoscore.cm.imagemanager.space import Space
from aoscore.common.aio import Worker, raise_if_abandoned
from aoscore.common.blobstore import BlobStore, check_digest
from aoscore.common.download import Downloader, HttpStatusError
from aoscore.common.errors import (
    AosError,
    ChecksumError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    OutOfRangeError,
    RuntimeFailure,
    SignatureError,
    to_error_info,
)
from aoscore.common.files import remove_tree
from aoscore.common.log import kv

if TYPE_CHECKING:
    from aoscore.cm.imagemanager.crypto import Signers

_log = logging.getLogger(__name__)

DIGESTS_PER_REQUEST: Final = 16
PROGRESS_PERIOD_S: Final = 30.0
_COPY_BYTES: Final = 1024 * 1024


class UrlSource(Protocol):
    """Asks the cloud where blobs are."""

    async def blob_urls(self, digests: Sequence[str]) -> BlobUrls:
        """The answer for at most 16 digests. Raises AosError when there is none."""


class FetchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where files are and what is allowed."""

    download_dir: Path
    """Partial files, one per digest, kept over restarts."""
    unpack_dir: Path
    """Decrypted files before they are checked, on the file system of the store."""
    require_signature: bool = True
    parallel: int = 4
    give_up_s: float = 3600.0


class UrlBook:
    """Gathers the digests of parallel downloads into few requests."""

    def __init__(self, source: UrlSource) -> None:
        self._source = source
        self._wanted: dict[str, list[asyncio.Future[BlobInfo]]] = {}
        self._wake = asyncio.Event()

    async def info(self, digest: str) -> BlobInfo:
        """What the cloud says about a blob. Raises NotFoundError when it does not know it, AosError otherwise."""
        future: asyncio.Future[BlobInfo] = asyncio.get_running_loop().create_future()
        self._wanted.setdefault(digest, []).append(future)
        self._wake.set()
        return await future

    async def run(self) -> None:
        """Asks, until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(0)  # whoever wants a blob in this turn of the loop comes along
            batch = list(self._wanted)[:DIGESTS_PER_REQUEST]
            waiting = {digest: self._wanted.pop(digest) for digest in batch}
            if not self._wanted:
                self._wake.clear()
            try:
                answer = await self._source.blob_urls(batch)
            except AosError as error:
                for futures in waiting.values():
                    for future in futures:
                        if not future.done():
                            future.set_exception(error)
                continue
            self._hand_out(answer, waiting)

    @staticmethod
    def _hand_out(answer: BlobUrls, waiting: dict[str, list[asyncio.Future[BlobInfo]]]) -> None:
        infos: dict[str, BlobInfo] = {}
        for info in answer.items:
            if info.digest not in waiting or info.digest in infos:
                _log.warning(kv("The cloud names a blob nobody asked for", digest=info.digest))
                continue
            infos[info.digest] = info
        for digest, futures in waiting.items():
            for future in futures:
                if future.done():
                    continue
                if digest in infos:
                    future.set_result(infos[digest])
                else:
                    future.set_exception(NotFoundError(f"the cloud does not know blob {digest}"))


class Fetch:
    """One download run: every blob is fetched at most once, whoever asks for it.

    Runs inside an asyncio.TaskGroup given by the caller; `blob` may be called from any task.
    """

    def __init__(self, fetcher: Fetcher, signers: Signers, group: asyncio.TaskGroup) -> None:
        self._fetcher = fetcher
        self._signers = signers
        self._group = group
        self._book = UrlBook(fetcher.urls)
        self._asker = group.create_task(self._book.run(), name="blob URLs")
        self._slots = asyncio.Semaphore(fetcher.settings.parallel)
        self._blobs: dict[str, asyncio.Task[AosError | None]] = {}

    async def blobs(self, digests: Sequence[str]) -> None:
        """Brings blobs into the store. Raises the first error, after all of them have ended."""
        results = [await task for task in [self._task(digest) for digest in digests]]
        for error in results:
            if error is not None:
                raise error

    def _task(self, digest: str) -> asyncio.Task[AosError | None]:
        if digest not in self._blobs:
            self._blobs[digest] = self._group.create_task(self._run(digest), name=f"blob {digest[:19]}")
        return self._blobs[digest]

    async def _run(self, digest: str) -> AosError | None:
        try:
            await self._fetcher.fetch(check_digest(digest), self._book, self._slots, self._signers)
        except AosError as error:
            _log.error(kv("Blob can't be fetched", digest=digest, error=error))
            return error
        except OSError as error:
            # A full or broken disk must not end the other downloads.
            text = f"blob {digest} can't be stored: {error.strerror or error}"
            _log.error(text)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return NoSpaceError(text) if full else RuntimeFailure(text, error.errno or 0)
        return None

    def close(self) -> None:
        """No more blobs will be asked for."""
        self._asker.cancel()


class Fetcher:
    """What all runs share."""

    def __init__(
        self,
        store: BlobStore,
        settings: FetchSettings,
        *,
        urls: UrlSource,
        downloader: Downloader,
        space: Space,
        worker: Worker,
        alert: Callable[[DownloadProgressAlert], None] = lambda _: None,
        retries: Callable[[float, float], BlobRetries] = lambda give_up_s, now: BlobRetries(
            give_up_s=give_up_s, now=now
        ),
    ) -> None:
        self.settings = settings
        self.urls = urls
        self._store = store
        self._downloader = downloader
        self._space = space
        self._worker = worker
        self._alert = alert
        self._retries = retries
        self._active: set[str] = set()

    def prepare(self) -> None:
        """Makes the directories and removes what an interrupted unpacking left. Blocks."""
        self.settings.download_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_tree(self.settings.unpack_dir)
        self.settings.unpack_dir.mkdir(mode=0o700, parents=True)

    def partial_path(self, digest: str) -> Path:
        """Where a blob is collected."""
        return self.settings.download_dir / check_digest(digest).removeprefix("sha256:")

    def idle_partials(self) -> list[Path]:
        """Partial files that nobody is working on, oldest first."""
        files = [path for path in self.settings.download_dir.iterdir() if path.is_file()]
        return sorted((path for path in files if path.name not in self._active), key=lambda path: path.stat().st_mtime)

    async def fetch(self, digest: str, book: UrlBook, slots: asyncio.Semaphore, signers: Signers) -> None:
        """Brings one blob into the store, if it is not there and sound. Raises AosError when it cannot be had."""
        if await self._is_there(digest):
            return
        loop = asyncio.get_running_loop()
        retries = self._retries(self.settings.give_up_s, loop.time())
        info: BlobInfo | None = None
        self._active.add(self.partial_path(digest).name)
        try:
            while True:
                if info is None:
                    try:
                        info = await book.info(digest)
                    except NotFoundError:
                        raise
                    except AosError as error:
                        await self._pause(digest, retries.asking_failed(error, loop.time()), error)
                        continue
                    self._check_allowed(info)
                    retries.take(info.urls)
                async with slots:
                    step, reason = await self._attempt(info, retries, signers)
                if step is None:
                    return
                await self._pause(digest, step, reason)
                if step.ask:
                    info = None
        finally:
            self._active.discard(self.partial_path(digest).name)

    async def _is_there(self, digest: str) -> bool:
        if not self._store.contains(digest):
            return False
        try:
            await self._worker.run(self._store.verify, digest)
        except ChecksumError as error:
            _log.error("%s, fetching it again", error)
            await self._worker.run(self._store.remove, digest)
            return False
        return True

    def _check_allowed(self, info: BlobInfo) -> None:
        if info.sign_info is None and self.settings.require_signature:
            raise SignatureError(f"blob {info.digest} is not signed")

    @staticmethod
    async def _pause(digest: str, step: Next, reason: AosError | None) -> None:
        _log.warning(kv("Blob is tried again", digest=digest, pause_s=round(step.pause_s, 1), reason=reason))
        await asyncio.sleep(step.pause_s)

    async def _attempt(
        self, info: BlobInfo, retries: BlobRetries, signers: Signers
    ) -> tuple[Next | None, AosError | None]:
        """One transfer and what follows it. None as first value: the blob is in the store."""
        loop = asyncio.get_running_loop()
        partial = self.partial_path(info.digest)
        try:
            await self._transfer(info, retries)
        except NoSpaceError:
            raise
        except OutOfRangeError as error:
            wrong = ChecksumError(f"blob {info.digest} has another size than announced: {error}")
            return retries.content_failed(wrong), wrong
        except AosError as error:
            dead = isinstance(error, NotFoundError | InvalidArgumentError) or (
                isinstance(error, HttpStatusError) and error.is_final
            )
            return retries.download_failed(error, loop.time(), url_is_dead=dead), error
        try:
            await self._install(info, partial, signers)
        except AosError as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, NoSpaceError):
                raise
            return retries.content_failed(error), error
        return None, None

    async def _transfer(self, info: BlobInfo, retries: BlobRetries) -> None:
        """Downloads the file, with its space reserved and its progress told."""
        loop = asyncio.get_running_loop()
        partial = self.partial_path(info.digest)
        present = partial.stat().st_size if partial.exists() else 0
        url = retries.url
        reservation = await self._space.ensure(
            self.settings.download_dir, info.size, written_bytes=min(present, info.size)
        )
        last_told = loop.time()
        received = present

        def progress(received_bytes: int, total_bytes: int | None) -> None:
            nonlocal last_told, received
            received = received_bytes
            reservation.written(received_bytes)
            retries.progressed(loop.time())
            if loop.time() - last_told >= PROGRESS_PERIOD_S:
                last_told = loop.time()
                self._tell(info, url, received_bytes, DownloadState.STARTED)

        with self._space.held(reservation):
            try:
                await self._downloader.download(url, partial, size=info.size or None, progress=progress)
            except AosError as error:
                if isinstance(error, NoSpaceError):
                    # It has taken the last byte, which the database needs to say so.
                    partial.unlink(missing_ok=True)
                self._tell(info, url, received, DownloadState.INTERRUPTED, error)
                raise
        if not url.startswith("file:"):
            self._tell(info, url, partial.stat().st_size, DownloadState.FINISHED)

    async def _install(self, info: BlobInfo, partial: Path, signers: Signers) -> None:
        """Checks what was downloaded and moves it into the store."""
        # Imports on use, here and below: most of the time nothing is downloaded.
        from aoscore.cm.imagemanager.crypto import check_transfer

        same_disk = partial.stat().st_dev == self.settings.unpack_dir.stat().st_dev
        if info.decrypt_info is None and same_disk:
            await self._worker.run(check_transfer, partial, info.sha256)
            await self._worker.run(self._check_and_adopt, partial, info, signers)
            return
        size = partial.stat().st_size
        reservation = await self._space.ensure(self.settings.unpack_dir, size)
        target = self.settings.unpack_dir / partial.name
        with self._space.held(reservation):
            try:
                # Side by side, since each takes as long as the other.
                checked, actual = await asyncio.gather(
                    self._worker.run(check_transfer, partial, info.sha256),
                    self._worker.run(unpack, partial, target, info),
                    return_exceptions=True,
                )
                if isinstance(checked, BaseException):
                    raise checked
                if isinstance(actual, BaseException):
                    raise actual
                await self._worker.run(self._check_and_adopt, target, info, signers, actual)
            finally:
                target.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)

    def _check_and_adopt(self, path: Path, info: BlobInfo, signers: Signers, actual: str = "") -> None:
        if info.sign_info is not None:
            signers.verify(path, info.digest, info.sign_info, now=datetime.now(UTC))
        self._store.adopt(path, info.digest, actual=actual)

    def _tell(
        self, info: BlobInfo, url: str, received_bytes: int, state: DownloadState, error: AosError | None = None
    ) -> None:
        self._alert(
            DownloadProgressAlert(
                timestamp=datetime.now(UTC),
                digest=info.digest,
                url=url,
                downloaded_bytes=received_bytes,
                total_bytes=info.size,
                state=state,
                reason="" if error is None else str(error),
                error_info=None if error is None else ErrorInfo.of(to_error_info(error)),
            )
        )


def unpack(source: Path, target: Path, info: BlobInfo) -> str:
    """Writes what a downloaded file holds, and returns its digest. Blocks: call it in a worker."""
    if info.decrypt_info is not None:
        from aoscore.cm.imagemanager.crypto import decrypt

        return decrypt(source, target, info.decrypt_info)
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_COPY_BYTES):
            raise_if_abandoned()
            digest.update(chunk)
            writer.write(chunk)
    return f"sha256:{digest.hexdigest()}"
