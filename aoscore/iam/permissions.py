"""Secrets of instances and what their owners may do on functional servers (iam.md §7).

The table lives in memory and in a file on a tmpfs, readable for root alone: running instances keep their secrets when
IAM restarts, and nothing of it reaches the flash or outlives a reboot.
"""

import asyncio
import hmac
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path

import msgspec

from aoscore.common.aio import Worker
from aoscore.common.config import from_json, to_json
from aoscore.common.errors import InvalidArgumentError, NotFoundError
from aoscore.common.files import write_atomic
from aoscore.common.log import kv
from aoscore.common.types import InstanceIdent

_log = logging.getLogger(__name__)

FILE_NAME = "permissions.json"

Rights = dict[str, str]
"""Function name to rights, such as "rw"."""


class Registration(msgspec.Struct, frozen=True):
    """One instance: its secret, and its rights by functional server."""

    ident: InstanceIdent
    secret: str
    permissions: dict[str, Rights]


class Permissions:
    """Registered instances. A call that returns is on disk already."""

    def __init__(self, runtime_dir: Path, worker: Worker) -> None:
        self._path = runtime_dir / FILE_NAME
        self._worker = worker
        self._lock = asyncio.Lock()
        self._instances: dict[InstanceIdent, Registration] = {}

    async def load(self) -> None:
        """Take over what an earlier process of this boot knew. A broken file is logged and begun anew."""
        data = await self._worker.run(_read, self._path)
        if data is None:
            return
        try:
            registrations = from_json(data, list[Registration], what=str(self._path))
        except InvalidArgumentError as error:
            # Its text could hold parts of a secret.
            _log.error(kv("Table of permissions is damaged, instances must register again", file=self._path))
            _log.debug("Kind of damage: %s", type(error.__cause__).__name__)
            return
        self._instances = {registration.ident: registration for registration in registrations}
        _log.info(kv("Permissions restored", instances=len(self._instances)))

    async def register(self, ident: InstanceIdent, permissions: Mapping[str, Mapping[str, str]]) -> str:
        """The secret of an instance. A known one keeps its secret and gets the new permissions."""
        async with self._lock:
            known = self._instances.get(ident)
            secret = known.secret if known else str(uuid.uuid4())
            registration = Registration(ident, secret, {server: dict(rights) for server, rights in permissions.items()})
            if registration != known:
                await self._save({**self._instances, ident: registration})
            return secret

    async def unregister(self, ident: InstanceIdent) -> None:
        """Make the secret of an instance invalid. Raises NotFoundError when it is not registered."""
        async with self._lock:
            if ident not in self._instances:
                raise NotFoundError(f"instance {ident} is not registered")
            await self._save({known: value for known, value in self._instances.items() if known != ident})

    def find(self, secret: str, server: str) -> tuple[InstanceIdent, Rights]:
        """The instance behind a secret, and its rights on one functional server.

        Raises NotFoundError; its message does not repeat the secret.
        """
        for registration in self._instances.values():
            if hmac.compare_digest(registration.secret.encode(), secret.encode()):
                try:
                    return registration.ident, registration.permissions[server]
                except KeyError:
                    raise NotFoundError(f"instance {registration.ident} has no permissions on {server!r}") from None
        raise NotFoundError("the secret is not known")

    async def _save(self, instances: dict[InstanceIdent, Registration]) -> None:
        await self._worker.run(_write, self._path, to_json(list(instances.values())))
        self._instances = instances


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(path, data, mode=0o600)
