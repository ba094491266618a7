"""The helper process: does a list of commands on one token and ends (design, rule 5).

The library of a token is foreign code that may crash or hang; here it takes nobody along. Commands come as JSON on
stdin, answers go as JSON to stdout, bytes in hex. Imports the standard library only: it starts in a few milliseconds.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from aoscore.common.pkcs11 import cryptoki as ck

_CLASSES = {"certificate": ck.CKO_CERTIFICATE, "public": ck.CKO_PUBLIC_KEY, "private": ck.CKO_PRIVATE_KEY}
_P384 = bytes.fromhex("06052b81040022")
_PR_SET_PDEATHSIG = 1
_MAX_CHAIN = 8


class Refused(Exception):
    """A command that can't be done, for a reason that is not the library's. `kind` tells the caller which."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Token:
    """One token, found anew in each process: slot numbers are not stable (iam.md §5.2)."""

    def __init__(self, library: ck.Library, place: dict[str, Any]) -> None:
        self._library = library
        self._place = place
        self.slot = self._find()

    def _find(self) -> int:
        wanted = self._place
        if wanted.get("slot_id") is not None:
            return int(wanted["slot_id"])
        if wanted.get("slot_index") is not None:
            slots, index = self._library.all_slots(), int(wanted["slot_index"])
            if not 0 <= index < len(slots):
                raise Refused("not_found", f"there are {len(slots)} slots, none has the index {index}")
            return slots[index]
        infos = [(slot, *self._library.token_info(slot)) for slot in self._library.slots()]
        for slot, label, initialized in infos:
            if initialized and label == wanted["label"]:
                return slot
        for slot, _, initialized in infos:
            if not initialized:
                return slot
        raise Refused("not_found", f"there is no token {wanted['label']!r} and no empty one")

    @property
    def owned(self) -> bool:
        """Whether the token is initialized."""
        return self._library.token_info(self.slot)[1]

    def pin(self) -> bytes | None:
        """The user's PIN; None where the identity of the process counts instead."""
        path = self._place.get("pin_file")
        if not path:
            return None
        try:
            with open(path, "rb") as file:  # noqa: PTH123 - pathlib takes long to import
                return file.read().strip()
        except OSError as error:
            raise Refused("pin", f"can't read PIN file {path}: {error.strerror}") from None

    def initialize(self, so_pin: bytes, old_so_pin: bytes, user_pin: bytes) -> None:
        """Empty the token and take it into use. With another SO PIN than last time the old one is changed first."""
        try:
            self._library.init_token(self.slot, so_pin, self._place["label"])
        except ck.CryptokiError as error:
            if error.code != ck.CKR_PIN_INCORRECT or not old_so_pin:
                raise
            with self._library.session(self.slot, ck.CKU_SO, old_so_pin) as session:
                session.set_pin(old_so_pin, so_pin)
            self._library.init_token(self.slot, so_pin, self._place["label"])
        with self._library.session(self.slot, ck.CKU_SO, so_pin) as session:
            session.init_pin(user_pin)


def _key_template(algorithm: str, label: bytes, key_id: bytes) -> tuple[int, ck.Template, ck.Template]:
    """Mechanism and attributes of a new pair (iam.md §5.5)."""
    common: dict[int, ck.Value] = {ck.CKA_TOKEN: True, ck.CKA_ID: key_id, ck.CKA_LABEL: label}
    private = {
        **common,
        ck.CKA_CLASS: ck.CKO_PRIVATE_KEY,
        ck.CKA_PRIVATE: True,
        ck.CKA_SIGN: True,
        ck.CKA_SENSITIVE: True,
        ck.CKA_EXTRACTABLE: False,
    }
    public = {**common, ck.CKA_CLASS: ck.CKO_PUBLIC_KEY, ck.CKA_PRIVATE: False, ck.CKA_VERIFY: True}
    if algorithm == "ecc":
        public |= {ck.CKA_KEY_TYPE: ck.CKK_EC, ck.CKA_EC_PARAMS: _P384}
        private |= {ck.CKA_KEY_TYPE: ck.CKK_EC}
        return ck.CKM_EC_KEY_PAIR_GEN, public, private
    public |= {
        ck.CKA_KEY_TYPE: ck.CKK_RSA,
        ck.CKA_ENCRYPT: True,
        ck.CKA_MODULUS_BITS: 2048,
        ck.CKA_PUBLIC_EXPONENT: b"\x01\x00\x01",
    }
    private |= {ck.CKA_KEY_TYPE: ck.CKK_RSA, ck.CKA_DECRYPT: True}
    return ck.CKM_RSA_PKCS_KEY_PAIR_GEN, public, private


