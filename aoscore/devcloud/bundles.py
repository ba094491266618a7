"""Deployment bundles: check what `aos-signer` uploaded and turn each image into OCI blobs (cloud-rest.md).

    batch.tar.gz ── package.sign   JWT over name, SHA3-512 and size of the two others
                 ├─ config.yaml
                 └─ batch.tar.gz   one folder per item

    item ──► index ──► manifest per image ──► image config, Aos item config, layer

Everything from outside is limited in size and count, and no name is used as a path on this machine: layers are written
from archive to archive. Blocking code, meant for a worker thread.
"""

import base64
import gzip
import hashlib
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO, Any, cast
from uuid import UUID

import jwt
from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from aoscore.devcloud.bundleconfig import (
    BundleConfig,
    BundleError,
    Identity,
    Image,
    Item,
    image_run_config,
    item_config,
    read_config,
)
from aoscore.devcloud.schema import canonical

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
IMAGE_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
ITEM_CONFIG_TYPE = "application/vnd.aos.item.config.v1+json"
TAR_TYPE = "application/vnd.oci.image.layer.v1.tar"
TAR_GZIP_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
COMPONENT_TYPES = (
    "application/vnd.aos.image.component.full.v1+gzip",
    "application/vnd.aos.image.component.full.v1+squashfs",
    "application/vnd.aos.image.component.inc.v1+squashfs",
)
ENCRYPTED_TYPES = {
    "application/vnd.aos.image.layer.enc.v1.aes256gcm+tar": TAR_TYPE,
    "application/vnd.aos.image.layer.enc.v1.aes256gcm+tar+gzip": TAR_GZIP_TYPE,
    "application/vnd.aos.image.layer.enc.v1.aes256gcm+tar+gz": TAR_GZIP_TYPE,
}
STATE_FILE = "default_state.dat"

