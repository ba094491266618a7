"""Configuration files as the daemons read them."""

import json
from pathlib import Path
from typing import Any

import pytest

from aoscore.cm.config import Config as CmConfig
from aoscore.cm.config import load as load_cm
from aoscore.ctl.target import Node, tree, write
from aoscore.iam import app as iam_app
from aoscore.iam.certhandler.tokenstore import TokenStoreParams
from aoscore.iam.config import load as load_iam
from aoscore.mp.config import load as load_mp
from aoscore.sm import app as sm_app
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
    assert cm.file_server_addresses == ("10.0.0.100",)
    sm = load_sm(etc / "sm.cfg")
    assert sm.cm_server_url == "main:8093"
    for index, runtime in enumerate(sm.runtimes):
        if runtime.plugin == "container":
            where = f"runtimes[{index}].config"
            load_container_config(runtime.config, path=etc / "sm.cfg", where=where, working_dir=sm.working_dir)
    iam = load_iam(etc / "iam.cfg")
    assert "MainNode" in iam.node_info.attrs
    assert [module.id for module in iam.enabled_modules][:5] == ["online", "offline", "iam", "sm", "cm"]


@pytest.mark.parametrize("components", [("sm", "iam", "mp"), ("sm", "iam")])
def test_daemons_of_a_secondary_node_take_them(components: tuple[str, ...], tmp_path: Path) -> None:
    etc = written(Node(kind="secondary", components=components), tmp_path)
    by_mp = "mp" in components
    assert load_sm(etc / "sm.cfg").runtimes
    iam = iam_app.load(etc / "iam.cfg")
    assert iam.config.main_iam_public_server_url == ("localhost:8190" if by_mp else "main:8090")
    assert set(iam.stores) == {"iam", "sm", "diskencryption"}
    if by_mp:
        assert load_mp(etc / "mp.cfg").role == "node"


def test_keys_and_runtimes_are_taken_with_their_sections(tmp_path: Path) -> None:
    etc = written(Node(components=("cm", "sm", "iam", "mp")), tmp_path)
    assert all(isinstance(store, TokenStoreParams) for store in iam_app.load(etc / "iam.cfg").stores.values())
    assert [kind for kind, _ in sm_app.load(etc / "sm.cfg").runtimes] == ["crun", "rootfs", "boot"]
    assert load_mp(etc / "mp.cfg").role == "gateway"


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
    # Where guests of Xen's toolstack may write, and where the Zephyr application looks.
    assert gateway["vchan"]["xsRxPath"] == "data/vchan/aos/rx"
    assert config(Node(kind="secondary", vchan_path="tmp/vchan/aos"), "mp")["vchan"]["xsTxPath"] == "tmp/vchan/aos/tx"


def test_component_runtimes_have_the_product_prefix() -> None:
    types = [runtime["type"] for runtime in config(Node(runtime_prefix="vm-1.0.0-main-x-"), "sm")["runtimes"]]
    assert types == ["crun", "vm-1.0.0-main-x-rootfs", "vm-1.0.0-main-x-boot"]


def test_detection_is_overridden_only_by_what_is_given() -> None:
    assert "architecture" not in config(MAIN, "iam")["nodeInfo"]
    info = config(Node(architecture="arm64", os="linux", os_version="5.1"), "iam")["nodeInfo"]
    assert (info["architecture"], info["os"], info["osVersion"]) == ("arm64", "linux", "5.1")
