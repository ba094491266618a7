"""The link to the cloud over a network that does everything wrong: it recovers, what is important arrives once."""

import asyncio
import contextlib
import random
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aoscore.cm import database
from aoscore.cm.communication import link as link_module
from aoscore.cm.communication.link import CloudLink, LinkSettings
from aoscore.cm.communication.messages import FinishProvisioningResponse, Identity
from aoscore.cm.communication.outbox import Outbox
from aoscore.common import websocket
from aoscore.common.aio import Worker
from aoscore.common.db import Database, Schema
from aoscore.common.tls import TlsIdentity
from tests.support.cloud import FakeCloud
from tests.support.faultproxy import FAULTS, Fault, FaultProxy
from tests.support.pki import TestCa
from tests.support.running import running, until

pytestmark = pytest.mark.timeout(180)

SYSTEM = "unit-1"


class Identities:
    def __init__(self, identity: TlsIdentity) -> None:
        self._identity = identity

    async def online_identity(self) -> TlsIdentity:
        return self._identity


class Bed:
    """Cloud, proxy and database; links come and go."""

    def __init__(
        self, cloud: FakeCloud, proxy: FaultProxy, db: Database, worker: Worker, identity: TlsIdentity
    ) -> None:
        self.cloud = cloud
        self.proxy = proxy
        self.db = db
        self._worker = worker
        self._identity = identity
        self.said: list[str] = []

    @contextlib.asynccontextmanager
    async def link(self) -> AsyncIterator[CloudLink]:
        """A process's link."""
        settings = LinkSettings(
            discovery_url=f"https://127.0.0.1:{self.proxy.port}/sd/v7/",
            response_timeout_s=1.0,
            ping_period_s=0.5,
            reconnect_first_s=0.05,
            reconnect_limit_s=0.5,
        )
        link = CloudLink(SYSTEM, settings, Identities(self._identity), self._worker, outbox=Outbox(self.db))
        async with running(link):
            yield link

    async def say(self, link: CloudLink, count: int) -> None:
        """Important messages, told apart by their correlation id."""
        for _ in range(count):
            name = f"c{len(self.said)}"
            self.said.append(name)
            await link.send(FinishProvisioningResponse(correlation_id=name, node=Identity.of_codename("n")))

    def heard(self) -> list[str]:
        """What the cloud takes in: the first of all frames with one txn."""
        by_txn = {
            frame["header"]["txn"]: frame["data"]["correlationId"]
            for frame in self.cloud.frames
            if frame["data"]["messageType"] == "finishProvisioningResponse"
        }
        return list(by_txn.values())

    async def all_heard(self) -> None:
        try:
            await until(lambda: set(self.heard()) == set(self.said), 60)
        except TimeoutError:
            raise AssertionError(f"lost: {sorted(set(self.said) - set(self.heard()))}") from None
        assert sorted(self.heard()) == sorted(self.said)
        async with asyncio.timeout(60):
            while await self.db.select("SELECT txn FROM aoscore_outbox"):
                await asyncio.sleep(0.02)


@pytest.fixture
async def bed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bed]:
    monkeypatch.setattr(websocket, "CONNECT_TIMEOUT_S", 2.0)
    monkeypatch.setattr(link_module, "DISCOVERY_TIMEOUT_S", 2.0)
    ca = TestCa()
    identity = ca.identity(tmp_path, "online")
    ca.issue("cloud").write(tmp_path, "cloud")
    TestCa("Portal").issue("portal").write(tmp_path, "portal")
    contexts = []
    for name in ("cloud", "portal"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
        contexts.append(context)
    contexts[0].load_verify_locations(cadata=ca.root_pem.decode())
    contexts[0].verify_mode = ssl.CERT_REQUIRED
    schema = Schema(create=database.OWN_TABLES)
    async with (
        Worker("test") as worker,
        Database(tmp_path / "cm.db", schema) as db,
        FakeCloud(SYSTEM, contexts[0]).running() as cloud,
        FaultProxy(cloud.port, contexts[1]).running() as proxy,
    ):
        cloud.discovery = {"connectionInfo": [f"wss://127.0.0.1:{proxy.port}/ws"]}
        yield Bed(cloud, proxy, db, worker, identity)


@pytest.mark.parametrize("fault", FAULTS)
async def test_each_fault(bed: Bed, fault: Fault) -> None:
    async with bed.link() as link:
        await link.wait_connected()
        await bed.say(link, 3)
        await bed.proxy.set(fault)
        await bed.say(link, 5)
        if fault in ("refuse", "drop", "half-open"):
            # Nothing can have ended by itself in a half-open connection: pings find it out.
            await until(lambda: not link.connected, 30)
        elif fault == "captive":
            await bed.cloud.sockets[-1].close()
            seen = bed.proxy.connections
            await until(lambda: bed.proxy.connections >= seen + 3, 30)
            assert not link.connected
        else:
            await bed.say(link, 20)
            await asyncio.sleep(1.0)
        await bed.say(link, 5)
        await bed.proxy.set("none")
        await bed.all_heard()
        await until(lambda: link.connected)


async def test_all_faults_in_any_order_and_restarts_between(bed: Bed) -> None:
    rng = random.Random(11)
    for _ in range(4):
        async with bed.link() as link:
            for fault in rng.sample(FAULTS, 3):
                await bed.proxy.set(fault)
                await bed.say(link, rng.randrange(4))
                await asyncio.sleep(rng.uniform(0.0, 0.6))
                if rng.random() < 0.5:
                    await bed.proxy.set("none")
                await bed.say(link, rng.randrange(4))
    await bed.proxy.set("none")
    async with bed.link():
        await bed.all_heard()
    assert len(bed.said) > 10
