"""The MP process: its command line and its composition root."""

import argparse
import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from aoscore.common.aio import Backoff, Broadcast, Service, Worker
from aoscore.common.daemon import EXIT_OK, Option, Program, leave, run_daemon
from aoscore.common.download import Downloader
from aoscore.common.errors import ConfigError
from aoscore.common.files import DirectoryLock
from aoscore.common.iamclient import IamPublicClient
from aoscore.common.memory import expect_much_through_few_objects
from aoscore.common.rpc import LazyChannel, Server
from aoscore.common.tls import TlsIdentity, TlsRoots, grpc_server_credentials
from aoscore.mp.clock import ClockSync
from aoscore.mp.cmclient.registration import sm_relay
from aoscore.mp.communication import vchans
from aoscore.mp.communication.connection import LinkSettings
from aoscore.mp.communication.connector import FIRST_PAUSE_S, Connector, Handler
from aoscore.mp.communication.relay import ServerRelay
from aoscore.mp.communication.sockets import Listener, connected
from aoscore.mp.config import Config, PeerConfig, load
from aoscore.mp.gateway import Gateway, NodeIds
from aoscore.mp.iamclient.certificates import Certificate
from aoscore.mp.iamclient.registration import CURRENT, LEGACY, Interface, open_iam_relay, secure_iam_relay
from aoscore.mp.legacy import LegacyGateway, LegacyImages, LegacySm
from aoscore.mp.logprovider.archive import LogArchiver
from aoscore.mp.node import Node
from aoscore.mp.nodeserver.blobs import Blobs, BlobServer
from aoscore.mp.nodeserver.calls import CallClient
from aoscore.mp.nodeserver.downloads import DownloadClient
from aoscore.mp.nodeserver.link import NodeLink
from aoscore.mp.nodeserver.services import cm_services, node_services
from aoscore.mp.nodeserver.smmessages import SmMessages
from aoscore.mp.nodeserver.store import NodeStore
from aoscore.mp.status import Status, ask

_XENSTORE_THREADS = 4
# Where mp.cfg does not say it (mp.md §12).
_RETRY_S, _MAX_RETRY_S = 1.0, 5.0
_MAX_DOWNLOADS = 4

Renewals = Sequence[tuple[Broadcast[TlsIdentity], Sequence[int]]]


class Deferred:
    """A service that begins after an event; it counts as started before that."""

    def __init__(self, event: asyncio.Event, service: Service) -> None:
        self._event = event
        self._service = service

    async def run(self, started: Callable[[], None]) -> None:
        """Wait for the event, then run the service."""
        started()
        await self._event.wait()
        await self._service.run(lambda: None)


async def build(config: Config, options: argparse.Namespace, stack: contextlib.AsyncExitStack) -> Sequence[Service]:
    """Make every object; the services in start order."""
    stack.enter_context(DirectoryLock(config.working_dir))
    settings = LinkSettings(
        role=config.role,
        ports=config.ports,
        profile=config.profile,
        provisioning=options.provisioning,
        max_message_bytes=config.limits.max_message_size,
        channel_buffer_bytes=config.limits.channel_buffer,
    )
    if config.role == "gateway":
        return await _build_gateway(config, settings, stack)
    return await _build_node(config, settings, stack)


