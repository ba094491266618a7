"""Deployment bundles: signature, OCI documents, layers, and everything that must be refused."""

import base64
import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from aoscore.devcloud.bundleconfig import BundleError
from aoscore.devcloud.bundles import (
    COMPONENT_TYPES,
    EMPTY_TYPE,
    IMAGE_CONFIG_TYPE,
    INDEX_TYPE,
    ITEM_CONFIG_TYPE,
    MANIFEST_TYPE,
    TAR_GZIP_TYPE,
    TAR_TYPE,
    BundleReader,
    ItemImages,
    stable_id,
)
from aoscore.devcloud.ca import Authority
from aoscore.devcloud.packing import load_user, pack_bundle

SERVICE: dict[str, Any] = {
    "identity": {"type": "service", "codename": "hello"},
    "version": "1.0.0",
    "sourceFolder": "hello",
    "images": [{"sourceFolder": "rootfs", "archInfo": {"architecture": "amd64"}, "cmd": "/bin/app"}],
}


class Publisher:
    """Makes bundles in a directory and reads them as the cloud does."""

    def __init__(self, directory: Path, user_file: Path) -> None:
        self.folder = directory / "source"
        self.user_file = user_file
        self._work = directory
        (self.folder / "hello" / "rootfs" / "bin").mkdir(parents=True)
        (self.folder / "hello" / "rootfs" / "bin" / "app").write_text("#!/bin/sh\n")

    def pack(self, *items: dict[str, Any]) -> Path:
        document = {"schemaVersion": 2, "publisher": {"author": "Alice"}, "items": list(items)}
        (self.folder / "config.yaml").write_text(yaml.safe_dump(document))
        target = self._work / "batch.tar.gz"
        pack_bundle(self.folder, self.user_file, target)
        return target

    def read(self, bundle: Path, *keys: bytes, services: dict[str, str] | None = None) -> list[ItemImages]:
        work = self._work / f"work-{len(list(self._work.iterdir()))}"
        work.mkdir()
        certificate, _ = load_user(self.user_file)
        return BundleReader(work, certificate, services=services or {}, image_keys=keys).read(bundle)

    def item(self, *items: dict[str, Any], keys: tuple[bytes, ...] = ()) -> ItemImages:
        (item,) = self.read(self.pack(*items), *keys)
        return item


@pytest.fixture
def publisher(tmp_path: Path, sp_file: Path) -> Publisher:
    return Publisher(tmp_path, sp_file)


def documents(item: ItemImages) -> dict[str, Any]:
    """All JSON documents of an item by digest; every blob's digest and size are checked on the way."""
    found = {}
    for blob in item.blobs:
        content = blob.path.read_bytes()
        assert blob.digest == "sha256:" + hashlib.sha256(content).hexdigest()
        assert blob.size_bytes == len(content)
        if blob.media_type.endswith("+json"):
            found[blob.digest] = json.loads(content)
    return found


def layer(item: ItemImages) -> bytes:
    (blob,) = [one for one in item.blobs if not one.media_type.endswith("+json")]
    return blob.path.read_bytes()


