"""Who is at the other end of a call."""

from typing import Any

import msgspec

from aoscore.common.rpc import peer_address, peer_certificate


class Peer(msgspec.Struct, frozen=True):
    """`address` is gRPC's text of it, `host` without the port. The rest is of the client certificate, which TLS has
    checked, and empty without one: digest of its public key, serial (hex), issuer (DER), common names.
    """

    address: str
    host: str
    key: bytes = b""
    serial: str = ""
    issuer: bytes = b""
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, context: Any) -> "Peer":
        """The peer of a running call."""
        address = peer_address(context)
        host = address.rpartition(":")[0] or address
        certificate = peer_certificate(context)
        if certificate is None:
            return cls(address, host)
        from aoscore.common.certs import common_names, issuer_der, key_digest, serial_hex

        return cls(
            address,
            host,
            key_digest(certificate),
            serial_hex(certificate),
            issuer_der(certificate),
            tuple(common_names(certificate)),
        )
