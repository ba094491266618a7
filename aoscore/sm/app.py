"""Service Manager: composition root and entry point of `aos_servicemanager`."""

import argparse
import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TypeAlias

from aoscore._speedups.unpack_types import Owners
from aoscore.common.aio import Backoff, Service, Worker, log_and_continue
from aoscore.common.daemon import Program, leave, run_daemon
from aoscore.common.db import Database
from aoscore.common.download import Downloader
from aoscore.common.errors import AosError, ConfigError, InvalidArgumentError
from aoscore.common.files import DirectoryLock
from aoscore.common.iamclient import CertificateKeeper, IamPublicClient
from aoscore.common.log import kv
from aoscore.common.types import CoreAlert, LogRequest, NodeInfo, SMInfo
from aoscore.sm import cgroups, config, journal
from aoscore.sm.alerts.journalalerts import CursorStore, JournalAlerts
from aoscore.sm.alerts.limitalerts import LimitAlerts
from aoscore.sm.alerts.rules import AlertRules
from aoscore.sm.config import Config
from aoscore.sm.database import open_database
from aoscore.sm.iamclient import PermissionsClient
from aoscore.sm.imagemanager.imagemanager import ImageManager
from aoscore.sm.imagemanager.items import ItemTable
from aoscore.sm.imagemanager.store import ImageStore
from aoscore.sm.launcher import launcher
from aoscore.sm.launcher.runtimes.base import Runtime
from aoscore.sm.launcher.runtimes.boot.config import BootConfig, load_boot_config
from aoscore.sm.launcher.runtimes.boot.runtime import BootRuntime
from aoscore.sm.launcher.runtimes.container.config import ContainerConfig, load_container_config
from aoscore.sm.launcher.runtimes.container.crun import Crun
from aoscore.sm.launcher.runtimes.container.engine import Engine
from aoscore.sm.launcher.runtimes.container.history import RunHistory
from aoscore.sm.launcher.runtimes.container.output import JournalOutput, choose_output
from aoscore.sm.launcher.runtimes.container.runtime import PARALLEL, ContainerRuntime, end_left_running
from aoscore.sm.launcher.runtimes.native.config import NativeConfig, load_native_config
from aoscore.sm.launcher.runtimes.native.engine import SystemdEngine
from aoscore.sm.launcher.runtimes.rootfs.config import RootfsConfig, load_rootfs_config
from aoscore.sm.launcher.runtimes.rootfs.runtime import RootfsRuntime
from aoscore.sm.launcher.store import LauncherStore
from aoscore.sm.logprovider.provider import LogProvider
from aoscore.sm.logprovider.source import AllSources, FileSource, JournalSource, LogSource
from aoscore.sm.monitoring.monitor import Monitoring
from aoscore.sm.networkmanager.cni import DEFAULT, CniSettings, load_config_list
from aoscore.sm.networkmanager.ipv6 import Ipv6
from aoscore.sm.networkmanager.manager import NetworkManager
from aoscore.sm.networkmanager.model import Ports, parse_ports
from aoscore.sm.networkmanager.store import NetworkStore
from aoscore.sm.networkmanager.traffic import PRIVATE
from aoscore.sm.resourcemanager.devices import DeviceWatch
from aoscore.sm.resourcemanager.nodeconfig import NodeConfigManager
from aoscore.sm.resourcemanager.quotas import DiskQuotas
from aoscore.sm.resourcemanager.resources import Resources, load_resources
from aoscore.sm.smclient import client
from aoscore.sm.systemd import Systemd

_log = logging.getLogger(__name__)

_IMAGE_THREADS = 2
# After that systemd starts us again; until then IAM may still be starting itself.
_IAM_PATIENCE_S = 60.0


RuntimeSection: TypeAlias = ContainerConfig | NativeConfig | RootfsConfig | BootConfig

_LOADERS: dict[str, Callable[..., RuntimeSection]] = {
    "container": load_container_config,
    "native": load_native_config,
    "rootfs": load_rootfs_config,
    "boot": load_boot_config,
}


@dataclass(frozen=True)
class Setup:
    """The configuration file with its plug-in sections and expressions checked."""

    config: Config
    runtimes: tuple[tuple[str, RuntimeSection], ...]
    """Type and section of each runtime."""
    alert_rules: AlertRules
    cni: CniSettings | None
    """Set when CNI plugins connect the instances."""
    host_ports: tuple[Ports, ...] | None
    ipv6: Ipv6 | None