async def _build_gateway(config: Config, settings: LinkSettings, stack: contextlib.AsyncExitStack) -> Sequence[Service]:
    ca_file, iam, cm = _ca_file(config), config.iam_config, config.cm_config
    ids, status = NodeIds(), Status(config.working_dir)
    address = iam.iam_main_public_server_url
    if settings.provisioning:
        # The main IAM is in provisioning mode as well, or has just left it.
        ways = [lambda: None, lambda: TlsRoots(ca_file)]
        relay, older = (open_iam_relay(iam.open_port, address, ways, interface) for interface in (CURRENT, LEGACY))
        legacy = LegacyGateway(cm.open_port, [older])
        gateway = Gateway(settings, {}, ids, relays=[relay], cm=None, legacy=legacy, status=status)
        return [status, *await _links(config, gateway.serve, stack)]

    channels = config.ports.certificates(iam=config.vchan.iam_cert_storage, sm=config.vchan.sm_cert_storage)
    certificates = await _certificates(config, {config.cert_storage, iam.cert_storage, *channels.values()}, stack)
    towards_iam, towards_cm = certificates[iam.cert_storage], certificates[config.cert_storage]

    def iam_relays(interface: Interface) -> list[ServerRelay]:
        protected = iam.iam_main_protected_server_url
        return [
            open_iam_relay(iam.open_port, address, [lambda: TlsRoots(ca_file)], interface),
            secure_iam_relay(iam.secure_port, protected, lambda: towards_iam.identity, ids.claim, interface),
        ]

    images = await _legacy_images(config, stack)

    def legacy_sm() -> LegacySm:
        return LegacySm(
            cm.secure_port,
            cm.cm_server_url,
            lambda: towards_cm.identity,
            claim=ids.claim,
            images=images,
            archiver=_log_archiver(config),
        )

    gateway = Gateway(
        settings,
        {port: partial(_server_context, certificates[name]) for port, name in channels.items()},
        ids,
        relays=[
            *iam_relays(CURRENT),
            sm_relay(cm.secure_port, cm.cm_server_url, lambda: towards_cm.identity, ids.claim),
        ],
        cm=await stack.enter_async_context(LazyChannel(cm.cm_server_url, lambda: towards_cm.identity)),
        legacy=LegacyGateway(cm.open_port, iam_relays(LEGACY), legacy_sm),
        status=status,
        renewals=_renewals(certificates, channels),
    )
    return [status, *certificates.values(), *await _links(config, gateway.serve, stack)]


async def _legacy_images(config: Config, stack: contextlib.AsyncExitStack) -> LegacyImages:
    """What fetches and unpacks images for peers of the older kind."""
    settings = config.downloader
    first_s, limit_s = settings.retry_delay or _RETRY_S, settings.max_retry_delay or _MAX_RETRY_S
    worker = await stack.enter_async_context(Worker("images", 2))
    images = LegacyImages(
        settings.download_dir or config.working_dir / "downloads",
        config.images_dir,
        worker,
        Downloader(worker, backoff=lambda: Backoff(first_s, max(first_s, limit_s))),
        min_free_bytes=config.images.min_free_space,
        parallel=settings.max_concurrent_downloads or _MAX_DOWNLOADS,
    )
    await worker.run(images.begin)
    return images


async def _build_node(config: Config, settings: LinkSettings, stack: contextlib.AsyncExitStack) -> Sequence[Service]:
    iam, node = config.iam_config, config.node
    channels = config.ports.certificates(iam=iam.cert_storage, sm=config.cert_storage)
    link = NodeLink(channels)
    clock, status = ClockSync(node.clock_sync, link, config.cm_config.open_port), Status(config.working_dir)
    open_nodes = node_services(link, iam.open_port)
    if settings.provisioning:
        end = Node(settings, {}, link, clock, (), status)
        public = Server(node.iam_public_proxy_url, None, open_nodes)
        return [status, public, *await _links(config, end.serve, stack)]

    certificates = await _certificates(config, set(channels.values()), stack)
    calls, downloads = CallClient(link), DownloadClient(link)
    worker = await stack.enter_async_context(Worker("blobs", 2))
    images = config.images
    store = await worker.run(
        partial(
            NodeStore,
            config.images_dir,
            ttl_s=images.ttl_s,
            min_free_bytes=images.min_free_space,
            max_size_bytes=images.max_size,
        )
    )
    unpacker = await stack.enter_async_context(Worker("unpack")) if node.prefetch else None
    blobs = Blobs(store, worker, calls, downloads, clean_period_s=images.ttl_s / 4, unpacker=unpacker)
    blob_server = BlobServer(node.blob_server_url, blobs)
    end = Node(
        settings,
        {port: partial(_client_context, certificates[name]) for port, name in channels.items()},
        link,
        clock,
        (calls, downloads),
        status,
        _renewals(certificates, channels),
    )
    # Of a Secondary Node's certificates only that of IAM is one for servers.
    own = certificates[iam.cert_storage]
    checked = partial(grpc_server_credentials, lambda: own.identity)
    unchecked = partial(grpc_server_credentials, lambda: own.identity, require_client=False)
    messages = SmMessages(link, partial(_log_archiver, config))
    servers = [
        Server(node.cm_proxy_url, checked, cm_services(link, config.ports, calls, blob_server.url, messages)),
        Server(node.iam_protected_proxy_url, checked, node_services(link, iam.secure_port)),
        Server(node.iam_public_proxy_url, unchecked, open_nodes),
    ]
    return [
        status,
        *certificates.values(),
        blobs,
        blob_server,
        *(Deferred(own.known, server) for server in servers),
        *await _links(config, end.serve, stack),
    ]


