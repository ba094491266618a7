"""The cloud's own certificate authority: a root, one intermediate, and everything they sign.

    root (EC P-384, self-signed)
    └── intermediate (EC P-384)
        ├── server          TLS of all listeners, SAN = the cloud's domain and loopback
        ├── item signer     RSA 2048, signs blobs for Units (cm-cloud.md §8.2 knows RSA only)
        ├── users           roles oem and sp, as PKCS#12 files or for a CSR of `aos-keys`
        └── Units           certificate types online, offline, iam, sm, cm for CSRs of the Unit

Keys live in DIR/ca with mode 0600. Development only: no revocation, no key ceremony.
"""

import datetime
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aoscore.common.certs import load_certificates, serial_hex
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.files import write_atomic

ROLES = ("oem", "sp")
CERTIFICATE_TYPES = ("online", "offline", "iam", "sm", "cm")
DOMAIN_URN = "urn:aos:domain:"

_BACKDATE = datetime.timedelta(hours=1)  # tolerates a Unit whose clock is a little behind
_CA_DAYS = 3650
_LEAF_DAYS = 825

CaKey = ec.EllipticCurvePrivateKey
SignKey = rsa.RSAPrivateKey
LeafKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class User:
    """Who a verified client certificate belongs to."""

    name: str
    role: str


def pem(*certificates: x509.Certificate) -> str:
    """PEM text of certificates in the given order."""
    return "".join(one.public_bytes(serialization.Encoding.PEM).decode() for one in certificates)


def domain_of(certificate: x509.Certificate) -> str | None:
    """The cloud domain a user certificate names: SAN URI `urn:aos:domain:…`, else the organization (cloud-rest)."""
    try:
        san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        uris = []
    else:
        uris = san.get_values_for_type(x509.UniformResourceIdentifier)
    for uri in uris:
        if uri.startswith(DOMAIN_URN) and len(uri) > len(DOMAIN_URN):
            return uri.removeprefix(DOMAIN_URN)
    names = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return str(names[0].value) if names else None


def user_of(certificate: x509.Certificate) -> User | None:
    """The user of a certificate that this authority issued; None for any other kind (a Unit's, say)."""
    units = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if not units or not names or units[0].value not in ROLES:
        return None
    return User(str(names[0].value), str(units[0].value))


