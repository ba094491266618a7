"""Images of services: unpacked as a node of the older kind takes them; wrong ones are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from aoscore.common.errors import AosError, ChecksumError, InvalidArgumentError
from aoscore.mp.filechunker.files import files_of, tree_digest
from aoscore.mp.imageunpacker.unpacker import unpack_image
from tests.support.oldimages import ServiceImage, digest, tar, write

FILES = {"bin/app": b"#!/bin/sh\n", "etc/empty": b""}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_layer_becomes_a_directory(tmp_path: Path, mode: str) -> None:
    image = ServiceImage(FILES, layer_mode=mode)
    target = tmp_path / "image"
    unpack_image(write(tmp_path / "archive", image.pack(mode=mode)), target)
    manifest = json.loads((target / "manifest.json").read_text())
    name = manifest["layers"][0]["digest"]
    tree = target / "blobs" / name.replace(":", "/")
    assert name == tree_digest(files_of(tree))
    assert (tree / "bin/app").read_bytes() == FILES["bin/app"]
    assert [file.path for file in files_of(tree)] == ["bin/app", "etc/empty"]
    assert not (target / "blobs" / image.layer.replace(":", "/")).exists()
    assert not (target / "tmprootfs").exists()


def test_layer_may_be_a_directory_already(tmp_path: Path) -> None:
    image = ServiceImage(FILES)
    unpacked = tmp_path / "first"
    unpack_image(write(tmp_path / "archive", image.pack()), unpacked)
    files = {one.path: (unpacked / one.path).read_bytes() for one in files_of(unpacked)}
    unpack_image(write(tmp_path / "again", tar(files)), tmp_path / "second")
    assert files_of(tmp_path / "second") == files_of(unpacked)
    (name,) = (path for path in files if path.endswith("bin/app"))
    with pytest.raises(ChecksumError, match="is damaged"):
        unpack_image(write(tmp_path / "third.tar", tar(files | {name: b"other"})), tmp_path / "third")


def _no_manifest(image: ServiceImage) -> bytes:
    return tar({"other": b""})


def _bad_json(image: ServiceImage) -> bytes:
    return tar({"manifest.json": b"{"})


def _no_layers(image: ServiceImage) -> bytes:
    image.manifest["layers"] = []
    return image.pack()


def _bad_digest(image: ServiceImage) -> bytes:
    image.manifest["config"] = {"digest": "sha256:../../../etc/passwd"}
    return image.pack()


def _missing_blob(image: ServiceImage) -> bytes:
    del image.blobs[image.layer]
    return image.pack()


def _wrong_blob(image: ServiceImage) -> bytes:
    image.blobs[image.layer] = tar({"evil": b""})
    return image.pack()


def _linked_blobs(image: ServiceImage) -> bytes:
    image.blobs.clear()
    return image.pack(links={"blobs": "/etc"})


def _layer_that_leaves(image: ServiceImage) -> bytes:
    layer = tar({"../../escaped": b"x"})
    image.blobs[digest(layer)] = layer
    image.manifest["layers"] = [{"digest": digest(layer)}]
    return image.pack()


def _service_that_is_no_json(image: ServiceImage) -> bytes:
    image.blobs[digest(b"{")] = b"{"
    image.manifest["aosService"] = {"digest": digest(b"{")}
    return image.pack()


def _cut(image: ServiceImage) -> bytes:
    return image.pack()[:200]


@pytest.mark.parametrize(
    ("spoil", "kind", "text"),
    [
        (_no_manifest, InvalidArgumentError, "no file manifest.json"),
        (_bad_json, InvalidArgumentError, "manifest.json of the image"),
        (_no_layers, InvalidArgumentError, "names no layers"),
        (_bad_digest, InvalidArgumentError, "'config' of the manifest has no usable digest"),
        (_missing_blob, InvalidArgumentError, "the image has no blob"),
        (_wrong_blob, ChecksumError, "of the image is damaged"),
        (_linked_blobs, InvalidArgumentError, "the blobs of the image are a link"),
        (_layer_that_leaves, InvalidArgumentError, "archive can't be unpacked"),
        (_service_that_is_no_json, InvalidArgumentError, "of the image"),
        (_cut, InvalidArgumentError, "archive can't be unpacked"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, spoil: Callable[[ServiceImage], bytes], kind: type[AosError], text: str
) -> None:
    archive = write(tmp_path / "archive", spoil(ServiceImage(FILES)))
    with pytest.raises(kind, match=text):
        unpack_image(archive, tmp_path / "image")
    assert not (tmp_path / "escaped").exists()