def names(tar: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return archive.getnames()


def test_a_folder_becomes_index_manifest_configs_and_layer(publisher: Publisher) -> None:
    rootfs = publisher.folder / "hello" / "rootfs"
    (rootfs / "bin" / "link").symlink_to("/bin/app")
    os.link(rootfs / "bin" / "app", rootfs / "bin" / "aaa")
    item = publisher.item(SERVICE)
    parts = documents(item)
    index = parts[item.index_digest]
    assert (index["schemaVersion"], index["mediaType"]) == (2, INDEX_TYPE)
    (entry,) = index["manifests"]
    assert entry["platform"] == {"architecture": "amd64", "os": "linux"}
    assert entry["mediaType"] == MANIFEST_TYPE
    manifest = parts[entry["digest"]]
    assert manifest["config"]["mediaType"] == IMAGE_CONFIG_TYPE
    assert manifest["aosItemConfig"]["mediaType"] == ITEM_CONFIG_TYPE
    assert parts[manifest["aosItemConfig"]["digest"]]["author"] == "Alice"
    (descriptor,) = manifest["layers"]
    assert descriptor["mediaType"] == TAR_GZIP_TYPE
    tar = gzip.decompress(layer(item))
    image = parts[manifest["config"]["digest"]]
    assert image["rootfs"] == {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(tar).hexdigest()]}
    assert image["config"] == {"Cmd": ["/bin/app"]}
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = {member.name: member for member in archive}
        assert set(members) == {"bin", "bin/app", "bin/aaa", "bin/link"}
        assert members["bin/link"].linkname == "/bin/app"
        assert {(member.uid, member.gid) for member in members.values()} == {(0, 0)}
        hard = [member for member in members.values() if member.islnk()]
        assert len(hard) == 1
        assert archive.extractfile(hard[0]).read() == b"#!/bin/sh\n"  # type: ignore[union-attr]


def test_the_same_content_gives_the_same_digests(publisher: Publisher) -> None:
    assert publisher.item(SERVICE).index_digest == publisher.item(SERVICE).index_digest


def test_two_images_give_two_manifests_with_their_platforms(publisher: Publisher) -> None:
    arm = {
        **SERVICE["images"][0],
        "archInfo": {"architecture": "arm64", "variant": "v8"},
        "osInfo": {"os": "Linux", "version": "6.6", "features": ["x"]},
    }
    item = publisher.item({**SERVICE, "images": [*SERVICE["images"], arm]})
    platforms = [entry["platform"] for entry in documents(item)[item.index_digest]["manifests"]]
    assert platforms == [
        {"architecture": "amd64", "os": "linux"},
        {"architecture": "arm64", "variant": "v8", "os": "linux", "os.version": "6.6", "os.features": ["x"]},
    ]


