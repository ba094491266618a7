"""Keys and certificates on a PKCS#11 token (iam.md §5). The library works in a helper process per call.

Several certificate types may share a token; their objects are told apart by label. A certificate in use has the id of
its key; issuers have no label and are there once for all.
"""

import logging
import os
import secrets
import threading
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aoscore.common.aio import log_and_continue
from aoscore.common.errors import (
    AosError,
    ConfigError,
    DeadlineError,
    InvalidArgumentError,
    NotFoundError,
    RuntimeFailure,
    WrongStateError,
)
from aoscore.common.files import write_atomic
from aoscore.common.log import kv
from aoscore.common.pkcs11.token import CALL_LIMIT_S, SLOW_CALL_LIMIT_S, Token, TokenPlace, command
from aoscore.common.pkcs11.url import TokenUrl, parse_token_url
from aoscore.iam.certhandler.keystore import StoredCertificate, StoredKey
from aoscore.iam.config import Algorithm

if TYPE_CHECKING:
    from cryptography import x509

_log = logging.getLogger(__name__)

_DEFAULT_LABEL = "aos"
_MAX_LABEL_BYTES = 31
# Characters that end a part of a URL: AosCore 9.1 does not escape labels (iam.md §5.6).
_NOT_IN_LABELS = set(";?&=%/")
_PIN_BYTES = 15
_PIN_INCORRECT, _PIN_NOT_SET = 0xA0, 0x102
# After a library has hung, calls fail at once for so long: nobody shall wait for it again and again.
_HANG_PAUSE_S = 30.0

# Identities of OP-TEE (iam.md §5.4).
_TEE_NAMESPACE = uuid.UUID("58ac9ca0-2086-4683-a1b8-ec4bc08e01b6")
LOGIN_TYPE_VARIABLE = "CKTEEC_LOGIN_TYPE"

Entry = Mapping[str, Any]


class TokenStoreParams(msgspec.Struct, frozen=True, rename="camel"):
    """Section params of a certificate module of the plug-in pkcs11module (iam.md §2.5).

    `uid` and `gid` are the identity that OP-TEE asks for. `module_path_in_url` tells peers which library to load.
    """

    library: Path
    slot_id: int | None = None
    slot_index: int | None = None
    token_label: str = ""
    user_pin_path: Path | None = None
    module_path_in_url: bool = False
    uid: int = 0
    gid: int = 0

    def place(self, login_type: str | None) -> TokenPlace:
        """The token that is meant. Raises ConfigError naming the key that is wrong."""
        if sum(value not in (None, "") for value in (self.slot_id, self.slot_index, self.token_label)) > 1:
            raise ConfigError("only one of slotId, slotIndex and tokenLabel can say which token it is")
        label = self.token_label or _DEFAULT_LABEL
        if len(label.encode()) > _MAX_LABEL_BYTES or not label.isprintable() or _NOT_IN_LABELS & set(label):
            raise ConfigError(f"tokenLabel: {label!r} is no label of a token")
        for key, path in (("library", self.library), ("userPinPath", self.user_pin_path)):
            if path is not None and not path.is_absolute():
                raise ConfigError(f"{key}: {path} is not absolute")
        if login_type is None and self.user_pin_path is None:
            raise ConfigError(f"userPinPath is missing: it is needed unless {LOGIN_TYPE_VARIABLE} is set")
        pin_file = None if login_type is not None else self.user_pin_path
        return TokenPlace(label=label, slot_id=self.slot_id, slot_index=self.slot_index, pin_file=pin_file)


