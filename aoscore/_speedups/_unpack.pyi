import os
from collections.abc import Callable

from aoscore._speedups.unpack_types import Compression, Owners, UnpackResult, Whiteouts

def unpack_layer(
    blob: int | str | os.PathLike[str],
    destination: int | str | os.PathLike[str],
    *,
    compression: Compression,
    blob_size_bytes: int | None = None,
    max_unpacked_bytes: int = ...,
    max_members: int = ...,
    owners: Owners = ...,
    uid_shift: int = 0,
    gid_shift: int = 0,
    whiteouts: Whiteouts = ...,
    xattrs: bool = True,
    allow_devices: bool = False,
    sync: bool = False,
    progress: Callable[[int], None] | None = None,
) -> UnpackResult: ...
