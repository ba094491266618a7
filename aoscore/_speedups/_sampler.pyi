from collections.abc import Mapping
from types import TracebackType
from typing import Self

from aoscore._speedups.sampler_types import Sample

class Sampler:
    def __init__(
        self,
        *,
        filesystems: Mapping[str, str] | None = None,
        memory_details: bool = False,
        proc_root: str = "/proc",
        cgroup_root: str = "/sys/fs/cgroup",
        max_kept_files: int = 768,
    ) -> None: ...
    def add(self, name: str, cgroup: str) -> None: ...
    def remove(self, name: str) -> None: ...
    def sample(self) -> Sample: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...
