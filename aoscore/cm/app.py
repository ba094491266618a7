"""The CM process: its command line and its composition root - every object, and who gets whom (cm-cloud.md §1.4)."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aoscore.cm import config as configuration
from aoscore.cm.alerts import Alerts, AlertStore
from aoscore.cm.certnotes import CertificateNotes
from aoscore.cm.communication.inbox import Inbox
from aoscore.cm.communication.link import CloudLink, LinkSettings
from aoscore.cm.communication.messagelog import MessageLog
from aoscore.cm.communication.messages import (
    BlobUrls,
    DeprovisioningRequest,
    DesiredStatus,
    FinishProvisioningRequest,
    IssuedUnitCertificates,
    OverrideEnvVars,
    RenewCertificatesNotification,
    RequestBlobUrls,
    RequestLog,
    StartProvisioningRequest,
    StateAcceptance,
    UpdateState,
)
from aoscore.cm.communication.outbox import Outbox
from aoscore.cm.config import Config, ImageManagerConfig
from aoscore.cm.database import open_database, warn_beyond_9_1
from aoscore.cm.fileserver import BlobServer
from aoscore.cm.iamclient.certificates import Certificates
from aoscore.cm.iamclient.client import IamClient
from aoscore.cm.iamclient.subjects import UnitSubjects
from aoscore.cm.imagemanager.fetcher import Fetcher, FetchSettings
from aoscore.cm.imagemanager.manager import ImageManager, ImageManagerSettings
from aoscore.cm.imagemanager.platforms import RuntimePlatform
from aoscore.cm.imagemanager.space import Space
from aoscore.cm.imagemanager.store import ItemStore
from aoscore.cm.launcher.launcher import Launcher, LauncherSettings
from aoscore.cm.launcher.store import LauncherStore
from aoscore.cm.logs import LogForwarder
from aoscore.cm.logupload import LogUploads
from aoscore.cm.monitoring import Monitoring, MonitoringStore
from aoscore.cm.networkmanager.dns import DnsServer, DnsSettings
from aoscore.cm.networkmanager.manager import NetworkManager
from aoscore.cm.networkmanager.routes import read_routes
from aoscore.cm.networkmanager.store import NetworkStore
from aoscore.cm.nodeinfo import NodeInfoProvider
from aoscore.cm.smcontroller.admission import SmAdmission
from aoscore.cm.smcontroller.controller import Receivers, SmController
from aoscore.cm.storagestate.manager import StorageState
from aoscore.cm.storagestate.store import StateStore
from aoscore.cm.unitconfig.manager import UnitConfigManager
from aoscore.cm.updatemanager.gate import GateStore, UpdateGate
from aoscore.cm.updatemanager.manager import UpdateManager, UpdateSettings
from aoscore.cm.updatemanager.reporter import StatusReporter
from aoscore.cm.updatemanager.schedule import Kind
from aoscore.cm.updatemanager.scheduler import UpdateScheduler
from aoscore.cm.updatemanager.store import UpdateStore
from aoscore.common.aio import Backoff, Service, Worker
from aoscore.common.blobstore import BlobStore
from aoscore.common.daemon import EXIT_OK, Option, Program, leave, run_daemon
from aoscore.common.db import Database, files_of
from aoscore.common.download import Downloader
from aoscore.common.errors import AosError
from aoscore.common.files import DirectoryLock, remove_tree
from aoscore.common.iamclient import CertificateKeeper, IamPublicClient
from aoscore.common.log import kv
from aoscore.common.pacing import SpeedLimit
from aoscore.common.rpc import Server
from aoscore.common.tls import ServerTls, TlsIdentity, TlsRoots, grpc_server_credentials, read_roots
from aoscore.common.types import NodeAlert, NodeState

if TYPE_CHECKING:
    from cryptography import x509

_log = logging.getLogger(__name__)

ONLINE: Final = "online"
"""IAM type of the certificate for the cloud."""
MAIN_TYPES: Final = ("sm", "iam", "cm")
"""IAM types of the certificates that programs of the Main Node show to CM."""
STOP_TIMEOUT_S: Final = 60.0
"""How long a CM that runs may take to stop for a reset."""
WORKER_THREADS: Final = 4
"""Hashing, decryption and file work of several downloads."""

Alert = Callable[[str], None]


class Identities:
    """The certificate for the cloud, asked for each time."""

    def __init__(self, iam: IamPublicClient, ca_cert: Path) -> None:
        self._iam = iam
        self._ca_cert = ca_cert

    async def online_identity(self) -> TlsIdentity:
        """The present one."""
        return TlsIdentity.of(self._ca_cert, await self._iam.get_cert(ONLINE))


class BlobUrlSource:
    """Asks the cloud for blob URLs, once there is a connection."""

    def __init__(self, link: CloudLink) -> None:
        self._link = link

    async def blob_urls(self, digests: Sequence[str]) -> BlobUrls:
        """The cloud's answer."""
        await self._link.wait_connected()
        return await self._link.request(RequestBlobUrls(digests=tuple(digests)), BlobUrls)


