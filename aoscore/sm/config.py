"""SM's configuration file (sm.md §1.4).

Keys are compared without case; unknown keys and wrong types are errors that name file and key, so that a typing mistake
never becomes a silent default.
"""

import logging
from pathlib import Path
from typing import Any, Literal

import msgspec

from aoscore.common.config import Duration, load_config
from aoscore.common.errors import ConfigError
from aoscore.sm.networkmanager import cni
from aoscore.sm.networkmanager.traffic import Period

_log = logging.getLogger(__name__)

_PACKAGED_MIGRATION = Path(__file__).parent / "migration"
# Top-level keys that images of AosCore 9.1 still carry; the container runtime has its own (sm.md §1.4).
_IGNORED = frozenset({"statedir", "storagedir"})


class _Section(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Base of all sections."""


class MonitoringConfig(_Section, frozen=True):
    """Sampling and sending period, window of the averages."""

    poll_period_s: Duration = msgspec.field(name="pollPeriod", default=Duration(35))
    average_window_s: Duration = msgspec.field(name="averageWindow", default=Duration(35))


class ImageManagerConfig(_Section, frozen=True):
    """Image store.

    `images_part_limit_percent` bounds the store to a share of its file system, 0 means no bound.
    `first_layer_on_top` (own key): the first layer of a manifest covers the later ones, as AosCore 9.1 stacks them and
    cloud images are built (sm-runtime.md §2.6); false takes the OCI order. `owners` (own key): ``root`` owns what is
    unpacked, as with AosCore 9.1, or with ``archive`` whom the layers name. `staging_dir` (own key): the
    `imageStoreDir` of the MP of this node, which fetches and unpacks ahead; what is ready there is taken, if it is on
    the same file system.
    """

    image_path: Path | None = None
    images_part_limit_percent: float = msgspec.field(name="imagesPartLimit", default=0.0)
    update_item_ttl_s: Duration = msgspec.field(name="updateItemTtl", default=Duration(30 * 86400))
    remove_outdated_period_s: Duration = msgspec.field(name="removeOutdatedPeriod", default=Duration(86400))
    first_layer_on_top: bool = True
    owners: Literal["root", "archive"] = "root"
    staging_dir: Path | None = None


class LoggingConfig(_Section, frozen=True):
    """Limits of one log reply: uncompressed bytes of a part, number of parts."""

    max_part_size_bytes: int = msgspec.field(name="maxPartSize", default=262144)
    max_part_count: int = 80


class JournalAlertsConfig(_Section, frozen=True):
    """Which journal entries become alerts; priorities are syslog numbers, 0 is the most urgent."""

    filter: tuple[str, ...] = ()
    service_alert_priority: int = 4
    system_alert_priority: int = 3


class MigrationConfig(_Section, frozen=True):
    """Database scripts of the image and the writable folder that collects them (database.md §1.1)."""

    migration_path: Path = _PACKAGED_MIGRATION
    merged_migration_path: Path | None = None


class CniConfig(_Section, frozen=True):
    """CNI plugins: configuration list (a ``.conflist``; none means bridge, firewall and bandwidth) and folders."""

    config_file: Path | None = None
    bin_dirs: tuple[Path, ...] = cni.BIN_DIRS
    state_dir: Path = cni.STATE_DIR


class NetworkConfig(_Section, frozen=True):
    """Networks of instances (own section).

    `backend`: who connects instances with their bridge, SM itself or CNI plugins. `traffic_period`: after it, UTC, the
    traffic of instances counts anew. `host_ports`: ports of the node that instances reach beside its DNS server, such
    as ``8088/tcp``; left out, they reach all of them, as with AosCore 9.1. `ipv6_prefix`: instances have IPv6 too, by
    addresses that are their IPv4 address behind this prefix of 96 bits, such as ``fd12:3456:789a::/96``, which must be
    the same on all nodes of the Unit; left out, they have none.
    """

    backend: Literal["builtin", "cni"] = "builtin"
    cni: CniConfig = CniConfig()
    traffic_period: Period = "day"
    host_ports: tuple[str, ...] | None = None
    ipv6_prefix: str | None = None


class RuntimeConfig(_Section, frozen=True):
    """One runtime: `plugin` selects the implementation, `type` names it towards CM, `config` is the plugin's own."""

    plugin: str
    type: str
    is_component: bool = False
    config: dict[str, Any] = {}


class Config(_Section, frozen=True):
    """The whole file. After `load` every path is set."""

    working_dir: Path
    ca_cert: Path
    cm_server_url: str
    iam_public_server_url: str
    iam_protected_server_url: str
    cert_storage: str = "sm"
    cm_reconnect_timeout_s: Duration = msgspec.field(name="cmReconnectTimeout", default=Duration(10))
    node_config_file: Path | None = None
    resources_config_file: Path = Path("/etc/aos/resources.cfg")
    monitoring: MonitoringConfig = MonitoringConfig()
    image_manager: ImageManagerConfig = ImageManagerConfig()
    logging: LoggingConfig = LoggingConfig()
    journal_alerts: JournalAlertsConfig = JournalAlertsConfig()
    migration: MigrationConfig = MigrationConfig()
    network: NetworkConfig = NetworkConfig()
    runtimes: tuple[RuntimeConfig, ...] = ()

    @property
    def node_config_path(self) -> Path:
        """Stored node configuration."""
        return self.node_config_file or self.working_dir / "aos_node.cfg"

    @property
    def images_dir(self) -> Path:
        """Root of the image store."""
        return self.image_manager.image_path or self.working_dir / "images"

    @property
    def merged_migration_dir(self) -> Path:
        """Folder that keeps database scripts over versions."""
        return self.migration.merged_migration_path or self.working_dir / "mergedMigration"

    @property
    def database_path(self) -> Path:
        """The SQLite file."""
        return self.working_dir / "servicemanager.db"


def load(path: Path) -> Config:
    """Read and check the file. Raises NotFoundError or ConfigError naming file and key."""
    config = load_config(path, Config, ignored=_IGNORED)
    for key, value in (
        ("monitoring.pollPeriod", config.monitoring.poll_period_s),
        ("monitoring.averageWindow", config.monitoring.average_window_s),
        ("cmReconnectTimeout", config.cm_reconnect_timeout_s),
        ("imageManager.removeOutdatedPeriod", config.image_manager.remove_outdated_period_s),
        ("logging.maxPartSize", config.logging.max_part_size_bytes),
        ("logging.maxPartCount", config.logging.max_part_count),
    ):
        if value <= 0:
            raise ConfigError(f"{path}: {key!r} must be greater than 0")
    if not 0 <= config.image_manager.images_part_limit_percent <= 100:
        raise ConfigError(f"{path}: 'imageManager.imagesPartLimit' must be a percentage between 0 and 100")
    names = [runtime.type for runtime in config.runtimes]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(f"{path}: 'runtimes[{index}].type' {name!r} is used twice")
    return msgspec.structs.replace(config, journal_alerts=_with_valid_priorities(config.journal_alerts))


def _with_valid_priorities(alerts: JournalAlertsConfig) -> JournalAlertsConfig:
    """Priorities that journald does not know are replaced by the defaults (sm.md §1.4)."""
    usual = JournalAlertsConfig()
    for name in ("service_alert_priority", "system_alert_priority"):
        if not 0 <= getattr(alerts, name) <= 7:
            _log.warning(
                "Journal priority is outside 0..7, default taken: key=%s, value=%d", name, getattr(alerts, name)
            )
            alerts = msgspec.structs.replace(alerts, **{name: getattr(usual, name)})
    return alerts
