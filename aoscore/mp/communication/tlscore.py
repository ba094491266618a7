"""TLS over a channel, in memory (mp-wire §6). Pure: payloads in, plaintext and records out.

Chains are checked, names are not: the channel's peer is known by its certificate, not by a host name.
"""

import ssl
from collections.abc import Callable, Sequence

from aoscore._speedups.frames import new_buffer
from aoscore.common.errors import FailedError
from aoscore.mp.communication.frames import Bytes

_RECORD_BYTES = 16 * 1024 + 256 + 5
"""The longest record (RFC 5246 §6.2.3): so much may be left over from the payloads before."""
_MOST_BYTES = 16 * 1024
"""Of plaintext in one (RFC 8446 §5.1)."""
_HANDSHAKE_RECORD = 22
_CLIENT_HELLO = 1
_TYPE_OFFSET = 5


def is_client_hello(payload: Bytes) -> bool:
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

    def feed(self, payloads: Sequence[Bytes]) -> Bytes:
        """Take payloads, give the plaintext in them. No payload begins the handshake of a client.

        What came before TLS failed is given, too: look at `failure`.
        """
        for payload in payloads:
            self._incoming.write(payload)
        # Plaintext is shorter than its records, so all of it has room.
        plain = memoryview(new_buffer(sum(map(len, payloads)) + _RECORD_BYTES))
        size, due = 0, len(payloads)
        incoming, tls = self._incoming, self._tls
        try:
            if not self.is_ready:
                tls.do_handshake()
                self.is_ready = True
            # Into a buffer, as SSLSocket.recv_into does; how the types are declared leaves that out.
            read: Callable[[int, memoryview], int] = tls.read  # type: ignore[assignment]
            while count := read(_MOST_BYTES, plain[size:]):
                size += count
                due -= 1
                # As a rule each payload is a record. Asking for more ends in an exception, which costs as much as one.
                if due <= 0 and not incoming.pending and not tls.pending():
                    break
            else:
                self.is_closed = True
        except ssl.SSLZeroReturnError:
            self.is_closed = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.failure = FailedError(f"TLS failed: {_reason(error)}")
        return plain[:size]

    def write(self, data: bytes) -> None:
        """Encrypt plaintext."""
        self._tls.write(data)

    def close(self) -> None:
        """Say that nothing more comes."""
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # the peer has not answered yet, or TLS has failed: either way there is nothing more to say

    def output(self) -> bytes:
        """The records to send now."""
        return self._outgoing.read()


def _reason(error: ssl.SSLError) -> str:
    """What OpenSSL says, and for a certificate why it is refused."""
    return getattr(error, "verify_message", "") or error.reason or str(error)
