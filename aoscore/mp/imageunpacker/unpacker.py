"""Makes of the archive of a service what a peer of the older kind takes: its image with unpacked layers (mp.md §7).

Unlike AosCore 8 it looks at what is in the blobs, and takes all layers. Everything blocks: call it in a worker.
"""

import json
import re
from pathlib import Path
from typing import Any

from aoscore._speedups import unpack
from aoscore.common.blobstore import file_digest
from aoscore.common.config import from_json
from aoscore.common.errors import ChecksumError, InvalidArgumentError
from aoscore.mp.filechunker.files import files_of, tree_digest

_MAX_UNPACKED_BYTES = 1024 * 1024 * 1024
_MAX_MANIFEST_BYTES = 1024 * 1024
_DIGEST = re.compile(r"sha(?:256:[0-9a-f]{64}|384:[0-9a-f]{96}|512:[0-9a-f]{128})")
_MAGIC = {b"\x1f\x8b": unpack.Compression.GZIP, b"\x28\xb5": unpack.Compression.ZSTD}


def unpack_image(archive: Path, target: Path) -> None:
    """Unpack `archive` into the new directory `target`, and its layers in it.

    Raises InvalidArgumentError for an image that is none, ChecksumError for content that is not what its name says,
    OSError.
    """
    target.mkdir(mode=0o700)
    _unpack(archive, target)
    manifest = _read_json(target / "manifest.json")
    for name in ("config", "aosService"):
        descriptor = _member(manifest, name)
        if descriptor is None and name == "aosService":
            continue
        blob = _checked_file(target, _digest_of(descriptor, name), name)
        if name == "aosService":
            _read_json(blob)
    layers = _member(manifest, "layers")
    if not isinstance(layers, list) or not layers:
        raise InvalidArgumentError("the manifest of the image names no layers")
    for index, layer in enumerate(layers):
        _set_member(layer, "digest", _unpack_layer(target, _digest_of(layer, f"layers[{index}]"), index))
    (target / "manifest.json").write_text(json.dumps(manifest))


def _unpack_layer(target: Path, digest: str, index: int) -> str:
    """Put a directory in the place of the layer's blob; its digest."""
    blob = _path(target, digest)
    if blob.is_dir():
        # AosCore 8 follows links while hashing; what it packed must stay usable.
        if all(tree_digest(files_of(blob, follow_links=follow)) != digest for follow in (False, True)):
            raise ChecksumError(f"layer {digest} is damaged: its files make another digest")
        return digest
    _checked_file(target, digest, f"layers[{index}]")
    tree = target / "tmprootfs"
    tree.mkdir(mode=0o755)
    _unpack(blob, tree)
    blob.unlink()
    actual = tree_digest(files_of(tree))
    final = _path(target, actual)
    final.parent.mkdir(exist_ok=True)
    tree.rename(final)
    return actual


def _unpack(archive: Path, target: Path) -> None:
    with archive.open("rb") as file:
        magic = file.read(2)
    try:
        unpack.unpack_layer(
            archive,
            target,
            compression=_MAGIC.get(magic, unpack.Compression.NONE),
            max_unpacked_bytes=_MAX_UNPACKED_BYTES,
            owners=unpack.Owners.PROCESS,
            whiteouts=unpack.Whiteouts.KEEP,
            xattrs=False,
        )
    except unpack.UnpackError as error:
        raise InvalidArgumentError(f"archive can't be unpacked: {error}") from error


def _checked_file(target: Path, digest: str, what: str) -> Path:
    path = _path(target, digest)
    if path.is_symlink() or not path.is_file():
        raise InvalidArgumentError(f"the image has no blob {digest} for {what}")
    actual = file_digest(path, digest.partition(":")[0])
    if actual != digest:
        raise ChecksumError(f"blob {digest} of the image is damaged: its content is {actual}")
    return path


def _path(target: Path, digest: str) -> Path:
    algorithm, _, digits = digest.partition(":")
    folder = target / "blobs" / algorithm
    if folder.is_symlink() or folder.parent.is_symlink():
        raise InvalidArgumentError("the blobs of the image are a link")
    return folder / digits


def _digest_of(descriptor: Any, what: str) -> str:
    digest = _member(descriptor, "digest")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise InvalidArgumentError(f"{what!r} of the manifest has no usable digest")
    return digest


def _read_json(path: Path) -> dict[str, Any]:
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise InvalidArgumentError(f"the image has no file {path.name} of at most {_MAX_MANIFEST_BYTES} bytes")
    return from_json(path.read_bytes(), dict, what=f"{path.name} of the image")


def _name(document: Any, key: str) -> str:
    """The key as the document writes it: case is of no matter."""
    if not isinstance(document, dict):
        raise InvalidArgumentError(f"the manifest of the image has no place for {key!r}")
    return next((name for name in document if name.lower() == key.lower()), key)


def _member(document: Any, key: str) -> Any:
    return document.get(_name(document, key))


def _set_member(document: Any, key: str, value: str) -> None:
    document[_name(document, key)] = value