class SharedToken:
    """A token with the types that lie on it: one change at a time, and what is on it is remembered between changes.

    Nobody else changes objects with our labels.
    """

    def __init__(self, token: Token) -> None:
        self.token = token
        self.so_pin = b""
        self._lock = threading.Lock()
        self._objects: list[Entry] | None = None
        self._hung: AosError | None = None
        self._hung_until_s = 0.0

    def objects(self) -> list[Entry] | None:
        """All keys and certificates; None for a token without an owner."""
        with self._lock:
            if self._objects is None:
                owned, *objects = self._run(command("owned"), command("objects"))
                if not owned:
                    return None
                self._objects = objects[0]
            return self._objects

    def change(self, *commands: Entry, limit_s: float = CALL_LIMIT_S) -> list[Any]:
        """Do commands, and look what is there afterwards."""
        with self._lock:
            self._objects = None
            *answers, objects = self._run(*commands, command("objects"), limit_s=limit_s)
            self._objects = objects
            return answers

    def _run(self, *commands: Entry, limit_s: float = CALL_LIMIT_S) -> list[Any]:
        if self._hung is not None and time.monotonic() < self._hung_until_s:
            raise self._hung
        try:
            answers = self.token.run(*commands, limit_s=limit_s)
        except DeadlineError as error:
            self._hung, self._hung_until_s = error, time.monotonic() + _HANG_PAUSE_S
            raise
        self._hung = None
        return answers


