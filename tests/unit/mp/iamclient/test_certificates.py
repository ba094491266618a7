"""Our certificates: waited for, renewed after a delay, never exchanged for a bad one."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from aoscore.common.errors import FailedError, NotFoundError
from aoscore.common.iamclient import IamPublicClient
from aoscore.common.types import CertInfo
from aoscore.mp.iamclient.certificates import Certificate
from tests.support.pki import TestCa
from tests.support.running import running, until


class FakeIam:
    def __init__(self) -> None:
        self.cert: CertInfo | None = None
        self.news: asyncio.Queue[CertInfo] = asyncio.Queue()
        self.asked = 0

    async def get_cert(self, cert_type: str) -> CertInfo:
        self.asked += 1
        if self.cert is None:
            raise FailedError("IAM is starting")
        return self.cert

    async def watch_cert(self, cert_type: str) -> AsyncIterator[CertInfo]:
        while True:
            yield await self.news.get()


@pytest.fixture
def issue(tmp_path: Path) -> Any:
    ca = TestCa()
    ca.write_root(tmp_path)

    def make(name: str) -> CertInfo:
        return CertInfo("sm", *ca.issue(name).write(tmp_path, name))

    return make


def certificate(iam: FakeIam, tmp_path: Path) -> Certificate:
    return Certificate(cast("IamPublicClient", iam), "sm", tmp_path / "root.pem", apply_delay_s=0.05, retry_s=0.01)


async def test_waits_for_iam(tmp_path: Path, issue: Any) -> None:
    iam = FakeIam()
    own = certificate(iam, tmp_path)
    async with running(own):
        await until(lambda: iam.asked > 2)
        with pytest.raises(NotFoundError, match="certificate sm is not known yet"):
            _ = own.identity
        iam.cert = issue("first")
        await own.known.wait()
        assert own.identity.cert_url.endswith("first.pem")


async def test_renewal_is_told_and_a_bad_one_is_not_taken(tmp_path: Path, issue: Any) -> None:
    iam = FakeIam()
    iam.cert = issue("first")
    own = certificate(iam, tmp_path)
    with own.changed.subscribe() as changes:
        async with running(own):
            await own.known.wait()
            iam.news.put_nowait(iam.cert)
            bad = issue("bad")
            (tmp_path / "bad.key").write_text("no key")
            iam.news.put_nowait(bad)
            await until(lambda: iam.asked > 1)
            assert own.identity.cert_url.endswith("first.pem")
            iam.news.put_nowait(issue("second"))
            assert (await changes.get()).cert_url.endswith("second.pem")
            assert own.identity.cert_url.endswith("second.pem")
