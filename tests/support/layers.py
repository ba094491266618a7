"""Both layer unpackers, the native one and its plain twin, on bytes, and what each made of them."""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

from aoscore._speedups import _unpack
from aoscore._speedups._plain import unpack as plain_unpack
from aoscore._speedups.unpack import Compression, UnpackError, UnpackResult
from tests.support.tar import tree

IMPLEMENTATIONS: dict[str, ModuleType] = {"native": _unpack, "plain": plain_unpack}


def unpack_bytes(module: ModuleType, folder: Path, data: bytes, **options: Any) -> UnpackResult:
    """Unpack an archive into `folder`/out."""
    blob = folder / "blob"
    blob.write_bytes(data)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    options.setdefault("compression", Compression.NONE)
    result = module.unpack_layer(blob, out, **options)
    assert isinstance(result, UnpackResult)
    return result


def both(folder: Path, data: bytes, **options: Any) -> tuple[Any, Any]:
    """What each implementation makes of an archive: outcome and tree."""
    found = []
    for name, module in IMPLEMENTATIONS.items():
        place = folder / name
        remove_tree(place)
        place.mkdir(parents=True)
        outcome: Any
        try:
            outcome = unpack_bytes(module, place, data, **options)
        except UnpackError as error:
            outcome = (type(error), error.code, error.member, error.offset_bytes, str(error))
        except OSError as error:
            outcome = (type(error), error.errno, error.filename)
        seen = tree(place / "out")
        # Directories that nobody described keep the time they were made.
        for path, one in seen.items():
            if one[3] > 1_700_000_000 * 10**9:
                seen[path] = (*one[:3], "now", *one[4:])
        found.append((outcome, seen))
    return found[0], found[1]


def remove_tree(path: Path) -> None:
    """Delete a tree, and nothing that its links lead to."""
    for folder, directories, files in os.walk(path, topdown=False):
        for name in files:
            Path(folder, name).unlink()
        for name in directories:
            child = Path(folder, name)
            child.unlink() if child.is_symlink() else child.rmdir()
    if path.exists():
        path.rmdir()
