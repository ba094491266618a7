"""`aosctl disk`: the encrypted data disk of a node (yocto.md §6).

Made at provisioning: LUKS2, in it a volume group, in that a volume per kind of data. The pass code is random and known
to nobody: it lies in a LUKS token, wrapped by the node's `diskencryption` key, so only this node's key token opens the
disk. Format and names are those of AosCore 9.1, whose images open our disks and the other way round.

Secrets go through pipes: none is in a file or on a command line.
"""

import base64
import contextlib
import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from aoscore.common.errors import ConfigError, FailedError, InvalidArgumentError, NotFoundError, RuntimeFailure
from aoscore.ctl.run import Run, run_program
from aoscore.ctl.target.disks import GROUP, MAPPING, Volume, read_volumes
from aoscore.ctl.target.units import mount_unit

KEY_LABEL = "diskencryption"
TOKEN_TYPE = "aos-pkcs11"  # noqa: S105 - the name of a kind
_PASS_CODE_BYTES = 128
_DEVICE_ARGUMENT = re.compile(r"(?:^|\s)opendisk\.target=(\S+)")


@dataclass(frozen=True)
class KeyToken:
    """Where the key is that wraps the pass code."""

    library: str
    label: str
    pin_file: Path | None


@dataclass(frozen=True)
class Disk:
    """The data disk: its device, its volumes with their mount points below `root`, the key that opens it."""

    device: str
    volumes: tuple[Volume, ...]
    token: KeyToken
    root: str = "/var/aos"


def read_disk(iam_config: Path, layout: Path, device: str = "", command_line: Path = Path("/proc/cmdline")) -> Disk:
    """The disk of this node. Without `device` the kernel argument opendisk.target names it.

    Raises NotFoundError or ConfigError naming file and line.
    """
    try:
        volumes = read_volumes(layout.read_text())
        config: dict[str, Any] = {key.lower(): value for key, value in json.loads(iam_config.read_bytes()).items()}
        modules = {module["id"]: module["params"] for module in config["certmodules"]}
        params = modules[KEY_LABEL]
        pin_file = Path(params["userPinPath"]) if "userPinPath" in params else None
        token = KeyToken(params["library"], params["tokenLabel"], pin_file)
    except FileNotFoundError as error:
        raise NotFoundError(f"configuration file {error.filename} does not exist") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{iam_config}: no token for the certificate type {KEY_LABEL}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{layout} or {iam_config}: {error}") from error
    if not device:
        found = _DEVICE_ARGUMENT.search(command_line.read_text())
        if found is None:
            raise NotFoundError("no device is given and the kernel has no argument opendisk.target")
        device = found[1]
    return Disk(device, volumes, token)


def create(disk: Disk, run: Run = run_program) -> None:
    """Make the disk anew and mount it; what was on it is gone. May be repeated.

    Raises FailedError naming the step that failed. The disk is closed then and holds nothing that looks usable.
    """
    close(disk, run)
    pass_code = base64.b64encode(secrets.token_bytes(_PASS_CODE_BYTES))
    try:
        with _step("read the certificate of the key"):
            wrapped = wrap(pass_code, read_public_key(disk.token, run))
        with _step(f"encrypt {disk.device}"):
            run(
                ["cryptsetup", "luksFormat", "--type", "luks2", "--batch-mode", "--key-file=-", disk.device],
                stdin=pass_code,
            )
            token = luks_token(disk.token.label, wrapped)
            run(["cryptsetup", "token", "import", "--token-id", "0", disk.device], stdin=token)
        with _step(f"open {disk.device}"):
            # Through the token at once: a disk that cannot be opened at the next boot is found out now.
            _unlock(disk, run)
        with _step(f"divide {disk.device}"):
            run(["pvcreate", "--force", "--yes", f"/dev/mapper/{MAPPING}"])
            run(["vgcreate", GROUP, f"/dev/mapper/{MAPPING}"])
            for volume in disk.volumes:
                run(
                    [
                        "lvcreate",
                        "--yes",
                        "--wipesignatures",
                        "y",
                        "-l",
                        f"{volume.percent}%VG",
                        "-n",
                        volume.name,
                        GROUP,
                    ]
                )
        for volume in disk.volumes:
            with _step(f"make the file system {volume.name}"):
                path = f"/dev/{GROUP}/{volume.name}"
                run(["mkfs.ext4", "-q", "-F", path])
                if volume.quota:
                    run(["tune2fs", "-O", "quota", "-Q", "usrquota,grpquota", path])
        mount(disk, run)
    except BaseException:
        with contextlib.suppress(RuntimeFailure, NotFoundError):
            close(disk, run)
            run(["wipefs", "--all", "--quiet", disk.device])
        raise


