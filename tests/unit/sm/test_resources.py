"""Node resources: reading the file, looking things up on the host."""

import json
import os
from pathlib import Path

import msgspec
import pytest

from aoscore.common.errors import ConfigError
from aoscore.common.oci import ResourceRef
from aoscore.common.types import InstanceIdent, ResourceInfo
from aoscore.sm.resourcemanager.resources import (
    Change,
    HostConfig,
    ResourceConfig,
    ResourceError,
    Resources,
    UdevConfig,
    load_resources,
)


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "resources.cfg"
    path.write_text(
        json.dumps(
            [
                {"Name": "camera", "sharedCount": 2, "groups": ["root"], "devices": ["/dev/null:/dev/cam:rw"]},
                {"name": "dns", "hosts": [{"ip": "10.0.0.1", "hostName": "dns.local"}]},
            ]
        )
    )
    resources = load_resources(path)
    assert resources.infos() == (ResourceInfo("camera", 2), ResourceInfo("dns"))
    [granted] = resources.grant([ResourceRef("camera", "r")])
    [device] = granted.devices
    assert (granted.gids, device.path, device.type, device.access) == ((0,), "/dev/cam", "c", "r")
    assert (device.major, device.minor) == (1, 3)
    assert resources.hosts([ResourceRef("dns")]) == (HostConfig("10.0.0.1", "dns.local"),)


def test_no_file_means_no_resources(tmp_path: Path) -> None:
    assert load_resources(tmp_path / "none").infos() == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"name": "a"}, {"name": "a"}]', "'a' is there twice"),
        ('[{"name": "a", "device": []}]', r"unknown key '\[0\].device'"),
        ("[{}]", "missing required field `name`"),
    ],
)
def test_bad_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "resources.cfg"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_resources(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ResourceConfig("r", groups=("no-such-group",)), "resource r: the host has no group 'no-such-group'"),
        (ResourceConfig("r", devices=("/dev/no-such",)), "resource r: the host has no device /dev/no-such"),
    ],
)
def test_missing_on_the_host(
    config: ResourceConfig, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "resources.cfg"
    path.write_bytes(msgspec.json.encode([config]))
    resources = load_resources(path)
    assert message in caplog.text and resources.problems() == {"r": message}
    with pytest.raises(ResourceError, match=message):
        resources.grant([ResourceRef("r")])


def test_what_is_no_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="is no device"):
        Resources([ResourceConfig("r", devices=(str(tmp_path / "file"),))]).grant([ResourceRef("r")])
    with pytest.raises(ResourceError, match="'x' are not out of"):
        Resources([ResourceConfig("r")]).grant([ResourceRef("r", "x")])
    with pytest.raises(ResourceError, match="no resource 'other'"):
        Resources([]).grant([ResourceRef("other")])


def test_directory_of_devices_is_walked(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "sub" / "null").symlink_to("/dev/null")
    [granted] = Resources([ResourceConfig("r", devices=(f"{tmp_path}:/dev/in",))]).grant([ResourceRef("r", "rw")])
    assert [(node.path, node.type) for node in granted.devices] == [("/dev/in/pipe", "p"), ("/dev/in/sub/null", "c")]


def test_no_more_share_a_resource_than_may() -> None:
    resources = Resources([ResourceConfig("camera", shared_count=2), ResourceConfig("free")])
    idents = [InstanceIdent("item", "subject", number) for number in range(4)]
    resources.allocate("a", idents[0], ["camera", "free"])
    resources.adopt("b", idents[1], ["camera", "no longer in the file"])
    resources.allocate("a", idents[0], ["camera"])
    with pytest.raises(ResourceError, match="resource camera may be shared by 2 and is by 2") as caught:
        resources.allocate("c", idents[2], ["free", "camera"])
    assert caught.value.resource == "camera"
    with pytest.raises(ResourceError, match="no resource 'printer'"):
        resources.allocate("c", idents[2], ["printer"])
    resources.release("b")
    resources.release("b")
    resources.allocate("c", idents[2], ["camera"])


def test_what_comes_and_goes_is_noticed_once(tmp_path: Path) -> None:
    """A device node stands in for a device; only its number tells one from another."""
    link = tmp_path / "device"
    ident = InstanceIdent("item", "subject", 0)
    resources = Resources([ResourceConfig("camera", devices=(f"{link}:/dev/cam",)), ResourceConfig("other")])
    assert resources.have_devices() and not Resources([ResourceConfig("other")]).have_devices()
    assert resources.check() == [] and list(resources.problems()) == ["camera"]
    link.symlink_to("/dev/null")
    assert resources.check() == [Change("camera")]
    resources.allocate("a", ident, ["camera"])
    assert resources.check() == []
    link.unlink()
    gone = f"resource camera: the host has no device {link}"
    assert resources.check() == [Change("camera", gone, holders=(ident,))]
    assert resources.check() == []
    link.symlink_to("/dev/null")
    assert resources.check() == [Change("camera", holders=(ident,))], "the same as before"
    link.unlink()
    link.symlink_to("/dev/zero")
    assert resources.check() == [Change("camera", renewed=True, holders=(ident,))]


def test_devices_by_udev_properties() -> None:
    found = UdevConfig({"SUBSYSTEM": "mem", "DEVNAME": "/dev/null"}, "/dev/nothing")
    [granted] = Resources([ResourceConfig("nothing", udev=(found,))]).grant([ResourceRef("nothing", "rw")])
    [device] = granted.devices
    assert (device.path, device.type, device.major, device.minor, device.access) == ("/dev/nothing", "c", 1, 3, "rw")
    every = UdevConfig({"SUBSYSTEM": "mem"})
    [granted] = Resources([ResourceConfig("all", udev=(every,))]).grant([ResourceRef("all", "r")])
    assert {"/dev/null", "/dev/zero"} <= {device.path for device in granted.devices}


@pytest.mark.parametrize(
    ("udev", "message"),
    [
        (UdevConfig({"SUBSYSTEM": "mem", "ID_VENDOR_ID": "0403"}), "no device with SUBSYSTEM=mem, ID_VENDOR_ID=0403"),
        (UdevConfig({"SUBSYSTEM": "mem"}, "/dev/one"), "have SUBSYSTEM=mem, only one can be /dev/one"),
    ],
)
def test_udev_properties_that_do_not_fit(udev: UdevConfig, message: str) -> None:
    with pytest.raises(ResourceError, match=message):
        Resources([ResourceConfig("x", udev=(udev,))]).grant([ResourceRef("x")])
