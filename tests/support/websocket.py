"""A WebSocket client in one thread: the sans-I/O core of `websockets` over a blocking socket.

Not `websockets.sync`: that reads in a thread of its own while the caller writes, and older Pythons (3.11 was seen) let
two threads into one TLS object: now and then the request of the handshake is lost, when the server's session tickets
come in at the same moment.
"""

import contextlib
import socket
import time
from collections import deque

from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

Message = bytes | str

_CLOSE_S = 5.0


class WebSocket:
    """An open connection over a connected socket, which may be a TLS one. It answers pings while it receives."""

    def __init__(self, sock: socket.socket, url: str, headers: dict[str, str], timeout_s: float = 20) -> None:
        """Shakes hands. Raises InvalidStatus of `websockets` when the server refuses."""
        self._sock = sock
        self._messages: deque[Message] = deque()
        self._protocol = ClientProtocol(parse_uri(url), max_size=None)
        request = self._protocol.connect()
        request.headers.update(headers)
        self._protocol.send_request(request)
        self._flush()
        end = time.monotonic() + timeout_s
        try:
            while self._protocol.state is State.CONNECTING and self._protocol.handshake_exc is None:
                self._receive(end)
            if self._protocol.handshake_exc is not None:
                raise self._protocol.handshake_exc
        except BaseException:
            sock.close()
            raise

    def send(self, message: Message) -> None:
        """Send a binary or a text frame."""
        if isinstance(message, str):
            self._protocol.send_text(message.encode())
        else:
            self._protocol.send_binary(message)
        self._flush()

    def recv(self, timeout_s: float) -> Message:
        """The next message. Raises TimeoutError, or ConnectionClosed of `websockets`."""
        end = time.monotonic() + timeout_s
        while not self._messages:
            if self._protocol.state is State.CLOSED:
                raise self._protocol.close_exc
            self._receive(end)
        return self._messages.popleft()

    def close(self) -> None:
        """Say good-bye, wait for the answer, close the socket."""
        end = time.monotonic() + _CLOSE_S
        with self._sock, contextlib.suppress(TimeoutError):
            if self._protocol.state is State.OPEN:
                self._protocol.send_close(1000)
                self._flush()
            while self._protocol.state is not State.CLOSED:
                self._receive(end)

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            # What the server has sent before it went away is still to be read; then its end is seen.
            with contextlib.suppress(OSError):
                self._sock.settimeout(None)
                self._sock.sendall(data)

    def _receive(self, end: float) -> None:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("no message in time")
        self._sock.settimeout(left)
        try:
            data = self._sock.recv(65536)
        except TimeoutError:
            raise
        except OSError:
            data = b""
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        self._flush()
        for event in self._protocol.events_received():
            if isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                assert event.fin, "the cloud sends no fragments"
                data = bytes(event.data)
                self._messages.append(data.decode() if event.opcode is Opcode.TEXT else data)
