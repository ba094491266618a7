"""A real CM that waits for the start of updates, and a scheduler outside of it: gRPC over mutual TLS."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from aoscore._pb.communicationmanager.v3 import updatescheduler_pb2 as pb
from aoscore._pb.communicationmanager.v3 import updatescheduler_pb2_grpc as stubs
from aoscore._pb.iamanager.v6 import iamanager_pb2 as iam_pb
from aoscore.common.rpc import open_tls_channel
from aoscore.common.tls import TlsIdentity, TlsRoots
from tests.support.iam import TYPES, Iam, free_port
from tests.support.images import Image
from tests.support.unitbed import UnitBed, shown_items, unit_bed

pytestmark = pytest.mark.timeout(120)

A1, A2 = (Image([text.encode() * 1000]) for text in ("a1", "a2"))
State = pb.UpdateState


class Scheduler:
    """What the outside scheduler hears, oldest first."""

    def __init__(self, stub: Any) -> None:
        self.stub = stub
        self.heard: list[pb.SchedulerNotifications] = []
        self._news = asyncio.Event()

    async def listen(self) -> None:
        async for notification in self.stub.SubscribeNotifications(Empty()):
            self.heard.append(notification)
            self._news.set()

    def states(self, kind: str) -> list[int]:
        """States of one kind so far, without repetitions."""
        states = [getattr(one, kind).state for one in self.heard if one.HasField(kind)]
        return [state for index, state in enumerate(states) if index == 0 or states[index - 1] != state]

    async def until_sota(self, state: int) -> pb.UpdateSOTAStatus:
        """The software status once it is in a state."""
        async with asyncio.timeout(30):
            while True:
                self._news.clear()
                last = [one.sota_status for one in self.heard if one.HasField("sota_status")][-1:]
                if last and last[0].state == state:
                    return last[0]
                await self._news.wait()


@pytest.fixture
async def bed(tmp_path: Path, iam: Iam) -> AsyncIterator[tuple[UnitBed, int]]:
    port = free_port()
    settings = {"serverUrl": f"127.0.0.1:{port}", "sota": {"type": "trigger"}}
    async with unit_bed(tmp_path, iam, updateScheduler=settings) as opened:
        for each in (A1, A2):
            opened.blobs.publish(each)
        yield opened, port


def identity_of(iam: Iam) -> TlsIdentity:
    with iam.open() as client:
        info = client.certs.GetCert(iam_pb.GetCertRequest(type=TYPES[3]))
    return TlsIdentity(iam.ca_file, info.cert_url, info.key_url)


async def test_the_driver_starts_the_update(bed: tuple[UnitBed, int], iam: Iam) -> None:
    unit, port = bed
    await unit.start()
    await unit.cloud.connected()
    channel = await open_tls_channel(f"127.0.0.1:{port}", await asyncio.to_thread(identity_of, iam))
    async with channel:
        stub = stubs.UpdateSchedulerServiceStub(channel)
        scheduler = Scheduler(stub)
        listening = asyncio.create_task(scheduler.listen())
        await scheduler.until_sota(State.NO_UPDATE)
        assert [one.WhichOneof("SchedulerNotification") for one in scheduler.heard] == ["fota_status", "sota_status"]
        with pytest.raises(grpc.aio.AioRpcError, match="no sota update is ready to start"):
            await stub.StartSOTAUpdate(Empty())

        await unit.cloud.send_frame(unit.wish(("a", "1.0.0", A1)))
        ready = await scheduler.until_sota(State.READY_TO_UPDATE)
        assert [(one.service_id, one.version) for one in ready.install_services] == [("a", "1.0.0")]
        with pytest.raises(grpc.aio.AioRpcError, match="no fota update is ready to start"):
            await stub.StartFOTAUpdate(Empty())

        # The cloud sees what waits, and nothing runs.
        assert (unit.items, unit.running, unit.phase) == ({"a 1.0.0": "pending"}, {}, "pending")
        await stub.StartSOTAUpdate(Empty())
        await unit.full_status(lambda status: shown_items(status) == {"a 1.0.0": "installed"})
        assert unit.running == {"a": "1.0.0"}
        await scheduler.until_sota(State.NO_UPDATE)
        assert [state for state in scheduler.states("sota_status") if state != State.NO_UPDATE] == [
            State.DOWNLOADING,
            State.READY_TO_UPDATE,
            State.UPDATING,
        ]
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


async def test_a_start_that_was_asked_for_is_not_needed_again_after_kill(bed: tuple[UnitBed, int], iam: Iam) -> None:
    """Killed as soon as the update has begun: it goes on by itself."""
    unit, port = bed
    await unit.start("after installing")
    await unit.cloud.connected()
    channel = await open_tls_channel(f"127.0.0.1:{port}", await asyncio.to_thread(identity_of, iam))
    async with channel:
        stub = stubs.UpdateSchedulerServiceStub(channel)
        await unit.cloud.send_frame(unit.wish(("a", "2.0.0", A2)))
        await unit.until(lambda: unit.items == {"a 2.0.0": "pending"} and unit.phase == "pending")
        await unit.until(lambda: "Update waits for its start" in unit.new_log())
        await stub.StartSOTAUpdate(Empty())
        await unit.died()
    await unit.start()
    await unit.full_status(lambda status: shown_items(status) == {"a 2.0.0": "installed"})


async def test_a_caller_without_a_certificate_is_refused(bed: tuple[UnitBed, int], iam: Iam) -> None:
    unit, port = bed
    await unit.start()
    credentials = TlsRoots(iam.ca_file).grpc_client_credentials()
    async with grpc.aio.secure_channel(
        f"127.0.0.1:{port}", credentials, options=[("grpc.ssl_target_name_override", "localhost")]
    ) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stubs.UpdateSchedulerServiceStub(channel).StartSOTAUpdate(Empty(), timeout=10)
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
