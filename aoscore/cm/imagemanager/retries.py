"""When and from where a blob is tried again (cm-cloud.md §18). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from aoscore.common.aio import Backoff
from aoscore.common.errors import AosError, ChecksumError, SignatureError

FIRST_PAUSE_S: Final = 2.0
LONGEST_PAUSE_S: Final = 300.0
ROUNDS_PER_ANSWER: Final = 3
MAX_CHECKSUM_ERRORS: Final = 3


class Next(msgspec.Struct, frozen=True):
    """What to do after a failure: wait, then ask for fresh URLs or go on with `BlobRetries.url`."""

    pause_s: float
    ask: bool


class BlobRetries:
    """The attempts for one blob. Begins with "ask the cloud for URLs".

    URLs are tried in turn without a pause; after each round comes a growing one. Fresh URLs are asked for when every
    URL has refused for good, and after three rounds. The blob is given up when nothing has arrived for `give_up_s`,
    or when its content was wrong three times.
    """

    def __init__(self, *, give_up_s: float, now: float, backoff: Backoff | None = None) -> None:
        self._give_up_s = give_up_s
        self._backoff = backoff or Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._last_progress = now
        self._urls: list[str] = []
        self._index = 0
        self._rounds = 0
        self._checksum_errors = 0

    @property
    def url(self) -> str:
        """Where to download from now; only after `take`."""
        return self._urls[self._index]

    def take(self, urls: Sequence[str]) -> None:
        """The cloud's answer: at least one URL."""
        self._urls = list(urls)
        self._index = 0
        self._rounds = 0

    def progressed(self, now: float) -> None:
        """Bytes have arrived."""
        self._last_progress = now
        self._backoff.reset()

    def asking_failed(self, error: AosError, now: float) -> Next:
        """The cloud gave no URLs. Raises `error` when it is time to give up."""
        self._check_age(error, now)
        return Next(self._backoff.next(), ask=True)

    def download_failed(self, error: AosError, now: float, *, url_is_dead: bool) -> Next:
        """The transfer from `url` failed; `url_is_dead`: it will never work. Raises `error` to give up."""
        self._check_age(error, now)
        if url_is_dead:
            del self._urls[self._index]
        else:
            self._index += 1
        if not self._urls:
            return Next(self._backoff.next(), ask=True)
        if self._index < len(self._urls):
            return Next(0.0, ask=False)
        self._index = 0
        self._rounds += 1
        return Next(self._backoff.next(), ask=self._rounds >= ROUNDS_PER_ANSWER)

    def content_failed(self, error: AosError) -> Next:
        """The file arrived whole and is wrong. Raises `error` when trying again is no use."""
        self._checksum_errors += 1
        if not isinstance(error, ChecksumError) or isinstance(error, SignatureError):
            raise error
        if self._checksum_errors >= MAX_CHECKSUM_ERRORS:
            raise error
        return Next(self._backoff.next(), ask=True)

    def _check_age(self, error: AosError, now: float) -> None:
        if now - self._last_progress >= self._give_up_s:
            raise error