async def _main_keys(iam: IamPublicClient, worker: Worker) -> set[bytes]:
    """Digests of the keys of the Main Node's certificates, as far as it has them."""
    from aoscore.common.certs import key_digest, load_chain_url

    keys = set()
    for cert_type in MAIN_TYPES:
        try:
            cert = await iam.get_cert(cert_type)
            keys.add(key_digest((await worker.run(load_chain_url, cert.cert_url))[0]))
        except (AosError, OSError) as error:
            _log.debug("No certificate %s of the Main Node: %s", cert_type, error)
    return keys


async def _system_id(iam: IamPublicClient) -> str:
    """Id of the Unit. IAM may still be starting: it is asked until it answers."""
    backoff = Backoff(0.5, 10.0)
    while True:
        try:
            return (await iam.get_system_info()).system_id
        except AosError as error:
            _log.warning("Waiting for IAM: %s", error)
        await asyncio.sleep(backoff.next())


def _runtime_platforms(nodes: NodeInfoProvider) -> set[RuntimePlatform] | None:
    """What the Unit's runtimes run; None while the SM of some node has not told."""
    platforms: set[RuntimePlatform] = set()
    for node in nodes.nodes():
        if "sm" not in node.info.components:
            continue
        if not node.has_sm_link and node.info.state is not NodeState.UNPROVISIONED:
            return None
        platforms.update(
            RuntimePlatform(entry.arch_info.architecture, entry.os_info.os, entry.arch_info.variant)
            for entry in node.runtimes
        )
    return platforms or None


def _roots(ca_file: Path) -> Sequence[x509.Certificate]:
    from aoscore.common.certs import load_certificates

    return load_certificates(read_roots(ca_file), what=str(ca_file))


def _link(
    config: Config,
    system_id: str,
    iam: IamPublicClient,
    database: Database,
    notes: CertificateNotes,
    worker: Worker,
    alert: Alert,
) -> CloudLink:
    return CloudLink(
        system_id,
        LinkSettings(
            discovery_url=config.service_discovery_url,
            override_discovery_url=config.override_service_discovery_url,
            response_timeout_s=config.cloud_response_wait_timeout,
            ping_period_s=config.cloud_ping_period,
        ),
        Identities(iam, config.ca_cert),
        worker,
        outbox=Outbox(database),
        inbox=Inbox(database),
        notes=notes,
        message_log=MessageLog(config.cloud_message_log) if config.cloud_message_log else None,
        unreadable=lambda error: alert(str(error)),
    )


class DownloadTls:
    """TLS to the servers that blobs come from: whom we trust, and the certificate that we show, if any."""

    def __init__(self, settings: ImageManagerConfig, iam: IamPublicClient, worker: Worker) -> None:
        ca_file = settings.download_ca_cert
        self._roots = TlsRoots(ca_file) if ca_file is not None else None
        self._cert_type = settings.download_cert_storage
        self._iam = iam
        self._worker = worker
        self.trust = self._roots.ssl_client_context() if self._roots is not None else None
        """Without our certificate; None: the system's root CAs."""

    async def context(self) -> ssl.SSLContext | None:
        """The present one: our certificate is renewed now and then. Raises AosError when IAM gives none."""
        if self._roots is None or not self._cert_type:
            return self.trust
        identity = TlsIdentity.of(self._roots.ca_file, await self._iam.get_cert(self._cert_type))
        return await self._worker.run(identity.ssl_client_context)


async def _images(
    config: Config,
    database: Database,
    link: CloudLink,
    nodes: NodeInfoProvider,
    alerts: Alerts,
    worker: Worker,
    tls: DownloadTls,
) -> ImageManager:
    settings = config.image_manager
    blobs = await worker.run(BlobStore, settings.install_path)

    async def evict(directory: Path, needed_bytes: int) -> None:
        await manager.evict(directory, needed_bytes)

    fetcher = Fetcher(
        blobs,
        FetchSettings(
            download_dir=settings.download_path / "blobs" / "sha256",
            unpack_dir=settings.install_path / "tmp",
            require_signature=settings.require_signature,
            parallel=settings.parallel_downloads,
            give_up_s=settings.download_give_up_time,
        ),
        urls=BlobUrlSource(link),
        downloader=Downloader(
            worker,
            tls=tls.context,
            speed_limit=SpeedLimit(settings.download_speed_limit) if settings.download_speed_limit else None,
        ),
        space=Space(evict),
        worker=worker,
        alert=alerts.add,
    )
    manager = ImageManager(
        ImageManagerSettings(item_ttl_s=settings.update_item_ttl, check_period_s=settings.remove_outdated_period),
        ItemStore(database),
        blobs,
        fetcher,
        worker,
        roots=partial(_roots, config.ca_cert),
        runtimes=lambda: None if settings.all_platforms else _runtime_platforms(nodes),
    )
    return manager


