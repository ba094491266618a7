"""The encryption of the data disk with the real programs: SoftHSM, pkcs11-tool, cryptsetup; not the kernel's part."""

import base64
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from aoscore.common.errors import RuntimeFailure
from aoscore.ctl import disk as disks
from aoscore.ctl.run import run_program
from aoscore.ctl.target.disks import Volume

LIBRARY = "/usr/lib/softhsm/libsofthsm2.so"
PIN = "123456"
MISSING = [name for name in ("cryptsetup", "pkcs11-tool", "softhsm2-util") if shutil.which(name) is None]


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> disks.Disk:
    """A file as a disk, and a token with the key that IAM makes at provisioning."""
    if MISSING:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"not installed: {', '.join(MISSING)}")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm.conf").write_text(f"directories.tokendir = {tmp_path}/tokens\nlog.level = ERROR\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm.conf"))
    subject = ["-subj", "/CN=disk", "-nodes", "-days", "365"]
    key, cert = tmp_path / "key.pem", tmp_path / "cert.der"
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", *subject, "-keyout", key, "-outform", "DER", "-out", cert)
    run("softhsm2-util", "--init-token", "--free", "--label", "aoscore", "--so-pin", "1234", "--pin", PIN)
    token = ["--token", "aoscore", "--label", "diskencryption", "--id", "01", "--pin", PIN]
    run("softhsm2-util", "--import", key, *token)
    pkcs11 = ["--module", LIBRARY, "--token-label", "aoscore", "--login", "--pin", PIN]
    run("pkcs11-tool", *pkcs11, "--write-object", cert, "--type", "cert", "--label", "diskencryption", "--id", "01")
    (tmp_path / "pin").write_text(PIN)
    (tmp_path / "disk.img").write_bytes(b"")
    os.truncate(tmp_path / "disk.img", 64 * 1024 * 1024)
    key_token = disks.KeyToken(LIBRARY, "aoscore", tmp_path / "pin")
    return disks.Disk(str(tmp_path / "disk.img"), (Volume("workdirs", 100, False),), key_token)


def run(*args: str | Path) -> None:
    subprocess.run([str(arg) for arg in args], check=True, capture_output=True)


def test_only_the_key_in_the_token_opens_the_disk(disk: disks.Disk) -> None:
    pass_code = base64.b64encode(os.urandom(128))
    fast = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
    format_args = ["cryptsetup", "luksFormat", "--type", "luks2", "--batch-mode", *fast, "--key-file=-", disk.device]
    run_program(format_args, stdin=pass_code)
    token = disks.luks_token("aoscore", disks.wrap(pass_code, disks.read_public_key(disk.token)))
    run_program(["cryptsetup", "token", "import", "--token-id", "0", disk.device], stdin=token)

    found = disks.read_pass_code(disk)
    assert found == pass_code
    test = ["cryptsetup", "open", "--test-passphrase", "--key-file=-", disk.device]
    run_program(test, stdin=found)
    # As AosCore 9.1 gives it: a line through a pipe, whose end cryptsetup drops.
    run_program(["cryptsetup", "open", "--test-passphrase", disk.device], stdin=found + b"\n")
    with pytest.raises(RuntimeFailure):
        run_program(test, stdin=found[:-1])
    run_program(["cryptsetup", "erase", "--batch-mode", disk.device])
    with pytest.raises(RuntimeFailure):
        run_program(test, stdin=found)
