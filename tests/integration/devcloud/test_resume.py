"""The Unit's downloader and a real cloud's blob server: going on with a part of a blob, and with one that changed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aoscore.common.aio import Backoff, Worker
from aoscore.common.download import Downloader
from tests.support.devcloud import DevcloudProcess

SIZE = 3_000_000
NAME = "ab" * 32


class StopError(Exception):
    """Ends a download in the middle."""


@pytest.fixture
def blob(cloud: DevcloudProcess) -> Iterator[Path]:
    """A blob as the cloud has it on its disk."""
    path = cloud.directory / "sealed" / NAME
    path.write_bytes(os.urandom(SIZE))
    yield path
    path.unlink()


@pytest.mark.parametrize("changed", [False, True])
async def test_a_blob_comes_in_two_parts(cloud: DevcloudProcess, blob: Path, tmp_path: Path, *, changed: bool) -> None:
    """This server sends parts whatever the condition says, and its ETag tells: a part of another file is not taken."""
    url, target = f"http://localhost:{cloud.ports['blob_port']}/blobs/sha256/{NAME}", tmp_path / "x"
    steps: list[int] = []

    def stop(received: int, _: int | None) -> None:
        raise StopError

    async with Worker("test") as worker:
        downloader = Downloader(worker, backoff=lambda: Backoff(0.01, 0.02))
        with pytest.raises(StopError):
            await downloader.download(url, target, size=SIZE, progress=stop)
        have = target.stat().st_size
        assert 0 < have < SIZE
        if changed:
            blob.write_bytes(os.urandom(SIZE))
            os.utime(blob, ns=(blob.stat().st_atime_ns, blob.stat().st_mtime_ns + 1_000_000_000))
        await downloader.download(url, target, size=SIZE, progress=lambda now, _: steps.append(now))
    assert target.read_bytes() == blob.read_bytes()
    assert steps == sorted(steps), "nothing came twice"
    assert changed or steps[0] > have
