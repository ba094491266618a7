"""Devices of the node as udev knows them: found by their properties, and watched while they come and go.

pyudev is imported on use: a node whose resources have no devices needs neither it nor libudev.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from aoscore.common.aio import Worker, log_and_continue
from aoscore.common.log import kv
from aoscore.common.types import ResourceAllocateAlert

if TYPE_CHECKING:
    from aoscore.sm.resourcemanager.resources import Change

_log = logging.getLogger(__name__)

_UDEV_SOCKET = Path("/run/udev/control")


class WatchedResources(Protocol):
    """What the watch needs of the node's resources."""

    def have_devices(self) -> bool:
        """Whether there is anything to watch."""
        ...

    def check(self) -> "list[Change]":
        """Look everything up again; what is different from the last time. Blocking."""
        ...


def find_devices(match: Mapping[str, str]) -> list[Path]:
    """Device nodes of all devices that have all these udev properties, sorted. Blocking."""
    from pyudev import Context

    context = Context()
    # libudev can look for a subsystem; it takes several properties as alternatives.
    filters = {"subsystem": match["SUBSYSTEM"]} if "SUBSYSTEM" in match else {}
    found = {
        Path(device.device_node)
        for device in context.list_devices(**filters)
        if device.device_node and all(device.properties.get(name) == value for name, value in match.items())
    }
    return sorted(found)


class DeviceWatch:
    """Looks at the node's resources again whenever a device comes or goes. A Service."""

    def __init__(
        self,
        resources: WatchedResources,
        worker: Worker,
        send_alert: Callable[[ResourceAllocateAlert], Awaitable[None]],
        on_change: Callable[[], None],
    ) -> None:
        """`on_change` is told when a resource is there again, so that what waits for it need not wait longer."""
        self._resources = resources
        self._worker = worker
        self._send_alert = send_alert
        self._on_change = on_change

    async def run(self, started: Callable[[], None]) -> None:
        """Watch until cancelled."""
        monitor = None
        if self._resources.have_devices():
            with log_and_continue(_log, "Devices that come and go are not noticed"):
                monitor = await self._worker.run(_open_monitor)
        if monitor is None:
            started()
            await asyncio.Event().wait()
            return
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(monitor.fileno(), woken.set)
        try:
            started()
            while True:
                # Once at the begin too: something may have happened since the resources were loaded.
                with log_and_continue(_log, "Can't check resources"):
                    await self._look()
                await woken.wait()
                woken.clear()
                while monitor.poll(timeout=0) is not None:
                    pass
        finally:
            loop.remove_reader(monitor.fileno())

    async def _look(self) -> None:
        changes = await self._worker.run(self._resources.check)
        for change in changes:
            if change.problem:
                _log.warning(kv("Resource can't be used", resource=change.name, reason=change.problem))
            else:
                _log.info(kv("Resource can be used", resource=change.name))
            text = (
                change.problem or f"resource {change.name} has other devices now, a restart of the instance gives them"
            )
            for ident in change.holders if change.problem or change.renewed else ():
                await self._send_alert(ResourceAllocateAlert(datetime.now(UTC), ident, change.name, text))
        if any(not change.problem for change in changes):
            self._on_change()


def _open_monitor() -> Any:
    from pyudev import Context, Monitor

    # Without udevd the kernel's own events are all there is.
    monitor = Monitor.from_netlink(Context(), source="udev" if _UDEV_SOCKET.exists() else "kernel")
    monitor.start()
    return monitor