def tar_of(*entries: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as archive:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.type = kind
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return output.getvalue()


@pytest.mark.parametrize(
    ("pack", "media_type"), [(lambda tar: tar, TAR_TYPE), (lambda tar: gzip.compress(tar), TAR_GZIP_TYPE)]
)
def test_an_archive_is_taken_as_it_is(publisher: Publisher, pack: Callable[[bytes], bytes], media_type: str) -> None:
    tar = tar_of(("app", b"1"))
    packed = pack(tar)
    (publisher.folder / "hello" / "image").write_bytes(packed)
    item = publisher.item({**SERVICE, "images": [{"path": "image", "archInfo": {"architecture": "amd64"}}]})
    assert layer(item) == packed
    (blob,) = [one for one in item.blobs if not one.media_type.endswith("+json")]
    assert blob.media_type == media_type
    (image,) = [one for one in documents(item).values() if "rootfs" in one]
    assert image["rootfs"]["diff_ids"] == ["sha256:" + hashlib.sha256(tar).hexdigest()]


def test_an_encrypted_image_is_opened_with_the_clouds_key(publisher: Publisher) -> None:
    key, iv = os.urandom(32), os.urandom(12)
    packed = gzip.compress(tar_of(("app", b"1")))
    (publisher.folder / "hello" / "image").write_bytes(iv + AESGCM(key).encrypt(iv, packed, None))
    media_type = "application/vnd.aos.image.layer.enc.v1.aes256gcm+tar+gzip"
    service = {
        **SERVICE,
        "images": [{"path": "image", "mediaType": media_type, "archInfo": {"architecture": "amd64"}}],
    }
    assert layer(publisher.item(service, keys=(os.urandom(32), key))) == packed
    with pytest.raises(BundleError, match="none of this cloud's image keys"):
        publisher.item(service, keys=(os.urandom(32),))


def test_a_component_is_one_payload_with_an_empty_config(publisher: Publisher) -> None:
    (publisher.folder / "rootfs.squashfs").write_bytes(b"hsqs")
    component = {
        "identity": {"type": "component", "codename": "rootfs"},
        "version": "9.1.2",
        "images": [
            {
                "path": "rootfs.squashfs",
                "mediaType": COMPONENT_TYPES[1],
                "archInfo": {"architecture": "amd64"},
            }
        ],
    }
    item = publisher.item(component)
    assert layer(item) == b"hsqs"
    parts = documents(item)
    manifest = parts[parts[item.index_digest]["manifests"][0]["digest"]]
    assert manifest["config"]["mediaType"] == EMPTY_TYPE
    assert parts[manifest["config"]["digest"]] == {}
    assert manifest["layers"][0]["mediaType"] == COMPONENT_TYPES[1]
    component["images"][0].pop("mediaType")
    with pytest.raises(BundleError, match="mediaType"):
        publisher.item(component)


def test_connections_name_items_of_the_cloud_and_of_the_bundle(publisher: Publisher) -> None:
    configuration = {"hostname": "me", "allowedConnections": ["me/1/tcp", "old/2/tcp", "unknown/3/tcp"]}
    (item,) = publisher.read(publisher.pack({**SERVICE, "configuration": configuration}), services={"old": "old-id"})
    (config,) = [one for one in documents(item).values() if "runtimes" in one]
    assert set(config["allowedConnections"]) == {f"{stable_id(item.identity)}/1/tcp", "old-id/2/tcp", "unknown/3/tcp"}


def test_the_default_state_comes_along(publisher: Publisher) -> None:
    service = {**SERVICE, "configuration": {"state": {"required": True}}}
    with pytest.raises(BundleError, match="required"):
        publisher.item(service)
    (publisher.folder / "hello" / "default_state.dat").write_text("counter=0")
    assert publisher.item(service).default_state == "counter=0"


# What must be refused


def package(parts: dict[str, bytes]) -> bytes:
    return gzip.compress(tar_of(*parts.items()))


def parts_of(bundle: Path) -> dict[str, bytes]:
    with tarfile.open(bundle) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def refused(publisher: Publisher, content: bytes) -> BundleError:
    upload = publisher.folder.parent / "upload"
    upload.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        publisher.read(upload)
    return caught.value


def test_a_bundle_of_another_user_is_refused(publisher: Publisher, authority: Authority, tmp_path: Path) -> None:
    bundle = publisher.pack(SERVICE)
    publisher.user_file = tmp_path / "other.p12"
    publisher.user_file.write_bytes(authority.user_pkcs12("sp", "mallory"))
    assert refused(publisher, bundle.read_bytes()).field == "package.sign"


def test_a_changed_part_is_refused(publisher: Publisher) -> None:
    parts = parts_of(publisher.pack(SERVICE))
    config = parts["config.yaml"].replace(b"1.0.0", b"6.6.6")
    assert refused(publisher, package({**parts, "config.yaml": config})).field == "config.yaml"
    assert refused(publisher, package({**parts, "config.yaml": parts["config.yaml"] + b"#"})).field == "config.yaml"
    assert refused(publisher, package({**parts, "batch.tar.gz": b"x"})).field == "batch.tar.gz"


def test_a_package_with_wrong_members_is_refused(publisher: Publisher) -> None:
    parts = parts_of(publisher.pack(SERVICE))
    assert "extra" in refused(publisher, package({**parts, "extra": b""})).reason
    shorter = {name: content for name, content in parts.items() if name != "config.yaml"}
    assert "config.yaml is missing" in refused(publisher, package(shorter)).reason
    assert refused(publisher, b"no archive").field == "file"
    assert refused(publisher, package(parts)[:-40]).field == "file"


@pytest.mark.parametrize("change", ["none", "hs256", "kid", "list"])
def test_a_forged_signature_is_refused(publisher: Publisher, change: str) -> None:
    parts = parts_of(publisher.pack(SERVICE))
    certificate, key = load_user(publisher.user_file)
    token = parts["package.sign"].decode()
    payload, header = jwt.decode(token, options={"verify_signature": False}), jwt.get_unverified_header(token)
    match change:
        case "none":
            token = jwt.encode(payload, None, algorithm="none", headers={"kid": header["kid"]})
        case "hs256":
            token = jwt.encode(payload, "k" * 32, algorithm="HS256", headers={"kid": header["kid"]})
        case "kid":
            wrong = base64.b64encode(f"{certificate.issuer.rfc4514_string()}:ff".encode()).decode()
            token = jwt.encode(payload, key, algorithm="RS256", headers={"kid": wrong})
        case "list":
            token = jwt.encode({"data": payload["data"][:1]}, key, algorithm="RS256", headers={"kid": header["kid"]})
    assert refused(publisher, package({**parts, "package.sign": token.encode()})).field == "package.sign"


def signed(publisher: Publisher, inner: bytes, config: dict[str, Any]) -> bytes:
    """A package with any inner archive, correctly signed."""
    certificate, key = load_user(publisher.user_file)
    parts = {"batch.tar.gz": gzip.compress(inner), "config.yaml": yaml.safe_dump(config).encode()}
    entries = [
        {"name": name, "hash": hashlib.sha3_512(content).hexdigest(), "size": len(content)}
        for name, content in parts.items()
    ]
    kid = base64.b64encode(f"{certificate.issuer.rfc4514_string()}:{certificate.serial_number:x}".encode()).decode()
    token = jwt.encode({"data": entries}, key, algorithm="RS256", headers={"kid": kid})
    return package({**parts, "package.sign": token.encode()})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../escape", tarfile.REGTYPE),
        ("/absolute", tarfile.REGTYPE),
        ("hello/rootfs/../../../x", tarfile.REGTYPE),
        ("hello/rootfs/null", tarfile.CHRTYPE),
        ("hello/rootfs/pipe", tarfile.FIFOTYPE),
    ],
)
def test_a_hostile_member_is_refused(publisher: Publisher, name: str, kind: bytes) -> None:
    content = signed(publisher, tar_of((name, b""), kind=kind), {"schemaVersion": 2, "items": [SERVICE]})
    assert refused(publisher, content).field == "batch.tar.gz"


