"""Boot runtime: an image goes to the boot partition that is not in use, and has one boot to prove itself.

    start_instance -> write, BootNext, reboot -> new partition -> health check
        well:  first in BootOrder, copied over the old partition: installed
        wrong: BootNext names the old one, reboot -> failed is reported, the old one is copied over the new

BootOrder names the old partition until the new one is found well, so whatever happens meanwhile ends there. Where an
update stands is written to ``pending.json`` before each step; what that means at a start is decided in ``state``
(sm-runtime.md §4 and §7, D33).
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import msgspec

from aoscore.common.aio import log_and_continue
from aoscore.common.errors import AosError, InvalidArgumentError
from aoscore.common.log import kv
from aoscore.common.types import InstanceState, NodeInfo
from aoscore.sm.imagemanager.model import Payload
from aoscore.sm.launcher.runtimes.boot.config import BootConfig, partition_devices
from aoscore.sm.launcher.runtimes.boot.efi import EfiVariables, Partition
from aoscore.sm.launcher.runtimes.boot.partitions import (
    copy_partition,
    identify,
    read_partition_version,
    write_image,
)
from aoscore.sm.launcher.runtimes.boot.state import Action, Decision, Phase, decide
from aoscore.sm.launcher.runtimes.component import (
    Component,
    ComponentRuntime,
    System,
    factory_component,
    load_or_drop,
    read_boot_id,
    remove_durably,
    save,
)
from aoscore.sm.launcher.runtimes.health import find_fault

_log = logging.getLogger(__name__)

_FULL = "vnd.aos.image.component.full"


class BootComponent(Component, frozen=True, rename="camel"):
    """A record of ``installed.json`` or ``pending.json``; the last four members are ours (sm-runtime.md §4.1)."""

    state: InstanceState = InstanceState.ACTIVE
    partition_index: int = 0
    phase: Phase = Phase.TRIAL
    """A record of AosCore 9.1 is one of an update that was asked to boot."""
    boot_id: str = ""
    """The boot in which the last reboot was asked for."""
    reboots: int = 0
    """Boots since then that came up with the wrong version."""
    error: str = ""


class Machine(Protocol):
    """What differs between a machine and a test."""

    def devices(self, config: BootConfig) -> tuple[Path, Path]:
        """The two partitions."""
        ...

    def identify(self, device: Path) -> Partition:
        """What the firmware knows one by."""
        ...

    def variables(self) -> EfiVariables:
        """The firmware's."""
        ...

    def version(self, device: Path, config: BootConfig) -> str:
        """The version on one."""
        ...


class ThisMachine:
    """The machine that SM runs on."""

    def devices(self, config: BootConfig) -> tuple[Path, Path]:
        """As configured or detected."""
        return partition_devices(config, Path("/proc/cmdline").read_text())

    def identify(self, device: Path) -> Partition:
        """By udev's links and sysfs."""
        return identify(device)

    def variables(self) -> EfiVariables:
        """efivarfs."""
        return EfiVariables()

    def version(self, device: Path, config: BootConfig) -> str:
        """By mounting it."""
        if config.working_dir is None:
            raise InvalidArgumentError("paths of the boot runtime are not filled, load_boot_config does it")
        return read_partition_version(device, config.version_file, config.working_dir / "mnt")


