"""Download of one file over http, https or file, going on where an earlier attempt stopped (cm-cloud.md §6)."""

import asyncio
import contextlib
import errno
import logging
import os
import re
import shutil
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

from aoscore.common.aio import Backoff, Worker
from aoscore.common.errors import (
    AosError,
    DeadlineError,
    FailedError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    OutOfRangeError,
    RuntimeFailure,
)
from aoscore.common.http import Stream, open_stream, split_url, without_query
from aoscore.common.pacing import SpeedLimit

_log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_WRITE_BYTES = 1024 * 1024
MAX_REDIRECTS = 5


class TooSlowError(DeadlineError):
    """The server trickles; the partial file stays, another URL may be faster."""


class HttpStatusError(RuntimeFailure):
    """The server answered with an error status; `errno` is that status, as the cloud expects it (cm-cloud.md §6)."""

    @property
    def is_final(self) -> bool:
        """Whether the same request will never work: the link is wrong, expired or forbidden."""
        return 400 <= self.errno < 500 and self.errno not in (408, 425, 429)


class Downloader:
    """Fetches files. One object serves many downloads at a time.

    `idle_timeout_s`: longest silence of a server, and the time over which it must send `min_speed` bytes per second on
    average. `attempts`: tries per call, with growing pauses between them; the
    count begins anew whenever data came, so a long download over a weak link ends. `tls`: asked before each try for
    the TLS of https; the system's root CAs without it. `speed_limit` holds for all downloads together.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        tls: Callable[[], Awaitable[ssl.SSLContext | None]] | None = None,
        attempts: int = 3,
        idle_timeout_s: float = 60.0,
        min_speed: float = 1024.0,
        backoff: Callable[[], Backoff] = lambda: Backoff(1.0, 5.0),
        speed_limit: SpeedLimit | None = None,
    ) -> None:
        self._worker = worker
        self._tls = tls
        self._attempts = attempts
        self._idle_timeout_s = idle_timeout_s
        self._min_speed = min_speed
        self._backoff = backoff
        self._speed_limit = speed_limit

    async def download(
        self, url: str, path: Path, *, size: int | None = None, progress: Progress | None = None
    ) -> None:
        """Bring `path` to the full content of `url`.

        What `path` already holds is taken as the beginning and only the rest is asked for, on the condition that the
        server still has the same content, as far as it said how to know that. `size`: expected length in
        bytes; more than that is refused with OutOfRangeError. `progress(bytes_so_far, total or None)` is called for
        every piece. On an error the partial file stays for the next attempt. Raises HttpStatusError, NoSpaceError,
        FailedError, DeadlineError; TooSlowError without another attempt.
        """
        if split_url(url).scheme == "file":
            await self._worker.run(_copy_local, url, path)
            return
        backoff = self._backoff()
        left = self._attempts
        while True:
            before = path.stat().st_size if path.exists() else 0
            try:
                await self._attempt(url, path, size, progress)
                return
            except (NoSpaceError, OutOfRangeError, InvalidArgumentError, TooSlowError):
                raise
            except HttpStatusError as error:
                left -= 1
                if error.is_final or left <= 0:
                    raise
                reason: AosError = error
            except AosError as error:
                advanced = path.exists() and path.stat().st_size > before
                if advanced:
                    backoff.reset()
                left = self._attempts if advanced else left - 1
                if left <= 0:
                    raise
                reason = error
            pause_s = backoff.next()
            _log.warning(
                "Download interrupted, trying again: url=%s, pause=%.1fs, error=%s", without_query(url), pause_s, reason
            )
            await asyncio.sleep(pause_s)

    @contextlib.asynccontextmanager
    async def _open(self, url: str, headers: dict[str, str]) -> AsyncIterator[Stream]:
        """Ask for a file, following redirects."""
        context = await self._tls() if self._tls is not None else None
        for _ in range(MAX_REDIRECTS + 1):
            async with open_stream("GET", url, headers=headers, ssl_context=context) as stream:
                target = redirected(url, stream.status, stream.headers.get("location", ""))
                if target is None:
                    yield stream
                    return
                url = target
        raise FailedError(f"more than {MAX_REDIRECTS} redirects, the last one to {without_query(url)}")

    async def _attempt(self, url: str, path: Path, size: int | None, progress: Progress | None) -> None:
        offset = path.stat().st_size if path.exists() else 0
        if size is not None and offset == size and size > 0:
            return
        if size is not None and offset > size:
            offset = 0
        noted = _noted_validator(path)
        validator = noted.value if offset and noted.url == without_query(url) else ""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        if validator:
            headers["If-Range"] = validator
        async with self._open(url, headers) as stream:
            total: int | None
            match stream.status:
                case 206:
                    match = _CONTENT_RANGE.fullmatch(stream.headers.get("content-range", ""))
                    if not match or int(match[1]) != offset:
                        path.unlink(missing_ok=True)
                        raise FailedError(f"server sent another range of {without_query(url)} than asked for")
                    if validator and _is_another(validator, stream.headers):
                        # It knows ranges and does not know If-Range.
                        path.write_bytes(b"")
                        _note_validator(path, _NEVER)
                        raise FailedError(f"{without_query(url)} has changed, starting it anew")
                    total = None if match[3] == "*" else int(match[3])
                case 200:
                    offset = 0
                    length = stream.headers.get("content-length", "")
                    total = int(length) if length.isdigit() else None
                case 416:
                    # The partial file is not a beginning of what is there now.
                    path.unlink(missing_ok=True)
                    raise FailedError(f"{without_query(url)} has changed, starting it anew")
                case status:
                    raise HttpStatusError(f"server answered {status} for {without_query(url)}", status)
            if size is not None and total is not None and total != size:
                path.unlink(missing_ok=True)
                raise OutOfRangeError(f"{without_query(url)} has {total} bytes, {size} were announced")
            limit = size if size is not None else total
            with _no_space_is_clear(path), path.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                if stream.status == 200:
                    usable = not validator and noted != _NEVER
                    _note_validator(path, _validator_of(url, stream.headers) if usable else _NEVER)
                received = offset
                pending = bytearray()
                pace = _Pace(self._idle_timeout_s, self._min_speed)
                try:
                    async for chunk in stream.chunks(self._idle_timeout_s):
                        received += len(chunk)
                        pace.check(url, len(chunk))
                        if limit is not None and received > limit:
                            raise OutOfRangeError(f"{without_query(url)} is longer than {limit} bytes")
                        pending += chunk
                        if len(pending) >= _WRITE_BYTES:
                            await self._worker.run(file.write, bytes(pending))
                            pending.clear()
                        if progress:
                            progress(received, total if total is not None else size)
                        if self._speed_limit is not None:
                            pause_s = self._speed_limit.take(len(chunk), asyncio.get_running_loop().time())
                            pace.paused(pause_s)
                            await asyncio.sleep(pause_s)
                finally:
                    # Also when the link broke: what has arrived need not be sent again.
                    file.write(pending)
        if limit is not None and received != limit:
            raise FailedError(f"{without_query(url)} ended after {received} of {limit} bytes")
        _note_validator(path, _UNKNOWN)


def redirected(url: str, status: int, location: str) -> str | None:
    """Where a server sends us; None when its answer is no redirect. Raises FailedError for a place we do not go to."""
    if status not in (301, 302, 303, 307, 308):
        return None
    try:
        target = urljoin(url, location)
        is_as_safe = bool(location) and urlsplit(target).scheme in ("https", urlsplit(url).scheme)
    except ValueError:
        target, is_as_safe = location, False
    if not is_as_safe:
        raise FailedError(f"{without_query(url)} redirects to {without_query(target)}, which is not as safe")
    return target


class _Validator(NamedTuple):
    """What a server calls the content of a file (RFC 9110 §8.8); other servers call the same content otherwise."""

    url: str = ""
    value: str = ""


_UNKNOWN = _Validator()
_NEVER = _Validator("-")
"""Once the server's content was another than noted, its word is not asked for again while this file grows: behind one
name there may be servers that do not agree, and the download has to end. A wrong beginning is found at the end."""

_ATTRIBUTE = "user.aoscore.validator"
"""Of the partial file itself, so that both go together. Where the file system has none, it is `Range` alone."""


def _noted_validator(path: Path) -> _Validator:
    try:
        url, _, value = os.getxattr(path, _ATTRIBUTE).decode(errors="replace").partition(" ")
    except OSError:
        return _UNKNOWN
    return _Validator(url, value)


def _note_validator(path: Path, validator: _Validator) -> None:
    with contextlib.suppress(OSError):
        if validator == _UNKNOWN:
            os.removexattr(path, _ATTRIBUTE)
        else:
            os.setxattr(path, _ATTRIBUTE, f"{validator.url} {validator.value}".encode())


def _validator_of(url: str, headers: Mapping[str, str]) -> _Validator:
    """The strong validator of an answer (RFC 9110 §13.1.5: no other may be sent in If-Range)."""
    etag, modified = headers.get("etag", ""), headers.get("last-modified", "")
    if etag.startswith('"'):
        return _Validator(without_query(url), etag)
    # Import on use: hardly a server has no ETag.
    from email.utils import parsedate_to_datetime

    try:
        age = parsedate_to_datetime(headers.get("date", "")) - parsedate_to_datetime(modified)
    except (TypeError, ValueError):
        return _UNKNOWN
    # A file changed twice in that second would have the same time.
    return _Validator(without_query(url), modified) if age >= timedelta(seconds=1) else _UNKNOWN


def _is_another(validator: str, headers: Mapping[str, str]) -> bool:
    name = "etag" if validator.startswith('"') else "last-modified"
    return headers.get(name, validator) != validator


class _Pace:
    """How fast data comes."""

    def __init__(self, window_s: float, min_speed: float) -> None:
        self._window_s = window_s
        self._min_speed = min_speed
        self._begin_s = asyncio.get_running_loop().time()
        self._bytes = 0

    def paused(self, pause_s: float) -> None:
        """We do not read for so long: that is not the server's slowness."""
        self._begin_s += pause_s

    def check(self, url: str, size_bytes: int) -> None:
        """Some more has come. Raises TooSlowError."""
        self._bytes += size_bytes
        passed_s = asyncio.get_running_loop().time() - self._begin_s
        if passed_s < self._window_s:
            return
        if self._bytes < self._min_speed * passed_s:
            raise TooSlowError(
                f"{without_query(url)} sends {self._bytes / passed_s:.0f} bytes per second, that is too slow"
            )
        self._begin_s += passed_s
        self._bytes = 0


@contextlib.contextmanager
def _no_space_is_clear(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"no space left for {path.name} on its disk") from error
        raise


def _copy_local(url: str, path: Path) -> None:
    source = Path(unquote(urlsplit(url).path))
    try:
        with _no_space_is_clear(path), source.open("rb") as reader, path.open("wb") as writer:
            shutil.copyfileobj(reader, writer, _WRITE_BYTES)
            os.fsync(writer.fileno())
    except FileNotFoundError:
        raise NotFoundError(f"{source} does not exist") from None
