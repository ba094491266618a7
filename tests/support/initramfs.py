"""A machine whose initramfs runs the modules of meta-aoscore, on file systems in files (sm-runtime.md §3.3)."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "meta-aoscore/recipes-core/initrdscripts"
BOOT = ROOT / "tests/integration/layer/boot.sh"
PROGRAMS = ("mksquashfs", "mke2fs", "rsync", "losetup", "unshare")


def installed_modules() -> dict[str, str]:
    """Name in the initramfs and name of the source, as the recipe installs them."""
    recipe = (SOURCES / "aos-initramfs-modules_1.0.bb").read_text()
    line = next(line for line in recipe.splitlines() if line.startswith("AOS_MODULES"))
    return {name: name.partition("-")[2] for name in line.split('"')[1].split()}


def copy_modules(target: Path) -> None:
    """Make a directory of all modules, by the names that they have in the initramfs."""
    target.mkdir()
    for name, source in installed_modules().items():
        shutil.copy(SOURCES / "aos-initramfs-modules" / source, target / name)


class Machine:
    """Disks that stay while the machine boots again and again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.modules = directory / "modules"
        copy_modules(self.modules)
        self.parameters = {"bootparam_root": "/images/root_a", "bootparam_vardir_disk": "/images/var"}

    def disk(self, name: str, files: dict[str, str] | None = None, size: str = "16M") -> None:
        """A disk with an ext4 file system."""
        tree = self.tree(f"{name}.tree", files or {})
        path = self.directory / name
        run(["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(path), size])

    def root(self, name: str, files: dict[str, str]) -> None:
        """A disk with what a root file system must have, and `files`."""
        self.disk(name, {**files, **dict.fromkeys(("var/", "run/", "dev/"), ""), "etc/machine-id": ""})

    def tree(self, name: str, files: dict[str, str]) -> Path:
        """A directory with files; a name that ends with a slash is a directory."""
        tree = self.directory / name
        tree.mkdir()
        for path, content in files.items():
            target = tree / path
            if path.endswith("/"):
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(content)
        return tree

    def image(self, tree: Path) -> bytes:
        """A squashfs image of a directory."""
        path = tree.with_suffix(".squashfs")
        run(["mksquashfs", str(tree), str(path), "-quiet", "-no-progress", "-all-root"])
        return path.read_bytes()

    def boot(self, cut: int = 0) -> bool:
        """Whether it reached the root; False when the cut came first."""
        shutil.rmtree(self.directory / "booted", ignore_errors=True)
        settings = [f"{name}={value}" for name, value in self.parameters.items()]
        if cut:
            settings.append(f"CUT={cut}")
        command = ["unshare", "--mount", "--propagation", "private", "sh", str(BOOT)]
        done = subprocess.run(
            [*command, str(self.directory), str(self.modules), *settings], capture_output=True, text=True, timeout=60
        )
        print(self.log, done.stderr)
        if cut and done.returncode != 0:
            assert done.returncode in (-9, 137), done.stderr
            return False
        assert done.returncode == 0, done.stderr
        return True

    def edit(self, disk: str, script: str) -> str:
        """Run shell commands with a disk mounted at the current directory, as the booted system would."""
        inside = f'mount -o loop "{self.directory / disk}" /mnt && cd /mnt && {script}'
        return run(["unshare", "--mount", "--propagation", "private", "sh", "-ec", inside])

    def flags(self) -> dict[str, str]:
        """The files of the update directory but the image, with their content."""
        names = "do_update do_apply updated failed"
        listed = self.edit("data", f'cd update_rootfs; for n in {names}; do [ ! -e $n ] || echo "$n=$(cat $n)"; done')
        return dict(line.partition("=")[::2] for line in listed.splitlines())

    @property
    def version(self) -> str:
        """Content of /etc/version of the system that was booted."""
        return (self.directory / "booted/root/etc/version").read_text()

    @property
    def log(self) -> str:
        """The kernel log."""
        return (self.directory / "kmsg").read_text()


def run(args: Sequence[str]) -> str:
    done = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def installed_machine(directory: Path) -> Machine:
    """A machine with /var; the test is skipped, or in CI fails, where a program is missing."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        message = f"not installed: {', '.join(missing)}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    machine = Machine(directory)
    machine.disk("var", {"aos/": ""})
    return machine