def load(path: Path) -> Setup:
    """Read the configuration file. Raises NotFoundError or ConfigError naming file and key."""
    loaded = config.load(path)
    runtimes = []
    for index, runtime in enumerate(loaded.runtimes):
        here = f"runtimes[{index}]"
        load_runtime = _LOADERS.get(runtime.plugin)
        if load_runtime is None:
            known = ", ".join(_LOADERS)
            raise ConfigError(f"{path}: '{here}.plugin' {runtime.plugin!r} is not supported, use one of {known}")
        section = load_runtime(runtime.config, path=path, where=f"{here}.config", working_dir=loaded.working_dir)
        runtimes.append((runtime.type, section))
    alerts = loaded.journal_alerts
    try:
        rules = AlertRules(
            alerts.filter, service_priority=alerts.service_alert_priority, system_priority=alerts.system_alert_priority
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: 'journalAlerts.filter': {error}") from error
    try:
        host_ports = None if loaded.network.host_ports is None else tuple(map(parse_ports, loaded.network.host_ports))
    except InvalidArgumentError as error:
        raise ConfigError(f"{path}: 'network.hostPorts': {error}") from error
    ipv6 = None
    if loaded.network.ipv6_prefix is not None:
        try:
            ipv6 = Ipv6(loaded.network.ipv6_prefix, PRIVATE)
        except InvalidArgumentError as error:
            raise ConfigError(f"{path}: 'network.ipv6Prefix': {error}") from error
        if loaded.network.backend == "cni":
            raise ConfigError(f"{path}: 'network.ipv6Prefix' is not possible with CNI plugins")
    return Setup(loaded, tuple(runtimes), rules, _cni_settings(loaded.network), host_ports, ipv6)


def _cni_settings(network: config.NetworkConfig) -> CniSettings | None:
    if network.backend != "cni":
        return None
    template = load_config_list(network.cni.config_file) if network.cni.config_file else DEFAULT
    return CniSettings(template, network.cni.bin_dirs, network.cni.state_dir)


async def build(setup: Setup, options: argparse.Namespace, stack: contextlib.AsyncExitStack) -> list[Service]:
    """All services of an SM, in start order."""
    try:
        core = await build_core(setup.config, stack)
    except asyncio.CancelledError:
        # IAM may be long in coming, and the services of an earlier process shall not outlive an orderly stop.
        with log_and_continue(_log, "Can't end services"):
            await _end_left_running(setup)
        raise
    networks = NetworkManager(
        NetworkStore(core.database),
        core.client.networks,
        cni=setup.cni,
        traffic_period=setup.config.network.traffic_period,
        host_ports=setup.host_ports,
        ipv6=setup.ipv6,
    )
    disk_quotas = DiskQuotas()
    layout = await core.worker.run(cgroups.probe)
    history = RunHistory(setup.config.working_dir / "instancelogs")
    runtimes: list[Runtime] = []
    # Control groups whose output is in the journal, folders of the others.
    journal_groups: dict[str, None] = {}
    folders: dict[Path, None] = {}
    for runtime_type, section in setup.runtimes:
        if isinstance(section, RootfsConfig):
            runtimes.append(RootfsRuntime(section, runtime_type, core.node, Systemd()))
            continue
        if isinstance(section, BootConfig):
            runtimes.append(BootRuntime(section, runtime_type, core.node, Systemd()))
            continue
        engine: Engine | None = None
        if isinstance(section, NativeConfig):
            engine, section = SystemdEngine(section, Systemd()), section.as_container()
        output_dir = section.output_dir or setup.config.working_dir / "instancelogs"
        output = choose_output(section.output, output_dir, section.output_max_size_bytes)
        if isinstance(output, JournalOutput):
            journal_groups[section.cgroup_parent] = None
        else:
            folders[output_dir] = None
        runtimes.append(
            ContainerRuntime(
                section,
                runtime_type,
                core.node,
                layout,
                networks=networks,
                permissions=core.permissions,
                resources=core.resources,
                disk_quotas=disk_quotas,
                output=output,
                history=history,
                send_alert=core.client.send,
                engine=engine,
            )
        )
    monitoring = Monitoring(
        core.node,
        runtimes,
        networks,
        core.node_config,
        core.client.send,
        disk_quotas=disk_quotas,
        period_s=setup.config.monitoring.poll_period_s,
        window_s=setup.config.monitoring.average_window_s,
    )
    has_journal = journal.is_available()
    files: list[LogSource] = [FileSource(folder) for folder in folders]
    logs = LogProvider(
        JournalSource() if has_journal else AllSources(files),
        AllSources([*files, *([JournalSource(*journal_groups)] if journal_groups else [])]),
        history,
        core.client.send,
        max_part_size_bytes=setup.config.logging.max_part_size_bytes,
        max_part_count=setup.config.logging.max_part_count,
    )
    after: list[Service] = [monitoring, LimitAlerts(runtimes, layout, core.client.send), logs]
    if has_journal:
        after.append(JournalAlerts(setup.alert_rules, CursorStore(core.database), history, core.client.send))
    else:
        _log.warning("No journal on this machine: no system logs and no journal alerts")
    return assemble(
        core,
        runtimes=runtimes,
        networks=networks,
        monitoring=monitoring,
        request_log=logs.request,
        before=[networks],
        after=after,
    )


async def _end_left_running(setup: Setup) -> None:
    layout = cgroups.probe()
    async with Worker("crun", PARALLEL) as worker:
        for _, section in setup.runtimes:
            if isinstance(section, ContainerConfig):
                await end_left_running(section, Crun(section, layout, worker), layout)
            elif isinstance(section, NativeConfig):
                await end_left_running(section.as_container(), SystemdEngine(section, Systemd()), layout)


@dataclass(frozen=True)
class Core:
    """What does not depend on the kinds of runtimes."""

    config: Config
    node: NodeInfo
    worker: Worker
    """For short file work of any part; image work has threads of its own."""
    database: Database
    certificates: CertificateKeeper
    permissions: PermissionsClient
    client: client.SmClient
    images: ImageManager
    resources: Resources
    node_config: NodeConfigManager


class Networks(launcher.Networks, client.Networks, Protocol):
    """The network manager as launcher and link to CM need it."""


async def build_core(settings: Config, stack: contextlib.AsyncExitStack) -> Core:
    """Make the objects, in the order in which they need each other."""
    stack.enter_context(DirectoryLock(settings.working_dir))
    iam = await stack.enter_async_context(IamPublicClient(settings.iam_public_server_url, settings.ca_cert))
    node = await _node_info(iam)
    certificates = CertificateKeeper(iam, settings.cert_storage, settings.ca_cert)
    permissions = await stack.enter_async_context(PermissionsClient(settings.iam_protected_server_url, certificates))
    worker = await stack.enter_async_context(Worker("files"))
    database = await stack.enter_async_context(
        open_database(settings.database_path, settings.migration.migration_path, settings.merged_migration_dir)
    )
    sm_client = client.SmClient(
        settings.cm_server_url, node.node_id, certificates, reconnect_pause_s=settings.cm_reconnect_timeout_s
    )
    if database.recovered is not None:
        # The journal's alert about it may be missed: SM's place in the journal was in that file.
        text = f"database was damaged, or others may write it; the old one is {database.recovered.name}"
        await sm_client.send(CoreAlert(datetime.now(UTC), "SM", text))
        await database.forget_recovery()
    image_worker = await stack.enter_async_context(Worker("images", _IMAGE_THREADS))
    images = ImageManager(
        await image_worker.run(
            ImageStore,
            settings.images_dir,
            Owners(settings.image_manager.owners),
            settings.image_manager.staging_dir,
        ),
        ItemTable(database),
        sm_client,
        Downloader(image_worker),
        image_worker,
        sm_client,
        ttl_s=settings.image_manager.update_item_ttl_s,
        period_s=settings.image_manager.remove_outdated_period_s,
        limit_percent=settings.image_manager.images_part_limit_percent,
        first_layer_on_top=settings.image_manager.first_layer_on_top,
    )
    node_config = NodeConfigManager(settings.node_config_path, worker)
    await node_config.load()
    return Core(
        config=settings,
        node=node,
        worker=worker,
        database=database,
        certificates=certificates,
        permissions=permissions,
        client=sm_client,
        images=images,
        resources=await worker.run(load_resources, settings.resources_config_file),
        node_config=node_config,
    )


def assemble(
    core: Core,
    *,
    runtimes: Sequence[Runtime],
    networks: Networks,
    monitoring: client.Monitors,
    request_log: Callable[[LogRequest], Awaitable[None]],
    before: Sequence[Service] = (),
    after: Sequence[Service] = (),
) -> list[Service]:
    """All services in start order (sm.md §1.6): `before` the runtimes, and `after` the launcher.

    They stop in reverse, so the launcher ends the instances while runtimes and networks still work.
    """
    instances = launcher.Launcher(LauncherStore(core.database), runtimes, core.images, networks)
    core.client.bind(
        client.Node(
            info=SMInfo(
                core.node.node_id,
                tuple(runtime.info for runtime in runtimes),
                core.resources.infos(),
            ),
            launcher=instances,
            node_config=core.node_config,
            monitoring=monitoring,
            networks=networks,
            request_log=request_log,
        )
    )
    devices = DeviceWatch(core.resources, core.worker, core.client.send, instances.resources_changed)
    return [core.certificates, *before, *runtimes, core.images, instances, devices, *after, core.client]


async def _node_info(iam: IamPublicClient) -> NodeInfo:
    """This node as IAM knows it; IAM may come up later than we do."""
    backoff = Backoff(0.5, 5.0)
    async with asyncio.timeout(_IAM_PATIENCE_S) as patience:
        while True:
            try:
                return await iam.get_node_info()
            except AosError as error:
                pause_s = backoff.next()
                if asyncio.get_running_loop().time() + pause_s >= (patience.when() or 0.0):
                    raise
                _log.warning(kv("IAM does not answer yet", error=error, next_try_s=round(pause_s, 1)))
                await asyncio.sleep(pause_s)


PROGRAM = Program(
    name="aos_servicemanager", title="SM", default_config="aos_servicemanager.cfg", load=load, build=build
)


def main() -> None:
    """Entry point of the program aos_servicemanager."""
    leave(run_daemon(PROGRAM))
