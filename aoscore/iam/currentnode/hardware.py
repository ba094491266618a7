"""What the Node is made of: CPUs, RAM, architecture, operating system (iam.md §3.1).

Everything the configuration does not say is read from the kernel's files. Their roots are arguments, so that tests
can show any machine.
"""

import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from aoscore.common.aio import log_and_continue
from aoscore.common.errors import FailedError, NotFoundError
from aoscore.common.log import kv
from aoscore.common.types import ArchInfo, CPUInfo, OSInfo, PartitionInfo
from aoscore.iam.config import NodeInfoConfig, PartitionConfig

_log = logging.getLogger(__name__)

# Names of uname(2) in the words of OCI images.
_ARCHITECTURES = {
    "x86_64": ArchInfo("amd64"),
    "i386": ArchInfo("386"),
    "i586": ArchInfo("386"),
    "i686": ArchInfo("386"),
    "aarch64": ArchInfo("arm64"),
    "armv8l": ArchInfo("arm", "v8"),
    "armv7l": ArchInfo("arm", "v7"),
    "armv6l": ArchInfo("arm", "v6"),
    "riscv64": ArchInfo("riscv64"),
}
_CPU_TOPOLOGY = Path("/sys/devices/system/cpu")
_DEVICE_TREE_MODEL = Path("/sys/firmware/devicetree/base/model")
_OS_RELEASE = Path("/etc/os-release")
_CPU_DIR = re.compile(r"cpu\d+")


def oci_architecture(machine: str) -> ArchInfo:
    """Architecture in the words of OCI images for a machine name of uname(2); an unknown name stays as it is."""
    return _ARCHITECTURES.get(machine, ArchInfo(machine))


def read_node_id(path: Path) -> str:
    """First line of the file. Raises NotFoundError when there is none: a Node without id can't work."""
    try:
        text = path.read_text()
    except OSError as error:
        raise NotFoundError(f"can't read the Node id from {path}: {error.strerror}") from error
    node_id = text.split("\n", 1)[0].strip()
    if not node_id:
        raise NotFoundError(f"can't read the Node id from {path}: the first line is empty")
    return node_id


def read_total_ram(path: Path) -> int:
    """Bytes of RAM of the line MemTotal. Raises NotFoundError without the file, FailedError without the line."""
    try:
        text = path.read_text()
    except OSError as error:
        raise NotFoundError(f"can't read the size of RAM from {path}: {error.strerror}") from error
    match = re.search(r"^MemTotal:\s*(\d+)\s*kB", text, re.MULTILINE)
    if match is None:
        raise FailedError(f"can't read the size of RAM from {path}: it has no line MemTotal")
    return int(match[1]) * 1024


def read_cpus(
    config: NodeInfoConfig,
    *,
    machine: str | None = None,
    topology: Path = _CPU_TOPOLOGY,
    model: Path = _DEVICE_TREE_MODEL,
) -> tuple[CPUInfo, ...]:
    """CPU packages of the Node, at least one.

    cpuinfo names packages on x86 only; elsewhere the kernel's topology does, and the model is that of the board.
    """
    detected = oci_architecture(machine or platform.machine())
    arch = ArchInfo(config.architecture or detected.architecture, detected.variant)
    if config.architecture is not None or config.architecture_variant is not None:
        # A variant that was detected belongs to the detected architecture only.
        arch = ArchInfo(arch.architecture, config.architecture_variant or "")
    text = ""
    with log_and_continue(_log, f"Can't read CPUs from {config.cpu_info_path}"):
        text = config.cpu_info_path.read_text(errors="replace")
    packages = _cpuinfo_packages(text) or _topology_packages(topology, _device_tree_text(model))
    return tuple(CPUInfo(name, cores, threads, arch) for name, cores, threads in packages or [("", 1, 1)])


def _cpuinfo_packages(text: str) -> list[tuple[str, int, int]]:
    """(model, cores, threads) of each physical id, first block of each; empty when the file names no packages."""
    packages: dict[int, tuple[str, int, int]] = {}
    for block in _cpuinfo_blocks(text):
        try:
            package = int(block["physical id"])
            if package not in packages:
                cores = int(block.get("cpu cores", "1"))
                packages[package] = (block.get("model name", ""), cores, int(block.get("siblings", "1")))
        except (KeyError, ValueError):
            break
    return list(packages.values())


def _cpuinfo_blocks(text: str) -> Iterator[Mapping[str, str]]:
    block: dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = (part.strip() for part in line.partition(":"))
        if (not separator or key == "processor") and block:
            yield block
            block = {}
        if separator:
            block[key] = value
    if block:
        yield block


def _topology_packages(topology: Path, model: str) -> list[tuple[str, int, int]]:
    cores: dict[int, set[int]] = {}
    threads: dict[int, int] = {}
    for cpu in sorted(topology.iterdir()) if topology.is_dir() else ():
        try:
            if not _CPU_DIR.fullmatch(cpu.name):
                continue
            # The kernel says -1 where the hardware tells no package.
            package = max(int((cpu / "topology/physical_package_id").read_text()), 0)
            core = int((cpu / "topology/core_id").read_text())
        except (OSError, ValueError):
            continue
        cores.setdefault(package, set()).add(core)
        threads[package] = threads.get(package, 0) + 1
    return [(model, len(cores[package]), threads[package]) for package in sorted(cores)]


def _device_tree_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\0 \n")
    except OSError:
        return ""


def read_os(config: NodeInfoConfig, os_release: Path = _OS_RELEASE) -> OSInfo:
    """Operating system: the configured one, else linux with the version of os-release(5)."""
    if config.os is not None:
        return OSInfo(config.os, config.os_version or "")
    return OSInfo("linux", config.os_version if config.os_version is not None else _os_version(os_release))


def _os_version(os_release: Path) -> str:
    try:
        lines = os_release.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition("=")
        if key == "VERSION_ID":
            return value.strip().strip("\"'")
    return ""


def read_partition(config: PartitionConfig) -> PartitionInfo:
    """A partition with its size in bytes, 0 with a warning when it can't be read."""
    size = 0
    try:
        stat = os.statvfs(config.path)
        size = stat.f_blocks * stat.f_frsize
    except OSError as error:
        _log.warning(kv("Can't read size of partition", name=config.name, path=config.path, error=error.strerror))
    return PartitionInfo(config.name, config.types, size, str(config.path))
