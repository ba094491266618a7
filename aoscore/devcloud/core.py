"""The running cloud: store, decisions, links to Units. The listeners and the admin API call it."""

import asyncio
import hashlib
import logging
import secrets
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509

from aoscore.common.aio import Broadcast, Worker
from aoscore.common.db import Database
from aoscore.common.errors import AosError, InvalidArgumentError, WrongStateError
from aoscore.common.files import remove_tree
from aoscore.devcloud.bundles import BundleReader, ItemImages
from aoscore.devcloud.ca import Authority, User
from aoscore.devcloud.cloud import Cloud
from aoscore.devcloud.endpoints import Endpoints
from aoscore.devcloud.faults import Faults
from aoscore.devcloud.imagekeys import load_keys
from aoscore.devcloud.link import Link, Message, Received, utc_text
from aoscore.devcloud.published import PublishedSchema
from aoscore.devcloud.seal import Sealed, seal
from aoscore.devcloud.store import ItemVersion, Store, Unit, masked

_log = logging.getLogger(__name__)

T = TypeVar("T")

TOKEN_LIFE_S = 3600.0


class UnitSession:
    """The cloud's side of one Unit: outlives its connections."""

    def __init__(self, system_id: str, published: PublishedSchema | None) -> None:
        self.link = Link(system_id, published=published)
        self.wake = asyncio.Event()
        self.online = False
        self.greeted = False
        self.desired_key: bytes | None = None
        self.close: Callable[[], None] = lambda: None

    def connect(self, close: Callable[[], None]) -> None:
        """A new connection takes over; an older one is cut."""
        self.close()
        self.close = close
        self.online, self.greeted, self.desired_key = True, False, None
        self.link.connected(time.monotonic())
        self.wake.set()

    def disconnect(self, close: Callable[[], None]) -> None:
        """The connection of this `close` ended."""
        if self.close == close:
            self.online, self.greeted = False, False
            self.close = lambda: None


