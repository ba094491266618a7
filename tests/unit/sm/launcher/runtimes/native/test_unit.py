"""Properties of a native service's unit, made of the spec that a container would get."""

from pathlib import Path
from typing import Any

import pytest

from aoscore.common.errors import ConfigError
from aoscore.common.oci import ImageConfig, ItemConfig, ProcessConfig, Quotas
from aoscore.common.types import InstanceIdent, InstanceInfo
from aoscore.sm.launcher.runtimes.container.config import DiskSpeed
from aoscore.sm.launcher.runtimes.container.spec import CpuCapacity, SpecInput, build_spec
from aoscore.sm.launcher.runtimes.native.config import load_native_config
from aoscore.sm.launcher.runtimes.native.unit import native_spec, unit_name, unit_properties
from aoscore.sm.resourcemanager.resources import DeviceNode, GrantedResource, MountConfig

INFO = InstanceInfo(InstanceIdent("item", "subject", 0), "1.0.0", "sha256:00", "owner", "runtime", uid=5000, gid=6000)
QUOTAS = Quotas(cpu_dmips_limit=2500, ram_limit=64 << 20, pids_limit=20, no_file_limit=99, tmp_limit=1 << 20)
CAMERA = GrantedResource(
    "camera",
    gids=(44, 7),
    mounts=(MountConfig("/data", "", "/var/camera: a", ("bind", "ro")),),
    devices=(DeviceNode("/dev/video0", "c", 81, 0, 0o660, 0, 44, "rw"), DeviceNode("/f", "p", 0, 0, 0o600, 0, 0, "rw")),
)


def spec(**changes: Any) -> dict[str, Any]:
    return build_spec(
        SpecInput(
            info=INFO,
            image=ImageConfig(config=ProcessConfig(entrypoint=("app",), cmd=("-x", "$HOME", ""), working_dir="/app")),
            item=changes.pop("item", ItemConfig(quotas=QUOTAS)),
            rootfs=Path("/run/b/rootfs"),
            cgroup="",
            cpu=CpuCapacity(2, 10000),
            netns=Path("/run/netns/id"),
            host_files=(Path("/etc/ssl"),),
            state=Path("/var/states/1"),
            **changes,
        )
    )


def properties(source: dict[str, Any]) -> dict[str, tuple[str, tuple[str, ...]]]:
    found = unit_properties(source, "id", ("/usr/bin/crun", "run", "$x", ""))
    assert len({one.name for one in found}) == len(found)
    return {one.name: (one.signature, one.words) for one in found}


def test_limits_are_those_of_a_container() -> None:
    found = properties(spec())
    assert found["MemoryMax"] == ("t", (f"{64 << 20}",))
    assert found["TasksMax"] == ("t", ("20",))
    # 2500 of 10000 DMIPS on two cores: half of one.
    assert (found["CPUQuotaPerSecUSec"], found["CPUQuotaPeriodUSec"]) == (("t", ("500000",)), ("t", ("100000",)))
    unlimited = properties(spec(item=ItemConfig()))
    assert unlimited["MemoryMax"] == unlimited["TasksMax"] == ("t", (f"{2**64 - 1}",))
    assert "CPUQuotaPerSecUSec" not in unlimited
    speed = DiskSpeed(read_bytes_per_s=1000, writes_per_s=10)
    disks = properties(spec(disk_speed=speed, disks=((8, 0), (8, 16))))
    assert disks["IOReadBandwidthMax"] == ("a(st)", ("2", "/dev/block/8:0", "1000", "/dev/block/8:16", "1000"))
    assert disks["IOWriteIOPSMax"] == ("a(st)", ("2", "/dev/block/8:0", "10", "/dev/block/8:16", "10"))
    assert not {"IOWriteBandwidthMax", "IOReadIOPSMax"} & disks.keys()
    assert all(unlimited[f"{what}Accounting"] == ("b", ("true",)) for what in ("CPU", "Memory", "Tasks", "IO"))


def test_unit_runs_the_command_and_outlives_sm() -> None:
    found = properties(spec())
    command = ("1", "/usr/bin/crun", "4", "/usr/bin/crun", "run", "$x", "", "1", "no-env-expand")
    assert found["ExecStartEx"] == ("a(sasas)", command)
    assert (found["Slice"], found["Type"]) == (("s", ("system-aos-service.slice",)), ("s", ("exec",)))
    assert found["SyslogIdentifier"] == ("s", ("id",))
    # Words count themselves, so a wrong number would shift all that follows.
    assert found["DeviceAllow"][1][0] == f"{(len(found['DeviceAllow'][1]) - 1) // 2}"


def test_devices_of_the_items_resources_and_no_others() -> None:
    found = properties(spec(resources=(CAMERA,)))
    assert found["DevicePolicy"] == ("s", ("closed",))
    assert found["DeviceAllow"] == ("a(ss)", ("3", "char-*", "m", "block-*", "m", "/dev/char/81:0", "rw"))
    assert found["DeviceAllow"][1][-2:] not in properties(spec())["DeviceAllow"][1]


def test_crun_does_the_rest_of_the_spec() -> None:
    source = spec(resources=(CAMERA,))
    native = native_spec(source)
    assert native["process"] == source["process"]
    assert native["root"] == source["root"]
    assert [space["type"] for space in native["linux"]["namespaces"]] == ["network", "mount"]
    assert not {"resources", "cgroupsPath"} & native["linux"].keys()
    assert native["linux"]["devices"] == source["linux"]["devices"]
    assert "hostname" not in native
    left_out = [mount["destination"] for mount in source["mounts"] if mount not in native["mounts"]]
    assert left_out == ["/sys/fs/cgroup"]
    assert spec(resources=(CAMERA,)) == source


def test_names_and_configuration(tmp_path: Path) -> None:
    assert unit_name("id") == "aos-service@id.service"
    config = load_native_config({"stopTimeout": "3s"}, path=Path("sm.cfg"), where="config", working_dir=tmp_path)
    container = config.as_container()
    assert (container.stop_timeout_s, container.storage_dir) == (3, tmp_path / "storages")
    assert container.runtime_dir == Path("/run/aos/native")
    with pytest.raises(ConfigError, match=r"sm.cfg: unknown key 'config.crun'"):
        load_native_config({"crun": "x"}, path=Path("sm.cfg"), where="config", working_dir=tmp_path)
