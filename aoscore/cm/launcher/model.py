"""What the launcher keeps: what is wanted, and every instance it knows (cm-orchestration §4.1)."""

from datetime import datetime
from enum import StrEnum

import msgspec

from aoscore.cm.communication.messages import SubjectType
from aoscore.cm.launcher.balancer import Site
from aoscore.common.types import InstanceIdent, InstanceStatus, ItemType


class RunRequest(msgspec.Struct, frozen=True, kw_only=True):
    """So many instances of an item for a subject. For a component 0 means: one on every runtime that can run it."""

    item_id: str
    item_type: ItemType = ItemType.SERVICE
    version: str = ""
    owner_id: str = ""
    subject_id: str
    subject_type: SubjectType = SubjectType.GROUP
    is_unit_subject: bool = False
    """The subject comes and goes with the Unit's user: without it the instances do not run."""
    priority: int = 0
    num_instances: int = 1
    labels: tuple[str, ...] = ()


class RecordState(StrEnum):
    """What an instance record is for (words of database.md §1.3)."""

    ACTIVE = "active"
    """Wanted now."""
    DISABLED = "disabled"
    """Wanted, but its subject is not active."""
    CACHED = "cached"
    """Not wanted any more; its data are kept for a time."""


class InstanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A known instance of one version; without node it has no place. `pinned`: made for this one node and runtime."""

    ident: InstanceIdent
    version: str
    manifest_digest: str = ""
    node_id: str = ""
    prev_node_id: str = ""
    runtime_id: str = ""
    uid: int = 0
    gid: int = 0
    created: datetime
    state: RecordState = RecordState.ACTIVE
    is_unit_subject: bool = False
    subject_type: SubjectType = SubjectType.GROUP
    owner_id: str = ""
    labels: tuple[str, ...] = ()
    priority: int = 0
    pinned: bool = False
    cached_since: datetime | None = None

    @property
    def key(self) -> tuple[InstanceIdent, str]:
        """Identity and version: two versions of one instance may be known."""
        return self.ident, self.version

    @property
    def is_component(self) -> bool:
        """Components need no user and no CPU or RAM."""
        return self.ident.type is ItemType.COMPONENT

    @property
    def site(self) -> Site | None:
        """Where it runs."""
        return Site(self.node_id, self.runtime_id, self.manifest_digest) if self.node_id else None


class UnitInstanceStatus(msgspec.Struct, frozen=True):
    """An instance as the Unit shows it; `state_checksum` is hex."""

    status: InstanceStatus
    node_id: str
    state_checksum: str = ""