class Commands:
    """What can be asked for. Each method is a command; its arguments are those of the JSON object."""

    def __init__(self, session: ck.Session) -> None:
        self._session = session

    def objects(self) -> list[dict[str, Any]]:
        """All keys and certificates of the token."""
        return [self._describe(kind, handle) for kind in _CLASSES for handle in self._find(kind)]

    def generate(self, algorithm: str, label: str, key_id: str) -> dict[str, Any]:
        """A new key pair; its public half."""
        mechanism, public, private = _key_template(algorithm, label.encode(), bytes.fromhex(key_id))
        handle, _ = self._session.generate_pair(mechanism, public, private)
        return self._describe("public", handle)

    def sign(self, label: str, key_id: str, mechanism: int, data: str) -> str:
        """Signature by a private key; an EC signature is r and s side by side."""
        return self._session.sign(self._private_key(label, key_id), mechanism, bytes.fromhex(data)).hex()

    def decrypt(self, label: str, key_id: str, mechanism: int, parameter: list[int], data: str) -> str:
        """Plain text of data that was encrypted for a key."""
        key = self._private_key(label, key_id)
        raw = ck.oaep(*parameter) if parameter else b""
        return self._session.decrypt(key, mechanism, raw, bytes.fromhex(data)).hex()

    def public(self, label: str, key_id: str) -> dict[str, Any]:
        """The public half of a key."""
        return self._describe("public", self._one("public", label, key_id))

    def store(self, label: str, key_id: str, chain: list[dict[str, str]]) -> None:
        """A leaf and its chain. The leaf comes last: with it the certificate is in use, and it needs its chain."""
        self._private_key(label, key_id)
        leaf, *others = chain
        present = {self._session.get(handle, ck.CKA_VALUE) for handle in self._find("certificate")}
        for certificate in others:
            if bytes.fromhex(certificate["value"]) not in present:
                self._create_certificate(certificate, certificate["id"], "")
        if bytes.fromhex(leaf["value"]) not in present:
            self._create_certificate(leaf, key_id, label)

    def _create_certificate(self, certificate: dict[str, str], key_id: str, label: str) -> None:
        template: dict[int, ck.Value] = {
            ck.CKA_CLASS: ck.CKO_CERTIFICATE,
            ck.CKA_CERTIFICATE_TYPE: ck.CKC_X_509,
            ck.CKA_TOKEN: True,
            ck.CKA_PRIVATE: False,
            ck.CKA_SUBJECT: bytes.fromhex(certificate["subject"]),
            ck.CKA_ISSUER: bytes.fromhex(certificate["issuer"]),
            ck.CKA_SERIAL_NUMBER: bytes.fromhex(certificate["serial"]),
            ck.CKA_VALUE: bytes.fromhex(certificate["value"]),
            ck.CKA_ID: bytes.fromhex(key_id),
        }
        if label:
            template[ck.CKA_LABEL] = label.encode()
        self._session.create(template)

    def chain(self, label: str, key_id: str) -> list[str]:
        """A leaf and its issuers as far as they are on the token, to a self-signed one."""
        certificates = [self._describe("certificate", handle) for handle in self._find("certificate")]
        wanted = (label, key_id)
        found = [entry for entry in certificates if (entry["label"], entry["id"]) == wanted][:1]
        if not found:
            raise Refused("not_found", f"there is no certificate {label!r} with id {key_id}")
        while found[-1]["issuer"] != found[-1]["subject"] and len(found) < _MAX_CHAIN:
            issuer = found[-1]["issuer"]
            parent = next((entry for entry in certificates if entry["subject"] == issuer), None)
            if parent is None:
                break
            found.append(parent)
        return [str(entry["value"]) for entry in found]

    def destroy(self, label: str, key_id: str) -> None:
        """A certificate and its keys, in an order that leaves no certificate without its key."""
        for kind in _CLASSES:
            for handle in self._find(kind, label, key_id):
                self._session.destroy(handle)

    def destroy_label(self, label: str) -> None:
        """All objects of a type."""
        for kind in _CLASSES:
            for handle in self._find(kind, label):
                self._session.destroy(handle)
        self.destroy_loose_issuers()

    def destroy_half(self, label: str, key_id: str, kind: str) -> None:
        """One object of a key or certificate."""
        for handle in self._find(kind, label, key_id):
            self._session.destroy(handle)

    def destroy_loose_issuers(self) -> None:
        """CA certificates from which no certificate of a type is issued any more."""
        handles = self._find("certificate")
        certificates = {handle: self._describe("certificate", handle) for handle in handles}
        needed: set[str] = set()
        left = [entry["issuer"] for entry in certificates.values() if entry["label"]]
        while left:
            name = left.pop()
            if name not in needed:
                needed.add(name)
                left += [entry["issuer"] for entry in certificates.values() if entry["subject"] == name]
        for handle, entry in certificates.items():
            if not entry["label"] and entry["subject"] not in needed:
                self._session.destroy(handle)

    def _find(self, kind: str, label: str | None = None, key_id: str | None = None) -> list[int]:
        template: dict[int, ck.Value] = {ck.CKA_CLASS: _CLASSES[kind], ck.CKA_TOKEN: True}
        if label is not None:
            template[ck.CKA_LABEL] = label.encode()
        if key_id is not None:
            template[ck.CKA_ID] = bytes.fromhex(key_id)
        return self._session.find(template)

    def _one(self, kind: str, label: str, key_id: str) -> int:
        handles = self._find(kind, label, key_id)
        if not handles:
            raise Refused("not_found", f"there is no {kind} key {label!r} with id {key_id}")
        return handles[0]

    def _private_key(self, label: str, key_id: str) -> int:
        return self._one("private", label, key_id)

    def _describe(self, kind: str, handle: int) -> dict[str, Any]:
        get = self._session.get
        entry = {"kind": kind, "label": get(handle, ck.CKA_LABEL).decode(errors="replace")}
        wanted = {"id": ck.CKA_ID}
        if kind == "certificate":
            wanted |= {"value": ck.CKA_VALUE, "subject": ck.CKA_SUBJECT, "issuer": ck.CKA_ISSUER}
        elif kind == "public":
            wanted |= {"point": ck.CKA_EC_POINT, "modulus": ck.CKA_MODULUS, "exponent": ck.CKA_PUBLIC_EXPONENT}
        return {**entry, **{name: get(handle, attribute).hex() for name, attribute in wanted.items()}}


