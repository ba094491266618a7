"""The initramfs module that opens the data disk: a real LUKS header, a real token, real tools (yocto.md §6).

Only the last step is another one here: without the device mapper of the kernel the passphrase is tested, not used.
"""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

MODULE = Path(__file__).resolve().parents[3] / "meta-aoscore/recipes-core/initrdscripts/aos-initramfs-modules/opendisk"
LIBRARY = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN = "0123456789abcdef"

SCRIPT = r"""
AOS_INFO=6
AOS_ERROR=3
aos_log() { shift; echo "LOG $*"; }
aos_device() { echo "$1"; }
aos_wait_for() { [ -e "$1" ]; }
cryptsetup() {
	case "$1" in
	open) command cryptsetup open --test-passphrase "$2" "$3" && echo "OPENED $4" ;;
	*) command cryptsetup "$@" ;;
	esac
}
lvm() { echo "LVM $*"; }
. "$MODULE"
opendisk_enabled && opendisk_run
echo "PIN left: ${OPENDISK_PIN-none}"
"""


class Disk:
    """A LUKS disk whose passphrase is wrapped for a key in a token."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "disk"
        self.pin_file = directory / "pin"
        self.pin_file.write_text(PIN)
        (directory / "tokens").mkdir()
        config = directory / "softhsm2.conf"
        config.write_text(f"directories.tokendir = {directory}/tokens\n")
        self.environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SOFTHSM2_CONF": str(config)}
        self.run("softhsm2-util", "--init-token", "--free", "--label", "aoscore", "--pin", PIN, "--so-pin", PIN)
        self.tool("--keypairgen", "--key-type", "rsa:2048", "--label", "diskencryption", "--id", "01")

    def run(self, *args: str, data: bytes = b"") -> bytes:
        done = subprocess.run(args, input=data, capture_output=True, timeout=60, env=self.environment)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def tool(self, *args: str) -> bytes:
        return self.run(
            "pkcs11-tool", "--module", str(LIBRARY), "--token-label", "aoscore", "--login", "--pin", PIN, *args
        )

    def encrypt(self, label: str = "diskencryption", **more: str) -> None:
        """Encrypt the disk as provisioning does."""
        secret = os.urandom(128)
        public = self.directory / "public.pem"
        der = self.tool("--read-object", "--type", "pubkey", "--label", "diskencryption")
        self.run("openssl", "pkey", "-pubin", "-inform", "DER", "-out", str(public), data=der)
        wrapped = self.run("openssl", "pkeyutl", "-encrypt", "-pubin", "-inkey", str(public), data=secret)
        self.path.write_bytes(bytes(20 << 20))
        passphrase = base64.b64encode(secret)
        fast = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
        self.run("cryptsetup", "luksFormat", "-q", *fast, "--key-file=-", str(self.path), data=passphrase)
        token = {
            "type": "aos-pkcs11",
            "keyslots": ["0"],
            "pkcs11-uri": f"pkcs11:token=aoscore;object={label}",
            "pkcs11-key": base64.b64encode(wrapped).decode(),
            **more,
        }
        token_text = json.dumps(token, indent=1).replace("/", "\\/")
        self.run("cryptsetup", "token", "import", "--token-id", "0", str(self.path), data=token_text.encode())

    def open(self, **parameters: str) -> list[str]:
        """What the module did, line by line."""
        settings = {
            "MODULE": str(MODULE),
            "bootparam_opendisk_target": str(self.path),
            "bootparam_opendisk_pkcs11": "softhsm",
            "bootparam_opendisk_pkcs11_pinfile": str(self.pin_file),
            **parameters,
        }
        done = subprocess.run(
            ["sh", "-c", SCRIPT], capture_output=True, text=True, timeout=60, env={**self.environment, **settings}
        )
        assert done.returncode == 0, done.stderr
        print(done.stdout, done.stderr)
        return done.stdout.splitlines()


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    missing = [name for name in ("softhsm2-util", "pkcs11-tool", "cryptsetup") if shutil.which(name) is None]
    if missing:
        message = f"not installed: {', '.join(missing)}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return Disk(tmp_path)


OPENED = ["OPENED aos", "LVM vgchange --activate y aosvg"]


def test_the_disk_opens_with_the_key_of_the_token(disk: Disk) -> None:
    disk.encrypt()
    lines = disk.open()
    assert [line for line in lines if not line.startswith("LOG")] == [*OPENED, "PIN left: none"]


def test_the_pin_may_stand_on_the_command_line_of_the_kernel(disk: Disk) -> None:
    disk.encrypt()
    assert "OPENED aos" in disk.open(bootparam_opendisk_pkcs11_userpin=PIN, bootparam_opendisk_pkcs11_pinfile="")


def test_a_disk_that_is_not_encrypted_yet_is_no_error(disk: Disk) -> None:
    disk.path.write_bytes(bytes(1 << 20))
    assert disk.open() == [f"LOG {disk.path} is not encrypted yet", "PIN left: none"]


@pytest.mark.parametrize("what", ["wrong PIN", "no PIN file", "another key", "no key named"])
def test_a_disk_that_does_not_open_is_told(disk: Disk, what: str) -> None:
    disk.encrypt(label={"another key": "other", "no key named": ""}.get(what, "diskencryption"))
    if what == "wrong PIN":
        disk.pin_file.write_text("wrong")
    if what == "no PIN file":
        disk.pin_file.unlink()
    lines = disk.open()
    assert f"LOG can't open {disk.path}" in lines
    assert "PIN left: none" in lines
    assert not any(PIN in line for line in lines)