async def _links(config: Config, handler: Handler, stack: contextlib.AsyncExitStack) -> Sequence[Service]:
    """Where links come from: TCP, or the vchans of each peer."""
    transport = config.transport
    if transport.type == "vchan" or (transport.type == "auto" and config.peers and vchans.is_there()):
        worker = await stack.enter_async_context(Worker("xenstore", min(len(config.peers), _XENSTORE_THREADS)))
        return [_vchan_link(config, peer, worker, handler) for peer in config.peers]
    if config.role == "gateway":
        return [Listener(transport.listen, handler)]
    return [Connector(transport.connect, partial(connected, transport.connect), handler)]


def _vchan_link(config: Config, one: PeerConfig, worker: Worker, handler: Handler) -> Connector:
    peer = vchans.Peer(one.domain, one.xs_rx_path, one.xs_tx_path, one.ring_size)
    link = vchans.VchanLink(config.role, peer, worker)
    # A gateway waits in any case: its node must find new vchans soon, whatever became of the link before.
    backoff = Backoff(FIRST_PAUSE_S, FIRST_PAUSE_S) if config.role == "gateway" else None
    return Connector(peer.label, link.connected, handler, backoff=backoff)


def _log_archiver(config: Config) -> LogArchiver:
    return LogArchiver(config.log_provider.max_part_size, config.log_provider.max_part_count)


def _ca_file(config: Config) -> Path:
    if config.ca_cert is None:
        raise ConfigError("'caCert' is needed")
    return config.ca_cert


async def _certificates(
    config: Config, types: Iterable[str], stack: contextlib.AsyncExitStack
) -> dict[str, Certificate]:
    ca_file = _ca_file(config)
    iam = await stack.enter_async_context(IamPublicClient(config.iam_config.iam_public_server_url, ca_file))
    return {name: Certificate(iam, name, ca_file) for name in sorted(types)}


def _renewals(certificates: dict[str, Certificate], channels: dict[int, str]) -> Renewals:
    return [
        (certificate.changed, [port for port, used in channels.items() if used == name])
        for name, certificate in certificates.items()
    ]


def _server_context(certificate: Certificate) -> ssl.SSLContext:
    context = certificate.identity.ssl_server_context()
    # Session tickets would be records that a strict client does not expect (mp-wire §6).
    context.num_tickets = 0
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


def _client_context(certificate: Certificate) -> ssl.SSLContext:
    return certificate.identity.ssl_client_context(check_hostname=False)


def _print_status(config: Config, options: argparse.Namespace) -> int | None:
    if not options.status:
        return None
    print(ask(config.working_dir), end="")
    return EXIT_OK


PROGRAM = Program(
    name="aos_messageproxy",
    title="MP",
    default_config="/etc/aos/mp.cfg",
    load=load,
    build=build,
    options=(
        Option("provisioning", "p", "provisioning mode: no certificates yet"),
        Option("status", "s", "print what the running MP knows of its links, and exit"),
    ),
    before=_print_status,
)


def main() -> None:
    """Entry point of the program aos_messageproxy."""
    expect_much_through_few_objects()
    leave(run_daemon(PROGRAM))