async def build(config: Config, options: argparse.Namespace, stack: contextlib.AsyncExitStack) -> Sequence[Service]:
    """Make every object; the services in start order."""
    stack.enter_context(DirectoryLock(config.working_dir))
    worker = await stack.enter_async_context(Worker("cm", threads=WORKER_THREADS))
    database = await stack.enter_async_context(open_database(config))
    await warn_beyond_9_1(database)
    iam = await stack.enter_async_context(IamPublicClient(config.iam_public_server_url, config.ca_cert))
    keeper = CertificateKeeper(iam, config.cert_storage, config.ca_cert)
    protected_iam = await stack.enter_async_context(IamClient(config.iam_protected_server_url, lambda: keeper.identity))

    system_id = await _system_id(iam)
    notes = CertificateNotes(database)
    await notes.load()
    link = _link(config, system_id, iam, database, notes, worker, alert=lambda text: alerts.add_core_alert(text))
    nodes = NodeInfoProvider(iam, sm_timeout_s=config.node_info_provider.sm_connection_timeout)
    subjects = UnitSubjects(iam)
    alerts = Alerts(
        link, AlertStore(database), send_period_s=config.alerts.send_period, main_node_id=nodes.main_node_id
    )
    is_lost = database.recovered is not None
    if database.recovered is not None:
        alerts.add_core_alert(f"database was damaged, or others may write it; the old one is {database.recovered.name}")
    storage = StorageState(
        StateStore(database),
        link,
        storage_dir=config.storage_dir,
        state_dir=config.state_dir,
        alert=alerts.add_core_alert,
    )
    download_tls = DownloadTls(config.image_manager, iam, worker)
    images = await _images(config, database, link, nodes, alerts, worker, download_tls)
    file_server = BlobServer(
        config.file_server_url,
        images.blob_path,
        is_node=lambda ip: controller.is_node(ip),
        listen_at=config.file_server_addresses,
    )
    dns = DnsServer(
        DnsSettings(
            ip=config.dns_ip,
            storage_path=config.dns_storage_path,
            pid_file=config.dns_pid_file,
            program=config.dns_program,
        )
    )
    networks = NetworkManager(NetworkStore(database), dns, routes=read_routes, pools=config.network_pools)
    await networks.load()

    def on_sm_lost(node_id: str) -> None:
        nodes.on_sm_lost(node_id)
        launcher.on_sm_lost(node_id)

    def on_node_alert(node_id: str, alert: NodeAlert) -> None:
        alerts.on_node_alert(node_id, alert)
        launcher.on_node_alert(node_id, alert)

    admission = SmAdmission(
        database, notes, system_id, main_keys=partial(_main_keys, iam, worker), alert=alerts.add_core_alert
    )
    await admission.load()

    def server_tls() -> ServerTls:
        return grpc_server_credentials(lambda: keeper.identity)

    controller = SmController(
        config.cm_server_url,
        server_tls,
        cloud=link,
        networks=networks,
        blob_url=file_server.url,
        # What SMs tell, to whom it goes; later objects by lambda.
        receivers=Receivers(
            sm_info=nodes.on_sm_info,
            sm_lost=on_sm_lost,
            node_statuses=lambda node_id, statuses: launcher.on_node_statuses(node_id, statuses),
            statuses=lambda node_id, statuses: launcher.on_statuses(node_id, statuses),
            monitoring=lambda node_id, sample: monitoring.on_sample(node_id, sample),
            alert=on_node_alert,
            log=lambda node_id, part: logs.on_log(node_id, part),
        ),
        admit=admission.admit,
    )
    uploads = LogUploads(link, ssl_context=download_tls.trust)
    logs = LogForwarder(link, controller, uploads, node_ids=lambda: [node.node_id for node in nodes.nodes()])
    unit_config = UnitConfigManager(config.unit_config_file, nodes, controller)
    launcher = Launcher(
        LauncherStore(database),
        nodes,
        controller,
        images,
        storage,
        unit_config,
        subjects,
        link,
        settings=LauncherSettings(
            instance_ttl_s=config.launcher.instance_ttl,
            nodes_connection_timeout_s=config.launcher.nodes_connection_timeout,
            check_env_vars_period_s=config.launcher.check_override_env_vars_period,
        ),
        alert=alerts.add_core_alert,
        hold=is_lost,
    )
    monitoring = Monitoring(
        link,
        MonitoringStore(database),
        nodes=nodes.changed,
        instances=launcher.changed,
        send_period_s=config.monitoring.send_period,
        alert=alerts.add_core_alert,
    )
    reporter = StatusReporter(
        link,
        nodes=nodes,
        items=images,
        instances=launcher,
        unit_config=unit_config,
        subjects=subjects,
        quiet_s=config.unit_status_send_timeout,
    )
    rules = config.update_scheduler
    gate = UpdateGate(GateStore(database), {Kind.FOTA: rules.fota, Kind.SOTA: rules.sota})
    updates = UpdateManager(
        UpdateStore(database),
        UpdateSettings(
            activating_s=config.update_manager.activating_timeout,
            retry_pause_s=config.update_manager.retry_pause,
            placement_s=config.node_info_provider.sm_connection_timeout,
            max_remove_percent=config.update_manager.max_remove_percent,
            absent_means_keep=config.update_manager.absent_means_keep,
        ),
        images=images,
        launcher=launcher,
        unit_configs=unit_config,
        nodes=nodes,
        node_control=protected_iam,
        subjects=subjects,
        reporter=reporter,
        gate=gate,
        alert=alerts.add_core_alert,
        is_lost=is_lost,
    )
    scheduler = UpdateScheduler(gate, updates, images, unit_config)
    certificates = Certificates(
        protected_iam, link, main_node_id=nodes.main_node_id, is_provisioned=nodes.is_provisioned
    )

    # Messages of one topic are handled in their order.
    link.on_received(DesiredStatus, updates.on_desired_status)
    link.on(RequestLog, logs.on_request)
    link.on(OverrideEnvVars, launcher.override_env_vars, again=launcher.override_env_vars)
    verdict, set_state = storage.on_state_acceptance, storage.on_update_state
    link.on(StateAcceptance, verdict, topic="state", again=verdict)
    link.on(UpdateState, set_state, topic="state", again=set_state)
    renew, refuse_renewal = certificates.on_renew, certificates.on_interrupted_renewal
    link.on(RenewCertificatesNotification, renew, topic="certificates", again=refuse_renewal)
    link.on(IssuedUnitCertificates, certificates.on_issued, topic="certificates", again=certificates.on_issued)
    provision, interrupted = "provisioning", certificates.on_interrupted
    link.on(StartProvisioningRequest, certificates.on_start_provisioning, topic=provision, again=interrupted)
    link.on(FinishProvisioningRequest, certificates.on_finish_provisioning, topic=provision, again=interrupted)
    link.on(DeprovisioningRequest, certificates.on_deprovisioning, topic=provision, again=interrupted)

    return [
        keeper,
        file_server.server,
        storage,
        alerts,
        dns,
        nodes,
        subjects,
        unit_config,
        images,
        launcher,
        monitoring,
        uploads,
        controller,
        reporter,
        updates,
        *([Server(rules.server_url, server_tls, [scheduler.register])] if rules.server_url else []),
        link,
    ]


def reset(config: Config, options: argparse.Namespace) -> int | None:
    """With --reset: removes everything CM keeps - database, images, storages, states, unit config - and ends.

    A CM that runs is stopped first.
    """
    if not options.reset:
        return None
    with DirectoryLock.after_stop(config.working_dir, STOP_TIMEOUT_S):
        for path in (
            *files_of(config.database_file),
            config.image_manager.install_path,
            config.image_manager.download_path,
            config.unit_config_file,
        ):
            remove_tree(path)
        # The directories themselves may be mount points.
        for directory in (config.storage_dir, config.state_dir):
            for path in directory.iterdir() if directory.is_dir() else ():
                remove_tree(path)
    _log.info(kv("Everything that CM kept is removed", workingDir=config.working_dir))
    return EXIT_OK


PROGRAM = Program(
    name="aos_communicationmanager",
    title="CM",
    default_config="aos_cm.cfg",
    load=configuration.load,
    build=build,
    options=(Option("reset", "r", "remove everything CM keeps, and end"),),
    before=reset,
)


def main() -> None:
    """Entry point of the program aos_communicationmanager."""
    leave(run_daemon(PROGRAM))


if __name__ == "__main__":
    main()