_PARTS = {"batch.tar.gz": 4 << 30, "config.yaml": 1 << 20, "package.sign": 64 << 10}
_UNPACKED_LIMIT_BYTES = 8 << 30
_MEMBER_LIMIT = 200_000
_STATE_LIMIT_BYTES = 64 << 10
_CHUNK_BYTES = 1 << 20
_GCM_IV_BYTES = 12
_GCM_TAG_BYTES = 16
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Blob:
    """One finished blob in the work directory."""

    digest: str
    size_bytes: int
    media_type: str
    path: Path

    def descriptor(self, **more: Any) -> dict[str, Any]:
        """The OCI descriptor of the blob."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size_bytes, **more}


@dataclass(frozen=True)
class ItemImages:
    """One item, ready to store."""

    item_id: str
    identity: Identity
    version: str
    index_digest: str
    min_instances: int
    priority: int
    labels: list[str]
    hostname: str | None
    default_state: str | None
    blobs: list[Blob] = field(default_factory=list)


def stable_id(identity: Identity) -> str:
    """Item id: the one the bundle gives, else one made from type and codename, of the form of a UUID version 4."""
    name = f"{identity.type}/{identity.codename}"
    return identity.id or str(UUID(bytes=hashlib.sha256(name.encode()).digest()[:16], version=4))


class BundleReader:
    """Reads one upload.

    Args:
        work_directory: an empty directory; the blobs stay there until the caller moves them.
        signer: certificate that the package must be signed with.
        services: item ids of known services by codename and host name (allowed connections name them).
        image_keys: AES keys that images may be encrypted with, tried in order.
    """

    def __init__(
        self,
        work_directory: Path,
        signer: x509.Certificate,
        *,
        services: Mapping[str, str] = MappingProxyType({}),
        image_keys: Sequence[bytes] = (),
    ) -> None:
        self._work = work_directory
        self._signer = signer
        self._services = dict(services)
        self._image_keys = image_keys
        self._count = 0

    def read(self, upload: Path) -> list[ItemImages]:
        """Check the package and make the blobs of all its items.

        Raises:
            BundleError: names the part of the package that is refused, and why.
        """
        parts = self._open_package(upload)
        self._check_signature(parts)
        config = read_config(parts["config.yaml"].read_bytes())
        for item in config.items:
            if item.identity.type == "service":
                for name in (item.identity.codename, item.config.hostname):
                    if name:
                        self._services.setdefault(name, stable_id(item.identity))
        with _expanded(parts["batch.tar.gz"], self._file()) as archive:
            source = _Source(archive)
            return [
                self._item(source, config, item, f"config.yaml.items[{number}]")
                for number, item in enumerate(config.items)
            ]

    def _file(self) -> Path:
        self._count += 1
        return self._work / str(self._count)

    def _open_package(self, upload: Path) -> dict[str, Path]:
        parts: dict[str, Path] = {}
        try:
            with tarfile.open(upload, "r:gz") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if member.isdir() and name in ("", "."):
                        continue
                    if name not in _PARTS or name in parts or not member.isfile():
                        raise BundleError("file", f"{member.name!r} does not belong into a deployment bundle")
                    if member.size > _PARTS[name]:
                        raise BundleError("file", f"{name} has {member.size} bytes, allowed are {_PARTS[name]}")
                    parts[name] = self._file()
                    with parts[name].open("wb") as target:
                        _copy(cast("IO[bytes]", archive.extractfile(member)), target)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise BundleError("file", f"is no gzip-compressed tar archive: {error}") from error
        missing = sorted(set(_PARTS) - set(parts))
        if missing:
            raise BundleError("file", f"{', '.join(missing)} is missing in the deployment bundle")
        return parts

    def _check_signature(self, parts: dict[str, Path]) -> None:
        token = parts["package.sign"].read_text(encoding="ascii", errors="replace").strip()
        key = self._signer.public_key()
        if not isinstance(key, rsa.RSAPublicKey):
            raise BundleError("package.sign", "the user's certificate has no RSA key, RS256 needs one")
        try:
            header = jwt.get_unverified_header(token)
            payload = jwt.decode(token, key, algorithms=["RS256"])
        except jwt.InvalidTokenError as error:
            raise BundleError("package.sign", f"is not signed by the user who uploads: {error}") from error
        if _certificate_of_kid(header.get("kid")) != (
            self._signer.issuer.rfc4514_string(),
            self._signer.serial_number,
        ):
            raise BundleError("package.sign", "kid names another certificate than that of the user who uploads")
        entries = payload.get("data")
        signed = {"batch.tar.gz", "config.yaml"}
        if (
            not isinstance(entries, list)
            or not all(isinstance(entry, dict) for entry in entries)
            or sorted(str(entry.get("name")) for entry in entries) != sorted(signed)
        ):
            raise BundleError("package.sign", f"must list exactly {' and '.join(sorted(signed))}")
        for entry in entries:
            path = parts[entry["name"]]
            if entry.get("size") != path.stat().st_size:
                raise BundleError(entry["name"], f"has {path.stat().st_size} bytes, signed are {entry.get('size')}")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha3_512").hexdigest() != str(entry.get("hash")).lower():
                    raise BundleError(entry["name"], "content does not match its signed hash")

    def _item(self, source: "_Source", config: BundleConfig, item: Item, where: str) -> ItemImages:
        blobs: list[Blob] = []
        config_blob = self._json(ITEM_CONFIG_TYPE, item_config(item, config.author, self._services.get, where))
        blobs.append(config_blob)
        manifests = []
        for number, image in enumerate(item.images):
            image_where = f"{where}.images[{number}]"
            folder = _image_folder(item, image, image_where)
            if item.identity.type == "component":
                made = [self._component_layer(source, image, folder, image_where), self._json(EMPTY_TYPE, {})]
            else:
                layer, diff_id = self._layer(source, image, folder, image_where)
                made = [layer, self._json(IMAGE_CONFIG_TYPE, _image_config(config, item, image, diff_id, image_where))]
            manifest = self._json(
                MANIFEST_TYPE,
                {
                    "schemaVersion": 2,
                    "mediaType": MANIFEST_TYPE,
                    "config": made[1].descriptor(),
                    "layers": [made[0].descriptor()],
                    "aosItemConfig": config_blob.descriptor(),
                },
            )
            blobs += [*made, manifest]
            manifests.append(manifest.descriptor(platform=_platform(image)))
        index = self._json(INDEX_TYPE, {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests})
        blobs.append(index)
        state = source.text(f"{item.source_folder or item.identity.codename}/{STATE_FILE}", where)
        if state is None and item.config.state and item.config.state.required:
            raise BundleError(f"{where}.configuration.state", f"is required, but {STATE_FILE} is missing")
        return ItemImages(
            item_id=stable_id(item.identity),
            identity=item.identity,
            version=item.version,
            index_digest=index.digest,
            min_instances=item.config.instances.min_instances,
            priority=item.config.instances.priority,
            labels=item.config.instances.labels or [],
            hostname=item.config.hostname,
            default_state=state,
            blobs=list({blob.digest: blob for blob in blobs}.values()),
        )

    def _json(self, media_type: str, document: dict[str, Any]) -> Blob:
        path = self._file()
        path.write_bytes(canonical(document))
        return _blob(path, media_type)

    def _component_layer(self, source: "_Source", image: Image, folder: str, where: str) -> Blob:
        if image.media_type not in COMPONENT_TYPES:
            raise BundleError(f"{where}.mediaType", f"of a component must be one of {', '.join(COMPONENT_TYPES)}")
        path = self._file()
        source.copy_file(folder, path, f"{where}.path")
        return _blob(path, image.media_type)

    def _layer(self, source: "_Source", image: Image, folder: str, where: str) -> tuple[Blob, str]:
        """Layer blob and diff id (digest of the uncompressed tar) of a service or layer image."""
        media_type = (image.media_type or "").strip().lower()
        path = self._file()
        if source.is_folder(folder):
            if media_type not in ("", TAR_TYPE, TAR_GZIP_TYPE):
                raise BundleError(f"{where}.mediaType", f"{image.media_type!r} does not fit a folder")
            source.pack_folder(folder, path, where)
            diff_id = _digest(path)
            if media_type == TAR_TYPE:
                return _blob(path, TAR_TYPE), diff_id
            packed = self._file()
            with path.open("rb") as tar, packed.open("wb") as target:
                with gzip.GzipFile(filename="", mode="wb", fileobj=target, mtime=0) as compressor:
                    _copy(tar, compressor)
            path.unlink()
            return _blob(packed, TAR_GZIP_TYPE), diff_id
        source.copy_file(folder, path, f"{where}.path")
        if media_type in ENCRYPTED_TYPES:
            path = self._decrypted(path, where)
            media_type = ENCRYPTED_TYPES[media_type]
        with path.open("rb") as file:
            real_type = TAR_GZIP_TYPE if file.read(2) == _GZIP_MAGIC else TAR_TYPE
        if media_type not in ("", real_type):
            raise BundleError(f"{where}.mediaType", f"is {image.media_type!r}, but the file is {real_type}")
        plain = self._file()
        with _expanded(path, plain, f"{where}.path") as archive:
            _check_members(archive, f"{where}.path")
            diff_id = _digest(plain)
        return _blob(path, real_type), diff_id

    def _decrypted(self, path: Path, where: str) -> Path:
        """Image decrypted with the first key that authenticates it: 12 bytes IV, ciphertext, 16 bytes tag."""
        body_bytes = path.stat().st_size - _GCM_IV_BYTES - _GCM_TAG_BYTES
        if body_bytes < 0:
            raise BundleError(f"{where}.path", "is too short for an encrypted image")
        target = self._file()
        for key in self._image_keys:
            with path.open("rb") as source, target.open("wb") as output:
                iv = source.read(_GCM_IV_BYTES)
                decryptor = Cipher(algorithms.AES256(key), modes.GCM(iv)).decryptor()
                left = body_bytes
                while left and (chunk := source.read(min(left, _CHUNK_BYTES))):
                    left -= len(chunk)
                    output.write(decryptor.update(chunk))
                try:
                    decryptor.finalize_with_tag(source.read(_GCM_TAG_BYTES))
                except InvalidTag:
                    continue
            return target
        raise BundleError(f"{where}.path", "is encrypted, and none of this cloud's image keys opens it")


class _Source:
    """The inner archive: looks up, checks and repacks members without extracting them."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        _check_members(archive, "batch.tar.gz")
        self._members = {_normal(member.name): member for member in archive.getmembers()}

    def is_folder(self, path: str) -> bool:
        """Whether the archive has a folder of this name."""
        member = self._members.get(path)
        return member.isdir() if member else any(name.startswith(f"{path}/") for name in self._members)

    def text(self, path: str, where: str) -> str | None:
        """Text of a small file, None when it is not there."""
        member = self._members.get(path)
        if member is None or not member.isfile():
            return None
        if member.size > _STATE_LIMIT_BYTES:
            raise BundleError(where, f"{path} has more than {_STATE_LIMIT_BYTES} bytes")
        try:
            return cast("IO[bytes]", self._archive.extractfile(member)).read().decode()
        except UnicodeDecodeError as error:
            raise BundleError(where, f"{path} is no UTF-8 text: {error}") from error

    def copy_file(self, path: str, target: Path, where: str) -> None:
        """Copy a regular file out of the archive."""
        member = self._members.get(path)
        if member is None or not member.isfile():
            raise BundleError(where, f"{path} is no file of the bundle")
        with target.open("wb") as file:
            _copy(cast("IO[bytes]", self._archive.extractfile(member)), file)

    def pack_folder(self, folder: str, target: Path, where: str) -> None:
        """Write a folder as a layer: sorted, owner 0:0, names relative to the folder."""
        prefix = f"{folder}/"
        with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as layer:
            inside = [(member.islnk(), name) for name, member in self._members.items() if name.startswith(prefix)]
            for _, name in sorted(inside):  # hard links after the files they need
                member = self._members[name]
                entry = tarfile.TarInfo(name.removeprefix(prefix))
                entry.mode, entry.mtime, entry.type = member.mode, int(member.mtime), member.type
                entry.linkname = member.linkname
                if member.islnk():
                    linked = _normal(member.linkname)
                    if not linked.startswith(prefix):
                        raise BundleError(where, f"hard link {name} leads out of {folder}")
                    entry.linkname = linked.removeprefix(prefix)
                if member.isfile():
                    entry.size = member.size
                    layer.addfile(entry, self._archive.extractfile(member))
                else:
                    layer.addfile(entry)


