"""Brings the wanted instances to the nodes and keeps them there (cm-orchestration §4).

One place decides (`_balance`, under a lock): requests -> records -> sites -> start lists. What it decided is written
before anybody is told. Each node has a driver that makes it run its start list.
"""

import asyncio
import contextlib
import grp
import logging
import pwd
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from aoscore.cm.communication import messages
from aoscore.cm.communication.messages import NodeConfig, PercentRule
from aoscore.cm.launcher.balancer import (
    Budgets,
    Decision,
    Home,
    Node,
    Presence,
    Ratios,
    Site,
    Usage,
    Wanted,
    place,
)
from aoscore.cm.launcher.book import InstanceBook, sorted_requests
from aoscore.cm.launcher.envvars import (
    EnvVarResults,
    Override,
    next_expiry,
    split_acceptable,
    variables_for,
    without_expired,
)
from aoscore.cm.launcher.ids import IdPool
from aoscore.cm.launcher.items import Images, Item, load_item
from aoscore.cm.launcher.model import InstanceRecord, RunRequest, UnitInstanceStatus
from aoscore.cm.launcher.nodedriver import DriverSettings, NodeDriver
from aoscore.cm.launcher.store import LauncherStore
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.cm.storagestate.manager import DiskBudgets, Paths
from aoscore.common.aio import Backoff, Broadcast, comes_within, log_and_continue, unbroken
from aoscore.common.errors import AosError, DeadlineError, NotFoundError, to_error_info
from aoscore.common.log import kv
from aoscore.common.types import (
    AlertRulePercents,
    AlertStatus,
    ErrorInfo,
    InstanceIdent,
    InstanceInfo,
    InstanceState,
    InstanceStatus,
    ItemType,
    MonitoringParameters,
    NodeAlert,
    NodeMonitoring,
    NodeState,
    SystemQuotaAlert,
)

_log = logging.getLogger(__name__)

_AGEING_PERIOD_S = 24 * 3600.0


class LauncherSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Times of the launcher, seconds."""

    instance_ttl_s: float = 30 * 24 * 3600.0
    """How long the data of an instance that is not wanted any more are kept."""
    nodes_connection_timeout_s: float = 600.0
    """How long decisions wait for nodes that should be there."""
    place_first_s: float = 30.0
    place_limit_s: float = 600.0
    """Pauses before instances without a place are tried again."""
    check_env_vars_period_s: float = 60.0
    """How often overridden variables are checked for their expiry."""
    driver: DriverSettings = DriverSettings()


class Nodes(Protocol):
    """The nodes of the Unit."""

    changed: Broadcast[UnitNodeInfo]

    def nodes(self) -> Sequence[UnitNodeInfo]: ...


class Sms(Protocol):
    """Requests to the SM of a node."""

    def update_instances(
        self, node_id: str, start: Sequence[InstanceInfo], stop: Sequence[InstanceIdent]
    ) -> Awaitable[None]: ...

    async def get_average_monitoring(self, node_id: str) -> NodeMonitoring: ...


class Storage(Protocol):
    """Storage and state of instances."""

    async def budgets(self) -> DiskBudgets: ...

    async def setup(
        self, ident: InstanceIdent, uid: int, gid: int, *, storage_quota_bytes: int, state_quota_bytes: int
    ) -> Paths: ...

    def keep_watching(self, idents: Collection[InstanceIdent]) -> None: ...

    async def remove(self, ident: InstanceIdent) -> None: ...

    def checksum(self, ident: InstanceIdent) -> str: ...


class UnitConfig(Protocol):
    """The unit config."""

    changed: Broadcast[messages.UnitConfig]

    def node_config(self, node_id: str, node_type: str) -> NodeConfig: ...


class Subjects(Protocol):
    """Subjects that are active on the Unit."""

    changed: Broadcast[tuple[str, ...]]

    def subjects(self) -> Sequence[str]: ...


class CloudLink(Protocol):
    """The cloud as far as the launcher needs it."""

    async def send(self, message: messages.Message) -> object: ...


class Launcher:
    """A service. `run_instances`, `override_env_vars` and `statuses` are for the update manager and the cloud.

    With `hold` nothing is sent to nodes before the first `run_instances`: for a Unit whose database was lost, where
    all that runs would else be stopped.
    """

    def __init__(
        self,
        store: LauncherStore,
        nodes: Nodes,
        sms: Sms,
        images: Images,
        storage: Storage,
        unit_config: UnitConfig,
        subjects: Subjects,
        link: CloudLink,
        *,
        settings: LauncherSettings = LauncherSettings(),  # noqa: B008 - immutable
        alert: Callable[[str], None] = lambda _: None,
        hold: bool = False,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._sms = sms
        self._images = images
        self._storage = storage
        self._unit_config = unit_config
        self._subjects = subjects
        self._link = link
        self._settings = settings
        self._alert = alert
        self._hold = hold
        self._now = now
        self._book = InstanceBook(IdPool("user id", _is_system_user), IdPool("group id", _is_system_group))
        self._requests: list[RunRequest] = []
        self._overrides: list[Override] = []
        self._overrides_id = ""
        """Correlation id of the message that they came with."""
        self._results = EnvVarResults()
        self._confirmed: dict[str, str] = {}
        self._drivers: dict[str, NodeDriver] = {}
        self._driver_tasks: asyncio.TaskGroup | None = None
        self._infos: dict[InstanceIdent, InstanceInfo] = {}
        """Start parameters of all instances that have a site, without overridden variables."""
        self._errors: dict[InstanceIdent, Exception] = {}
        """Why active instances do not run where they should, or have no place."""
        self._prepared: dict[InstanceIdent, tuple[tuple[int, ...], Paths]] = {}
        self._balanced_for: list[Node] | None = None
        """Nodes as they were at the last decision, without their load."""
        self._active: list[InstanceRecord] = []
        """Records of the book that count now, and the same by node: as of the last decision."""
        self._on_node: dict[str, list[InstanceRecord]] = {}
        self._published: dict[str, dict[tuple[InstanceIdent, str], UnitInstanceStatus]] = {}
        """What was told last, by node."""
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._arrived = asyncio.Event()
        self._env_wake = asyncio.Event()
        self._report_env = asyncio.Event()
        self._must_balance = False
        self._place_due_s: float | None = None
        self._place_pause = Backoff(settings.place_first_s, settings.place_limit_s)
        self.changed: Broadcast[list[UnitInstanceStatus]] = Broadcast("instances")

    # ---- for the update manager and the cloud

    async def run_instances(self, requests: Sequence[RunRequest]) -> None:
        """Run these instances and no others.

        Waits for nodes that should be there, stores the requests, decides, stores the decision and hands it to the
        nodes. Afterwards `statuses` shows every wanted instance: activating until its node has told of it. A call that
        is cancelled has done all of it or nothing.
        """
        await self._wait_for_nodes()
        async with self._lock:
            self._place_pause.reset()
            await self._balance(rebalance=False, retry=True, requests=sorted_requests(requests))

    def requests(self) -> list[RunRequest]:
        """What shall run now."""
        return list(self._requests)

    async def override_env_vars(self, message: messages.OverrideEnvVars) -> None:
        """Replace all overridden variables; only instances whose variables change are started anew, by their SM."""
        async with self._lock:
            await self._set_overrides([Override.of(one) for one in message.items], message.correlation_id)

    def statuses(self) -> list[UnitInstanceStatus]:
        """All wanted instances, then preinstalled components."""
        found = [self._status(record) for record in self._active] + self._unrecorded()
        for node_id in sorted(self._drivers):
            found += self._preinstalled(node_id)
        return found

    def _unrecorded(self) -> list[UnitInstanceStatus]:
        return [
            UnitInstanceStatus(InstanceStatus(ident, version, InstanceState.FAILED, error=to_error_info(error)), "")
            for (ident, version), error in self._book.failures.items()
        ]

    def _preinstalled(self, node_id: str) -> list[UnitInstanceStatus]:
        driver = self._drivers.get(node_id)
        return [UnitInstanceStatus(status, node_id) for status in driver.preinstalled()] if driver else []

    # ---- told by the nodes

    def on_node_statuses(self, node_id: str, statuses: Sequence[InstanceStatus]) -> None:
        """All instances of a node."""
        self._driver(node_id).on_full_list(statuses)
        self._results.add(statuses)
        self._report_env.set()
        self._arrived.set()
        self._wake.set()

    def on_statuses(self, node_id: str, statuses: Sequence[InstanceStatus]) -> None:
        """Single instances of a node."""
        self._driver(node_id).on_statuses(statuses)

    def on_sm_lost(self, node_id: str) -> None:
        """A node's SM is disconnected."""
        self._driver(node_id).on_lost()
        self._wake.set()

    def on_node_alert(self, node_id: str, alert: NodeAlert) -> None:
        """A node that is overloaded gives work away."""
        if isinstance(alert, SystemQuotaAlert) and alert.status is not AlertStatus.FALL:
            self._must_balance = True
            self._wake.set()

    # ---- service

    async def run(self, started: Callable[[], None]) -> None:
        """Take up what was stored, then follow nodes, subjects and times."""
        await self._load()
        with (
            self._nodes.changed.subscribe() as node_changes,
            self._unit_config.changed.subscribe() as config_changes,
            self._subjects.changed.subscribe() as subject_changes,
        ):
            async with asyncio.TaskGroup() as tasks:
                self._driver_tasks = tasks
                for driver in self._drivers.values():
                    tasks.create_task(driver.run())
                self._wake.set()
                started()
                tasks.create_task(self._follow_nodes(node_changes))
                tasks.create_task(self._follow_config(config_changes))
                tasks.create_task(self._follow_subjects(subject_changes))
                tasks.create_task(self._balance_when_needed())
                tasks.create_task(self._expire_overrides())
                tasks.create_task(self._report_env_vars())
                tasks.create_task(self._give_up_on_silent_nodes())
                tasks.create_task(self._age())

    async def _load(self) -> None:
        stored = await self._store.load()
        self._book.restore(stored.records)
        self._requests = list(stored.requests)
        self._overrides, self._overrides_id = list(stored.overrides), stored.overrides_id
        self._confirmed = stored.confirmed
        await self._flush()
        # Nothing must start with what has expired meanwhile.
        with log_and_continue(_log, "Can't drop expired environment variables"):
            await self._set_overrides(self._overrides, self._overrides_id, drive=False)
        self._take_over_book()
        for record in self._book.active():
            if record.site is not None:
                item = self._load_item(record.ident.item_id, record.version, record.ident.type)
                with log_and_continue(_log, f"Can't prepare instance {record.ident}"):
                    self._infos[record.ident] = await self._prepare(record, item)
        if not self._hold:
            self._drive()
        self._publish()

    async def _follow_nodes(self, changes: asyncio.Queue[UnitNodeInfo]) -> None:
        while True:
            node = await changes.get()
            self._driver(node.node_id).wake()
            self._arrived.set()
            self._wake.set()

    async def _follow_config(self, changes: asyncio.Queue[messages.UnitConfig]) -> None:
        while True:
            await changes.get()
            self._wake.set()

    async def _follow_subjects(self, changes: asyncio.Queue[tuple[str, ...]]) -> None:
        while True:
            await changes.get()
            self._must_balance = True
            self._wake.set()

    async def _balance_when_needed(self) -> None:
        while True:
            try:
                async with asyncio.timeout_at(self._place_due_s):
                    await self._wake.wait()
            except TimeoutError:
                self._must_balance = True
                self._place_due_s = None
            self._wake.clear()
            if self._hold:
                continue
            with log_and_continue(_log, "Can't balance instances"):
                await self._wait_for_nodes()
                async with self._lock:
                    if self._must_balance or self._unloaded_nodes() != self._balanced_for:
                        await self._balance(rebalance=True)

    async def _wait_for_nodes(self) -> None:
        """Until all nodes that should be there have told their instances, or are known to be missing."""
        try:
            async with asyncio.timeout(self._settings.nodes_connection_timeout_s):
                while missing := [node.node_id for node in self._nodes.nodes() if self._is_awaited(node)]:
                    _log.debug(kv("Waiting for nodes", nodeIDs=missing))
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            _log.warning(kv("Going on without nodes", nodeIDs=missing))

    def _is_awaited(self, node: UnitNodeInfo) -> bool:
        return self._presence(node) is Presence.AWAY

    def _presence(self, node: UnitNodeInfo) -> Presence:
        if node.info.state is not NodeState.PROVISIONED or "sm" not in node.info.components:
            return Presence.GONE
        return Presence.ONLINE if node.is_usable and self._driver(node.node_id).is_connected else Presence.AWAY

    async def _give_up_on_silent_nodes(self) -> None:
        """Once after the start: instances on nodes that never told of them count as failed."""
        await asyncio.sleep(self._settings.nodes_connection_timeout_s)
        for driver in self._drivers.values():
            if not driver.is_connected:
                driver.fail_unheard(DeadlineError(f"node {driver.node_id} did not connect"))

    async def _age(self) -> None:
        """Forget instances that were put aside long ago, with their data."""
        while True:
            async with self._lock:
                with log_and_continue(_log, "Can't remove outdated instances"):
                    await self._drop_outdated()
            await asyncio.sleep(_AGEING_PERIOD_S)

    async def _drop_outdated(self) -> None:
        before = self._book.idents()
        self._book.drop_outdated(self._now(), self._settings.instance_ttl_s)
        for ident in sorted(before - self._book.idents()):
            self._prepared.pop(ident, None)
            with log_and_continue(_log, f"Can't remove data of instance {ident}"):
                await self._storage.remove(ident)
        await self._flush()

    # ---- decisions

    async def _balance(self, *, rebalance: bool, retry: bool = False, requests: list[RunRequest] | None = None) -> None:
        """Decide where everything runs, write it down, hand it to the nodes. Without new requests: for the old ones."""
        self._must_balance = False
        # Nodes may take long to answer; nothing has changed until then.
        loads = await self._loads()
        await unbroken(self._decide(loads, requests, rebalance=rebalance, retry=retry))

    async def _decide(
        self, loads: Mapping[str, NodeMonitoring], requests: list[RunRequest] | None, *, rebalance: bool, retry: bool
    ) -> None:
        if requests is not None:
            await self._store.save_requests(requests)
            self._requests = requests
            self._hold = False
        unloaded = self._unloaded_nodes()
        current = self._book.sites()
        items = {
            (one.item_id, one.version): self._load_item(one.item_id, one.version, one.item_type)
            for one in self._requests
        }
        spots = {key: self._spots(key[0], item, unloaded) for key, item in items.items()}
        self._book.apply_requests(self._requests, spots, self._subjects.subjects(), self._now())
        records = self._book.active()
        budgets = await self._storage.budgets()
        # Instances that run while their images are gone here are left alone until the images are back.
        orphans = {
            record.ident: Decision(record.site, NotFoundError(item.problem))
            for record in records
            if record.site and not (item := items[record.ident.item_id, record.version]).variants
        }
        decisions = orphans | place(
            [_with_load(node, loads.get(node.node_id), current) for node in unloaded],
            [
                _wanted(record, items[record.ident.item_id, record.version])
                for record in records
                if record.ident not in orphans
            ],
            current,
            Budgets(budgets.storage_bytes, budgets.state_bytes, budgets.same_partition),
            rebalance=rebalance,
        )
        infos: dict[InstanceIdent, InstanceInfo] = {}
        errors: dict[InstanceIdent, Exception] = {}
        for record in records:
            decision = decisions[record.ident]
            error: Exception | None = decision.error
            placed = self._book.apply_decision(record, decision)
            if decision.site is not None and record.ident not in orphans:
                try:
                    infos[record.ident] = await self._prepare(placed, items[record.ident.item_id, record.version])
                except (AosError, OSError) as failure:
                    error = failure
                    if record.site != decision.site:
                        self._book.apply_decision(placed, Decision(None))
                    # What runs there already goes on: trouble with its data here is no reason to stop it.
            if error is not None:
                errors[record.ident] = error
                if str(error) != str(self._errors.get(record.ident)):
                    _log.error(kv("Can't place instance", instance=record.ident, version=record.version, error=error))
        await self._drop_outdated()
        self._infos, self._errors, self._balanced_for = infos, errors, unloaded
        self._take_over_book()
        self._storage.keep_watching(infos.keys() | orphans.keys())
        self._plan_next_try()
        self._drive(retry=retry)
        self._publish()

    def _take_over_book(self) -> None:
        """What is in the book counts from now on."""
        self._active = self._book.active()
        self._on_node = {}
        for record in self._active:
            self._on_node.setdefault(record.node_id, []).append(record)

    def _plan_next_try(self) -> None:
        self._place_due_s = None
        if self._errors:
            self._place_due_s = asyncio.get_running_loop().time() + self._place_pause.next()
            self._wake.set()  # the waiting task counts with the time known when it began to wait
        else:
            self._place_pause.reset()

    async def _prepare(self, record: InstanceRecord, item: Item) -> InstanceInfo:
        """Start parameters of an instance, with its storage and state made ready.

        Raises NotFoundError when the config of its manifest is not here: without it, its data could not be told from
        data that are not wanted any more.
        """
        config = item.configs.get(record.manifest_digest)
        if config is None:
            raise NotFoundError(item.problem or f"manifest {record.manifest_digest} is not in its index any more")
        paths = Paths()
        if not record.is_component:
            needs = (record.uid, record.gid, config.quotas.storage_limit or 0, config.quotas.state_limit or 0)
            done, paths = self._prepared.get(record.ident, ((), Paths()))
            if done != needs:
                paths = await self._storage.setup(
                    record.ident, needs[0], needs[1], storage_quota_bytes=needs[2], state_quota_bytes=needs[3]
                )
                self._prepared[record.ident] = needs, paths
        return InstanceInfo(
            ident=record.ident,
            version=record.version,
            manifest_digest=record.manifest_digest,
            owner_id=record.owner_id,
            runtime_id=record.runtime_id,
            uid=record.uid,
            gid=record.gid,
            priority=record.priority,
            storage_path=paths.storage,
            state_path=paths.state,
            monitoring_parameters=None if record.is_component else MonitoringParameters(config.alert_rules),
        )

    def _load_item(self, item_id: str, version: str, item_type: ItemType) -> Item:
        return load_item(self._images, item_id, version, is_component=item_type is ItemType.COMPONENT)

    def _spots(self, item_id: str, item: Item, nodes: Sequence[Node]) -> set[Home]:
        """Runtimes for a component that is wanted everywhere: all that can run it, and those it has on absent nodes."""
        types = {kind for variant in item.variants for kind in variant.runtime_types}
        online = [node for node in nodes if node.presence is Presence.ONLINE]
        spots = {
            Home(node.node_id, runtime.runtime_id)
            for node in online
            for runtime in node.runtimes
            if runtime.type in types
        }
        online_ids = {node.node_id for node in online}
        return spots | {
            Home(record.node_id, record.runtime_id)
            for record in self._book.active()
            if record.pinned and record.ident.item_id == item_id and record.node_id not in online_ids
        }

    # ---- nodes

    def _unloaded_nodes(self) -> list[Node]:
        return [self._balancer_node(node) for node in self._nodes.nodes()]

    def _balancer_node(self, node: UnitNodeInfo) -> Node:
        config = self._unit_config.node_config(node.node_id, node.info.node_type)
        ratios = config.resource_ratios or messages.ResourceRatios()
        rules = config.alert_rules or messages.AlertRules()
        return Node(
            node_id=node.node_id,
            presence=self._presence(node),
            max_dmips=node.info.max_dmips,
            total_ram_bytes=node.info.total_ram,
            runtimes=node.runtimes,
            resources=node.resources,
            priority=config.priority,
            labels=frozenset(config.labels),
            ratios=Ratios(ratios.cpu, ratios.ram, ratios.storage, ratios.state),
            cpu_rule=_balancer_rule(rules.cpu),
            ram_rule=_balancer_rule(rules.ram),
        )

    async def _loads(self) -> dict[str, NodeMonitoring]:
        """How busy the nodes are; one that does not tell counts as idle."""

        async def ask(node_id: str) -> NodeMonitoring | None:
            try:
                return await self._sms.get_average_monitoring(node_id)
            except AosError as error:
                _log.warning(kv("Balancing without the load of a node", nodeID=node_id, error=error))
                return None

        online = [node.node_id for node in self._nodes.nodes() if self._presence(node) is Presence.ONLINE]
        averages = await asyncio.gather(*(ask(node_id) for node_id in online))
        return {node_id: average for node_id, average in zip(online, averages, strict=True) if average is not None}

    def _driver(self, node_id: str) -> NodeDriver:
        driver = self._drivers.get(node_id)
        if driver is None:
            driver = self._drivers[node_id] = NodeDriver(
                node_id,
                self._sms.update_instances,
                is_usable=lambda: any(
                    node.is_usable or node.is_paused for node in self._nodes.nodes() if node.node_id == node_id
                ),
                changed=lambda: self._publish_node(node_id),
                confirmed=self._confirmed.get(node_id),
                save_confirmed=self._store.save_confirmed,
                alert=self._alert,
                settings=self._settings.driver,
            )
            if self._driver_tasks is not None:
                self._driver_tasks.create_task(driver.run())
                if not self._hold:
                    driver.set_wanted(*self._wanted_on(node_id))
        return driver

    def _drive(self, *, retry: bool = False) -> None:
        """Tell every driver what shall run on its node."""
        known = {node.node_id for node in self._nodes.nodes()} | set(self._on_node)
        for node_id in sorted((known | set(self._drivers)) - {""}):
            self._driver(node_id).set_wanted(*self._wanted_on(node_id), retry=retry)

    def _wanted_on(self, node_id: str) -> tuple[list[InstanceInfo], set[InstanceIdent]]:
        """What a node shall run, and what it shall be left alone with."""
        infos: list[InstanceInfo] = []
        leave: set[InstanceIdent] = set()
        if any(node.is_paused for node in self._nodes.nodes() if node.node_id == node_id):
            return infos, leave
        for record in self._on_node.get(node_id, ()):
            info = self._infos.get(record.ident)
            if info is None:
                leave.add(record.ident)
                continue
            accepted, refused = split_acceptable(variables_for(record.ident, self._overrides))
            self._results.set_refused(record.ident, refused)
            infos.append(msgspec.structs.replace(info, env_vars=accepted))
        return infos, leave

    # ---- overridden variables

    async def _set_overrides(self, overrides: Sequence[Override], correlation_id: str, *, drive: bool = True) -> None:
        kept = without_expired(overrides, self._now())
        is_same, is_asked = kept == self._overrides, correlation_id != self._overrides_id
        if is_same and not is_asked:
            return
        await self._store.save_overrides(kept, correlation_id)
        self._overrides, self._overrides_id = kept, correlation_id
        _log.info(kv("Environment variables overridden", filters=len(kept)))
        if is_asked:
            self._results.repeat(at_once=is_same)
        if drive and not is_same and not self._hold:
            self._drive()
        self._report_env.set()
        self._env_wake.set()

    async def _expire_overrides(self) -> None:
        while True:
            self._env_wake.clear()
            period_s = self._settings.check_env_vars_period_s if next_expiry(self._overrides) else None
            if not await comes_within(self._env_wake, period_s):
                with log_and_continue(_log, "Can't drop expired environment variables"):
                    async with self._lock:
                        await self._set_overrides(self._overrides, self._overrides_id)

    async def _report_env_vars(self) -> None:
        while True:
            await self._report_env.wait()
            self._report_env.clear()
            report = self._results.take_report([record.ident for record in self._active])
            if report is not None:
                with log_and_continue(_log, "Can't report overridden environment variables"):
                    await self._link.send(msgspec.structs.replace(report, correlation_id=self._overrides_id))

    # ---- statuses and records

    def _status(self, record: InstanceRecord) -> UnitInstanceStatus:
        error = self._errors.get(record.ident)
        info = self._infos.get(record.ident)
        if error is not None:
            status = _plain_status(record, InstanceState.FAILED, to_error_info(error))
        elif info is None or info.version != record.version:
            status = _plain_status(record, InstanceState.ACTIVATING)
        else:
            status = self._driver(record.node_id).status(info)
        return UnitInstanceStatus(status, record.node_id, self._storage.checksum(record.ident))

    def _publish(self) -> None:
        """Tell about all instances that are others than before."""
        nodes = set(self._on_node) | set(self._drivers) | {""}
        self._tell({node_id: self._statuses_on(node_id) for node_id in sorted(nodes)})

    def _publish_node(self, node_id: str) -> None:
        """The same for one node: its figures change often, and a Unit may have many."""
        self._tell({node_id: self._statuses_on(node_id)})

    def _statuses_on(self, node_id: str) -> list[UnitInstanceStatus]:
        found = [self._status(record) for record in self._on_node.get(node_id, ())]
        return found + (self._preinstalled(node_id) if node_id else self._unrecorded())

    def _tell(self, present: Mapping[str, Sequence[UnitInstanceStatus]]) -> None:
        changed: list[UnitInstanceStatus] = []
        for node_id, statuses in present.items():
            told = self._published.get(node_id, {})
            self._published[node_id] = {(one.status.ident, one.status.version): one for one in statuses}
            changed += [one for key, one in self._published[node_id].items() if told.get(key) != one]
        if changed:
            self.changed.publish(changed)

    async def _flush(self) -> None:
        changed, deleted = self._book.take_changes()
        if not changed and not deleted:
            return
        try:
            await self._store.save_records(changed, deleted)
        except BaseException:
            self._book.put_back_changes(changed, deleted)
            raise