class Authority:
    """Issues certificates. Created or loaded by `Authority.open`."""

    def __init__(self, directory: Path, domain: str) -> None:
        self.directory = directory
        self.domain = domain
        self.root, self._root_key = self._ca("root", None)
        self.intermediate, self._key = self._ca("intermediate", (self.root, self._root_key))
        self.signer, self.signer_key = self._item_signer()

    @classmethod
    def open(cls, directory: Path, domain: str) -> "Authority":
        """The authority of the directory; root, intermediate and signer are made when they are not there."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(directory, domain)

    @property
    def root_file(self) -> Path:
        """PEM file of the root: what a Unit's `caCert` and the tools' trust store need."""
        return self.directory / "root.crt"

    @property
    def signing_chain(self) -> tuple[x509.Certificate, ...]:
        """Item signer and intermediates, leaf upwards; the root is the Unit's own business."""
        return (self.signer, self.intermediate)

    def chain_pem(self, leaf: x509.Certificate) -> str:
        """Leaf and chain up to the self-signed root, as ApplyCert needs it (observed.md, wire 4)."""
        return pem(leaf, self.intermediate, self.root)

    def server_files(self, hosts: Iterable[str]) -> tuple[Path, Path]:
        """Chain file and key file of the server certificate for these host names and addresses."""
        key = ec.generate_private_key(ec.SECP384R1())
        names: list[x509.GeneralName] = []
        for host in dict.fromkeys([self.domain, *hosts, "localhost", "127.0.0.1", "::1"]):
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        certificate = self._issue(
            self._name(self.domain, "server"),
            key.public_key(),
            [x509.SubjectAlternativeName(names), x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])],
        )
        chain_file, key_file = self.directory / "server.crt", self.directory / "server.key"
        write_atomic(chain_file, pem(certificate, self.intermediate).encode(), 0o644)
        write_atomic(key_file, _private_pem(key))
        return chain_file, key_file

    def user_pkcs12(self, role: str, name: str) -> bytes:
        """Key, certificate and intermediate of a new user as PKCS#12 without password.

        The key is RSA: `aos-signer` signs with RS256.
        """
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        certificate = self._user_certificate(User(name, role), key.public_key())
        return pkcs12.serialize_key_and_certificates(
            name.encode(), key, certificate, [self.intermediate], serialization.NoEncryption()
        )

    def user_certificate(self, csr_pem: str, user: User) -> str:
        """Certificate chain for the CSR of a user; the CSR's own subject is not looked at.

        Raises:
            InvalidArgumentError: no CSR, or its signature is wrong.
        """
        return self.chain_pem(self._user_certificate(user, _load_csr(csr_pem, f"user {user.name}").public_key()))

    def unit_certificate(self, csr_pem: str, system_id: str, discovery_url: str | None = None) -> x509.Certificate:
        """Certificate for a CSR of a Unit: its key, subject alternative names and extended key usage are kept.

        Args:
            csr_pem: the CSR in PEM form; its common name must be the system id.
            system_id: the Unit's system id.
            discovery_url: goes into the issuer alternative name, where CM looks first (cloud-protocol-v7 §1.2).

        Raises:
            InvalidArgumentError: malformed or wrongly signed CSR, or one for another system id.
        """
        csr = _load_csr(csr_pem, f"Unit {system_id}")
        names = [attribute.value for attribute in csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        if names != [system_id]:
            raise InvalidArgumentError(f"CSR of Unit {system_id}: common name is {names}")
        kept: list[x509.ExtensionType] = [
            extension.value
            for extension in csr.extensions
            if isinstance(extension.value, (x509.SubjectAlternativeName, x509.ExtendedKeyUsage))
        ]
        if discovery_url:
            kept.append(x509.IssuerAlternativeName([x509.UniformResourceIdentifier(discovery_url)]))
        return self._issue(self._name(system_id, "unit"), csr.public_key(), kept)

    def _user_certificate(self, user: User, key: CertificatePublicKeyTypes) -> x509.Certificate:
        if user.role not in ROLES:
            raise InvalidArgumentError(f"user role {user.role!r} is none of {', '.join(ROLES)}")
        return self._issue(
            self._name(user.name, user.role),
            key,
            [
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(DOMAIN_URN + self.domain)]),
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]),
            ],
        )

    def _item_signer(self) -> tuple[x509.Certificate, SignKey]:
        stored = self._load("signer")
        if stored is not None and isinstance(stored[1], rsa.RSAPrivateKey):
            return stored[0], stored[1]
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        certificate = self._issue(self._name("item signer", "signer"), key.public_key(), [])
        self._save("signer", certificate, key)
        return certificate, key

    def _ca(self, name: str, issuer: tuple[x509.Certificate, CaKey] | None) -> tuple[x509.Certificate, CaKey]:
        stored = self._load(name)
        if stored is not None and isinstance(stored[1], ec.EllipticCurvePrivateKey):
            return stored[0], stored[1]
        key = ec.generate_private_key(ec.SECP384R1())
        subject = self._name(f"Aos devcloud {name}", "ca")
        certificate = _sign(
            subject=subject,
            issuer=subject if issuer is None else issuer[0].subject,
            key=key.public_key(),
            issuer_key=key if issuer is None else issuer[1],
            days=_CA_DAYS,
            extensions=[
                (x509.BasicConstraints(ca=True, path_length=1 if issuer is None else 0), True),
                (_key_usage(ca=True), True),
            ],
        )
        self._save(name, certificate, key)
        return certificate, key

    def _issue(
        self, subject: x509.Name, key: CertificatePublicKeyTypes, extensions: Iterable[x509.ExtensionType]
    ) -> x509.Certificate:
        return _sign(
            subject=subject,
            issuer=self.intermediate.subject,
            key=key,
            issuer_key=self._key,
            days=_LEAF_DAYS,
            extensions=[
                (x509.BasicConstraints(ca=False, path_length=None), True),
                (_key_usage(ca=False), True),
                *((extension, False) for extension in extensions),
            ],
        )

    def _name(self, common: str, unit: str) -> x509.Name:
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, self.domain),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
                x509.NameAttribute(NameOID.COMMON_NAME, common),
            ]
        )

    def _load(self, name: str) -> tuple[x509.Certificate, object] | None:
        certificate_file, key_file = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        if not (certificate_file.exists() and key_file.exists()):
            return None
        (certificate,) = load_certificates(certificate_file.read_bytes(), what=str(certificate_file))
        return certificate, serialization.load_pem_private_key(key_file.read_bytes(), None)

    def _save(self, name: str, certificate: x509.Certificate, key: LeafKey) -> None:
        write_atomic(self.directory / f"{name}.key", _private_pem(key))
        write_atomic(self.directory / f"{name}.crt", pem(certificate).encode(), 0o644)


def _load_csr(text: str, owner: str) -> x509.CertificateSigningRequest:
    try:
        csr = x509.load_pem_x509_csr(text.encode())
        valid = csr.is_signature_valid
    except (ValueError, TypeError, InvalidSignature) as error:
        raise InvalidArgumentError(f"CSR of {owner} cannot be read: {error}") from error
    if not valid:
        raise InvalidArgumentError(f"CSR of {owner}: signature is wrong")
    return csr


def _private_pem(key: LeafKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=not ca,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _sign(
    *,
    subject: x509.Name,
    issuer: x509.Name,
    key: CertificatePublicKeyTypes,
    issuer_key: CaKey,
    days: int,
    extensions: Iterable[tuple[x509.ExtensionType, bool]],
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key, hashes.SHA384())


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the DER in upper-case hex: the name of a certificate in desired statuses (§4.5)."""
    return certificate.fingerprint(hashes.SHA256()).hex().upper()


def serial(certificate: x509.Certificate) -> str:
    """Serial number as the wire writes it: lower-case hex without separators."""
    return serial_hex(certificate)