class TokenKeyStore:
    """A KeyStore: the objects of one certificate type on a token."""

    def __init__(self, params: TokenStoreParams, cert_type: str, token: SharedToken, login_type: str | None) -> None:
        """`login_type` is the value of CKTEEC_LOGIN_TYPE; None means that users log in with a PIN."""
        self._params = params
        self._type = cert_type
        self._token = token
        self._login_type = login_type
        self._pin_file = token.token.place.pin_file

    @property
    def owned(self) -> bool:
        """Whether the token is initialized."""
        return self._token.objects() is not None

    def set_owner(self, password: str) -> None:
        """Empty the token, whoever uses it, and take it into use: `password` becomes the security officer's PIN."""
        so_pin = b"" if self._login_type is not None else password.encode()
        user_pin = self._user_pin()
        first = command("initialize", so_pin=so_pin.hex(), old_so_pin=self._token.so_pin.hex(), user_pin=user_pin.hex())
        try:
            self._token.change(first, limit_s=SLOW_CALL_LIMIT_S)
        except RuntimeFailure as error:
            if error.errno != _PIN_INCORRECT:
                raise
            raise RuntimeFailure(
                f"{error}: the token was initialized with another password, wipe it and start again", error.errno
            ) from error
        self._token.so_pin = so_pin

    def clear(self) -> None:
        """Delete the objects of the type. A token that is gone or into which nobody can log in is left to set_owner."""
        try:
            if self.owned:
                self._token.change(command("destroy_label", label=self._type))
        except (NotFoundError, RuntimeFailure, WrongStateError) as error:
            if isinstance(error, RuntimeFailure) and error.errno not in (_PIN_INCORRECT, _PIN_NOT_SET):
                raise
            _log.warning(kv("Can't log in to clear the token", type=self._type, error=error))

    def create_key(self, algorithm: Algorithm) -> StoredKey:
        """A new pair on the token."""
        key_id = uuid.uuid4().hex
        generate = command("generate", algorithm=algorithm.value, label=self._type, key_id=key_id)
        (entry,) = self._token.change(generate, limit_s=SLOW_CALL_LIMIT_S)
        return self._key(entry)

    def pending_keys(self) -> list[StoredKey]:
        """Whole pairs without a certificate."""
        kinds = self._kinds()
        keys = []
        for entry in self._entries("public"):
            if kinds[entry["id"]] == {"public", "private"}:
                # A key of a kind that we do not make must not stand in the way of the others.
                with log_and_continue(_log, f"Can't read pending key {entry['id']} of {self._type}"):
                    keys.append(self._key(entry))
        return keys

    def remove_key(self, key_id: str) -> None:
        """Delete a pair."""
        self._token.change(command("destroy", label=self._type, key_id=key_id))

    def store_certificate(self, key_id: str, chain: "Sequence[x509.Certificate]") -> StoredCertificate:
        """Put a certificate beside its key, and those of its issuers that are not there yet."""
        from aoscore.common.certs import to_der

        entries = [
            {
                "value": to_der(certificate).hex(),
                "subject": certificate.subject.public_bytes().hex(),
                "issuer": certificate.issuer.public_bytes().hex(),
                "serial": _der_integer(certificate.serial_number).hex(),
                "id": uuid.uuid4().hex,
            }
            for certificate in chain
        ]
        self._token.change(command("store", label=self._type, key_id=key_id, chain=entries))
        return self._stored(key_id, to_der(chain[0]))

    def certificates(self) -> list[StoredCertificate]:
        """All certificates whose private key is there; one that can't be read is logged and left out."""
        kinds = self._kinds()
        found = []
        for entry in self._entries("certificate"):
            if "private" in kinds[entry["id"]]:
                with log_and_continue(_log, f"Can't read certificate {entry['id']} of {self._type}"):
                    found.append(self._stored(entry["id"], bytes.fromhex(entry["value"])))
        return found

    def remove_certificate(self, cert_url: str) -> None:
        """Delete a certificate, its key, and issuers that it was the last to need."""
        destroy = command("destroy", label=self._type, key_id=parse_token_url(cert_url).id)
        self._token.change(destroy, command("destroy_loose_issuers"))

    def remove_orphans(self, keep: Collection[str]) -> int:
        """Delete certificates without key, halves of pairs, keys that nobody waits for, issuers of nothing."""
        orphans = [
            key_id
            for key_id, kinds in self._kinds().items()
            if not {"certificate", "private"} <= kinds and not (kinds == {"public", "private"} and key_id in keep)
        ]
        if orphans:
            _log.warning(kv("Objects that nobody can use removed", type=self._type, ids=orphans))
            self._token.change(
                *(command("destroy", label=self._type, key_id=key_id) for key_id in orphans),
                command("destroy_loose_issuers"),
            )
        return len(orphans)

    def _entries(self, kind: str) -> list[Entry]:
        objects = self._token.objects() or []
        return [entry for entry in objects if entry["kind"] == kind and entry["label"] == self._type]

    def _kinds(self) -> dict[str, set[str]]:
        """Which objects there are by id."""
        kinds: dict[str, set[str]] = {}
        for kind in ("certificate", "public", "private"):
            for entry in self._entries(kind):
                kinds.setdefault(entry["id"], set()).add(kind)
        return kinds

    def _key(self, entry: Mapping[str, str]) -> StoredKey:
        from aoscore.common.pkcs11.keys import public_key_of, token_key

        key = token_key(self._token.token, self._type, entry["id"], public_key_of(dict(entry)))
        return StoredKey(entry["id"], key)

    def _stored(self, key_id: str, der: bytes) -> StoredCertificate:
        url = str(
            TokenUrl(
                token=self._token.token.place.label,
                object=self._type,
                id=key_id,
                module_path=self._params.library if self._params.module_path_in_url else None,
                pin_source=self._pin_file,
            )
        )
        return StoredCertificate(der, url, url)

    def _user_pin(self) -> bytes:
        """The PIN that users get. Where there is no PIN yet, a new one is stored before anything depends on it."""
        match self._login_type:
            case None:
                pass
            case "public":
                return b"public"
            case "user":
                return tee_identity("user", "uid", self._params.uid)
            case "group":
                return tee_identity("group", "gid", self._params.gid)
            case other:
                raise InvalidArgumentError(f"{LOGIN_TYPE_VARIABLE} is {other!r}, must be public, user or group")
        if self._pin_file is None:
            raise WrongStateError(f"no PIN file is configured for {self._type}")
        try:
            pin = self._pin_file.read_bytes().strip()
        except FileNotFoundError:
            pin = b""
        if not pin:
            pin = secrets.token_hex(_PIN_BYTES).encode()
            self._pin_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(self._pin_file, pin, mode=0o600)
        return pin


def login_type() -> str | None:
    """How users of the token log in, by the environment (iam.md §5.4)."""
    return os.environ.get(LOGIN_TYPE_VARIABLE) or None


def tee_identity(kind: str, name: str, number: int) -> bytes:
    """PIN by which OP-TEE knows a user or group."""
    return f"{kind}:{uuid.uuid5(_TEE_NAMESPACE, f'{name}={number}')}".encode()


def _der_integer(number: int) -> bytes:
    raw = number.to_bytes(number.bit_length() // 8 + 1, "big")
    return bytes([0x02, len(raw)]) + raw
