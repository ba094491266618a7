"""The cloud's REST side as `aos-keys`, `aos-prov` and `aos-signer` use it (cloud-rest.md)."""

import logging
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from cryptography import x509

from aoscore.common.errors import AlreadyExistsError, AosError, InvalidArgumentError, NotFoundError, WrongStateError
from aoscore.devcloud.bundleconfig import BundleError
from aoscore.devcloud.ca import User, pem, user_of
from aoscore.devcloud.core import Core, token_hash
from aoscore.devcloud.peer import peer_certificate
from aoscore.devcloud.store import Store, Unit

_log = logging.getLogger(__name__)

_PREFIX = "/api/v11"
_JSON_LIMIT_BYTES = 8 << 20
_UPLOAD_LIMIT_BYTES = 4 << 30
_CHUNK_BYTES = 1 << 20
_STATUS: dict[type[AosError], int] = {
    NotFoundError: 404,
    AlreadyExistsError: 409,
    WrongStateError: 409,
    InvalidArgumentError: 400,
}
# aos-prov must be newer than this.
PROVISIONING_MIN_VERSION = "5.0.0"
_PERMISSIONS = {"sp": ["deployment_bundles_create"], "oem": ["units_provision"]}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _refusal(status: int, message: str) -> web.Response:
    return web.json_response({"message": message}, status=status)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors as JSON: `{field: reason}` for a refused bundle, else `{"message": …}`."""
    try:
        return await handler(request)
    except BundleError as error:
        return web.json_response({error.field: error.reason}, status=400)
    except AosError as error:
        status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
        if status == 500:
            _log.error("Request failed: %s %s: %s", request.method, request.path, error)
        return _refusal(status, str(error))
    except web.HTTPException as error:
        return _refusal(error.status, error.text or error.reason)


class Rest:
    """Handlers of the REST listener."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def app(self) -> web.Application:
        """The application; a client certificate is optional for TLS and demanded per handler."""
        app = web.Application(middlewares=[_errors], client_max_size=_JSON_LIMIT_BYTES)
        routes: list[tuple[str, str, Handler]] = [
            ("GET", "/users/me/", self._me),
            ("POST", "/user-certificates/", self._user_certificate),
            ("GET", "/root-certificate/", self._root_certificate),
            ("GET", "/units/provisioning/supported-software/", self._supported_software),
            ("POST", "/units/provisioning/", self._register),
            ("GET", "/units/", self._units),
            ("GET", "/units/{unit}/", self._unit),
            ("POST", "/units/{unit}/renew-certificates/", self._renew),
            ("GET", "/units/{unit}/certificates/", self._certificates),
            ("POST", "/deployment-bundles/upload/", self._upload),
        ]
        for method, path, handler in routes:
            app.router.add_route(method, _PREFIX + path, handler)
        return app

    @staticmethod
    def _user(request: web.Request, *roles: str) -> tuple[User, x509.Certificate]:
        certificate = peer_certificate(request)
        user = user_of(certificate) if certificate is not None else None
        if certificate is None or user is None:
            raise web.HTTPUnauthorized(text="a user's client certificate is required")
        if roles and user.role not in roles:
            raise web.HTTPForbidden(text=f"role {user.role} may not do this, {' or '.join(roles)} may")
        return user, certificate

    async def _me(self, request: web.Request) -> web.Response:
        user, _ = self._user(request)
        return web.json_response(
            {
                "role": user.role,
                "username": user.name,
                "oem": {"title": self._core.authority.domain},
                "effective_permissions": _PERMISSIONS[user.role],
            }
        )

    async def _user_certificate(self, request: web.Request) -> web.Response:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        csr = (await _json(request)).get("csr")
        if not isinstance(csr, str):
            raise InvalidArgumentError("csr is missing")

        def issue(store: Store) -> str | None:
            owner = store.use_token(token_hash(token)) if scheme == "Token" else None
            return self._core.authority.user_certificate(csr, User(*owner)) if owner else None

        chain = await self._core.transact(issue)
        if chain is None:
            raise web.HTTPForbidden(text="token is unknown or already used")
        return web.json_response({"certificate": chain})

    async def _root_certificate(self, request: web.Request) -> web.Response:
        self._user(request)
        return web.Response(text=pem(self._core.authority.root))

    async def _supported_software(self, request: web.Request) -> web.Response:
        self._user(request)
        software = [{"name": "aos-provisioning", "min_version": PROVISIONING_MIN_VERSION}]
        return web.json_response({"software": software})

    async def _register(self, request: web.Request) -> web.Response:
        self._user(request, "oem")
        body = await _json(request)
        answer = await self._core.transact(lambda store: self._core.cloud.register(store, body))
        _log.info("Unit is registered: unit=%s", answer["system_uid"])
        return web.json_response(answer, status=201)

    async def _units(self, request: web.Request) -> web.Response:
        self._user(request)
        system_id = request.query.get("system_uid")
        units = await self._core.transact(Store.units)
        items = [self._summary(unit) for unit in units if system_id in (None, unit.system_id)]
        return web.json_response({"total": len(items), "items": items})

    async def _unit(self, request: web.Request) -> web.Response:
        self._user(request)
        return web.json_response(self._summary(await self._find(request)))

    async def _renew(self, request: web.Request) -> web.Response:
        self._user(request, "oem")
        unit = await self._find(request)
        await self._core.post(
            unit.system_id, await self._core.transact(lambda store: self._core.cloud.renew(store, unit))
        )
        return web.json_response({}, status=202)

    async def _certificates(self, request: web.Request) -> web.Response:
        self._user(request)
        unit = await self._find(request)
        certificates = await self._core.transact(lambda store: store.certificates(unit))
        items = [
            {
                "serial": one.serial,
                "cert_type": one.type,
                "node_id": one.node_id,
                "valid_till": one.valid_till,
                "status": one.status,
            }
            for one in certificates
        ]
        return web.json_response({"total": len(items), "items": items})

    async def _upload(self, request: web.Request) -> web.Response:
        user, certificate = self._user(request, "sp")
        if request.content_type != "multipart/form-data":
            raise BundleError("file", "send it as multipart/form-data")
        with tempfile.NamedTemporaryFile(dir=self._core.directory / "uploads") as upload:
            await _save_part(request, Path(upload.name))
            added = await self._core.upload(Path(upload.name), user, certificate)
        items = [{"id": one.item_id, "codename": one.codename, "version": one.version} for one in added]
        _log.info("Bundle is stored: user=%s, items=%s", user.name, items)
        return web.json_response({"items": items}, status=201)

    async def _find(self, request: web.Request) -> Unit:
        name = request.match_info["unit"]
        return await self._core.transact(lambda store: store.unit(name))

    def _summary(self, unit: Unit) -> dict[str, Any]:
        return {
            "id": unit.id,
            "system_uid": unit.system_id,
            "status": unit.status,
            "online_status": "Online" if self._core.online(unit.system_id) else "Offline",
            "model": unit.model,
        }


async def _json(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise InvalidArgumentError(f"body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidArgumentError("body is no JSON object")
    return body


async def _save_part(request: web.Request, target: Path) -> None:
    """Write the multipart field `file` to a file."""
    async for part in await request.multipart():
        if getattr(part, "name", None) != "file":
            continue
        size_bytes = 0
        with target.open("wb") as file:
            while chunk := await part.read_chunk(_CHUNK_BYTES):  # type: ignore[union-attr]
                size_bytes += len(chunk)
                if size_bytes > _UPLOAD_LIMIT_BYTES:
                    raise BundleError("file", f"is larger than {_UPLOAD_LIMIT_BYTES} bytes")
                file.write(chunk)
        return
    raise BundleError("file", "is missing")