def _certificate_of_kid(kid: object) -> tuple[str, int] | None:
    """Issuer and serial number in a `kid` header, base64 of `ISSUER_DN:SERIAL_HEX`; None when it is malformed."""
    try:
        issuer, _, number = base64.b64decode(str(kid), validate=True).decode().rpartition(":")
        return issuer, int(number, 16)
    except ValueError:
        return None


def _image_folder(item: Item, image: Image, where: str) -> str:
    """Where the bundle keeps an image: below the item's folder, else below the bundle itself (cloud-rest.md)."""
    name = image.path or image.source_folder
    if item.source_folder or not name:
        base = item.source_folder or item.identity.codename
        if not base:
            raise BundleError(where, "has no sourceFolder, no path, and its item no codename")
        name = f"{base}/{name or image.arch_info.architecture}"
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise BundleError(where, f"{name!r} leads out of the bundle")
    return _normal(name)


def _image_config(config: BundleConfig, item: Item, image: Image, diff_id: str, where: str) -> dict[str, Any]:
    document: dict[str, Any] = {
        **_platform(image),
        "config": image_run_config(item, image, where),
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    }
    if config.author:
        document["author"] = config.author
    return document


def _platform(image: Image) -> dict[str, Any]:
    arch, os_info = image.arch_info, image.os_info
    platform: dict[str, Any] = {"architecture": arch.architecture, "os": os_info.os.lower()}
    if arch.variant:
        platform["variant"] = arch.variant
    if os_info.version:
        platform["os.version"] = os_info.version
    if os_info.features:
        platform["os.features"] = os_info.features
    return platform


