"""QEMU's command line: what a guest is given, and that saved and resumed guests have the same devices."""

from pathlib import Path

from qemu.guest import Boot, Guest


def guest(boot: Boot) -> Guest:
    return Guest("main", Path("/unit"), boot, networks=["user", "user"], mac=7, enter=lambda *args: list(args))


def test_disks_and_networks_in_order() -> None:
    command = " ".join(guest(Boot((Path("/a"), Path("/b")), Path("/kernel"), Path("/initrd"), "quiet")).command())
    assert "-kernel /kernel -append quiet -initrd /initrd" in command
    assert command.index("main.0.qcow2") < command.index("main.1.qcow2")
    assert "mac=52:54:00:00:00:07" in command and "mac=52:54:00:00:01:07" in command
    assert "-accel tcg" in command and "kvm" not in command


def test_a_disk_with_a_boot_loader() -> None:
    command = guest(Boot((Path("/a"),), firmware=Path("/efi"))).command()
    assert "-kernel" not in command and command[command.index("-bios") + 1] == "/efi"


def test_xen_gets_the_kernel_of_dom0_with_its_command_line_as_a_module() -> None:
    boot = Boot((Path("/a"),), Path("/kernel"), Path("/initrd"), "quiet", xen=Path("/xen"), xen_append="dom0_mem=1024M")
    command = guest(boot).command()
    assert command[command.index("-kernel") + 1] == "/xen"
    assert command[command.index("-append") + 1] == "dom0_mem=1024M"
    assert command[command.index("-initrd") + 1] == "/kernel quiet,/initrd"


def test_a_resumed_guest_differs_only_in_where_its_state_comes_from() -> None:
    unit = guest(Boot((Path("/a"),)))
    resumed = unit.command(Path("/states/main.zst"))
    assert resumed[:-2] == unit.command()
    assert resumed[-2:] == ["-incoming", "exec:zstd -dcq /states/main.zst"]
