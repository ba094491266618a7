"""A node with two boot partitions and EFI firmware, all of it files."""

import gzip
import json
import sys
import uuid
from pathlib import Path

from aoscore.common.types import InstanceInfo
from aoscore.sm.imagemanager.model import InstalledImage
from aoscore.sm.launcher.runtimes.boot import partitions
from aoscore.sm.launcher.runtimes.boot.config import BootConfig
from aoscore.sm.launcher.runtimes.boot.efi import EfiVariables, Partition, build_numbers, parse_numbers
from aoscore.sm.launcher.runtimes.boot.runtime import BootRuntime
from aoscore.sm.launcher.runtimes.component import read_version
from tests.support.components import NODE, FakeSystem, Lives, image, instance, no_pause

GUID = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
MEDIA_TYPE = "application/vnd.aos.image.component.full.v1+gzip"
PARTITION_BYTES = 3 * 1024 * 1024
NETWORK = 0x0003
"""A load option of somebody else."""


def content(version: str, size: int = PARTITION_BYTES) -> bytes:
    """A boot partition: its version, then bytes that tell it from others up to the end."""
    head = f'VERSION = "{version}"\n'.encode()
    return head + (version.encode() * size)[: size - len(head)]


class BootNode(Lives):
    """The firmware boots what BootNext says, once, or the first of BootOrder; what can't start is skipped."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.work = directory / "boot"
        self.efivars = directory / "efivars"
        self.efivars.mkdir()
        self.partitions = (directory / "part1", directory / "part2")
        for device in self.partitions:
            device.write_bytes(content("1.0.0"))
        self.system = FakeSystem()
        self.broken: set[str] = set()
        self.boots = 0
        self.write("Boot0003", b"\1\0\0\0\4\0N\0e\0t\0\0\0\x7f\xff\4\0")
        with_order = EfiVariables(self.efivars)
        self.entries = [with_order.add(self.identify(device), "/EFI/BOOT/bootx64.efi") for device in self.partitions]
        self.boot()

    # What the runtime asks of a machine

    def devices(self, config: BootConfig) -> tuple[Path, Path]:
        return self.partitions

    def identify(self, device: Path) -> Partition:
        number = self.partitions.index(device)
        return Partition(uuid.uuid5(uuid.NAMESPACE_OID, device.name), number + 1, 2048 * (number + 1), 6144)

    def variables(self) -> EfiVariables:
        return EfiVariables(self.efivars)

    def version(self, device: Path, config: BootConfig) -> str:
        return read_version(device)

    # The firmware

    def read(self, name: str) -> list[int]:
        """A variable that holds numbers."""
        path = self.efivars / f"{name}-{GUID}"
        return parse_numbers(path.read_bytes()[4:]) if path.exists() else []

    def write(self, name: str, data: bytes) -> None:
        """A variable."""
        (self.efivars / f"{name}-{GUID}").write_bytes(b"\7\0\0\0" + data)

    def boot(self) -> None:
        """Reboot, or come up after a power cut."""
        self.boots += 1
        once = self.read("BootNext")
        (self.efivars / f"BootNext-{GUID}").unlink(missing_ok=True)
        for number in [*once, *self.read("BootOrder")]:
            if number in self.entries and self._starts(self.partitions[self.entries.index(number)]):
                self.write("BootCurrent", build_numbers([number]))
                return
        raise AssertionError("nothing boots: the node is lost")

    def _starts(self, device: Path) -> bool:
        """Whole, and not of a version that never starts."""
        version = read_version(device)
        return device.read_bytes() == content(version) and version not in self.broken

    @property
    def running(self) -> str:
        """Version of the partition that was booted."""
        return read_version(self.partitions[self.entries.index(self.read("BootCurrent")[0])])

    # SM

    def runtime(self) -> BootRuntime:
        """SM's next life."""
        config = BootConfig(working_dir=self.work, health_check_services=("a.service",))
        return BootRuntime(
            config, "boot", NODE, self.system, machine=self, boot_id=f"boot {self.boots}", sleep=no_pause
        )

    def update(self, version: str = "2.0.0", data: bytes | None = None) -> tuple[InstanceInfo, InstalledImage]:
        """What CM wants, and its image as the store has it."""
        info = instance(self.runtime().info.runtime_id, version, f"sha256:manifest-{version}")
        packed = gzip.compress(content(version) if data is None else data, mtime=0)
        return info, image(self.directory / f"blob-{version}", info, packed, MEDIA_TYPE)

    def files(self) -> set[str]:
        """Records of SM."""
        return {path.name for path in self.work.iterdir()}

    def installed(self) -> str:
        """Version in the record of what is installed."""
        version: str = json.loads((self.work / "installed.json").read_text())["version"]
        return version

    def are_equal(self) -> bool:
        """Whether both partitions hold the same."""
        first, second = (device.read_bytes() for device in self.partitions)
        return first == second


def announce_writes() -> None:
    """Make each write to a partition or a variable a step that `in_child` can stop before."""
    write_block, write_variable = partitions._write_all, EfiVariables._write

    def block(fd: int, data: bytes, at: int) -> None:
        sys.audit("test.write")
        write_block(fd, data, at)

    def variable(efi: EfiVariables, name: str, data: bytes) -> None:
        sys.audit("test.write")
        write_variable(efi, name, data)

    partitions._write_all = block
    EfiVariables._write = variable  # type: ignore[method-assign]