def _normal(name: str) -> str:
    return str(PurePosixPath(name.removeprefix("./")))


def _check_members(archive: tarfile.TarFile, where: str) -> None:
    """Refuse archives that could harm whoever unpacks them."""
    count = 0
    try:
        for member in archive:
            count += 1
            if count > _MEMBER_LIMIT:
                raise BundleError(where, f"has more than {_MEMBER_LIMIT} members")
            if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
                raise BundleError(where, f"member {member.name!r} leads out of the archive")
            if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
                raise BundleError(where, f"member {member.name!r} is a device or another special file")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BundleError(where, f"is no tar archive: {error}") from error


@contextmanager
def _expanded(path: Path, plain: Path, where: str = "batch.tar.gz") -> Iterator[tarfile.TarFile]:
    """The archive at `path`, decompressed into `plain` when it is gzip, so that members can be read in any order."""
    try:
        with path.open("rb") as source, plain.open("wb") as target:
            packed = source.read(2) == _GZIP_MAGIC
            source.seek(0)
            _copy(gzip.GzipFile(fileobj=source) if packed else source, target, _UNPACKED_LIMIT_BYTES, where)
        archive = tarfile.open(plain, "r:")  # noqa: SIM115 - closed below, opened apart to name its errors
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BundleError(where, f"is no tar archive: {error}") from error
    with archive:
        yield archive
    plain.unlink()


def _copy(
    source: IO[bytes] | gzip.GzipFile,
    target: IO[bytes] | gzip.GzipFile,
    limit_bytes: int = 1 << 62,
    where: str = "file",
) -> None:
    copied = 0
    while chunk := source.read(_CHUNK_BYTES):
        copied += len(chunk)
        if copied > limit_bytes:
            raise BundleError(where, f"is larger than {limit_bytes} bytes when unpacked")
        target.write(chunk)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _blob(path: Path, media_type: str) -> Blob:
    return Blob(_digest(path), path.stat().st_size, media_type, path)
