"""Provisioning of this Node: the order of steps, who may take them when, and the hooks (iam.md §3.2, §6)."""

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from aoscore.common.aio import log_and_continue, unbroken
from aoscore.common.errors import NotFoundError, WrongStateError
from aoscore.common.log import kv
from aoscore.common.process import run_program
from aoscore.common.types import NodeState
from aoscore.iam.certhandler.handler import CertHandler
from aoscore.iam.config import Config
from aoscore.iam.currentnode.node import CurrentNode

_log = logging.getLogger(__name__)

_START = "start provisioning"
PASSWORD_VARIABLE = "AOS_PROVISIONING_PASSWORD"  # noqa: S105 - the name of a variable


class Hooks:
    """Runs the programs of the configuration.

    A hook may leave background children that outlive us: the shipped finish and deprovision hooks fork, wait a second
    and then restart the whole Unit.
    """

    def __init__(self, config: Config) -> None:
        self._timeout_s = config.hook_timeout
        self._tell_password = config.hooks_get_password

    async def run(self, name: str, args: Sequence[str], password: str) -> None:
        """Run one, if it is configured. Raises the error of run_program: missing, too slow, or exit code not 0.

        `password` is of the call that runs the hook, for its environment when the configuration asks for that.
        """
        if not args:
            return
        _log.info(kv("Run hook", hook=name, program=args[0]))
        environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
        if self._tell_password:
            environment[PASSWORD_VARIABLE] = password
        finished = await run_program(args, timeout_s=self._timeout_s, env=environment, check=False, background=True)
        for line in finished.stdout.decode(errors="replace").splitlines():
            _log.info("%s: %s", name, line)
        finished.check(Path(args[0]).name)


class Unfinished(Protocol):
    """Where it is noted that an operation has begun, so that a crash in the middle of it is seen afterwards."""

    async def unfinished(self) -> frozenset[str]: ...

    async def begin(self, operation: str) -> None: ...

    async def end(self, operation: str) -> None: ...


class Provisioning:
    """The operations on this Node. One at a time; each is refused in a state in which it makes no sense."""

    def __init__(self, config: Config, node: CurrentNode, certs: CertHandler, unfinished: Unfinished) -> None:
        self._config = config
        self._node = node
        self._certs = certs
        self._unfinished = unfinished
        self._hooks = Hooks(config)
        self._lock = asyncio.Lock()

    @property
    def busy(self) -> bool:
        """Whether an operation is running."""
        return self._lock.locked()

    async def recover(self) -> None:
        """Undo what a crash has left of a start, before anything else is called.

        Storages without disk encryption, say, must not look as if the Node could go into service with them.
        """
        if _START not in await self._unfinished.unfinished():
            return
        _log.warning("Start of provisioning was interrupted, key storages are emptied")
        with log_and_continue(_log, "Can't empty key storages after an interrupted start of provisioning"):
            await self._undo_start()

    async def start(self, password: str) -> None:
        """Empty and prepare all key storages. May be repeated, which begins anew.

        `password` becomes the administrator's secret of the storages.
        """
        async with self._lock:
            self._check("start provisioning", NodeState.UNPROVISIONED)
            _log.info("Start provisioning")
            await self._unfinished.begin(_START)
            try:
                await self._hooks.run("startProvisioning", self._config.start_provisioning_cmd_args, password)
                await self._certs.clear()
                await self._certs.set_owner(password)
                await self._hooks.run("diskEncryption", self._config.disk_encryption_cmd_args, password)
            except BaseException:
                with log_and_continue(_log, "Can't empty key storages after a failed start of provisioning"):
                    await unbroken(self._undo_start())
                raise
            await self._unfinished.end(_START)

    async def _undo_start(self) -> None:
        """No half-made storage may look like a usable one."""
        if self._node.info.state is NodeState.UNPROVISIONED:
            await self._certs.clear()
        await self._unfinished.end(_START)

    async def finish(self, password: str) -> None:
        """Put the Node into service. Repeating it does nothing: a client may have lost our answer.

        The hook comes before the state changes and only schedules the restart (iam.md §6.2).
        """
        async with self._lock:
            if self._node.info.state is NodeState.PROVISIONED:
                return
            self._check("finish provisioning", NodeState.UNPROVISIONED)
            if _START in await self._unfinished.unfinished():
                raise WrongStateError("can't finish provisioning: its start has failed, start it again")
            self._check_certificate()
            await self._hooks.run("finishProvisioning", self._config.finish_provisioning_cmd_args, password)
            await self._node.set_state(NodeState.PROVISIONED)
            _log.info("Provisioning finished")

    async def deprovision(self, password: str) -> None:
        """Take the Node out of service. Keys and certificates go with the next start of provisioning."""
        async with self._lock:
            self._check("deprovision", NodeState.PROVISIONED, NodeState.PAUSED, NodeState.ERROR)
            _log.info("Deprovision")
            await self._hooks.run("deprovision", self._config.deprovision_cmd_args, password)
            await self._node.set_state(NodeState.UNPROVISIONED)

    async def pause(self) -> None:
        """Let no instances run on the Node. Repeating it is fine: CM does with every desired status."""
        async with self._lock:
            self._check("pause", NodeState.PROVISIONED, NodeState.PAUSED)
            await self._node.set_state(NodeState.PAUSED)

    async def resume(self) -> None:
        """Let instances run again."""
        async with self._lock:
            self._check("resume", NodeState.PROVISIONED, NodeState.PAUSED)
            await self._node.set_state(NodeState.PROVISIONED)

    def _check(self, what: str, *allowed: NodeState) -> None:
        state = self._node.info.state
        if state not in allowed:
            raise WrongStateError(f"can't {what}: node is {state}, must be {' or '.join(allowed)}")

    def _check_certificate(self) -> None:
        """A provisioned Node without the certificate of its own servers could never start again."""
        try:
            self._certs.get_cert(self._config.cert_storage)
        except NotFoundError as error:
            raise WrongStateError(f"can't finish provisioning: {error}") from error
