"""The part of Cryptoki (PKCS#11 2.40) that we use, called through ctypes. For the helper process only.

Own code because of the libraries that there are, one has a licence that does not go together with ours in a device
(PyKCS11: GPL), and the other can't initialize a token (python-pkcs11). Imports the standard library only: the helper
must start fast.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char, c_ubyte, c_ulong, c_void_p, sizeof
from typing import Any

CKF_TOKEN_INITIALIZED = 0x400
CKU_SO, CKU_USER = 0, 1
CKO_CERTIFICATE, CKO_PUBLIC_KEY, CKO_PRIVATE_KEY = 1, 2, 3
CKC_X_509 = 0
CKK_RSA, CKK_EC = 0, 3
CKA_CLASS, CKA_TOKEN, CKA_PRIVATE, CKA_LABEL = 0x0, 0x1, 0x2, 0x3
CKA_VALUE, CKA_CERTIFICATE_TYPE, CKA_ISSUER, CKA_SERIAL_NUMBER = 0x11, 0x80, 0x81, 0x82
CKA_KEY_TYPE, CKA_SUBJECT, CKA_ID, CKA_SENSITIVE = 0x100, 0x101, 0x102, 0x103
CKA_ENCRYPT, CKA_DECRYPT, CKA_SIGN, CKA_VERIFY = 0x104, 0x105, 0x108, 0x10A
CKA_MODULUS, CKA_MODULUS_BITS, CKA_PUBLIC_EXPONENT, CKA_EXTRACTABLE = 0x120, 0x121, 0x122, 0x162
CKA_EC_PARAMS, CKA_EC_POINT = 0x180, 0x181
CKM_RSA_PKCS_KEY_PAIR_GEN, CKM_EC_KEY_PAIR_GEN = 0x0, 0x1040
CKR_PIN_INCORRECT, CKR_ALREADY_INITIALIZED = 0xA0, 0x191

_CKF_OS_LOCKING_OK = 0x2
_CKF_RW_SESSION, _CKF_SERIAL_SESSION = 0x2, 0x4
_CKR_BUFFER_TOO_SMALL = 0x150
_UNAVAILABLE = c_ulong(-1).value

# Functions by their place in CK_FUNCTION_LIST, with the types of their arguments behind those that all have.
_SESSION = c_ulong
_FUNCTIONS: Mapping[str, tuple[int, Sequence[Any]]] = {
    "C_Initialize": (0, (c_void_p,)),
    "C_Finalize": (1, (c_void_p,)),
    "C_GetSlotList": (4, (c_ubyte, c_void_p, POINTER(c_ulong))),
    "C_GetTokenInfo": (6, (c_ulong, c_void_p)),
    "C_InitToken": (9, (c_ulong, c_void_p, c_ulong, c_void_p)),
    "C_InitPIN": (10, (_SESSION, c_void_p, c_ulong)),
    "C_SetPIN": (11, (_SESSION, c_void_p, c_ulong, c_void_p, c_ulong)),
    "C_OpenSession": (12, (c_ulong, c_ulong, c_void_p, c_void_p, POINTER(_SESSION))),
    "C_CloseSession": (13, (_SESSION,)),
    "C_Login": (18, (_SESSION, c_ulong, c_void_p, c_ulong)),
    "C_CreateObject": (20, (_SESSION, c_void_p, c_ulong, POINTER(c_ulong))),
    "C_DestroyObject": (22, (_SESSION, c_ulong)),
    "C_GetAttributeValue": (24, (_SESSION, c_ulong, c_void_p, c_ulong)),
    "C_FindObjectsInit": (26, (_SESSION, c_void_p, c_ulong)),
    "C_FindObjects": (27, (_SESSION, c_void_p, c_ulong, POINTER(c_ulong))),
    "C_FindObjectsFinal": (28, (_SESSION,)),
    "C_DecryptInit": (33, (_SESSION, c_void_p, c_ulong)),
    "C_Decrypt": (34, (_SESSION, c_void_p, c_ulong, c_void_p, POINTER(c_ulong))),
    "C_SignInit": (42, (_SESSION, c_void_p, c_ulong)),
    "C_Sign": (43, (_SESSION, c_void_p, c_ulong, c_void_p, POINTER(c_ulong))),
    "C_GenerateKeyPair": (
        59,
        (_SESSION, c_void_p, c_void_p, c_ulong, c_void_p, c_ulong, POINTER(c_ulong), POINTER(c_ulong)),
    ),
}


class _Attribute(ctypes.Structure):
    _fields_ = (("type", c_ulong), ("value", c_void_p), ("length", c_ulong))


class _Mechanism(ctypes.Structure):
    _fields_ = (("mechanism", c_ulong), ("parameter", c_void_p), ("length", c_ulong))


class _OaepParams(ctypes.Structure):
    _fields_ = (
        ("hash", c_ulong),
        ("mgf", c_ulong),
        ("source", c_ulong),
        ("source_data", c_void_p),
        ("source_length", c_ulong),
    )


class _InitializeArgs(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("create", "destroy", "lock", "unlock")),
        ("flags", c_ulong),
        ("reserved", c_void_p),
    )


class _TokenInfo(ctypes.Structure):
    _fields_ = (
        *(("label", c_char * 32), ("manufacturer", c_char * 32), ("model", c_char * 16), ("serial", c_char * 16)),
        ("flags", c_ulong),
        ("counts", c_ulong * 10),
        *(("hardware", c_ubyte * 2), ("firmware", c_ubyte * 2), ("time", c_char * 16)),
    )


class CryptokiError(Exception):
    """A function that did not answer CKR_OK."""

    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function} answered {code:#x}")
        self.function = function
        self.code = code


Value = bool | int | bytes
Template = Mapping[int, Value]


def _encode(value: Value) -> Any:
    if isinstance(value, bool):
        return c_ubyte(value)
    if isinstance(value, int):
        return c_ulong(value)
    return (c_ubyte * len(value)).from_buffer_copy(value)


def _attributes(template: Template) -> tuple[Any, list[Any]]:
    """The C array of a template, and what must live as long as it."""
    values = [_encode(value) for value in template.values()]
    array = (_Attribute * len(values))(
        *(
            _Attribute(kind, ctypes.cast(byref(value), c_void_p), sizeof(value))
            for kind, value in zip(template, values, strict=True)
        )
    )
    return array, values


def oaep(hash_mechanism: int, mgf: int) -> bytes:
    """Parameters of CKM_RSA_PKCS_OAEP without a label."""
    return bytes(_OaepParams(hash_mechanism, mgf, 1, None, 0))


def _text(value: bytes | None) -> tuple[bytes | None, int]:
    return (value, len(value)) if value else (None, 0)


class Library:
    """A loaded and initialized PKCS#11 library. Raises OSError when it can't be loaded."""

    def __init__(self, path: str) -> None:
        loaded = ctypes.CDLL(path)
        table = c_void_p()
        try:
            get_list = loaded.C_GetFunctionList
        except AttributeError:
            raise OSError(f"{path} is no PKCS#11 library") from None
        if code := get_list(byref(table)):
            raise CryptokiError("C_GetFunctionList", code)
        if not table.value:
            raise OSError(f"{path} has no list of functions")
        # The list begins with a version of two bytes, padded to the size of a pointer.
        pointers = (c_void_p * 61).from_address(table.value + sizeof(c_void_p))
        self._calls: dict[str, Callable[..., int]] = {
            name: ctypes.CFUNCTYPE(c_ulong, *types)(pointers[place] or 0) for name, (place, types) in _FUNCTIONS.items()
        }
        arguments = _InitializeArgs(flags=_CKF_OS_LOCKING_OK)
        self.call("C_Initialize", byref(arguments), good=(CKR_ALREADY_INITIALIZED,))

    def call(self, name: str, *arguments: Any, good: Sequence[int] = ()) -> int:
        """Call a function; CryptokiError unless it answers CKR_OK or one of `good`."""
        code = self._calls[name](*arguments)
        if code and code not in good:
            raise CryptokiError(name, code)
        return code

    def finalize(self) -> None:
        """Let go of all tokens."""
        self.call("C_Finalize", None)

    def slots(self) -> list[int]:
        """Slots that have a token, initialized or not."""
        count = c_ulong()
        self.call("C_GetSlotList", 1, None, byref(count))
        while True:
            found = (c_ulong * count.value)()
            if self.call("C_GetSlotList", 1, found, byref(count), good=(_CKR_BUFFER_TOO_SMALL,)) == 0:
                return list(found[: count.value])

    def all_slots(self) -> list[int]:
        """All slots, the numbering of slotIndex."""
        count = c_ulong()
        self.call("C_GetSlotList", 0, None, byref(count))
        found = (c_ulong * count.value)()
        self.call("C_GetSlotList", 0, found, byref(count))
        return list(found[: count.value])

    def token_info(self, slot: int) -> tuple[str, bool]:
        """Label of the token, right blanks removed, and whether it is initialized."""
        info = _TokenInfo()
        self.call("C_GetTokenInfo", slot, byref(info))
        raw = bytes(info)[:32]
        # Some libraries fill up with zero bytes.
        return raw.rstrip(b" \0").decode(errors="replace"), bool(info.flags & CKF_TOKEN_INITIALIZED)

    def init_token(self, slot: int, so_pin: bytes | None, label: str) -> None:
        """Empty the token and name it. The label is padded to 32 blanks: other software strips nothing else."""
        padded = label.encode().ljust(32)[:32]
        self.call("C_InitToken", slot, *_text(so_pin), padded)

    @contextmanager
    def session(self, slot: int, user: int | None = None, pin: bytes | None = None) -> Iterator["Session"]:
        """A session that may write, logged in when a user is given."""
        handle = _SESSION()
        self.call("C_OpenSession", slot, _CKF_RW_SESSION | _CKF_SERIAL_SESSION, None, None, byref(handle))
        try:
            if user is not None:
                self.call("C_Login", handle, user, *_text(pin))
            yield Session(self, handle.value)
        finally:
            self._calls["C_CloseSession"](handle)


