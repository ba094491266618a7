"""CM's configuration file: example, defaults, and everything that can be wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from aoscore.cm.config import load
from aoscore.common.errors import ConfigError, NotFoundError

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "cm.cfg"
MINIMAL: dict[str, Any] = {
    "workingDir": "/w",
    "caCert": "/ca.pem",
    "iamProtectedServerUrl": "iam:8089",
    "iamPublicServerUrl": "iam:8090",
    "cmServerUrl": ":8093",
    "fileServerUrl": "main:8094",
}


def write(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "cm.cfg"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_the_example_loads() -> None:
    config = load(EXAMPLE)
    assert config.image_manager.update_item_ttl == 30 * 86400.0
    assert config.storage_dir == Path("/var/aos/storages")
    assert config.launcher.nodes_connection_timeout == 600.0


def test_the_example_shows_every_key_it_can() -> None:
    """A key missing from the example is one nobody finds."""

    def keys(struct: Any) -> set[str]:
        return set(struct.__struct_encode_fields__)

    document = json.loads(EXAMPLE.read_text())
    hidden = {
        "overrideServiceDiscoveryUrl",
        "cloudMessageLog",
        "downloadCaCert",
        "downloadCertStorage",
    }  # off by default
    config = load(EXAMPLE)
    assert keys(config) - hidden == set(document)
    for name in ("image_manager", "launcher", "update_manager", "migration", "monitoring", "alerts"):
        section = getattr(config, name)
        encoded = dict(zip(config.__struct_fields__, config.__struct_encode_fields__, strict=True))[name]
        assert keys(section) - hidden == set(document[encoded])


def test_defaults_depend_on_the_working_directory(tmp_path: Path) -> None:
    config = load(write(tmp_path, MINIMAL))
    assert config.storage_dir == Path("/w/storages")
    assert config.state_dir == Path("/w/states")
    assert config.unit_config_file == Path("/w/aos_unit.cfg")
    assert config.dns_pid_file == Path("/var/aos/dns/pidfile")
    assert config.image_manager.install_path == Path("/w/install")
    assert config.image_manager.download_path == Path("/w/download")
    assert config.migration.merged_migration_path == Path("/w/migration")
    assert config.database_file == Path("/w/cm.db")
    assert config.image_manager.require_signature
    assert (config.cert_storage, config.cloud_response_wait_timeout) == ("cm", 10.0)
    other = load(write(tmp_path, {**MINIMAL, "workingDir": "/other"}))
    assert other.image_manager.install_path == Path("/other/install")
    assert config.image_manager.install_path == Path("/w/install")


def test_names_in_any_case_and_given_values(tmp_path: Path) -> None:
    document = {
        **MINIMAL,
        "WORKINGDIR": "/x",
        "alerts": {"SENDPERIOD": "2m"},
        "imagemanager": {"installPath": "/i", "parallelDownloads": 2},
        "monitoring": {"pollPeriod": "35s"},
    }
    del document["workingDir"]
    config = load(write(tmp_path, document))
    assert config.working_dir == Path("/x")
    assert config.alerts.send_period == 120.0
    assert config.image_manager.install_path == Path("/i")
    assert config.image_manager.download_path == Path("/x/download")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fileServer": "x"}, "fileServer"),
        ({"imageManager": {"instalPath": "/i"}}, "imageManager.instalPath"),
        ({"cmServerUrl": 8093}, "cmServerUrl"),
        ({"cmServerUrl": ""}, "cmServerUrl"),
        ({"alerts": {"sendPeriod": "soon"}}, "alerts.sendPeriod"),
        ({"alerts": []}, "alerts"),
        ({"imageManager": {"requireSignature": "maybe"}}, "imageManager.requireSignature"),
        ({"imageManager": {"parallelDownloads": 0}}, "imageManager.parallelDownloads"),
        ({"imageManager": {"downloadSpeedLimit": 100}}, "imageManager.downloadSpeedLimit"),
        ({"imageManager": {"downloadCertStorage": "online"}}, "imageManager.downloadCertStorage"),
        ({"imageManager": {"downloadSpeedLimit": -1}}, "imageManager.downloadSpeedLimit"),
        ({"updateManager": {"maxRemovePercent": 101}}, "updateManager.maxRemovePercent"),
        ({"fileServerAddresses": ["main"]}, "fileServerAddresses"),
        ({"workingDir": None}, "workingDir"),
    ],
)
def test_a_wrong_key_or_type_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = write(tmp_path, {**MINIMAL, **change})
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert named in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_not_a_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"cm\.cfg"):
        load(write(tmp_path, text))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"cm\.cfg"):
        load(tmp_path / "cm.cfg")


def test_network_pools(tmp_path: Path) -> None:
    config = load(write(tmp_path, {**MINIMAL, "networkPools": ["10.64.0.0/12"]}))
    assert config.network_pools == ("10.64.0.0/12",)
    with pytest.raises(ConfigError, match=r"networkPools: .* is no pool"):
        load(write(tmp_path, {**MINIMAL, "networkPools": ["10.0.0.1/8"]}))
