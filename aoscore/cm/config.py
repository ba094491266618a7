"""Configuration file of CM: `cm.cfg`, JSON (cm-cloud.md §1.2, cm-orchestration.md §1.2).

All keys of AosCore 9.1 are known, so that the file of a device can be taken over; keys of our own are marked.
"""

from pathlib import Path
from typing import Final

import msgspec

from aoscore.cm.networkmanager.pools import DEFAULT_POOLS, SubnetPool
from aoscore.cm.updatemanager.schedule import Rule, check
from aoscore.common.config import Duration, load_config
from aoscore.common.errors import ConfigError, InvalidArgumentError
from aoscore.common.rpc import plain_ip

_NOT_GIVEN: Final = Path("\0")
_MINUTE_S: Final = 60
_HOUR_S: Final = 60 * _MINUTE_S
_DAY_S: Final = 24 * _HOUR_S
_SLOWEST_LIMIT: Final = 4096
"""Bytes per second. Servers drop a client that reads slower than this."""

# Parsed by 9.1 and used by nobody in CM.
_IGNORED: Final = frozenset({"monitoring.pollperiod", "monitoring.averagewindow"})


class _Section(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of all parts of the file."""

    def _default(self, name: str, value: Path) -> None:
        """Gives a path that was not in the file its default, which depends on another key."""
        if getattr(self, name) == _NOT_GIVEN:
            msgspec.structs.force_setattr(self, name, value)


class MonitoringConfig(_Section, frozen=True, kw_only=True):
    """How often monitoring data goes to the cloud."""

    send_period: Duration = Duration(_MINUTE_S)


class AlertsConfig(_Section, frozen=True, kw_only=True):
    """How often alerts go to the cloud."""

    send_period: Duration = Duration(10)


class NodeInfoProviderConfig(_Section, frozen=True, kw_only=True):
    """How long a provisioned node may be without its SM before it counts as failed."""

    sm_connection_timeout: Duration = Duration(_MINUTE_S)


class ImageManagerConfig(_Section, frozen=True, kw_only=True):
    """Where blobs are and how they get there."""

    install_path: Path = _NOT_GIVEN
    download_path: Path = _NOT_GIVEN
    update_item_ttl: Duration = Duration(30 * _DAY_S)
    remove_outdated_period: Duration = Duration(_DAY_S)
    # Own keys.
    require_signature: bool = True
    """Refuse blobs that the cloud did not sign. Switch off for development only."""
    all_platforms: bool = False
    """Download the images of all platforms, not only those that a runtime of the Unit can use."""
    parallel_downloads: int = 4
    download_speed_limit: int = 0
    """Bytes per second that all downloads together may take; 0 = no limit."""
    download_give_up_time: Duration = Duration(_HOUR_S)
    """How long a download may make no progress before its item counts as failed."""
    download_ca_cert: Path | None = None
    """PEM with root CAs for the servers of downloads and of log uploads, in place of the system's."""
    download_cert_storage: str = ""
    """IAM type of the certificate that download servers want to see; needs downloadCaCert. Empty: none."""


class LauncherConfig(_Section, frozen=True, kw_only=True):
    """Times of the launcher."""

    nodes_connection_timeout: Duration = Duration(10 * _MINUTE_S)
    instance_ttl: Duration = Duration(30 * _DAY_S)
    check_override_env_vars_period: Duration = Duration(_MINUTE_S)


class UpdateManagerConfig(_Section, frozen=True, kw_only=True):
    """Own section: limits of an update run."""

    activating_timeout: Duration = Duration(10 * _MINUTE_S)
    """How long the instances of a new set may take to become active before the Unit goes back to the last good set."""
    retry_pause: Duration = Duration(_MINUTE_S)
    """When what an update left undone, as on a full disk, is tried again; the pauses grow to thirty times as long."""
    max_remove_percent: int = 100
    """A desired status that would remove more than this part of the installed items is refused; 100 = no limit."""
    absent_means_keep: bool = False
    """What a desired status without `items` or `instances` means: keep them instead of remove all (D17)."""


class UpdateSchedulerConfig(_Section, frozen=True, kw_only=True):
    """Own section: when updates may start. Without it they start at once, as in 9.1."""

    server_url: str = ""
    """Address of the gRPC interface for a scheduler outside of AosCore; empty: none."""
    fota: Rule = Rule()
    """Components."""
    sota: Rule = Rule()
    """Services, unit config, states of nodes."""


class MigrationConfig(_Section, frozen=True, kw_only=True):
    """Folders of the database scripts."""

    migration_path: Path = Path("/usr/share/aos/communicationmanager/migration")
    merged_migration_path: Path = _NOT_GIVEN


class Config(_Section, frozen=True, kw_only=True):
    """The whole file."""

    working_dir: Path
    ca_cert: Path
    cert_storage: str = "cm"
    """IAM certificate type for gRPC. 9.1's own default is a path and does not work."""
    iam_protected_server_url: str
    iam_public_server_url: str
    cm_server_url: str
    file_server_url: str
    service_discovery_url: str = ""
    override_service_discovery_url: str = ""
    cloud_message_log: Path | None = None
    cloud_response_wait_timeout: Duration = Duration(10)
    unit_status_send_timeout: Duration = Duration(10)
    storage_dir: Path = _NOT_GIVEN
    state_dir: Path = _NOT_GIVEN
    unit_config_file: Path = _NOT_GIVEN
    dns_ip: str = ""
    dns_storage_path: Path = Path("/var/aos/dns")
    dns_pid_file: Path = _NOT_GIVEN
    monitoring: MonitoringConfig = MonitoringConfig()
    alerts: AlertsConfig = AlertsConfig()
    node_info_provider: NodeInfoProviderConfig = NodeInfoProviderConfig()
    image_manager: ImageManagerConfig = ImageManagerConfig()
    launcher: LauncherConfig = LauncherConfig()
    update_manager: UpdateManagerConfig = UpdateManagerConfig()
    update_scheduler: UpdateSchedulerConfig = UpdateSchedulerConfig()
    migration: MigrationConfig = MigrationConfig()
    # Own keys.
    file_server_addresses: tuple[str, ...] = ()
    """IP addresses where nodes reach the file server, beside those that the name in fileServerUrl has on this machine.
    0.0.0.0: all. Empty: all, if that name is a loopback address here."""
    dns_program: str = ""
    """dnsmasq for CM to run; empty: it is a service of the system, told by signal about new names."""
    network_pools: tuple[str, ...] = DEFAULT_POOLS
    """Where the networks of instances are taken from, /16 each."""
    cloud_ping_period: Duration = Duration(8)
    """How often CM checks that the cloud link is alive; 0 = never."""

    def __post_init__(self) -> None:
        work = self.working_dir
        self._default("storage_dir", work / "storages")
        self._default("state_dir", work / "states")
        self._default("unit_config_file", work / "aos_unit.cfg")
        self._default("dns_pid_file", self.dns_storage_path / "pidfile")
        # Sections are frozen defaults shared between Configs, so they are replaced, not changed.
        images = self.image_manager
        paths = {
            name: work / folder
            for name, folder in (("install_path", "install"), ("download_path", "download"))
            if getattr(images, name) == _NOT_GIVEN
        }
        msgspec.structs.force_setattr(self, "image_manager", msgspec.structs.replace(images, **paths))
        if self.migration.merged_migration_path == _NOT_GIVEN:
            merged = msgspec.structs.replace(self.migration, merged_migration_path=work / "migration")
            msgspec.structs.force_setattr(self, "migration", merged)

    @property
    def database_file(self) -> Path:
        """The database, under the name AosCore 9.1 gives it."""
        return self.working_dir / "cm.db"


def load(path: Path) -> Config:
    """Reads and checks the configuration file.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: it cannot be used; the message names the file and the key.
    """
    config = load_config(path, Config, ignored=_IGNORED)
    for name, value, low, high in (
        ("imageManager.parallelDownloads", config.image_manager.parallel_downloads, 1, 16),
        ("updateManager.maxRemovePercent", config.update_manager.max_remove_percent, 0, 100),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{path}: {name} must be {low} to {high}, not {value}")
    speed_limit = config.image_manager.download_speed_limit
    if speed_limit != 0 and speed_limit < _SLOWEST_LIMIT:
        raise ConfigError(
            f"{path}: imageManager.downloadSpeedLimit must be 0 or at least {_SLOWEST_LIMIT}, not {speed_limit}"
        )
    if config.image_manager.download_cert_storage and config.image_manager.download_ca_cert is None:
        raise ConfigError(f"{path}: imageManager.downloadCertStorage needs imageManager.downloadCaCert")
    for name, text in (
        ("iamProtectedServerUrl", config.iam_protected_server_url),
        ("iamPublicServerUrl", config.iam_public_server_url),
        ("cmServerUrl", config.cm_server_url),
        ("fileServerUrl", config.file_server_url),
    ):
        if not text:
            raise ConfigError(f"{path}: {name} is empty")
    for address in config.file_server_addresses:
        try:
            plain_ip(address)
        except InvalidArgumentError as error:
            raise ConfigError(f"{path}: fileServerAddresses: {error}") from None
    for kind, rule in (("fota", config.update_scheduler.fota), ("sota", config.update_scheduler.sota)):
        try:
            check(rule)
        except InvalidArgumentError as error:
            raise ConfigError(f"{path}: updateScheduler.{kind}: {error}") from None
    try:
        SubnetPool(config.network_pools)
    except InvalidArgumentError as error:
        raise ConfigError(f"{path}: networkPools: {error}") from None
    return config
