"""Container runtime: starts, adopts and stops the containers of a node (sm-runtime.md §2).

How containers outlive SM: conmon is the parent of each (see ``crun``), the bundle in tmpfs holds a record of what was
started, and the output goes to journald or to conmon's file. Nothing of a running container hangs on the SM process.
A new SM process finds the containers with ``crun list``, compares them with the stored instances and watches them
through a pidfd like those it started itself; exit codes come from conmon's file in both cases.

For that SM's unit must leave other processes of its control group alone when it stops (``KillMode=process``).
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

import msgspec

from aoscore.common.aio import Broadcast, Worker, log_and_continue, side_by_side, together
from aoscore.common.errors import FailedError, NotSupportedError, to_error_info
from aoscore.common.log import kv
from aoscore.common.oci import ItemConfig
from aoscore.common.types import (
    InstanceAlert,
    InstanceIdent,
    InstanceInfo,
    InstanceState,
    InstanceStatus,
    NodeInfo,
    ResourceAllocateAlert,
)
from aoscore.sm.cgroups import CgroupLayout
from aoscore.sm.imagemanager.model import InstalledImage
from aoscore.sm.launcher.plan import priority
from aoscore.sm.launcher.runtimes.base import RunningInstance, SampleTarget, instance_id, runtime_info
from aoscore.sm.launcher.runtimes.container.bundle import Bundle, BundleRecord
from aoscore.sm.launcher.runtimes.container.config import ContainerConfig
from aoscore.sm.launcher.runtimes.container.container import (
    Container,
    Tools,
    ended_run,
    instance_status,
    restart_policy,
)
from aoscore.sm.launcher.runtimes.container.crun import Crun, describe_exit
from aoscore.sm.launcher.runtimes.container.engine import Engine, EngineState
from aoscore.sm.launcher.runtimes.container.history import RunHistory
from aoscore.sm.launcher.runtimes.container.output import ContainerOutput
from aoscore.sm.launcher.runtimes.container.preparation import Preparation
from aoscore.sm.networkmanager.model import AttachedNetwork, NetworkConfig, netns_path, network_config
from aoscore.sm.processes import catches, terminate
from aoscore.sm.resourcemanager.quotas import DiskQuotas
from aoscore.sm.resourcemanager.resources import ResourceError, Resources

_log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_INSTANCES = 256
_THREADS = 4
# Programs of the engine at a time.
PARALLEL = 8
_TEND_PERIOD_S = 10.0
_FLOOD_PERIOD_S = 60.0
"""Between alerts that an instance floods its log."""


class Networks(Protocol):
    """What the runtime needs from the network manager."""

    async def attach(self, instance_id: str, network_id: str, config: NetworkConfig) -> AttachedNetwork:
        """Bring the instance's network up; repeatable."""
        ...

    async def detach(self, instance_id: str) -> None:
        """Take it down and keep its allocation; repeatable."""
        ...


class Permissions(Protocol):
    """What the runtime needs from IAM."""

    iam_returned: Broadcast[str]
    """IAM answers again after a break."""

    async def register_instance(self, ident: InstanceIdent, permissions: dict[str, dict[str, str]]) -> str:
        """The instance's secret."""
        ...

    async def unregister_instance(self, ident: InstanceIdent) -> None:
        """Take the secret back; repeatable."""
        ...


