"""The local admin API: HTTP with JSON on the Unix socket DIR/admin.sock (mode 0600).

`POST /NAME` with an object of arguments runs the operation NAME and answers its result; errors are `{"error": text}`.
`POST /watch` streams events, one JSON object a line. The operations are the public methods of `Operations`.
"""

import asyncio
import inspect
import json
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from aoscore.common.certs import verify_chain
from aoscore.common.errors import AosError, InvalidArgumentError, SignatureError
from aoscore.devcloud.ca import ROLES, user_of
from aoscore.devcloud.core import Core, token_hash
from aoscore.devcloud.faults import Fault
from aoscore.devcloud.link import Message
from aoscore.devcloud.packing import load_user
from aoscore.devcloud.store import Store

_LOG_TIMEOUT_S = 60.0
_JSON_LIMIT_BYTES = 4 << 20


class Operations:
    """What the admin API can do; each public method is one operation, its arguments are the JSON members."""

    def __init__(self, core: Core) -> None:
        self._core = core

    # Looking

    async def units(self) -> list[dict[str, Any]]:
        """All Units with what they report, in short."""
        units = await self._core.transact(Store.units)
        return [
            {
                "systemId": unit.system_id,
                "id": unit.id,
                "model": unit.model,
                "online": self._core.online(unit.system_id),
                "nodes": len(unit.unit_status.get("nodes", [])),
                "items": len(unit.unit_status.get("items", [])),
            }
            for unit in units
        ]

    async def unit(self, unit: str) -> dict[str, Any]:
        """One Unit with its merged status and what the cloud still has to tell it."""
        found = await self._core.transact(lambda store: store.unit(unit))
        session = self._core.session(found.system_id)
        return {
            "systemId": found.system_id,
            "id": found.id,
            "online": session.online,
            "status": found.unit_status,
            "unacked": session.link.unacked,
        }

    async def desired(self, unit: str) -> Message:
        """The desired status of a Unit."""
        return await self._core.transact(lambda store: self._core.cloud.desired_status(store, store.unit(unit)))

    async def items(self) -> list[dict[str, Any]]:
        """All item versions."""
        versions = await self._core.transact(lambda store: store.versions())
        return [
            {
                "id": one.item_id,
                "type": one.type,
                "codename": one.codename,
                "version": one.version,
                "indexDigest": one.index_digest,
            }
            for one in versions
        ]

    async def messages(
        self, unit: str, message_type: str | None = None, after: int = 0, limit: int = 1000
    ) -> list[dict[str, Any]]:
        """Journal of a Unit's link, secrets masked."""
        return await self._core.transact(lambda store: store.messages(store.unit(unit), message_type, after, limit))

    async def violations(self, unit: str) -> list[dict[str, Any]]:
        """Messages of a Unit that broke the contract."""
        return await self._core.transact(lambda store: store.violations(store.unit(unit)))

    async def alerts(self, unit: str, limit: int = 100) -> list[dict[str, Any]]:
        """The newest alerts of a Unit."""
        return await self._core.transact(lambda store: store.alerts(store.unit(unit), limit))

    async def monitoring(self, unit: str, limit: int = 100) -> list[dict[str, Any]]:
        """The newest monitoring samples of a Unit."""
        return await self._core.transact(lambda store: store.samples(store.unit(unit), limit))

    async def certificates(self, unit: str) -> list[dict[str, Any]]:
        """Certificates issued for a Unit."""
        found = await self._core.transact(lambda store: store.certificates(store.unit(unit)))
        return [msgspec.to_builtins(one) for one in found]

    # Items and assignments

    async def upload(self, path: str, user_file: str) -> list[dict[str, Any]]:
        """Store the bundle at `path`, signed by the user of the PKCS#12 file `user_file`."""
        certificate, _ = await asyncio.to_thread(load_user, Path(user_file))
        authority = self._core.authority
        verify_chain(certificate, [authority.intermediate], [authority.root], at=datetime.now(UTC))
        user = user_of(certificate)
        if user is None or user.role != "sp":
            raise SignatureError(f"{user_file} is no service provider of this cloud")
        added = await self._core.upload(Path(path), user, certificate)
        return [{"id": one.item_id, "codename": one.codename, "version": one.version} for one in added]

    async def assign(
        self, item: str, target: str, version: str | None = None, instances: int | None = None
    ) -> dict[str, Any]:
        """Want an item on a Unit, or for `subject:NAME`."""
        cloud = self._core.cloud
        assignment = await self._core.transact(lambda store: cloud.assign(store, item, target, version, instances))
        await self._core.refresh_all()
        return {"itemId": assignment.item_id, "subjectId": assignment.subject_id}

    async def unassign(self, item: str, target: str) -> None:
        """Take an item from a Unit or `subject:NAME`."""
        await self._core.transact(lambda store: self._core.cloud.unassign(store, item, target))
        await self._core.refresh_all()

    async def unit_config(self, unit: str, config: dict[str, Any] | None) -> None:
        """Set the unit config a Unit is to have."""
        await self._core.transact(lambda store: self._core.cloud.set_unit_config(store, store.unit(unit), config))
        await self._core.refresh_all()

    async def node_state(self, unit: str, node: str, state: str | None) -> None:
        """Set the desired state of a node: provisioned, paused, or null for no wish."""
        if state not in (None, "provisioned", "paused"):
            raise InvalidArgumentError(f"node state {state!r} is none of provisioned, paused")
        await self._core.transact(lambda store: store.set_node_state(store.unit(unit), node, state))
        await self._core.refresh_all()

    # Units

    async def token(self, name: str, role: str) -> str:
        """A one-time token for `aos-keys new-user`."""
        if role not in ROLES:
            raise InvalidArgumentError(f"user role {role!r} is none of {', '.join(ROLES)}")
        token = secrets.token_hex(20)
        await self._core.transact(lambda store: store.add_token(token_hash(token), name, role))
        return token

    async def register(self, request: dict[str, Any]) -> dict[str, Any]:
        """Register a Unit as `aos-prov` does it over REST."""
        return await self._core.transact(lambda store: self._core.cloud.register(store, request))

    async def forget_unit(self, unit: str) -> None:
        """Remove a Unit, so that it may be provisioned again."""
        found = await self._core.transact(lambda store: store.unit(unit))
        self._core.forget_session(found.system_id)
        await self._core.transact(lambda store: store.remove_unit(found))

    async def renew(self, unit: str) -> None:
        """Renew all certificates of a Unit."""
        cloud = self._core.cloud
        message = await self._core.transact(lambda store: cloud.renew(store, store.unit(unit)))
        await self._post(unit, message)

    async def start_provisioning(self, unit: str, node: str, password: str) -> None:
        """Add a node to a Unit; the cloud follows up until the node is provisioned."""
        cloud = self._core.cloud
        message = await self._core.transact(
            lambda store: cloud.start_provisioning(store, store.unit(unit), node, password)
        )
        await self._post(unit, message)

    async def deprovision(self, unit: str, node: str) -> None:
        """Remove a node from a Unit."""
        cloud = self._core.cloud
        message = await self._core.transact(lambda store: cloud.deprovision(store, store.unit(unit), node))
        await self._post(unit, message)

    async def override_env(self, unit: str, items: list[dict[str, Any]]) -> None:
        """Replace the environment overrides of a Unit (§6.12)."""
        await self._post(unit, {"messageType": "overrideEnvVars", "items": items})

    async def logs(
        self,
        unit: str,
        log_type: str = "systemLog",
        nodes: list[str] | None = None,
        item: str | None = None,
        instance: int | None = None,
        since: str | None = None,
        until: str | None = None,
        https: bool = False,
        timeout_s: float = _LOG_TIMEOUT_S,
    ) -> dict[str, dict[str, Any]]:
        """Ask for logs and wait; by node: status, error, text, and whether it is complete.

        With `https` the Unit is to upload them instead of sending them over its link.
        """
        found = await self._core.transact(lambda store: store.unit(unit))
        request = await self._core.transact(
            lambda store: self._core.cloud.request_log(
                store,
                found,
                log_type=log_type,
                nodes=nodes or [],
                item=item,
                instance=instance,
                since=since,
                until=until,
            )
        )
        if https:
            request["uploadOptions"] = self._core.upload_options(found.system_id, request["correlationId"])
        return await self._core.wait_for_log(found, request, timeout_s)

    async def send(self, unit: str, data: Message) -> None:
        """Send any message of the cloud to a Unit."""
        await self._post(unit, data)

    async def resend_desired(self, unit: str) -> None:
        """Send the desired status again although nothing changed."""
        found = await self._core.transact(lambda store: store.unit(unit))
        self._core.session(found.system_id).desired_key = None
        await self._core.refresh(found.system_id)

    async def disconnect(self, unit: str) -> None:
        """Cut the connection of a Unit."""
        found = await self._core.transact(lambda store: store.unit(unit))
        self._core.disconnect(found.system_id)

    async def revoke_tokens(self) -> None:
        """Make bearer tokens invalid: Units get 401 and do service discovery again."""
        self._core.revoke_link_tokens()

    # Faults

    async def add_fault(self, fault: dict[str, Any]) -> None:
        """Activate a fault, see `faults`."""
        try:
            self._core.faults.add(msgspec.convert(fault, Fault))
        except msgspec.ValidationError as error:
            raise InvalidArgumentError(f"fault: {error}") from error

    async def faults(self) -> list[dict[str, Any]]:
        """The active faults."""
        return [msgspec.to_builtins(fault) for fault in self._core.faults.active()]

    async def clear_faults(self) -> None:
        """Forget all faults."""
        self._core.faults.clear()

    async def _post(self, unit: str, message: Message) -> None:
        found = await self._core.transact(lambda store: store.unit(unit))
        await self._core.post(found.system_id, message)


class AdminApi:
    """HTTP shell of `Operations`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._operations = Operations(core)

    def app(self) -> web.Application:
        """The application for the Unix socket."""
        app = web.Application(client_max_size=_JSON_LIMIT_BYTES)
        app.router.add_post("/watch", self._watch)
        app.router.add_post("/{name:[a-z][a-z_]*}", self._call)
        return app

    async def _call(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        operation = getattr(self._operations, name, None)
        if operation is None:
            return web.json_response({"error": f"operation {name} does not exist"}, status=404)
        try:
            arguments = await request.json() if request.can_read_body else {}
            inspect.signature(operation).bind(**arguments)
        except (ValueError, TypeError) as error:
            return web.json_response({"error": f"{name}: {error}"}, status=400)
        try:
            return web.json_response({"result": await operation(**arguments)})
        except AosError as error:
            return web.json_response({"error": str(error)}, status=409)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        """Stream events, of one Unit when `unit` is given (a system id), until the client goes."""
        arguments = await request.json() if request.can_read_body else {}
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        with self._core.events.subscribe() as events:
            await response.prepare(request)
            while True:
                event = await events.get()
                if arguments.get("unit") in (None, event["unit"]):
                    await response.write(json.dumps(event).encode() + b"\n")
