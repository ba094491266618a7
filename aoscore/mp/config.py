"""MP's configuration file (mp.md §4).

An `mp.cfg` of AosCore 9.1 is taken as it is and makes a gateway.
"""

from pathlib import Path
from typing import Literal

import msgspec

from aoscore.common.config import Duration, load_config
from aoscore.common.errors import ConfigError, InvalidArgumentError
from aoscore.common.rpc import split_address
from aoscore.mp.communication.ports import Ports

_MAX_PORT = 2**32 - 1
_MIN_BUFFER_BYTES = 64 * 1024
_RING_BYTES = 64 * 1024
_MAX_RING_BYTES = 1024 * 1024
_MAX_XENSTORE_PATH_BYTES = 49
_MAX_PEERS = 64
_MAX_DOMAIN = 0x7FEF


class _Section(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Base of all sections."""


class IamConfig(_Section, frozen=True):
    """IAM of this node and, for a gateway, of the Main Node; channels of RegisterNode."""

    iam_public_server_url: str = ""
    iam_main_public_server_url: str = ""
    iam_main_protected_server_url: str = ""
    cert_storage: str = "iam"
    open_port: int = 1
    secure_port: int = 2


class CmConfig(_Section, frozen=True):
    """CM, for a gateway; channels of clock and RegisterSM."""

    cm_server_url: str = ""
    open_port: int = 3
    secure_port: int = 4


class VchanConfig(_Section, frozen=True):
    """The Xen transport, and the certificate types of a gateway as TLS server on any transport."""

    domain: int | str = 0
    xs_rx_path: str = ""
    xs_tx_path: str = ""
    iam_cert_storage: str = "iam"
    sm_cert_storage: str = "sm"


class DownloaderConfig(_Section, frozen=True):
    """Images for peers of the older kind: where archives are put, how many at a time, pauses between attempts."""

    download_dir: Path | None = None
    max_concurrent_downloads: int = 0
    retry_delay: Duration | None = None
    max_retry_delay: Duration | None = None


class LogProviderConfig(_Section, frozen=True):
    """Archives of logs that come as text: bytes of text in a part, and how many parts a log may have."""

    max_part_size: int = 10240
    max_part_count: int = 10


class PeerConfig(_Section, frozen=True):
    """A node behind vchan; see `communication.vchans.Peer`. Size of a ring in bytes."""

    domain: int | str = 0
    xs_rx_path: str = ""
    xs_tx_path: str = ""
    ring_size: int = _RING_BYTES


class TransportConfig(_Section, frozen=True):
    """What carries the link; `auto`: vchan where it can be had and has paths, else a socket.

    `listen` is the gateway's address, `connect` where a node finds it. `peers` are the nodes behind vchan, or for a
    node its gateway; without any it is that of `vchan`.
    """

    type: Literal["auto", "socket", "vchan"] = "auto"
    listen: str = "0.0.0.0:30001"
    connect: str = "main:30001"
    peers: tuple[PeerConfig, ...] = ()


class LimitsConfig(_Section, frozen=True):
    """Largest message of a secure channel, and what may wait per channel, bytes."""

    max_message_size: int = 16 * 1024 * 1024
    channel_buffer: int = 1024 * 1024


class ClockSyncConfig(_Section, frozen=True):
    """Whether and when a node takes its time from the Main Node. `auto`: while nothing else sets the clock."""

    enabled: bool | Literal["auto"] = "auto"
    send_period_s: Duration = msgspec.field(name="sendPeriod", default=Duration(60))
    timeout_s: Duration = msgspec.field(name="timeout", default=Duration(600))
    max_time_diff_s: Duration = msgspec.field(name="maxTimeDiff", default=Duration(10))


class NodeConfig(_Section, frozen=True):
    """Addresses that SM and IAM of a Secondary Node use instead of those of the Main Node.

    `prefetch`: bring what a manifest names before SM asks for it, and unpack the layers.
    """

    cm_proxy_url: str = "localhost:8093"
    iam_public_proxy_url: str = "localhost:8190"
    iam_protected_proxy_url: str = "localhost:8189"
    blob_server_url: str = "127.0.0.1:8095"
    prefetch: bool = True
    clock_sync: ClockSyncConfig = ClockSyncConfig()


class ImagesConfig(_Section, frozen=True):
    """Blobs that a node keeps: how long unused, free space to leave, size of the store (0: no limit), bytes."""

    ttl_s: Duration = msgspec.field(name="ttl", default=Duration(86400))
    min_free_space: int = 64 * 1024 * 1024
    max_size: int = 0


class Config(_Section, frozen=True):
    """The whole file."""

    ca_cert: Path | None = None
    cert_storage: str = "sm"
    working_dir: Path = Path("/var/aos/workdirs/mp")
    image_store_dir: Path | None = None
    iam_config: IamConfig = IamConfig()
    cm_config: CmConfig = CmConfig()
    vchan: VchanConfig = VchanConfig()
    downloader: DownloaderConfig = DownloaderConfig()
    log_provider: LogProviderConfig = LogProviderConfig()
    role: Literal["gateway", "node"] = "gateway"
    profile: Literal["auto", "v5", "legacy"] = "auto"
    transport: TransportConfig = TransportConfig()
    limits: LimitsConfig = LimitsConfig()
    node: NodeConfig = NodeConfig()
    images: ImagesConfig = ImagesConfig()

    @property
    def ports(self) -> Ports:
        """Channel numbers."""
        iam, cm = self.iam_config, self.cm_config
        return Ports(iam.open_port, iam.secure_port, cm.open_port, cm.secure_port)

    @property
    def peers(self) -> tuple[PeerConfig, ...]:
        """The other ends of vchan links; none where only a socket is configured."""
        vchan, transport = self.vchan, self.transport
        if transport.peers or not (vchan.xs_rx_path or transport.type == "vchan"):
            return transport.peers
        # The Zephyr application finds its rings in the first page only (vchan.md §2).
        ring_bytes = 0 if self.profile == "legacy" else _RING_BYTES
        return (PeerConfig(vchan.domain, vchan.xs_rx_path, vchan.xs_tx_path, ring_bytes),)

    @property
    def images_dir(self) -> Path:
        """Where a node keeps blobs."""
        return self.image_store_dir or self.working_dir / "images"


def load(path: Path) -> Config:
    """Read and check the file. Raises NotFoundError or ConfigError naming file and key."""
    config = load_config(path, Config)
    try:
        _check_ports(config)
        _check_needed(config)
        _check_peers(config)
        _check_amounts(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def _check_ports(config: Config) -> None:
    ports = {
        "iamConfig.openPort": config.iam_config.open_port,
        "iamConfig.securePort": config.iam_config.secure_port,
        "cmConfig.openPort": config.cm_config.open_port,
        "cmConfig.securePort": config.cm_config.secure_port,
    }
    seen: dict[int, str] = {}
    for key, port in ports.items():
        if not 0 < port <= _MAX_PORT:
            raise ConfigError(f"{key!r} must be a channel number, 1 or more, not {port}")
        if port in config.ports.taken():
            raise ConfigError(f"{key!r} must not be {port}: that channel is one of our own")
        if port in seen:
            raise ConfigError(f"{key!r} is {port} like {seen[port]!r}: channels need different numbers")
        seen[port] = key


def _check_needed(config: Config) -> None:
    if config.role == "node" and config.profile == "legacy":
        raise ConfigError("'profile': a node is never one of the older kind; use auto or v5")
    texts = {
        "iamConfig.iamPublicServerUrl": config.iam_config.iam_public_server_url,
        "iamConfig.certStorage": config.iam_config.cert_storage,
        "certStorage": config.cert_storage,
    }
    if config.role == "gateway":
        texts |= {
            "iamConfig.iamMainPublicServerUrl": config.iam_config.iam_main_public_server_url,
            "iamConfig.iamMainProtectedServerUrl": config.iam_config.iam_main_protected_server_url,
            "cmConfig.cmServerUrl": config.cm_config.cm_server_url,
            "vchan.iamCertStorage": config.vchan.iam_cert_storage,
            "vchan.smCertStorage": config.vchan.sm_cert_storage,
        }
        addresses = {"transport.listen": config.transport.listen}
    else:
        addresses = {
            "transport.connect": config.transport.connect,
            "node.cmProxyUrl": config.node.cm_proxy_url,
            "node.iamPublicProxyUrl": config.node.iam_public_proxy_url,
            "node.iamProtectedProxyUrl": config.node.iam_protected_proxy_url,
            "node.blobServerUrl": config.node.blob_server_url,
        }
    for key, text in texts.items():
        if not text:
            raise ConfigError(f"{key!r} is needed for role {config.role}")
    for key, address in (addresses | {key: text for key, text in texts.items() if key.endswith("Url")}).items():
        try:
            split_address(address)
        except InvalidArgumentError as error:
            raise ConfigError(f"{key!r}: {error}") from None
    if config.ca_cert is None:
        raise ConfigError("'caCert' is needed")


def _check_peers(config: Config) -> None:
    if config.transport.type == "socket" and not config.transport.peers:
        return  # what an mp.cfg of AosCore 9.1 says about vchan is of no matter
    if config.role == "node" and len(config.transport.peers) > 1:
        raise ConfigError("'transport.peers': a node has one gateway")
    if len(config.transport.peers) > _MAX_PEERS:
        raise ConfigError(f"'transport.peers': {_MAX_PEERS} is most")
    seen: dict[str, str] = {}
    for index, peer in enumerate(config.peers):
        place = f"transport.peers[{index}]" if config.transport.peers else "vchan"
        if isinstance(peer.domain, int):
            is_good = 0 <= peer.domain <= _MAX_DOMAIN
        else:
            is_good = peer.domain.startswith(("name:", "key:")) and not peer.domain.endswith(":")
        if not is_good:
            raise ConfigError(f"'{place}.domain' must be a domain number, name:GUEST or key:PATH, not {peer.domain!r}")
        for key, path in ((f"{place}.xsRxPath", peer.xs_rx_path), (f"{place}.xsTxPath", peer.xs_tx_path)):
            if not 0 < len(path) <= _MAX_XENSTORE_PATH_BYTES or not path.isascii() or not path.isprintable():
                raise ConfigError(f"{key!r} must be a path of 1 to {_MAX_XENSTORE_PATH_BYTES} characters in xenstore")
            if path in seen:
                raise ConfigError(f"{key!r} is {path!r} like {seen[path]!r}: each direction of each node has its own")
            seen[path] = key
        if not 0 <= peer.ring_size <= _MAX_RING_BYTES:
            raise ConfigError(f"'{place}.ringSize' must be 0 to {_MAX_RING_BYTES}")


def _check_amounts(config: Config) -> None:
    clock = config.node.clock_sync
    for key, value in (
        ("node.clockSync.sendPeriod", clock.send_period_s),
        ("node.clockSync.timeout", clock.timeout_s),
        ("node.clockSync.maxTimeDiff", clock.max_time_diff_s),
        ("images.ttl", config.images.ttl_s),
    ):
        if value <= 0:
            raise ConfigError(f"{key!r} must be greater than 0")
    for key, size in (
        ("limits.maxMessageSize", config.limits.max_message_size),
        ("limits.channelBuffer", config.limits.channel_buffer),
    ):
        if size < _MIN_BUFFER_BYTES:
            raise ConfigError(f"{key!r} must be at least {_MIN_BUFFER_BYTES}")
    for key, count in (
        ("logProvider.maxPartSize", config.log_provider.max_part_size),
        ("logProvider.maxPartCount", config.log_provider.max_part_count),
    ):
        if count <= 0:
            raise ConfigError(f"{key!r} must be greater than 0")
    for key, size in (
        ("downloader.maxConcurrentDownloads", config.downloader.max_concurrent_downloads),
        ("images.minFreeSpace", config.images.min_free_space),
        ("images.maxSize", config.images.max_size),
    ):
        if size < 0:
            raise ConfigError(f"{key!r} must not be negative")
