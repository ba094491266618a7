"""Configuration files as the daemons read them."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from aoscore.cm.config import Config as CmConfig
from aoscore.cm.config import load as load_cm
from aoscore.common.errors import ConfigError
from aoscore.ctl.target import Node, tree, write
from aoscore.iam.config import load as load_iam
from aoscore.sm.config import load as load_sm
from aoscore.sm.launcher.runtimes.container.config import load_container_config

MAIN = Node()
FILE_KEYS = Node(keys="file", data_disk=False, runtimes=("container",))


def config(node: Node, name: str) -> Any:
    return next(json.loads(entry.content) for entry in tree(node) if entry.path == f"{node.etc}/{name}.cfg")


def written(node: Node, root: Path) -> Path:
    write(tree(node), root)
    return root / node.etc.lstrip("/")


@pytest.mark.parametrize("node", [MAIN, FILE_KEYS, Node(keys="optee", components=("cm", "sm", "iam", "mp"))])
def test_daemons_of_the_main_node_take_them(node: Node, tmp_path: Path) -> None:
    etc = written(node, tmp_path)
    cm: CmConfig = load_cm(etc / "cm.cfg")
    assert cm.dns_ip == "10.0.0.100" and cm.file_server_url == "main:8094"
    sm = load_sm(etc / "sm.cfg")
    assert sm.cm_server_url == "main:8093"
    for index, runtime in enumerate(sm.runtimes):
        if runtime.plugin == "container":
            where = f"runtimes[{index}].config"
            load_container_config(runtime.config, path=etc / "sm.cfg", where=where, working_dir=sm.working_dir)
    iam = load_iam(etc / "iam.cfg")
    assert "MainNode" in iam.node_info.attrs
    assert [module.id for module in iam.enabled_modules][:5] == ["online", "offline", "iam", "sm", "cm"]


def test_daemons_of_a_secondary_node_take_them(tmp_path: Path) -> None:
    etc = written(Node(kind="secondary"), tmp_path)
    assert load_sm(etc / "sm.cfg").cm_server_url == "localhost:8093"


def test_what_our_daemons_cannot_do_yet_is_written_as_the_facts_say(tmp_path: Path) -> None:
    """Each line here falls away with the daemon that learns it."""
    etc = written(Node(kind="secondary"), tmp_path)
    with pytest.raises(ConfigError, match="Secondary Nodes are not supported yet"):
        load_iam(etc / "iam.cfg")
    assert importlib.util.find_spec("aoscore.mp.config") is None, "feed mp.cfg to MP's reader"
    # IAM's and SM's readers take the sections; what they name is refused where it is built.
    assert config(MAIN, "iam")["certModules"][0]["plugin"] == "pkcs11module"
    assert [runtime["plugin"] for runtime in config(MAIN, "sm")["runtimes"]] == ["container", "rootfs", "boot"]


def test_values_that_differ_by_node() -> None:
    main, secondary = config(MAIN, "iam"), config(Node(kind="secondary", components=("sm", "iam")), "iam")
    assert main["nodeInfo"]["attrs"] == {"MainNode": "", "AosComponents": "cm,iam,sm"}
    assert secondary["nodeInfo"]["attrs"] == {"AosComponents": "iam,sm"}
    assert [part["name"] for part in main["nodeInfo"]["partitions"]] == ["storages", "states", "workdirs", "var"]
    assert [part["name"] for part in secondary["nodeInfo"]["partitions"]] == ["workdirs", "var"]
    assert "mainIamPublicServerUrl" not in main
    assert secondary["mainIamPublicServerUrl"] == "main:8090"
    assert secondary["mainIamProtectedServerUrl"] == "main:8089"
    assert main["identifier"]["plugin"] == "fileidentifier" and "identifier" not in secondary


def test_certificate_sets() -> None:
    def modules(node: Node) -> dict[str, Any]:
        return {module["id"]: module for module in config(node, "iam")["certModules"]}

    main, secondary = modules(MAIN), modules(Node(kind="secondary"))
    assert list(main) == ["online", "offline", "iam", "sm", "cm", "diskencryption"]
    assert list(secondary) == ["iam", "sm", "diskencryption"]
    assert [(module["algorithm"], module["maxItems"]) for module in main.values()] == [
        ("ecc", 2),
        ("rsa", 5),
        ("ecc", 2),
        ("ecc", 2),
        ("ecc", 2),
        ("rsa", 1),
    ]
    assert {name for name, module in main.items() if module["params"]["tokenLabel"] == "aoscloud"} == {
        "online",
        "offline",
    }
    assert secondary["sm"]["extendedKeyUsage"] == ["clientAuth"] and "alternativeNames" not in secondary["sm"]
    assert secondary["iam"]["alternativeNames"] == ["secondary", "localhost"], "its MP's servers are called localhost"
    assert main["diskencryption"]["selfSigned"] is True
    assert "userPinPath" not in modules(Node(keys="optee"))["iam"]["params"]


def test_secondary_node_with_and_without_mp() -> None:
    by_mp, direct = Node(kind="secondary"), Node(kind="secondary", components=("sm", "iam"))
    assert config(by_mp, "iam")["mainIamPublicServerUrl"] == "localhost:8190"
    assert config(by_mp, "sm")["cmServerUrl"] == "localhost:8093"
    assert config(direct, "sm")["cmServerUrl"] == "main:8093"
    assert config(by_mp, "mp")["role"] == "node"
    assert config(by_mp, "mp")["transport"] == {"type": "auto", "connect": "main:30001"}
    gateway = config(Node(components=("cm", "sm", "iam", "mp")), "mp")
    assert gateway["role"] == "gateway" and gateway["transport"]["listen"] == "0.0.0.0:30001"


def test_component_runtimes_have_the_product_prefix() -> None:
    types = [runtime["type"] for runtime in config(Node(runtime_prefix="vm-1.0.0-main-x-"), "sm")["runtimes"]]
    assert types == ["crun", "vm-1.0.0-main-x-rootfs", "vm-1.0.0-main-x-boot"]


def test_detection_is_overridden_only_by_what_is_given() -> None:
    assert "architecture" not in config(MAIN, "iam")["nodeInfo"]
    info = config(Node(architecture="arm64", os="linux", os_version="5.1"), "iam")["nodeInfo"]
    assert (info["architecture"], info["os"], info["osVersion"]) == ("arm64", "linux", "5.1")
