"""EFI firmware, as far as updates of boot partitions go, for a guest that has none: run there before SM at each boot.

The disk with the partitions is a file, the variables are files that lie where efivarfs would be. A partition is started
when it has a loader; one with a file aos/sick brings up a system whose CM does not work.
"""

import subprocess
from pathlib import Path

from aoscore.sm.launcher.runtimes.boot.efi import EFIVARS, EfiVariables, build_numbers

VARIABLES = Path("/var/aos/efivars")
MOUNT = Path("/run/boot-partition")
CURRENT = VARIABLES / "BootCurrent-8be4df61-93ca-11d2-aa0d-00e098032b8c"
DROP_IN = Path("/run/systemd/system/aos-cm.service.d/sick.conf")


def run(*args: str | Path) -> None:
    subprocess.run(args, check=True)


def main() -> None:
    for directory in (VARIABLES, MOUNT):
        directory.mkdir(exist_ok=True)
    run("losetup", "--partscan", "/dev/loop0", "/var/aos/boot.img")
    run("udevadm", "settle")
    run("mount", "-t", "tmpfs", "tmpfs", "/sys/firmware")
    EFIVARS.mkdir(parents=True)
    run("mount", "--bind", VARIABLES, EFIVARS)
    efi = EfiVariables()
    options, once = efi.entries(), efi.next
    efi.next = None
    CURRENT.unlink(missing_ok=True)
    for number in [*([] if once is None else [once]), *efi.order]:
        partition = Path("/dev/disk/by-partuuid") / str(options[number].partition)
        run("mount", "-t", "vfat", "-o", "ro", partition, MOUNT)
        starts, is_sick = (MOUNT / "efi/boot/bootx64.efi").exists(), (MOUNT / "aos/sick").exists()
        run("umount", MOUNT)
        if starts:
            print(f"boots load option {number}, partition {partition}")
            CURRENT.write_bytes(b"\6\0\0\0" + build_numbers([number]))
            break
    else:
        return
    if is_sick:
        DROP_IN.parent.mkdir(parents=True, exist_ok=True)
        DROP_IN.write_text("[Service]\nExecStart=\nExecStart=/bin/false\nRestart=no\n")
        run("systemctl", "daemon-reload")


if __name__ == "__main__":
    main()