class ContainerRuntime:
    """See the module text. Implements `aoscore.sm.launcher.runtimes.base.Runtime`."""

    def __init__(
        self,
        config: ContainerConfig,
        runtime_type: str,
        node: NodeInfo,
        layout: CgroupLayout,
        *,
        networks: Networks,
        permissions: Permissions,
        resources: Resources,
        disk_quotas: DiskQuotas,
        output: ContainerOutput,
        history: RunHistory,
        send_alert: Callable[[ResourceAllocateAlert | InstanceAlert], Awaitable[None]],
        engine: Engine | None = None,
    ) -> None:
        """`engine` is crun unless another one is given."""
        if config.default_pids_limit and not layout.has("pids"):
            # A limit that nobody asked for must not keep services from starting.
            _log.warning("This kernel can't limit processes of services: defaultPidsLimit has no effect")
            config = msgspec.structs.replace(config, default_pids_limit=0)
        self.info = runtime_info(runtime_type, node, max_instances=MAX_INSTANCES)
        self._config = config
        self._layout = layout
        self._networks = networks
        self._permissions = permissions
        self._resources = resources
        self._send_alert = send_alert
        self._preparation = Preparation(config, node, resources, disk_quotas)
        self.changed: Broadcast[InstanceStatus] = Broadcast(f"statuses of runtime {runtime_type}")
        self.reboot_due = asyncio.Event()
        self._worker = Worker("container", _THREADS)
        self._programs = Worker("crun", PARALLEL)
        self._engine = engine or Crun(config, layout, self._programs)
        self._tools = Tools(config, self._engine, output, history, self._worker, self.changed.publish)
        self._containers: dict[str, Container] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._restarts: dict[str, int] = {}
        """Of instances that ended while no SM was there, until they are started."""
        self._floods: dict[str, float] = {}
        """When it was told of instances that flood their log."""
        self._slots = asyncio.Semaphore(PARALLEL)
        self._tasks: asyncio.TaskGroup | None = None

    # The service

    async def run(self, started: Callable[[], None]) -> None:
        """Watch over containers until cancelled; they go on running then."""
        self._engine.check()
        self._config.runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        async with self._worker, self._programs, asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._follow_iam(), name="secrets")
            started()
            while True:
                await asyncio.sleep(_TEND_PERIOD_S)
                self._floods = {name: told for name, told in self._floods.items() if name in self._containers}
                for container in list(self._containers.values()):
                    with log_and_continue(_log, f"Can't tend output of instance {container.id}"):
                        if await self._worker.run(self._tools.output.tend, container.id, container.bundle.path):
                            await self._tell_flood(container)

    async def _tell_flood(self, container: Container) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._floods.get(container.id, -_FLOOD_PERIOD_S) >= _FLOOD_PERIOD_S:
            self._floods[container.id] = now_s
            text = "its log is flooded: what it said a minute ago is lost"
            await self._send_alert(InstanceAlert(datetime.now(UTC), container.info.ident, container.info.version, text))

    async def reboot(self) -> None:
        """Containers never ask for one."""
        raise NotSupportedError("the container runtime needs no reboot")

    # Adoption

    async def adopt(self, stored: Sequence[InstanceInfo]) -> list[RunningInstance]:
        """Take over containers of stored instances that run; stop and clean everything else of ours."""
        wanted = {instance_id(info.ident): info for info in stored}
        bundles = {path.name for path in self._config.runtime_dir.iterdir() if path.is_dir()}
        states = await _own_states(self._engine, self._config)
        async with asyncio.TaskGroup() as tasks:
            for name in bundles | states.keys():
                tasks.create_task(self._adopt_or_clean(name, states.get(name), wanted.get(name)))
        await self._worker.run(self._tools.history.prune, wanted)
        if self._tasks is not None:
            self._tasks.create_task(self._check_secrets(), name="secrets of adopted instances")
        return self.running()

    async def _adopt_or_clean(self, name: str, state: EngineState | None, info: InstanceInfo | None) -> None:
        bundle = self._bundle(name)
        record = await _read_record(bundle)
        if state is not None and state.is_running and info is not None and netns_path(name).exists():
            # Without a record it was started by AosCore 9.1, which adopts by name alone; so do we then.
            record = record or BundleRecord(info, started=time.time(), registered=True)
            if record.info == info:
                container = Container(self._tools, bundle, record, adopted_pid=state.pid)
                await self._worker.run(self._tools.history.note_start, name, info.ident, info.version)
                self._resources.adopt(name, info.ident, record.resources)
                self._keep(container)
                return
        if record is not None and (state is None or not state.is_running):
            await self._note_unseen_end(name, bundle, record)
            if record.info == info:
                policy = restart_policy(record, self._config)
                policy.ended(time.time() - record.started)
                self._restarts[name] = policy.restarts
        _log.info(kv("Leftovers of an earlier process cleaned", id=name))
        with log_and_continue(_log, f"Can't clean instance {name}"):
            await self._clean(name, record)

    async def _note_unseen_end(self, name: str, bundle: Bundle, record: BundleRecord) -> None:
        """It ended while no SM was there."""
        with log_and_continue(_log, f"Can't note end of instance {name}"):
            end = await self._engine.exit(name, bundle.path)
            if end.code is not None:
                reason = describe_exit(end.code, out_of_memory=end.out_of_memory)
                run = ended_run(record, end.code, reason, crashed=True)
                await self._worker.run(self._tools.history.note_end, name, run)

    # Secrets (sm.md §12, D23)

    async def _follow_iam(self) -> None:
        with self._permissions.iam_returned.subscribe() as returns:
            while True:
                await returns.get()
                await self._check_secrets()

    async def _check_secrets(self) -> None:
        """See that IAM knows the secrets of running instances: that of AosCore 9.1 forgets them with its process."""
        for container in list(self._containers.values()):
            if container.record.permissions:
                with log_and_continue(_log, f"Can't check the secret of instance {container.id}"):
                    await self._check_secret(container)

    async def _check_secret(self, container: Container) -> None:
        async with self._lock(container.id):
            record = container.record
            if self._containers.get(container.id) is not container:
                return
            secret = await self._permissions.register_instance(record.info.ident, record.permissions)
            if secret == await self._worker.run(container.bundle.secret):
                return
            _log.warning(kv("IAM has forgotten the secret of an instance, it is started again", id=container.id))
            await self._stop_watching(container)
            try:
                await self._end_processes(container)
                # Only now: who finds it running takes its spec for what it has.
                await self._worker.run(container.bundle.replace_secret, secret)
            except Exception:
                # With the old one, rather than not at all.
                self._keep(container, ended=True)
                raise
            self._keep(container, ended=True)

    # What the launcher asks for

    def running(self) -> list[RunningInstance]:
        """Containers that are up or under restart."""
        return [
            RunningInstance(container.info.ident, name, container.adopted, container.status())
            for name, container in self._containers.items()
        ]

    async def start_instance(self, info: InstanceInfo, image: InstalledImage) -> None:
        """See Runtime.start_instance."""
        name = instance_id(info.ident)
        async with self._lock(name):
            container = self._containers.get(name)
            if container is not None and container.info == info:
                self.changed.publish(container.status())
                return
            if container is not None:
                await self._stop(container, restart=True)
            self.changed.publish(instance_status(info, InstanceState.ACTIVATING))
            item = image.item_config or ItemConfig()
            try:
                container = await self._bring_up(name, info, image, item)
            except BaseException as error:
                # Also when cancelled: a half-made container must not be left to nobody.
                with log_and_continue(_log, f"Can't clean instance {name}"):
                    await self._clean(name, BundleRecord(info, registered=bool(item.permissions)))
                if isinstance(error, ResourceError):
                    alert = ResourceAllocateAlert(datetime.now(UTC), info.ident, error.resource, str(error))
                    await self._send_alert(alert)
                if isinstance(error, Exception):
                    self.changed.publish(instance_status(info, InstanceState.FAILED, to_error_info(error)))
                raise
            self._keep(container)
            await container.settled.wait()

    async def stop_instance(self, ident: InstanceIdent, *, restart: bool = False) -> None:
        """See Runtime.stop_instance. The network stays for a restart."""
        name = instance_id(ident)
        async with self._lock(name):
            container = self._containers.get(name)
            if container is not None:
                await self._stop(container, restart=restart)
            else:
                await self._clean(name, None, keep_network=restart)

    def sample_targets(self) -> list[SampleTarget]:
        """Containers that can be measured."""
        return [
            SampleTarget(
                instance_id=name,
                ident=container.info.ident,
                info=container.info,
                cgroup=self._engine.cgroup(name),
                pid=container.pid,
                netns=netns_path(name),
                partitions=self._preparation.partitions(container.info),
            )
            for name, container in self._containers.items()
            if container.is_active
        ]

    # Start and stop

    async def _bring_up(self, name: str, info: InstanceInfo, image: InstalledImage, item: ItemConfig) -> Container:
        bundle = self._bundle(name)
        self._resources.allocate(name, info.ident, [resource.name for resource in item.resources])
        await self._delete_leftover(bundle)
        wishes = network_config(info.ident, image.image_config, item, self._resources.hosts(item.resources))
        secret = ""
        if item.permissions:
            secret = await self._permissions.register_instance(info.ident, item.permissions)
        restarts = self._restarts.pop(name, 0)
        # A network waits for the kernel most of its time.
        network, record = await side_by_side(
            self._networks.attach(name, info.owner_id, wishes),
            self._worker.run(self._preparation.fill, bundle, info, image, secret, restarts=restarts),
        )
        async with self._slots:
            await self._worker.run(self._finish, bundle, record, network)
            container = Container(self._tools, bundle, record)
            await container.start()
        return container

    def _finish(self, bundle: Bundle, record: BundleRecord, network: AttachedNetwork) -> None:
        """In a worker thread. The record last of all: who finds it takes the instance for one that has run."""
        bundle.write_host_files(network.hosts, network.resolv_conf)
        bundle.mount_rootfs(record.overlays)
        self._tools.history.note_start(bundle.path.name, record.info.ident, record.info.version)
        bundle.write_record(record)

    def _keep(self, container: Container, *, ended: bool = False) -> None:
        if self._tasks is None:
            raise FailedError("the container runtime is not running")
        self._containers[container.id] = container
        container.watch = self._tasks.create_task(container.supervise(ended=ended), name=f"watch {container.id}")

    @staticmethod
    async def _stop_watching(container: Container) -> None:
        if container.watch is not None:
            container.watch.cancel()
            await asyncio.wait({container.watch})

    async def _stop(self, container: Container, *, restart: bool) -> None:
        await self._stop_watching(container)
        try:
            await self._end_processes(container)
            await self._clean(container.id, container.record, keep_network=restart)
        except Exception as error:
            # It stays known, so that a repeated stop tries again.
            container.report(InstanceState.FAILED, to_error_info(error))
            raise
        del self._containers[container.id]
        container.report(InstanceState.INACTIVE)

    async def _end_processes(self, container: Container) -> None:
        group = self._engine.cgroup(container.id)
        await _end_processes(container.pid, group, container.record, self._config, self._layout)

    async def _clean(self, name: str, record: BundleRecord | None, *, keep_network: bool = False) -> None:
        """Remove container, network, secret, mounts and bundle, give resources back; repeatable."""
        bundle = self._bundle(name)
        await self._delete_leftover(bundle)
        if not keep_network:
            await self._networks.detach(name)
        if record is not None and record.registered:
            with log_and_continue(_log, f"Can't take back the secret of instance {name}"):
                await self._permissions.unregister_instance(record.info.ident)
        await self._worker.run(bundle.remove)
        self._resources.release(name)

    async def _delete_leftover(self, bundle: Bundle) -> None:
        # A container never exists without its bundle, and asking crun costs a process.
        if bundle.path.exists():
            async with self._slots:
                await self._engine.delete(bundle.path.name)

    # Names

    def _bundle(self, name: str) -> Bundle:
        return Bundle(self._config.runtime_dir / name)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


