"""The OCI spec against the one that AosCore 9.1 wrote, and rule by rule."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aoscore.common.errors import InvalidArgumentError
from aoscore.common.oci import ImageConfig, ItemConfig, ProcessConfig, Quotas
from aoscore.common.types import EnvVar, InstanceIdent, InstanceInfo
from aoscore.sm.launcher.runtimes.container.config import DiskSpeed
from aoscore.sm.launcher.runtimes.container.seccomp import default_profile
from aoscore.sm.launcher.runtimes.container.spec import (
    CpuCapacity,
    SpecInput,
    build_spec,
    check_platform,
    cpu_quota_us,
    override_statuses,
)
from aoscore.sm.resourcemanager.resources import DeviceNode, GrantedResource, MountConfig

RECORDED = Path(__file__).parents[5] / "data" / "sm" / "container-config.json"
IDENT = InstanceIdent("11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222", 0)
ID = "b2f1ae96-7078-327f-96c5-f93a950662af"


def spec_input(**changes: Any) -> SpecInput:
    source = SpecInput(
        info=InstanceInfo(IDENT, "1.0.0", "sha256:00", "owner", "runtime", uid=5000, gid=5000),
        image=ImageConfig(
            config=ProcessConfig(
                env=("A=B",),
                entrypoint=("/bin/sh",),
                cmd=("-c", "echo hello from svc; while true; do sleep 5; date; done"),
            )
        ),
        item=ItemConfig(
            hostname="svc1", quotas=Quotas(cpu_dmips_limit=1000, ram_limit=67108864, pids_limit=50, tmp_limit=1048576)
        ),
        rootfs=Path(f"/run/aos/runtime/{ID}/rootfs"),
        cgroup=f"/system.slice/system-aos.slice/system-aos-service.slice/{ID}",
        cpu=CpuCapacity(cores=2, max_dmips=10000),
        netns=Path(f"/run/netns/{ID}"),
        secret="e8e28637-a689-443a-81bc-7ebc303ce920",
        host_files=(Path("/etc/nsswitch.conf"), Path("/etc/ssl")),
    )
    return msgspec.structs.replace(source, **changes)


def test_equals_the_recorded_spec() -> None:
    spec = build_spec(spec_input())
    spec["process"]["env"].remove(f"AOS_SERVICE_ID={IDENT.item_id}")
    recorded = json.loads(RECORDED.read_bytes())
    # So that the control group's limit is the one that is reached, and counted.
    [processes] = [limit for limit in spec["process"]["rlimits"] if limit["type"] == "RLIMIT_NPROC"]
    assert processes["hard"] == processes["soft"] == 51
    processes |= {"hard": 50, "soft": 50}
    # When memory is short, services go before the software of the node.
    assert spec["process"].pop("oomScoreAdj") == 500
    assert (spec.pop("ociVersion"), recorded.pop("ociVersion")) == ("1.0.2", "1.2.0")
    assert spec == recorded


@pytest.mark.parametrize(
    ("os", "architecture", "node", "refused"),
    [
        ("linux", "amd64", {"amd64"}, ""),
        ("", "", {"amd64"}, ""),
        ("linux", "amd64", {"x86_64"}, ""),
        ("linux", "386", {"amd64"}, ""),
        ("linux", "arm", {"aarch64"}, ""),
        ("linux", "riscv64", set(), ""),
        ("windows", "amd64", {"amd64"}, "for 'windows', this node runs linux"),
        ("linux", "arm64", {"amd64"}, "for 'arm64', this node has 386, amd64"),
        ("linux", "amd64", {"arm64"}, "for 'amd64', this node has arm, arm64"),
    ],
)
def test_image_for_another_machine(os: str, architecture: str, node: set[str], refused: str) -> None:
    image = ImageConfig(os=os, architecture=architecture)
    if not refused:
        check_platform(image, node)
        return
    with pytest.raises(InvalidArgumentError, match=refused):
        check_platform(image, node)


def test_user_namespace_knows_nobody_but_the_service() -> None:
    resource = GrantedResource("audio", gids=(29, 5))
    spec = build_spec(spec_input(user_base=700000, resources=(resource,)))
    assert {"type": "user"} in spec["linux"]["namespaces"]

    def pairs(name: str) -> list[tuple[int, int]]:
        assert all(one["size"] == 1 for one in spec["linux"][name])
        return [(one["containerID"], one["hostID"]) for one in spec["linux"][name]]

    assert pairs("uidMappings") == [(0, 700000), (5000, 5000)]
    assert pairs("gidMappings") == [(0, 700000), (5, 5), (29, 29), (5000, 5000)]
    # Root inside is never root of the node.
    info = msgspec.structs.replace(spec_input().info, uid=0, gid=0)
    spec = build_spec(spec_input(user_base=700000, info=info))
    assert pairs("uidMappings") == [(0, 700000)] and pairs("gidMappings") == [(0, 700000), (5, 700005)]


def test_item_can_do_without_capabilities() -> None:
    item = ItemConfig(drop_capabilities=("CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SYS_ADMIN"))
    kinds = build_spec(spec_input(item=item))["process"]["capabilities"]
    assert kinds == {kind: ["CAP_AUDIT_WRITE"] for kind in ("bounding", "effective", "permitted")}


def test_limits_of_the_node() -> None:
    limits = build_spec(spec_input(item=ItemConfig()))["linux"]["resources"]
    assert "pids" not in limits and "blockIO" not in limits
    speed = DiskSpeed(write_bytes_per_s=1000, reads_per_s=10)
    few = build_spec(spec_input(capabilities=("CAP_KILL",)))["process"]["capabilities"]
    assert few == {key: ["CAP_KILL"] for key in ("bounding", "effective", "permitted")}
    more = spec_input(item=ItemConfig(), default_pids_limit=100, disk_speed=speed, disks=((8, 0), (259, 1)))
    limits = build_spec(more)["linux"]["resources"]
    assert limits["pids"] == {"limit": 100}
    assert limits["blockIO"] == {
        "throttleWriteBpsDevice": [
            {"major": 8, "minor": 0, "rate": 1000},
            {"major": 259, "minor": 1, "rate": 1000},
        ],
        "throttleReadIOPSDevice": [{"major": 8, "minor": 0, "rate": 10}, {"major": 259, "minor": 1, "rate": 10}],
    }
    # The item's own limit holds, and so does 0.
    own = msgspec.structs.replace(more, item=ItemConfig(quotas=Quotas(pids_limit=5)), disks=())
    assert build_spec(own)["linux"]["resources"] == {"devices": limits["devices"], "pids": {"limit": 5}}


def test_later_variable_replaces_earlier_in_place() -> None:
    info = msgspec.structs.replace(spec_input().info, env_vars=(EnvVar("A", "override"), EnvVar("NEW", "1=2")))
    env = build_spec(spec_input(info=info))["process"]["env"]
    assert env[env.index("A=override") + 1].startswith("AOS_SECRET=")
    assert env[-1] == "NEW=1=2"
    assert "A=B" not in env


def test_bad_override_is_reported_and_left_out() -> None:
    overrides = (EnvVar("", "x"), EnvVar("a=b", "x"), EnvVar("OK", ""))
    info = msgspec.structs.replace(spec_input().info, env_vars=overrides)
    assert build_spec(spec_input(info=info))["process"]["env"][-1] == "OK="
    assert [(status.name, status.error is None) for status in override_statuses(overrides)] == [
        ("", False),
        ("a=b", False),
        ("OK", True),
    ]


def test_resources_give_groups_mounts_variables_devices() -> None:
    resource = GrantedResource(
        name="camera",
        gids=(44, 5),
        mounts=(MountConfig("/proc", source="/elsewhere"), MountConfig("/data", "tmpfs", "tmpfs", ("ro",))),
        env=("CAMERA=1",),
        devices=(
            DeviceNode("/dev/video0", "c", 81, 0, 0o660, 0, 44, "rw"),
            DeviceNode("/dev/pipe", "p", 0, 0, 0o600, 0, 0, "r"),
        ),
    )
    spec = build_spec(spec_input(resources=[resource]))
    assert spec["process"]["user"]["additionalGids"] == [5, 44]
    assert spec["process"]["env"][-1] == "CAMERA=1"
    assert spec["mounts"][0] == {"destination": "/proc", "type": "bind", "source": "/elsewhere"}
    assert spec["mounts"][-1] == {"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]}
    assert spec["linux"]["resources"]["devices"] == [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "major": 81, "minor": 0, "access": "rw"},
    ]
    assert spec["linux"]["devices"][0]["fileMode"] == 0o660
    assert "major" not in spec["linux"]["devices"][1]


def test_state_and_storage_are_bound_writable() -> None:
    spec = build_spec(spec_input(state=Path("/var/s/1"), storage=Path("/var/t/1")))
    assert [(mount["destination"], mount["source"], mount["options"]) for mount in spec["mounts"][-2:]] == [
        ("/state.dat", "/var/s/1", ["bind", "rw"]),
        ("/storage", "/var/t/1", ["bind", "rw"]),
    ]


def test_without_hostname_the_instance_id_is_the_host_name() -> None:
    assert build_spec(spec_input(item=ItemConfig()))["hostname"] == ID


def test_without_own_network_there_is_no_network_namespace() -> None:
    namespaces = build_spec(spec_input(netns=None))["linux"]["namespaces"]
    assert "network" not in {namespace["type"] for namespace in namespaces}


@pytest.mark.parametrize("destination", ["relative", "/a/../etc", ""])
def test_mount_outside_is_refused(destination: str) -> None:
    resource = GrantedResource(name="bad", mounts=(MountConfig(destination, source="/x"),))
    with pytest.raises(InvalidArgumentError, match="mount destination"):
        build_spec(spec_input(resources=[resource]))


def test_image_without_program_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="names no program"):
        build_spec(spec_input(image=ImageConfig()))


def test_cpu_quota() -> None:
    assert cpu_quota_us(1000, CpuCapacity(2, 10000)) == 20000
    assert cpu_quota_us(1, CpuCapacity(4, 10000)) == 1000
    assert cpu_quota_us(5000, CpuCapacity(0, 10000)) == 50000
    with pytest.raises(InvalidArgumentError, match="DMIPS"):
        cpu_quota_us(1000, CpuCapacity(2, 0))


def test_seccomp_profile_knows_the_second_architecture() -> None:
    spec = build_spec(spec_input(seccomp=default_profile("x86_64")))
    assert "SCMP_ARCH_X86" in spec["linux"]["seccomp"]["architectures"]
    assert "architectures" not in default_profile("riscv64")
