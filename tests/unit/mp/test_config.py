"""The configuration file: every key, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from aoscore.common.errors import ConfigError
from aoscore.mp.communication.ports import Ports
from aoscore.mp.config import Config, load

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "mp.cfg"
GATEWAY: dict[str, Any] = {
    "caCert": "/ca.pem",
    "iamConfig": {
        "iamPublicServerUrl": "localhost:8090",
        "iamMainPublicServerUrl": "localhost:8090",
        "iamMainProtectedServerUrl": "localhost:8089",
    },
    "cmConfig": {"cmServerUrl": "localhost:8093"},
}
VCHAN = {"domain": "name:second", "xsRxPath": "r", "xsTxPath": "t"}
NODE: dict[str, Any] = {
    "role": "node",
    "caCert": "/ca.pem",
    "iamConfig": {"iamPublicServerUrl": "localhost:8090"},
}


def read(tmp_path: Path, document: dict[str, Any]) -> Config:
    path = tmp_path / "mp.cfg"
    path.write_text(json.dumps(document))
    return load(path)


def changed(document: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with one key, "a.b.c", set."""
    copy: dict[str, Any] = json.loads(json.dumps(document))
    *sections, name = key.split(".")
    place = copy
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = value
    return copy


def keys_of(document: Any) -> set[str]:
    """All key paths."""
    found = set()
    for key, value in document.items():
        found |= {f"{key}.{inner}" for inner in keys_of(value)} if isinstance(value, dict) else {key}
    return found


def test_example_has_every_key_and_is_read() -> None:
    config = load(EXAMPLE)
    assert config.role == "node"
    assert config.ports == Ports(1, 2, 3, 4)
    assert config.images_dir == Path("/var/aos/workdirs/mp/images")
    assert config.node.clock_sync.timeout_s == 600
    import msgspec

    document = json.loads(EXAMPLE.read_bytes())
    known = keys_of(json.loads(msgspec.json.encode(Config(), enc_hook=lambda value: str(value))))
    assert keys_of(document) == known


def test_file_of_aoscore_91_makes_a_gateway(tmp_path: Path) -> None:
    document = {
        "CACert": "/usr/share/ca-certificates/aos/AosRootCA.crt",
        "certStorage": "sm",
        "workingDir": "/var/aos/workdirs/mp",
        "imageStoreDir": "/var/aos/workdirs/mp/images",
        "iamConfig": {
            "iamPublicServerUrl": "main:8090",
            "iamMainPublicServerUrl": "main:8090",
            "iamMainProtectedServerUrl": "main:8089",
            "certStorage": "iam",
            "openPort": 1,
            "securePort": 2,
        },
        "cmConfig": {"cmServerUrl": "main:8093", "openPort": 3, "securePort": 4},
        "vchan": {
            "domain": 0,
            "xsRxPath": "tmp/vchan/aos/rx",
            "xsTxPath": "tmp/vchan/aos/tx",
            "iamCertStorage": "iam",
            "smCertStorage": "sm",
        },
        "downloader": {"downloadDir": "/var/aos/workdirs/mp/downloads"},
    }
    assert read(tmp_path, document).role == "gateway"


