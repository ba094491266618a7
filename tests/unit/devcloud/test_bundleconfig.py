"""config.yaml: what is accepted, what is refused by which name, and what the Unit's documents get."""

from typing import Any

import pytest
import yaml

from aoscore.devcloud.bundleconfig import (
    BundleError,
    image_run_config,
    item_config,
    read_config,
    size_bytes,
)

ITEM: dict[str, Any] = {
    "identity": {"type": "service", "codename": "hello"},
    "version": "1.0.0",
    "images": [{"sourceFolder": "rootfs", "archInfo": {"architecture": "amd64"}}],
}


def config(**changes: Any) -> bytes:
    return yaml.safe_dump({"schemaVersion": 2, "items": [{**ITEM, **changes}]}).encode()


def documents(configuration: dict[str, Any], **image: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Item config and image run config of an item with this configuration."""
    images = [{**ITEM["images"][0], **image}]
    item = read_config(config(configuration=configuration, images=images)).items[0]
    names = {"hello-host": "item-1"}
    return item_config(item, "Alice", names.get, "items[0]"), image_run_config(item, item.images[0], "items[0]")


def test_a_minimal_item_gets_the_defaults() -> None:
    item, image = documents({})
    assert item == {
        "author": "Alice",
        "skipResourceLimits": False,
        "balancingPolicy": "enabled",
        "baseLayerIsNodeRootfs": True,
        "runtimes": [{"codename": "runc"}, {"codename": "crun"}],
    }
    assert image == {}


def test_everything_is_translated_to_the_units_names() -> None:
    item, image = documents(
        {
            "env": ["A=1", "B=2"],
            "workingDir": "/item",
            "cmd": "/item --flag",
            "hostname": "h",
            "balancingPolicy": "disabled",
            "baseLayerIsNodeRootfs": False,
            "exposedPorts": [8080, "53/udp", "8089-8090/tcp"],
            "runtimes": [{"codename": "native", "type": "runtime"}],
            "runParameters": {"startInterval": "PT10S", "startBurst": 3, "restartInterval": "PT1M"},
            "offlineTTL": "P1DT2H",
            "resources": [{"name": "camera", "mode": "rw"}, {"name": "bluetooth"}],
            "allowedConnections": ["hello-host/8087:8088/tcp", "somebody/1515/udp", "hello-host/1"],
            "quotas": {
                "cpuLimit": 5000,
                "ramLimit": "512MiB",
                "storageLimit": 1024,
                "stateLimit": "10K",
                "tmpLimit": "1Gi",
                "uploadSpeedLimit": "10K",
                "downloadSpeedLimit": 1001,
                "uploadLimit": "1GB",
                "downloadLimit": "2T",
                "noFileLimit": 16,
                "pidsLimit": 8,
            },
            "alertRules": {
                "ram": {"minTimeout": "PT10S", "minThreshold": 10, "maxThreshold": 80.5},
                "storage": {"minThreshold": 1, "maxThreshold": 2},
                "upload": {"minTimeout": "PT1M", "minThreshold": 100, "maxThreshold": 200},
            },
            "permissions": {"vis": {"Signal.*": "rw"}},
        },
        env=["B=image"],
        workingDir="/image",
        cmd="/bin/sh -c 'echo hi'",
    )
    assert item == {
        "author": "Alice",
        "skipResourceLimits": False,
        "hostname": "h",
        "balancingPolicy": "disabled",
        "baseLayerIsNodeRootfs": False,
        "runtimes": [{"codename": "native"}],
        "offlineTTL": "P1DT2H",
        "resources": [{"name": "camera", "mode": "rw"}, {"name": "bluetooth", "mode": "r"}],
        "permissions": {"vis": {"Signal.*": "rw"}},
        "runParameters": {"startInterval": "PT10S", "startBurst": 3, "restartInterval": "PT1M"},
        "quotas": {
            "cpuDMIPSLimit": 5000,
            "pidsLimit": 8,
            "noFileLimit": 16,
            "ramLimit": 512 << 20,
            "tmpLimit": 1 << 30,
            "stateLimit": 10_000,
            "storageLimit": 1024,
            "uploadLimit": 10**9,
            "downloadLimit": 2 * 10**12,
            "uploadSpeed": 10,
            "downloadSpeed": 2,
        },
        "alertRules": {
            "ram": {"minTimeout": "PT10S", "minThreshold": 10.0, "maxThreshold": 80.5},
            "partitions": [{"name": "storages", "minThreshold": 1.0, "maxThreshold": 2.0}],
            "upload": {"minTimeout": "PT1M", "minThreshold": 100, "maxThreshold": 200},
        },
        "allowedConnections": {"item-1/8087-8088/tcp": {}, "somebody/1515/udp": {}, "item-1/1": {}},
    }
    assert image == {
        "Env": ["A=1", "B=image"],
        "Cmd": ["/bin/sh", "-c", "echo hi"],
        "WorkingDir": "/image",
        "ExposedPorts": {"8080": {}, "53/udp": {}, "8089-8090/tcp": {}},
    }


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (b"{", "config.yaml"),
        (b"- 1", "config.yaml"),
        (b"schemaVersion: 1\nitems: []", "config.yaml.schemaVersion"),
        (b"schemaVersion: 2\nitems: []", "config.yaml.items"),
        (config(version="1.0"), "config.yaml.items[0].version"),
        (config(version=1.5), "config.yaml.items[0].version"),
        (config(version="1.0.0-" + "x" * 40), "config.yaml.items[0].version"),
        (config(identity={"type": "toaster", "codename": "x"}), "config.yaml.items[0].identity.type"),
        (config(identity={"type": "service"}), "config.yaml.items[0].identity"),
        (config(identity={"type": "service", "codename": "../x"}), "config.yaml.items[0].identity.codename"),
        (config(images=[]), "config.yaml.items[0].images"),
        (config(configuration={"skipResourceLimits": True}), "config.yaml.items[0].configuration.skipResourceLimits"),
        (config(configuration={"instances": {"minInstances": 0}}), "config.yaml.items[0].configuration.instances"),
        (config(configuration={"quotas": {"cpuLimit": "many"}}), "config.yaml.items[0].configuration.quotas.cpuLimit"),
    ],
)
def test_a_wrong_file_is_refused_by_its_member(text: bytes, field: str) -> None:
    with pytest.raises(BundleError) as caught:
        read_config(text)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("configuration", "field"),
    [
        ({"quotas": {"ramLimit": "a lot"}}, "items[0].configuration.quotas.ramLimit"),
        ({"offlineTTL": "soon"}, "items[0].configuration.offlineTTL"),
        ({"allowedConnections": ["host"]}, "items[0].configuration.allowedConnections[0]"),
        ({"exposedPorts": ["http"]}, "items[0].exposedPorts"),
        ({"env": ["NAME"]}, "items[0].env"),
        ({"cmd": "unbalanced '"}, "items[0].cmd"),
    ],
)
def test_a_wrong_value_is_refused_by_its_member(configuration: dict[str, Any], field: str) -> None:
    with pytest.raises(BundleError) as caught:
        documents(configuration)
    assert caught.value.field == field


def test_resource_limits_may_be_skipped_before_a_release() -> None:
    item = read_config(config(version="1.0.0-rc.1", configuration={"skipResourceLimits": True})).items[0]
    assert item_config(item, "", dict[str, str]().get, "x")["skipResourceLimits"] is True


@pytest.mark.parametrize(
    ("text", "number"), [(5, 5), ("5", 5), ("1K", 1000), ("1KiB", 1024), ("2 MB", 2_000_000), ("3gi", 3 << 30)]
)
def test_sizes(text: str | int, number: int) -> None:
    assert size_bytes(text, "x") == number