def open_disk(disk: Disk, run: Run = run_program) -> None:
    """Open and mount an existing disk; an initramfs usually has done that. Raises FailedError naming the step."""
    if not _is_open(run):
        with _step(f"open {disk.device}"):
            _unlock(disk, run)
    with _step(f"activate {GROUP}"):
        run(["vgchange", "--activate", "y", GROUP])
    mount(disk, run)


def mount(disk: Disk, run: Run = run_program) -> None:
    """Mount all volumes by their units, and look whether they are. Raises FailedError."""
    with _step("mount the volumes"):
        run(["systemctl", "daemon-reload"])
        run(["systemctl", "start", *(mount_unit(f"{disk.root}/{volume.name}") for volume in disk.volumes)])
        for volume in disk.volumes:
            run(["mountpoint", "-q", f"{disk.root}/{volume.name}"])


def close(disk: Disk, run: Run = run_program) -> None:
    """Unmount and close the disk, as far as it is open. Raises RuntimeFailure when something still uses it."""
    run(["systemctl", "stop", *(mount_unit(f"{disk.root}/{volume.name}") for volume in disk.volumes)])
    if _is_open(run):
        with contextlib.suppress(RuntimeFailure):
            # There is no group yet when making it was broken off.
            run(["vgchange", "--activate", "n", GROUP])
        run(["cryptsetup", "close", MAPPING])


def delete(disk: Disk, run: Run = run_program) -> None:
    """Close the disk and forget its keys for good: nobody can read it any more."""
    close(disk, run)
    with contextlib.suppress(RuntimeFailure):
        # Not encrypted yet: nothing to erase.
        run(["cryptsetup", "erase", "--batch-mode", disk.device])
    run(["wipefs", "--all", "--quiet", disk.device])


def wrap(pass_code: bytes, key: rsa.RSAPublicKey) -> bytes:
    """What the token keeps of a pass code: its raw bytes, encrypted.

    PKCS#1 v1.5, since that is what the initramfs of AosCore 9.1 asks the key token to undo.
    """
    return key.encrypt(base64.b64decode(pass_code), padding.PKCS1v15())


def luks_token(label: str, wrapped: bytes) -> bytes:
    """The LUKS token as JSON."""
    return json.dumps(
        {
            "type": TOKEN_TYPE,
            "keyslots": ["0"],
            "pkcs11-uri": f"pkcs11:token={label};object={KEY_LABEL}",
            "pkcs11-key": base64.b64encode(wrapped).decode(),
        }
    ).encode()


def read_public_key(token: KeyToken, run: Run = run_program) -> rsa.RSAPublicKey:
    """The key of the self-signed certificate that IAM made. Raises InvalidArgumentError for another kind of key."""
    args = ["pkcs11-tool", "--module", token.library, "--token-label", token.label, "--label", KEY_LABEL]
    der = run([*args, "--read-object", "--type", "cert"])
    try:
        key = x509.load_der_x509_certificate(der).public_key()
    except ValueError as error:
        raise InvalidArgumentError(f"certificate {KEY_LABEL} of token {token.label}: {error}") from error
    if not isinstance(key, rsa.RSAPublicKey):
        raise InvalidArgumentError(f"certificate {KEY_LABEL} of token {token.label} has no RSA key")
    return key


def read_pass_code(disk: Disk, run: Run = run_program) -> bytes:
    """The pass code of an existing disk, by the LUKS token and the key.

    Raises InvalidArgumentError for a foreign token, RuntimeFailure when the key does not undo the wrapping.
    """
    exported = run(["cryptsetup", "token", "export", "--token-id", "0", disk.device])
    try:
        token = json.loads(exported)
        if token["type"] != TOKEN_TYPE:
            raise ValueError(f"its type is {token['type']!r}, not {TOKEN_TYPE!r}")
        wrapped = base64.b64decode(token["pkcs11-key"], validate=True)
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(f"LUKS token 0 of {disk.device}: {error}") from error
    args = ["pkcs11-tool", "--module", disk.token.library, "--token-label", disk.token.label, "--label", KEY_LABEL]
    env = {}
    if disk.token.pin_file is not None:
        args += ["--login", "--pin", "env:AOS_USER_PIN"]
        env["AOS_USER_PIN"] = disk.token.pin_file.read_text().strip()
    return base64.b64encode(run([*args, "--decrypt", "--mechanism", "RSA-PKCS"], stdin=wrapped, env=env))


def _unlock(disk: Disk, run: Run) -> None:
    args = ["cryptsetup", "open", "--type", "luks2", "--key-file=-", disk.device, MAPPING]
    run(args, stdin=read_pass_code(disk, run))


def _is_open(run: Run) -> bool:
    try:
        run(["cryptsetup", "status", MAPPING])
    except RuntimeFailure:
        return False
    return True


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeFailure, NotFoundError, InvalidArgumentError, OSError) as error:
        raise FailedError(f"can't {what}: {error}") from error