class Session:
    """Objects of one token."""

    def __init__(self, library: Library, handle: int) -> None:
        self._call = library.call
        self._handle = handle

    def init_pin(self, pin: bytes | None) -> None:
        """Set the PIN of the user; needs the security officer's login."""
        self._call("C_InitPIN", self._handle, *_text(pin))

    def set_pin(self, old: bytes | None, new: bytes | None) -> None:
        """Change the PIN of who is logged in."""
        self._call("C_SetPIN", self._handle, *_text(old), *_text(new))

    def find(self, template: Template) -> list[int]:
        """Handles of the objects with these attributes."""
        array, _values = _attributes(template)
        self._call("C_FindObjectsInit", self._handle, array, len(template))
        found: list[int] = []
        chunk = (c_ulong * 64)()
        count = c_ulong()
        try:
            while True:
                self._call("C_FindObjects", self._handle, chunk, len(chunk), byref(count))
                if not count.value:
                    return found
                found += chunk[: count.value]
        finally:
            self._call("C_FindObjectsFinal", self._handle)

    def get(self, handle: int, kind: int) -> bytes:
        """An attribute; empty when the object has none or does not give it."""
        one = _Attribute(kind, None, 0)
        if self._call("C_GetAttributeValue", self._handle, handle, byref(one), 1, good=(0x11, 0x12)):
            return b""
        if one.length in (0, _UNAVAILABLE):
            return b""
        value = (c_ubyte * one.length)()
        one.value = ctypes.cast(value, c_void_p)
        self._call("C_GetAttributeValue", self._handle, handle, byref(one), 1)
        return bytes(value[: one.length])

    def create(self, template: Template) -> int:
        """A new object; its handle."""
        array, _values = _attributes(template)
        handle = c_ulong()
        self._call("C_CreateObject", self._handle, array, len(template), byref(handle))
        return handle.value

    def destroy(self, handle: int) -> None:
        """Delete an object."""
        self._call("C_DestroyObject", self._handle, handle)

    def generate_pair(self, mechanism: int, public: Template, private: Template) -> tuple[int, int]:
        """A new key pair; handles of its public and its private half."""
        how = _Mechanism(mechanism, None, 0)
        public_array, _public = _attributes(public)
        private_array, _private = _attributes(private)
        handles = c_ulong(), c_ulong()
        self._call(
            "C_GenerateKeyPair",
            self._handle,
            byref(how),
            *(public_array, len(public), private_array, len(private)),
            *(byref(handle) for handle in handles),
        )
        return handles[0].value, handles[1].value

    def sign(self, key: int, mechanism: int, data: bytes) -> bytes:
        """Signature by a private key."""
        return self._transform("C_SignInit", "C_Sign", key, mechanism, b"", data)

    def decrypt(self, key: int, mechanism: int, parameter: bytes, data: bytes) -> bytes:
        """Plain text of what was encrypted with the public half."""
        return self._transform("C_DecryptInit", "C_Decrypt", key, mechanism, parameter, data)

    def _transform(self, init: str, act: str, key: int, mechanism: int, parameter: bytes, data: bytes) -> bytes:
        buffer = ctypes.create_string_buffer(parameter, len(parameter)) if parameter else None
        how = _Mechanism(mechanism, ctypes.cast(buffer, c_void_p) if buffer else None, len(parameter))
        self._call(init, self._handle, byref(how), key)
        result = (c_ubyte * 1024)()
        length = c_ulong(len(result))
        self._call(act, self._handle, data, len(data), result, byref(length))
        return bytes(result[: length.value])
