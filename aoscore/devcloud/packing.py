"""Makes a signed deployment bundle from a folder with config.yaml, for demos and tests without `aos-signer`.

The format is that of cloud-rest.md, "Deployment bundle"; the whole folder goes into the inner archive.
"""

import base64
import hashlib
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import pkcs12

from aoscore.common.certs import serial_hex
from aoscore.common.errors import InvalidArgumentError, NotFoundError


def load_user(path: Path) -> tuple[x509.Certificate, rsa.RSAPrivateKey]:
    """Certificate and key of a user's PKCS#12 file.

    Raises:
        InvalidArgumentError: it is none, or its key is not RSA.
    """
    try:
        content = pkcs12.load_pkcs12(path.read_bytes(), None)
    except (ValueError, OSError) as error:
        raise InvalidArgumentError(f"{path} is no PKCS#12 file without password: {error}") from error
    if content.cert is None or not isinstance(content.key, rsa.RSAPrivateKey):
        raise InvalidArgumentError(f"{path} has no certificate with an RSA key")
    return content.cert.certificate, content.key


def pack_bundle(folder: Path, user_file: Path, target: Path) -> None:
    """Write the bundle of `folder` to `target`, signed with the user's key.

    Raises:
        NotFoundError: the folder has no config.yaml.
        InvalidArgumentError: the user's file cannot be used.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise NotFoundError(f"{config} does not exist")
    certificate, key = load_user(user_file)
    with tempfile.TemporaryDirectory() as work:
        inner = Path(work) / "batch.tar.gz"
        with tarfile.open(inner, "w:gz") as archive:
            archive.add(folder, ".")
        entries = [_entry(inner), _entry(config)]
        name = f"{certificate.issuer.rfc4514_string()}:{serial_hex(certificate)}"
        kid = base64.b64encode(name.encode()).decode()
        signature = Path(work) / "package.sign"
        signature.write_text(jwt.encode({"data": entries}, key, algorithm="RS256", headers={"kid": kid}))
        with tarfile.open(target, "w:gz") as package:
            for path in (inner, config, signature):
                package.add(path, path.name)


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha3_512").hexdigest()
    return {"name": path.name, "hash": digest, "size": path.stat().st_size}
