"""Devices that come and go while SM runs: loop devices, made and removed with the kernel's own events."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aoscore.common.aio import Worker
from aoscore.common.types import InstanceIdent, ResourceAllocateAlert
from aoscore.sm.resourcemanager.devices import DeviceWatch
from aoscore.sm.resourcemanager.resources import ResourceConfig, Resources
from tests.support.running import running

LOOP_CONTROL = Path("/dev/loop-control")
LOOP_CTL_ADD, LOOP_CTL_REMOVE = 0x4C80, 0x4C81
# Its own for each test process; the kernel takes any number below 2^20.
NUMBER = 100_000 + os.getpid() % 100_000
IDENT = InstanceIdent("item", "subject", 0)

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access(LOOP_CONTROL, os.W_OK), reason="needs root and loop devices"
)


def loop_control(request: int) -> None:
    """Add or remove our loop device."""
    with LOOP_CONTROL.open() as control:
        fcntl.ioctl(control, request, NUMBER)


@pytest.fixture
def device() -> Iterator[Path]:
    """Where the device will be."""
    yield Path(f"/dev/loop{NUMBER}")
    with contextlib.suppress(OSError):
        loop_control(LOOP_CTL_REMOVE)


async def test_hot_plug(device: Path) -> None:
    resources = Resources([ResourceConfig("disk", devices=(str(device),))])
    resources.check()
    assert "no device" in resources.problems()["disk"]
    alerts: asyncio.Queue[ResourceAllocateAlert] = asyncio.Queue()
    came = asyncio.Event()
    async with Worker("files") as worker:
        async with asyncio.timeout(30), running(DeviceWatch(resources, worker, alerts.put, came.set)):
            await asyncio.to_thread(loop_control, LOOP_CTL_ADD)
            await came.wait()
            assert resources.problems() == {}
            resources.allocate("instance", IDENT, ["disk"])
            await asyncio.to_thread(loop_control, LOOP_CTL_REMOVE)
            alert = await alerts.get()
            assert (alert.ident, alert.resource) == (IDENT, "disk")
            assert alert.message == f"resource disk: the host has no device {device}"
            came.clear()
            await asyncio.to_thread(loop_control, LOOP_CTL_ADD)
            await came.wait()
            # It has the same number, so what the instance was given is still good.
            assert alerts.empty()
