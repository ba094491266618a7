"""The encrypted data disk: order of steps, what is secret, what a failure leaves behind."""

import base64
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from aoscore.common.errors import ConfigError, FailedError, InvalidArgumentError, NotFoundError, RuntimeFailure
from aoscore.ctl import disk as disks
from aoscore.ctl.target import Node, tree

KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def certificate() -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "disk")])
    begin = datetime.datetime(2024, 1, 1)
    builder = x509.CertificateBuilder(name, name, KEY.public_key(), 1, begin, begin + datetime.timedelta(days=9999))
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


class Machine:
    """Stands in for the programs: a disk that is formatted, opened, closed; and a key token."""

    def __init__(self, fail: str = "") -> None:
        self.commands: list[str] = []
        self.fail = fail
        self.pass_code = b""
        self.token = b""
        self.opened_with = b""
        self.open = False

    def __call__(
        self, args: Sequence[str], *, stdin: bytes | None = None, env: Mapping[str, str] | None = None
    ) -> bytes:
        command = " ".join(args)
        self.commands.append(command)
        if self.fail and self.fail in command:
            self.fail = ""
            raise RuntimeFailure(f"{args[0]}: code 1: broken", 1)
        match args[0], args[1], args[2] if len(args) > 2 else "":
            case "cryptsetup", "status", _:
                if not self.open:
                    raise RuntimeFailure("cryptsetup: code 4: inactive", 4)
            case "cryptsetup", "luksFormat", _:
                self.pass_code = stdin or b""
            case "cryptsetup", "token", "import":
                self.token = stdin or b""
            case "cryptsetup", "token", "export":
                return self.token
            case "cryptsetup", "open", _:
                self.opened_with, self.open = stdin or b"", True
            case "cryptsetup", "close", _:
                self.open = False
            case "pkcs11-tool", _, _ if "--read-object" in args:
                return certificate()
            case "pkcs11-tool", _, _ if "--decrypt" in args:
                assert env == {"AOS_USER_PIN": "1234"}
                return KEY.decrypt(stdin or b"", padding.PKCS1v15())
        return b""


@pytest.fixture
def disk(tmp_path: Path) -> disks.Disk:
    files = {Path(entry.path).name: entry.content for entry in tree(Node())}
    for name in ("iam.cfg", "aosdisk.cfg"):
        (tmp_path / name).write_text(files[name])
    (tmp_path / "cmdline").write_text("root=/dev/sda3 opendisk.target=/dev/sda6 quiet\n")
    disk = disks.read_disk(tmp_path / "iam.cfg", tmp_path / "aosdisk.cfg", command_line=tmp_path / "cmdline")
    assert disk.token == disks.KeyToken("/usr/lib/softhsm/libsofthsm2.so", "aoscore", Path("/var/aos/iam/.usrpin"))
    (tmp_path / "pin").write_text("1234")
    token = disks.KeyToken(disk.token.library, disk.token.label, tmp_path / "pin")
    return disks.Disk(disk.device, disk.volumes, token)


def test_create(disk: disks.Disk) -> None:
    machine = Machine()
    disks.create(disk, machine)
    assert disk.device == "/dev/sda6"
    assert len(base64.b64decode(machine.pass_code)) == 128 and b"\n" not in machine.pass_code
    assert machine.opened_with == machine.pass_code, "opened by the way of the next boot"
    token = json.loads(machine.token)
    assert token["type"] == "aos-pkcs11" and token["keyslots"] == ["0"]
    assert token["pkcs11-uri"] == "pkcs11:token=aoscore;object=diskencryption"
    assert [command for command in machine.commands if command.startswith("lvcreate")] == [
        f"lvcreate --yes --wipesignatures y -l {percent}%VG -n {name} aosvg"
        for name, percent in (("downloads", 40), ("workdirs", 30), ("storages", 20), ("states", 10))
    ]
    quotas = [command for command in machine.commands if command.startswith("tune2fs")]
    assert [command.split("/")[-1] for command in quotas] == ["storages", "states"]
    assert machine.commands[-4:] == [
        f"mountpoint -q /var/aos/{name}" for name in ("downloads", "workdirs", "storages", "states")
    ]
    everything = " ".join(machine.commands)
    assert machine.pass_code.decode() not in everything and "1234" not in everything


