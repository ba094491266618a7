"""SM's configuration file: example, defaults, and everything that can be wrong with it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aoscore.common.errors import ConfigError, NotFoundError
from aoscore.sm import app
from aoscore.sm.config import load
from aoscore.sm.launcher.runtimes.container.config import ContainerConfig
from aoscore.sm.networkmanager.cni import CniSettings
from aoscore.sm.networkmanager.model import Ports

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "sm.cfg"
MINIMAL: dict[str, Any] = {
    "workingDir": "/w",
    "caCert": "/ca.pem",
    "cmServerURL": "main:8093",
    "iamPublicServerURL": "iam:8090",
    "iamProtectedServerURL": "iam:8089",
}


def write(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "sm.cfg"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_the_example_loads() -> None:
    setup = app.load(EXAMPLE)
    assert setup.config.cm_server_url == "aosmain:8093"
    assert setup.config.image_manager.update_item_ttl_s == 30 * 86400.0
    (runtime_type, container), *_ = setup.runtimes
    assert runtime_type == "crun"
    assert isinstance(container, ContainerConfig)
    assert container.storage_dir == Path("/var/aos/storages")


def test_the_example_shows_every_key() -> None:
    document = json.loads(EXAMPLE.read_text())
    config = load(EXAMPLE)

    def keys(struct: Any) -> set[str]:
        return {name.lower() for name in struct.__struct_encode_fields__}

    assert keys(config) == {name.lower() for name in document}
    for name in ("monitoring", "image_manager", "logging", "journal_alerts", "network", "migration"):
        encoded = dict(zip(config.__struct_fields__, config.__struct_encode_fields__, strict=True))[name]
        assert keys(getattr(config, name)) == {key.lower() for key in document[encoded]}


def test_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, MINIMAL))
    assert config.cert_storage == "sm"
    assert config.cm_reconnect_timeout_s == 10.0
    assert config.node_config_path == Path("/w/aos_node.cfg")
    assert config.images_dir == Path("/w/images")
    assert config.database_path == Path("/w/servicemanager.db")
    assert config.merged_migration_dir == Path("/w/mergedMigration")
    assert (config.migration.migration_path / "5_update.up.sql").is_file()
    assert config.monitoring.poll_period_s == config.monitoring.average_window_s == 35.0
    assert config.logging.max_part_count == 80
    assert config.runtimes == ()


def test_keys_in_any_case_and_leftovers_of_old_images(tmp_path: Path) -> None:
    document = {
        **{key.upper(): value for key, value in MINIMAL.items()},
        "stateDir": "/old",
        "storageDir": "/old",
        "MONITORING": {"POLLPERIOD": "PT1M"},
    }
    assert load(write(tmp_path, document)).monitoring.poll_period_s == 60.0


def test_priorities_out_of_range_are_replaced(tmp_path: Path) -> None:
    alerts = {"serviceAlertPriority": 8, "systemAlertPriority": -1}
    config = load(write(tmp_path, {**MINIMAL, "journalAlerts": alerts}))
    assert (config.journal_alerts.service_alert_priority, config.journal_alerts.system_alert_priority) == (4, 3)


def runtime(**changes: Any) -> dict[str, Any]:
    return {"runtimes": [{"plugin": "container", "type": "crun", **changes}]}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cmServerUrll": "x"}, "unknown key 'cmServerUrll'"),
        ({"monitoring": {"period": "1s"}}, "unknown key 'monitoring.period'"),
        ({"monitoring": {"pollPeriod": "soon"}}, "monitoring.pollPeriod|soon"),
        ({"monitoring": {"pollPeriod": 0}}, "'monitoring.pollPeriod' must be greater than 0"),
        ({"logging": {"maxPartCount": "many"}}, "maxPartCount"),
        ({"imageManager": {"imagesPartLimit": 101}}, "imagesPartLimit"),
        ({"workingDir": 5}, "workingDir"),
        ({"journalAlerts": {"filter": ["("]}}, "journalAlerts.filter"),
        ({"runtimes": {}}, "runtimes"),
        (
            runtime(plugin="vm"),
            r"'runtimes\[0\].plugin' 'vm' is not supported, use one of container, native, rootfs, boot",
        ),
        (
            runtime(plugin="boot", config={"partitions": ["1"], "detectMode": "auto"}),
            "must name two different partitions",
        ),
        (runtime(plugin="boot", config={"partitions": ["/dev/a", "/dev/a"]}), "must name two different partitions"),
        (runtime(plugin="boot", config={"partitions": ["1", "2"]}), "'1' is no path of a device"),
        (runtime(plugin="boot", config={"partitions": ["/a", "/b"], "detectMode": "auto"}), "numbers, '/a' is none"),
        (runtime(plugin="boot", config={"detectMode": "magic"}), r"runtimes\[0\].config.detectMode' 'magic'"),
        (runtime(plugin="native", config={"conmonExecutable": "x"}), r"runtimes\[0\].config.conmonExecutable"),
        (runtime(plugin="rootfs", config={"versionFile": "x"}), r"runtimes\[0\].config.versionFile"),
        (runtime(plugin="rootfs", config={"healthCheckServices": "x"}), r"runtimes\[0\].config"),
        (runtime(config={"crunExecutble": "x"}), r"runtimes\[0\].config.crunExecutble"),
        (runtime(config={"hostBinds": "usr"}), r"runtimes\[0\].config"),
        (runtime(config={"diskSpeed": {"writeSpeed": -1}}), r"runtimes\[0\].config.*can't be below 0"),
        (
            runtime(config={"userNamespaceBase": 1000}),
            r"config.userNamespaceBase' must be 0 or at least 65536",
        ),
        (runtime(config={"capabilities": ["KILL"]}), r"runtimes\[0\].config.capabilities': 'KILL' is no capability"),
        (runtime(config={"diskSpeed": {"writSpeed": 1}}), r"runtimes\[0\].config"),
        ({"runtimes": [{"plugin": "container", "type": "a"}] * 2}, r"'runtimes\[1\].type' 'a' is used twice"),
    ],
)
def test_wrong_key_or_type_names_file_and_key(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    path = write(tmp_path, {**MINIMAL, **changes})
    with pytest.raises(ConfigError, match=text) as caught:
        app.load(path)
    assert str(path) in str(caught.value)


def test_missing_key_and_missing_file(tmp_path: Path) -> None:
    document = {key: value for key, value in MINIMAL.items() if key != "caCert"}
    with pytest.raises(ConfigError, match="caCert"):
        load(write(tmp_path, document))
    with pytest.raises(NotFoundError, match=r"nothing\.cfg"):
        load(tmp_path / "nothing.cfg")
    with pytest.raises(ConfigError, match=r"sm\.cfg"):
        load(write(tmp_path, "{"))


def test_program_ends_with_a_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path, {**MINIMAL, "workngDir": "/x"})
    program = "import sys; from aoscore.sm.app import main; sys.argv[1:] = ['-c', sys.argv[1]]; main()"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "unknown key 'workngDir'" in done.stdout + done.stderr


def test_ports_of_the_node_are_checked(tmp_path: Path) -> None:
    document = json.loads(EXAMPLE.read_text())
    assert app.load(EXAMPLE).host_ports is None
    document["network"] = {"hostPorts": ["8088", "5000-5010/udp"]}
    assert app.load(write(tmp_path, document)).host_ports == (Ports("tcp", 8088, 8088), Ports("udp", 5000, 5010))
    assert app.load(EXAMPLE).ipv6 is None
    document["network"] = {"ipv6Prefix": "fd12::/96"}
    loaded = app.load(write(tmp_path, document)).ipv6
    assert loaded is not None and loaded.address("10.0.0.1") == "fd12::a00:1"
    for network, text in (
        ({"ipv6Prefix": "fd12::/64"}, "'network.ipv6Prefix': 'fd12::/64' has not 96 bits"),
        ({"ipv6Prefix": "fd12::/96", "backend": "cni"}, "'network.ipv6Prefix' is not possible with CNI plugins"),
    ):
        document["network"] = network
        with pytest.raises(ConfigError, match=text):
            app.load(write(tmp_path, document))
    document["network"] = {"hostPorts": ["http"]}
    with pytest.raises(ConfigError, match=r"'network.hostPorts': 'http' is no port"):
        app.load(write(tmp_path, document))


def test_cni_plugins_are_chosen_with_their_list(tmp_path: Path) -> None:
    document = json.loads(EXAMPLE.read_text())
    assert app.load(EXAMPLE).cni is None
    document["network"] = {"backend": "cni", "cni": {"binDirs": ["/opt/cni/bin"]}}
    assert app.load(write(tmp_path, document)).cni == CniSettings(bin_dirs=(Path("/opt/cni/bin"),))
    document["network"]["cni"]["configFile"] = str(tmp_path / "aos.conflist")
    with pytest.raises(NotFoundError, match=r"there is no CNI configuration list .*aos\.conflist"):
        app.load(write(tmp_path, document))
    (tmp_path / "aos.conflist").write_text('{"cniVersion": "1.0.0", "plugins": [{"type": "bridge"}]}')
    loaded = app.load(write(tmp_path, document)).cni
    assert loaded is not None and loaded.template.plugins == ({"type": "bridge"},)
    document["network"]["backend"] = "docker"
    with pytest.raises(ConfigError, match=r"network\.backend"):
        app.load(write(tmp_path, document))
