from pathlib import Path

import pytest

from aoscore.common.errors import FailedError, NotFoundError
from aoscore.common.types import ArchInfo, CPUInfo, OSInfo
from aoscore.iam.config import NodeInfoConfig, PartitionConfig
from aoscore.iam.currentnode.hardware import (
    oci_architecture,
    read_cpus,
    read_node_id,
    read_os,
    read_partition,
    read_total_ram,
)

AMD64 = ArchInfo("amd64")


def block(**pairs: object) -> str:
    return "".join(f"{key.replace('_', ' ')}\t: {value}\n" for key, value in pairs.items()) + "\n"


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Path:
    return tmp_path / "cpuinfo"


def cpus(cpuinfo: Path, tmp_path: Path, *, machine: str = "x86_64", **config: str) -> tuple[CPUInfo, ...]:
    return read_cpus(
        NodeInfoConfig(cpu_info_path=cpuinfo, **config),  # type: ignore[arg-type]
        machine=machine,
        topology=tmp_path / "topology",
        model=tmp_path / "model",
    )


def make_topology(tmp_path: Path, *places: tuple[int, int]) -> None:
    for number, (package, core) in enumerate(places):
        directory = tmp_path / f"topology/cpu{number}/topology"
        directory.mkdir(parents=True)
        (directory / "physical_package_id").write_text(f"{package}\n")
        (directory / "core_id").write_text(f"{core}\n")
    (tmp_path / "topology/cpufreq").mkdir()


def test_packages_of_cpuinfo(cpuinfo: Path, tmp_path: Path) -> None:
    one = {"model_name": "Big One", "physical_id": 0, "siblings": 4, "cpu_cores": 2, "cpu_family": 6}
    other = {**one, "physical_id": 1, "model_name": "Little One", "siblings": 1, "cpu_cores": 1}
    cpuinfo.write_text(
        "".join(block(processor=number, **cpu) for number, cpu in enumerate([one, one, one, one, other]))
    )
    assert cpus(cpuinfo, tmp_path) == (
        CPUInfo("Big One", 2, 4, AMD64),
        CPUInfo("Little One", 1, 1, AMD64),
    )


def test_blocks_without_blank_lines_begin_with_processor(cpuinfo: Path, tmp_path: Path) -> None:
    cpuinfo.write_text("".join(f"processor: {number}\nphysical id: {number}\n" for number in range(3)))
    assert cpus(cpuinfo, tmp_path) == (CPUInfo("", 1, 1, AMD64),) * 3


@pytest.mark.parametrize("text", [None, "", "nonsense\n", "processor: 0\nphysical id: text\n"])
def test_without_usable_cpuinfo_there_is_one_cpu(cpuinfo: Path, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        cpuinfo.write_text(text)
    assert cpus(cpuinfo, tmp_path) == (CPUInfo("", 1, 1, AMD64),)


def test_arm_machine_is_read_from_topology_and_device_tree(cpuinfo: Path, tmp_path: Path) -> None:
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 48.00\n\nprocessor\t: 1\nBogoMIPS\t: 48.00\n\n")
    make_topology(tmp_path, (-1, 0), (-1, 0), (-1, 1), (1, 5))
    (tmp_path / "model").write_bytes(b"Some Board Rev 3\0")
    assert cpus(cpuinfo, tmp_path, machine="aarch64") == (
        CPUInfo("Some Board Rev 3", 2, 3, ArchInfo("arm64")),
        CPUInfo("Some Board Rev 3", 1, 1, ArchInfo("arm64")),
    )


@pytest.mark.parametrize(
    ("machine", "config", "arch"),
    [
        ("armv7l", {}, ArchInfo("arm", "v7")),
        ("armv7l", {"architecture": "arm64"}, ArchInfo("arm64")),
        ("aarch64", {"architecture_variant": "v8"}, ArchInfo("arm64", "v8")),
        ("x86_64", {"architecture": "arm64", "architecture_variant": "v8"}, ArchInfo("arm64", "v8")),
        ("something", {}, ArchInfo("something")),
    ],
)
def test_configured_architecture_wins(
    cpuinfo: Path, tmp_path: Path, machine: str, config: dict[str, str], arch: ArchInfo
) -> None:
    assert [cpu.arch_info for cpu in cpus(cpuinfo, tmp_path, machine=machine, **config)] == [arch]


def test_machine_names() -> None:
    assert oci_architecture("i686") == ArchInfo("386")
    assert oci_architecture("riscv64") == ArchInfo("riscv64")


def test_node_id_is_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "id"
    path.write_text("abc \nmore\n")
    assert read_node_id(path) == "abc"
    path.write_text("\nabc")
    with pytest.raises(NotFoundError, match="first line is empty"):
        read_node_id(path)
    with pytest.raises(NotFoundError, match="none"):
        read_node_id(tmp_path / "none")


def test_total_ram(tmp_path: Path) -> None:
    path = tmp_path / "meminfo"
    path.write_text("MemFree: 1 kB\nMemTotal:       24683656 kB\n")
    assert read_total_ram(path) == 24683656 * 1024
    path.write_text("")
    with pytest.raises(FailedError, match="no line MemTotal"):
        read_total_ram(path)
    with pytest.raises(NotFoundError):
        read_total_ram(tmp_path / "none")


def test_operating_system(tmp_path: Path) -> None:
    release = tmp_path / "os-release"
    assert read_os(NodeInfoConfig(), release) == OSInfo("linux")
    release.write_text('NAME="Poky"\nVERSION_ID="5.0.4"\n')
    assert read_os(NodeInfoConfig(), release) == OSInfo("linux", "5.0.4")
    assert read_os(NodeInfoConfig(os_version="7"), release) == OSInfo("linux", "7")
    assert read_os(NodeInfoConfig(os="zephyr"), release) == OSInfo("zephyr")


def test_partition(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    part = read_partition(PartitionConfig(name="p", path=tmp_path, types=("storages",)))
    assert part.total_size > 0 and part.types == ("storages",) and part.path == str(tmp_path)
    assert not caplog.records
    assert read_partition(PartitionConfig(name="p", path=tmp_path / "none")).total_size == 0
    assert "name=p" in caplog.text
