"""The subjects that are active on the Unit, as IAM tells them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from aoscore.common.aio import Broadcast
from aoscore.common.errors import NotSupportedError

_log = logging.getLogger(__name__)


class SubjectSource(Protocol):
    """IAM's public side."""

    async def get_subjects(self) -> tuple[str, ...]: ...

    def watch_subjects(self) -> AsyncIterator[tuple[str, ...]]: ...


class UnitSubjects:
    """Knows the present subjects, as a service. Started once IAM has told them."""

    def __init__(self, iam: SubjectSource) -> None:
        self._iam = iam
        self._subjects: tuple[str, ...] = ()
        self.changed: Broadcast[tuple[str, ...]] = Broadcast("subjects")

    def subjects(self) -> tuple[str, ...]:
        """The present subjects."""
        return self._subjects

    async def run(self, started: Callable[[], None]) -> None:
        """Follows them until cancelled."""
        try:
            self._subjects = await self._iam.get_subjects()
        except NotSupportedError:
            _log.info("IAM has no identifier: no subject is ever active")
        started()
        async for subjects in self._iam.watch_subjects():
            if subjects != self._subjects:
                self._subjects = subjects
                self.changed.publish(subjects)