class BootRuntime(ComponentRuntime):
    """See the module text."""

    def __init__(
        self,
        config: BootConfig,
        runtime_type: str,
        node: NodeInfo,
        system: System,
        *,
        machine: Machine | None = None,
        boot_id: str | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        if config.working_dir is None:
            raise InvalidArgumentError("paths of the boot runtime are not filled, load_boot_config does it")
        super().__init__(runtime_type, node, system, config.working_dir)
        self._config = config
        self._machine = machine or ThisMachine()
        self._boot_id = boot_id or read_boot_id()
        self._sleep = sleep
        self._installed_path = config.working_dir / "installed.json"
        self._pending_path = config.working_dir / "pending.json"
        self._devices: tuple[Path, ...] = ()
        self._entries: tuple[int, ...] = ()
        self._efi: EfiVariables | None = None
        self._runs_from = 0
        self._check: asyncio.Task[None] | None = None
        self._record: BootComponent | None = None

    # At the start of SM

    async def _recover(self) -> None:
        installed = await self._worker.run(self._load)
        pending = self._record
        if pending is None:
            return
        self._pending = pending
        same_boot = pending.boot_id == self._boot_id
        runs_new = self._runs_from == pending.partition_index
        self._is_tried = runs_new
        decision = decide(
            pending.phase,
            runs_new=runs_new,
            is_installed=(installed.ident, installed.manifest_digest) == (pending.ident, pending.manifest_digest),
            same_boot=same_boot,
            reboots=self._wrong_boots(),
            error=pending.error,
        )
        _log.warning(
            kv("Boot update found", phase=pending.phase, action=decision.action, reason=decision.reason or "none")
        )
        await self._act(decision)

    def _load(self) -> BootComponent:
        self._devices = self._machine.devices(self._config)
        self._efi = self._machine.variables()
        self._entries = self._load_entries(self._efi)
        self._runs_from = self._find_current(self._efi)
        self._record = load_or_drop(self._pending_path, BootComponent)
        installed = load_or_drop(self._installed_path, BootComponent)
        if installed is None:
            version = self._machine.version(self._devices[self._runs_from], self._config)
            factory = factory_component(self.info.type, self._node, version)
            installed = _boot_component(factory, partition_index=self._runs_from)
            save(self._installed_path, installed)
        elif self._record is None and installed.partition_index != self._runs_from:
            # Both partitions are equal; the firmware took the other one.
            installed = msgspec.structs.replace(installed, partition_index=self._runs_from)
            save(self._installed_path, installed)
        self._current = installed
        return installed

    def _load_entries(self, efi: EfiVariables) -> tuple[int, ...]:
        """Numbers of the load options of both partitions, made where they are missing."""
        known = {option.partition: number for number, option in reversed(efi.entries().items())}
        partitions = [self._machine.identify(device) for device in self._devices]
        return tuple(known[one.uuid] if one.uuid in known else efi.add(one, self._config.loader) for one in partitions)

    def _find_current(self, efi: EfiVariables) -> int:
        current = efi.current
        if current in self._entries:
            return self._entries.index(current)
        # Several load options may lead to one partition.
        option = efi.entries().get(current) if current is not None else None
        uuids = [self._machine.identify(device).uuid for device in self._devices]
        if option is not None and option.partition in uuids:
            return uuids.index(option.partition)
        _log.warning(kv("Node was booted by a load option of neither boot partition", current=current))
        return 0

    async def _act(self, decision: Decision) -> None:
        match decision.action:
            case Action.DROP:
                await self._drop()
            case Action.TRY:
                await self._try()
            case Action.CHECK:
                self._check = self._begin(self._check_health(), "health check of the boot partition")
            case Action.SWITCH:
                await self._note(boot_id=self._boot_id, reboots=self._wrong_boots())
                await self._worker.run(self._firmware.put_first, self._entries[self._new.partition_index])
                self.reboot_due.set()
            case Action.FINISH:
                await self._finish()
            case Action.BACK:
                await self._go_back(decision.reason)
            case Action.STUCK:
                await self._reject(decision.reason)
            case Action.FAILED:
                await self._give_up(decision.reason)

    def _wrong_boots(self) -> int:
        return self._new.reboots + (self._new.boot_id != self._boot_id)

    # Steps; each may be repeated

    async def _try(self) -> None:
        await self._worker.run(self._set_next, self._entries[self._new.partition_index])
        await self._note(phase=Phase.TRIAL, boot_id=self._boot_id)
        self.reboot_due.set()

    async def _finish(self) -> None:
        """The new version is well: it is the installed one, on both partitions."""
        new = self._new
        await self._worker.run(self._firmware.put_first, self._entries[new.partition_index])
        if self._runs_from == new.partition_index:
            await self._make_equal(new.partition_index)
        installed = _boot_component(new, partition_index=self._runs_from)
        await self._worker.run(save, self._installed_path, installed)
        await self._forget_pending()
        self._replace_current(installed)

    async def _go_back(self, reason: str) -> None:
        """The new version is not well, and it runs."""
        reboots = self._wrong_boots() if self._new.phase is Phase.FAILED else 0
        await self._note(phase=Phase.FAILED, error=reason, boot_id=self._boot_id, reboots=reboots)
        await self._worker.run(self._set_next, self._entries[1 - self._new.partition_index])
        if reason:
            await self._reject(reason)
        self._pending = None
        self.reboot_due.set()

    async def _give_up(self, reason: str) -> None:
        """The new version is not well, and the old one runs. Without a reason nobody waits for a report."""
        await self._note(phase=Phase.FAILED, error=reason)
        if reason:
            await self._reject(reason)
        await self._drop()

    async def _drop(self) -> None:
        await self._worker.run(self._set_next, None)
        await self._make_equal(1 - self._new.partition_index)
        await self._forget_pending()

    async def _make_equal(self, good: int) -> None:
        await self._worker.run(copy_partition, self._devices[good], self._devices[1 - good])

    async def _forget_pending(self) -> None:
        await self._worker.run(remove_durably, self._pending_path)
        self._record = self._pending = None
        self._is_tried = False

    async def _note(self, **changes: object) -> None:
        """Write down where the update stands, before the next step."""
        self._record = msgspec.structs.replace(self._new, **changes)
        state = InstanceState.FAILED if self._record.phase is Phase.FAILED else InstanceState.ACTIVATING
        self._record = msgspec.structs.replace(self._record, state=state)
        await self._worker.run(save, self._pending_path, self._record)

    def _set_next(self, number: int | None) -> None:
        self._firmware.next = number

    @property
    def _firmware(self) -> EfiVariables:
        assert self._efi is not None  # noqa: S101 - set before anything else is done
        return self._efi

    @property
    def _new(self) -> BootComponent:
        assert self._record is not None  # noqa: S101 - steps are taken only while an update is under way
        return self._record

    async def _check_health(self) -> None:
        fault = await find_fault(self._system.active_states, self._config.health_check_services, sleep=self._sleep)
        async with self._lock:
            # Nothing is confirmed then, and the old partition comes with the next boot.
            with log_and_continue(_log, "Can't end the trial of a boot partition"):
                if fault is not None:
                    _log.error(kv("New boot partition is given up", reason=fault))
                    await self._go_back(fault)
                else:
                    await self._note(phase=Phase.CONFIRMED, boot_id=self._boot_id, reboots=0)
                    await self._finish()

    # Updates

    async def _install(self, component: Component, payload: Payload) -> None:
        if _FULL not in payload.media_type:
            raise InvalidArgumentError(f"media type {payload.media_type!r} is no full component image")
        if self._record is not None:
            self.reboot_due.clear()
            await self._drop()
        target = 1 - self._runs_from
        self._record = _boot_component(component, partition_index=target)
        await self._note(phase=Phase.WRITING)
        try:
            await self._worker.run(self._write, payload, self._devices[target], component.version)
            await self._note(phase=Phase.WRITTEN)
            await self._worker.run(self._set_next, self._entries[target])
            await self._note(phase=Phase.TRIAL, boot_id=self._boot_id)
        except (AosError, OSError):
            # When that fails too, the record says what is left to do.
            with contextlib.ExitStack() as stack:
                stack.enter_context(log_and_continue(_log, "Can't restore the boot partition"))
                await self._drop()
            raise
        self._pending = component
        self.reboot_due.set()

    def _write(self, payload: Payload, device: Path, version: str) -> None:
        write_image(payload, device)
        found = self._machine.version(device, self._config)
        if found != version:
            raise InvalidArgumentError(f"the image of version {version} holds {found}")

    async def _withdraw(self) -> None:
        if self._check is not None:
            self._check.cancel()
        if self._is_tried:
            await self._go_back("")
        else:
            self.reboot_due.clear()
            await self._give_up("")


def _boot_component(component: Component, *, partition_index: int) -> BootComponent:
    """A record of what is installed, without traces of an update."""
    members = {name: getattr(component, name) for name in Component.__struct_fields__}
    return BootComponent(**members, partition_index=partition_index)