async def end_left_running(config: ContainerConfig, engine: Engine, layout: CgroupLayout) -> None:
    """End the instances that an earlier process has left running, and remove them but for their networks.

    Those of the lowest priority end first. For an orderly stop that comes before there is a runtime to adopt them
    (sm.md §4.7).
    """

    async def end(state: EngineState, record: BundleRecord | None) -> None:
        with log_and_continue(_log, f"Can't end instance {state.id}"):
            if state.is_running and record is not None:
                await _end_processes(state.pid, engine.cgroup(state.id), record, config, layout)
            await engine.delete(state.id)
            await asyncio.to_thread(Bundle(config.runtime_dir / state.id).remove)
            _log.info(kv("Instance ended", id=state.id))

    left = [
        (state, await _read_record(Bundle(config.runtime_dir / state.id)))
        for state in (await _own_states(engine, config)).values()
    ]

    def order(one: tuple[EngineState, BundleRecord | None]) -> int:
        _, record = one
        return priority(record.info if record else None)

    for _, level in itertools.groupby(sorted(left, key=order), order):
        await together(end(state, record) for state, record in level)


async def _read_record(bundle: Bundle) -> BundleRecord | None:
    """None as well for a damaged one, which must not keep the instance from being ended and cleaned."""
    with log_and_continue(_log, f"Can't read record of instance {bundle.path.name}"):
        return await asyncio.to_thread(bundle.read_record)
    return None


async def _own_states(engine: Engine, config: ContainerConfig) -> dict[str, EngineState]:
    """Instances with bundles of ours: another user of the same state directory must not suffer."""
    states = await engine.list()
    return {name: state for name, state in states.items() if Path(state.bundle).parent == config.runtime_dir}


async def _end_processes(
    first: int, group: str, record: BundleRecord, config: ContainerConfig, layout: CgroupLayout
) -> None:
    """SIGTERM, or what the image names, to whoever listens; what is left gets SIGKILL later, by ``crun delete``.

    The `first` process of a pid namespace ignores a signal unless it has a handler. Where it has none, the others
    with one get the signal, so that a service behind a shell script can finish its work too; where nobody
    listens, waiting would be in vain.
    """
    number = record.stop_signal
    timeout_s = float(record.run_parameters.stop_timeout or config.stop_timeout_s)
    listeners = [first] if catches(first, number) else []
    if not listeners:
        listeners = [pid for pid in layout.processes(group) if catches(pid, number)]
    async with asyncio.TaskGroup() as tasks:
        for pid in listeners:
            tasks.create_task(terminate(pid, timeout_s, number))
