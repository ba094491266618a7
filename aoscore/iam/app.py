"""The IAM process: its command line and its composition root."""

import argparse
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from aoscore.common.aio import Service, Worker
from aoscore.common.config import load_section
from aoscore.common.daemon import Option, Program, leave, run_daemon
from aoscore.common.errors import AosError, ConfigError, FailedError, NotFoundError
from aoscore.common.files import DirectoryLock
from aoscore.common.pkcs11.token import Token
from aoscore.common.rpc import Server
from aoscore.common.tls import ServerTls, TlsIdentity, TlsRoots, grpc_server_credentials
from aoscore.common.types import NodeState
from aoscore.iam import config as configuration
from aoscore.iam.certhandler.filestore import FileKeyStore, FileStoreParams
from aoscore.iam.certhandler.handler import CertHandler
from aoscore.iam.certhandler.keystore import KeyStore
from aoscore.iam.certhandler.module import CertModule
from aoscore.iam.certhandler.pending import PendingKeys
from aoscore.iam.certhandler.tokenstore import SharedToken, TokenKeyStore, TokenStoreParams, login_type
from aoscore.iam.config import CertModuleConfig, Config
from aoscore.iam.currentnode.node import CurrentNode
from aoscore.iam.currentnode.state import StateStore
from aoscore.iam.database import IamDatabase
from aoscore.iam.iamclient.client import MainIamClient, Way
from aoscore.iam.iamserver.access import AccessList
from aoscore.iam.iamserver.admission import Evidence
from aoscore.iam.iamserver.nodecontroller import NodeController
from aoscore.iam.iamserver.nodes import LocalNode, NodeRouter, RemoteNode, system_id
from aoscore.iam.iamserver.openports import LimitedService, address_at
from aoscore.iam.iamserver.peer import Peer
from aoscore.iam.iamserver.services import PUBLIC_LIMITS, Parts, protected_services, public_services
from aoscore.iam.identhandler.fileidentifier import FileIdentifier, FileIdentifierParams
from aoscore.iam.identhandler.identifier import Identifier
from aoscore.iam.nodekeys import NodeKeys
from aoscore.iam.nodemanager import NodeManager
from aoscore.iam.permissions import Permissions
from aoscore.iam.provisioning import Provisioning

if TYPE_CHECKING:
    from cryptography import x509

    from aoscore.iam.identhandler.visidentifier import VisIdentifierParams

_log = logging.getLogger(__name__)


StoreParams = FileStoreParams | TokenStoreParams

# A key storage that hangs must not hold up the others, and nothing else waits for them.
_CERT_THREADS = 4


class Settings(msgspec.Struct, frozen=True):
    """The configuration with the sections of its plug-ins, all checked."""

    config: Config
    identifier: "FileIdentifierParams | VisIdentifierParams | None"
    stores: dict[str, StoreParams]


def load(path: Path) -> Settings:
    """Read the configuration. Raises NotFoundError without the file, else ConfigError naming file and key."""
    config = configuration.load(path)
    stores = {}
    for index, module in enumerate(config.cert_modules):
        if not module.disabled:
            stores[module.id] = _load_store(path, f"certModules[{index}]", module)
    return Settings(config, _load_identifier(path, config), stores)


def _load_identifier(path: Path, config: Config) -> "FileIdentifierParams | VisIdentifierParams | None":
    section = config.identifier
    match section.plugin:
        case "" | "none":
            return None
        case "fileidentifier":
            return load_section(section.params, FileIdentifierParams, path=path, where="identifier.params")
        case "visidentifier":
            from aoscore.iam.identhandler.visidentifier import VisIdentifierParams

            params = load_section(section.params, VisIdentifierParams, path=path, where="identifier.params")
            if not params.vis_server.startswith(("wss://", "ws://")):
                raise ConfigError(f"{path}: identifier.params.visServer: {params.vis_server!r} is no wss: address")
            return params
        case _:
            raise ConfigError(f"{path}: identifier.plugin: {section.plugin!r} is unknown")


def _load_store(path: Path, where: str, module: CertModuleConfig) -> StoreParams:
    match module.plugin:
        case "swmodule":
            params = load_section(module.params, FileStoreParams, path=path, where=f"{where}.params")
            if not params.storage_path.is_absolute():
                # Peers get the path in URLs, and they work in other directories.
                raise ConfigError(f"{path}: {where}.params.storagePath: {params.storage_path} is not absolute")
            return params
        case "pkcs11module":
            token = load_section(module.params, TokenStoreParams, path=path, where=f"{where}.params")
            try:
                token.place(login_type())
            except ConfigError as error:
                raise ConfigError(f"{path}: {where}.params.{error}") from error
            return token
        case _:
            raise ConfigError(f"{path}: {where}.plugin: {module.plugin!r} is unknown")


