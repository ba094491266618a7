"""What CNI plugins are asked, and configuration lists that are none."""

import json
from pathlib import Path
from typing import Any

import pytest

from aoscore.common.errors import ConfigError, InvalidArgumentError, NotFoundError
from aoscore.common.types import InstanceIdent
from aoscore.sm.networkmanager.cni import DEFAULT, for_network, load_config_list, request, runtime_config
from aoscore.sm.networkmanager.model import Network, NetworkConfig

NETWORK = Network("owner", "172.17.0.0/16", "172.17.0.1", "br-00000001")
IDENT = InstanceIdent("item", "subject", 0)


def test_a_plugin_gets_what_it_has_capabilities_for() -> None:
    config = NetworkConfig(IDENT, download_speed_kbit=1000, upload_speed_kbit=100_000)
    offered = runtime_config("id", NETWORK, "172.17.0.2", config)
    made = for_network(DEFAULT, NETWORK, Path("/run/x"))
    bridge, firewall, bandwidth = (request(made, plugin, offered, None) for plugin in made.plugins)
    assert bridge == {
        "cniVersion": "1.0.0",
        "name": "owner",
        "type": "bridge",
        "bridge": "br-00000001",
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {"type": "host-local", "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "/run/x"},
        "runtimeConfig": {
            "ips": ["172.17.0.2/16"],
            "ipRanges": [[{"subnet": "172.17.0.0/16", "gateway": "172.17.0.1"}]],
            "mac": offered["mac"],
        },
    }
    assert "runtimeConfig" not in firewall and "capabilities" not in firewall
    assert bandwidth["runtimeConfig"] == {
        "bandwidth": {
            "ingressRate": 1_000_000,
            "ingressBurst": 102_400,
            "egressRate": 100_000_000,
            "egressBurst": 400_000,
        }
    }
    assert request(made, made.plugins[1], offered, {"ips": []})["prevResult"] == {"ips": []}


def test_without_limits_bandwidth_is_not_offered() -> None:
    offered = runtime_config("id", NETWORK, "172.17.0.2", NetworkConfig(IDENT))
    assert "bandwidth" not in offered
    assert "runtimeConfig" not in request(DEFAULT, DEFAULT.plugins[2], offered, None)


def test_what_a_list_says_itself_stays(tmp_path: Path) -> None:
    path = tmp_path / "aos.conflist"
    ipam = {"type": "host-local", "dataDir": "/var/x"}
    document = {
        "cniVersion": "0.4.0",
        "name": "replaced",
        "disableCheck": True,
        "plugins": [{"type": "bridge", "bridge": "replaced", "mtu": 1400, "ipam": ipam}, {"type": "macvlan"}],
    }
    path.write_text(json.dumps(document))
    loaded = load_config_list(path)
    made = for_network(loaded, NETWORK, Path("/run/x"))
    assert (made.name, made.disable_check, made.cni_version) == ("owner", True, "0.4.0")
    assert made.plugins == ({"type": "bridge", "bridge": "br-00000001", "mtu": 1400, "ipam": ipam}, {"type": "macvlan"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cniVersion": "0.3.1"}, "'cniVersion' '0.3.1' is not supported, use 0.4.0 or 1.0.0"),
        ({"plugins": []}, "'plugins' is empty"),
        ({"plugins": [{"type": "bridge"}, {"type": "../sh"}]}, r"'plugins\[1\].type' '../sh' is no name of a plugin"),
        ({"plugins": [{}]}, r"'plugins\[0\].type' None is no name of a plugin"),
    ],
)
def test_bad_lists(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "aos.conflist"
    path.write_text(json.dumps({"cniVersion": "1.0.0", "plugins": [{"type": "bridge"}]} | change))
    with pytest.raises(ConfigError, match=message):
        load_config_list(path)


def test_a_list_that_is_missing_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no CNI configuration list"):
        load_config_list(tmp_path / "none")
    (tmp_path / "bad").write_text("{")
    with pytest.raises(InvalidArgumentError, match="bad"):
        load_config_list(tmp_path / "bad")
