"""Node resources: reading the file, looking things up on the host."""

import json
import os
from pathlib import Path

import pytest

from aoscore.common.errors import ConfigError
from aoscore.common.oci import ResourceRef
from aoscore.common.types import ResourceInfo
from aoscore.sm.resourcemanager.resources import HostConfig, ResourceConfig, ResourceError, Resources, load_resources


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
def test_missing_on_the_host(config: ResourceConfig, message: str, caplog: pytest.LogCaptureFixture) -> None:
    resources = Resources([config])
    with pytest.raises(ResourceError, match=message):
        resources.grant([ResourceRef("r")])
    resources.check()
    assert message in caplog.text


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
