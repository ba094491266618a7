"""Private keys that never leave their token, usable wherever `cryptography` takes a private key (iam.md §20)."""

from typing import Any, Generic, NoReturn, Self, TypeVar

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature

from aoscore.common.errors import InvalidArgumentError, NotSupportedError
from aoscore.common.pkcs11.token import Token, command
from aoscore.common.pkcs11.url import TokenUrl

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
K = TypeVar("K", bound=PublicKey)

# Mechanisms (PKCS#11 2.40), the helper passes them on.
_CKM_RSA_PKCS, _CKM_RSA_PKCS_OAEP, _CKM_ECDSA = 0x1, 0x9, 0x1041
# DER of DigestInfo up to the digest (RFC 8017 §9.2, note 1).
_DIGEST_INFO = {
    "sha256": bytes.fromhex("3031300d060960864801650304020105000420"),
    "sha384": bytes.fromhex("3041300d060960864801650304020205000430"),
    "sha512": bytes.fromhex("3051300d060960864801650304020305000440"),
}
# CKM_ and CKG_MGF1_ numbers by hash (PKCS#11 2.40).
_OAEP = {"sha1": (0x220, 1), "sha256": (0x250, 2), "sha384": (0x260, 3), "sha512": (0x270, 4)}


def _digest(data: Any, algorithm: Any) -> tuple[str, bytes]:
    """Name of the hash, and the digest of data."""
    if isinstance(algorithm, Prehashed):
        # No public name in cryptography 42.
        return str(algorithm._algorithm.name), bytes(data)
    state = hashes.Hash(algorithm)
    state.update(data)
    return str(algorithm.name), state.finalize()


class _TokenKey(Generic[K]):
    """What both kinds of keys have in common."""

    def __init__(self, token: Token, label: str, key_id: str, public_key: K) -> None:
        self._token = token
        self._label = label
        self._id = key_id
        self._public_key = public_key

    def public_key(self) -> K:
        """The public half."""
        return self._public_key

    @property
    def key_size(self) -> int:
        """Bits."""
        return self._public_key.key_size

    def private_numbers(self) -> NoReturn:
        """The key stays on the token."""
        raise NotSupportedError("a key on a token can't be exported")

    def private_bytes(self, encoding: Any, format: Any, encryption_algorithm: Any) -> NoReturn:
        """The key stays on the token."""
        raise NotSupportedError("a key on a token can't be exported")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[Any, Any]) -> Self:
        return self

    def _use(self, do: str, **arguments: Any) -> bytes:
        """What the helper answers to a command with this key."""
        (raw,) = self._token.run(command(do, label=self._label, key_id=self._id, **arguments))
        return bytes.fromhex(raw)


class TokenEcKey(_TokenKey[ec.EllipticCurvePublicKey], ec.EllipticCurvePrivateKey):
    """An EC key; each signature is a call of the token."""

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """DER signature, ECDSA."""
        _, digest = _digest(data, signature_algorithm.algorithm)
        value = self._use("sign", mechanism=_CKM_ECDSA, data=digest.hex())
        half = len(value) // 2
        return encode_dss_signature(int.from_bytes(value[:half], "big"), int.from_bytes(value[half:], "big"))

    @property
    def curve(self) -> ec.EllipticCurve:
        """The curve."""
        return self._public_key.curve

    def exchange(self, algorithm: Any, peer_public_key: Any) -> bytes:
        """Not needed here."""
        raise NotSupportedError("keys on tokens are for signatures")


class TokenRsaKey(_TokenKey[rsa.RSAPublicKey], rsa.RSAPrivateKey):
    """An RSA key; each signature and each decryption is a call of the token."""

    def sign(self, data: Any, padding: Any, algorithm: Any) -> bytes:
        """Signature with PKCS#1 v1.5 padding."""
        if padding.name != "EMSA-PKCS1-v1_5":
            raise NotSupportedError(f"signature padding {padding.name} is not supported with keys on tokens")
        name, digest = _digest(data, algorithm)
        if name not in _DIGEST_INFO:
            raise NotSupportedError(f"hash {name} is not supported with keys on tokens")
        return self._use("sign", mechanism=_CKM_RSA_PKCS, data=(_DIGEST_INFO[name] + digest).hex())

    def decrypt(self, ciphertext: bytes, padding: Any) -> bytes:
        """Plain text, PKCS#1 v1.5 or OAEP with one hash for both uses."""
        mechanism, parameter = _decryption(padding)
        return self._use("decrypt", mechanism=mechanism, parameter=parameter, data=ciphertext.hex())


def _decryption(how: Any) -> tuple[int, tuple[int, ...]]:
    if isinstance(how, padding.PKCS1v15):
        return _CKM_RSA_PKCS, ()
    if isinstance(how, padding.OAEP) and (name := how._algorithm.name) in _OAEP:
        return _CKM_RSA_PKCS_OAEP, _OAEP[name]
    raise NotSupportedError(f"decryption with padding {how.name} is not supported with keys on tokens")


def public_key_of(entry: dict[str, str]) -> PublicKey:
    """The key that the helper describes. Raises InvalidArgumentError for one of another kind."""
    try:
        if entry["modulus"]:
            return rsa.RSAPublicNumbers(int(entry["exponent"], 16), int(entry["modulus"], 16)).public_key()
        point = bytes.fromhex(entry["point"])
        # Cryptoki wraps the point into an OCTET STRING; some libraries do not.
        if len(point) > 2 and point[0] == 0x04 and point[1] == len(point) - 2:
            point = point[2:]
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), point)
    except ValueError as error:
        raise InvalidArgumentError(f"public key {entry['label']!r} with id {entry['id']}: {error}") from None


def token_key(token: Token, label: str, key_id: str, public_key: PublicKey) -> TokenEcKey | TokenRsaKey:
    """The private key for a public one."""
    if isinstance(public_key, rsa.RSAPublicKey):
        return TokenRsaKey(token, label, key_id, public_key)
    return TokenEcKey(token, label, key_id, public_key)


def load_token_key(url: TokenUrl) -> TokenEcKey | TokenRsaKey:
    """The key at an address. Raises the errors of Token.run."""
    token = Token.of(url, login=True)
    (entry,) = token.run(command("public", label=url.object, key_id=url.id))
    return token_key(token, url.object, url.id, public_key_of(entry))