async def build(settings: Settings, options: argparse.Namespace, stack: contextlib.AsyncExitStack) -> Sequence[Service]:
    """Make every object; the services in start order."""
    config = settings.config
    stack.enter_context(DirectoryLock(config.working_dir))
    worker = await stack.enter_async_context(Worker("iam"))
    database = await stack.enter_async_context(
        IamDatabase(config.working_dir, _pin_files(settings), merged=config.migration.merged_migration_path)
    )

    state = StateStore(config.node_info.provisioning_state_path, database, worker)
    node = await CurrentNode.load(config.node_info, state, worker)
    identifier = _identifier(settings, worker)

    certs = await _certificates(settings, database, stack)
    permissions = None
    if config.enable_permissions_handler:
        permissions = Permissions(config.runtime_dir, worker)
        await permissions.load()
    provisioning = Provisioning(config, node, certs, database)
    await provisioning.recover()
    local = LocalNode(provisioning, certs, identifier)

    nodes = NodeManager(database, node.info, stale_s=config.stale_node_timeout)
    await nodes.load()
    node.on_change(nodes.update_current)
    keys = NodeKeys(database)
    await keys.load()
    controller = NodeController(
        nodes,
        keys,
        node.info.node_id,
        evidence=_evidence(config, certs, keys, identifier),
        learn_keys=config.learn_node_keys,
    )

    def remote(node_id: str, remaining_s: float | None) -> RemoteNode:
        return RemoteNode(node_id, remaining_s, nodes=nodes, keys=keys, controller=controller, identifier=identifier)

    router = NodeRouter(node, local, remote)
    secure = _is_secure(options.provisioning, node.info.state)
    # Before there are certificates nobody can show one.
    access = AccessList(config.access if secure else {}, certs.type_of)
    parts = Parts(node, nodes, certs, identifier, permissions, router, controller, access)
    public_tls = _credentials(config, certs, require_client=False) if secure else None
    protected_tls = _credentials(config, certs, require_client=True) if secure else None
    protected_url = config.iam_protected_server_url
    if config.provisioning_interface and not secure:
        protected_url = address_at(protected_url, config.provisioning_interface)
    servers: list[Service] = [
        Server(config.iam_public_server_url, public_tls, public_services(parts), options=PUBLIC_LIMITS),
        Server(protected_url, protected_tls, protected_services(parts)),
    ]
    if config.provisioning_timeout and not secure:
        servers = [
            LimitedService(server, config.provisioning_timeout, partial(_last_use_s, provisioning, router))
            for server in servers
        ]
    return [
        *([identifier] if identifier else []),
        certs,
        nodes,
        *servers,
        *([_main_iam_client(config, node, local, certs, secure=secure)] if config.has_main_iam else []),
    ]


def _last_use_s(provisioning: Provisioning, router: NodeRouter) -> float:
    """When somebody has provisioned this Node or another one last, on the monotonic clock."""
    return time.monotonic() if provisioning.busy else router.last_use_s


def _identifier(settings: Settings, worker: Worker) -> Identifier | None:
    params = settings.identifier
    if params is None:
        return None
    if isinstance(params, FileIdentifierParams):
        return FileIdentifier(params, worker)
    # Imported on use: few Units have a VIS server.
    from aoscore.iam.identhandler.visidentifier import VisIdentifier

    return VisIdentifier(params, settings.config.working_dir, worker)


def _is_secure(provisioning: bool, state: NodeState) -> bool:
    """Whether the servers use TLS. A Node in service never answers in plain text, whatever the command line says."""
    if not provisioning:
        return True
    if state is NodeState.UNPROVISIONED:
        return False
    _log.warning("Provisioning mode was asked for, but the Node is %s: going on in normal mode", state)
    return True


