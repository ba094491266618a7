"""Configuration file of IAM (iam.md §2)."""

import ipaddress
import re
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from aoscore.common.config import Duration, load_config
from aoscore.common.errors import ConfigError

# A key of AosCore 9.1 files that has no meaning here: our migration scripts are part of the program.
_IGNORED = frozenset({"migration.migrationpath"})
# Services of the protected port that change something.
_GUARDED = ("IAMCertificateService", "IAMProvisioningService", "IAMNodesService", "IAMPermissionsService")
_MODULE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?)*")


class Section(msgspec.Struct, frozen=True, rename="camel"):
    """Base of all sections."""


class PartitionConfig(Section, frozen=True, kw_only=True):
    """A disk partition that the Node reports. `types` are its uses, such as storages or states."""

    name: str
    path: Path
    types: tuple[str, ...] = ()


class NodeInfoConfig(Section, frozen=True, kw_only=True):
    """What the Node says about itself. An absent value is found out from the system."""

    node_id_path: Path = Path("/etc/machine-id")
    node_name: str = ""
    node_type: str = ""
    max_dmips: int = 0
    provisioning_state_path: Path = Path("/var/aos/.provisionstate")
    cpu_info_path: Path = Path("/proc/cpuinfo")
    mem_info_path: Path = Path("/proc/meminfo")
    architecture: str | None = None
    architecture_variant: str | None = None
    os: str | None = None
    os_version: str | None = None
    attrs: dict[str, str] = {}
    partitions: tuple[PartitionConfig, ...] = ()


class MigrationConfig(Section, frozen=True, kw_only=True):
    """Where migration scripts are kept for the way back to another version."""

    merged_migration_path: Path | None = None


class IdentifierConfig(Section, frozen=True, kw_only=True):
    """Where the identity of the Unit comes from; `params` belong to the plug-in."""

    plugin: str = ""
    params: dict[str, Any] = {}


class Algorithm(StrEnum):
    """Kind of a key: EC P-384 or RSA 2048."""

    ECC = "ecc"
    RSA = "rsa"

    @classmethod
    def _missing_(cls, value: object) -> "Algorithm | None":
        return {"ecdsa": cls.ECC, "ecc": cls.ECC, "rsa": cls.RSA}.get(str(value).lower())


class KeyUsage(StrEnum):
    """Extended key usage of a certificate."""

    CLIENT_AUTH = "clientAuth"
    SERVER_AUTH = "serverAuth"


class CertModuleConfig(Section, frozen=True, kw_only=True):
    """One certificate type: `id` is its name, `max_items` the number of certificates kept.

    `alternative_names` (host names or IP addresses) go into the requests, so that peers can check the name of a
    server. `skip_validation` trusts the database instead of comparing it with the key storage at start.
    """

    id: str
    plugin: str = ""
    algorithm: Algorithm = Algorithm.ECC
    max_items: int = 0
    extended_key_usage: tuple[KeyUsage, ...] = ()
    alternative_names: tuple[str, ...] = ()
    disabled: bool = False
    skip_validation: bool = False
    self_signed: bool = False
    params: dict[str, Any] = {}