def perform(request: dict[str, Any]) -> list[Any]:
    """Answers to all commands of a request, in order."""
    library = ck.Library(request["library"])
    try:
        token = Token(library, request["token"])
        return list(_answers(library, token, request))
    finally:
        # Its error would only hide the first one.
        try:
            library.finalize()
        except ck.CryptokiError:
            pass


def _answers(library: ck.Library, token: Token, request: dict[str, Any]) -> Iterator[Any]:
    commands = request["commands"]
    owned = token.owned
    if commands and commands[0]["do"] == "initialize":
        first = commands.pop(0)
        pins = (bytes.fromhex(first[name]) for name in ("so_pin", "old_so_pin", "user_pin"))
        token.initialize(*pins)
        yield None
    elif commands and commands[0]["do"] == "owned":
        commands.pop(0)
        yield owned
        if not owned:
            return
    elif not owned:
        raise Refused("no_owner", "the token is not initialized")
    if not commands:
        return
    login = ck.CKU_USER if request["login"] else None
    with library.session(token.slot, login, token.pin() if request["login"] else None) as session:
        objects = Commands(session)
        for command in commands:
            name = command.pop("do")
            method: Callable[..., Any] = getattr(objects, name)
            yield method(**command)


def main() -> None:
    """Read a request, do it, write the answer. Exits with 0 when there is an answer, also when it is an error."""
    request = json.load(sys.stdin)
    # Whoever waits for the answer is gone: what is not done by now must not be done later.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request["parent"]:
        return
    # A library that prints must not get into the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        result: dict[str, Any] = {"answers": perform(request)}
    except ck.CryptokiError as error:
        result = {"error": "cryptoki", "function": error.function, "code": error.code, "text": str(error)}
    except Refused as error:
        result = {"error": error.kind, "text": str(error)}
    except OSError as error:
        result = {"error": "library", "text": str(error)}
    json.dump(result, answer)
    answer.flush()
    # Libraries crash in their exit handlers; there is nothing left to do that could be lost.
    os._exit(0)
