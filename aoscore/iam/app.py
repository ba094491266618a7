"""The IAM process: its command line and its composition root."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from cryptography import x509

from aoscore.common.aio import Service, Worker
from aoscore.common.certs import load_certificates
from aoscore.common.config import load_section
from aoscore.common.daemon import Option, Program, run_daemon
from aoscore.common.errors import AosError, ConfigError, FailedError
from aoscore.common.files import DirectoryLock
from aoscore.common.pkcs11.token import Token
from aoscore.common.rpc import Server
from aoscore.common.tls import ServerTls, TlsIdentity, grpc_server_credentials
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
from aoscore.iam.iamserver.nodes import LocalNode, NodeRouter
from aoscore.iam.iamserver.services import Parts, protected_services, public_services
from aoscore.iam.identhandler.fileidentifier import FileIdentifier, FileIdentifierParams
from aoscore.iam.nodemanager import NodeManager
from aoscore.iam.permissions import Permissions
from aoscore.iam.provisioning import Provisioning

_log = logging.getLogger(__name__)


StoreParams = FileStoreParams | TokenStoreParams

# A key storage that hangs must not hold up the others, and nothing else waits for them.
_CERT_THREADS = 4


class Settings(msgspec.Struct, frozen=True):
    """The configuration with the sections of its plug-ins, all checked."""

    config: Config
    identifier: FileIdentifierParams | None
    stores: dict[str, StoreParams]


def load(path: Path) -> Settings:
    """Read the configuration. Raises NotFoundError without the file, else ConfigError naming file and key."""
    config = configuration.load(path)
    stores = {}
    for index, module in enumerate(config.cert_modules):
        if not module.disabled:
            stores[module.id] = _load_store(path, f"certModules[{index}]", module)
    return Settings(config, _load_identifier(path, config), stores)


def _load_identifier(path: Path, config: Config) -> FileIdentifierParams | None:
    section = config.identifier
    match section.plugin:
        case "" | "none":
            return None
        case "fileidentifier":
            return load_section(section.params, FileIdentifierParams, path=path, where="identifier.params")
        case "visidentifier":
            raise ConfigError(f"{path}: identifier.plugin: visidentifier is not supported yet")
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
    database = await stack.enter_async_context(IamDatabase(config.working_dir, _pin_files(settings)))

    state = StateStore(config.node_info.provisioning_state_path, database, worker)
    node = await CurrentNode.load(config.node_info, state, worker)
    nodes = NodeManager(await database.nodes(), node.info)
    node.on_change(nodes.update)
    identifier = FileIdentifier(settings.identifier, worker) if settings.identifier else None

    certs = await _certificates(settings, database, stack)
    permissions = None
    if config.enable_permissions_handler:
        permissions = Permissions(config.runtime_dir, worker)
        await permissions.load()
    provisioning = Provisioning(config, node, certs)
    router = NodeRouter(node, LocalNode(provisioning, certs, identifier))
    parts = Parts(node, nodes, certs, identifier, permissions, router)

    secure = _is_secure(options.provisioning, node.info.state)
    public_tls = _credentials(config, certs, require_client=False) if secure else None
    protected_tls = _credentials(config, certs, require_client=True) if secure else None
    return [
        *([identifier] if identifier else []),
        certs,
        Server(config.iam_public_server_url, public_tls, public_services(parts)),
        Server(config.iam_protected_server_url, protected_tls, protected_services(parts)),
    ]


def _is_secure(provisioning: bool, state: NodeState) -> bool:
    """Whether the servers use TLS. A Node in service never answers in plain text, whatever the command line says."""
    if not provisioning:
        return True
    if state is NodeState.UNPROVISIONED:
        return False
    _log.warning("Provisioning mode was asked for, but the Node is %s: going on in normal mode", state)
    return True


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


def _root_reader(ca_file: Path | None) -> Callable[[], Sequence[x509.Certificate]]:
    """The roots of the Unit, read when they are needed: a new Unit may get the file later."""

    def read() -> Sequence[x509.Certificate]:
        if ca_file is None or not ca_file.exists():
            return []
        return load_certificates(ca_file.read_bytes(), what=str(ca_file))

    return read


def _credentials(config: Config, certs: CertHandler, *, require_client: bool) -> Callable[[], ServerTls]:
    """TLS of a server, always with the newest certificate of the configured type."""
    ca_file = config.ca_cert
    if ca_file is None:
        raise ConfigError("caCert is needed in normal mode")

    def identity() -> TlsIdentity:
        return TlsIdentity.of(ca_file, certs.get_cert(config.cert_storage))

    def credentials() -> ServerTls:
        try:
            return grpc_server_credentials(identity, require_client=require_client)
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
    sys.exit(run_daemon(PROGRAM))
