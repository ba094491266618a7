"""TLS over a channel, in memory (mp-wire §6). Pure: payloads in, plaintext and records out.

Chains are checked, names are not: the channel's peer is known by its certificate, not by a host name.
"""

import ssl
from collections.abc import Iterable, Iterator

from aoscore.common.errors import FailedError
from aoscore.mp.communication.frames import Bytes, split_records

_READ_BYTES = 16 * 1024
"""Of plaintext, which is the most that a record holds (RFC 8446 §5.1)."""
_HANDSHAKE_RECORD = 22
_CLIENT_HELLO = 1
_TYPE_OFFSET = 5


def is_client_hello(payload: bytes) -> bool:
    """Whether a payload begins a TLS handshake (RFC 8446 §4): anything else belongs to a connection that is over."""
    return len(payload) > _TYPE_OFFSET and payload[0] == _HANDSHAKE_RECORD and payload[_TYPE_OFFSET] == _CLIENT_HELLO


class TlsCore:
    """One TLS connection."""

    def __init__(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self.is_ready = False
        """The handshake is done: plaintext can be sent."""
        self.is_closed = False
        """The peer said that it sends nothing more."""
        self.failure: FailedError | None = None
        """Why TLS is over before that."""

    @property
    def peer_der(self) -> bytes:
        """The peer's certificate, once ready."""
        return self._tls.getpeercert(binary_form=True) or b""

    def feed(self, payloads: Iterable[bytes]) -> list[bytes]:
        """Take payloads, give the plaintext in them, by record. No payload begins the handshake of a client.

        What came before TLS failed is given, too: look at `failure`.
        """
        for payload in payloads:
            self._incoming.write(payload)
        pieces: list[bytes] = []
        try:
            if not self.is_ready:
                self._tls.do_handshake()
                self.is_ready = True
            while piece := self._tls.read(_READ_BYTES):
                pieces.append(piece)
                if not self._incoming.pending and not self._tls.pending():
                    break  # asking for more would end in an exception, which costs as much as the piece
            else:
                self.is_closed = True
        except ssl.SSLZeroReturnError:
            self.is_closed = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.failure = FailedError(f"TLS failed: {_reason(error)}")
        return pieces

    def write(self, data: bytes) -> None:
        """Encrypt plaintext."""
        self._tls.write(data)

    def close(self) -> None:
        """Say that nothing more comes."""
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # the peer has not answered yet, or TLS has failed: either way there is nothing more to say

    def records(self) -> Iterator[Bytes]:
        """The records to send now, one per frame."""
        return split_records(self._outgoing.read())


def _reason(error: ssl.SSLError) -> str:
    """What OpenSSL says, and for a certificate why it is refused."""
    return getattr(error, "verify_message", "") or error.reason or str(error)
