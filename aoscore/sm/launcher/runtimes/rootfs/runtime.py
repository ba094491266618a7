"""Rootfs runtime: an update is tried from its image for one boot, then applied by the initramfs (sm-runtime.md §3).

    start_instance -> do_update, reboot --(initramfs: boots the image)--> updated -> health check
        well:  do_apply, reboot --(initramfs: makes it the root)--> installed
        wrong: failed, reboot   --(initramfs: boots the old root)-> failed is reported

What the files mean is decided in ``state``; here it is done.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aoscore.common.aio import log_and_continue
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.log import kv
from aoscore.common.types import NodeInfo
from aoscore.sm.imagemanager.model import Payload
from aoscore.sm.launcher.runtimes.component import (
    Component,
    ComponentRuntime,
    System,
    factory_component,
    read_boot_id,
)
from aoscore.sm.launcher.runtimes.health import find_fault
from aoscore.sm.launcher.runtimes.rootfs.config import RootfsConfig
from aoscore.sm.launcher.runtimes.rootfs.files import UpdateFiles
from aoscore.sm.launcher.runtimes.rootfs.state import Action, Decision, Found, decide

_log = logging.getLogger(__name__)


class RootfsRuntime(ComponentRuntime):
    """See the module text."""

    def __init__(
        self,
        config: RootfsConfig,
        runtime_type: str,
        node: NodeInfo,
        system: System,
        *,
        boot_id: str | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        if config.working_dir is None:
            raise InvalidArgumentError("paths of the rootfs runtime are not filled, load_rootfs_config does it")
        super().__init__(runtime_type, node, system, config.working_dir)
        self._config = config
        self._files = UpdateFiles(config.working_dir)
        self._boot_id = boot_id or read_boot_id()
        self._sleep = sleep
        self._check: asyncio.Task[None] | None = None

    # At the start of SM

    async def _recover(self) -> None:
        found = await self._worker.run(self._load)
        # The node has booted the image: only the initramfs can take it back.
        self._is_tried = found.updated or found.do_apply
        decision = decide(found)
        if decision.action is not Action.CLEAN:
            _log.warning(kv("Root file system update found", action=decision.action, reason=decision.reason))
        await self._act(found, decision)

    def _load(self) -> Found:
        self._pending = self._files.pending()
        found = self._files.find(self._pending, self._config.version_file_path, self._boot_id)
        self._current = self._files.installed()
        # A node that was never updated by us may have been given another image since.
        flashed = self._current is not None and self._current.preinstalled and self._pending is None
        if self._current is None or (flashed and self._current.version != found.running and not found.updated):
            self._current = factory_component(self.info.type, self._node, found.running)
            self._files.save_installed(self._current)
        return found

    async def _act(self, found: Found, decision: Decision) -> None:
        match decision.action:
            case Action.CLEAN:
                await self._clean()
            case Action.REBOOT:
                await self._worker.run(self._files.note_reboots, found, self._boot_id)
                self.reboot_due.set()
            case Action.CHECK:
                self._check = self._begin(self._check_health(), "health check of the root file system")
            case Action.REFUSE:
                await self._refuse(decision.reason)
            case Action.REVERT:
                await self._worker.run(self._files.note_reboots, found, self._boot_id)
                await self._reject(decision.reason)
                self.reboot_due.set()
            case Action.STUCK:
                await self._reject(decision.reason)
            case Action.FAILED:
                await self._reject(decision.reason)
                await self._clean()
            case Action.INSTALLED:
                installed = await self._worker.run(self._files.complete)
                self._replace_current(installed)

    async def _clean(self) -> None:
        self._pending = None
        await self._worker.run(self._files.clean)
        self._is_tried = False

    # The trial

    async def _check_health(self) -> None:
        fault = await find_fault(self._system.active_states, self._config.health_check_services, sleep=self._sleep)
        async with self._lock:
            # What can't be written now is reverted by the initramfs at the next boot.
            with log_and_continue(_log, "Can't end the trial of a root file system"):
                if fault is not None:
                    await self._refuse(fault)
                elif self._pending is not None:
                    _log.info(kv("New root file system is well", version=self._pending.version))
                    await self._worker.run(self._files.confirm, self._boot_id)
                    self.reboot_due.set()

    async def _refuse(self, reason: str) -> None:
        _log.error(kv("New root file system is given up", reason=reason))
        await self._worker.run(self._files.refuse, self._boot_id, reason)
        await self._reject(reason)
        self.reboot_due.set()

    # Updates

    async def _install(self, component: Component, payload: Payload) -> None:
        self.reboot_due.clear()
        try:
            await self._clean()
            await self._worker.run(self._files.prepare, component, payload, self._boot_id)
        except BaseException:
            with log_and_continue(_log, "Can't clean up after a root file system update"):
                await self._clean()
            raise
        self._pending = component
        self.reboot_due.set()

    async def _withdraw(self) -> None:
        if self._is_tried:
            if self._check is not None:
                self._check.cancel()
            await self._worker.run(self._files.refuse, self._boot_id, "CM does not want it any more")
            # Nobody waits for a report of it.
            await self._worker.run(self._files.forget_pending)
            self._pending = None
            self.reboot_due.set()
        else:
            self.reboot_due.clear()
            await self._clean()
