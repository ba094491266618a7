"""quotactl(2) as a kernel answers it, for machines whose kernel has no quotas."""

import ctypes
import errno
from typing import Any

from aoscore.common.quota import Limits

GET, SET = 0x800007, 0x800008
BLOCK_LIMITS = 1


class KernelQuotas:
    """Stands in for libc: keeps limits by kind (0 users, 2 projects) and id."""

    def __init__(self, *kinds: int, refuse: int = 0) -> None:
        """`kinds` are switched on; with `refuse` every call fails with that errno."""
        self.kinds = set(kinds)
        self.refuse = refuse
        self.limits: dict[tuple[int, int], int] = {}
        """In bytes."""
        self.used: dict[tuple[int, int], int] = {}

    def quotactl(self, command: int, device: bytes, number: Any, limits: Any) -> int:
        assert device
        kind, key = command & 0xFF, (command & 0xFF, number.value)
        asked: Limits = limits._obj
        if self.refuse or kind not in self.kinds:
            ctypes.set_errno(self.refuse or errno.ESRCH)
            return -1
        if command >> 8 == SET:
            assert asked.valid == BLOCK_LIMITS, "only the limit of blocks is to change"
            self.limits[key] = asked.block_hard * 1024
        else:
            assert command >> 8 == GET
            asked.block_hard = self.limits.get(key, 0) // 1024
            asked.space = self.used.get(key, 0)
        return 0