def _with_load(node: Node, average: NodeMonitoring | None, current: Mapping[InstanceIdent, Site]) -> Node:
    if average is None:
        return node
    loads: dict[tuple[InstanceIdent, str], Usage] = {}
    for one in average.instances:
        # A 9.1.0 SM does not tell the runtime (sm.md §2.3).
        site = current.get(one.ident)
        runtime_id = one.runtime_id or (site.runtime_id if site else "")
        loads[one.ident, runtime_id] = Usage(one.data.cpu, one.data.ram)
    return msgspec.structs.replace(node, load=Usage(average.node.cpu, average.node.ram), instance_loads=loads)


def _wanted(record: InstanceRecord, item: Item) -> Wanted:
    return Wanted(
        ident=record.ident,
        variants=item.variants,
        priority=record.priority,
        labels=record.labels,
        is_component=record.is_component,
        pin=Home(record.node_id, record.runtime_id) if record.pinned else None,
        problem=item.problem,
    )


def _balancer_rule(rule: PercentRule | None) -> AlertRulePercents | None:
    return AlertRulePercents(rule.min_threshold, rule.max_threshold) if rule else None


def _plain_status(record: InstanceRecord, state: InstanceState, error: ErrorInfo | None = None) -> InstanceStatus:
    return InstanceStatus(record.ident, record.version, state, record.runtime_id, record.manifest_digest, error=error)


def _is_system_user(uid: int) -> bool:
    with contextlib.suppress(KeyError):
        pwd.getpwuid(uid)
        return True
    return False


def _is_system_group(gid: int) -> bool:
    with contextlib.suppress(KeyError):
        grp.getgrgid(gid)
        return True
    return False