def test_a_hard_link_out_of_the_image_is_refused(publisher: Publisher) -> None:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as archive:
        link = tarfile.TarInfo("hello/rootfs/link")
        link.type, link.linkname = tarfile.LNKTYPE, "hello/secret"
        archive.addfile(link)
    content = signed(publisher, output.getvalue(), {"schemaVersion": 2, "items": [SERVICE]})
    assert "hard link" in refused(publisher, content).reason


@pytest.mark.parametrize(
    ("image", "field"),
    [
        ({"path": "../../etc/passwd"}, "config.yaml.items[0].images[0]"),
        ({"path": "absent"}, "config.yaml.items[0].images[0].path"),
        ({"path": "text"}, "config.yaml.items[0].images[0].path"),
        ({"sourceFolder": "rootfs", "mediaType": "text/plain"}, "config.yaml.items[0].images[0].mediaType"),
    ],
)
def test_a_wrong_image_is_refused(publisher: Publisher, image: dict[str, Any], field: str) -> None:
    (publisher.folder / "hello" / "text").write_text("no archive at all")
    bundle = publisher.pack({**SERVICE, "images": [{**image, "archInfo": {"architecture": "amd64"}}]})
    assert refused(publisher, bundle.read_bytes()).field == field


def test_an_archive_that_names_a_way_out_is_refused(publisher: Publisher) -> None:
    (publisher.folder / "hello" / "image").write_bytes(tar_of(("../x", b"")))
    bundle = publisher.pack({**SERVICE, "images": [{"path": "image", "archInfo": {"architecture": "amd64"}}]})
    assert "leads out" in refused(publisher, bundle.read_bytes()).reason
