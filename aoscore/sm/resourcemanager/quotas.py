"""Limits on what an instance stores: the quotas ``storageLimit`` and ``stateLimit`` of its item.

Where the file system has project quotas, storage and state of each instance are projects of their own: their limits
are separate, whoever owns the files, and their use is known without looking at every file. Otherwise the instance's
user is limited, where the file system has user quotas; then what CM has set already stays (sm-runtime.md §2.4). A
secondary node mounts both from the main node and has neither: there CM's quotas hold.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from aoscore.common import quota
from aoscore.common.errors import AosError, NotSupportedError
from aoscore.common.log import kv
from aoscore.common.quota import Kind

_log = logging.getLogger(__name__)

STORAGES, STATES = "storages", "states"
_LARGEST_UID = 2**30


class Claim(msgspec.Struct, frozen=True):
    """What an instance may have at a place; `name` is STORAGES or STATES, a limit of 0 means none."""

    name: str
    path: Path
    limit_bytes: int


def project_id(uid: int, name: str) -> int:
    """Project of an instance's storage or state; its uid is its own on the node. 0 is everybody's project."""
    return 2 * uid + (1 if name == STATES else 0)


class DiskQuotas:
    """Sets limits and tells use. Blocking; called from worker threads."""

    def __init__(self) -> None:
        self._kinds: dict[int, Kind | None] = {}
        """What each file system has, by its number."""

    def limit(self, uid: int, claims: Sequence[Claim]) -> None:
        """Limit an instance; repeatable. Raises AosError or OSError when a quota that exists can't be set."""
        if not 0 < uid <= _LARGEST_UID:
            return
        of_user: dict[int, list[Claim]] = {}
        for claim in claims:
            kind = self._kind(claim.path)
            if kind is Kind.PROJECT:
                project = project_id(uid, claim.name)
                if quota.project_of(claim.path) != project:
                    quota.set_project(claim.path, project)
                quota.set_limit(claim.path, kind, project, claim.limit_bytes)
            elif kind is Kind.USER:
                of_user.setdefault(_file_system(claim.path), []).append(claim)
        for together in of_user.values():
            path, limit_bytes = together[0].path, sum(claim.limit_bytes for claim in together)
            # One that is limited at one place only can't be: the user is limited at both or none.
            if all(claim.limit_bytes for claim in together) and not quota.usage(path, Kind.USER, uid).limit_bytes:
                quota.set_limit(path, Kind.USER, uid, limit_bytes)

    def used_bytes(self, uid: int, name: str, path: Path) -> int | None:
        """What an instance has stored at a place, if that can be known without counting its files."""
        try:
            if not 0 < uid <= _LARGEST_UID or self._kind(path) is not Kind.PROJECT:
                return None
            project = project_id(uid, name)
            return quota.usage(path, Kind.PROJECT, project).used_bytes if quota.project_of(path) == project else None
        except (AosError, OSError):
            # Counting the files will tell, or say what is wrong.
            return None

    def _kind(self, path: Path) -> Kind | None:
        number = _file_system(path)
        if number not in self._kinds:
            self._kinds[number] = _probe(path)
            if self._kinds[number] is None:
                _log.warning(kv("No disk quotas, what instances store there is not limited by SM", path=path))
        return self._kinds[number]


def _probe(path: Path) -> Kind | None:
    for kind in (Kind.PROJECT, Kind.USER):
        try:
            quota.usage(path, kind, 0)
        except NotSupportedError:
            continue
        return kind
    return None


def _file_system(path: Path) -> int:
    return os.stat(path).st_dev  # noqa: PTH116 - works the same for any path-like
