"""Launcher: brings the node to the set of instances that CM wants, and keeps it there.

All decisions are in `plan`; this shell gathers the situation, does the steps it is told, and asks again. How many
instances are started or stopped at a time is the matter of runtimes, which know where that costs something. `update`
only stores what CM wants and wakes the loop, so an update that arrives during another one is never lost or refused
(sm.md §12, D2).
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from datetime import UTC, datetime
from typing import Protocol, TypeVar

from aoscore.common.aio import Backoff, Broadcast, comes_within, log_and_continue, together
from aoscore.common.errors import NotFoundError, to_error_info
from aoscore.common.log import kv
from aoscore.common.types import ErrorInfo, InstanceIdent, InstanceInfo, InstanceState, InstanceStatus, ItemType
from aoscore.sm.imagemanager.model import InstalledImage, ItemKey, item_key
from aoscore.sm.launcher.model import NodeStatuses
from aoscore.sm.launcher.offline import OfflineClock
from aoscore.sm.launcher.plan import Plan, Situation, desired, plan, priority
from aoscore.sm.launcher.retries import Retries
from aoscore.sm.launcher.runtimes.base import Runtime
from aoscore.sm.launcher.store import LauncherStore, Stored

_log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 300.0


class Images(Protocol):
    """What the launcher needs from the image manager."""

    @property
    def broken(self) -> Broadcast[ItemKey]:
        """Items whose files turned out to be damaged; they are not installed any more."""
        ...

    def installed(self) -> Set[ItemKey]:
        """Items ready for use."""
        ...

    async def install(self, key: ItemKey) -> None:
        """Fetch and unpack; repeatable."""
        ...

    async def load(self, key: ItemKey) -> InstalledImage:
        """An installed item."""
        ...

    def want(self, keys: Set[ItemKey]) -> None:
        """Items that instances run or shall run: what was fetched for these is kept."""
        ...

    async def remove(self, keys: Iterable[ItemKey]) -> None:
        """Nobody needs these any more."""
        ...


class Networks(Protocol):
    """What the launcher needs from the network manager: instances take their networks when they start."""

    async def release_instance(self, ident: InstanceIdent) -> None:
        """Give the network of a removed instance back; repeatable."""
        ...


class Launcher:
    """See the module text. A Service; `changed` tells each new status and, after an update, the complete list."""

    def __init__(
        self,
        store: LauncherStore,
        runtimes: Sequence[Runtime],
        images: Images,
        networks: Networks,
        *,
        clock: Callable[[], float] = time.monotonic,
        backoff: Callable[[], Backoff] = lambda: Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S),
    ) -> None:
        self._store = store
        self._runtimes = {runtime.info.runtime_id: runtime for runtime in runtimes}
        self._images = images
        self._networks = networks
        self._clock = clock
        self.changed: Broadcast[InstanceStatus | NodeStatuses] = Broadcast("instance statuses")
        self.settled = asyncio.Event()
        """Set once the stored instances have been adopted or started (or failed to)."""
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._report_due = False
        self._copy_due = False
        self._instances: dict[InstanceIdent, InstanceInfo] = {}
        self._changes: dict[InstanceIdent, InstanceInfo | None] = {}
        self._expired: set[InstanceIdent] = set()
        self._up: dict[InstanceIdent, Runtime] = {}
        self._kept: dict[InstanceIdent, Runtime] = {}
        """Stopped for a restart that has not come yet: something of them is there still."""
        self._started: set[InstanceIdent] = set()
        self._renewed: set[InstanceIdent] = set()
        self._ttls_s: dict[ItemKey, float] = {}
        self._statuses: dict[InstanceIdent, InstanceStatus] = {}
        self._installing: dict[ItemKey, asyncio.Task[None]] = {}
        self._broken: set[ItemKey] = set()
        self._retries: Retries[InstanceIdent] = Retries(backoff)
        self._install_retries: Retries[ItemKey] = Retries(backoff)
        self._offline = OfflineClock(None, datetime.now(UTC), clock())
        self._stored_offline_since: datetime | None = None

    # What CM says

    async def update(self, start: Sequence[InstanceInfo], stop: Sequence[InstanceIdent]) -> None:
        """Take over what CM wants: `start` must run, `stop` must go, others stay. Returns when it is stored."""
        wanted = desired(self._situation())
        changes: dict[InstanceIdent, InstanceInfo | None] = dict.fromkeys(stop)
        changes |= {info.ident: info for info in start}
        new = {ident: info for ident, info in changes.items() if wanted.get(ident) != info or ident in self._expired}
        if new:
            try:
                await self._store.add_changes(new)
            except Exception as error:
                for one in start:
                    self.changed.publish(_status(one, InstanceState.FAILED, to_error_info(error)))
                raise
        self._changes |= new
        self._expired -= new.keys()
        self._retries.forget(changes)
        self._install_retries.forget(item_key(info) for info in start)
        for ident, info in new.items():
            if info is not None:
                self._report(self._running_status(ident, info) or _status(info, InstanceState.ACTIVATING))
        for key in self._installing.keys() - self._tell_wanted():
            self._installing[key].cancel()
        self._report_due = True
        self._wake.set()

    def cm_connected(self, connected: bool) -> None:
        """The link to CM came up or broke. With CM back, what failed is tried again at once."""
        self._offline.cm(connected, self._clock())
        if connected:
            self._retries.hurry()
            self._install_retries.hurry()
            # Blobs come from CM: what could not be installed without it has not failed, or CM would roll it back.
            for ident, info in desired(self._situation()).items():
                failed = ident in self._statuses and self._statuses[ident].state is InstanceState.FAILED
                if failed and item_key(info) in self._install_retries:
                    self._report(_status(info, InstanceState.ACTIVATING))
        self._wake.set()

    def resources_changed(self) -> None:
        """Something that the node offers is there again: what may have failed without it is tried again at once."""
        self._retries.hurry()
        self._wake.set()

    def cloud_connected(self, connected: bool) -> None:
        """CM told whether it has the cloud."""
        self._offline.cloud(connected, datetime.now(UTC), self._clock())
        self._wake.set()

    def statuses(self) -> NodeStatuses:
        """The present state of every wanted instance and of preinstalled ones."""
        return NodeStatuses(tuple(self._statuses[ident] for ident in sorted(self._statuses)))

    # The service

    async def run(self, started: Callable[[], None]) -> None:
        """Adopt what runs, then work until cancelled; a clean stop ends all services, lowest priority first."""
        with contextlib.ExitStack() as stack:
            reports = [stack.enter_context(runtime.changed.subscribe()) for runtime in self._runtimes.values()]
            broken = stack.enter_context(self._images.broken.subscribe())
            self._restore(await self._store.load())
            try:
                async with asyncio.TaskGroup() as tasks:
                    for queue in reports:
                        tasks.create_task(_each(queue, self._on_report))
                    tasks.create_task(_each(broken, self._on_broken))
                    for runtime in self._runtimes.values():
                        tasks.create_task(self._reboot_when_due(runtime))
                    await self._adopt()
                    started()
                    await self._reconcile(tasks, reports)
            finally:
                self._up |= self._kept
                await self._stop_all(
                    sorted(
                        (ident for ident in self._up if ident.type is ItemType.SERVICE),
                        key=lambda ident: (self._priority(ident), ident),
                    )
                )

    def _restore(self, stored: Stored) -> None:
        self._instances = dict(stored.instances)
        self._changes = dict(stored.changes)
        self._expired = set(stored.expired)
        self._offline = OfflineClock(stored.offline_since, datetime.now(UTC), self._clock())
        self._stored_offline_since = stored.offline_since
        # An update that a restart interrupted goes on, and CM hears of its end.
        self._report_due = bool(stored.changes)
        for ident, info in desired(self._situation()).items():
            state = InstanceState.INACTIVE if ident in self._expired else InstanceState.ACTIVATING
            self._report(_status(info, state))
        self._tell_wanted()

    async def _adopt(self) -> None:
        for runtime_id, runtime in self._runtimes.items():
            own = [info for info in self._instances.values() if info.runtime_id == runtime_id]
            for running in await runtime.adopt(own):
                self._up[running.ident] = runtime
                self._on_report(running.status)
                if running.ident in self._instances:
                    self._started.add(running.ident)
                    _log.info(kv("Instance adopted", instance=running.ident, id=running.instance_id))
        # What they run tells how long each may be offline.
        for key in {item_key(self._instances[ident]) for ident in self._started} & self._images.installed():
            with log_and_continue(_log, f"Can't read offline time of {key}"):
                await self._load(key)

    async def _reconcile(self, tasks: asyncio.TaskGroup, reports: Sequence[asyncio.Queue[InstanceStatus]]) -> None:
        while True:
            self._wake.clear()
            self._idle.clear()
            await self._check_offline()
            planned_s = self._clock()
            steps = plan(self._situation())
            for key in steps.install:
                self._installing[key] = tasks.create_task(self._install(key), name=f"install {key}")
            if self._report_due and not self._installing and self._has_all_failed(steps):
                # Reports that earlier steps caused belong into the complete list.
                for queue in reports:
                    while not queue.empty():
                        self._on_report(queue.get_nowait())
                self._report_due = False
                self.changed.publish(self.statuses())
            if await self._take(steps):
                continue
            self.settled.set()
            if self._copy_due and not self._changes:
                self._copy_due = False
                with log_and_continue(_log, "Can't keep a copy of the database"):
                    await self._store.keep_copy()
            if not self._installing:
                self._idle.set()
            await self._sleep(planned_s)

    async def _reboot_when_due(self, runtime: Runtime) -> None:
        """A reboot in the middle of an update would only make it longer (sm.md §4.6)."""
        backoff = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        while True:
            await runtime.reboot_due.wait()
            await self._idle.wait()
            with log_and_continue(_log, f"Can't reboot for runtime {runtime.info.type}"):
                await runtime.reboot()
            # It comes any moment, or was refused: then it is asked for again.
            await asyncio.sleep(backoff.next())

    async def _sleep(self, planned_s: float) -> None:
        """Until there is something to do. A pause that has ended since the plan was made counts: it is not in it."""
        due = (
            self._retries.next_s(planned_s),
            self._install_retries.next_s(planned_s),
            self._offline.next_s(self._offline_limits_s()),
        )
        now_s = self._clock()
        delays_s = [max(0.0, moment_s - now_s) for moment_s in due if moment_s is not None]
        await comes_within(self._wake, min(delays_s) + 0.001 if delays_s else None)

    def _has_all_failed(self, steps: Plan) -> bool:
        """Whether there is nothing to do but what did not work before: the end of an update does not wait for that."""
        idents = [*steps.stop, *steps.apply, *(info.ident for info in steps.start)]
        return all(ident in self._retries for ident in idents) and all(
            key in self._install_retries for key in steps.remove_items
        )

    async def _take(self, steps: Plan) -> bool:
        """Do one kind of steps; whether there was something to do."""
        if steps.stop:
            await self._stop_all(steps.stop, restart=self._is_restarted)
        elif steps.apply:
            await self._apply(steps.apply)
        elif steps.start:
            await self._start_all(steps.start)
        elif steps.remove_items:
            await self._remove_items(steps.remove_items)
        else:
            return False
        return True

    def _situation(self) -> Situation:
        now_s = self._clock()
        return Situation(
            instances=self._instances,
            changes=self._changes,
            up=self._up.keys(),
            started=self._started,
            expired=self._expired,
            resting=self._retries.resting(now_s),
            installed=self._images.installed(),
            held=self._installing.keys() | self._install_retries.resting(now_s),
            renewed=self._renewed,
        )

    def _tell_wanted(self) -> set[ItemKey]:
        """Tell the image manager what is needed."""
        keys = {item_key(info) for info in (*self._instances.values(), *desired(self._situation()).values())}
        self._images.want(keys)
        return keys

    # Steps

    async def _install(self, key: ItemKey) -> None:
        try:
            await self._images.install(key)
        except Exception as error:
            pause_s = self._install_retries.failed(key, self._clock())
            _log.error(kv("Can't install item", item=key, error=error, retry_in_s=round(pause_s)))
            for info in desired(self._situation()).values():
                # An instance that runs from a damaged image goes on, so it has not failed.
                running = info.ident in self._started and self._instances.get(info.ident) == info
                if item_key(info) == key and not running:
                    self._report(_status(info, InstanceState.FAILED, to_error_info(error)))
        else:
            self._install_retries.forget([key])
            if key in self._broken:
                self._broken.discard(key)
                self._renewed |= {
                    ident for ident in self._up if ident in self._instances and item_key(self._instances[ident]) == key
                }
        finally:
            del self._installing[key]
            self._wake.set()

    async def _remove_items(self, keys: Sequence[ItemKey]) -> None:
        try:
            await self._images.remove(keys)
        except Exception as error:
            for key in keys:
                pause_s = self._install_retries.failed(key, self._clock())
                _log.error(kv("Can't remove item", item=key, error=error, retry_in_s=round(pause_s)))
        else:
            for key in keys:
                self._ttls_s.pop(key, None)

    async def _load(self, key: ItemKey) -> InstalledImage:
        image = await self._images.load(key)
        self._ttls_s[key] = image.item_config.offline_ttl if image.item_config else 0.0
        return image

    async def _stop_all(
        self, idents: Sequence[InstanceIdent], *, restart: Callable[[InstanceIdent], bool] = lambda _: False
    ) -> None:
        """In ascending priority: one that others need ends after them."""
        for _, level in itertools.groupby(idents, self._priority):
            await together(self._stop(ident, restart=restart(ident)) for ident in level)

    def _is_restarted(self, ident: InstanceIdent) -> bool:
        """Whether what is stopped now is to run again where it ran."""
        before = self._instances.get(ident)
        after = self._changes.get(ident, before)
        if before is None or after is None or ident in self._expired:
            return False
        return (after.runtime_id, after.owner_id) == (before.runtime_id, before.owner_id)

    async def _stop(self, ident: InstanceIdent, *, restart: bool) -> None:
        runtime = self._up[ident]
        try:
            await runtime.stop_instance(ident, restart=restart)
        except Exception as error:
            pause_s = self._retries.failed(ident, self._clock())
            _log.error(kv("Can't stop instance", instance=ident, error=error, retry_in_s=round(pause_s)))
            if info := self._instances.get(ident):
                self._report(_status(info, InstanceState.FAILED, to_error_info(error)))
        else:
            self._retries.forget([ident])
            del self._up[ident]
            if restart:
                self._kept[ident] = runtime
            self._started.discard(ident)
            self._renewed.discard(ident)

    async def _apply(self, changes: Mapping[InstanceIdent, InstanceInfo | None]) -> None:
        for ident, info in changes.items():
            old = self._instances.get(ident)
            if old is not None and (info is None or info.owner_id != old.owner_id):
                with log_and_continue(_log, f"Can't release network of {ident}"):
                    await self._networks.release_instance(ident)
        try:
            await self._store.apply(changes)
        except Exception as error:
            # A full disk, most likely. What was stopped starts again when the change can be stored.
            for ident, info in changes.items():
                pause_s = self._retries.failed(ident, self._clock())
                _log.error(kv("Can't store change", instance=ident, error=error, retry_in_s=round(pause_s)))
                if info is not None:
                    self._report(_status(info, InstanceState.FAILED, to_error_info(error)))
            return
        self._copy_due = True
        self._retries.forget(changes)
        for ident, info in changes.items():
            # CM may have changed its mind while we waited: then the newer change stays.
            if ident in self._changes and self._changes[ident] == info:
                del self._changes[ident]
            if info is None:
                # The release of its network has removed what was kept.
                self._kept.pop(ident, None)
                self._instances.pop(ident, None)
                if ident not in self._changes:
                    self._statuses.pop(ident, None)
            else:
                self._instances[ident] = info

    async def _start_all(self, infos: Sequence[InstanceInfo]) -> None:
        images: dict[ItemKey, InstalledImage | Exception] = {}

        async def load(key: ItemKey) -> None:
            try:
                images[key] = await self._load(key)
            except Exception as error:
                images[key] = error

        # Once per item, however many instances it has.
        await together(load(key) for key in dict.fromkeys(map(item_key, infos)))
        await together(self._start(info, images[item_key(info)]) for info in infos)

    async def _start(self, info: InstanceInfo, image: InstalledImage | Exception) -> None:
        try:
            runtime = self._runtimes.get(info.runtime_id)
            if runtime is None:
                raise NotFoundError(f"this node has no runtime {info.runtime_id}")
            if isinstance(image, Exception):
                raise image
            # From here on there may be something to stop, whatever happens.
            self._up[info.ident] = runtime
            self._kept.pop(info.ident, None)
            await runtime.start_instance(info, image)
        except Exception as error:
            pause_s = self._retries.failed(info.ident, self._clock())
            _log.error(kv("Can't start instance", instance=info.ident, error=error, retry_in_s=round(pause_s)))
            # The runtime leaves nothing behind after an error.
            self._up.pop(info.ident, None)
            if self._is_current(info):
                self._report(_status(info, InstanceState.FAILED, to_error_info(error)))
        else:
            self._retries.forget([info.ident])
            self._started.add(info.ident)
            _log.info(kv("Instance started", instance=info.ident, version=info.version))

    # Offline time

    def _offline_limits_s(self) -> dict[InstanceIdent, float]:
        return {
            ident: self._ttls_s.get(item_key(self._instances[ident]), 0.0)
            for ident in self._up
            if ident in self._instances and ident not in self._expired
        }

    async def _check_offline(self) -> None:
        now_s = self._clock()
        self._offline.tick(datetime.now(UTC), now_s)
        if self._offline.since != self._stored_offline_since:
            with log_and_continue(_log, "Can't store since when the Unit is offline"):
                await self._store.set_offline_since(self._offline.since)
                self._stored_offline_since = self._offline.since
        over = self._offline.expired(self._offline_limits_s(), now_s)
        if over:
            _log.warning(kv("Offline time is over, instances stopped", instances=", ".join(map(str, sorted(over)))))
            self._expired |= over
            with log_and_continue(_log, "Can't store whose offline time is over"):
                await self._store.add_expired(over)

    # Statuses

    def _on_report(self, status: InstanceStatus) -> None:
        """A runtime's word is the truth, except about a version that is to be replaced (sm.md §12, D7 and D8)."""
        change = self._changes.get(status.ident)
        if change is not None and (change.version, change.manifest_digest) != (
            status.version,
            status.manifest_digest,
        ):
            return
        self._report(status)

    def _report(self, status: InstanceStatus) -> None:
        known = status.ident.preinstalled or status.ident in self._instances or status.ident in self._changes
        if known and self._statuses.get(status.ident) == status:
            return
        if status.ident.preinstalled and status.state is InstanceState.INACTIVE:
            # It made room for an update.
            self._statuses.pop(status.ident, None)
        elif known:
            self._statuses[status.ident] = status
        self.changed.publish(status)

    def _on_broken(self, key: ItemKey) -> None:
        self._broken.add(key)
        self._wake.set()

    def _running_status(self, ident: InstanceIdent, info: InstanceInfo) -> InstanceStatus | None:
        """What the runtime says of an instance that runs as wanted already."""
        if ident not in self._started or self._instances.get(ident) != info:
            return None
        return next((one.status for one in self._up[ident].running() if one.ident == ident), None)

    def _is_current(self, info: InstanceInfo) -> bool:
        return self._changes.get(info.ident, info) == info

    def _priority(self, ident: InstanceIdent) -> int:
        return priority(self._instances.get(ident))


def _status(info: InstanceInfo, state: InstanceState, error: ErrorInfo | None = None) -> InstanceStatus:
    return InstanceStatus(
        ident=info.ident,
        version=info.version,
        state=state,
        runtime_id=info.runtime_id,
        manifest_digest=info.manifest_digest,
        error=error,
    )


async def _each(queue: asyncio.Queue[T], handle: Callable[[T], None]) -> None:
    while True:
        handle(await queue.get())
