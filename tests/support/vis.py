"""A vehicle information service as Units have one: values by path over WebSocket (iam.md §4.3).

With `permissions` it asks IAM what a client may do, by iamanager.v5 as aos-vis does: the address of IAM's public port
and its root certificate.
"""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from aiohttp import WSMsgType, web

from aoscore._pb.iamanager.v5 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v5 import iamanager_pb2_grpc as stubs

VIN = "Attribute.Vehicle.VehicleIdentification.VIN"
UNIT_MODEL = "Attribute.Aos.UnitModel"
SUBJECTS = "Attribute.Aos.Subjects"
PUBLIC = frozenset({VIN, UNIT_MODEL, SUBJECTS})


class _Client:
    def __init__(self, socket: web.WebSocketResponse) -> None:
        self.socket = socket
        self.subscriptions: dict[str, str] = {}
        self.rights: dict[str, str] = {}


class TestVis:
    """Serves `values`. `as_object` gives them under their path; `silent` and `broken` are paths of `get`."""

    __test__ = False

    def __init__(self, ssl_context: ssl.SSLContext | None = None, permissions: tuple[str, bytes] | None = None) -> None:
        self.values: dict[str, Any] = {VIN: "VIN-1", UNIT_MODEL: "model;1.0", SUBJECTS: ["s1"]}
        self.as_object = False
        self.silent: set[str] = set()
        self.broken: set[str] = set()
        self.subscribes = True
        self.requests: list[dict[str, Any]] = []
        self.clients: list[_Client] = []
        self.connections = 0
        self.port = 0
        self._ssl = ssl_context
        self._permissions = permissions
        self._number = 0

    @property
    def url(self) -> str:
        return f"ws{'s' if self._ssl else ''}://localhost:{self.port}"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["TestVis"]:
        """Serve for the length of the block, on the same port each time."""
        app = web.Application()
        app.router.add_get("/", self._talk)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=self._ssl).start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await self.disconnect()
            await runner.cleanup()

    async def disconnect(self) -> None:
        """Close all connections."""
        for client in list(self.clients):
            await client.socket.close()

    async def set(self, path: str, value: Any) -> None:
        """A new value; who has subscribed is told."""
        self.values[path] = value
        for client in self.clients:
            for number, subscribed in client.subscriptions.items():
                if subscribed == path:
                    await self.notify(client, number, value)

    async def notify(self, client: _Client, subscription: str, value: Any) -> None:
        """Tell a value, whatever it is."""
        await client.socket.send_str(
            json.dumps({"action": "subscription", "subscriptionId": subscription, "value": value, "timestamp": 0})
        )

    async def _talk(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        client = _Client(socket)
        self.connections += 1
        self.clients.append(client)
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    await self._answer(client, json.loads(message.data))
        finally:
            self.clients.remove(client)
        return socket

    async def _answer(self, client: _Client, request: dict[str, Any]) -> None:
        self.requests.append(request)
        answer: dict[str, Any] = {"action": request["action"], "requestId": request["requestId"], "timestamp": 0}
        path = request.get("path", "")
        match request["action"]:
            case "get" if path in self.silent:
                return
            case "get" if path in self.broken:
                answer["action"] = "set"
            case "get" if path not in self.values:
                answer["error"] = {"number": 404, "reason": "", "message": f"{path} not found"}
            case "get" | "set" if not self._may(client, path, "w" if request["action"] == "set" else "r"):
                answer["error"] = {"number": 403, "reason": "", "message": "client does not have permissions"}
            case "get":
                value = self.values[path]
                answer["value"] = {path: value} if self.as_object else value
            case "set":
                await self.set(path, request["value"])
            case "subscribe":
                if self.subscribes:
                    answer["subscriptionId"] = str(self._number)
                    client.subscriptions[str(self._number)] = path
                    self._number += 1
            case "authorize":
                await self._authorize(client, request["tokens"]["authorization"], answer)
            case "unsubscribeAll":
                client.subscriptions.clear()
            case _:
                return
        await client.socket.send_str(json.dumps(answer))

    def _may(self, client: _Client, path: str, right: str) -> bool:
        return path in PUBLIC or right in client.rights.get(path, "")

    async def _authorize(self, client: _Client, secret: str, answer: dict[str, Any]) -> None:
        assert self._permissions is not None
        address, root = self._permissions
        async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(root)) as channel:
            stub: Any = stubs.IAMPublicPermissionsServiceStub(channel)  # type: ignore[no-untyped-call]
            request = pb.PermissionsRequest(secret=secret, functional_server_id="vis")
            try:
                found = await asyncio.wait_for(stub.GetPermissions(request), 30)
            except grpc.aio.AioRpcError as error:
                answer["error"] = {"number": 401, "reason": "", "message": f"not authorized: {error.details()}"}
                return
        client.rights = dict(found.permissions.permissions)
        answer["ttl"] = 10000