def _evidence(
    config: Config, certs: CertHandler, keys: NodeKeys, identifier: Identifier | None
) -> Callable[[Peer], Awaitable[Evidence]]:
    """What the certificate of a client on the protected port is worth."""

    def is_own(peer: Peer) -> bool:
        try:
            certs.get_cert(config.cert_storage, peer.issuer, peer.serial)
        except NotFoundError:
            return False
        return True

    async def names_unit(peer: Peer) -> bool:
        try:
            return await system_id(identifier) in peer.names
        except AosError:
            return False

    async def evidence(peer: Peer) -> Evidence:
        if not peer.key:
            return Evidence()
        local, owner = is_own(peer), keys.owner(peer.key)
        # Asked for keys of nobody only: an identity that is not known yet must not hold up those of known Nodes.
        same_unit = not local and owner is None and await names_unit(peer)
        return Evidence(present=True, local=local, owner=owner, same_unit=same_unit)

    return evidence


def _main_iam_client(
    config: Config, node: CurrentNode, local: LocalNode, certs: CertHandler, *, secure: bool
) -> MainIamClient:
    """The link of a Secondary Node to its Main Node."""
    ca_file = config.ca_cert
    renewals = None
    if secure:
        if ca_file is None:
            raise ConfigError("caCert is needed in normal mode")
        identity = partial(_identity, config, ca_file, certs)
        ways = [Way(config.main_iam_protected_server_url, identity)]
        renewals = partial(certs.changes_of, config.cert_storage)
    else:
        ways = [Way(config.main_iam_public_server_url, None)]
        if ca_file is not None:
            roots = TlsRoots(ca_file)
            ways.append(Way(config.main_iam_public_server_url, lambda: roots))
    return MainIamClient(ways, node, local, renewals=renewals, pause_s=config.node_reconnect_interval)


def _identity(config: Config, ca_file: Path, certs: CertHandler) -> TlsIdentity:
    """Certificate and key of this Node, the newest ones."""
    return TlsIdentity.of(ca_file, certs.get_cert(config.cert_storage))


async def _certificates(settings: Settings, database: IamDatabase, stack: contextlib.AsyncExitStack) -> CertHandler:
    config = settings.config
    worker = await stack.enter_async_context(Worker("keys", threads=_CERT_THREADS))
    pending = PendingKeys(config.working_dir)
    await worker.run(pending.load)
    roots = _root_reader(config.ca_cert)
    stores = _stores(settings)
    certs = CertHandler(
        [CertModule(module, stores[module.id], database, worker, pending, roots) for module in config.enabled_modules]
    )
    await certs.load()
    return certs


def _pin_files(settings: Settings) -> list[Path]:
    params = [store for store in settings.stores.values() if isinstance(store, TokenStoreParams)]
    return sorted({store.user_pin_path for store in params if store.user_pin_path is not None})


def _stores(settings: Settings) -> dict[str, KeyStore]:
    """The key storage of each type. Types whose parameters name one token share it."""
    users_log_in = login_type()
    tokens: dict[object, SharedToken] = {}
    stores: dict[str, KeyStore] = {}
    for cert_type, params in settings.stores.items():
        if isinstance(params, FileStoreParams):
            stores[cert_type] = FileKeyStore(params, cert_type)
            continue
        place = params.place(users_log_in)
        token = tokens.setdefault((params.library, place), SharedToken(Token(params.library, place)))
        stores[cert_type] = TokenKeyStore(params, cert_type, token, users_log_in)
    return stores


def _root_reader(ca_file: Path | None) -> "Callable[[], Sequence[x509.Certificate]]":
    """The roots of the Unit, read when they are needed: a new Unit may get the file later."""

    def read() -> "Sequence[x509.Certificate]":
        from aoscore.common.certs import load_certificates

        if ca_file is None or not ca_file.exists():
            return []
        return load_certificates(ca_file.read_bytes(), what=str(ca_file))

    return read


def _credentials(config: Config, certs: CertHandler, *, require_client: bool) -> Callable[[], ServerTls]:
    """TLS of a server, always with the newest certificate of the configured type."""
    ca_file = config.ca_cert
    if ca_file is None:
        raise ConfigError("caCert is needed in normal mode")

    def credentials() -> ServerTls:
        try:
            return grpc_server_credentials(partial(_identity, config, ca_file, certs), require_client=require_client)
        except AosError as error:
            raise FailedError(f"can't serve with certificate type {config.cert_storage!r}: {error}") from error

    return credentials


PROGRAM = Program(
    name="aos_iamanager",
    title="IAM",
    default_config="aos_iamanager.cfg",
    load=load,
    build=build,
    options=(Option("provisioning", "p", "provisioning mode: plain text, for a Node that has no certificates yet"),),
)


def main() -> None:
    """Entry point of the program aos_iamanager."""
    leave(run_daemon(PROGRAM))