class Config(Section, frozen=True, kw_only=True):
    """All of it. Hooks are program and arguments; `hook_timeout` limits each run, seconds.

    `cert_storage` is the certificate type of our own servers. `runtime_dir` is for what must survive a restart of
    IAM but not a reboot, so it belongs on a tmpfs.

    A Secondary Node has the two `main_iam` addresses; `node_reconnect_interval` is its pause between attempts.
    On the Main Node, `stale_node_timeout` is after how long a Node that does not come back is forgotten (0: never),
    and `learn_node_keys` makes it accept keys that were made while another program ran in its place.

    In provisioning mode the protected port listens at `provisioning_interface` only, when that is given, and both
    ports close when nobody has provisioned for `provisioning_timeout` (0: never), until the next start.

    `access` are services of the protected port with the certificate types that may call them; a service that is not
    there is open to all of the Unit. With `hooks_get_password` hooks have the password of the call that runs them in
    the environment variable AOS_PROVISIONING_PASSWORD.
    """

    node_info: NodeInfoConfig
    working_dir: Path
    iam_public_server_url: str
    iam_protected_server_url: str
    cert_storage: str = ""
    ca_cert: Path | None = None
    main_iam_public_server_url: str = ""
    main_iam_protected_server_url: str = ""
    node_reconnect_interval: Duration = Duration(3)
    stale_node_timeout: Duration = Duration(30 * 24 * 3600)
    learn_node_keys: bool = False
    provisioning_interface: str = ""
    provisioning_timeout: Duration = Duration(0)
    runtime_dir: Path = Path("/run/aos/iam")
    enable_permissions_handler: bool = False
    start_provisioning_cmd_args: tuple[str, ...] = ()
    disk_encryption_cmd_args: tuple[str, ...] = ()
    finish_provisioning_cmd_args: tuple[str, ...] = ()
    deprovision_cmd_args: tuple[str, ...] = ()
    hook_timeout: Duration = Duration(600)
    hooks_get_password: bool = False
    access: dict[str, tuple[str, ...]] = {}
    migration: MigrationConfig = MigrationConfig()
    identifier: IdentifierConfig = IdentifierConfig()
    cert_modules: tuple[CertModuleConfig, ...] = ()

    @property
    def enabled_modules(self) -> tuple[CertModuleConfig, ...]:
        """Certificate modules that are not switched off."""
        return tuple(module for module in self.cert_modules if not module.disabled)

    @property
    def has_main_iam(self) -> bool:
        """Whether there is an IAM of a Main Node to register with."""
        return bool(self.main_iam_public_server_url and self.main_iam_protected_server_url)


def load(path: Path) -> Config:
    """Read and check the file. Raises NotFoundError without it, else ConfigError naming file and key."""
    config = load_config(path, Config, ignored=_IGNORED)
    for problem in _problems(config):
        raise ConfigError(f"{path}: {problem}")
    return config


def _problems(config: Config) -> list[str]:
    problems = []
    for key, value in (
        ("iamPublicServerUrl", config.iam_public_server_url),
        ("iamProtectedServerUrl", config.iam_protected_server_url),
    ):
        if not value:
            problems.append(f"{key} is empty")
    if bool(config.main_iam_public_server_url) != bool(config.main_iam_protected_server_url):
        problems.append("mainIamPublicServerUrl, mainIamProtectedServerUrl: give both or none")
    if config.has_main_iam and any(name.lower() == "mainnode" for name in config.node_info.attrs):
        problems.append("mainIamPublicServerUrl: the Main Node (nodeInfo.attrs.MainNode) registers with nobody")
    for key, seconds in (
        ("hookTimeout", config.hook_timeout),
        ("nodeReconnectInterval", config.node_reconnect_interval),
    ):
        if seconds <= 0:
            problems.append(f"{key} must be positive")
    seen: set[str] = set()
    for index, module in enumerate(config.cert_modules):
        if module.disabled:
            continue
        problems += [f"certModules[{index}].{problem}" for problem in _module_problems(module)]
        if module.id in seen:
            problems.append(f"certModules[{index}].id: type {module.id!r} is there twice")
        seen.add(module.id)
    for service, types in config.access.items():
        if service not in _GUARDED:
            problems.append(f"access: {service!r} is none of {', '.join(_GUARDED)}")
        problems += [f"access.{service}: {name!r} is no certificate type" for name in types if name not in seen]
    return problems


def _module_problems(module: CertModuleConfig) -> list[str]:
    problems = []
    if not _MODULE_ID.fullmatch(module.id):
        problems.append(f"id: {module.id!r} is no name of a certificate type")
    least = 1 if module.self_signed else 2
    if module.max_items < least:
        problems.append(
            f"maxItems: {module.max_items} is too few, the old certificate must stay until the new one works"
        )
    problems += [
        f"alternativeNames: {name!r} is no host name or IP address"
        for name in module.alternative_names
        if not _HOST_NAME.fullmatch(name) and not is_ip_address(name)
    ]
    return problems


def is_ip_address(name: str) -> bool:
    """Whether an alternative name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
