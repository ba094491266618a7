"""Which certificate may speak for which node (cm-orchestration §10.3, items 25 and 42; observed.md, defect 8).

CM remembers under which node id it has seen a key (`common.admission`), and a key that has spoken for one node can't
speak for another. A node that shows a new key was renewed or provisioned anew: it is let in, and told to the cloud.

key of                 verdict
---------------------  ---------------------------------------
the Main Node          accept
this node              accept
another node           refuse
nobody, other Unit     refuse
nobody                 learn; with an alert if the node has another one
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from enum import Enum
from typing import Any, Final

from aoscore.cm.certnotes import CertificateNotes
from aoscore.common.admission import speaks_for
from aoscore.common.db import Database
from aoscore.common.errors import SignatureError
from aoscore.common.log import kv
from aoscore.common.rpc import peer_certificate_der

_log = logging.getLogger(__name__)

_TOPIC: Final = "node"
MAX_KEYS_PER_NODE: Final = 4
"""The newest ones count: the SM may come back with the old certificate while it is being renewed."""


class Verdict(Enum):
    """What becomes of a stream or call."""

    ACCEPT = "accept"
    LEARN = "learn"
    REFUSE = "refuse"


def judge(node_id: str, *, is_main: bool, owner: str | None, is_of_unit: bool) -> Verdict:
    """The table of the module text. `owner`: the node that has shown the key before."""
    known = speaks_for(node_id, is_main=is_main, owner=owner)
    if known is None:
        return Verdict.LEARN if is_of_unit else Verdict.REFUSE
    return Verdict.ACCEPT if known else Verdict.REFUSE


class SmAdmission:
    """Checks who speaks, table aoscore_sm_keys."""

    def __init__(
        self,
        database: Database,
        notes: CertificateNotes,
        system_id: str,
        *,
        main_keys: Callable[[], Awaitable[Collection[bytes]]],
        alert: Callable[[str], None],
    ) -> None:
        """`main_keys` gives the digests of the Main Node's present keys; it is asked for keys that are not known."""
        self._database = database
        self._notes = notes
        self._system_id = system_id
        self._main_keys = main_keys
        self._alert = alert
        self._main: frozenset[bytes] = frozenset()
        self._owners: dict[bytes, str] = {}
        self._lock = asyncio.Lock()

    async def load(self) -> None:
        """Reads what is stored, before anything else is called."""
        rows = await self._database.select("SELECT key, nodeID FROM aoscore_sm_keys ORDER BY rowid")
        self._owners = {bytes(key): str(node_id) for key, node_id in rows}

    async def admit(self, node_id: str, context: Any) -> None:
        """Raises SignatureError when the caller of a service method may not speak for a node."""
        der = peer_certificate_der(context)
        if der is None:
            raise SignatureError(f"node {node_id!r} shows no certificate")
        await self.admit_certificate(node_id, der)

    async def admit_certificate(self, node_id: str, der: bytes) -> None:
        """The same for a certificate that TLS has checked."""
        if node_id in self._notes.find(der, _TOPIC):
            return
        from aoscore.common.certs import common_names, key_digest, load_der

        certificate = load_der(der, what=f"certificate of node {node_id!r}")
        key = key_digest(certificate)
        # A new node comes with several calls at once.
        async with self._lock:
            owner = self._owners.get(key)
            if owner != node_id and key not in self._main:
                self._main = frozenset(await self._main_keys())
            is_of_unit = self._system_id in common_names(certificate)
            verdict = judge(node_id, is_main=key in self._main, owner=owner, is_of_unit=is_of_unit)
            if verdict is Verdict.LEARN:
                await self._learn(node_id, key)
            if verdict is not Verdict.REFUSE:
                await self._notes.add(der, _TOPIC, node_id)
        if verdict is Verdict.REFUSE:
            whose = f"that of node {owner!r}" if owner else "of another Unit"
            error = SignatureError(f"a stranger claims to be node {node_id!r}: its certificate is {whose}")
            self._alert(str(error))
            raise error

    async def _learn(self, node_id: str, key: bytes) -> None:
        known = [digest for digest, owner in self._owners.items() if owner == node_id]
        if known:
            self._alert(f"node {node_id} shows a certificate with a new key")
        await self._database.execute("INSERT INTO aoscore_sm_keys (key, nodeID) VALUES (?, ?)", (key, node_id))
        self._owners[key] = node_id
        _log.info(kv("Key of node noted", nodeID=node_id, sha256=key.hex()))
        for old in known[: max(0, len(known) + 1 - MAX_KEYS_PER_NODE)]:
            await self._database.execute("DELETE FROM aoscore_sm_keys WHERE key = ?", (old,))
            self._owners.pop(old, None)
