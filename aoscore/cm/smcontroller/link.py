"""One RegisterSM stream: frames out in order, replies back to whoever waits for them."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common.errors import DeadlineError, FailedError

REPLY_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 10.0
_OUTBOX_LIMIT = 64

Frame = pb.SMIncomingMessages


class SmLink:
    """A connected SM. `node_id` is empty until its first frame."""

    def __init__(self) -> None:
        self.node_id = ""
        self._outbox: asyncio.Queue[Frame] = asyncio.Queue(_OUTBOX_LIMIT)
        self._waiting: dict[str, tuple[asyncio.Future[Any], Callable[[Any], bool]]] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.closed = asyncio.Event()

    @property
    def name(self) -> str:
        """For messages."""
        return f"node {self.node_id or '(unknown)'}"

    async def send(self, frame: Frame) -> None:
        """Queue a frame; it leaves in order. Raises DeadlineError when the SM takes nothing any more."""
        if self.closed.is_set():
            raise FailedError(f"{self.name} is disconnected")
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._outbox.put(frame)
        except TimeoutError:
            raise DeadlineError(f"{self.name} takes no messages") from None

    async def next_frame(self) -> Frame:
        """The frame to write now."""
        return await self._outbox.get()

    async def request(self, frame: Frame, reply: str, *, accept: Callable[[Any], bool] = lambda _: True) -> Any:
        """Send a frame and wait for the reply, a member of SMOutgoingMessages.

        Replies carry no id: there is one request per kind at a time, and `accept` refuses what belongs to an earlier
        one. Raises DeadlineError after 5 s, FailedError when the SM disconnects.
        """
        async with self._turns[reply]:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._waiting[reply] = future, accept
            try:
                await self.send(frame)
                async with asyncio.timeout(REPLY_TIMEOUT_S):
                    return await future
            except TimeoutError:
                kind = frame.WhichOneof("SMIncomingMessage")
                raise DeadlineError(f"{self.name} did not answer {kind} within {REPLY_TIMEOUT_S:g} s") from None
            finally:
                del self._waiting[reply]

    def on_reply(self, reply: str, message: Any) -> bool:
        """Hand a reply to its request; False when nobody waits for it."""
        future, accept = self._waiting.get(reply, (None, None))
        if future is None or accept is None or future.done() or not accept(message):
            return False
        future.set_result(message)
        return True

    def close(self) -> None:
        """The stream is at its end: nothing can be sent, requests fail."""
        self.closed.set()
        for future, _ in self._waiting.values():
            if not future.done():
                future.set_exception(FailedError(f"{self.name} disconnected"))