class Core:
    """Everything behind the listeners.

    Args:
        directory: the cloud's own directory.
        database: opened by the owner.
        authority: issues certificates.
        endpoints: filled in by whoever binds the listeners.
        faults: what is to go wrong.
        published: second schema check, if wanted.
    """

    def __init__(
        self,
        directory: Path,
        database: Database,
        authority: Authority,
        endpoints: Endpoints,
        faults: Faults,
        published: PublishedSchema | None = None,
    ) -> None:
        self.directory = directory
        self.authority = authority
        self.endpoints = endpoints
        self.faults = faults
        self.cloud = Cloud(authority, endpoints, faults)
        self.events: Broadcast[dict[str, Any]] = Broadcast("events", limit=10_000)
        self._database = database
        self._published = published
        self._sessions: dict[str, UnitSession] = {}
        self._link_tokens: dict[str, tuple[str, float]] = {}
        self._log_tokens: dict[str, tuple[str, str, float]] = {}
        self._upload_lock = asyncio.Lock()
        self._uploads = Worker("devcloud-upload")
        remove_tree(directory / "uploads")  # what a killed cloud left there
        for name in ("sealed", "blobs/sha256", "uploads"):
            (directory / name).mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        """End the worker thread of uploads."""
        self._uploads.close()

    async def transact(self, function: Callable[[Store], T]) -> T:
        """Run a decision in one transaction of the store."""
        return await self._database.write(lambda connection: function(Store(connection)))

    # Link to Units

    def session(self, system_id: str) -> UnitSession:
        """The session of a Unit, made on first use."""
        if system_id not in self._sessions:
            self._sessions[system_id] = UnitSession(system_id, self._published)
        return self._sessions[system_id]

    def online(self, system_id: str) -> bool:
        """Whether the Unit is connected."""
        return system_id in self._sessions and self._sessions[system_id].online

    def new_link_token(self, system_id: str) -> str:
        """Bearer token for the next WebSocket handshakes of a Unit."""
        now_s = time.monotonic()
        self._link_tokens = {hash_: entry for hash_, entry in self._link_tokens.items() if entry[1] > now_s}
        token = secrets.token_urlsafe(32)
        self._link_tokens[token_hash(token)] = (system_id, now_s + TOKEN_LIFE_S)
        return token

    def link_token_owner(self, token: str) -> str | None:
        """System id a bearer token was given to, None when it is unknown or expired."""
        system_id, expires_s = self._link_tokens.get(token_hash(token), (None, 0.0))
        return system_id if expires_s > time.monotonic() else None

    def revoke_link_tokens(self) -> None:
        """Make every Unit do service discovery again at its next connect."""
        self._link_tokens.clear()

    async def post(self, system_id: str, message: Message) -> None:
        """Queue a message for a Unit; it goes out now, or when the Unit connects.

        Raises:
            InvalidArgumentError: the message violates the contract.
        """
        session = self.session(system_id)
        session.link.post(message, time.monotonic())
        session.wake.set()
        await self.transact(lambda store: store.add_message(store.unit(system_id), "to", message))
        self.publish(system_id, "to", message)

    async def take(self, system_id: str, received: Received, raw: bytes) -> list[Message]:
        """Act on a checked frame; the messages to queue in answer to it."""
        if received.problems:
            await self.violation(system_id, received.message_type, received.problems, raw)
        data = received.data
        if data is None:
            return []
        self.publish(system_id, "from", data)
        try:
            return await self.transact(lambda store: self.cloud.handle(store, store.unit(system_id), data))
        except AosError as error:
            await self.violation(system_id, received.message_type, [str(error)], raw)
            return []

    async def violation(self, system_id: str, message_type: str, problems: list[str], raw: bytes) -> None:
        """Remember that a Unit broke the contract."""
        _log.warning("Unit broke the contract: unit=%s, type=%s: %s", system_id, message_type, "; ".join(problems))
        text = raw.decode(errors="replace")
        await self.transact(lambda store: store.add_violation(store.unit(system_id), message_type, problems, text))
        self.events.publish({"unit": system_id, "event": "violation", "type": message_type, "problems": problems})

    def publish(self, system_id: str, direction: str, data: Message) -> None:
        """Tell whoever watches about a message."""
        self.events.publish({"unit": system_id, "event": direction, "type": data["messageType"], "data": masked(data)})

    def publish_connection(self, system_id: str, event: str) -> None:
        """Tell whoever watches that a Unit came ("online") or went ("offline")."""
        _log.info("Unit is %s: unit=%s", event, system_id)
        self.events.publish({"unit": system_id, "event": event})

    async def refresh(self, system_id: str) -> None:
        """Send the desired status if the Unit is there and has not been told the present one in this connection."""
        session = self.session(system_id)
        if not (session.online and session.greeted):
            return

        def decide(store: Store) -> tuple[bytes, Message]:
            unit = store.unit(system_id)
            desired = self.cloud.desired_status(store, unit)
            return self.cloud.desired_key(unit, desired), desired

        key, desired = await self.transact(decide)
        if key != session.desired_key:
            session.desired_key = key
            await self.post(system_id, desired)

    async def refresh_all(self) -> None:
        """After a change of assignments."""
        for system_id in list(self._sessions):
            await self.refresh(system_id)

    async def greet(self, system_id: str) -> None:
        """The first full status of a connection came: tell what is wanted, and repeat a renewal that has not begun."""
        session = self.session(system_id)
        session.greeted = True
        await self.refresh(system_id)
        renewal = await self.transact(lambda store: self.cloud.renewal(store, store.unit(system_id)))
        if renewal["certificates"] and "renewCertificatesNotification" not in session.link.unacked:
            await self.post(system_id, renewal)

    def disconnect(self, system_id: str) -> None:
        """Cut the connection of a Unit."""
        if not self.online(system_id):
            raise WrongStateError(f"Unit {system_id} is not connected")
        self._sessions[system_id].close()

    def forget_session(self, system_id: str) -> None:
        """Drop everything queued for a Unit and its connection."""
        if (session := self._sessions.pop(system_id, None)) is not None:
            session.close()

    # Items

    async def upload(self, path: Path, user: User, certificate: x509.Certificate) -> list[ItemVersion]:
        """Check a deployment bundle, make its blobs and store its items.

        Raises:
            BundleError: the bundle is refused.
        """
        async with self._upload_lock:
            services = await self.transact(Store.service_names)
            with tempfile.TemporaryDirectory(dir=self.directory / "uploads") as work:
                items = await self._uploads.run(self._read_bundle, Path(work), path, certificate, services)
                digests = {blob.digest: blob.path for item in items for blob in item.blobs}
                known = await self.transact(lambda store: {digest for digest in digests if store.blob(digest)})
                new = {
                    digest: blob
                    for digest, blob in digests.items()
                    if digest not in known or not self.sealed_path(digest).exists()
                }
                sealed = await self._uploads.run(self._seal, new)
            added = await self.transact(lambda store: self.cloud.add_bundle(store, user, items, sealed))
        await self.refresh_all()
        return added

    def sealed_path(self, digest: str) -> Path:
        """Encrypted file of a blob."""
        return self.directory / "sealed" / digest.removeprefix("sha256:")

    def _read_bundle(
        self, work: Path, path: Path, certificate: x509.Certificate, services: dict[str, str]
    ) -> list[ItemImages]:
        keys = load_keys(self.directory)
        return BundleReader(work, certificate, services=services, image_keys=keys).read(path)

    def _seal(self, blobs: dict[str, Path]) -> dict[str, Sealed]:
        sealed = {}
        for digest, path in blobs.items():
            target = self.sealed_path(digest)
            temporary = target.with_suffix(".new")
            sealed[digest] = seal(path, temporary, self.authority.signer_key)
            temporary.rename(target)
            path.rename(self.directory / "blobs" / "sha256" / target.name)
        return sealed

    # Log requests

    def upload_options(self, system_id: str, correlation_id: str) -> Message:
        """Has a Unit upload the log of one request by HTTPS; the token is for nothing else."""
        now_s = time.monotonic()
        self._log_tokens = {hash_: entry for hash_, entry in self._log_tokens.items() if entry[2] > now_s}
        token = secrets.token_urlsafe(32)
        self._log_tokens[token_hash(token)] = (system_id, correlation_id, now_s + TOKEN_LIFE_S)
        expires_at = datetime.now(UTC) + timedelta(seconds=TOKEN_LIFE_S)
        return {
            "type": "https",
            "url": self.endpoints.log_url,
            "bearerToken": token,
            "bearerTokenTtl": utc_text(expires_at),
        }

    def log_token_owner(self, token: str) -> tuple[str, str] | None:
        """System id and correlation id that a token was made for, None when it is unknown or expired."""
        system_id, correlation_id, expires_s = self._log_tokens.get(token_hash(token), ("", "", 0.0))
        return (system_id, correlation_id) if expires_s > time.monotonic() else None

    async def wait_for_log(self, unit: Unit, request: Message, timeout_s: float) -> dict[str, dict[str, Any]]:
        """Send a log request and collect until every asked node has answered or the time is over."""
        wanted = {node["codename"] for node in request["filter"]["nodeIds"]}
        if not wanted:
            raise InvalidArgumentError(f"Unit {unit.system_id} has no known node to ask for logs")

        def result(store: Store) -> dict[str, dict[str, Any]]:
            return self.cloud.log_result(store, unit, request["correlationId"])

        with self.events.subscribe() as events:
            await self.post(unit.system_id, request)
            try:
                async with asyncio.timeout(timeout_s):
                    while True:
                        event = await events.get()
                        if event["unit"] != unit.system_id or event.get("type") != "pushLog":
                            continue
                        found = await self.transact(result)
                        if wanted <= {node for node, entry in found.items() if entry["complete"]}:
                            return found
            except TimeoutError:
                return await self.transact(result)


def token_hash(token: str) -> str:
    """Tokens are kept as hashes only."""
    return hashlib.sha256(token.encode()).hexdigest()
