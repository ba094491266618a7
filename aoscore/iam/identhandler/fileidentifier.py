"""Identity from files (iam.md §4.1). The subjects file is watched; the other two never change while a Unit runs."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from aoscore.common.aio import ChangeFeed, Worker
from aoscore.common.errors import InvalidArgumentError, NotFoundError
from aoscore.common.log import kv
from aoscore.common.types import SystemInfo

_log = logging.getLogger(__name__)

_WATCH_PERIOD_S = 5.0


class FileIdentifierParams(msgspec.Struct, frozen=True, rename="camel"):
    """Section identifier.params of the plug-in fileidentifier."""

    system_id_path: Path
    unit_model_path: Path
    subjects_path: Path


def parse_unit_model(text: str) -> tuple[str, str]:
    """Model and version of "model;version". Raises InvalidArgumentError for any other number of parts."""
    parts = [part.strip() for part in text.strip().split(";")]
    if len(parts) != 2 or not parts[0]:
        raise InvalidArgumentError(f"unit model {text.strip()[:80]!r} is not of the form model;version")
    return parts[0], parts[1]


def parse_subjects(text: str) -> tuple[str, ...]:
    """One subject per line; blanks around and empty lines do not count, a repeated subject counts once."""
    return tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


class FileIdentifier:
    """Reads the three files. The id and the model must be there; without a subjects file there are no subjects."""

    def __init__(self, params: FileIdentifierParams, worker: Worker, *, period_s: float = _WATCH_PERIOD_S) -> None:
        self.subjects_changes: ChangeFeed[None, tuple[str, ...]] = ChangeFeed()
        self._params = params
        self._worker = worker
        self._period_s = period_s
        self._system_info: SystemInfo | None = None
        self._subjects: tuple[str, ...] = ()
        self._seen: tuple[int, int, int] | None = None

    async def run(self, started: Callable[[], None]) -> None:
        """Read all files, then watch the subjects."""
        self._system_info = await self._worker.run(self._read_system_info)
        await self._worker.run(self._read_subjects)
        _log.info(
            kv(
                "Unit",
                systemID=self._system_info.system_id,
                model=self._system_info.unit_model,
                subjects=self._subjects,
            )
        )
        started()
        while True:
            await asyncio.sleep(self._period_s)
            if await self._worker.run(self._read_subjects):
                _log.info(kv("Subjects changed", subjects=self._subjects))
                self.subjects_changes.publish(None, self._subjects)

    async def system_info(self) -> SystemInfo:
        """Identity of the Unit."""
        if self._system_info is None:
            raise NotFoundError("the identity of the Unit has not been read yet")
        return self._system_info

    async def subjects(self) -> tuple[str, ...]:
        """Subjects that are active now."""
        return self._subjects

    def _read_system_info(self) -> SystemInfo:
        system_id = _read(self._params.system_id_path, "system id").strip()
        if not system_id:
            raise NotFoundError(f"system id file {self._params.system_id_path} is empty")
        model, version = parse_unit_model(_read(self._params.unit_model_path, "unit model"))
        return SystemInfo(system_id, model, version)

    def _read_subjects(self) -> bool:
        """Take over the file when it is another one than last time; whether the subjects differ."""
        path = self._params.subjects_path
        try:
            stat = path.stat()
            seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if seen == self._seen:
                return False
            subjects = parse_subjects(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            if self._seen != (0, 0, 0):
                _log.warning(kv("Can't read subjects", file=path, error=error))
            seen, subjects = (0, 0, 0), ()
        changed = subjects != self._subjects
        self._seen, self._subjects = seen, subjects
        return changed


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise NotFoundError(f"can't read the {what} from {path}: {error}") from error