@pytest.mark.parametrize("document", [GATEWAY, NODE])
def test_what_may_be_left_out(tmp_path: Path, document: dict[str, Any]) -> None:
    config = read(tmp_path, document)
    assert (config.cert_storage, config.iam_config.cert_storage) == ("sm", "iam")
    assert config.ports == Ports(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("logProvider.maxPartSize", 0, "'logProvider.maxPartSize' must be greater than 0"),
        ("downloader.maxConcurrentDownloads", -1, "'downloader.maxConcurrentDownloads' must not be negative"),
        ("transport.type", "vchan", "'vchan.xsRxPath' must be a path"),
        ("transport.peers", [{"domain": 1}], "'transport.peers\\[0\\].xsRxPath' must be a path"),
        ("transport.peers", [VCHAN | {"domain": "x"}], "'transport.peers\\[0\\].domain' must be a domain number"),
        ("transport.peers", [VCHAN | {"domain": -1}], "'transport.peers\\[0\\].domain' must be a domain number"),
        ("transport.peers", [VCHAN | {"ringSize": 2**21}], "'transport.peers\\[0\\].ringSize' must be 0 to 1048576"),
        ("transport.peers", [VCHAN | {"xsTxPath": "t" * 50}], "xsTxPath' must be a path of 1 to 49 characters"),
        ("transport.peers", [VCHAN, VCHAN], "'transport.peers\\[1\\].xsRxPath' is 'r' like 'transport.peers\\[0\\]"),
        ("iamConfig.openPort", 0, "'iamConfig.openPort' must be a channel number"),
        ("iamConfig.openPort", -1, "'iamConfig.openPort' must be a channel number"),
        ("cmConfig.openPort", 1, "'cmConfig.openPort' is 1 like 'iamConfig.openPort'"),
        ("cmConfig.securePort", 17, "'cmConfig.securePort' must not be 17"),
        ("iamConfig.iamPublicServerUrl", "", "'iamConfig.iamPublicServerUrl' is needed"),
        ("iamConfig.iamPublicServerUrl", "main", "'iamConfig.iamPublicServerUrl': 'main' is no address"),
        ("caCert", None, "'caCert' is needed"),
        ("limits.channelBuffer", 10, "'limits.channelBuffer' must be at least"),
        ("images.ttl", "0s", "'images.ttl' must be greater than 0"),
        ("images.maxSize", -1, "'images.maxSize' must not be negative"),
        ("node.clockSync.sendPeriod", "soon", "'soon' is no duration"),
        ("role", "both", "Invalid enum value 'both'"),
        ("transport.listem", "x", "unknown key 'transport.listem'"),
    ],
)
def test_what_is_refused(tmp_path: Path, key: str, value: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        read(tmp_path, changed(NODE if key.startswith("node") else GATEWAY, key, value))
    assert str(tmp_path / "mp.cfg") in str(caught.value)


def test_peers_of_vchan(tmp_path: Path) -> None:
    (only,) = read(tmp_path, GATEWAY | {"vchan": {"domain": 3, "xsRxPath": "r", "xsTxPath": "t"}}).peers
    assert (only.domain, only.xs_rx_path, only.xs_tx_path, only.ring_size) == (3, "r", "t", 65536)
    (old,) = read(tmp_path, GATEWAY | {"profile": "legacy", "vchan": {"xsRxPath": "r", "xsTxPath": "t"}}).peers
    assert old.ring_size == 0
    second = {"domain": 4, "xsRxPath": "r4", "xsTxPath": "t4", "ringSize": 0}
    config = read(tmp_path, changed(GATEWAY, "transport", {"type": "vchan", "peers": [VCHAN, second]}))
    assert [peer.domain for peer in config.peers] == ["name:second", 4]
    with pytest.raises(ConfigError, match=r"'transport.peers': a node has one gateway"):
        read(tmp_path, changed(NODE, "transport", {"type": "vchan", "peers": [VCHAN, second]}))


def test_a_gateway_needs_the_main_node(tmp_path: Path) -> None:
    for key in ("iamConfig.iamMainPublicServerUrl", "iamConfig.iamMainProtectedServerUrl", "cmConfig.cmServerUrl"):
        with pytest.raises(ConfigError, match=f"'{key}' is needed for role gateway"):
            read(tmp_path, changed(GATEWAY, key, ""))


def test_a_node_needs_its_gateway(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'transport.connect': 'main' is no address"):
        read(tmp_path, changed(NODE, "transport.connect", "main"))


def test_a_node_is_never_of_the_older_kind(tmp_path: Path) -> None:
    assert read(tmp_path, changed(GATEWAY, "profile", "legacy")).profile == "legacy"
    with pytest.raises(ConfigError, match="'profile': a node is never one of the older kind"):
        read(tmp_path, changed(NODE, "profile", "legacy"))
