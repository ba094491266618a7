"""Service Manager: composition root and entry point of `aos_servicemanager`."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from aoscore.common.aio import Backoff, Service, Worker
from aoscore.common.db import Database
from aoscore.common.download import Downloader
from aoscore.common.errors import AosError
from aoscore.common.files import DirectoryLock
from aoscore.common.iamclient import CertificateKeeper, IamPublicClient
from aoscore.common.log import kv
from aoscore.common.types import LogRequest, NodeInfo, SMInfo
from aoscore.sm.config import Config
from aoscore.sm.database import open_database
from aoscore.sm.iamclient import PermissionsClient
from aoscore.sm.imagemanager.imagemanager import ImageManager
from aoscore.sm.imagemanager.items import ItemTable
from aoscore.sm.imagemanager.store import ImageStore
from aoscore.sm.launcher import launcher
from aoscore.sm.launcher.runtimes.base import Runtime
from aoscore.sm.launcher.store import LauncherStore
from aoscore.sm.resourcemanager.nodeconfig import NodeConfigManager
from aoscore.sm.resourcemanager.resources import Resources, load_resources
from aoscore.sm.smclient import client

_log = logging.getLogger(__name__)

_IMAGE_THREADS = 2
# After that systemd starts us again; until then IAM may still be starting itself.
_IAM_PATIENCE_S = 60.0


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


async def build_core(config: Config, stack: contextlib.AsyncExitStack) -> Core:
    """Make the objects, in the order in which they need each other."""
    stack.enter_context(DirectoryLock(config.working_dir))
    iam = await stack.enter_async_context(IamPublicClient(config.iam_public_server_url, config.ca_cert))
    node = await _node_info(iam)
    certificates = CertificateKeeper(iam, config.cert_storage, config.ca_cert)
    permissions = await stack.enter_async_context(PermissionsClient(config.iam_protected_server_url, certificates))
    worker = await stack.enter_async_context(Worker("files"))
    database = await stack.enter_async_context(
        open_database(config.database_path, config.migration.migration_path, config.merged_migration_dir)
    )
    sm_client = client.SmClient(
        config.cm_server_url, node.node_id, certificates, reconnect_pause_s=config.cm_reconnect_timeout_s
    )
    image_worker = await stack.enter_async_context(Worker("images", _IMAGE_THREADS))
    images = ImageManager(
        await image_worker.run(ImageStore, config.images_dir),
        ItemTable(database),
        sm_client,
        Downloader(image_worker),
        image_worker,
        sm_client,
        ttl_s=config.image_manager.update_item_ttl_s,
        period_s=config.image_manager.remove_outdated_period_s,
        limit_percent=config.image_manager.images_part_limit_percent,
        first_layer_on_top=config.image_manager.first_layer_on_top,
    )
    node_config = NodeConfigManager(config.node_config_path, worker)
    await node_config.load()
    return Core(
        config=config,
        node=node,
        worker=worker,
        database=database,
        certificates=certificates,
        permissions=permissions,
        client=sm_client,
        images=images,
        resources=await worker.run(load_resources, config.resources_config_file),
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
    return [core.certificates, *before, *runtimes, core.images, instances, *after, core.client]


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