STEPS = [
    ("--read-object", "read the certificate"),
    ("luksFormat", "encrypt /dev/sda6"),
    ("token import", "encrypt /dev/sda6"),
    ("token export", "open /dev/sda6"),
    ("--decrypt", "open /dev/sda6"),
    ("cryptsetup open", "open /dev/sda6"),
    ("pvcreate", "divide"),
    ("vgcreate", "divide"),
    ("-n states", "divide"),
    ("mkfs.ext4 -q -F /dev/aosvg/storages", "make the file system storages"),
    ("tune2fs", "make the file system storages"),
    ("daemon-reload", "mount the volumes"),
    ("systemctl start", "mount the volumes"),
    ("mountpoint -q /var/aos/states", "mount the volumes"),
]


@pytest.mark.parametrize(("fail", "step"), STEPS)
def test_a_failed_step_is_named_and_leaves_nothing_usable(disk: disks.Disk, fail: str, step: str) -> None:
    machine = Machine(fail)
    with pytest.raises(FailedError, match=f"can't {step}.*broken"):
        disks.create(disk, machine)
    assert not machine.open
    assert machine.commands[-1] == "wipefs --all --quiet /dev/sda6"
    disks.create(disk, machine)
    assert machine.open, "and can be repeated"


def test_open_what_is_closed_or_open(disk: disks.Disk) -> None:
    machine = Machine()
    disks.create(disk, machine)
    disks.close(disk, machine)
    assert not machine.open
    for _ in range(2):
        disks.open_disk(disk, machine)
        assert machine.open
    assert sum(command.startswith("cryptsetup open") for command in machine.commands) == 2


def test_delete_erases_the_keys(disk: disks.Disk) -> None:
    machine = Machine()
    disks.create(disk, machine)
    disks.delete(disk, machine)
    assert not machine.open
    assert machine.commands[-2:] == ["cryptsetup erase --batch-mode /dev/sda6", "wipefs --all --quiet /dev/sda6"]
    disks.delete(disk, Machine("cryptsetup erase"))


@pytest.mark.parametrize(
    "token", [b"", b"{}", b"[]", b'{"type": "other", "pkcs11-key": ""}', b'{"type": "aos-pkcs11", "pkcs11-key": "!"}']
)
def test_a_foreign_luks_token_is_named(disk: disks.Disk, token: bytes) -> None:
    machine = Machine()
    machine.token = token
    with pytest.raises(InvalidArgumentError, match="LUKS token 0 of /dev/sda6"):
        disks.read_pass_code(disk, machine)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    plain = {Path(e.path).name: e.content for e in tree(Node(keys="file", data_disk=False))}
    (tmp_path / "iam.cfg").write_text(plain["iam.cfg"])
    with pytest.raises(NotFoundError, match="layout"):
        disks.read_disk(tmp_path / "iam.cfg", tmp_path / "layout")
    (tmp_path / "layout").write_text("a 10 0\n")
    with pytest.raises(ConfigError, match="diskencryption"):
        disks.read_disk(tmp_path / "iam.cfg", tmp_path / "layout")
    (tmp_path / "layout").write_text("a ten 0\n")
    with pytest.raises(ConfigError, match=r"layout.*line 1"):
        disks.read_disk(tmp_path / "iam.cfg", tmp_path / "layout")
    files = {Path(e.path).name: e.content for e in tree(Node())}
    for name in ("iam.cfg", "aosdisk.cfg"):
        (tmp_path / name).write_text(files[name])
    (tmp_path / "cmdline").write_text("quiet\n")
    with pytest.raises(NotFoundError, match=r"opendisk\.target"):
        disks.read_disk(tmp_path / "iam.cfg", tmp_path / "aosdisk.cfg", command_line=tmp_path / "cmdline")
